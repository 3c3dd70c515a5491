"""Training objectives: functions of arrays of the global batch."""

from simcse_jax.objectives.info_nce import info_nce, unit

__all__ = ["info_nce", "unit"]
