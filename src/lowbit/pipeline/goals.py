"""From a probe to a recipe: the menu, what options cost, the frontier, and the point that meets the goals.

    items     every linear layer of the blocks, the embedding, the output head
    columns   loss (nats a token, from the probe), bytes (counted), seconds (measured, where a latency is asked)
    choice    greedy on the convex hull; an integer program where there are several limits

Expected loss: the single losses added up, K nats a token, times what was measured of such sums; a perplexity of exp
of that times the float model's. How far it was off on SmolLM2-135M stands in docs/allocation.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np

from lowbit import solvers
from lowbit.allocate import Allocation, Problem, find, storage_bytes
from lowbit.errors import BudgetError, RecipeError, near_names
from lowbit.pipeline.probe import Option
from lowbit.recipe import LayerRule, Recipe

WIDTHS = {"icquant": (2, 3, 4), "gptq": (4, 5, 6, 8)}  # the menu where no method is asked for: what nothing dominates
PLAIN = {"gptq": (2, 3)}  # without exceptions: for a latency, or rows so short that what ICQuant keeps of each tells
NARROW = 256
PROBED = (2, 3, 4)
GROUPS = (64, 128, 32)
HEADER_BYTES = 110  # of a safetensors header, for each tensor
EMBEDDINGS = (("int8", 1), ("uint6", 1), ("uint5", 1), ("uint4", 2), ("uint4", 1), ("uint3", 1))  # and finer groups
ALLOCATORS = ("greedy", "integer_program", "pareto", "policy_gradient", "preset", "uniform")  # that need no measuring
SENSITIVITIES = ("fisher", "trace")
DEAREST_FIRST = 25  # points of the frontier that the report shows


@dataclass(frozen=True)
class Goals:
    """What is asked of a compression; None: not asked.

    bytes: of model.safetensors; bits: per weight over the blocks' layers; max_loss: perplexity / float perplexity - 1;
    latency: seconds to generate a token on this machine
    """

    bytes: "int | None" = None
    bits: "float | None" = None
    max_loss: "float | None" = None
    latency: "float | None" = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(
                    f"{name}={value!r}: a goal is a positive number, e.g. --budget 60MB or --max-loss 5%."
                )

    def __bool__(self) -> bool:
        return any(v is not None for v in asdict(self).values())

    @property
    def only_bits(self) -> bool:
        """An average over the blocks' layers alone says nothing of embedding and head."""
        return list(self.as_dict()) == ["bits"]

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}

    def words(self) -> str:
        """As a person would type it."""
        said = []
        if self.bytes is not None:
            said.append(f"at most {self.bytes / 1e6:.4g} MB")
        if self.bits is not None:
            said.append(f"at most {self.bits:.4g} bits per weight in the blocks")
        if self.max_loss is not None:
            said.append(f"perplexity at most {100 * self.max_loss:.3g}% above the float model's")
        if self.latency is not None:
            said.append(f"at most {1000 * self.latency:.4g} ms a token")
        return ", ".join(said)


@dataclass(frozen=True)
class Search:
    """How a goal is looked for.

    method, group: narrow the menu to these; fixed_ends: embedding and head as the recipe says
    allocate: an allocator (greedy; an integer program for several goals); sensitivity: what its losses are, see `probe`
    Raises RecipeError for names that are not known.
    """

    method: "str | None" = None
    group: "int | None" = None
    fixed_ends: bool = False
    allocate: "str | None" = None
    sensitivity: str = "fisher"

    def __post_init__(self) -> None:
        for flag, given, known in (
            ("--allocate", self.allocate or ALLOCATORS[0], ALLOCATORS),
            ("--sensitivity", self.sensitivity, SENSITIVITIES),
        ):
            if given not in known:
                raise RecipeError(f"{flag} {given} is unknown. {near_names(given, known)}")


@dataclass(frozen=True)
class Chosen:
    """A point: its recipe, what is expected of it, and the frontier it was chosen from."""

    recipe: Recipe
    expected: dict[str, float]
    frontier: list[dict[str, float]]
    uniform: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {"expected": self.expected, "frontier": self.frontier, "uniform": self.uniform}


def menu(
    widths: Sequence[int], method: "str | None" = None, group: "int | None" = None, fast: bool = False
) -> list[Option]:
    """Options to probe for layers with these input widths.

    method, group: only that one; fast: speed counts too
    Widths of 5 to 8 bits are not probed: their error is the 4-bit one's times (15 / (2^b - 1))^2.
    Raises RecipeError for a method whose formats have no width.
    """
    wanted = {method: (2, 3, 4, 5, 6, 8)} if method else WIDTHS
    options = [o for name, bits in wanted.items() for o in _options(name, bits, widths, group, bool(method))]
    if (fast or min(widths) < NARROW) and not method:
        options += [o for name, bits in PLAIN.items() for o in _options(name, bits, widths, group, False)]
    return options


