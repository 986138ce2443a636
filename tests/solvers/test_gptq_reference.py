"""GPTQ once more: plain numpy in float64, no Cholesky factor, no blocks of columns, one column at a time.

Written from the paper and the authors' description, sharing nothing with the library but the answer.
"""

import numpy as np
import pytest
import torch

from lowbit.formats import Format
from lowbit.solvers import find
from lowbit.statistics import LayerStatistics

OUT, IN, GROUP = 6, 48, 16
DEAD = 21


def problem(seed: int, dead: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Weights and the Gram matrix of mixed inputs of very different sizes."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(300, IN)) @ (draw.normal(size=(IN, IN)) / 4 + np.eye(IN)) * draw.uniform(0.2, 3, IN)
    w = draw.standard_t(4, size=(OUT, IN))
    if dead:
        x[:, DEAD], w[:, DEAD] = 0, 30.0
    return w.astype(np.float32).astype(float), (x.T @ x / len(x)).astype(np.float32).astype(float)


def rounded(w: np.ndarray, scale: float, zero: float, top: int) -> np.ndarray:
    return scale * (np.clip(np.round(w / scale) + zero, 0, top) - zero)


def searched(w: np.ndarray, h: np.ndarray, bits: int) -> tuple[float, float]:
    """Scale (as fp16 keeps it) and integer zero of one group: 80 shrunken ranges, the least sum h |error|^2.4."""
    top = 2**bits - 1
    seen = w[h > 0] if (h > 0).any() else w
    h = h if (h > 0).any() else np.ones_like(h)
    low, high = min(seen.min(), 0.0), max(seen.max(), 0.0)
    low, high = (-1.0, 1.0) if low == high else (low, high)
    best = (np.inf, 0.0, 0.0)
    for i in range(80):
        p = 1 - i / 100
        scale = float(np.float16((high - low) * p / top))
        zero = float(np.clip(np.round(-low * p / scale), 0, top))
        error = np.sum(h * np.abs(rounded(w, scale, zero, top) - w) ** 2.4)
        if error < best[0]:
            best = (error, scale, zero)
    return best[1], best[2]


def gptq(w, gram, bits, *, damping=0.01, act_order=True, static_groups=True, weighted=True, refit=True):
    """(codes (OUT, IN), scale (OUT, groups), zero (OUT, groups))."""
    top, across, target = 2**bits - 1, IN // GROUP, w
    h, w = gram.copy(), w.copy()
    for j in range(IN):
        if gram[j, j] == 0:
            h[j, j], w[:, j] = 1.0, 0.0
    order = sorted(range(IN), key=lambda j: (-h[j, j], j)) if act_order else list(range(IN))
    inverse = np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(IN))
    importance = np.diag(gram) if weighted else np.ones(IN)
    scale, zero, codes = np.zeros((OUT, across)), np.zeros((OUT, across)), np.zeros((OUT, IN))

    def fit(g: int) -> None:
        at = slice(g * GROUP, (g + 1) * GROUP)
        for r in range(OUT):
            scale[r, g], zero[r, g] = searched(w[r, at], importance[at], bits)

    if static_groups or act_order:
        for g in range(across):
            fit(g)
    for step, j in enumerate(order):
        g = j // GROUP
        if not (static_groups or act_order) and j % GROUP == 0:
            fit(g)
        codes[:, j] = np.clip(np.round(w[:, j] / scale[:, g]) + zero[:, g], 0, top)
        error = (w[:, j] - scale[:, g] * (codes[:, j] - zero[:, g])) / inverse[j, j]
        for k in order[step + 1 :]:
            w[:, k] -= error * inverse[j, k]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    if refit:
        h = gram + damping * np.mean(np.diag(gram)) * np.eye(IN)
        for r in range(OUT):
            scale[r] = refitted(target[r], codes[r], scale[r], zero[r], h)
    return codes, scale, zero


def refitted(w: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The group scales of one row that minimise (w - L s)^T h (w - L s), as fp16; the old ones where that is worse."""
    basis = np.zeros((IN, len(scale)))
    for k in range(IN):
        basis[k, k // GROUP] = codes[k] - zero[k // GROUP]
    root = np.linalg.cholesky(h).T  # |root d|^2 = d^T h d
    found = np.linalg.lstsq(root @ basis, root @ w, rcond=None)[0]
    new = np.where(found > 0, found, scale).astype(np.float16).astype(float)

    def loss(s: np.ndarray) -> float:
        return float(np.sum((root @ (w - basis @ s)) ** 2))

    return new if loss(new) < loss(scale) else scale


VARIANTS = {
    "defaults": {},
    "in order, static groups": {"act_order": False},
    "in order, groups fitted on the way": {"act_order": False, "static_groups": False},
    "unweighted grids": {"weighted": False},
    "no refit": {"refit": False},
    "other damping": {"damping": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("bits", "dead"), [(4, False), (3, True)])
def test_the_solver_gives_the_references_codes_zeros_and_scales(variant: str, bits: int, dead: bool) -> None:
    w, gram = problem(bits, dead)
    options = {"damping": 0.01} | VARIANTS[variant]
    codes, scale, zero = gptq(w, gram, bits, **options)
    h = torch.from_numpy(gram).float()
    statistics = LayerStatistics(h, h.diagonal().sqrt(), 300)
    fmt = Format.parse(f"uint{bits}-g{GROUP}-search")
    found = find("gptq").solve(torch.from_numpy(w).float(), statistics, fmt, sweeps=0, **options)
    assert np.array_equal(found.grid.zero.reshape(OUT, -1).numpy(), zero)
    assert np.array_equal(found.codes.numpy(), codes)
    # scales are fp16: a refitted one may fall on either side of a tie
    assert np.allclose(
        found.grid.scale.reshape(OUT, -1).numpy(), scale, rtol=2**-10 if options.get("refit", True) else 0
    )
    assert found.notes == {"damping": options["damping"], "dead": int(dead)}


def test_the_variants_differ() -> None:
    """Else the comparison above would say nothing about them."""
    w, gram = problem(4)
    answers = [gptq(w, gram, 4, **options) for options in VARIANTS.values()]
    for i, a in enumerate(answers):
        for b in answers[:i]:
            assert not all(np.array_equal(x, y) for x, y in zip(a, b))
