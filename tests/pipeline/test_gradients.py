"""The backward pass block by block gives what autograd gives on the whole model; solvers use it; runs repeat."""

import pytest
import torch
from torch.nn import functional as F

import lowbit
from lowbit.errors import RecipeError
from lowbit.pipeline.blocks import linear_layers
from lowbit.pipeline.checkpoint import FolderStore, MemoryStore
from lowbit.pipeline.gradients import gather_gradients
from lowbit.pipeline.stream import Walk
from lowbit.recipe import Recipe
from lowbit.sources.module import ModuleSource
from tests.sources import tiny_models as tiny

KINDS = ("llama", "gpt2") if "gpt2" in tiny.CONFIGS else tuple(tiny.CONFIGS)[:2]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, tiny.VOCAB, (3, 16))


def expected(model, ids, kind):
    """Layer -> statistics, from the whole model's own gradients."""
    layers = {n: m for n, m in model.named_modules() if "." in n and hasattr(m, "weight")}
    total = dict.fromkeys(layers, 0.0)
    for window in ids:
        model.zero_grad()
        F.cross_entropy(model(window[None]).logits[0, :-1], window[1:]).backward()
        for n, m in layers.items():
            if m.weight.ndim == 2 and m.weight.grad is not None:
                g = m.weight.grad if isinstance(m, torch.nn.Linear) else m.weight.grad.T
                total[n] = total[n] + (g.T @ g if kind == "oac" else g.square()) / len(ids)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistic", ["oac", "fisher"])
def test_block_by_block_equals_autograd_on_the_whole_model(kind, statistic, ids, tmp_path):
    model = tiny.model(kind).requires_grad_(True)
    want = expected(model, ids, statistic)
    model.requires_grad_(False)
    store = FolderStore(tmp_path / "w", {}) if statistic == "oac" else MemoryStore()
    walk = Walk(ModuleSource(model), Recipe(method="gptq", group=16, embeddings=16), store, ids)
    with torch.no_grad():
        walk._opening([], need_hidden=True)
        gather_gradients(walk, walk.entering, statistic)
    for i, block in enumerate(walk.blocks):
        found = store.scratch.take(f"gradients-{i}")
        assert set(found) == set(linear_layers(block))
        for n, t in found.items():
            reference = want[f"{walk.prefix}.{i}.{n}"]
            assert torch.allclose(t, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max())), (i, n)


@pytest.mark.parametrize(
    ("gram", "method"),
    [
        ("oac", "gptq"),
        pytest.param("oac", "spqr", marks=pytest.mark.slow),
        pytest.param("oac", "billm", marks=pytest.mark.slow),
        ("guided", "gptq"),
        pytest.param("guided", "icquant", marks=pytest.mark.slow),
        pytest.param("fisher", "icquant", marks=pytest.mark.slow),
    ],
)
def test_every_kind_goes_through_the_methods_that_use_it(gram, method, ids):
    model = tiny.model("llama")
    plain = lowbit.compress(model, method, group=16, data=ids)
    found = lowbit.compress(model, method, group=16, data=ids, gram=gram)
    again = lowbit.compress(model, method, group=16, data=ids, gram=gram)
    with torch.no_grad():
        a, b, c = (m(ids).logits for m in (plain, found, again))
    assert torch.equal(b, c) and torch.isfinite(b).all()
    assert not torch.equal(a, b)


def test_methods_that_do_not_use_it_and_missing_data_say_so(ids):
    with pytest.raises(RecipeError, match="does not use gram=oac"):
        Recipe(method="rtn", gram="oac")
    with pytest.raises(RecipeError, match="data"):
        lowbit.compress(tiny.model("llama"), "icquant", gram="oac")
