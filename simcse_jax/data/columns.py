"""The columns that hold the sentences: those that a config names, or all of a table where each of them is text."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from simcse_jax.config import DataConfig
from simcse_jax.config.mining import MOST_NEGATIVES
from simcse_jax.data.files import Files
from simcse_jax.data.kinds import fault, is_sentence, place
from simcse_jax.data.reading import few
from simcse_jax.data.rows import Example, Source, check_columns, is_null, text_of
from simcse_jax.errors import InputError, some

MOST = 2 + MOST_NEGATIVES
"""Sentences of an example: itself, its positive and its hard negatives."""
_SAMPLED = 1000  # rows
_SHOWN = 60  # characters
_ORDER = "sentence, positive and hard negatives in this order"


def pick_columns(source: Source, config: DataConfig, doubt: bool = True) -> tuple[str, ...]:
    """The columns of sentence, positive and hard negatives, as far as there are any; () for plain text.

    Args:
      source: the text.
      config: its settings.
      doubt: whether columns that the config does not name must look like text.

    Raises:
      InputError: a table read with another delimiter than it has; columns that are absent, too many or of one name; or
        columns that the config does not name and that do not look like text.
    """
    if doubt:
        _check_delimiter(source, config)
    header = source.header()
    if header is None and (config.columns or config.where):
        raise InputError(
            f"{source.name} is plain text, one sentence per line: data.columns and data.where do not apply; where a "
            "config sets them, give --data.columns and --data.where without a value"
        )
    if not header:
        return ()
    if len(config.columns) > MOST:
        raise InputError(
            f"data.columns names {len(config.columns)} columns ({some(config.columns)}) but an example has {MOST} "
            f"at most: name those of {_ORDER}"
        )
    check_columns(source.name, header, tuple(config.where))
    table = _Table(source, tuple(name for name in header if name not in config.where))
    if missing := [name for name in config.columns if name not in header]:
        raise InputError(f"{source.name} has no column {some(missing)}; {table.advice}{_lost_row(source)}")
    for name in (*(config.columns or table.header), *config.where):
        if header.count(name) > 1:
            what = f"two columns '{name}'" if name else "two columns without a name"
            raise InputError(f"{source.name} has {what}; {table.advice}{_lost_row(source)}")
    if doubt and not config.columns and (problem := table.problem):
        raise InputError(f"{source.name} {problem}; {table.advice}{_lost_row(source)}")
    return config.columns or table.header


def role_of(column: int) -> str:
    """The part that a column plays in an example."""
    roles = ("sentence", "positive", "hard negative")
    return roles[column] if column < 3 else f"hard negative {column - 1}"


def kind_of(columns: int) -> str:
    """What examples of this many sentences are called."""
    kinds = {1: "sentences", 2: "pairs", 3: "triplets"}
    return kinds.get(columns, f"examples of up to {columns - 2} hard negatives")


def text_columns(source: Source) -> tuple[str, ...]:
    """All columns that look like text, whatever their number; () for plain text and for a table without any row.

    Raises:
      InputError: a table without such a column.
    """
    table = _Table(source, source.header() or ())
    if table.header and not table.texts:
        raise InputError(f"{source.name} has no column of text; {table.advice}")
    return table.texts


def describe_columns(source: Source, config: DataConfig, columns: tuple[str, ...], example: Example) -> tuple[str, ...]:
    """Lines that say which column each sentence is from, with the first example.

    Args:
      source: the text.
      config: its settings.
      columns: from `pick_columns`.
      example: the first example.
    """
    names = [*(columns or ("each line",)), f"one of the {config.neighbours} after it"]
    lines = [
        f"{role_of(n)} ← {name}: {_clip(text) or '(missing)'}"
        for n, (name, text) in enumerate(zip(names, example, strict=False))
    ]
    if lost := _lost_row(source):
        lines.append(f"NOTE: {lost.removeprefix('; ')}")
    if not config.columns and len(columns) == 3 and place(columns[2]) != 2:
        lines.append(
            f"NOTE: {columns[2]} is taken for hard negatives, which its name does not say; to train on pairs, add "
            f"--data.columns {shlex.join(columns[:2])}"
        )
    if not columns and "\t" in example[0]:
        lines.append(r"NOTE: lines hold tabs; if these divide columns, read them with --data.delimiter '\t'")
    return tuple(lines)


def _check_delimiter(source: Source, config: DataConfig) -> None:
    """Raises `InputError` for a table that has one column because it is read with another delimiter than it has."""
    if not isinstance(source, Files) or (delimiter := source.joined_by()) is None:
        return
    if config.columns and config.columns == source.header():
        return
    shown = r"\t" if delimiter == "\t" else delimiter
    raise InputError(
        f"{source.name} has one column, but its header and its rows hold the delimiter '{shown}': read it with "
        f"--data.delimiter '{shown}', or name that one column with data.columns to take each row as a sentence"
    )


def _lost_row(source: Source) -> str:
    """A clause on a first row that looks like sentences and not like names of columns; empty for other sources."""
    if not isinstance(source, Files) or source.layout is None or not source.layout.has_header:
        return ""
    if (sentence := next(filter(is_sentence, source.header() or ()), None)) is None:
        return ""
    return (
        f"; the first row is taken for the names of the columns, but '{_clip(sentence)}' looks like a sentence: if the "
        "file has no header, add --data.no-header to keep that row"
    )


@dataclass(frozen=True)
class _Table:
    """Columns of a source, and what the first rows say of them."""

    source: Source
    header: tuple[str, ...]

    @cached_property
    def _values(self) -> dict[str, list[Any]]:
        """The values of each column in the first rows, without those that are null or blank."""
        names = tuple(dict.fromkeys(self.header))
        rows: list[tuple[Any, ...]] = []
        try:
            found = (row.values for row in self.source.rows(names))
            rows += few(found, _SAMPLED, lambda row: sum(len(value) for value in row if isinstance(value, str)))
        except InputError:
            if not rows:
                raise  # else whoever reads the text meets it, if the columns that are taken hold it
        return {
            name: [row[n] for row in rows if not is_null(row[n]) and _text(row[n]).strip()]
            for n, name in enumerate(names)
        }

    @cached_property
    def _faults(self) -> dict[str, str]:
        """Why each column is not taken for text; empty for text."""
        alone = len(self.header) == 1
        return {
            name: "holds labels" if self.source.labels(name) else fault(name, values, alone)
            for name, values in self._values.items()
        }

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that look like text."""
        return tuple(name for name, why in self._faults.items() if not why)

    @property
    def _suggested(self) -> tuple[tuple[str, ...], bool]:
        """Columns that look like text, as the places that their names claim order them; whether they are the only ones.

        Where some claim to be sentence and positive, others are left out; nothing but negatives comes after them.
        """
        places = {name: place(name) for name in self.texts}
        negatives = [name for name in places if places[name] == 2]
        if {0, 1} <= set(places.values()):
            claimed = {p: name for name, p in reversed(places.items())}
            return (claimed[0], claimed[1], *negatives), True
        ordered = sorted(places, key=lambda name: 0.5 if places[name] is None else float(places[name] or 0))
        rest = [name for name in ordered if places[name] != 2]
        return (*rest[:2], *(negatives if len(rest) == 2 else ())), 0 < len(rest) < 3

    @property
    def problem(self) -> str:
        """What speaks against taking all columns as they stand; empty where nothing does, or no row says anything."""
        if not any(self._values.values()):
            return ""
        if faults := [f"column {_clip(name) or repr(name)} {why}" for name, why in self._faults.items() if why]:
            return f"has columns that are no text: {some(faults, longest=None)}"
        if more_columns := [name for name in self.header[3:] if place(name) != 2]:
            return (
                f"has {len(self.header)} columns, and from the third on they are hard negatives, which "
                f"{_clip(more_columns[0]) or repr(more_columns[0])} is not"
            )
        if len(self.header) > MOST:
            return f"has {len(self.header)} columns but an example has at most {MOST}"
        for n, name in enumerate(self.header if len(self.header) > 1 else ()):
            # Of question1 and question2, both claim the first place; of two columns, either may take it.
            free = len(self.header) == 2 or place(self.header[0]) == 0
            claimed = min(n, 2)
            if place(name) not in ((None, claimed, 0) if free else (None, claimed)):
                return f"has column {name} in the place of the {role_of(n)}"
        return ""

    @property
    def advice(self) -> str:
        """The columns with an example of each, and the option that names the right ones."""
        shown = some((f"{_clip(name) or repr(name)} ({self._example(name)})" for name in self.header), longest=None)
        chosen, sure = self._suggested
        option = shlex.join(chosen or self.header[:1])
        return (
            f"its columns are {shown}; name those of {_ORDER}{'' if sure else ', for example'}: --data.columns {option}"
        )

    def _example(self, name: str) -> str:
        values = self._values[name]
        return f"'{_clip(_text(values[0]))}'" if values else "empty"


def _text(value: Any) -> str:
    return text_of(value) or ""


def _clip(text: str) -> str:
    """A text on one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
