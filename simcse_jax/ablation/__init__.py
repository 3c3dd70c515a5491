"""Ablations: the variants of a config, each trained with several seeds."""

from simcse_jax.ablation.settings import Ablation

__all__ = ["Ablation"]
