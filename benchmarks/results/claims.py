"""The papers' claims, each held against the runs."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.results.experiments import POSTPROCESSED, SYNONYMS, UNTRAINED
from benchmarks.results.statistics import Difference, difference, verdict
from benchmarks.results.tables import Found, averages, best_on_dev
from simcse_jax.reports.tables import markdown_table

Values = Callable[[Found], list[float]]


@dataclass(frozen=True)
class Claim:
    """That one mean lies above another.

    Attributes:
      words: the claim.
      paper: the paper's two figures.
      above: figures of the side that the paper has above.
      below: figures of the other side.
    """

    words: str
    paper: tuple[float, float]
    above: Values
    below: Values


def row(name: str) -> Values:
    """Averages over the seven tasks of a row of the ladder."""
    return lambda found: averages(found.row(name))


def best_of(names: list[str]) -> Values:
    """The average over the seven tasks of the row that STS-B dev prefers."""

    def chosen(found: Found) -> list[float]:
        rows = {name: found.row(name) for name in names}
        measured = {name: rows[name] for name in names if rows[name]}
        if len(measured) < len(names):
            return []
        return averages(max(measured.values(), key=lambda figures: figures[0]["dev"]))

    return chosen


def transferred(name: str) -> Values:
    """The average over the transfer tasks of a row of the ladder."""
    return lambda found: [row["transfer"]["Avg."] for row in found.row(name) if "transfer" in row]


def dev(config: str, **changes: object) -> Values:
    """The best scores on STS-B dev of a variant; double underscores in names of settings stand for dots."""
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    return lambda found: best_on_dev(found.variant(config, settings))


UNSUP, SUP, IS = "unsup_bert_base", "sup_bert_base", "iscse_bert_base"
SIMCSE = "unsupervised SimCSE"
CLAIMS = (
    Claim(f"{SIMCSE} is above the best average without training", (76.25, 56.70), row(SIMCSE), best_of([*UNTRAINED])),
    Claim(f"{SIMCSE} is above post-processed averages", (76.25, 66.55), row(SIMCSE), best_of([*POSTPROCESSED])),
    Claim(f"IS-CSE with a constant weight is above {SIMCSE}", (78.30, 76.25), row("IS-CSE, constant"), row(SIMCSE)),
    Claim("Supervised SimCSE is above the unsupervised", (81.57, 76.25), row("supervised SimCSE"), row(SIMCSE)),
    Claim(
        "Hard negatives help",
        (86.2, 84.9),
        row("supervised SimCSE"),
        row("supervised, without hard negatives"),
    ),
    Claim(
        "The masked language model helps the transfer tasks",
        (86.64, 85.81),
        transferred("unsupervised SimCSE + MLM"),
        transferred(SIMCSE),
    ),
    Claim(
        "The same noise twice collapses",
        (82.5, 43.6),
        dev(UNSUP),
        dev(UNSUP, model__dropout=0.1, objective__noise="shared"),
    ),
    Claim("Dropout is needed", (82.5, 71.1), dev(UNSUP), dev(UNSUP, model__dropout=0.0)),
    Claim("A dropout of 0.1 is above 0.01", (82.5, 72.6), dev(UNSUP), dev(UNSUP, model__dropout=0.01)),
    Claim("A dropout of 0.1 is above 0.5", (82.5, 71.0), dev(UNSUP), dev(UNSUP, model__dropout=0.5)),
    Claim(
        "Dropout alone is above crop 10 %",
        (82.5, 77.8),
        dev(UNSUP),
        dev(UNSUP, data__augment="crop", data__augment_share=0.1),
    ),
    Claim(
        "Dropout alone is above word deletion 10 %",
        (82.5, 75.9),
        dev(UNSUP),
        dev(UNSUP, data__augment="delete_words", data__augment_share=0.1),
    ),
    Claim(
        "Dropout alone is above synonyms",
        (82.5, 77.4),
        dev(UNSUP),
        lambda found: best_on_dev(found.variant(UNSUP, SYNONYMS)),
    ),
    Claim("The same sentence is above the next", (82.5, 67.1), dev(UNSUP), dev(UNSUP, data__neighbours=1)),
    Claim("One encoder is above two", (82.5, 80.7), dev(UNSUP), dev(UNSUP, model__encoders=2)),
    Claim(
        "A head in training only is above no head",
        (82.5, 80.9),
        dev(UNSUP),
        dev(UNSUP, model__pooler="cls_before_pooler", model__mlp_only_train=False),
    ),
    Claim("A temperature of 0.05 is above 1", (86.2, 64.0), dev(SUP), dev(SUP, objective__temperature=1.0)),
    Claim("A temperature of 0.05 is above 0.001", (86.2, 84.9), dev(SUP), dev(SUP, objective__temperature=0.001)),
    Claim("The masked language model costs STS", (86.2, 85.1), dev(SUP), dev(SUP, objective__mlm__weight=1.0)),
)


def claims(found: Found) -> str:
    """The table of the claims: the papers' gaps, ours with their intervals, and whether they hold."""
    lines = []
    for claim in CLAIMS:
        above, below = claim.above(found), claim.below(found)
        gap = f"{claim.paper[0] - claim.paper[1]:+.1f}"
        if not above or not below:
            lines.append([claim.words, gap, "–", "–", "not measured yet"])
            continue
        apart = difference(above, below)
        lines.append([claim.words, gap, f"{apart.mean:+.2f}", _span(apart), _verdict(apart)])
    return markdown_table(["claim", "paper", "here", "95 % interval", ""], lines)


def _span(apart: Difference) -> str:
    low, high = apart.interval()
    return "one seed" if low != low else f"{low:+.2f} to {high:+.2f}"  # NaN


def _verdict(apart: Difference) -> str:
    return "not decided: one seed" if apart.error != apart.error else verdict(apart)
