"""The tables of the campaign, made from its records."""

from collections import Counter
from pathlib import Path
from typing import Any

from tests.torture.kinds import FAULT, OUTCOMES, SKIPPED

BEGIN, END = "<!-- campaign: begin; `make torture` writes this -->", "<!-- campaign: end -->"


def _row(name: str, records: list[dict[str, Any]]) -> list[str]:
    counts = Counter(record["outcome"] for record in records)
    return [name, str(len(records)), *(str(counts[outcome] or "") for outcome in _columns())]


def _columns() -> list[str]:
    return [outcome for outcome in OUTCOMES if outcome != SKIPPED]


def table(records: list[dict[str, Any]], kinds: list[str]) -> str:
    """Kinds × outcomes, in Markdown."""
    ran = [record for record in records if record["outcome"] != SKIPPED]
    rows = [["kind of fault", "cases", *_columns()], ["---", *["--:"] * (len(_columns()) + 1)]]
    rows += [_row(kind, found) for kind in kinds if (found := [r for r in ran if r["kind"] == kind])]
    rows.append(_row("all", ran))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(records: list[dict[str, Any]], kinds: Any) -> str:
    """The table, what was skipped, and the faults."""
    names = [*kinds, *sorted({record["kind"] for record in records} - {*kinds})]
    lines = [table(records, names), "", _sums(records)]
    lines += [f"skipped: {kind} ({why})" for kind, why in _skipped(records).items()]
    lines += [
        f"FAULT {r['number']} {r['kind']} ({r['place']}): {r['detail'][:300]}" for r in records if r["outcome"] == FAULT
    ]
    return "\n".join(lines)


def _skipped(records: list[dict[str, Any]]) -> dict[str, str]:
    return {record["kind"]: record["detail"] for record in records if record["outcome"] == SKIPPED}


def _sums(records: list[dict[str, Any]]) -> str:
    ran = [record for record in records if record["outcome"] != SKIPPED]
    seconds = sum(record["seconds"] for record in ran)
    return (
        f"{len(ran):,} cases, {sum(record['runs'] for record in ran):,} runs of a command, "
        f"{seconds / max(len(ran), 1):.1f} s per case."
    )


def write_report(page: Path, records: list[dict[str, Any]], kinds: Any) -> None:
    """Writes the tables between the marks of a page."""
    text = page.read_text("utf-8")
    head, mark, rest = text.partition(BEGIN)
    _, closing, tail = rest.partition(END)
    assert mark and closing, f"{page} lacks the line {BEGIN} or {END}"
    sittings = sorted({(record["date"], record["commit"], record["machine"]) for record in records})
    seeds = sorted({record["seed"] for record in records})
    skipped = [f"Not made on this machine: {kind} ({why})." for kind, why in _skipped(records).items()]
    about = [f"- {date}, commit {commit}, {machine}" for date, commit, machine in sittings]
    body = [f"Seed {', '.join(map(str, seeds))}. {_sums(records)}", "", *about, "", table(records, [*kinds]), ""]
    page.write_text(f"{head}{mark}\n\n" + "\n".join([*body, *skipped, *([""] if skipped else [])]) + f"\n{closing}{tail}", "utf-8")
