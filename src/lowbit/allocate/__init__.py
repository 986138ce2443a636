"""Who gets how many bits: sensitivities predict what an option costs in quality, allocators choose under budgets.

    sensitivity   (network, options)             -> loss table (items, options)
    allocator     (loss table, costs, budgets)   -> one option per item

Items are whatever carries a width of its own: tensors, groups of rows, tiles. One file a method, of either kind; the
folder is the table.
"""

from lowbit.allocate._costs import storage_bytes
from lowbit.allocate._probe import Probe
from lowbit.allocate._problem import Allocation, Problem
from lowbit.allocate._spec import Spec
from lowbit.errors import RecipeError, near_names


def table(kind: "str | None" = None) -> dict[str, Spec]:
    """Every sensitivity and allocator of this folder (or those of one kind), by name."""
    import lowbit.allocate as package
    from lowbit._registry import discover

    return {name: spec for name, spec in discover(package).items() if kind in (None, spec.kind)}


def find(name: str, kind: "str | None" = None) -> Spec:
    """The method called `name`. Raises RecipeError with the nearest names."""
    methods = table(kind)
    if name not in methods:
        raise RecipeError(f"unknown {kind or 'method'} {name!r}. {near_names(name, list(methods))}")
    return methods[name]


__all__ = ["Allocation", "Probe", "Problem", "Spec", "find", "storage_bytes", "table"]
