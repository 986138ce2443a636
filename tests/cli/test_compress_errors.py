"""Every way a compression can go wrong ends with one sentence, an exit code that is not 0, and nothing left behind."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.helpers import refused, run, words
from tests.sources import tiny_models as tiny

SMALL = ("--bits", 4, "--group", 16, "--windows", 2, "--context", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "model"
    torch.manual_seed(0)
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return words(tmp_path / "words.txt")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the artifact would go; checked afterwards: neither it nor a half-written folder is there."""
    return tmp_path / "place" / "out"


def left_behind(out: Path) -> list[str]:
    """What stands where OUT would be; the finished blocks of a stopped run may stay, for going on."""
    return [p.name for p in out.parent.glob("*") if p.name != f"{out.name}.partial"] if out.parent.exists() else []


def test_missing_data_file(model: Path, out: Path) -> None:
    assert "nowhere.txt: no such file" in refused("compress", model, "-o", out, *SMALL, "--data", "nowhere.txt")
    assert not left_behind(out)


def test_a_method_that_needs_data_and_gets_none(model: Path, out: Path) -> None:
    assert "add --data FILE" in refused("compress", model, "-o", out, *SMALL, "--method", "gptq")
    assert not left_behind(out)


def test_an_empty_format(model: Path, out: Path) -> None:
    assert "the format is empty: give one, e.g. --format uint4-g64" in refused(
        "compress", model, "-o", out, "--format", ""
    )


def test_float64_is_said(tmp_path: Path) -> None:
    """Digits that are not read, in a line of the plan."""
    net = tiny.model("llama").double()
    net.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    how = ("--method", "rtn", "--bits", 4, "--group", 16)
    said = run("compress", tmp_path / "model", "-o", tmp_path / "out", *how)
    assert "tensors are float64 and are read as float32" in said.stdout + said.stderr


def test_missing_model(out: Path, text: Path) -> None:
    assert "no such file or folder" in refused("compress", "./nowhere.gguf", "-o", out, *SMALL, "--data", text)
    assert not left_behind(out)


def test_wrong_tokenizer(model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    tiny.tokenizer(words=500).save_pretrained(other)
    said = refused("compress", model, "-o", out, *SMALL, "--data", text, "--tokenizer", other)
    assert "ids up to 499" in said and "--tokenizer" in said
    assert not left_behind(out)


def test_truncated_model(model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused("compress", broken, "-o", out, *SMALL, "--data", text)
    assert not left_behind(out)


def test_weights_that_are_not_numbers(out: Path, text: Path, tmp_path: Path) -> None:
    net = tiny.model("llama")
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    net.save_pretrained(tmp_path / "nan")
    tiny.tokenizer().save_pretrained(tmp_path / "nan")
    said = refused("compress", tmp_path / "nan", "-o", out, *SMALL, "--data", text)
    assert "model.layers.1.mlp.up_proj" in said and "NaN" in said
    assert not left_behind(out)


def test_text_shorter_than_a_window(model: Path, out: Path, tmp_path: Path) -> None:
    short = words(tmp_path / "short.txt", 12)
    assert "12 tokens" in refused("compress", model, "-o", out, *SMALL, "--data", short)
    assert not left_behind(out)


def test_a_group_that_does_not_divide(model: Path, out: Path, text: Path) -> None:
    how = ("--bits", 4, "--group", 24, "--windows", 2, "--context", 16)
    said = refused("compress", model, "-o", out, *how, "--data", text)
    assert "group=24" in said and "--group 32" in said
    assert not left_behind(out)


def test_an_existing_folder_is_not_replaced(model: Path, out: Path, text: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    assert "exists already" in refused("compress", model, "-o", out, *SMALL, "--data", text)
    said = refused("compress", model, "-o", out, *SMALL, "--data", text, "--force")
    assert "holds other files" in said and (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("size", ["lots", "8 elephants", "-3GB", "8", ""])
def test_max_ram_that_is_no_size(model: Path, out: Path, text: Path, size: str) -> None:
    said = refused("compress", model, "-o", out, *SMALL, "--data", text, f"--max-ram={size}", code=2)
    assert "GB" in said and not left_behind(out)


def test_max_ram_that_is_too_small(model: Path, out: Path, text: Path) -> None:
    said = refused("compress", model, "-o", out, *SMALL, "--data", text, "--max-ram", "2MB")
    assert "ceiling" in said and "Try --max-ram" in said and not left_behind(out)


def test_unknown_names_list_the_near_ones(model: Path, out: Path, text: Path) -> None:
    assert "Did you mean 'gptq'" in refused("compress", model, "-o", out, "--method", "gptx", "--data", text)
    assert "Did you mean 'damping'" in refused("compress", model, "-o", out, "--data", text, "--set", "dampin=0.1")
    assert "Did you mean" in refused("compress", model, "-o", out, "--data", text, "--format", "uint44-g16")
    assert "compress" in refused("compres", code=2)
    assert "--data" in refused("compress", model, "-o", out, "--dta", text, code=2)
    assert not left_behind(out)


def test_options_that_contradict_each_other(model: Path, out: Path) -> None:
    assert "--format" in refused("compress", model, "-o", out, "--format", "nf4-g16", "--bits", 3, code=2)
    assert "--group" in refused("compress", model, "-o", out, "--group", 0, code=2)
    assert "float or int8" in refused("compress", model, "-o", out, "--activations", "int4", code=2)
    assert "key=value" in refused("compress", model, "-o", out, "--set", "damping", code=2)


@pytest.mark.parametrize("where", ["while blocks are kept", "while the artifact is written"])
def test_full_disk(model: Path, out: Path, text: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "while blocks are kept":
        monkeypatch.setattr("lowbit.pipeline.checkpoint.os.fsync", full)
    else:
        monkeypatch.setattr("lowbit.runtime.artifact_write.write_block", full)
    said = refused("compress", model, "-o", out, *SMALL, "--data", text)
    assert "free some space" in said and not left_behind(out)


def test_interrupted(model: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.api.write_artifact", stop)
    done = run("compress", model, "-o", out, *SMALL, "--data", text)
    assert done.exit_code == 130 and "type the same command again" in done.stderr
    monkeypatch.undo()
    done = run("compress", model, "-o", out, *SMALL, "--data", text)
    assert done.exit_code == 0 and "Going on from block 2 of 2" in done.stdout
    assert (out / "report.html").is_file() and not (out.parent / "out.partial").exists()


def test_a_text_with_a_token_that_the_model_has_no_row_for(model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = (
        "compress",
        model,
        "-o",
        out,
        *SMALL,
        "--method",
        "hqq",
        "--data",
        text,
        "--tokenizer",
        tmp_path / "tokenizer",
    )
    text.write_text(text.read_text() + "<extra> " * 600)
    assert "vocabulary is 0 to 63" in refused(*given)
    assert not left_behind(out)


def test_a_folder_on_a_read_only_disk(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(out))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "a place you may write to" in refused("compress", model, "-o", out, *SMALL, "--method", "rtn")


def test_a_gguf_whose_tokenizer_gets_a_word_from_transformers(out: Path, tmp_path: Path) -> None:
    tiny.write_llama_gguf(tmp_path / "tiny.gguf")
    done = run("compress", tmp_path / "tiny.gguf", "-o", out, "--method", "rtn", "--group", 16)
    assert done.exit_code == 0, done.stderr
    said = refused("generate", out, "--prompt", "<|endoftext|>", "--raw")
    assert "token id 64" in said
