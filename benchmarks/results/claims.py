"""The papers' claims, each held against the runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.results.cells import Figures
from benchmarks.results.experiments import PATHS, POSTPROCESSED, SYNONYMS, UNTRAINED
from benchmarks.results.statistics import Difference, difference, verdict
from benchmarks.results.tables import Found, averages, best_on_dev
from simcse_jax.reports.tables import markdown_table

Rows = Callable[[Found], list[Figures]]
Score = Callable[[list[Figures]], list[float]]


def transferred(rows: list[Figures]) -> list[float]:
    """The averages over the transfer tasks."""
    found = [row["transfer"]["Avg."] for row in rows if "transfer" in row]
    return [score for score in found if score is not None]


def last_on_dev(rows: list[Figures]) -> list[float]:
    """The scores on STS-B dev after the last step."""
    return [row["path"][-1][1] for row in rows if row.get("path") and row["path"][-1][1] is not None]


def first_on_dev(rows: list[Figures]) -> list[float]:
    """The scores on STS-B dev before training."""
    return [row["path"][0][1] for row in rows if row.get("path") and row["path"][0][1] is not None]


SCORES: dict[Score, str] = {
    averages: "seven tasks",
    best_on_dev: "STS-B dev, best",
    last_on_dev: "STS-B dev, last",
    transferred: "transfer tasks",
}


@dataclass(frozen=True)
class Claim:
    """That one mean lies above another.

    Attributes:
      words: the claim.
      paper: the paper's two figures; None where it gives none.
      above: the runs that the paper has above.
      below: the others.
      score: the figure of a run that is compared.
      other: that of the others, where it is not the same.
    """

    words: str
    paper: tuple[float, float] | None
    above: Rows
    below: Rows
    score: Score = best_on_dev
    other: Score | None = None


def row(name: str) -> Rows:
    """A row of the ladder."""
    return lambda found: found.row(name)


def best_of(names: list[str]) -> Rows:
    """The row that STS-B dev prefers, once all are measured."""

    def chosen(found: Found) -> list[Figures]:
        rows = [figures for name in names if (figures := found.row(name)) and figures[0].get("dev") is not None]
        return max(rows, key=lambda figures: float(figures[0]["dev"])) if len(rows) == len(names) else []

    return chosen


def variant(config: str, changes: dict[str, Any] | None = None, text: str = "wiki") -> Rows:
    """A variant of an ablation."""
    return lambda found: found.variant(config, changes or {}, text)


UNSUP, SUP = "unsup_bert_base", "sup_bert_base"
SIMCSE, MLM = "unsupervised SimCSE", "unsupervised SimCSE + MLM"
PLAIN, RUNNING = variant(UNSUP), variant(UNSUP, {}, "running")
SHARED = variant(UNSUP, PATHS["the same noise twice"])
CROP = {"data.augment": "crop", "data.augment_share": 0.1}
DELETION = {"data.augment": "delete_words", "data.augment_share": 0.1}
NO_HEAD = {"model.pooler": "cls_before_pooler", "model.mlp_only_train": False}
CLAIMS = (
    Claim(
        f"{SIMCSE} is above the best average without training",
        (76.25, 56.70),
        row(SIMCSE),
        best_of([*UNTRAINED]),
        averages,
    ),
    Claim(f"{SIMCSE} is above post-processing", (76.25, 66.55), row(SIMCSE), best_of([*POSTPROCESSED]), averages),
    Claim("IS-CSE, constant, is above SimCSE", (78.30, 76.25), row("IS-CSE, constant"), row(SIMCSE), averages),
    Claim("Supervised SimCSE is above unsupervised", (81.57, 76.25), row("supervised SimCSE"), row(SIMCSE), averages),
    Claim("Hard negatives help", (86.2, 84.9), variant(SUP), variant(SUP, {"data.columns": ("sent0", "sent1")})),
    Claim("A masked language model helps transfer", (86.64, 85.81), row(MLM), row(SIMCSE), transferred),
    Claim("Noise of its own is above the same noise twice", (82.5, 43.6), PLAIN, SHARED, last_on_dev),
    Claim("The same noise twice ends below where it began", None, SHARED, SHARED, first_on_dev, last_on_dev),
    Claim("Dropout is above none", (82.5, 71.1), PLAIN, variant(UNSUP, PATHS["no dropout"])),
    Claim("A dropout of 0.1 is above 0.01", (82.5, 72.6), PLAIN, variant(UNSUP, {"model.dropout": 0.01})),
    Claim("A dropout of 0.1 is above 0.5", (82.5, 71.0), PLAIN, variant(UNSUP, {"model.dropout": 0.5})),
    Claim("Dropout alone is above crop 10 %", (82.5, 77.8), PLAIN, variant(UNSUP, CROP)),
    Claim("Dropout alone is above word deletion 10 %", (82.5, 75.9), PLAIN, variant(UNSUP, DELETION)),
    Claim("Dropout alone is above synonyms", (82.5, 77.4), PLAIN, variant(UNSUP, SYNONYMS)),
    Claim(
        "The same sentence is above the next, in running text",
        (82.5, 67.1),
        RUNNING,
        variant(UNSUP, {"data.neighbours": 1}, "running"),
    ),
    Claim(
        "One encoder is above two, in running text",
        (82.5, 80.7),
        RUNNING,
        variant(UNSUP, {"model.encoders": 2}, "running"),
    ),
    Claim("A head in training only is above no head", (82.5, 80.9), PLAIN, variant(UNSUP, NO_HEAD)),
    Claim("A temperature of 0.05 is above 1", (86.2, 64.0), variant(SUP), variant(SUP, {"objective.temperature": 1.0})),
    Claim(
        "A temperature of 0.05 is above 0.001",
        (86.2, 84.9),
        variant(SUP),
        variant(SUP, {"objective.temperature": 0.001}),
    ),
    Claim("A masked language model costs STS", (86.2, 85.1), variant(SUP), variant(SUP, {"objective.mlm.weight": 1.0})),
)


def claims(found: Found) -> str:
    """The table of the claims: the papers' gaps, ours with their intervals, and whether they hold."""
    lines = []
    for claim in CLAIMS:
        sides = claim.above(found), claim.below(found)
        above, below = claim.score(sides[0]), (claim.other or claim.score)(sides[1])
        gap = "–" if claim.paper is None else f"{claim.paper[0] - claim.paper[1]:+.1f}"
        score = SCORES[claim.other or claim.score]
        if diverged := sum("diverged" in figures for side in sides for figures in side):
            lines.append([claim.words, score, gap, "–", "–", f"{diverged} runs diverged"])
        elif not above or not below:
            lines.append([claim.words, score, gap, "–", "–", "not measured yet"])
        else:
            apart = difference(above, below)
            lines.append([claim.words, score, gap, f"{apart.mean:+.2f}", _span(apart), _verdict(apart)])
    return markdown_table(["claim", "by", "paper", "here", "95 % interval", ""], lines)


def _span(apart: Difference) -> str:
    low, high = apart.interval()
    return "one seed" if low != low else f"{low:+.2f} to {high:+.2f}"  # NaN


def _verdict(apart: Difference) -> str:
    return "not decided: one seed" if apart.error != apart.error else verdict(apart)
