"""A callback for Lightning's Trainer. Needs pip install "lowbit[lightning]".

class Mine(lightning.LightningModule):
    def __init__(self):
        self.net = lowbit.prepare(make_net(), "ternary")
    ...
lightning.Trainer(max_epochs=20, callbacks=[LightningCallback()]).fit(Mine(), loader)
lowbit.pack(mine.net)
"""

from typing import Any

import lightning

from lowbit.errors import RecipeError
from lowbit.integrations._watch import Watch, check_prepared
from lowbit.training import add_penalty_gradients, step


class LightningCallback(lightning.Callback):
    """penalty: add what methods add to the loss; give False where `training_step` adds `lowbit.penalty` itself.
    diagnose: record `lowbit.diagnose` numbers every so many steps into `rows`, 0 for never.

    Raises RecipeError where nothing is prepared, or the Trainer does not know how long it will train.
    """

    def __init__(self, penalty: bool = True, diagnose: int = 0):
        self.penalty, self._watch, self._stepped = penalty, Watch(diagnose), 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._watch.rows

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        check_prepared(pl_module)
        self._stepped = trainer.global_step
        if not 0 < trainer.estimated_stepping_batches < float("inf"):
            raise RecipeError("schedules need the training's length: give lightning.Trainer max_steps or max_epochs.")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._watch.begin(pl_module, trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._watch.end(trainer.global_step)
        if self.penalty:
            add_penalty_gradients(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self._stepped:  # not within an accumulated step
            self._stepped = trainer.global_step
            step(pl_module, trainer.global_step / trainer.estimated_stepping_batches)
