"""Allocators against brute force, against each other, and against limits that cannot be."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.allocate import Problem, find, table
from lowbit.allocate._problem import lower_hull
from lowbit.allocate.pareto import frontier
from lowbit.errors import BudgetError, RecipeError

ALL = sorted(table("allocator"))
UNDER_A_LIMIT = [n for n in ALL if n not in ("bisection", "preset")]


def brute(problem):
    """The least objective over every combination, or None."""
    n, k = problem.goal.shape
    choices = (np.array(c) for c in itertools.product(range(k), repeat=n))
    sums = [problem.totals(c)[problem.objective] for c in choices if problem.fits(c)]
    finite = [s for s in sums if np.isfinite(s)]
    return min(finite) if finite else None


def random_problem(seed, n=5, k=3, share=0.5, columns=("bytes",), groups=None):
    rng = np.random.default_rng(seed)
    made = {"loss": rng.random((n, k)) * 10}
    for c in columns:
        made[c] = rng.random((n, k)) * 10 + 0.1
    limits = {c: made[c].min(1).sum() + share * (made[c].max(1).sum() - made[c].min(1).sum()) for c in columns}
    return Problem(tuple("abcdefgh"[:n]), tuple("uvwxyz"[:k]), made, limits, groups=groups)


def quadratic(a, n, widths, average):
    """loss a_i 4^-b, cost n_i b bits."""
    b = np.array(widths)
    loss = np.array(a)[:, None] * 4.0 ** -b[None]
    bits = np.array(n)[:, None] * b[None].astype(float)
    names = tuple(f"layer{i}" for i in range(len(a)))
    return Problem(names, tuple(map(str, widths)), {"loss": loss, "bits": bits}, {"bits": average * float(sum(n))})


@pytest.mark.parametrize("name", ["integer_program", "pareto"])
@pytest.mark.parametrize("columns", [("bytes",), ("bytes", "seconds")])
@pytest.mark.parametrize("seed", range(8))
def test_exact_allocators_equal_brute_force(name, columns, seed):
    problem = random_problem(seed, columns=columns)
    want = brute(problem)
    if want is None:  # each limit can be met, both together cannot
        with pytest.raises(BudgetError, match="all together cannot"):
            find(name).run(problem)
        return
    assert find(name).run(problem).totals["loss"] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", ["integer_program", "pareto"])
def test_groups_take_one_option(name):
    problem = random_problem(3, n=4, groups=np.array([7, 1, 7, 2]))
    got = find(name).run(problem)
    assert got.choice[0] == got.choice[2]
    n, k = problem.goal.shape
    same = [np.array(c) for c in itertools.product(range(k), repeat=n) if c[0] == c[2]]
    assert got.totals["loss"] == pytest.approx(min(problem.totals(c)["loss"] for c in same if problem.fits(c)))


@pytest.mark.parametrize("name", ["integer_program", "pareto", "greedy"])
def test_a_quality_target_is_a_limit_on_the_loss(name):
    base = random_problem(1)
    problem = Problem(base.names, base.labels, base.columns, {"loss": 12.0}, objective="bytes")
    got = find(name).run(problem)
    assert got.totals["loss"] <= 12.0
    if name != "greedy":
        assert got.totals["bytes"] == pytest.approx(brute(problem))


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(2, 4), st.integers(0, 20))
def test_greedy_is_the_optimum_on_separable_convex_losses(a, k, spare):
    """Steps of equal cost and falling gains: the limit is always used up at a step, so greedy = brute force."""
    problem = quadratic(a, [1] * len(a), range(1, k + 1), 1)
    limit = min(len(a) + spare, k * len(a))
    problem = Problem(problem.names, problem.labels, problem.columns, {"bits": float(limit)})
    assert find("greedy").run(problem).totals["loss"] == pytest.approx(brute(problem), rel=1e-9)


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_greedy_lies_between_the_hull_bound_and_one_step_above_it(seed, share):
    problem = random_problem(seed, n=6, k=4, share=share)
    got, bound, step = find("greedy").run(problem), 0.0, 0.0
    # the linear relaxation: all steps of all hulls by gain per cost, the last one in part
    hulls = [lower_hull(c, g) for c, g in zip(problem.columns["bytes"], problem.goal)]
    bound = sum(problem.goal[i, h[0]] for i, h in enumerate(hulls))
    left = problem.limits["bytes"] - sum(problem.columns["bytes"][i, h[0]] for i, h in enumerate(hulls))
    steps = []
    for i, h in enumerate(hulls):
        for p, q in itertools.pairwise(h):
            steps.append(
                (
                    problem.goal[i, p] - problem.goal[i, q],
                    problem.columns["bytes"][i, q] - problem.columns["bytes"][i, p],
                )
            )
    for gain, cost in sorted(steps, key=lambda s: -s[0] / s[1]):
        taken = min(1.0, left / cost)
        bound -= taken * gain
        left -= taken * cost
        if taken < 1:
            step = gain
            break
    assert bound - 1e-9 <= got.totals["loss"] <= bound + step + 1e-9


@pytest.mark.parametrize("name", ["greedy", "integer_program", "pareto", "scalebits"])
def test_closed_form_widths(name):
    """a_i 4^-b at equal marginal gain: b_i = c + log2(a_i / n_i) / 2, met exactly where the menu holds them."""
    a, n = [4.0**5, 4.0**4, 4.0**3 * 16, 4.0**2], [1, 4, 16, 1]
    want = [5, 3, 3, 2]
    average = float(np.dot(want, n) / sum(n))
    problem = quadratic(a, n, range(1, 9), average)
    assert [int(x) for x in problem.at(find(name).run(problem).choice)] == want


@pytest.mark.parametrize("name", UNDER_A_LIMIT)
@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_budgets_are_never_exceeded(name, seed):
    problem = random_problem(seed, n=8, k=4, columns=("bytes", "seconds"), share=0.6)
    try:
        got = find(name).run(problem)
    except BudgetError:
        assert name == "uniform" or brute(problem) is None
        return
    assert problem.fits(got.choice)
    assert all(got.totals[k] <= limit * (1 + 1e-6) for k, limit in problem.limits.items())


@pytest.mark.parametrize("name", UNDER_A_LIMIT)
def test_an_impossible_budget_says_the_smallest_reachable_one(name):
    problem = Problem(("a", "b"), ("x", "y"), {"loss": [[1, 2], [1, 2]], "bytes": [[7, 5], [7, 6]]}, {"bytes": 10.5})
    with pytest.raises(BudgetError, match=r"bytes 10\.5 was asked and the smallest reachable is 11\b"):
        find(name).run(problem)


@pytest.mark.parametrize("name", ["integer_program", "pareto"])
def test_tightening_the_budget_never_lowers_the_objective(name):
    problem = random_problem(11, n=6, k=4)
    low, high = problem.columns["bytes"].min(1).sum(), problem.columns["bytes"].max(1).sum()
    losses = [
        find(name).run(Problem(problem.names, problem.labels, problem.columns, {"bytes": b})).totals["loss"]
        for b in np.linspace(low, high, 9)
    ]
    assert losses == sorted(losses, reverse=True)


def test_equal_gains_give_a_uniform_allocation():
    problem = quadratic([1.0] * 6, [8] * 6, [2, 3, 4], 3)
    for name in ("greedy", "integer_program", "scalebits", "uniform"):
        assert set(problem.at(find(name).run(problem).choice)) == {"3"}, name


def test_uniform_is_never_better_than_the_exact_choice():
    for seed in range(10):
        problem = random_problem(seed)
        try:
            flat = find("uniform").run(problem)
        except BudgetError:
            continue
        assert find("integer_program").run(problem).totals["loss"] <= flat.totals["loss"] + 1e-9
        assert len(set(flat.choice)) == 1


def test_items_without_an_option_never_get_it():
    columns = {"loss": [[0, np.inf], [0, 1]], "bytes": [[5, np.inf], [5, 1]]}
    problem = Problem(("a", "b"), ("wide", "narrow"), columns, {"bytes": 7.0})
    for name in ("greedy", "integer_program", "pareto", "policy_gradient", "scalebits"):
        assert problem.at(find(name).run(problem).choice) == ["wide", "narrow"], name
    with pytest.raises(BudgetError):
        find("uniform").run(problem)
    with pytest.raises(ValueError, match="'a' has no option"):
        Problem(("a",), ("x",), {"loss": [[np.inf]]})


def test_the_frontier_is_undominated_and_holds_every_budgets_optimum():
    problem = random_problem(5, n=5, k=3, share=1.0)
    points = [(t["bytes"], t["loss"]) for _, t in frontier(problem)]
    assert all(c1 < c2 and l1 > l2 for (c1, l1), (c2, l2) in itertools.pairwise(points))
    budget = points[len(points) // 2][0]
    tight = Problem(problem.names, problem.labels, problem.columns, {"bytes": budget})
    assert brute(tight) == pytest.approx(points[len(points) // 2][1])


def test_a_thinned_front_still_fits_and_says_so():
    problem = random_problem(2, n=8, k=6)
    exact, thin = find("pareto").run(problem), find("pareto").run(problem, states=8)
    assert exact.notes["exact"] and not thin.notes["exact"]
    assert exact.totals["loss"] <= thin.totals["loss"] <= 2 * exact.totals["loss"] and problem.fits(thin.choice)


def test_bisection_finds_the_exact_prefix_where_loss_is_monotone():
    rng = np.random.default_rng(0)
    loss = np.sort(rng.random((12, 3)), axis=1) * [1, 2, 4]
    loss[:, 0] = 0
    problem = Problem(
        tuple(map(str, range(12))), ("8", "4", "2"), {"loss": loss, "bytes": np.tile([8.0, 4, 2], (12, 1))}
    )
    target, order = 3.0, np.argsort(loss[:, 2])
    calls = []
    got = find("bisection").run(problem, lambda c: calls.append(1) or problem.totals(c)["loss"], target=target)
    prefix = max(m for m in range(13) if loss[order[:m], 1].sum() <= target)
    lowered = [i for i in order if got.choice[i] >= 1]
    assert sorted(lowered) == sorted(order[:prefix].tolist())
    assert got.notes["loss"] <= target and len(calls) <= 2 + 2 * 5
    assert set(find("bisection").run(problem, target=1e9).choice) == {2}, "a target without teeth lowers everything"
    with pytest.raises(BudgetError, match="smallest reachable is 0, with the widest"):
        find("bisection").run(problem, target=-1.0)


def test_scalebits_follows_measurements_where_the_table_is_wrong():
    """The table says a and b gain alike; measured, only b does. Rejected batches shrink, accepted ones are kept."""
    table_ = np.array([[4.0, 1.0]] * 4)
    problem = Problem(tuple("abcd"), ("2", "4"), {"loss": table_, "bits": [[2.0, 4.0]] * 4}, {"bits": 12.0})
    true = np.array([[4.0, 3.9], [4.0, 3.9], [9.0, 0.0], [9.0, 0.0]])
    measure = lambda c: float(true[np.arange(4), c].sum())  # noqa: E731
    got = find("scalebits").run(problem, measure, lambda c: true)
    assert got.choice.tolist() == [0, 0, 1, 1] and got.notes["loss"] == 8.0
    stuck = find("scalebits").run(problem, lambda c: float(c @ [0, 0, 9, 9]), lambda c: true)
    assert stuck.choice.tolist() == [1, 1, 0, 0] and not any(b["accepted"] for b in stuck.notes["batches"])


def test_policy_gradient_collapses_on_a_dominant_option_and_drifts_nowhere_without_one():
    import torch

    from lowbit.allocate.policy_gradient import _policy, search

    allowed = torch.ones(3, 4, dtype=torch.bool)
    flat = search(allowed, lambda c: 1.0, torch.Generator().manual_seed(0), steps=300, gamma=0.0)
    assert (flat - 0.5).abs().max() < 1e-6
    sharp = search(allowed, lambda c: float((c == 2).sum()), torch.Generator().manual_seed(0), steps=1000)
    assert _policy(sharp, allowed, 1.0)[:, 2].min() > 0.95


def test_policy_gradient_comes_near_the_optimum():
    for seed in range(2):
        problem = random_problem(seed, n=6, k=3, share=0.6)
        got = find("policy_gradient").run(problem, seed=seed, steps=1000)
        flat = problem.goal.mean(1).sum()
        assert got.totals["loss"] - brute(problem) <= 0.35 * (flat - brute(problem))


def test_preset_mixes_follow_llama_cpp():
    blocks = 16
    names = [
        f"model.layers.{i}.{m}"
        for i in range(blocks)
        for m in ("self_attn.v_proj", "self_attn.q_proj", "mlp.down_proj")
    ]
    widths = {"2": 2.28, "3": 3.3, "4": 4.3, "5": 5.3, "6": 6.4}
    weights = np.full((len(names), 5), 800.0)
    columns = {
        "loss": np.ones((len(names), 5)),
        "weights": weights,
        "bytes": weights * np.array(list(widths.values())) / 8,
    }
    problem = Problem(tuple(names), tuple(widths), columns)
    got = dict(zip(names, problem.at(find("preset").run(problem, mix="Q4_K_M").choice)))
    wide = [i for i in range(blocks) if got[f"model.layers.{i}.mlp.down_proj"] == "6"]
    assert wide == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {got[f"model.layers.{i}.self_attn.q_proj"] for i in range(blocks)} == {"4"}
    two = dict(zip(names, problem.at(find("preset").run(problem, mix="Q2_K", gqa=3).choice)))
    assert two["model.layers.5.self_attn.v_proj"] == "3" and two["model.layers.5.self_attn.q_proj"] == "2"
    tight = Problem(problem.names, problem.labels, problem.columns, {"bytes": 4.5 * 800 * len(names) / 8})
    assert find("preset").run(tight).notes["mix"] == "Q4_K_S"
    with pytest.raises(RecipeError, match="Q4_K_M"):
        find("preset").run(problem, mix="Q4_K_N")


def test_unknown_names_list_near_ones():
    with pytest.raises(RecipeError, match="Did you mean 'greedy'"):
        find("gredy", "allocator")
