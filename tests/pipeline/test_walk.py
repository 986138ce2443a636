"""The walk over blocks: every architecture, the order of layers, memory and resume."""

import copy

import pytest
import torch

import lowbit
from lowbit.errors import DataError, MemoryPlanError, ModelError, RecipeError, ShapeError
from lowbit.formats import Format, quantize
from lowbit.pipeline.blocks import block_calls, find_blocks, input_groups, layer_matrix, linear_layers, run_block
from lowbit.pipeline.checkpoint import FolderStore, MemoryStore
from lowbit.pipeline.embeddings import quantize_rows
from lowbit.pipeline.fold import find_producer, fold
from lowbit.pipeline.forwards import SequentialForwards
from lowbit.pipeline.stream import Walk
from lowbit.recipe import Recipe
from lowbit.solvers import find
from lowbit.sources.module import ModuleSource
from lowbit.statistics import GramAccumulator
from tests.sources import tiny_models as tiny

KINDS = list(tiny.CONFIGS)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, tiny.VOCAB, (3, 16))


def walk(model, ids, store=None, **recipe) -> Walk:
    return Walk(
        ModuleSource(model),
        Recipe(**({"method": "gptq", "bits": 4, "group": 16} | recipe)),
        store or MemoryStore(),
        ids,
    )


@torch.no_grad()
def first_block(model, ids):
    _, blocks = find_blocks(model)
    model.config.use_cache = False  # as the walk does
    calls = block_calls(model, blocks, {"input_ids": ids[:1]})
    args, kwargs = calls[0]
    return blocks[0], args[0], (args[1:], kwargs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "hqq"])
def test_every_architecture_and_method_at_eight_bits_is_close_to_the_float_model(kind, method, ids):
    model = tiny.model(kind)
    packed = lowbit.compress(model, method, bits=8, group=16, data=ids)
    with torch.no_grad():
        a, b = model(ids).logits, packed(ids).logits
    assert float((a - b).abs().max() / a.abs().max()) < 0.03
    names = {n for n, m in packed.named_modules() if "Packed" in type(m).__name__}
    assert {
        f"{find_blocks(model)[0]}.{i}.{n}" for i in (0, 1) for n in linear_layers(find_blocks(model)[1][0])
    } <= names


@pytest.mark.parametrize("kind", KINDS)
def test_walking_in_place_of_the_model_gives_its_hidden_states(kind, ids):
    """With nothing quantized the walk's hidden states are the model's own."""
    model = tiny.model(kind)
    w = walk(model, ids, format="float", embeddings=16)
    with torch.no_grad():
        hidden = w._opening([], need_hidden=True)
        for i in range(len(w.blocks)):
            hidden = w._block(i, hidden, False)
        expected = (model.base_model)(ids, output_hidden_states=True).hidden_states
    norm_follows = kind not in ("bert",)  # the last entry has the final norm applied
    body = expected[-1]
    found = torch.cat(hidden[: len(ids)])
    assert all(torch.equal(own, followed) for own, followed in zip(hidden[: len(ids)], hidden[len(ids) :], strict=True))
    if norm_follows:
        final = next(
            m
            for n, m in model.named_modules()
            if n.split(".")[-1] in ("norm", "ln_f", "final_layer_norm") and "layers." not in n and ".h." not in n
        )
        found = final(found)
    assert torch.allclose(found, body, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", pytest.param("learned", marks=pytest.mark.slow)])
def test_the_float_models_hidden_states_go_beside_the_compressed_models(method, ids):
    """Whatever is done to the weights, one half of the hidden states stays the float model's, the other is its own."""
    model = tiny.model("llama")
    w = walk(model, ids, method=method, bits=2, embeddings=2)
    with torch.no_grad():
        hidden = w._opening([], need_hidden=True)
        for i in range(len(w.blocks)):
            hidden = w._block(i, hidden, False)
        body, norm = model.model(ids), model.model.norm
        packed = lowbit.compress(model, method, bits=2, group=16, data=ids, embed_bits=2)
        found = [norm(torch.cat(half)) for half in (hidden[: len(ids)], hidden[len(ids) :])]
        assert torch.allclose(found[1], body.last_hidden_state, atol=1e-5)
        assert torch.allclose(found[0], packed.model(ids).last_hidden_state, atol=1e-4)
        assert not torch.allclose(found[0], found[1], atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("bert", [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]),
    ],
)
def test_layers_are_grouped_by_the_input_they_share(kind, groups, ids):
    block, hidden, call = first_block(tiny.model(kind), ids)
    found = input_groups(block, hidden, *call)
    assert [sorted(n.split(".")[-1] for n in g) for g in found] == [sorted(g) for g in groups]


