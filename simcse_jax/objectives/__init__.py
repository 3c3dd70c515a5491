"""Objectives: functions of arrays of the global batch, unaware of models and data."""

from simcse_jax.objectives.info_nce import info_nce, unit
from simcse_jax.objectives.pairs import Pairs, PairStatistics, dense
from simcse_jax.objectives.tiled import tiled

__all__ = ["PairStatistics", "Pairs", "dense", "info_nce", "tiled", "unit"]
