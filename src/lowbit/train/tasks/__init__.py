"""What networks are trained on. One file a task; the folder is the table: tasks(), task("digits")."""

from lowbit.errors import RecipeError, near_names
from lowbit.train.tasks._task import Task, TaskSpec

__all__ = ["Task", "TaskSpec", "task", "tasks"]


def tasks() -> dict[str, TaskSpec]:
    """Every task by name."""
    import lowbit.train.tasks as package
    from lowbit._registry import discover

    return discover(package)


def task(name: str) -> TaskSpec:
    """The task called `name`. Raises RecipeError with the nearest names."""
    found = tasks()
    if name not in found:
        raise RecipeError(f"unknown task {name!r}. {near_names(str(name), list(found))}")
    return found[name]
