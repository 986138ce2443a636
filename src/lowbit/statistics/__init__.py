"""Statistics: what calibration gathers about a layer, streamed."""

from lowbit.statistics.gram import GramAccumulator, LayerStatistics, drift_target, output_energy, output_error

__all__ = ["GramAccumulator", "LayerStatistics", "drift_target", "output_energy", "output_error"]
