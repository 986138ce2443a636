"""The thread pool: every item once, whoever calls, however many at a time."""

import threading

import numpy as np
import torch

from lowbit.runtime import kernels
from tests.kernels.reference import problem


def test_many_short_jobs_from_several_callers_give_one_result() -> None:
    """Callers that find the pool busy compute alone; late workers must not touch the next job."""
    p = problem(4, 3, 200, 192, 3)
    want = kernels.linear_float(*p.float_args).numpy()
    wrong: list[int] = []
    isa = kernels.active_isa()

    def caller() -> None:
        for i in range(300):
            y = torch.full((3, 200), float("nan"))
            kernels._extension().linear_float(*(a.numpy() for a in p.float_args[:5]), p.bits, y.numpy(), 4, isa)
            if not np.array_equal(y.numpy(), want):
                wrong.append(i)

    callers = [threading.Thread(target=caller) for _ in range(3)]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    assert not wrong
