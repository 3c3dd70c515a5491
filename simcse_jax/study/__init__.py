"""The batch-size study: one model over a grid of global batch × learning-rate rule × seed at a fixed budget."""

from simcse_jax.study.grid import Cell, Study

__all__ = ["Cell", "Study"]
