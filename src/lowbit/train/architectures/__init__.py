"""Networks for the tasks. One file an architecture; the folder is the table: architectures(), build("mlp", ...)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lowbit.errors import RecipeError, near_names
from lowbit.train.architectures._spec import ArchitectureSpec

__all__ = ["ArchitectureSpec", "architecture", "architectures", "build"]


def architectures() -> dict[str, ArchitectureSpec]:
    """Every architecture by name."""
    import lowbit.train.architectures as package
    from lowbit._registry import discover

    return discover(package)


def architecture(name: str) -> ArchitectureSpec:
    """The architecture called `name`. Raises RecipeError with the nearest names."""
    found = architectures()
    if name not in found:
        raise RecipeError(f"unknown architecture {name!r}. {near_names(str(name), list(found))}")
    return found[name]


def build(name: str, kind: str, shape: tuple[int, ...], classes: int, options: Mapping[str, Any]) -> nn.Module:
    """A network for examples of `shape` and `kind`; seeded by torch's generator.

    Raises RecipeError where options and sizes do not go together.
    """
    spec = architecture(name)
    spec.check(kind, options)
    try:
        return spec.build(kind, shape, classes, **{**spec.options, **options})
    except (ValueError, TypeError, RuntimeError) as e:
        raise RecipeError(f"architecture {name!r} cannot be built for examples of {shape}: {e}") from None
