"""The tables of the campaign, made from its records."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.torture.damages import PLACES
from tests.torture.kinds import FAULT, OUTCOMES, SKIPPED

BEGIN, END = "<!-- campaign: begin; `make torture` writes this -->", "<!-- campaign: end -->"


def _row(name: str, records: list[dict[str, Any]]) -> list[str]:
    counts = Counter(record["outcome"] for record in records)
    return [name, str(len(records)), *(str(counts[outcome] or "") for outcome in _columns())]


def _columns() -> list[str]:
    return [outcome for outcome in OUTCOMES if outcome != SKIPPED]


def table(title: str, records: list[dict[str, Any]], names: list[str], name_of: Callable[[dict[str, Any]], str]) -> str:
    """Outcomes in Markdown, a row for each name and one for all.

    Args:
      title: of the first column.
      records: the cases.
      names: of the rows.
      name_of: the row of a case; other names than `names` have none.
    """
    by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for record in records:
        if record["outcome"] != SKIPPED and name_of(record) in by_name:
            by_name[name_of(record)].append(record)
    rows = [[title, "cases", *_columns()], ["---", *["--:"] * (len(_columns()) + 1)]]
    rows += [_row(name, found) for name, found in by_name.items() if found]
    rows.append(_row("all", [record for found in by_name.values() for record in found]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _tables(records: list[dict[str, Any]], kinds: Iterable[str]) -> list[str]:
    """Kinds × outcomes, and the places of damage × outcomes."""
    names = [*kinds, *sorted({record["kind"] for record in records} - {*kinds})]
    by_kind = table("kind of fault", records, names, lambda record: str(record["kind"]))
    return [by_kind, "", table("damage in", records, [*PLACES], lambda record: str(record["place"]).partition(":")[0])]


def summary(records: list[dict[str, Any]], kinds: Iterable[str]) -> str:
    """The table, what was skipped, and the faults."""
    lines = [*_tables(records, kinds), "", _sums(records)]
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


def write_report(page: Path, records: list[dict[str, Any]], kinds: Iterable[str]) -> None:
    """Writes the tables between the marks of a page."""
    text = page.read_text("utf-8")
    head, mark, rest = text.partition(BEGIN)
    _, closing, tail = rest.partition(END)
    if not (mark and closing):
        raise SystemExit(f"{page} lacks the line {BEGIN} or {END}")
    sittings = sorted({(record["date"], record["commit"], record["machine"]) for record in records})
    seeds = sorted({record["seed"] for record in records})
    skipped = [f"Not made on this machine: {kind} ({why})." for kind, why in _skipped(records).items()]
    about = [f"- {date}, commit {commit}, {machine}" for date, commit, machine in sittings]
    body = [f"Seed {', '.join(map(str, seeds))}. {_sums(records)}", "", *about, "", *_tables(records, kinds), ""]
    body += [*skipped, *([""] if skipped else [])]
    page.write_text("\n".join([f"{head}{mark}", "", *body, f"{closing}{tail}"]), "utf-8")
