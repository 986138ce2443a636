"""The row a sensitivity or an allocator adds to the table of methods.

    sensitivity: run(probe, **options)                               -> (items, options) array of predicted losses
    allocator:   run(problem, measure=None, rescore=None, **options) -> Allocation

measure(choice) is the true loss of an allocation and rescore(choice) a loss table taken at it; methods that need
neither take them all the same, so that all can be run in one loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One method. options: the keyword defaults."""

    name: str
    title: str
    source: str
    run: Callable[..., Any]
    kind: str  # "allocator" or "sensitivity"
    options: dict[str, Any] = field(default_factory=dict)
