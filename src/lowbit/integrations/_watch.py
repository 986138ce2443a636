"""What the callbacks share: is there something prepared, and a record of diagnostics every so many steps."""

from typing import Any

from torch import nn

from lowbit.diagnose import Recorder
from lowbit.errors import RecipeError
from lowbit.training import input_functions, weight_functions


def check_prepared(net: nn.Module) -> None:
    """Raise RecipeError where nothing in the network is prepared."""
    if not any(True for _ in weight_functions(net)) and not any(True for _ in input_functions(net)):
        raise RecipeError(
            'this model is not prepared, so training it changes float weights: call lowbit.prepare(model, "ternary") '
            "before the Trainer is made."
        )


class Watch:
    """Opens a `Recorder` before a step that is to be recorded, closes it before the optimizer's. every: 0 never."""

    def __init__(self, every: int):
        self.every = every
        self.recorder: Recorder | None = None
        self.open = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The records so far; `at` is the optimizer step."""
        return self.recorder.rows if self.recorder else []

    def begin(self, net: nn.Module, step: int) -> None:
        if self.every and step % self.every == 0 and not self.open:
            self.recorder = self.recorder or Recorder(net)
            self.recorder.__enter__()
            self.open = True

    def end(self, step: int) -> None:
        if self.open and self.recorder is not None:
            self.recorder.__exit__()
            self.recorder.record(step)
            self.open = False
