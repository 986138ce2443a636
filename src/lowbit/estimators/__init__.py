"""Estimators: how a gradient passes a rounding. One file each; the folder is the table.

estimator("identity")        by name, or an Estimator of your own
through(x, projected, slope)     the straight-through step they all share
"""

from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules

from lowbit.errors import RecipeError, near_names
from lowbit.estimators._estimator import Estimator, through

__all__ = ["Estimator", "estimator", "estimators", "through"]


@lru_cache(maxsize=1)
def estimators() -> dict[str, Estimator]:
    """Every estimator by name."""
    table: dict[str, Estimator] = {}
    for m in sorted(iter_modules(__path__), key=lambda m: m.name):
        if not m.name.startswith("_"):
            spec = import_module(f"{__name__}.{m.name}").SPEC
            assert spec.name not in table, f"two files call themselves {spec.name!r}"
            table[spec.name] = spec
    return table


def estimator(name: str | Estimator) -> Estimator:
    """The estimator called `name`. Raises RecipeError with the nearest names."""
    if isinstance(name, Estimator):
        return name
    if name not in estimators():
        raise RecipeError(f"unknown estimator {name!r}. {near_names(name, tuple(estimators()))}")
    return estimators()[name]
