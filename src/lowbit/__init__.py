"""lowbit trains, compresses and runs neural networks at 1 to 8 bits per weight.

    model = lowbit.compress(model, "gptq", bits=3, group=64, data=texts)
    lowbit.save(model, "out/", tokenizer=tokenizer);  model = lowbit.load("out/")

    lowbit.prepare(net, "binary");  ...train...;  lowbit.pack(net)
    lowbit.bits_per_weight(net);  lowbit.summary(net)

Importing it is quick: torch comes with the first name that is used, transformers with the first model. It also makes
artifacts known to transformers, so that `AutoModelForCausalLM.from_pretrained(OUT)` works from then on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit._hook import after_import

__version__ = "0.1.0"

_HOME = {
    "compress": "lowbit.api",
    "prepare": "lowbit.api",
    "step": "lowbit.api",
    "penalty": "lowbit.api",
    "pack": "lowbit.api",
    "bits_per_weight": "lowbit.api",
    "summary": "lowbit.api",
    "save": "lowbit.runtime.artifact",
    "load": "lowbit.runtime.artifact",
    "verify_artifact": "lowbit.runtime.artifact",
    "add_penalty_gradients": "lowbit.training",
    "ProxConnect": "lowbit.training",
    "Format": "lowbit.formats",
    "QuantizedTensor": "lowbit.formats",
    "quantize": "lowbit.formats",
    "LowbitError": "lowbit.errors",
}

_ROOMS = ("diagnose", "integrations", "train")  # lowbit.diagnose.Recorder, lowbit.train.run

__all__ = list(_HOME) + list(_ROOMS)

if TYPE_CHECKING:
    from lowbit import diagnose as diagnose
    from lowbit import integrations as integrations
    from lowbit import train as train
    from lowbit.errors import LowbitError as LowbitError
    from lowbit.formats import Format as Format
    from lowbit.formats import QuantizedTensor as QuantizedTensor
    from lowbit.formats import quantize as quantize
    from lowbit.runtime.artifact import load as load
    from lowbit.runtime.artifact import save as save
    from lowbit.runtime.artifact import verify_artifact as verify_artifact


def __getattr__(name: str) -> Any:
    """The public names, each imported when it is first used."""
    if name in _ROOMS:
        return import_module(f"lowbit.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_with_transformers() -> None:
    from lowbit.runtime.hf import register

    register()


after_import("transformers.quantizers.auto", _register_with_transformers)
