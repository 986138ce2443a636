"""Corrupted images: worse with severity, the same every time, and the JPEG ones as an encoder makes them."""

import io

import pytest
import torch

from lowbit.errors import RecipeError
from lowbit.train.corruptions import KINDS, corrupt


def photo(n: int = 8, size: int = 32) -> torch.Tensor:
    """Smooth images with edges, (n, size, size, 3) uint8."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 5, 5, generator=draw)
    x = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    x[:, :, 8:20, 10:22] = 1 - x[:, :, 8:20, 10:22]
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_worse_with_severity_and_the_same_twice(kind: str) -> None:
    x = photo()
    out = [corrupt(x, kind, s) for s in range(1, 6)]
    assert all(o.shape == x.shape and o.dtype == torch.uint8 for o in out)
    sizes = [change(o, x) for o in out]
    assert 1 < sizes[0] < sizes[-1] and (sizes == sorted(sizes) or kind == "pixelate")  # where edges lie on its grid
    assert torch.equal(corrupt(x, kind, 3), out[2])


def test_noise_has_the_stated_spread_and_blur_keeps_the_mean() -> None:
    gray = torch.full((4, 32, 32, 3), 128, dtype=torch.uint8)
    assert change(corrupt(gray, "noise", 5), gray) == pytest.approx(0.10 * 255, rel=0.03)
    assert corrupt(gray, "impulse", 5).ne(128).float().mean() == pytest.approx(0.07, abs=0.01)
    for kind in ("blur", "motion", "contrast", "pixelate", "jpeg"):
        assert torch.equal(corrupt(gray, kind, 5), gray), kind


def test_jpeg_is_what_an_encoder_makes() -> None:
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    x = photo()
    coded = []
    for one in x:
        file = io.BytesIO()
        image.fromarray(one.numpy()).save(file, "JPEG", quality=40, subsampling=0)
        coded.append(torch.from_numpy(numpy.array(image.open(file))))
    theirs = torch.stack(coded)
    assert change(corrupt(x, "jpeg", 5), theirs) < 0.4 * change(theirs, x)


def test_sizes_that_are_no_multiple_of_eight() -> None:
    x = photo(2, 28)[:, :27]
    for kind in KINDS:
        assert corrupt(x, kind, 2).shape == x.shape


def test_unknown_kinds_and_severities() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'contrast'"):
        corrupt(photo(1), "contrst", 1)
    with pytest.raises(RecipeError, match="severity 6 is not between 1 and 5"):
        corrupt(photo(1), "jpeg", 6)
