"""Studies: a grid of global batch × learning-rate rule × seed × any other settings, at a fixed budget."""

from simcse_jax.study.grid import Cell, Study

__all__ = ["Cell", "Study"]
