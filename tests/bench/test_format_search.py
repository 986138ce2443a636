"""Menus with and without float formats: budgets are kept, and a larger menu is no worse by its own table."""

import torch

from lowbit.allocate import find
from lowbit.bench.format_search import INTEGERS, MENUS, main, measured, probe_of, problem_of, rows
from lowbit.train.networks import resnet


def test_choices_keep_the_budget_and_more_formats_are_no_worse():
    torch.manual_seed(0)
    net, x = resnet(depth=8, width=4).eval().requires_grad_(False), torch.randn(8, 3, 16, 16)
    probe = probe_of(net, x)
    before = {n: w.clone() for n, w in probe.weights.items()}
    loss = find("kl").run(probe)
    best = {m: find("integer_program").run(problem_of(probe, loss, labels, 4)) for m, labels in MENUS.items()}
    assert best["integers and floats"].totals["loss"] <= best["integers"].totals["loss"] * (1 + 1e-6)
    found = rows(probe, probe, 4, 20, loss)
    assert [way for _, way, _, _ in found].count("FLIQS") == 2
    limit = found[0][3]
    for menu, _, choice, size in found:
        assert size <= limit and (menu != "integers" or choice.max() < len(INTEGERS))
        kl, right, floats = measured(net, probe, choice, x, torch.zeros(8))
        assert kl >= 0 and 0 <= right <= 1 and (floats == 0 or menu != "integers")
    assert all(torch.equal(w, before[n]) for n, w in probe.weights.items()), "the network is as it was"
    assert main(["nowhere.safetensors", "--data", "x"]) == 1
