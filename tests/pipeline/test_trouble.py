"""Calibration that cannot say much (few tokens, a foreign language, dead inputs) is warned of, counted, survived."""

import json

import pytest
import torch

from lowbit.api import compress_model
from lowbit.cli.compress import _write_report
from lowbit.errors import DataError
from lowbit.report.view import trouble
from lowbit.runtime.artifact import load
from lowbit.sources import foreign_note
from tests.cli.helpers import words
from tests.sources import tiny_models as tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three channels that enter the first block's attention are always zero."""
    folder = tmp_path_factory.mktemp("trouble") / "model"
    torch.manual_seed(0)
    net = tiny.model("llama")
    net.model.layers[0].input_layernorm.weight.data[:3] = 0
    net.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def noted(events):
    return " ".join(note for e in events for note in e.get("notes") or [])


@pytest.mark.parametrize("method", ["gptq", pytest.param("icquant", marks=pytest.mark.slow)])
def test_twenty_tokens_warn_and_still_give_a_model(model, tmp_path, method):
    text, events = tmp_path / "short.txt", []
    text.write_text(" ".join(f"w{i}" for i in range(3, 23)))
    compress_model(model, tmp_path / "out", method=method, bits=4, group=32, data=str(text), progress=events.append)
    assert "has 20 tokens, less than one window of 512: far too little" in noted(events)
    logits = load(tmp_path / "out")(torch.arange(3, 20)[None]).logits
    assert torch.isfinite(logits).all()


def test_a_context_that_was_typed_is_kept(model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("w3 w4 w5")
    with pytest.raises(DataError, match="fewer than one window of 8"):
        compress_model(model, tmp_path / "out", bits=4, group=16, data=str(text), context=8)


def test_dead_inputs_are_counted_in_the_report(model, tmp_path):
    text = words(tmp_path / "words.txt")
    compress_model(model, tmp_path / "out", bits=4, group=16, data=str(text), windows=2, context=16)
    found = json.loads((tmp_path / "out" / "run.json").read_text())["calibration"]
    first = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    assert found["dead"] == dict.fromkeys(first, 3), "no other layer has any"
    _write_report(tmp_path / "out")
    assert "9 inputs of 3 layers" in (tmp_path / "out" / "report.html").read_text()


def test_a_foreign_text_is_noticed():
    assert "150 tokens for 100 characters" in foreign_note("語" * 200, 300)
    assert foreign_note("The tower is 324 metres tall. " * 10, 80) == ""


@pytest.mark.parametrize("damaged", [None, [], "x", {"dead": [1]}, {"dead": {"a": "b"}, "damped": {"a": 1}}])
def test_a_damaged_run_file_says_nothing(damaged):
    assert trouble(damaged) == []


def test_more_damping_is_said():
    assert "2 layers (first a)" in trouble({"damped": ["a", "b"]})[0]
