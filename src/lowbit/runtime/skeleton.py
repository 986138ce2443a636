"""A model's architecture without its weights: parameters on the meta device, buffers real.

Building under `torch.device("meta")` would leave the rotary tables and masks (buffers that no file stores) without
values. Here only weights are kept off memory: `torch.empty` makes meta tensors, and any parameter made another way
moves to meta as it is registered. Everything else (arange, full, ...) is computed for real, so those buffers are right.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit.errors import ModelError


class _EmptyIsMeta(TorchFunctionMode):
    """torch.empty without a device gives a tensor without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _parameter_to_meta(module: nn.Module, name: str, param: "nn.Parameter | None") -> "nn.Parameter | None":
    if param is None or param.is_meta:  # a meta parameter stays the same object: that is what tying means
        return param
    return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside own parameters on meta and buffers in memory. Not for use from several threads at once."""
    register = nn.modules.module.register_module_parameter_registration_hook
    hook = register(_parameter_to_meta)  # type: ignore[arg-type]
    try:
        with _EmptyIsMeta():
            yield
    finally:
        hook.remove()


def new_skeleton(config: Any, auto: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Instantiate a transformers model without weight memory, in eval mode, ties made.

    auto:  a model class, or an Auto class such as `AutoModelForMaskedLM`
    dtype: floating type of parameters and buffers; weights assigned later bring their own

    Raises ModelError for an architecture whose buffers depend on its weights.
    """
    build = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    with without_weights():
        model = build(copy.deepcopy(config), **{dtype_word(): dtype})
    model.tie_weights()
    bare = [name for name, b in model.named_buffers() if b.is_meta]
    if bare:
        raise ModelError(
            f"{type(model).__name__}: buffer {bare[0]} has no value before weights are read; "
            "this architecture cannot be built without its weights yet."
        )
    return model.eval()


def dtype_word() -> str:
    """`dtype`, or `torch_dtype` before transformers 4.56."""
    from transformers import PretrainedConfig

    return "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"


def names_by_tensor(model: nn.Module) -> list[list[str]]:
    """State-dict names, those of one shared parameter or buffer together, in state-dict order."""
    groups: dict[int, list[str]] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(t), []).append(name)
    return list(groups.values())


def put(model: nn.Module, name: str, tensor: "Tensor | nn.Parameter") -> None:
    """Assign a parameter or buffer under its state-dict name, without a copy."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    (module._buffers if leaf in module._buffers else module._parameters)[leaf] = tensor  # type: ignore[index,assignment]
