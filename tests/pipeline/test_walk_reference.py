"""The walk against the same compression done by hand: whole models, ordinary forward passes, hooks, no streaming."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import lowbit
from lowbit.api import _identity
from lowbit.errors import DataError, RecipeError
from lowbit.formats import Format, QuantizedTensor, quantize
from lowbit.pipeline.checkpoint import FolderStore, MemoryStore
from lowbit.pipeline.stream import Walk
from lowbit.recipe import Recipe
from lowbit.solvers import find
from lowbit.solvers.awq import smooth
from lowbit.sources.module import ModuleSource
from lowbit.statistics import GramAccumulator, LayerStatistics
from tests.sources import tiny_models as tiny

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
# layers that share an input, and what can take that input's scale (v has fewer rows than o has columns)
GROUPS = [
    (QKV, "input_layernorm"),
    (["self_attn.o_proj"], None),
    (["mlp.gate_proj", "mlp.up_proj"], "post_attention_layernorm"),
    (["mlp.down_proj"], "mlp.up_proj"),
]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, tiny.VOCAB, (3, 16))


def walked(
    model: nn.Module, ids: "Tensor | None", **recipe: Any
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    walk = Walk(ModuleSource(model), Recipe(**({"bits": 3, "group": 16} | recipe)), MemoryStore(), ids)
    walk.run()
    assert isinstance(walk.store, MemoryStore)
    return walk.store.pieces


def with_small_embeddings(model: nn.Module) -> Any:
    """A copy with embeddings of two bits, so that calibration on the float ones would show."""
    model = copy.deepcopy(model)
    weight = model.get_input_embeddings().weight
    weight.data = quantize(weight, Format.parse("int2-g16")).dequantize()
    return model


def inputs_of(model: Any, name: str, ids: Tensor, follow: Any = None) -> LayerStatistics:
    """Statistics of one layer's inputs in forward passes of the whole model as it is now, beside a float model's."""
    gram = GramAccumulator(model.get_submodule(name).weight.shape[1])
    models, seen = [m for m in (model, follow) if m is not None], []
    handles = [m.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0])) for m in models]
    for row in ids:
        seen.clear()
        for m in models:
            m(row[None], use_cache=False)
        gram.add(*seen)
    for handle in handles:
        handle.remove()
    return gram.finish()


@torch.no_grad()
def test_gptq_of_all_blocks_equals_gptq_by_hand(ids: Tensor) -> None:
    """Every group sees the rounded groups, blocks and embeddings before it."""
    model = tiny.model("llama")
    pieces = walked(model, ids, method="gptq", embeddings=2)
    hand, solve, fmt = with_small_embeddings(model), find("gptq").solve, Format.parse("uint3-g16-search")
    for i, block in enumerate(hand.model.layers):
        tensors, entries = pieces[f"block-{i:04d}"]
        for names, _ in GROUPS:
            layers = [block.get_submodule(n) for n in names]
            statistics = inputs_of(hand, f"model.layers.{i}.{names[0]}", ids, model)
            for name, layer in zip(names, layers):
                solution = solve(layer.weight.detach().clone(), statistics, fmt)
                full = f"model.layers.{i}.{name}"
                for key, expected in solution.quantized().tensors().items():
                    assert torch.equal(tensors[f"{full}.{key}"], expected), (full, key)
                assert entries["layers"][full]["notes"] == solution.notes
                layer.weight.copy_(solution.w_hat())


def test_layers_of_one_input_may_have_formats_of_their_own(ids: Tensor) -> None:
    """Each is solved under the same Gram matrix, as if it were alone."""
    model = tiny.model("llama")
    rules = [{"match": "*.k_proj", "format": "int8-channel"}, {"match": "*.v_proj", "format": "float"}]
    tensors, entries = walked(model, ids, method="gptq", embeddings=16, layers=rules)["block-0000"]
    block = copy.deepcopy(model).model.layers[0]
    with torch.no_grad():
        statistics = inputs_of(model, "model.layers.0.self_attn.q_proj", ids)
    for name, fmt in (("q_proj", "uint3-g16-search"), ("k_proj", "int8-channel")):
        w = block.get_submodule(f"self_attn.{name}").weight.detach()
        expected = find("gptq").solve(w, statistics, Format.parse(fmt)).quantized()
        full = f"model.layers.0.self_attn.{name}"
        assert entries["layers"][full]["meta"] == expected.meta()
        assert all(torch.equal(tensors[f"{full}.{k}"], t) for k, t in expected.tensors().items())
    assert torch.equal(tensors["model.layers.0.self_attn.v_proj.weight"], block.self_attn.v_proj.weight)


@torch.no_grad()
def test_blocks_are_called_as_the_model_calls_each_of_them(ids: Tensor) -> None:
    """The second block attends to a window of four tokens only, the first to all."""
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**tiny.ROPE, **tiny.ENDS, **sliding)).eval()
    walk = Walk(ModuleSource(model), Recipe(format="float", embeddings=16), MemoryStore(), ids)
    hidden = walk._opening([], need_hidden=True)
    for i in range(2):
        hidden = walk._block(i, hidden, False)
    expected = model.model(ids, use_cache=False).last_hidden_state
    assert torch.allclose(model.model.norm(torch.cat(hidden[: len(ids)])), expected, atol=1e-5)


@torch.no_grad()
def test_awq_of_all_blocks_equals_awq_by_hand(ids: Tensor) -> None:
    """Groups of a block see the float block, scales are folded one group after the other, blocks see rounded blocks."""
    model = tiny.model("llama")
    for block in model.model.layers:
        block.input_layernorm.weight[::8] *= 20
    pieces = walked(model, ids, method="awq", embeddings=2)
    hand, spec, fmt = with_small_embeddings(model), find("awq"), Format.parse("uint3-g16")
    for i, block in enumerate(hand.model.layers):
        tensors, _ = pieces[f"block-{i:04d}"]
        found = [inputs_of(hand, f"model.layers.{i}.{names[0]}", ids) for names, _ in GROUPS]
        scalings = []
        for k, (names, producer) in enumerate(GROUPS):
            if producer is not None:
                layers = [block.get_submodule(n) for n in names]
                t = smooth([m.weight for m in layers], found[k], fmt)
                for m in layers:
                    m.weight.mul_(t)
                before = block.get_submodule(producer).weight
                before.div_(t if before.ndim == 1 else t[:, None])
                found[k] = found[k].rescaled(t)
                scalings.append(t)
        assert any(not t.eq(1).all() for t in scalings)
        for (names, _), statistics in zip(GROUPS, found):
            for name in names:
                layer = block.get_submodule(name)
                w_hat = spec.solve(layer.weight.detach().clone(), statistics, fmt).w_hat()
                q = _dequantized(pieces[f"block-{i:04d}"], f"model.layers.{i}.{name}")
                assert torch.allclose(q, w_hat, atol=1e-4 * float(w_hat.abs().max())), (i, name)
                layer.weight.copy_(q)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert torch.allclose(tensors[f"model.layers.{i}.{norm}.weight"], block.get_submodule(norm).weight)


def _dequantized(piece: tuple[dict[str, Tensor], dict[str, Any]], name: str) -> Tensor:
    meta = piece[1]["layers"][name]["meta"]
    own = {k.removeprefix(f"{name}."): t for k, t in piece[0].items() if k.startswith(f"{name}.")}
    return QuantizedTensor.from_tensors(meta, own).dequantize()


@torch.no_grad()
def test_folded_scales_are_stored_for_models_in_half_precision_too(ids: Tensor) -> None:
    model = tiny.model("llama")
    for block in model.model.layers:
        block.input_layernorm.weight[::8] *= 20
    model = model.bfloat16().float().bfloat16()
    expected = copy.deepcopy(model).float()(ids).logits
    packed = lowbit.compress(model, "awq", bits=8, group=16, data=ids, embed_bits=16)
    norm = packed.model.layers[0].input_layernorm.weight
    assert norm.dtype == torch.bfloat16
    assert not torch.equal(norm, model.model.layers[0].input_layernorm.weight)
    found = packed.float()(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize(("kind", "head"), [("llama", None), ("qwen2", "lm_head"), ("gpt2", None)])
def test_heads_of_their_own_are_packed_and_shared_ones_stored_once(kind: str, head: "str | None", ids: Tensor) -> None:
    model = tiny.model(kind)
    pieces = walked(model, None, method="rtn")
    tensors, entries = pieces["closing"]
    assert list(entries["layers"]) == ([] if head is None else [head])
    if head is not None:
        expected = quantize(model.get_submodule(head).weight, Format.parse("int8-g16")).tensors()
        assert all(torch.equal(tensors[f"{head}.{k}"], t) for k, t in expected.items())
    assert len(pieces["opening"][1]["layers"]) == 1  # the token embedding; GPT-2's positions stay
    names = [name for tensors, _ in pieces.values() for name in tensors]
    assert len(names) == len(set(names)) and "lm_head.weight" not in names


def test_layers_that_the_model_does_not_call_are_rounded_without_data(ids: Tensor) -> None:
    model = tiny.model("llama")
    for block in model.model.layers:
        block.spare = nn.Linear(tiny.WIDTH, 16)
    statistics = LayerStatistics(torch.eye(tiny.WIDTH), torch.ones(tiny.WIDTH), 1)
    for method in ("hqq", "rtn"):
        tensors, entries = walked(model, ids, method=method)["block-0001"]
        spare = entries["layers"]["model.layers.1.spare"]
        assert spare["error_of"] == "weight" and spare["bias"]
        solution = find(method).solve(
            model.model.layers[1].spare.weight.detach(), statistics, find(method).default_format(3, 16)
        )
        assert torch.equal(tensors["model.layers.1.spare.codes"], solution.quantized().tensors()["codes"])
    for method in ("gptq", "awq"):
        with pytest.raises(RecipeError, match=r'block 0: .*layers\.0\.spare.*match: "\*\.spare", format: float'):
            walked(model, ids, method=method)
        left = walked(model, ids, method=method, layers=[{"match": "*.spare", "format": "float"}])["block-0001"]
        assert "model.layers.1.spare.weight" in left[1]["plain"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_finished_blocks_are_not_done_again(method: str, ids: Tensor, tmp_path: Path) -> None:
    model, data = tiny.model("llama"), None if method == "rtn" else ids
    recipe = Recipe(method=method, bits=4, group=16)

    def walk() -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        Walk(ModuleSource(model), recipe, FolderStore(tmp_path / "p", {}), data, events.append).run()
        return events

    assert {e["block"] for e in walk() if e["event"] == "layer"} == {0, 1}
    assert [e["event"] for e in walk()] == ["resume"]
    if method == "rtn":
        FolderStore(tmp_path / "p", {}).path("block-0001").unlink()
        assert {e["block"] for e in walk() if e["event"] == "layer"} == {1}


def test_hidden_states_beyond_a_missing_block_are_not_used(ids: Tensor, tmp_path: Path) -> None:
    """A disk may lose a piece and keep the hidden states that followed from it."""
    model, recipe = tiny.model("llama"), Recipe(method="gptq", bits=4, group=16)

    store = FolderStore(tmp_path / "p", {})

    def walk() -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        pieces = Walk(ModuleSource(model), recipe, store, ids).run()
        return [(load_file(store.path(p)), store.entries(p)["layers"]) for p in pieces]

    whole = walk()
    store.path("block-0000").unlink()
    for (tensors, layers), (expected, rows) in zip(walk(), whole, strict=True):
        assert layers == rows
        assert tensors.keys() == expected.keys() and all(torch.equal(t, expected[k]) for k, t in tensors.items())


def test_what_makes_another_run() -> None:
    class Source:
        fingerprint = "a"

    recipe, ids = Recipe(), torch.zeros(2, 8, dtype=torch.int64)
    first = _identity(Source(), recipe, ids)
    assert first == _identity(Source(), Recipe(), ids.clone())
    assert first != _identity(Source(), Recipe(seed=1), ids)
    assert first != _identity(Source(), recipe, ids + 1)
    assert first != _identity(Source(), recipe, None)
    other = Source()
    other.fingerprint = "b"
    assert first != _identity(other, recipe, ids)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (torch.full((2, 16), tiny.VOCAB), f"to {tiny.VOCAB}, but the model's vocabulary is 0 to {tiny.VOCAB - 1}"),
        (torch.full((2, 16), -1), "from -1"),
        (torch.ones((2, 65), dtype=torch.int64), "--context 64"),
        (torch.ones((0, 16), dtype=torch.int64), "hold no token"),
        (torch.ones(16, dtype=torch.int64), r"integers \(windows, context\)"),
    ],
)
def test_token_ids_that_the_model_cannot_read(data: Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        lowbit.compress(tiny.model("llama"), "gptq", group=16, data=data)


def test_flags_beside_a_recipe_object_win() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    packed = lowbit.compress(net, bits=3, group=16, recipe=Recipe(method="rtn", format="nf4-g16"))
    assert "format=uint3-g16" in repr(packed[0])
