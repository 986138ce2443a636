"""Measuring a model: perplexity, agreement with the original, accuracy, speed, memory, size on disk.

Everything here returns numbers and prints none; long work takes a progress(done, total) callback.
"""

from lowbit.evaluate.accuracy import AccuracyResult, accuracy
from lowbit.evaluate.compare import CompareResult, compare
from lowbit.evaluate.masked import pseudo_perplexity
from lowbit.evaluate.perplexity import PerplexityResult, perplexity
from lowbit.evaluate.speed import (
    LatencyResult,
    PeakMemory,
    folder_bytes,
    latency,
    peak_memory_bytes,
    resident_memory_bytes,
)
from lowbit.evaluate.windows import plan_windows, tokenize

__all__ = [
    "AccuracyResult",
    "CompareResult",
    "LatencyResult",
    "PeakMemory",
    "PerplexityResult",
    "accuracy",
    "compare",
    "folder_bytes",
    "latency",
    "peak_memory_bytes",
    "perplexity",
    "plan_windows",
    "pseudo_perplexity",
    "resident_memory_bytes",
    "tokenize",
]
