"""Tables as CSV and as Markdown."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.storage.files import write_text

Row = dict[str, Any]


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Writes rows in one step, with one column for each name in any row; a field without a figure is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({n: "" if isinstance(v, float) and math.isnan(v) else v for n, v in row.items()})
    write_text(file, out.getvalue())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a bar in a field is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(field.replace('|', chr(92) + '|') for field in line)} |" for line in lines)


def formatted(form: str, *figures: float | None) -> str:
    """Figures as `form` prints them; a dash where one of them is absent."""
    return "–" if None in figures else form.format(*figures)


def mean_sd(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, or the one figure; a dash where there is none."""
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def metric_title(name: str) -> str:
    """The name of a score as titles spell it."""
    return {"spearman": "Spearman", "ndcg@10": "nDCG@10", "mrr@10": "MRR@10"}.get(name, name)