def _options(
    name: str, bits: Sequence[int], widths: Sequence[int], group: "int | None", every_group: bool
) -> list[Option]:
    spec = solvers.find(name)
    if spec.averages:
        g = group or _groups(widths)[0]
        return [Option(name, str(spec.default_format(spec.bits, g)), average=a) for a in spec.averages]
    if "{bits}" not in spec.format or spec.widths:
        raise RecipeError(f"{name} has one format only: leave out --method, or the goal.")
    groups = [group] if group else [spec.group] if spec.group == -1 else _groups(widths)
    options = []
    for g in groups if every_group else groups[:1]:
        options += [Option(name, str(spec.default_format(b, g))) for b in bits if b in PROBED]
        four = str(spec.default_format(4, g))
        for b in bits if g == groups[0] else ():
            if b not in PROBED:
                like = Option(name, four).label
                options.append(Option(name, str(spec.default_format(b, g)), like, (15 / (2**b - 1)) ** 2))
    return options


def _groups(widths: Sequence[int]) -> list[int]:
    """Group sizes that divide all widths, the usual one first; whole rows where none does."""
    return [g for g in GROUPS if all(w % g == 0 for w in widths)] or [16 if all(w % 16 == 0 for w in widths) else -1]


def embedding_menu(width: int, recipe: "Recipe | None" = None) -> list[str]:
    """Formats to try on embedding and head; the recipe's own one only, if it is given."""
    if recipe is not None:
        fmt = recipe.embedding_format(width)
        return [] if fmt is None else [str(fmt)]
    group = next((g for g in (64, 32, 16) if width % g == 0), 0)
    return [f"{name}-g{group // finer}" if group else f"{name}-channel" for name, finer in EMBEDDINGS]


# -- the problem


def problem_of(
    probe: Mapping[str, Any], labels: Sequence[str], seconds: "Mapping[tuple[int, int, str], float] | None" = None
) -> Problem:
    """The allocation problem of a probe: the blocks' layers first, then the ends. No limits yet.

    labels: "method format" for layers, formats for the ends; seconds: (out, in, label) -> time for one token
    Bytes are counted; where they depend on the weights (exceptions) they are those of the probe's sample, scaled up.
    """
    rows = [*probe["layers"].items(), *probe["ends"].items()]
    columns = {k: np.full((len(rows), len(labels)), np.inf) for k in ("loss", "bytes", "bits", "weights", "seconds")}
    inner = len(probe["layers"])
    for i, (_, row) in enumerate(rows):
        shape = tuple(row["shape"])
        for label, loss in row["loss"].items():
            o = labels.index(label)
            stored = row.get("bytes", {}).get(label) or storage_bytes(shape, label.rpartition(" ")[2])
            columns["loss"][i, o] = loss
            columns["bytes"][i, o] = stored + 3 * HEADER_BYTES
            columns["bits"][i, o] = 8 * stored if i < inner else 0
            columns["weights"][i, o] = prod(shape)
            columns["seconds"][i, o] = seconds[(*shape, label)] if seconds else 0
    groups = np.minimum(np.arange(len(rows)), inner)  # embedding and head have one format between them
    return Problem(tuple(n for n, _ in rows), tuple(labels), columns, groups=groups)


def choose(
    probe: Mapping[str, Any],
    goals: Goals,
    base: Recipe,
    scale: float = 1.0,
    seconds: "Mapping[tuple[int, int, str], float] | None" = None,
    rest: float = 0.0,
    allocator: "str | None" = None,
) -> Chosen:
    """The recipe that meets the goals at the least expected loss (at the fewest bytes, if a loss is the only goal).

    scale: measured over expected loss of an earlier try; rest: seconds a token takes outside of products
    allocator: None for greedy, or an integer program where there are several limits
    Raises BudgetError saying the smallest that can be reached.
    """
    labels = list(dict.fromkeys(la for r in (*probe["layers"].values(), *probe["ends"].values()) for la in r["loss"]))
    problem = problem_of(probe, labels, seconds)
    inner = sum(prod(r["shape"]) for r in probe["layers"].values())
    limits: dict[str, float] = {}
    if goals.bytes is not None:
        limits["bytes"] = goals.bytes - probe["plain_bytes"]
    if goals.bits is not None:
        limits["bits"] = goals.bits * inner
    if goals.latency is not None:
        limits["seconds"] = goals.latency - rest
    if goals.max_loss is not None:
        limits["loss"] = math.log1p(goals.max_loss) / scale
    problem = replace(problem, limits=limits, objective="bytes" if goals.max_loss is not None else "loss")
    _check_reachable(problem, goals, probe["plain_bytes"], inner, rest, scale)
    found = _allocated(
        problem, allocator or ("greedy" if len(limits) == 1 else "integer_program"), len(probe["layers"])
    )

    def point(a: Allocation) -> dict[str, float]:
        total = a.totals["bytes"] + probe["plain_bytes"]
        nats = scale * a.totals["loss"]
        facts = {"bytes": total, "bits_per_weight": a.totals["bits"] / inner, "loss": math.expm1(min(nats, 50.0))}
        return facts | ({"latency": a.totals["seconds"] + rest} if seconds else {})

    return Chosen(
        recipe_of(problem, found, base, len(probe["layers"])),
        point(found),
        [point(a) for a in frontier(problem)],
        [{"format": name, **point(a)} for name, a in uniform(problem, len(probe["layers"]))],
    )


