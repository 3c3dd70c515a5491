"""Cells, what they are measured on, and their records."""

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from simcse_jax.errors import InputError, reason
from simcse_jax.runtime.provenance import provenance
from simcse_jax.storage.files import finite, write_json
from simcse_jax.storage.manifest import digest
from simcse_jax.storage.records import read_record

Figures = dict[str, Any]


class Stopped(Exception):
    """A signal ended a run, whose folder says where it goes on."""


@dataclass(frozen=True)
class Sources:
    """What cells are measured on: models, text and tasks."""

    model: Path
    """The encoder that was pretrained and never trained for similarity."""
    minilm: Path
    """all-MiniLM-L6-v2, for the comparison with PyTorch."""
    data: Path
    """Folder with wiki/, nli/ and senteval/."""
    runs: Path
    """Folder of the training runs."""
    synonyms: Path = Path("runs/models/synonyms.tsv")
    """Table of synonyms, see benchmarks/wordnet.py."""

    def digests(self) -> dict[str, str]:
        """Digests of the weights and of each text, of those that are there."""
        files = {"model": self.model / "model.safetensors", "minilm": self.minilm / "model.safetensors"}
        files |= self.texts | {"synonyms": self.synonyms}
        files["senteval"] = Path(self.senteval, "STS", "STSBenchmark", "sts-test.csv")
        return {name: digest(file) for name, file in files.items() if file.is_file()}

    @property
    def senteval(self) -> str:
        """The tasks."""
        return str(self.data / "senteval")

    @property
    def texts(self) -> dict[str, Path]:
        """Training text by name: sentences, running text, triplets."""
        wiki = self.data / "wiki"
        triplets = self.data / "nli" / "nli_triplets_small.csv"
        return {"wiki": wiki / "wiki_en_1m.txt.gz", "running": wiki / "wiki_docs.txt.gz", "nli": triplets}


@dataclass(frozen=True)
class Cell:
    """A measurement.

    Attributes:
      name: name of its record: the experiment, and what is measured.
      settings: plain JSON values that its figures follow from.
      measure: measures it, in a folder of its own; raises `Stopped` where a signal ended it.
      steps: what it costs, in steps of the unsupervised model.
      needs: the file among `Sources` without which it is left out; empty for a cell that needs no such file.
    """

    name: str
    settings: dict[str, Any]
    measure: Callable[[dict[str, Any], Sources, Path], Figures]
    steps: float
    needs: str = ""

    @property
    def folder(self) -> str:
        """Name of its folder, which runs of other settings do not have."""
        return f"{self.name}-{xxhash.xxh3_64(json.dumps(self.settings).encode()).hexdigest()[:8]}"

    @property
    def experiment(self) -> str:
        """The experiment that it belongs to."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Records:
    """The records of the cells, one .json file each."""

    folder: Path

    def read(self, cell: Cell) -> Figures | None:
        """The figures of a cell; None where it is not measured yet.

        Raises:
          InputError: its record is damaged, or of other settings.
        """
        found = self._record(cell)
        return None if found is None else dict(found["figures"])

    def made(self, cell: Cell) -> dict[str, Any]:
        """Date, machine, versions and seconds of a cell's measurement; {} where it is not measured yet."""
        found = self._record(cell)
        return {} if found is None else dict(found["made"])

    def write(self, cell: Cell, figures: Figures, seconds: float) -> None:
        """Keeps the figures of a cell."""
        file = self._file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {name: x for name, x in provenance().items() if name not in ("driver", "processes", "settings")}
        made = {"date": datetime.date.today().isoformat(), "seconds": round(seconds, 1), **about}
        write_json(file, finite({"settings": cell.settings, "figures": figures, "made": made}))

    def check_sources(self, sources: Sources) -> None:
        """Raises `InputError` if earlier records are of other weights or text; notes those of the first."""
        file, now = self.folder / "sources.json", sources.digests()
        before = dict(read_record(file)) if file.is_file() else {}
        if other := [name for name in before if name in now and before[name] != now[name]]:
            raise InputError(
                f"{self.folder} was measured on other content of {', '.join(other)} than there is now: restore it, or "
                "give another --output"
            )
        if before | now != before:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, dict(sorted((before | now).items())))

    def _file(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def _record(self, cell: Cell) -> dict[str, Any] | None:
        file = self._file(cell)
        if not file.is_file():
            return None
        try:
            found = dict(read_record(file))
            settings, _, _ = dict(found["settings"]), dict(found["figures"]), dict(found["made"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{file} is damaged ({reason(error)}): restore it, or remove it to measure again"
            ) from error
        names = sorted(n for n in {*settings, *cell.settings} if settings.get(n) != cell.settings.get(n))
        if names:
            shown = "; ".join(f"{n} was {settings.get(n)!r}, is {cell.settings.get(n)!r}" for n in names)
            raise InputError(
                f"{file} was measured with other settings ({shown}): give another --output, or remove it to measure "
                "again"
            )
        return found
