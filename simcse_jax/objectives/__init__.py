"""Objectives: functions of arrays of the global batch, unaware of models and data. docs/objectives.md shows how to add
one."""

from simcse_jax.objectives.contrast import Contrast, contrast
from simcse_jax.objectives.find import check_objective, check_options, find_loss, wants_clean
from simcse_jax.objectives.info_nce import info_nce
from simcse_jax.objectives.negatives import Earlier, Marks
from simcse_jax.objectives.pairs import Pairs, PairStatistics, dense
from simcse_jax.objectives.tiled import tiled
from simcse_jax.objectives.vectors import cosines, moderate, unit

__all__ = [
    "Contrast",
    "Earlier",
    "Marks",
    "PairStatistics",
    "Pairs",
    "check_objective",
    "check_options",
    "contrast",
    "cosines",
    "dense",
    "find_loss",
    "info_nce",
    "moderate",
    "tiled",
    "unit",
    "wants_clean",
]