def test_later_layers_see_the_quantized_earlier_ones(ids):
    """True-sequential order: the Gram matrix of o_proj comes from rounded q, k and v."""
    model = tiny.model("llama")
    block, hidden, call = first_block(model, ids)
    forwards = SequentialForwards(block, [hidden], call)
    with torch.no_grad():
        list(forwards.inputs("self_attn.q_proj"))
        layer_matrix(block.self_attn.v_proj).zero_()
        (x,) = forwards.inputs("self_attn.o_proj")
    assert not x.any()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_pausing_and_recomputing_give_the_same_bytes(kind, ids):
    model = tiny.model(kind)
    stores = []
    for recompute in (False, True):
        w = walk(model, ids)
        w.run(recompute)
        stores.append(w.store.pieces)
    for piece in stores[0]:
        assert all(torch.equal(t, stores[1][piece][0][k]) for k, t in stores[0][piece][0].items())


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(stop_at, ids, tmp_path):
    model = tiny.model("llama")
    whole = FolderStore(tmp_path / "whole", {"run": 1})
    pieces = walk(model, ids, whole).run()

    def stop(event):
        if event["event"] == "layer" and event["block"] == stop_at:
            raise KeyboardInterrupt

    first = walk(model, ids, FolderStore(tmp_path / "stopped", {"run": 1}))
    first.progress = stop
    with pytest.raises(KeyboardInterrupt):
        first.run()
    first.store.close()
    events = []
    second = walk(model, ids, FolderStore(tmp_path / "stopped", {"run": 1}))
    second.progress = events.append
    assert second.run() == pieces
    if stop_at:
        assert events[0] == {"event": "resume", "block": stop_at, "blocks": 2}
    assert {e["block"] for e in events if e["event"] == "layer"} == set(range(stop_at, 2))
    for piece in pieces:
        a, b = whole, second.store
        assert a.entries(piece)["layers"] == b.entries(piece)["layers"]
        from safetensors.torch import load_file

        ta, tb = load_file(a.path(piece)), load_file(b.path(piece))
        assert ta.keys() == tb.keys() and all(torch.equal(ta[k], tb[k]) for k in ta)


def test_a_partial_folder_of_another_run_is_not_continued(tmp_path):
    FolderStore(tmp_path / "p", {"recipe": 1, "model": "a"})
    with pytest.raises(RecipeError, match=r"recipe differ.*--force"):
        FolderStore(tmp_path / "p", {"recipe": 2, "model": "a"})
    store = FolderStore(tmp_path / "p", {"recipe": 2, "model": "a"}, replace=True)
    store.put("x", {"t": torch.zeros(1)}, {})
    store.close()
    assert FolderStore(tmp_path / "p", {"recipe": 2, "model": "a"}, replace=True).has("x"), (
        "--force throws away only other runs"
    )


def test_the_model_handed_in_is_not_changed(ids):
    model = tiny.model("llama")
    before = copy.deepcopy(model.state_dict())
    lowbit.compress(model, "awq", bits=3, group=16, data=ids)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "group", "producer"),
    [
        ("llama", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "input_layernorm"),
        ("llama", ["mlp.gate_proj", "mlp.up_proj"], "post_attention_layernorm"),
        ("llama", ["mlp.down_proj"], "mlp.up_proj"),
        ("llama", ["self_attn.o_proj"], None),  # grouped queries: v has fewer outputs than o has inputs
        ("gpt2", ["attn.c_attn"], "ln_1"),
        ("gpt2", ["mlp.c_proj"], None),  # GELU does not scale
        ("opt", ["fc2"], "fc1"),  # ReLU does
        ("opt", ["self_attn.out_proj"], "self_attn.v_proj"),
        (
            "bert",
            ["attention.self.query", "attention.self.key", "attention.self.value"],
            None,
        ),  # the residual uses it too
    ],
)
@torch.no_grad()
def test_folding_finds_what_can_take_a_scale_and_leaves_the_float_block_unchanged(kind, group, producer, ids):
    block, hidden, call = first_block(tiny.model(kind), ids)
    before = run_block(block, hidden, *call)
    assert find_producer(block, group, hidden, *call) == producer
    assert torch.equal(run_block(block, hidden, *call), before), "the search must put the weights back"
    if producer:
        t = torch.rand(layer_matrix(block.get_submodule(group[0])).shape[1]) + 0.5
        fold(block, producer, group, t)
        assert torch.allclose(run_block(block, hidden, *call), before, atol=1e-5)


def test_awq_stores_the_norm_it_changed(ids):
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[::8] *= 20
    packed = lowbit.compress(model, "awq", bits=4, group=16, data=ids)
    assert not torch.equal(packed.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)


