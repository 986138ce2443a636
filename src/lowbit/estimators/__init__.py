"""Estimators: how a gradient passes a rounding. One file each; the folder is the table.

estimator("reste", power=5)      by name with its parameters, or an Estimator of your own
through(x, projected, slope)     the straight-through step they all share;  scaled(...)  the same with a learned scale
Scheduled                        a module whose parameter moves with the training
"""

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lowbit.errors import RecipeError, near_names
from lowbit.estimators._estimator import Estimator, scaled, through
from lowbit.estimators._schedule import Scheduled

__all__ = ["Estimator", "Scheduled", "estimator", "estimators", "scaled", "through"]


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


def estimator(name: "str | Mapping[str, Any] | Estimator", **options: Any) -> Estimator:
    """The estimator called `name`, or described by {"name": ..., option: value}.

    Raises RecipeError with the nearest names for one that is unknown, or has no such option.
    """
    if isinstance(name, Estimator):
        return name.with_options(**options)
    if isinstance(name, Mapping):
        described = dict(name)
        return estimator(described.pop("name", ""), **described, **options)
    if name not in estimators():
        raise RecipeError(f"unknown estimator {name!r}. {near_names(str(name), tuple(estimators()))}")
    return estimators()[name].with_options(**options)
