"""A callback for transformers' Trainer.

    lowbit.prepare(model, "ternary")
    Trainer(model, TrainingArguments(...), train_dataset=..., callbacks=[TrainerCallback()]).train()
    lowbit.pack(model)

Checkpoints of the Trainer hold all there is: a training that resumes from one ends with the weights of an undisturbed
one. Accumulated, bf16 and data-parallel training work as they do without it.
"""

from typing import Any

import transformers

from lowbit.errors import RecipeError
from lowbit.integrations._watch import Watch, check_prepared
from lowbit.training import add_penalty_gradients, step


class TrainerCallback(transformers.TrainerCallback):
    """penalty: add what methods add to the loss (the logged loss is without it). diagnose: record `lowbit.diagnose`
    numbers every so many steps into `rows`, 0 for never.

    Raises RecipeError when training begins with a model that is not prepared, or in fp16 without gradient clipping,
    where gradients are still scaled when the penalty is added.
    """

    def __init__(self, penalty: bool = True, diagnose: int = 0):
        self.penalty, self._watch = penalty, Watch(diagnose)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._watch.rows

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        check_prepared(model)
        if self.penalty and args.fp16 and not args.max_grad_norm:
            raise RecipeError("fp16 without gradient clipping: set max_grad_norm, take bf16, or give penalty=False.")

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._watch.begin(model, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._watch.end(state.global_step)
        if self.penalty:
            add_penalty_gradients(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step(model, state.global_step / max(state.max_steps, 1))
