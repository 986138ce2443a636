"""Attach, train, pack: a network of your own whose weights become fewer bits while it learns.

    lowbit.prepare(net, "ternary")            weights are rounded in the forward pass; train with your own loop
    loss = task_loss + lowbit.penalty(net)    only for methods with a regularizer
    lowbit.step(net, position)                after every optimizer step; only for methods with a schedule
    net = lowbit.pack(net)                    packed layers; the float weights are gone
    lowbit.bits_per_weight(net); print(lowbit.summary(net))

The first convolution and the last linear layer keep their precision (they hold few weights and cost most accuracy), as
do biases and normalizations. Packing changes no value: the packed network computes what the trained one did in
evaluation mode, up to the order of float sums.
"""

from lowbit.training.attach import input_functions, latent_of, prepare, weight_functions
from lowbit.training.choices import Choices, read_choices
from lowbit.training.packing import pack
from lowbit.training.proxconnect import ProxConnect
from lowbit.training.run import add_penalty_gradients, penalty, step
from lowbit.training.sizes import Summary, bits_per_weight, summary

__all__ = [
    "Choices",
    "ProxConnect",
    "Summary",
    "add_penalty_gradients",
    "bits_per_weight",
    "input_functions",
    "latent_of",
    "pack",
    "penalty",
    "prepare",
    "read_choices",
    "step",
    "summary",
    "weight_functions",
]
