"""Plans: a run's step compiled for devices that are not here."""

from simcse_jax.plan.plan import Plan, plan

__all__ = ["Plan", "plan"]
