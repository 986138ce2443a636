"""Statistics: what calibration gathers about a layer, streamed."""

from lowbit.statistics.gram import GramAccumulator, LayerStatistics, drift_target, output_energy, output_error
from lowbit.statistics.output import KINDS, OutputAccumulator

__all__ = [
    "KINDS",
    "GramAccumulator",
    "LayerStatistics",
    "OutputAccumulator",
    "drift_target",
    "output_energy",
    "output_error",
]
