"""The stacked formulas of the bench are those of the library's weight functions: values and gradients.

Where a row of the bench differs on purpose, the case says how it is set to the same: the bench has no gradient factor
on BNN+'s and BiPer's scales, other ends of BNN++'s beta, a scale of 2 mean|w| for DeepShift, and its own ternary scale
for ProxConnect and PARQ (not compared).
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.bench import stacked, stacked_levels
from lowbit.training.choices import read_weights

OUT, IN = 6, 40
POSITION = 0.4


def weights() -> Tensor:
    """Rows of equal mean |w| = 1/8, so that one number says how steep a step is."""
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)) * 0.1
    return w / w.abs().mean(1, keepdim=True) / 8


def library(recipe: Any, w: Tensor, position: float = POSITION) -> list[Any]:
    choice = read_weights(recipe)
    built = choice.spec.build(w, **choice.options)
    chain = list(built) if isinstance(built, (list, tuple)) else [built]
    chain[-1].train().move(position)
    return chain


def both(method: stacked.Method, latents: dict[str, Tensor], chain: list[Any], latent: Tensor, t: Any = None) -> Any:
    """(w_hat, gradients) of the bench and of the library for the same upstream gradient."""
    g = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4))
    ours = {k: v.clone().requires_grad_(not k.startswith("fixed")) for k, v in latents.items()}
    steps = method.schedule(POSITION) if t is None else t
    w_hat = method.weight(ours, tuple(torch.tensor(float(v)) for v in steps))[0]
    w_hat.backward(g)
    theirs = latent.clone().requires_grad_()
    other: Any = theirs
    for function in chain:
        other = function(other)
    other.backward(g)
    return (w_hat.detach(), ours), (other.detach(), theirs)


ONE_LATENT = [
    ("ste", stacked.Ste(), {"format": "binary-channel", "estimator": "identity"}, None),
    ("reste", stacked.Reste(), "reste", None),
    ("irnet", stacked.IrNet(), "irnet", None),
    ("proxconnect", stacked.ProxConnect(), {"method": "prox", "map": "relax"}, None),
    ("parq", stacked.Parq(), {"method": "prox", "map": "parq"}, None),
    ("bnn++", stacked.BnnPlusPlus(), "bnn_pp", (8 * 50**POSITION,)),
    ("twn", stacked.Twn(), {"method": "twn", "blocks": "channel"}, None),
    ("bitnet", stacked.BitNet(), "bitnet", None),
    ("median", stacked.BitNet("median"), "bitnet_reloaded", None),
    ("bnn+", stacked.BnnPlus(), "bnn_plus", None),
    ("biper, soft", stacked.BiPer(), {"method": "biper", "stage": 1}, (0.0,)),
    ("biper, hard", stacked.BiPer(), {"method": "biper", "stage": 2}, (1.0,)),
]


@pytest.mark.parametrize(("method", "recipe", "t"), [c[1:] for c in ONE_LATENT], ids=[c[0] for c in ONE_LATENT])
def test_methods_of_one_latent(method: stacked.Method, recipe: Any, t: Any) -> None:
    w = weights()
    (a, ours), (b, theirs) = both(method, method.latents(w[None]), library(recipe, w), w, t)
    torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)  # the library rounds scales to float16
    torch.testing.assert_close(ours["w"].grad[0], theirs.grad, rtol=3e-3, atol=2e-4)


def test_bnn_plus_has_the_same_penalty() -> None:
    w = weights()
    method, (function,) = stacked.BnnPlus(), library("bnn_plus", w)
    torch.testing.assert_close(method.penalty(method.latents(w[None])), function.penalty(w), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lsq_with_the_gradient_of_its_scale(bits: int) -> None:
    w, method = weights(), stacked_levels.Lsq(bits)
    latents = method.latents(w[None])
    latents["scale"] = latents["scale"].half().float()
    (function,) = library({"method": "lsq", "format": f"int{bits}-tensor"}, w)
    function.scale = nn.Parameter(latents["scale"][0].clone())
    (a, ours), (b, theirs) = both(method, latents, [function], w)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours["w"].grad[0], theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["scale"].grad[0], function.scale.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_deepshift_with_the_same_top(bits: int) -> None:
    w, method = weights(), stacked_levels.DeepShiftQ(bits)
    (function,) = library({"method": "deepshift_q", "bits": bits, "top": -2}, w)
    latents = method.latents(w[None]) | {"fixed_scale": torch.full((1, 1, 1), 2.0**function.low)}
    (a, ours), (b, theirs) = both(method, latents, [function], w)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours["w"].grad[0], theirs.grad)
    with torch.no_grad():
        method.after(ours)
        function.after_step(theirs)
    torch.testing.assert_close(ours["w"][0], theirs)


@pytest.mark.parametrize(
    "name, bits", [("s3", 2), ("s3", 3), ("s3", 4), ("denseshift", 2), ("denseshift", 3), ("denseshift", 4)]
)
def test_sign_planes(name: str, bits: int) -> None:
    method = stacked_levels.S3(bits) if name == "s3" else stacked_levels.DenseShift(bits)
    (function,) = library({"method": name, "bits": bits}, weights())
    function.scale.fill_(1.0)
    latents = method.latents(weights()[None])
    stack = torch.cat(list(latents.values()))
    (a, ours), (b, theirs) = both(method, latents, [function], stack)
    torch.testing.assert_close(a, b)
    for i, plane in enumerate(ours.values()):
        torch.testing.assert_close(plane.grad[0], theirs.grad[i], rtol=1e-4, atol=1e-5)
    if name == "s3":
        torch.testing.assert_close(method.penalty(ours), function.penalty(theirs), rtol=1e-4, atol=1e-7)
