"""Forward passes through a block that wait at each group of layers until it is solved.

True-sequential order: the inputs of a layer come from the already quantized layers before it. Doing that with plain
passes repeats the block's beginning for every group. Here each window's pass is a coroutine (greenlet) that pauses
where a group's first layer is about to run, so the whole block costs one pass. Memory: the live activations of all
windows at the pause. `recompute=True` keeps only the hidden states and repeats the beginnings instead; both give the
same numbers.
"""

from collections.abc import Iterator
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from lowbit.pipeline.blocks import Stop, run_block


class SequentialForwards:
    """Passes of all windows through one block, group by group.

    hidden: one (batch, tokens, width) tensor a window
    call:   (args, kwargs) of the block

        for leader in leaders:                      # the first layer of each group, in order
            for x in forwards.inputs(leader): ...   # then solve, and go on
        forwards.outputs()

    Use it inside torch.no_grad(): paused passes interleave, so each cannot switch gradients off and on for itself.
    """

    def __init__(
        self, block: nn.Module, hidden: list[Tensor], call: tuple[tuple, dict[str, Any]], recompute: bool = False
    ) -> None:
        self.block, self.hidden, self.call, self.recompute = block, hidden, call, recompute
        self.passes: list[greenlet] = []
        self.finished = False

    def inputs(self, leader: str, finish: bool = False) -> Iterator[Tensor]:
        """The input of `leader` for every window, computed with the weights as they are now.

        Exhaust it before the next call. finish: each pass then runs to its end at once instead of waiting (for weights
        that will not change), which frees what it held.
        """
        module = self.block.get_submodule(leader)
        if self.recompute:
            yield from self._recomputed(module)
            return
        if not self.passes:
            self.passes = [greenlet(self._pass) for _ in self.hidden]
        for i in range(len(self.passes)):
            handle = module.register_forward_pre_hook(_pause)
            try:
                x = self._resume(i)
            finally:
                handle.remove()
            yield x
            if finish:
                del x
                self.hidden[i] = self._resume(i)
        self.finished = finish

    def outputs(self) -> list[Tensor]:
        """The block's output for every window, computed with the weights as they are now.

        Replaces the hidden states one by one.
        """
        for i in range(0 if self.finished else len(self.hidden)):
            out = self._resume(i) if self.passes else self._pass(i)
            self.hidden[i] = out
        self.passes, self.finished = [], True
        return self.hidden

    def restart(self) -> None:
        """Forget the paused passes: outputs are computed from the beginning of the block."""
        self.passes, self.finished = [], False

    def _pass(self, i: int) -> Tensor:
        return run_block(self.block, self.hidden[i], *self.call)

    def _resume(self, i: int) -> Tensor:
        p = self.passes[i]
        return p.switch() if p else p.switch(i)

    def _recomputed(self, module: nn.Module) -> Iterator[Tensor]:
        for i in range(len(self.hidden)):
            handle = module.register_forward_pre_hook(_stop)
            try:
                self._pass(i)
                raise RuntimeError("a layer that was called before is not called now")
            except Stop as stop:
                x = stop.args[0]
            finally:
                handle.remove()
            yield x


def _pause(module: nn.Module, inputs: tuple) -> None:
    parent = getcurrent().parent
    assert parent is not None
    parent.switch(inputs[0])


def _stop(module: nn.Module, inputs: tuple) -> None:
    raise Stop(inputs[0])
