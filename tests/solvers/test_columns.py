"""The column loop against its identities and slow references."""

import pytest
import torch

from lowbit.errors import DataError
from lowbit.formats import Format, decode, encode, fit
from lowbit.solvers import _refit, find
from lowbit.solvers._columns import GridHooks, inverse_cholesky, solve_columns
from lowbit.solvers._refit import refit_scales
from lowbit.statistics import LayerStatistics, output_error


def problem(out: int = 6, in_: int = 24, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Gram matrix of strongly mixed inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_, in_, generator=g) / 3 + torch.eye(in_)
    x = torch.randn(tokens, in_, generator=g) @ mix
    return torch.randn(out, in_, generator=g), x.T @ x / tokens


def run(w, gram, fmt, *, static=False, act_order=False, block=64, damping=0.01):
    hooks = GridHooks(fmt, *w.shape, static=static)
    loop = solve_columns(w, gram, hooks, damping=damping, act_order=act_order, block=block)
    codes = hooks.result_codes()
    w_hat = fmt.blocks.merge(decode(fmt.blocks.split(codes), hooks.grid, fmt), *w.shape)
    return codes, w_hat, loop


def slow_gptq(w, gram, fmt, damping):
    """Plain Python-and-float64 error feedback: eliminate one column after the other from the inverse Hessian."""
    w, group = w.double().clone(), fmt.blocks.cols
    h = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    q = torch.zeros_like(w)
    for j in range(w.shape[1]):
        if j % group == 0:
            grid = fit(w[:, j : j + group].float(), fmt)
        q[:, j] = decode(encode(w[:, j : j + 1].float(), grid, fmt), grid, fmt)[:, 0].double()
        w[:, j:] -= torch.outer((w[:, j] - q[:, j]) / inverse[j, j], inverse[j, j:])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q


def test_equals_the_slow_elimination():
    w, gram = problem()
    fmt = Format.parse("uint3-g8")
    assert torch.allclose(run(w, gram, fmt)[1].double(), slow_gptq(w, gram, fmt, 0.01), atol=1e-6)


def test_loss_is_the_damped_output_error():
    w, gram = problem()
    _, w_hat, loop = run(w, gram, Format.parse("uint3-g8"))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    assert loop.loss == pytest.approx(output_error(w, w_hat, damped), rel=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_does_not_matter(act_order):
    w, gram = problem()
    codes = [
        run(w, gram, Format.parse("uint3-g8"), act_order=act_order, static=act_order, block=b)[0]
        for b in (1, 8, 12, 24)
    ]
    assert all(torch.equal(codes[0], c) for c in codes[1:])


def test_diagonal_gram_is_plain_rounding():
    w, _ = problem()
    fmt = Format.parse("uint3-g8")
    blocks = fmt.blocks.split(w)
    plain = fmt.blocks.merge(encode(blocks, fit(blocks, fmt), fmt), *w.shape)
    assert torch.equal(run(w, torch.diag(torch.rand(24) + 0.5), fmt)[0], plain)


def test_better_than_plain_rounding_on_correlated_inputs():
    ratios = []
    for seed in range(5):
        w, gram = problem(seed=seed)
        fmt = Format.parse("uint3-g24")
        rtn = find("rtn").solve(w, None, fmt).w_hat()
        ratios.append(output_error(w, run(w, gram, fmt)[1], gram) / output_error(w, rtn, gram))
    assert max(ratios) < 0.9, ratios  # the card's toy: 391 against 653


def test_dead_inputs_get_weight_zero_before_grids_are_fitted():
    w, gram = problem()
    gram[3], gram[:, 3] = 0, 0
    w[:, 3] = 50.0
    _codes, w_hat, loop = run(w, gram, Format.parse("uint4-g8"))
    assert loop.dead == 1
    assert not w_hat[:, 3].any()
    assert w_hat[:, :8].abs().max() < 10  # the dead outlier did not stretch its group's grid


def test_damping_rises_until_the_factor_exists():
    x = torch.ones(1, 24)
    upper, used = inverse_cholesky((x.T @ x) * 1e4 - 0.2 * torch.eye(24), 1e-9)
    assert used > 1e-9
    assert torch.isfinite(upper).all()
    with pytest.raises(DataError, match="--windows"):
        inverse_cholesky(torch.full((4, 4), float("nan")), 0.01)


@pytest.mark.parametrize(("shift", "needed"), [(0.0, 0.01), (0.05, 0.1), (0.5, 1.0), (5.0, 10.0)])
def test_damping_rises_tenfold(shift, needed):
    """A matrix of mean diagonal 1 whose smallest eigenvalue is -shift, so that only a larger damping helps."""
    values = torch.linspace(0, 2, 24) * (1 + shift) - shift
    basis = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    gram = (basis @ torch.diag(values.double()) @ basis.T).float()
    upper, used = inverse_cholesky(gram, 0.01)
    assert used == pytest.approx(needed)
    damped = gram + used * gram.diagonal().mean() * torch.eye(24)
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(24), atol=1e-2)


