"""Commands: `python -m benchmarks PART`, or `all`."""

import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import jax
import tyro
from tyro.conf import subcommand

from benchmarks.attention import Attention
from benchmarks.checkpoint import Checkpoint
from benchmarks.compare import Disagreement
from benchmarks.devices import Devices
from benchmarks.encode import Encode
from benchmarks.hostile import Hostile
from benchmarks.input import Input
from benchmarks.loss import Loss
from benchmarks.negatives import Negatives
from benchmarks.noise import Noise
from benchmarks.profile import Profile
from benchmarks.report import Table, provenance, status_of, write
from benchmarks.serve import Serve
from benchmarks.start import Start
from benchmarks.step import Step
from benchmarks.sts import Sts
from simcse_jax.errors import InputError

Alone = Attention | Negatives | Noise
"""Parts that need no peer installed."""
Part = Alone | Step | Encode | Sts | Input | Start | Devices | Checkpoint | Loss | Serve | Hostile | Profile


@dataclass(frozen=True)
class All:
    """Every part that has a peer; parts whose data is missing are left out, and the results say so."""

    step: Step = field(default_factory=Step)
    step_wiki: Step = field(default_factory=lambda: Step(lengths="wiki"))
    step_sts: Step = field(default_factory=lambda: Step(lengths="sts"))
    encode: Encode = field(default_factory=Encode)
    sts: Sts = field(default_factory=Sts)
    loss: Loss = field(default_factory=Loss)
    input: Input = field(default_factory=Input)
    start: Start = field(default_factory=Start)
    devices: Devices = field(default_factory=Devices)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    profile: Profile = field(default_factory=Profile)

    def parts(self, quick: bool) -> dict[str, Part]:
        """The parts by name; a rehearsal has one kind of step only."""
        names = [f.name for f in fields(self) if not (quick and f.name in ("step_wiki", "step_sts"))]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Command:
    """Compare this project with its peers on the same work, in one run, called in turn. Nothing is timed before all
    sides have computed the same."""

    part: (
        Annotated[All, subcommand("all")]
        | Annotated[Step, subcommand("step")]
        | Annotated[Encode, subcommand("encode")]
        | Annotated[Attention, subcommand("attention")]
        | Annotated[Sts, subcommand("sts")]
        | Annotated[Loss, subcommand("loss")]
        | Annotated[Negatives, subcommand("negatives")]
        | Annotated[Input, subcommand("input")]
        | Annotated[Start, subcommand("start")]
        | Annotated[Devices, subcommand("devices")]
        | Annotated[Checkpoint, subcommand("checkpoint")]
        | Annotated[Noise, subcommand("noise")]
        | Annotated[Serve, subcommand("serve")]
        | Annotated[Hostile, subcommand("hostile")]
        | Annotated[Profile, subcommand("profile")]
    )
    output: Path = Path("runs/benchmarks/results")
    """Results go to OUTPUT.md and OUTPUT.json, written anew after each part."""
    quick: bool = False
    """Rehearse at tiny sizes; the figures say nothing."""

    def run(self) -> None:
        """Measures and writes.

        Raises:
          Disagreement: two sides computed different things; with `all`, raised after the other parts.
        """
        if not isinstance(self.part, Alone):
            check_peers()
        jax.config.update("jax_platforms", "cpu")  # accelerators are for the measured processes
        whole = self.part if isinstance(self.part, All) else None
        parts = whole.parts(self.quick) if whole else {type(self.part).__name__.lower(): self.part}
        about = provenance()
        if about["load"][0] > 0.5 and not self.quick:
            print(f"other work is going on (load {about['load'][0]}): these figures will include it", file=sys.stderr)
        tables: list[Table] = []
        skipped: dict[str, str] = {}
        disagreements: list[str] = []
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            if self.quick:  # otherwise a rehearsal spends most of its time compiling the same small programs
                os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
                os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
            for name, part in parts.items():
                assert not isinstance(part, All)
                try:
                    found = (part.quick() if self.quick else part).run(Path(folder))
                except (InputError, Disagreement) as error:
                    if whole is None:
                        raise
                    found, skipped[name] = [], str(error)
                    if isinstance(error, Disagreement):
                        disagreements.append(f"{name}: {error}")
                    print(f"{name}: no figures, {error}", file=sys.stderr, flush=True)
                tables += found
                print("".join(f"{table.markdown()}\n\n" for table in found), end="", flush=True)
                write(self.output, about, tables, skipped)
        print(f"written: {self.output}.md and {self.output}.json")
        if disagreements:
            raise Disagreement("; ".join(disagreements))


def check_peers() -> None:
    """Raises `InputError` if a peer is not installed."""
    absent = [name for name in ("torch", "sentence_transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(f"{' and '.join(absent)} cannot be imported: install the peers with pip install '.[torch]'")


def parse(arguments: list[str] | None = None) -> Command:
    """The command that the arguments name, ready to `run`."""
    settings = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
    return tyro.cli(Command, prog="python -m benchmarks", args=arguments, config=settings)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns 1 if the input cannot be used."""
    return status_of(parse(arguments).run)


if __name__ == "__main__":
    sys.exit(main())
