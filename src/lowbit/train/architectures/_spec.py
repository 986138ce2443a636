"""The row that an architecture adds to the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lowbit.errors import RecipeError, near_names


@dataclass(frozen=True)
class ArchitectureSpec:
    """build: (kind, shape, classes, **options) -> network; kinds: of tasks it fits; options: their defaults.

    A network for images returns (n, classes); one for characters (n, length, classes).
    """

    name: str
    title: str
    source: str
    kinds: tuple[str, ...]
    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, kind: str, options: Mapping[str, Any]) -> None:
        """Raise RecipeError for a task it does not fit, or an option it does not have."""
        if kind not in self.kinds:
            raise RecipeError(f"architecture {self.name!r} is for {' and '.join(self.kinds)}, not for {kind}.")
        for name in options:
            if name not in self.options:
                raise RecipeError(
                    f"architecture {self.name!r} has no option {name!r}. {near_names(str(name), list(self.options))}"
                )
