"""Scores of models as tables: text for a terminal, Markdown, and CSV with one figure per line."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simcse_jax.evaluation.pairs import title as task_title
from simcse_jax.reports.tables import formatted, markdown_table
from simcse_jax.storage.files import write_text

Rows = dict[str, list[str]]
"""The cells of each row, by the row's label."""


def text_table(columns: Sequence[str], rows: Rows) -> str:
    """Cells under right-aligned headers."""
    label = max(len(name) for name in rows)
    widths = [max(6, *map(len, cells)) for cells in zip(columns, *rows.values(), strict=True)]
    lines = [" " * label + "".join(f"  {c:>{w}}" for c, w in zip(columns, widths, strict=True))]
    for name, cells in rows.items():
        lines.append(f"{name:<{label}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def tables(models: list[dict[str, Any]], mode: str, resamples: int) -> list[tuple[str, list[str], Rows]]:
    """Title, columns and rows of each table.

    Args:
      models: results of `suite.evaluate_models`, each with "model" and "pooler".
      mode: the split reported.
      resamples: number of resamples in the bootstrap, for the title.
    """
    found = []
    for kind, title in (("sts", "Spearman × 100"), ("transfer", "accuracy, %")):
        if kind not in models[0]:
            continue
        columns = list(models[0][kind]["reported"])
        headers = [task_title(name) for name in columns]
        labelled = {f"{m['model']} ({m['pooler']})": m[kind] for m in models}

        def rows(key: str, form: str, labelled: Any = labelled, columns: Any = columns) -> Rows:
            values = {name: m[key] for name, m in labelled.items() if key in m}
            return {name: [formatted(form, *_several(row[c])) for c in columns] for name, row in values.items()}

        found.append((f"{title}, {mode}", headers, rows("reported", "{:.2f}")))
        if intervals := rows("intervals", "{:.2f} to {:.2f}"):
            found.append((f"95 % intervals over pairs, {resamples:,} resamples", headers, intervals))
        if differences := rows("differences", "{:+.2f} ({:+.2f} to {:+.2f})"):
            found.append((f"difference to {next(iter(labelled))}, with 95 % intervals", headers, differences))
    for task in models[0].get("retrieval", {}):
        figures = {f"{m['model']} ({m['pooler']})": [f"{x:.2f}" for x in m["retrieval"][task].values()] for m in models}
        found.append((f"{task_title(task)}, retrieval × 100", [*models[0]["retrieval"][task]], figures))
    return found


def _several(value: Any) -> Sequence[float | None]:
    return value if isinstance(value, list) else [value]


def format_text(models: list[dict[str, Any]], mode: str, resamples: int) -> str:
    """All tables for a terminal; see `tables`."""
    found = tables(models, mode, resamples)
    return "\n\n".join(f"{title}\n{text_table(columns, rows)}" for title, columns, rows in found)


def write_markdown(file: Path, models: list[dict[str, Any]], mode: str, resamples: int) -> None:
    """All tables as Markdown; see `tables`."""
    found = tables(models, mode, resamples)
    parts = [
        f"**{title}**\n\n{markdown_table(['model', *columns], ([name, *row] for name, row in rows.items()))}\n"
        for title, columns, rows in found
    ]
    write_text(file, "\n".join(parts))


def write_csv(file: Path, models: list[dict[str, Any]], mode: str) -> None:
    """One reported figure per line, with its interval and difference if there are any."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["model", "pooler", "mode", "task", "metric", "value", "low", "high"]
    writer.writerow([*columns, "difference", "difference_low", "difference_high"])
    for model in models:
        for kind, metric in (("sts", "spearman"), ("transfer", "accuracy")):
            part = model.get(kind, {"reported": {}})
            for task, value in part["reported"].items():
                interval = part.get("intervals", {}).get(task, [""] * 2)
                difference = part.get("differences", {}).get(task, [""] * 3)
                writer.writerow([model["model"], model["pooler"], mode, task, metric, value, *interval, *difference])
        for task, figures in model.get("retrieval", {}).items():
            for metric, value in figures.items():
                writer.writerow([model["model"], model["pooler"], mode, task, metric, value, *[""] * 5])
    write_text(file, out.getvalue())
