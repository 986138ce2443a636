"""The compression table: rows are kept and gone on with, failures shown, and the frontier is what nothing beats."""

import json

import pytest
import torch

from lowbit.bench.compress import line, main, read, select
from lowbit.bench.compress_rows import rows
from lowbit.bench.frontier import frontier, frontier_svg
from lowbit.errors import RecipeError
from lowbit.recipe import Recipe
from tests.cli.helpers import words
from tests.sources import tiny_models as tiny


def row(name, bytes_, ppl, **more):
    return {"name": name, "bytes": bytes_, "ppl": ppl, "bits": 3.0, "bits_file": 3.5, "error": None, **more}


def test_every_row_is_a_recipe():
    for name, recipe in rows().items():
        assert "goal" in recipe or Recipe(**recipe), name


def test_the_frontier_is_what_nothing_beats():
    found = [row("a", 10, 5.0), row("b", 12, 6.0), row("c", 12, 4.0), row("d", 20, 4.0), row("e", 9, 50.0)]
    found.append({"name": "f", "error": "no"})
    assert [r["name"] for r in frontier(found)] == ["e", "a", "c"]
    assert "failed: no" in line(found[-1]) and "| 5.00 |" in line(found[0])
    drawn = frontier_svg([row("a", 6e7, 40.0), row("worse", 7e7, 45.0), row("broken", 5e7, 1e6)])
    assert "worse" in drawn and "broken" not in drawn


def test_rows_by_name():
    assert list(select("gptq-3,rtn-*")) == ["gptq-3", "rtn-4", "rtn-3", "rtn-2"]
    with pytest.raises(RecipeError, match="Did you mean"):
        select("gptq-33")


@pytest.mark.slow
def test_a_table_end_to_end(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    net = tiny.model("llama")
    net.config.max_position_embeddings = 512
    net.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    text = words(tmp_path / "words.txt", 4000)
    made = {"rtn-4": {"method": "rtn", "bits": 4, "group": 16}, "bad": {"method": "rtn", "bits": 4, "group": 7}}
    made["goal"] = {"goal": {"bits": 4.2, "allocate": "uniform", "windows": 4, "context": 16}}
    monkeypatch.setattr("lowbit.bench.compress.rows", lambda: made)
    arguments = [str(tmp_path / "model"), "--data", str(text), "--out", str(tmp_path / "t"), "--windows", "1"]
    assert main(arguments) == 0
    found = {r["name"]: r for r in read(tmp_path / "t" / "rows.jsonl")}
    assert found["rtn-4"]["ppl"] > 0 and found["rtn-4"]["error"] is None and "group=7" in found["bad"]["error"]
    assert found["rtn-4"]["decode_tokens_per_second"] > 0 and found["goal"]["bits"] <= 4.2
    before = (tmp_path / "t" / "rows.jsonl").read_text()
    assert main(arguments) == 0
    again = (tmp_path / "t" / "rows.jsonl").read_text().removeprefix(before)
    assert [json.loads(x)["name"] for x in again.splitlines()] == ["bad"], "only what failed is tried again"
    assert "rtn-4" in (tmp_path / "t" / "table.md").read_text()
