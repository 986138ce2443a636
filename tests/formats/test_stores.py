"""How scales are kept: what is loaded is what codes were chosen for, and storing it again changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats.stores import (
    SCALE_DTYPES,
    double_scale,
    load_scale,
    power_of_two,
    round_scale,
    scale_specs,
    store_scale,
)


def values(dtype: str, scale: torch.Tensor) -> torch.Tensor:
    return double_scale(scale) if dtype == "double" else round_scale(scale, dtype)


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@settings(max_examples=15)
@given(st.lists(st.floats(0, 6e4, width=32), min_size=1, max_size=9))
def test_storing_is_idempotent_and_loads_what_was_promised(dtype: str, numbers: list[float]) -> None:
    scale = torch.tensor(numbers)[:, None]
    promised = values(dtype, scale)
    stored = store_scale(promised, dtype)
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == scale_specs((len(numbers), 1), dtype)
    assert torch.equal(load_scale(stored, dtype), promised)
    assert torch.equal(values(dtype, promised), promised)
    assert bool((promised[scale > 0] > 0).all())  # no positive scale is lost
    if dtype != "e8m0":
        assert bool((promised[scale == 0] == 0).all())


def test_double_of_many_blocks() -> None:
    scale = (torch.rand(40, 15) * 0.1 + 1e-3) * torch.rand(40, 1)
    stored = store_scale(scale, "double")
    loaded = load_scale(stored, "double")
    step = stored["scale_step"].repeat_interleave(256)[:600].reshape(40, 15)
    assert stored["scale"].dtype == torch.uint8 and stored["scale_step"].shape == (3,)
    assert ((loaded - scale).abs() <= torch.maximum(step * 0.5001, step - scale)).all()
    assert torch.equal(double_scale(loaded), loaded)
    assert torch.equal(double_scale(torch.zeros(3, 2)), torch.zeros(3, 2))
    assert store_scale(torch.zeros(0, 4), "double")["scale_step"].shape == (0,)


def test_double_does_not_lose_tiny_scales() -> None:
    scale = torch.tensor([[1e-38, 1e-42, 0.0]])
    loaded = double_scale(scale)
    assert bool((loaded[0, :2] > 0).all()) and float(loaded[0, 2]) == 0 and torch.equal(double_scale(loaded), loaded)


def test_e8m0_is_the_ocp_scale() -> None:
    stored = store_scale(torch.tensor([1.0, 2.0**-127, 2.0**127, 0.0, 2.0**-140]), "e8m0")["scale"]
    assert stored.tolist() == [127, 0, 254, 0, 0]
    assert load_scale({"scale": stored}, "e8m0").tolist() == [1.0, 2.0**-127, 2.0**127, 2.0**-127, 2.0**-127]
    codes = torch.arange(255, dtype=torch.uint8)
    every = load_scale({"scale": codes}, "e8m0")
    assert every.tolist() == [2.0 ** (c - 127) for c in range(255)]
    assert torch.equal(store_scale(every, "e8m0")["scale"], codes)
    assert load_scale({"scale": torch.tensor([255], dtype=torch.uint8)}, "e8m0").isnan().all()
    assert power_of_two(torch.tensor([-200, -127, 0, 127, 200])).tolist() == [
        2.0**-127,
        2.0**-127,
        1,
        2.0**127,
        2.0**127,
    ]


def test_e8m0_rounds_in_the_logarithm_or_up() -> None:
    scale = torch.tensor([1.0, 1.41, 1.42, 2.0, 2.0001, 2.0**20 * (1 - 2.0**-24)])
    assert round_scale(scale, "e8m0").tolist() == [1, 1, 2, 2, 2, 2.0**20]
    assert round_scale(scale, "e8m0", up=True).tolist() == [1, 2, 2, 2, 4, 2.0**20]


def test_rounding_of_the_plain_kinds() -> None:
    third = torch.tensor([1 / 3])
    assert torch.equal(round_scale(third, "fp16"), third.half().float())
    assert torch.equal(round_scale(third, "bf16"), third.bfloat16().float())
    assert torch.equal(round_scale(third, "fp32"), third)
    tiny = torch.tensor([1e-44])
    assert round_scale(tiny, "fp16").item() == 2.0**-24 and round_scale(tiny, "bf16").item() == 2.0**-133
    assert round_scale(tiny, "fp32").item() == tiny.item()


def test_a_scale_too_large_says_what_to_use() -> None:
    with pytest.raises(FormatError, match="a scale of 7e\\+04 does not fit fp16. Use scale_dtype bf16 or fp32"):
        round_scale(torch.tensor([7e4]), "fp16")
    assert round_scale(torch.tensor([7e4]), "bf16").item() == pytest.approx(7e4, rel=2**-8)