def test_gptq_of_the_first_layers_equals_the_solver_called_by_hand(ids):
    model = tiny.model("llama")
    w = walk(model, ids, embeddings=16)
    w.run()
    block, _, _ = first_block(model, ids)
    _, blocks = find_blocks(model)
    gram = GramAccumulator(tiny.WIDTH)
    with torch.no_grad():
        for row in ids:
            calls = block_calls(model, blocks, {"input_ids": row[None]})
            gram.add(block.input_layernorm(calls[0][0][0]))
    stacked = torch.cat(
        [layer_matrix(m) for m in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)]
    )
    by_hand = find("gptq").solve(stacked, gram.finish(), Format.parse("uint4-g16-search"))
    codes = w.store.pieces["block-0000"][0]["model.layers.0.self_attn.k_proj.codes"]
    assert torch.equal(codes, by_hand.rows(32, 48).quantized().tensors()["codes"])


@pytest.mark.parametrize("fmt", ["int8-g16", "uint4-g16", "ternary-channel", "int3-channel"])
def test_embeddings_in_slices_equal_the_whole(fmt):
    w, fmt = torch.randn(203, 32), Format.parse(fmt)
    whole, sliced = quantize(w, fmt).tensors(), quantize_rows(w.clone(), fmt, rows=40).tensors()
    assert all(torch.equal(whole[k], sliced[k]) for k in whole)


def test_layer_rules_and_float_layers(ids):
    model = tiny.model("llama")
    rules = [{"match": "*.down_proj", "format": "int8-channel"}, {"match": "*.o_proj", "format": "float"}]
    w = walk(model, ids, layers=rules)
    w.run()
    tensors, entries = w.store.pieces["block-0001"]
    assert entries["layers"]["model.layers.1.mlp.down_proj"]["meta"]["parts"][0]["format"] == "int8-channel"
    assert "model.layers.1.self_attn.o_proj.weight" in entries["plain"]
    assert torch.equal(
        tensors["model.layers.1.self_attn.o_proj.weight"], model.state_dict()["model.layers.1.self_attn.o_proj.weight"]
    )


def test_a_group_that_does_not_divide_is_said_before_anything_runs(ids):
    with pytest.raises(ShapeError, match=r"layers\.0\..*in_features=32 .* group=24.*--group 32"):
        walk(tiny.model("llama"), ids, group=24)


def test_nan_weights_and_nan_activations_are_named(ids):
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        lowbit.compress(model, "gptq", bits=4, group=16, data=ids)


def test_data_that_is_missing_or_of_the_wrong_kind(ids):
    model = tiny.model("llama")
    with pytest.raises(RecipeError, match="data=texts"):
        lowbit.compress(model, "gptq", bits=4, group=16)
    with pytest.raises(DataError, match="tokenizer"):
        lowbit.compress(model, "gptq", bits=4, group=16, data=["w3 w4"])
    with pytest.raises(DataError, match="integers"):
        lowbit.compress(model, "gptq", bits=4, group=16, data=torch.rand(2, 3))


def test_plan_refuses_what_does_not_fit_and_says_what_would(ids):
    w = walk(tiny.model("llama"), torch.randint(3, 60, (64, 512)))
    free = w.plan(0)
    assert not free.recompute
    lean = w.plan(0, int(free.estimate_bytes * 0.9))
    assert lean.recompute and lean.estimate_bytes <= free.estimate_bytes * 0.9
    with pytest.raises(MemoryPlanError, match=r"Try --windows \d+"):
        w.plan(0, int(lean.estimate_bytes * 0.7))
    with pytest.raises(MemoryPlanError, match="--max-ram"):
        w.plan(0, 1000)


def test_a_plain_network_is_compressed_layer_by_layer():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 16),
        torch.nn.Linear(16, 4),
    )
    x = torch.randn(2, 3, 6, 6)
    packed = lowbit.compress(net, "rtn", bits=8, group=-1)
    assert (
        type(packed[0]).__name__ == "Conv2d"
        and type(packed[2]).__name__ == "PackedConv2d"
        and type(packed[5]).__name__ == "Linear"
    )
    assert torch.allclose(packed(x), net(x), atol=0.05)
    with pytest.raises(RecipeError, match="rtn or hqq"):
        lowbit.compress(net, "gptq")


def test_a_rule_that_matches_no_layer_is_said(ids):
    with pytest.raises(RecipeError, match=r"no layer matches '\*\.typo'.*down_proj"):
        walk(tiny.model("llama"), ids, layers=[{"match": "*.typo", "format": "float"}])
