"""A model that is already in memory, read like one on disk: one tensor at a time, the model itself stays as it is."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ModelError
from lowbit.sources import skeleton


class ModuleSource:
    """The part of `ModelSource` that the walk over blocks needs, over a live transformers model."""

    kind = "module"

    def __init__(self, model: nn.Module) -> None:
        if any(p.is_meta for p in model.parameters()):
            raise ModelError("the model has parameters without memory (meta device): load its weights first.")
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.tied = skeleton.tied_names(model)
        self._tensors = {n: t for n, t in model.state_dict().items() if n not in self.tied}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get(self, name: str) -> Tensor:
        """A copy of one tensor, on the CPU."""
        return self._tensors[self.tied.get(name, name)].detach().to("cpu", copy=True)

    @property
    def nbytes_float(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def describe(self) -> str:
        return f"{type(self.model).__name__} in memory"

    def new_skeleton(self) -> nn.Module:
        """A copy of the model whose parameters have no memory, in eval mode."""
        meta: dict[int, Any] = {}
        for p in self.model.parameters():
            meta[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        return copy.deepcopy(self.model, meta).eval()
