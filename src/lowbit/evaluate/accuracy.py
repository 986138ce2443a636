"""Accuracy of a classifier: the share of samples whose largest output is the right class."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowbit.errors import DataError, ModelError, RecipeError
from lowbit.evaluate._model import Progress, device_of, measuring


@dataclass(frozen=True)
class AccuracyResult:
    accuracy: float  # 0 to 1
    stderr: float  # sqrt(a (1 - a) / n)
    correct: int
    samples: int
    seconds: float
    samples_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def accuracy(
    model: Any, data: Any, targets: Tensor | None = None, batch: int = 256, progress: Progress | None = None
) -> AccuracyResult:
    """Top-1 accuracy of `model`, a callable from inputs (n, ...) to scores (n, classes).

    data:     inputs (n, ...) together with targets (n,); or a torch Dataset of (input, class) pairs; or any iterable
              of ready batches (inputs, targets), such as a DataLoader, whose own batch size then counts.
    progress: called as progress(samples done, samples in all, or -1 where the iterable does not say).

    Of equal scores the first class counts. Raises DataError for data of no samples or unequal lengths, ModelError for
    NaN scores. The model keeps its train/eval mode.
    """
    if batch < 1:
        raise RecipeError(f"batch={batch} measures nothing. Try batch=256.")
    total = _total(data)
    device, correct, samples = device_of(model), 0, 0
    started = time.perf_counter()
    with measuring(model):
        for x, y in _batches(data, targets, batch):
            correct += _correct(model(x.to(device)), y.to(device))
            samples += len(y)
            if progress is not None:
                progress(samples, total)
    seconds = time.perf_counter() - started
    if samples == 0:
        raise DataError("the data has 0 samples: there is nothing to classify. Give at least one batch.")
    share = correct / samples
    return AccuracyResult(
        share, math.sqrt(share * (1 - share) / samples), correct, samples, seconds, samples / max(seconds, 1e-9)
    )


def _correct(out: Any, y: Tensor) -> int:
    scores = getattr(out, "logits", out)
    if scores.ndim != 2 or len(scores) != len(y):
        raise ModelError(
            f"a classifier returns scores (samples, classes); got {tuple(scores.shape)} for {len(y)} samples."
        )
    if scores.isnan().any():
        raise ModelError("the classifier returned NaN scores. Check its weights (lowbit inspect).")
    return int((scores.argmax(1) == y).sum())


def _total(data: Any) -> int:
    sized = data.dataset if isinstance(data, DataLoader) else data
    return len(sized) if isinstance(sized, Tensor | Dataset) and hasattr(sized, "__len__") else -1


def _batches(data: Any, targets: Tensor | None, batch: int) -> Iterator[tuple[Tensor, Tensor]] | Iterable[Any]:
    if isinstance(data, Tensor):
        if targets is None or len(targets) != len(data):
            given = "none" if targets is None else str(len(targets))
            raise DataError(f"{len(data)} inputs need as many targets; got {given}. Give targets= of the same length.")
        return zip(data.split(batch), targets.split(batch), strict=True)
    return DataLoader(data, batch_size=batch) if isinstance(data, Dataset) else data
