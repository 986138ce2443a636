"""Reordered channels: the float network is what it was, and what cannot be reordered is left alone."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.api import compress_model
from lowbit.errors import ModelError
from lowbit.pipeline.blocks import block_calls, find_blocks
from lowbit.pipeline.reorder import (
    arrange,
    by_importance,
    hidden_partners,
    permute_heads,
    permute_hidden,
    permute_residual,
)
from lowbit.runtime.artifact import load
from tests.cli.helpers import words
from tests.sources import tiny_models as tiny

EXPECTED = {
    "llama": [(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")],
    "mistral": [(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")],
    "qwen2": [(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")],
    "gpt2": [(["mlp.c_fc"], "mlp.c_proj")],
    "opt": [(["fc1"], "fc2")],
    "bert": [(["intermediate.dense"], "output.dense")],
}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.fixture
def ids():
    return torch.randint(3, tiny.VOCAB, (2, 12))


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
@torch.no_grad()
def test_hidden_channels_are_found_and_reordering_them_changes_nothing(kind, ids):
    model = tiny.model(kind)
    model.config.use_cache = False
    before = logits(model, ids)
    _, blocks = find_blocks(model)
    calls = block_calls(model, blocks, {"input_ids": ids[:1]})
    args, kwargs = calls[0]
    found = hidden_partners(blocks[0], args[0], (args[1:], kwargs))
    found = [pair for pair in found if "attn" not in pair[1] and "attention" not in pair[1]]
    assert found == EXPECTED[kind]
    producers, consumer = found[0]
    width = blocks[0].get_submodule(consumer).weight.shape[0 if kind == "gpt2" else 1]
    permute_hidden(blocks[0], producers, consumer, torch.randperm(width))
    assert torch.allclose(logits(model, ids), before, atol=1e-5)
    permute_hidden(blocks[0], producers[:1], consumer, torch.randperm(width))
    if len(producers) > 1:
        assert not torch.allclose(logits(model, ids), before, atol=1e-4), "gate alone must not do"


@torch.no_grad()
def test_value_channels_are_reordered_within_their_heads(ids):
    """Four query heads share two key-value heads."""
    model = tiny.model("llama")
    before = logits(model, ids)
    attention = model.model.layers[1].self_attn
    size = tiny.WIDTH // tiny.HEADS
    orders = torch.stack([torch.randperm(size) for _ in range(tiny.KV_HEADS)])
    v = attention.v_proj.weight.clone()
    permute_heads(attention.v_proj, attention.o_proj, orders)
    assert not torch.equal(v, attention.v_proj.weight)
    assert torch.allclose(logits(model, ids), before, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2", "opt"])
def test_the_residual_stream_is_reordered_without_a_trace_in_the_logits(kind, ids):
    model = tiny.model(kind)
    before, order = logits(model, ids), torch.randperm(tiny.WIDTH)
    first = copy.deepcopy(model.state_dict())
    permute_residual(model, order, ids)
    assert torch.allclose(logits(model, ids), before, atol=1e-5)
    changed = [k for k, t in model.state_dict().items() if not torch.equal(first[k], t)]
    assert len(changed) > len(first) / 2
    permute_residual(model, order.argsort(), ids)
    assert all(torch.equal(first[k], t) for k, t in model.state_dict().items())


def test_a_model_that_mixes_its_channels_is_left_as_it_was(ids, monkeypatch):
    model = tiny.model("llama")
    first = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("lowbit.pipeline.reorder.WRITERS", ("o_proj",))
    with pytest.raises(ModelError, match="mixes the channels"):
        permute_residual(model, torch.randperm(tiny.WIDTH), ids)
    assert all(torch.equal(first[k], t) for k, t in model.state_dict().items())


def test_the_most_sensitive_channels_come_first():
    rows, columns = torch.zeros(4, 3), torch.zeros(2, 4)
    rows[2] = 5.0
    columns[:, 1] = 4.0
    assert by_importance([rows], [columns]).tolist() == [2, 1, 0, 3]


def test_a_block_is_arranged_without_a_trace(ids):
    model = tiny.model("llama").eval()
    with torch.no_grad():
        before = model(ids).logits
    blocks = find_blocks(model)[1]
    calls = block_calls(model, blocks, {"input_ids": ids})
    hidden, partners = calls[0][0][0], None
    for block, (args, kwargs) in zip(blocks, calls):
        w = block.mlp.down_proj.weight.clone()
        partners = arrange(block, hidden, (args[1:], kwargs), partners)
        assert not torch.equal(block.mlp.down_proj.weight, w), "something was reordered"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_scalebits_end_to_end(tmp_path):
    torch.manual_seed(0)
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    text = words(tmp_path / "words.txt")
    how = {"data": str(text), "windows": 4, "context": 16, "group": 16}
    result = compress_model(tmp_path / "model", tmp_path / "out", method="scalebits", options={"average": 3.0}, **how)
    assert 3.0 < result["bits_per_weight"] < 3.0 + 20 / 16 + 0.5
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = load(tmp_path / "out")(ids).logits
        floats = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits
    assert float((logits - floats).square().sum() / floats.square().sum()) < 0.1
