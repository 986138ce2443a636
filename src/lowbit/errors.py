"""Every error lowbit raises on purpose.

    LowbitError
    |- ShapeError        a shape does not fit: group size, tile, layer sizes
    |- FormatError       a format string, level set, scale or code that cannot be
    |- RecipeError       a recipe or an option that contradicts itself
    |- DataError         calibration or evaluation text
    |- ModelError        a model that cannot be read or walked
    |- ArtifactError     a folder that is not a whole, untouched artifact
    |- MemoryPlanError   the plan does not fit the ceiling
    |- BudgetError       no choice of formats meets a budget
    |- TrainingError     a training that cannot go on: NaN in the loss or in the weights
    '- KernelError       a kernel row that is missing, forced wrongly or fails its self-check

Each message says what was given, what was needed, what to type next.
"""


class LowbitError(Exception):
    """Base of all lowbit errors; its text is meant for the person at the keyboard."""


class ShapeError(LowbitError, ValueError):
    """A tensor shape does not fit the format or the layer."""


class FormatError(LowbitError, ValueError):
    """A format, a level set or a code that cannot be."""


class RecipeError(LowbitError, ValueError):
    """An unknown method or option, or options that contradict each other."""


class DataError(LowbitError, ValueError):
    """Text that is missing, too short or does not belong to the model."""


class ModelError(LowbitError):
    """A model file or architecture that cannot be read or walked."""


class ArtifactError(LowbitError):
    """A compressed folder that is incomplete, damaged or of another version."""


class MemoryPlanError(LowbitError):
    """The estimated peak memory exceeds the given ceiling."""


class BudgetError(LowbitError, ValueError):
    """No choice of formats meets the budget; the text says what the smallest reachable one is."""


class TrainingError(LowbitError):
    """A training that cannot go on: the loss or the weights are no numbers any more."""


class KernelError(LowbitError):
    """A kernel row is unavailable, forced wrongly or failed its self-check."""


def near_names(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """A sentence tail for an unknown name: the closest known ones, else all of them."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else f"Known: {', '.join(sorted(known))}."
