"""k-means tables: never worse than a plain Lloyd, near the exact optimum, deterministic, at home in odd rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, fit, kmeans_table, quantize


def best_error(x: list[float], h: list[float], k: int) -> float:
    """Exact one-dimensional k-means by dynamic programming over intervals of the sorted points, O(k n^2)."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    x, h = [x[i] for i in order], [h[i] for i in order]
    a, b, c = [0.0], [0.0], [0.0]
    for xi, hi in zip(x, h):
        a.append(a[-1] + hi)
        b.append(b[-1] + hi * xi)
        c.append(c[-1] + hi * xi * xi)

    def cost(i: int, j: int) -> float:
        weight, first, second = a[j] - a[i], b[j] - b[i], c[j] - c[i]
        return max(second - first * first / weight, 0.0) if weight else 0.0

    best = [0.0] + [float("inf")] * len(x)
    for _ in range(k):
        best = [0.0] + [min(best[i] + cost(i, j) for i in range(j)) for j in range(1, len(x) + 1)]
    return best[-1]


def error(w: Tensor, table: Tensor, h: "Tensor | None" = None) -> Tensor:
    gap = (w[:, :, None] - table[:, None, :]).abs().min(2).values.double().square()
    return (gap if h is None else gap * h).sum(1)


@pytest.mark.parametrize("kind", ["normal", "student", "weighted"])
def test_near_the_exact_optimum(kind: str) -> None:
    w = torch.randn(6, 60)
    if kind == "student":
        w = torch.distributions.StudentT(3.0).sample((6, 60))
    h = torch.rand(6, 60).double() ** 4 if kind == "weighted" else torch.ones(6, 60).double()
    for k in (2, 4, 8):
        found = error(w, kmeans_table(w, k, h.float()), h).sum()
        exact = sum(best_error(row, weight, k) for row, weight in zip(w.tolist(), h.tolist()))
        assert exact * 0.999 < float(found) < 1.10 * exact  # a local optimum; fp16 levels cost next to nothing


def test_reaches_the_known_optimum_of_the_normal_distribution() -> None:
    w = torch.randn(1, 50_000)
    for k, known in ((2, 0.3634), (4, 0.1175), (8, 0.03454)):  # Lloyd 1957, Max 1960
        assert float(error(w, kmeans_table(w, k)) / 50_000) == pytest.approx(known, rel=0.03)


def test_fixed_point_sorted_and_fp16() -> None:
    w = torch.randn(5, 300) * 0.05
    table = kmeans_table(w, 8, iterations=500)
    assert torch.equal(table, table.half().float()) and bool((table.diff(dim=1) >= 0).all())
    nearest = (w[:, :, None] - table[:, None, :]).abs().argmin(2)
    for row, codes, levels in zip(w, nearest, table):
        means = torch.stack([row[codes == i].mean() for i in range(8)])
        assert torch.allclose(means, levels, atol=3e-4)  # Lloyd: every level is its cluster's mean


@settings(max_examples=20)
@given(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=12), st.sampled_from([2, 4, 16]))
def test_few_distinct_values_are_kept_exactly(values: list[float], k: int) -> None:
    w = torch.tensor(values)[None]
    table = kmeans_table(w, k)
    assert table.shape == (1, k) and bool((table.diff(dim=1) >= 0).all())
    assert float(table.min()) >= float(w.min()) - 0.05 and float(table.max()) <= float(w.max()) + 0.05
    if len(set(values)) <= min(k, 2):
        assert float(error(w, table)) == pytest.approx(0, abs=1e-6)


def test_many_levels_for_few_values() -> None:
    w = torch.arange(16.0).repeat(20)[None] * 3 - 7
    assert float(error(w, kmeans_table(w, 16))) == 0
    assert float(error(w, kmeans_table(w, 64))) == 0


def test_weights_steer_and_zero_weights_are_nobody() -> None:
    w = torch.tensor([[0.0, 1.0, 10.0, 11.0, 500.0]])
    assert kmeans_table(w, 2, torch.tensor([[1.0, 1, 1, 1, 0]])).tolist() == [[0.5, 10.5]]
    assert kmeans_table(w, 2, torch.tensor([[3.0, 1, 1, 0, 0]])).tolist() == [[0.25, 10.0]]
    assert torch.equal(kmeans_table(w, 2, torch.zeros(1, 5)), kmeans_table(w, 2))  # nothing known: uniform


def test_rows_are_independent_and_order_does_not_matter() -> None:
    w, h = torch.randn(4, 50), torch.rand(4, 50)
    together = kmeans_table(w, 4, h)
    alone = torch.cat([kmeans_table(w[i : i + 1], 4, h[i : i + 1], iterations=50) for i in range(4)])
    shuffle = torch.randperm(50)
    assert torch.equal(together, alone)
    assert torch.allclose(together, kmeans_table(w[:, shuffle], 4, h[:, shuffle]), atol=1e-3)


def test_empty_and_too_large() -> None:
    assert kmeans_table(torch.zeros(3, 0), 4).shape == (3, 4)
    with pytest.raises(FormatError, match="does not fit the fp16 table"):
        kmeans_table(torch.tensor([[1e6, 2e6]]), 2)


def test_in_a_quantized_tensor() -> None:
    w = torch.randn(6, 64)
    for blocks, rows in (("channel", 6), ("tensor", 1)):
        qt = quantize(w, Format.parse(f"kmeans3-{blocks}"))
        assert qt.grid().table.shape == (rows, 8)
        assert qt.nbytes == 6 * 64 * 3 // 8 + rows * 8 * 2
        assert all(len(row.unique()) <= 8 for row in qt.dequantize())
    weighted = quantize(w, Format.parse("kmeans2-channel"), importance=torch.rand(6, 64) ** 6)
    assert not torch.equal(weighted.dequantize(), quantize(w, Format.parse("kmeans2-channel")).dequantize())


def test_one_table_for_all_blocks_finds_the_planted_levels_and_scales() -> None:
    levels, scales = torch.tensor([-3.0, -1.0, 0.5, 2.0]), 2.0 ** torch.randint(-4, 5, (40, 1))
    w = scales * levels[torch.randint(0, 4, (40, 64))]
    grid = fit(w, Format.parse("kmeans2-g64-shared"))
    assert grid.table is not None and grid.table.shape == (4,)
    ratio = grid.table / levels
    assert torch.allclose(ratio, ratio[:1].expand(4), rtol=2e-3)  # up to one factor, which the scales take
    assert torch.allclose(grid.scale * ratio[0], scales, rtol=4e-3)


def test_a_shared_table_with_scales_beats_uniform_levels_of_a_normal_distribution() -> None:
    torch.manual_seed(0)
    w = torch.randn(256, 256) * torch.rand(256, 1)
    error = {
        f: float((quantize(w, Format.parse(f)).dequantize() - w).square().mean())
        for f in ("int2-g128-lstsq", "kmeans2-g128-shared")
    }
    assert error["kmeans2-g128-shared"] < 0.83 * error["int2-g128-lstsq"]


def test_a_shared_table_ignores_weights_of_importance_zero_and_zero_blocks() -> None:
    w, h = torch.randn(8, 16), torch.ones(8, 16)
    w[0], h[:, 3] = 0, 0
    fmt = Format.parse("kmeans2-g16-shared")
    changed = w.clone()
    changed[1:, 3] += 50
    one, other = fit(w, fmt, h), fit(changed, fmt, h)
    assert torch.equal(one.scale, other.scale) and torch.equal(one.table, other.table)
    assert float(one.scale[0]) == 0
