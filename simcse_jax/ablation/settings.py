"""An ablation: the variants of a config, by seeds."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro

from simcse_jax.config import Config
from simcse_jax.config.values import with_settings
from simcse_jax.errors import InputError, did_you_mean
from simcse_jax.storage.files import local_only


@dataclass(frozen=True)
class Ablation:
    """Runs that differ from one config in a few named settings."""

    base: Config = field(default_factory=Config)
    """Config of all runs; the ablation sets its output and seed."""
    variants: Annotated[dict[str, dict[str, Any]], tyro.conf.Suppress] = field(default_factory=dict)
    """For each variant by name, the settings that it changes, e.g. {"model.dropout": 0.0}."""
    paper: Annotated[dict[str, float], tyro.conf.Suppress] = field(default_factory=dict)
    """Scores that the paper reports, by variant."""
    output: str = "runs/ablation"
    """Folder of the runs, <variant>/seed<seed>, and of the table of all that are done. These are not done again."""
    only: tuple[str, ...] = ()
    """Variants to run; all where empty."""
    seeds: tuple[int, ...] = (42,)
    """Seeds; each variant is trained once with each."""

    def chosen(self) -> dict[str, dict[str, Any]]:
        """The variants to run.

        Raises:
          InputError: an unknown variant, or a setting that a config does not have.
        """
        if unknown := [name for name in self.only if name not in self.variants]:
            guess = did_you_mean(unknown[0], self.variants)
            raise InputError(f"no variant {', '.join(unknown)}: {guess}there are {', '.join(self.variants)}")
        if not self.seeds or not self.variants or len(set(self.seeds)) < len(self.seeds):
            raise InputError(
                f"seeds is {list(self.seeds)}, variants are {len(self.variants)}: give one or more, each once"
            )
        return {name: self.variants[name] for name in self.only or self.variants}

    def config(self, name: str, seed: int) -> Config:
        """The run of a variant and seed."""
        config: Config = with_settings(self.base, self.variants[name])
        return replace(config, seed=seed, output=str(local_only(self.output) / name / f"seed{seed}"))
