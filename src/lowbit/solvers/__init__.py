"""Solvers: (weight, statistics, format) -> codes and grid, for one layer.

One file a method; the folder is the table.
"""

from lowbit.errors import RecipeError, near_names
from lowbit.solvers._spec import Exceptions, Solution, Spec


def table() -> dict[str, Spec]:
    """Every solver in this folder, by name."""
    import lowbit.solvers as package
    from lowbit._registry import discover

    return discover(package)


def find(name: str) -> Spec:
    """The solver called `name`. Raises RecipeError with the nearest names."""
    methods = table()
    if name not in methods:
        raise RecipeError(f"unknown method {name!r}. {near_names(name, list(methods))}")
    return methods[name]


__all__ = ["Exceptions", "Solution", "Spec", "find", "table"]
