"""Ablations: the variants of a config by seeds."""

from simcse_jax.ablation.settings import Ablation

__all__ = ["Ablation"]
