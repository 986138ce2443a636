"""lowbit.compress of models as people hold them: in 16 bits, under another default dtype, with odd data."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lowbit
from lowbit.errors import DataError, ModelError
from lowbit.recipe import LayerRule, Recipe
from tests.sources import tiny_models as tiny

IDS = torch.randint(3, tiny.VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))


def sixteen_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> Any:
    """As from_pretrained brings a model: weights in the file's dtype, rotary tables in float32."""
    tiny.model(kind).to(dtype).save_pretrained(tmp_path / "float")
    auto: Any = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(tmp_path / "float", **{_word(): dtype})


def _word() -> str:
    from lowbit.runtime.skeleton import dtype_word

    return dtype_word()


@pytest.mark.parametrize(
    ("kind", "method", "dtype"),
    [
        ("llama", "awq", torch.bfloat16),
        ("llama", "gptq", torch.float16),
        ("gpt2", "gptq", torch.bfloat16),
        ("bert", "rtn", torch.float16),
    ],
)
@torch.no_grad()
def test_a_model_in_16_bits_stays_in_16_bits(kind: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Left partly in float32 it would fail at its first layer norm, or answer otherwise once it is loaded again."""
    model = sixteen_bits(kind, dtype, tmp_path)
    packed = lowbit.compress(model, method, bits=4, group=16, data=IDS)
    logits = packed(IDS).logits
    assert logits.dtype == dtype
    assert {p.dtype for p in packed.parameters()} == {dtype}
    assert float((logits - model(IDS).logits).float().norm() / logits.float().norm()) < 0.2
    lowbit.save(packed, tmp_path / "out")
    assert torch.equal(lowbit.load(tmp_path / "out")(IDS).logits, logits)
    assert packed.config.use_cache == model.config.use_cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
@torch.no_grad()
def test_the_default_dtype_of_a_program_changes_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.model("llama")
    formats = {"q": "nf4-g16-double", "k": "kmeans3-channel", "o": "ternary-g16", "gate": "mxfp4"}
    rules = tuple(LayerRule(match=f"*.{name}_proj", format=fmt) for name, fmt in formats.items())
    recipe = Recipe(method="gptq", group=16, layers=rules)

    def logits(out: Path) -> torch.Tensor:
        packed = lowbit.compress(model, recipe=recipe, data=IDS)
        lowbit.save(packed, out)
        found = lowbit.load(out)(IDS).logits
        assert torch.equal(found, packed(IDS).logits)
        return found

    expected = logits(tmp_path / "a")
    torch.set_default_dtype(dtype)
    try:
        found = logits(tmp_path / "b")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("data", [[1, 2], [["w3"]], {"text": "w3"}, 5, IDS > 9, IDS.float(), IDS[0]], ids=str)
def test_data_that_are_neither_texts_nor_ids(data: Any) -> None:
    with pytest.raises(DataError, match="token ids"):
        lowbit.compress(tiny.model("llama"), "gptq", group=16, data=data, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@torch.no_grad()
def test_ids_of_any_integer_type_are_the_same_ids(dtype: torch.dtype) -> None:
    model = tiny.model("llama")
    a, b = (lowbit.compress(model, "gptq", group=16, data=ids)(IDS).logits for ids in (IDS, IDS.to(dtype)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("model", ["model.gguf", None, {"a": nn.Linear(2, 2)}], ids=str)
def test_what_is_no_module_is_sent_to_compress_model(model: Any) -> None:
    with pytest.raises(ModelError, match="compress_model"):
        lowbit.compress(model, "rtn")


def test_a_packed_model_is_not_packed_again() -> None:
    packed = lowbit.compress(tiny.model("llama"), "rtn", group=16)
    with pytest.raises(ModelError, match="packed already"):
        lowbit.compress(packed, "rtn", group=16)