def test_static_groups_use_grids_of_the_original_weights():
    w, gram = problem()
    fmt = Format.parse("uint3-g8")
    hooks = GridHooks(fmt, *w.shape, static=True)
    solve_columns(w, gram, hooks, act_order=True)
    assert torch.equal(hooks.grid.scale, fit(fmt.blocks.split(w), fmt).scale)


@pytest.mark.parametrize(
    "fmt",
    [
        "nf4-g8",
        "ternary-g8",
        "uint4-tile2x8",
        "int4-channel",
        "pot3nz-g8",
        "kmeans2-channel",
        "uint3-g8-double",
        "uint2-tensor",
    ],
)
def test_every_kind_of_format_goes_through_the_loop(fmt):
    w, gram = problem(out=8)
    fmt = Format.parse(fmt)
    solution = find("gptq").solve(w, LayerStatistics(gram, gram.diagonal(), 200), fmt)
    rtn = find("rtn").solve(w, None, fmt).w_hat()
    assert output_error(w, solution.w_hat(), gram) < output_error(w, rtn, gram)
    assert torch.equal(solution.quantized().dequantize(), solution.w_hat())


def test_refit_never_raises_the_error_and_finds_a_planted_scale():
    w, gram = problem(out=16)
    fmt = Format.parse("int4-g8-fp32")
    codes, _w_hat, _loop = run(w, gram, fmt)
    hooks_grid = fit(fmt.blocks.split(w), fmt)
    scale = refit_scales(w, codes, hooks_grid, fmt, gram, 0.0)
    new = fmt.blocks.merge(decode(fmt.blocks.split(codes), hooks_grid._replace(scale=scale), fmt), *w.shape)
    old = fmt.blocks.merge(decode(fmt.blocks.split(codes), hooks_grid, fmt), *w.shape)
    for row in range(16):
        error_new, error_old = (output_error(w[row : row + 1], q[row : row + 1], gram) for q in (new, old))
        assert error_new <= error_old * (1 + 1e-5)
    exact = refit_scales(old * 1.25, codes, hooks_grid, fmt, gram, 0.0)
    used = fmt.blocks.split(codes.float() - 8).abs().sum(1) > 0
    assert torch.allclose(exact[used], hooks_grid.scale[used] * 1.25, rtol=1e-3)


def test_refit_takes_a_few_rows_at_a_time_where_layers_are_wide(monkeypatch):
    w, gram = problem(out=16)
    fmt = Format.parse("int4-g8-fp32")
    codes, grid = run(w, gram, fmt)[0], fit(fmt.blocks.split(w), fmt)
    whole = refit_scales(w, codes, grid, fmt, gram, 0.01)
    monkeypatch.setattr("lowbit.solvers._refit.WORK", 5 * 3 * 24)  # five rows
    rows = []
    monkeypatch.setattr(
        "lowbit.solvers._refit._normal_equations",
        lambda *a, f=_refit._normal_equations: rows.append(len(a[0])) or f(*a),
    )
    assert torch.allclose(refit_scales(w, codes, grid, fmt, gram, 0.01), whole, rtol=1e-5)
    assert rows == [5, 5, 5, 1]


def test_refit_keeps_a_scale_where_the_best_one_does_not_fit_its_dtype():
    """Levels that nearly cancel at the output want a huge scale."""
    fmt = Format.parse("int4-g2")
    w, gram = torch.tensor([[4e4, 4e4]]), torch.tensor([[1.0, -0.9999], [-0.9999, 1.0]])
    grid = fit(fmt.blocks.split(w), fmt)
    assert torch.equal(
        refit_scales(w * 60, torch.tensor([[9, 9]], dtype=torch.uint8), grid, fmt, gram, 0.0), grid.scale
    )


def test_rows_of_a_stacked_solution_equal_separate_solutions():
    w, gram = problem(out=10)
    stats = LayerStatistics(gram, gram.diagonal(), 200)
    fmt = Format.parse("uint3-g8-search")
    whole = find("gptq").solve(w, stats, fmt)
    part = find("gptq").solve(w[4:].contiguous(), stats, fmt)
    assert torch.equal(whole.rows(4, 10).quantized().dequantize(), part.quantized().dequantize())
