"""report.md: the findings of an analysis, in sentences that its figures support and no others."""

import math
from pathlib import Path

import numpy as np

from simcse_jax.analysis.measure import MEASURES, GradedPairs, Measured
from simcse_jax.analysis.sources import AnalysedModel
from simcse_jax.evaluation.geometry import positive_pairs
from simcse_jax.evaluation.sts import Mode, distinct_sentences
from simcse_jax.reports.tables import Row, formatted, markdown_table

_MEANING = """\
- **alignment**: mean squared distance of the unit vectors of pairs with a gold score in the top fifth; lower is closer.
- **uniformity**: log of the mean of exp(−2 × squared distance) over all pairs of distinct sentences; lower is more
  uniform (both: Wang & Isola, arXiv 2005.10242).
- **average cosine**: over all pairs of distinct sentences; 0 without a common direction.
- **I(W)**: least over largest partition function along the eigenvectors, of unit vectors (Mu & Viswanath, arXiv
  1702.01417); 1 where no direction is preferred.
- **IsoScore**: how evenly the variance fills all dimensions, from 0 to 1 (Rudman et al., arXiv 2108.07344).
- **effective rank**: exponential of the entropy of the singular values (Roy & Vetterli 2007).
- **cosine, top − bottom group**: mean cosine of the highest group of gold scores less that of the lowest."""

_FIGURES = {
    "plane": "Alignment and uniformity, the score as colour",
    "spectrum": "Singular values over the largest",
    "cosines": "Cosine by gold score",
}


def write_report(
    folder: Path,
    sources: list[AnalysedModel],
    measured: list[Measured],
    paths: dict[str, list[Row]],
    pairs: GradedPairs,
    mode: Mode,
) -> None:
    """Writes report.md.

    Args:
      folder: folder with the tables and figures.
      sources: the models as given.
      measured: their measures.
      paths: their evaluations in training, by name.
      pairs: the pairs that were analysed.
      mode: the split.
    """
    name = Path(pairs.task.name).stem
    sentences, positive = len(distinct_sentences([pairs.task])), int(np.sum(positive_pairs(pairs.gold)))
    found = [*findings(measured), *(_path(name, path) for name, path in paths.items() if len(path) > 1)]
    sections = [
        "# Analysis of sentence vectors",
        f"{name}, {mode}: {len(pairs.gold):,} pairs ({positive:,} of them positives), {sentences:,} distinct "
        "sentences. Every figure is in [measures.csv](measures.csv).",
        "## What was found",
        "\n".join(f"- {sentence}" for sentence in found),
        "## Measures",
        _table(measured),
        _MEANING,
        "## Models",
        "\n".join(_model(source, measured, paths, name, mode) for source in sources),
        *(f"## {text}\n\n![{text}]({file}.png)\n\n[{file}.csv]({file}.csv)" for file, text in _FIGURES.items()),
    ]
    (folder / "report.md").write_text("\n\n".join(sections) + "\n", "utf-8")


def findings(measured: list[Measured]) -> list[str]:
    """The findings, in sentences."""
    if len(measured) == 1:
        (m,) = measured
        return [
            f"{m.label}: {', '.join(f'{label} {_show(m, measure)}' for measure, (label, _) in _measures(measured))}."
        ]
    sentences = []
    for measure, lowest, highest in (
        ("score", "Lowest score", "highest"),
        ("sts", "Lowest average of tasks", "highest"),
        ("alignment", "Closest pairs (alignment)", "farthest"),
        ("uniformity", "Most uniform", "least"),
        ("average_cosine", "Lowest average cosine", "highest"),
        ("iso_score", "Lowest IsoScore", "highest"),
        ("effective_rank", "Lowest effective rank", "highest"),
        ("contrast", "Least contrast of top and bottom group", "most"),
    ):
        known = [m for m in measured if measure in m.figures]
        if known:
            low, high = (pick(known, key=lambda m: m.figures[measure]) for pick in (min, max))
            figures = f"{low.label}, {_show(low, measure)}; {highest}: {high.label}, {_show(high, measure)}"
            sentences.append(f"{lowest}: {figures}.")
    return [*sentences, *_order(measured)]


def _order(measured: list[Measured]) -> list[str]:
    """The rank correlation of each measure with the score, in words."""
    from scipy.stats import spearmanr

    known = [m for m in measured if {"score", "alignment", "uniformity"} <= m.figures.keys()]
    scores = [m.figures["score"] for m in known]
    if len(known) < 4 or np.ptp(scores) == 0:
        return []
    figures = []
    for measure in ("alignment", "uniformity", "average_cosine", "effective_rank", "contrast"):
        values = [m.figures[measure] for m in known if measure in m.figures]
        if len(values) == len(known) and np.ptp(values) > 0:
            rank = float(spearmanr(scores, values).statistic)
            figures.append(f"{MEASURES[measure][0]} {rank:+.2f}")
    return [
        f"Rank correlation with the score over these {len(known)} (few, and not independent): {', '.join(figures)}."
    ]


def _path(name: str, path: list[Row]) -> str:
    first, last = path[0], path[-1]
    best = max(path, key=lambda row: -math.inf if math.isnan(row["score"]) else row["score"])
    moves = []
    for key, digits in (("alignment", 3), ("uniformity", 3), ("score", 2)):
        if not math.isfinite(first[key] + last[key]):  # no alignment, say, of pairs without a high score
            continue
        verb = "falls" if last[key] < first[key] else "rises"
        moves.append(f"{key} {verb} from {first[key]:.{digits}f} to {last[key]:.{digits}f}")
    at_best = [f"{key} {best[key]:.3f}" for key in ("alignment", "uniformity") if math.isfinite(best[key])]
    found = [", ".join(moves)] if moves else []
    if math.isfinite(best["score"]):
        beside = f", with {' and '.join(at_best)}" if at_best else ""
        found.append(f"highest score {best['score']:.2f} at step {best['step']:,}{beside}")
    steps = f"steps {first['step']:,} to {last['step']:,} ({len(path)} evaluations)"
    return f"{name}, in training, {steps}: {'; '.join(found) or 'no figures'}."


def _measures(measured: list[Measured]) -> list[tuple[str, tuple[str, int]]]:
    return [(name, about) for name, about in MEASURES.items() if any(name in m.figures for m in measured)]


def _show(m: Measured, measure: str) -> str:
    return formatted(f"{{:.{MEASURES[measure][1]}f}}", m.figures.get(measure))


def _table(measured: list[Measured]) -> str:
    columns = _measures(measured)
    rows = [[m.label, *(_show(m, name) for name, _ in columns)] for m in measured]
    return markdown_table(["model", *(label for _, (label, _) in columns)], rows)


def _model(source: AnalysedModel, measured: list[Measured], paths: dict[str, list[Row]], task: str, mode: Mode) -> str:
    about = next(m for m in measured if m.name == source.name)
    pooler = f"pooler {about.about['pooler']}, width {about.about['width']}"
    post = f"; {about.about['post-processor']}" if about.about["post-processor"] else ""
    text = f"- {source.name}: `{source.model}`, {pooler}{post}"
    if source.run is None:
        return text
    if source.steps is None:
        text += f"; a run, parameters of step {about.step:,}"
    if len(paths[source.name]) < 2:
        text += f"; no path is drawn: its log has no two evaluations on {task}, {mode}"
    return text
