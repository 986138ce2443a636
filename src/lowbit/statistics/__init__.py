"""Statistics: what calibration gathers about a layer, streamed."""

from lowbit.statistics.gram import GramAccumulator, LayerStatistics, output_energy, output_error

__all__ = ["GramAccumulator", "LayerStatistics", "output_energy", "output_error"]
