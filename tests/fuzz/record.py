"""The record of the last campaign, and its table in docs/fuzzing.md."""

from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "record.json"


def table(record: dict[str, Any]) -> str:
    """The record as a table in Markdown."""
    rows = ["| target | executions | seconds | branches | peak MiB | escapes |", "|---|---:|---:|---:|---:|---:|"]
    for name, line in record["targets"].items():
        figures = (
            f"{line['executions']:,}",
            f"{line['seconds']:,.0f}",
            f"{line['coverage']:,}",
            f"{line['peak_mib']:,}",
        )
        rows.append(f"| {name} | {' | '.join(figures)} | {len(line['escapes'])} |")
    every = record["targets"].values()
    sums = {key: sum(line[key] for line in every) for key in ("executions", "seconds")}
    escapes, most = sum(len(line["escapes"]) for line in every), max(line["peak_mib"] for line in every)
    rows.append(f"| all | {sums['executions']:,} | {sums['seconds']:,.0f} | | {most:,} | {escapes} |")
    return "\n".join(rows)