def _allocated(problem: Problem, allocator: str, inner: int) -> Allocation:
    """uniform: one option for the layers of all blocks, the ends free."""
    if allocator == "uniform":
        together = replace(problem, groups=(np.arange(len(problem.names)) >= inner).astype(np.int64))
        return find("integer_program").run(together)
    return find(allocator).run(problem, **({"gap": 1e-4} if allocator == "integer_program" else {}))


def frontier(problem: Problem, points: int = DEAREST_FIRST) -> list[Allocation]:
    """Greedy allocations at sizes from the smallest to the largest: the frontier that was looked at."""
    least = problem.columns["bytes"].min(1).sum()
    best = problem.columns["loss"].argmin(1)
    most = problem.columns["bytes"][np.arange(len(best)), best].sum()
    sizes = np.geomspace(max(least, 1.0), max(most, least, 1.0), points)
    free = replace(problem, objective="loss")
    return [find("greedy").run(replace(free, limits={"bytes": float(b) * (1 + 1e-9)})) for b in sizes]


def uniform(problem: Problem, inner: int) -> list[tuple[str, Allocation]]:
    """One format for all layers of the blocks, the ends at their best: what the choice has to beat."""
    found = []
    for o, label in enumerate(problem.labels):
        if inner and problem.allowed[:inner, o].all():
            choice = problem.columns["loss"].argmin(1)
            choice[:inner] = o
            found.append((label, Allocation(choice, problem.totals(choice))))
    return found


def recipe_of(problem: Problem, found: Allocation, base: Recipe, inner: int) -> Recipe:
    """The allocation as a recipe: the format most weights have, and a rule for every layer that has another."""
    chosen = dict(zip(problem.names, problem.at(found.choice)))
    names, ends = list(problem.names[:inner]), list(problem.names[inner:])
    weights = dict(zip(problem.names, problem.columns["weights"].min(1)))
    shares: dict[str, float] = {}
    for n in names:
        shares[chosen[n]] = shares.get(chosen[n], 0.0) + weights[n]
    most = Option.of(max(shares, key=lambda label: shares[label]))
    rules = tuple(_rule(n, Option.of(chosen[n]), most.method) for n in names if chosen[n] != most.label)
    embeddings: Any = chosen[ends[0]] if ends else base.embeddings
    options = (base.options if base.method == most.method else {}) | most.options
    changes = {"method": most.method, "format": most.format, "layers": rules}
    return Recipe(**(base.as_dict() | changes | {"embeddings": embeddings, "options": options}))


def _rule(name: str, option: Option, method: str) -> LayerRule:
    own = "" if option.method == method else option.method
    return LayerRule(match=name, format=option.format, method=own, options=option.options)


def _check_reachable(problem: Problem, goals: Goals, plain: int, inner: int, rest: float, scale: float) -> None:
    """The smallest reachable of every goal, in the words of who asked."""
    least = {k: float(problem.columns[k].min(1).sum()) for k in problem.limits}
    said = {
        "bytes": ("--budget", f"{math.ceil((least.get('bytes', 0) + plain) / 1e5) / 10:.1f}MB"),
        "bits": ("--bits", f"{math.ceil(100 * least.get('bits', 0) / max(inner, 1)) / 100:.2f}"),
        "seconds": ("--latency", f"{math.ceil(1e4 * (least.get('seconds', 0) + rest)) / 10:.1f}ms"),
        "loss": ("--max-loss", f"{math.ceil(1e4 * math.expm1(scale * least.get('loss', 0))) / 100:.2f}%"),
    }
    for k, limit in problem.limits.items():
        if least[k] > limit:
            flag, reach = said[k]
            raise BudgetError(
                f"{flag}: {goals.words()} cannot be met; the smallest reachable with these formats is {reach}. "
                f"Try {flag} {reach}."
            )
