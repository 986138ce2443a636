"""The probe against losses measured one layer at a time."""

import copy
import math

import pytest
import torch

from lowbit.allocate.kl import divergence
from lowbit.formats import Format, quantize
from lowbit.pipeline.auto import split_windows
from lowbit.pipeline.blocks import block_calls, find_blocks
from lowbit.pipeline.checkpoint import FolderStore, MemoryStore
from lowbit.pipeline.probe import FLOAT, Option, Prober, _Sums
from lowbit.pipeline.stream import Walk
from lowbit.sources.module import ModuleSource
from tests.sources import tiny_models as tiny

OPTIONS = [Option("rtn", "uint2-g16"), Option("rtn", "uint4-g16")]
ENDS = ["int8-g16", "uint3-g16"]


def probe(model, windows, fit, held, options=OPTIONS, ends=ENDS, store=None):
    walk = Walk(ModuleSource(model), FLOAT, MemoryStore(), None)
    return Prober(walk, windows, fit, held, options, ends).run(store or MemoryStore())


@torch.no_grad()
def measured_kl(model, name, fmt, ids):
    """KL(float || only this weight rounded), nats a token."""
    other = copy.deepcopy(model)
    w = other.get_submodule(name).weight
    w.copy_(quantize(w, Format.parse(fmt)).dequantize())
    return divergence(model(ids).logits.log_softmax(-1), other(ids).logits)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = tiny.model("llama")
    with torch.no_grad():  # predictions that are not all alike
        for p in model.parameters():
            p.mul_(1.5)
    ids = torch.randint(3, tiny.VOCAB, (60, 32))
    return model, ids, probe(model, ids[:50], ids[50:55], ids[55:])


def test_predicted_losses_are_the_measured_ones(llama):
    """Fisher on sampled labels against the true KL, layer by layer: right on the whole, and in order."""
    model, ids, found = llama
    for option in OPTIONS:
        pairs = [
            (row["loss"][option.label], measured_kl(model, name, option.format, ids[:50]))
            for name, row in found["layers"].items()
        ]
        told, true = (torch.tensor(column) for column in zip(*pairs))
        assert 0.75 < float(told.sum() / true.sum()) < 1.33, option
        assert float(torch.corrcoef(torch.stack([told.log(), true.log()]))[0, 1]) > 0.8, option


def test_the_trace_is_the_fisher_loss_of_errors_without_direction(llama):
    """White errors: both sensitivities agree."""
    model, ids, _ = llama
    sums = _Sums(find_blocks(model)[1][0])
    hidden, slope = torch.randn(1, 32, model.config.hidden_size), torch.randn(1, 32, model.config.hidden_size)
    calls = block_calls(model, [sums.block], {"input_ids": ids[:1]})
    sums.back(hidden, slope, (calls[0][0][1:], calls[0][1]))
    name = sums.names[-1]
    out, in_ = sums.matrix(name).shape
    d, rows = torch.randn(out, in_), torch.arange(out)
    told = [sums.loss(name, d, rows, kind) for kind in ("fisher", "trace")]
    assert told[1] == pytest.approx(told[0], rel=0.2)
    assert sums.loss(name, 2 * d, rows, "trace") == pytest.approx(4 * told[1])


def test_the_tied_embeddings_loss_is_near_the_measured_one(llama):
    model, ids, found = llama
    loss = found["ends"]["model.embed_tokens"]["loss"]["uint3-g16"]
    assert 0.7 < loss / measured_kl(model, "model.embed_tokens", "uint3-g16", ids[:50]) < 1.4
    assert found["ends"]["model.embed_tokens"]["loss"]["int8-g16"] < loss / 100


def test_an_untied_heads_loss_is_measured_outright():
    model, ids = tiny.model("qwen2"), torch.randint(3, tiny.VOCAB, (4, 16))
    found = probe(model, ids[:2], ids[2:3], ids[3:])
    assert set(found["ends"]) == {"lm_head", "model.embed_tokens"}
    want = measured_kl(model, "lm_head", "uint3-g16", ids[:2])
    assert found["ends"]["lm_head"]["loss"]["uint3-g16"] == pytest.approx(want, rel=1e-3)


def test_the_float_models_loss_is_its_own(llama):
    model, ids, found = llama
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model(ids[55:56]).logits[0, :-1], ids[55, 1:])
    assert found["float_nll"][0] == pytest.approx(float(nll), rel=1e-5) and len(found["float_nll"]) == 5


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_every_architecture_is_probed(kind):
    model, ids = tiny.model(kind), torch.randint(3, tiny.VOCAB, (4, 16))
    options = [Option("gptq", "uint4-g16-search"), Option("gptq", "uint8-g16-search", "gptq uint4-g16-search", 0.01)]
    found = probe(model, ids[:2], ids[2:3], ids[3:], options)
    assert found["layers"] and all(set(r["loss"]) == {o.label for o in options} for r in found["layers"].values())
    assert all(0 < r["loss"][options[0].label] < 1 for r in found["layers"].values())
    row = next(iter(found["layers"].values()))["loss"]
    assert row[options[1].label] == pytest.approx(0.01 * row[options[0].label])


def test_formats_that_do_not_fit_are_left_out_and_the_model_stays_as_it_was():
    model, ids = tiny.model("llama"), torch.randint(3, tiny.VOCAB, (4, 16))
    before = copy.deepcopy(model.state_dict())
    found = probe(model, ids[:2], ids[2:3], ids[3:], [Option("rtn", "uint4-g64"), OPTIONS[0]])
    widths = {n: "rtn uint4-g64" in row["loss"] for n, row in found["layers"].items()}
    assert widths["model.layers.0.mlp.down_proj"] and not widths["model.layers.0.mlp.up_proj"]
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_a_probe_goes_on_from_what_is_there(tmp_path, monkeypatch):
    model, ids = tiny.model("llama"), torch.randint(3, tiny.VOCAB, (4, 16))
    store = FolderStore(tmp_path / "work", {"a": 1})
    first = probe(model, ids[:2], ids[2:3], ids[3:], store=store)
    store.path("probe-0001").unlink()
    assert probe(model, ids[:2], ids[2:3], ids[3:], store=store)["layers"] == first["layers"]
    monkeypatch.setattr(Prober, "_probe", lambda *a: pytest.fail("nothing is missing"))
    again = probe(model, ids[:2], ids[2:3], ids[3:], store=store)
    assert again["layers"] == first["layers"] and math.isclose(again["float_nll"][0], first["float_nll"][0])
    store.close()


def test_windows_are_split_without_overlap():
    ids = torch.arange(320).reshape(32, 10)
    windows, fit, held = split_windows(ids, ids[:24])
    rows = [tuple(r.tolist()) for part in (windows, fit, held) for r in part]
    assert (len(windows), len(fit), len(held)) == (4, 8, 8) and len(set(rows)) == 20
    windows, fit, held = split_windows(ids[:2], ids[:2])  # too short a text: what there is
    assert len(windows) == len(fit) == len(held) == 1
