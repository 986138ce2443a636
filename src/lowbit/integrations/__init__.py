"""Training a prepared network with somebody else's loop.

    Trainer(model, ..., callbacks=[lowbit.integrations.TrainerCallback()])              transformers
    lightning.Trainer(..., callbacks=[lowbit.integrations.LightningCallback()])         pip install "lowbit[lightning]"

Both move schedules after each optimizer step, add what methods add to the loss, and record diagnostics if asked. With
`accelerate`, and in any loop that you write, `lowbit.step` and `lowbit.penalty` are all there is to call; they see
through the wrappers of data-parallel, fully sharded and compiled networks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {"TrainerCallback": "hf_trainer", "LightningCallback": "lightning_callback"}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from lowbit.integrations.hf_trainer import TrainerCallback as TrainerCallback
    from lowbit.integrations.lightning_callback import LightningCallback as LightningCallback


def __getattr__(name: str) -> Any:
    """Each is imported when it is first used, with the library it is for."""
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit.integrations' has no attribute {name!r}")
    return getattr(import_module(f"lowbit.integrations.{_HOME[name]}"), name)
