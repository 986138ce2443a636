"""The main job on a real model: SmolLM2-135M at 4 bits, compressed, loaded, measured. Needs the assets; minutes."""

import json
import os
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.api import compress_model
from lowbit.evaluate import perplexity
from lowbit.runtime import set_activations
from lowbit.sources import fill, open_model, read_text, set_tensor, token_ids
from lowbit.sources.module import ModuleSource

pytestmark = pytest.mark.slow
WINDOWS, CONTEXT = 8, 512


@pytest.fixture(scope="module")
def source(assets: Path):
    return open_model(assets / "models" / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def text(assets: Path) -> str:
    return str(assets / "data" / "wikitext2" / "valid.txt")


@pytest.fixture(scope="module")
def compressed(source, text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    out = tmp_path_factory.mktemp("smollm2") / "out"
    return out, compress_model(source.path, out, method="gptq", bits=4, group=64, data=f"{text}[:50%]")


@pytest.fixture(scope="module")
def ids(source, text: str) -> torch.Tensor:
    return token_ids(read_text(f"{text}[50%:]"), source.load_tokenizer())[: WINDOWS * CONTEXT]


@torch.no_grad()
def test_quality_size_and_agreement(source, compressed, ids) -> None:
    out, result = compressed
    model = lowbit.load(out)
    packed = perplexity(model, ids, CONTEXT).perplexity

    floats = source.new_skeleton()
    fill(floats, source)
    reference = perplexity(floats, ids, CONTEXT).perplexity
    assert packed < 1.28 * reference  # the bound; 1.08 was measured

    header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    assert result["bytes"] == (out / "model.safetensors").stat().st_size - 8 - header, (
        "counted = tensor bytes of the file"
    )
    assert result["bytes"] > 0.99 * (out / "model.safetensors").stat().st_size
    assert result["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 64)

    dequantized = floats  # the same architecture with the packed layers' values
    manifest = json.loads((out / "lowbit.json").read_text())
    stored = ModuleSource(model)
    for name in manifest["layers"]:
        set_tensor(dequantized, f"{name}.weight", model.get_submodule(name).dequantize())
    for name in manifest["plain"]:
        set_tensor(dequantized, name, stored.get(name))
    dequantized.tie_weights()
    a, b = model(ids[None, :256]).logits, dequantized(ids[None, :256]).logits
    assert float((a - b).norm() / b.norm()) < 1e-3
    assert float((a - b).abs().max() / b.abs().max()) < 1e-3

    set_activations(model, "int8")
    rounded = perplexity(model, ids, CONTEXT).perplexity
    assert abs(rounded / packed - 1) < 0.01  # 0.5% over a long text; eight windows are noisier


@torch.no_grad()
def test_transformers_loads_the_folder(compressed, ids) -> None:
    import transformers

    out, _ = compressed
    by_name = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(by_name(ids[None, :64]).logits, lowbit.load(out)(ids[None, :64]).logits)
