"""The commands on a tiny model: what they print, what they keep, what --json means."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lowbit.cli import app
from lowbit.cli._shell import Shell, clean, jsonable
from lowbit.cli._values import parse_settings, parse_size
from tests.cli.helpers import RUNNER, refused, run, run_json, words
from tests.sources import tiny_models as tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model, a text, and the model compressed."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    tiny.model("llama").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    text = words(folder / "words.txt")
    data = ("--data", f"{text}[:50%]", "--windows", 2, "--context", 16)
    done = run("compress", folder / "model", "-o", folder / "out", "--bits", 4, "--group", 16, *data)
    assert done.exit_code == 0, done.stderr or done.exception
    (folder / "said.txt").write_text(done.stdout)
    return folder


def test_compress_says_the_plan_each_block_and_what_to_type_next(place: Path) -> None:
    said = (place / "said.txt").read_text()
    assert said.startswith("Plan: peak memory about ")
    assert "block 1/2 " in said and "block 2/2 " in said and " left  memory " in said
    assert "bits per weight" in said and "lowbit eval" in said and "\x1b" not in said


def test_compress_writes_the_report(place: Path) -> None:
    assert "<svg" in (place / "out" / "report.html").read_text("utf-8")


def test_eval_is_kept_and_shown(place: Path) -> None:
    options = ("--text", f"{place / 'words.txt'}[50%:]", "--context", 16, "--windows", 3)
    found = run_json("eval", place / "out", *options, "--against", place / "model")
    assert found["windows"] == 3 and 0.8 < found["perplexity"] / found["float_perplexity"] < 1.3 and found["kl"] > 0
    assert found["text"] == "words.txt[50%:]"
    kept = json.loads((place / "out" / "run.json").read_text())["evaluations"][-1]
    assert kept["perplexity"] == found["perplexity"]
    assert f"{found['perplexity']:.4g}" in (place / "out" / "report.html").read_text("utf-8")
    alone = run_json("eval", place / "model", *options)
    assert alone["perplexity"] == pytest.approx(found["float_perplexity"]) and alone["float_perplexity"] is None
    assert "perplexity" in run("eval", place / "out", *options, "--activations", "int8").stdout


def test_eval_of_the_second_protocol_and_a_stride(place: Path) -> None:
    options = ("--text", place / "words.txt", "--context", 16, "--windows", 3)
    assert run_json("eval", place / "out", *options, "--protocol", "llama.cpp")["protocol"] == "llama.cpp"
    assert run_json("eval", place / "out", *options, "--stride", 8)["stride"] == 8
    assert "Did you mean 'gptq'" in refused("eval", place / "out", *options, "--protocol", "gpt")


def test_generate(place: Path) -> None:
    found = run_json("generate", place / "out", "--prompt", "w5 w6", "--max-tokens", 4)
    assert found["new_tokens"] == 4 and found["prompt_tokens"] == 2
    said = run("generate", place / "out", "--prompt", "w5 w6", "--max-tokens", 4)
    assert said.stdout.strip() == found["text"].strip() and "tokens/s" in said.stderr


def test_generate_at_the_edges(place: Path) -> None:
    out, words = place / "out", ("--prompt", "w5 w6", "--max-tokens", 4)
    greedy = run_json("generate", out, *words)["text"]
    for nearly in ("1e-30", "1e-45", "1e-300"):
        assert run_json("generate", out, *words, "--temperature", nearly)["text"] == greedy
    assert "64 bits" in refused("generate", out, *words, "--temperature", 1, "--seed", 2**64)
    assert "not UTF-8" in refused("generate", out, "--prompt", "w5 \udcff")


@pytest.mark.parametrize(("given", "said"), [(b"w5 w6\n", ""), (b"\xff w5", "not UTF-8")])
def test_a_prompt_from_standard_input(place: Path, given: bytes, said: str) -> None:
    done = RUNNER.invoke(app, ["generate", str(place / "out"), "--prompt", "-", "--max-tokens", "2"], input=given)
    assert done.exit_code == bool(said) and said in done.stderr


def test_a_report_does_not_replace_weights(place: Path, tmp_path: Path) -> None:
    out = place / "out"
    for name in ("model.safetensors", "lowbit.json", "run.json"):
        before = (out / name).read_bytes()
        assert "part of the artifact" in refused("report", out, "--to", out / name)
        assert (out / name).read_bytes() == before
    assert "is a folder" in refused("report", out, "--to", tmp_path)
    assert run("report", out, "--to", tmp_path / "model.safetensors").exit_code == 0


def test_an_encoder_whose_tokenizer_has_no_mask_is_not_measured_as_a_decoder(place: Path, tmp_path: Path) -> None:
    """It sees the tokens it would have to predict."""
    tiny.model("bert").save_pretrained(tmp_path / "bert")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "bert")
    given = ("eval", tmp_path / "bert", "--text", place / "words.txt", "--context", 16, "--windows", 2)
    assert "no mask token" in refused(*given)
    tokenizer.add_special_tokens({"mask_token": "w3"})
    tokenizer.save_pretrained(tmp_path / "bert")
    assert run_json(*given)["protocol"] == "masked"


def test_inspect_refuses_a_changed_file(place: Path, tmp_path: Path) -> None:
    import shutil

    found = run_json("inspect", place / "out")
    assert found["ok"] and any(la["name"] == "model.layers.0.mlp.up_proj" for la in found["layers"])
    damaged = Path(shutil.copytree(place / "out", tmp_path / "damaged"))
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    assert "SHA-256" in refused("inspect", damaged)
    assert "no lowbit artifact" in refused("inspect", place / "model")


def test_methods() -> None:
    rows = run_json("methods", "--kind", "solver")["methods"]
    assert {"rtn", "hqq", "gptq", "awq"} <= {r["name"] for r in rows} and all(r["source"] for r in rows)
    assert {"solver", "estimator"} <= {r["kind"] for r in run_json("methods")["methods"]}
    assert "Did you mean 'solver'" in refused("methods", "--kind", "solvr")


def test_doctor_fails_when_a_kernel_row_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_json("doctor")["ok"]
    bad = [{"op": "decode", "format": "table16", "isa": "avx2", "active": True, "selfcheck": "failed"}]
    monkeypatch.setattr("lowbit.runtime.kernels.rows", lambda: bad)
    assert "decode/table16/avx2" in refused("doctor")
    done = run("doctor", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["ok"] is False


def test_errors_with_json_are_one_object_too() -> None:
    done = run("inspect", "nowhere", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["error"]["type"] == "ArtifactError"
    assert done.stderr.startswith("lowbit: ")


def test_help_is_quick_and_says_where_to_begin() -> None:
    code = "import sys; sys.argv = ['lowbit', '--help']\nimport atexit\natexit.register(lambda: print(sorted({'torch', "
    code += "'transformers', 'numpy', 'jinja2'} & set(sys.modules))))\nfrom lowbit.cli import main; main()"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]"), "help imports something heavy"
    assert time.perf_counter() - began < 5  # about 0.35 s on an idle machine
    assert "lowbit demo" in done.stdout and done.stdout.index("lowbit demo") < done.stdout.index("lowbit compress")


def test_sizes_and_settings() -> None:
    assert parse_size("8GB") == 8_000_000_000 and parse_size("1.5GiB") == 1_610_612_736
    assert parse_size("900 MB") == 900_000_000 and parse_size("2g") == 2_000_000_000
    assert parse_settings(["damping=0.01", "act_order=false", "name=a=b"]) == {
        "damping": 0.01,
        "act_order": False,
        "name": "a=b",
    }


def test_names_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert clean("a\x1b[2Jb\x07") == "a�[2Jb�"
    Shell().table(["name", ">n"], [("x\x1b[31m", 1)])
    assert "\x1b" not in capsys.readouterr().out


def test_json_has_no_nan() -> None:
    assert jsonable({"a": float("inf"), "b": [float("nan"), 1.5], "c": Path("x")}) == {
        "a": None,
        "b": [None, 1.5],
        "c": "x",
    }
