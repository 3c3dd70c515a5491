"""Commands: `python -m benchmarks PART`, or `all`."""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.checkpoint import Checkpoint
from benchmarks.devices import FakeDevices
from benchmarks.encode import Encode
from benchmarks.input import Input
from benchmarks.loss import Loss
from benchmarks.report import Table, provenance, write
from benchmarks.start import Start
from benchmarks.step import Step
from benchmarks.sts import Sts
from simcse_jax.errors import InputError

Part = Step | Encode | Sts | Input | Start | FakeDevices | Checkpoint | Loss


@dataclass(frozen=True)
class All:
    """Every part with its defaults; a part that needs data which is not there is left out, and the results say so."""

    step: Step = field(default_factory=Step)


PARTS: dict[str, type] = {
    "step": Step,
    "encode": Encode,
    "sts": Sts,
    "input": Input,
    "start": Start,
    "devices": FakeDevices,
    "checkpoint": Checkpoint,
    "loss": Loss,
}
