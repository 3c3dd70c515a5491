"""`simcse-jax plan`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from simcse_jax.commands.options import Configured
from simcse_jax.config import Config
from simcse_jax.config.load import load_config_file
from simcse_jax.errors import InputError
from simcse_jax.storage.files import check_writable_file, writing


@dataclass(frozen=True)
class PlanConfig(Config):
    """The run to plan, with one global batch or several."""

    batch_size: tuple[int, ...] = (64,)  # type: ignore[assignment]
    """Sentences (or pairs, or triplets) per step over all devices; one plan per size given."""

    @classmethod
    def of(cls, config: Config) -> "PlanConfig":
        """The same run."""
        return cls(**{**vars(config), "batch_size": (config.batch_size,)})

    def each(self) -> list[Config]:
        """One run per global batch."""
        return [
            Config(**{**{f.name: getattr(self, f.name) for f in fields(self)}, "batch_size": n})
            for n in self.batch_size
        ]


@dataclass(frozen=True)
class PlanCommand(Configured):
    """Compile a run's train step for devices that are not here: memory, collectives, FLOPs, and what they allow."""

    config_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Python file that defines `config`, or the name of a config that comes with the package."""
    topology: tuple[str, ...] = ()
    """TPU slices (v5e:16x16, v4:4x4x4), several alike (2xv5e:16x16), GPUs (h200:8 is one node, h200:4x8 four nodes of
    8) or cpu:8."""
    columns: int | None = None
    """Sentences per example; by default the number of data.columns, or 1 for .txt files."""
    json: Path | None = None
    """Write all figures to this file."""
    config: Annotated[PlanConfig, tyro.conf.arg(name="")] = field(default_factory=PlanConfig)

    keeps_programs = False  # because the plan says how long compiling takes

    @classmethod
    def from_file(cls, file: str) -> "PlanCommand":
        """The command with the settings of a config file."""
        return cls(file, config=PlanConfig.of(load_config_file(file)))

    def run(self) -> None:
        """Prints the table."""
        from simcse_jax.plan.plan import check_plan, plan
        from simcse_jax.plan.table import format_plans
        from simcse_jax.reports.progress import note
        from simcse_jax.storage.files import write_json
        from simcse_jax.xla.topology import parse_topology, prepare_process

        if not self.topology or not self.config.batch_size:
            raise InputError(
                "nothing to plan for: name devices with --topology, e.g. v5e:16x16 h200:8, and a --batch-size"
            )
        if self.json:
            check_writable_file(self.json)
        prepare_process([parse_topology(name) for name in self.topology])
        for name in self.topology:
            for config in self.config.each():
                check_plan(config, name, self.columns)  # before minutes of compiling are spent on another
        plans = []
        for name in self.topology:
            for config in self.config.each():
                note(f"compiling for {name}, batch {config.batch_size:,}")
                plans.append(plan(config, name, self.columns))
                note(f"compiled in {plans[-1].compile_seconds:.1f} s")
        if self.json:
            with writing(self.json):
                write_json(self.json, {"plans": [p.to_dict() for p in plans]})
        print(format_plans(plans))
