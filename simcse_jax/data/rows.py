"""Rows of named columns, the form of all text, and the examples that a config takes from them."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from simcse_jax.config import DataConfig
from simcse_jax.errors import InputError

Example = tuple[str, ...]


class Row(NamedTuple):
    """The wanted values of a row, and their origin."""

    where: str
    """The file and its unit, for messages, e.g. "nli.csv, line"."""
    number: int
    values: tuple[Any, ...]


@runtime_checkable
class Source(Protocol):
    """A table of text: files, a data set of the hub or of TFDS."""

    @property
    def name(self) -> str:
        """The name of the source, for messages."""
        ...

    def identity(self) -> list[Any]:
        """JSON values that change when the content does."""
        ...

    def header(self) -> tuple[str, ...] | None:
        """Names of the columns, () without any row; None for plain text, where each row is a sentence."""
        ...

    def labels(self, column: str) -> tuple[str, ...]:
        """Names of the classes of a column, in the order of their numbers; () for other columns."""
        ...

    def rows(self, columns: tuple[str, ...]) -> Iterator[Row]:
        """The values of these columns, row by row.

        Raises:
          InputError: a row that cannot be read.
        """
        ...


def read_examples(source: Source, config: DataConfig) -> Iterator[tuple[str, int, Example]]:
    """The rows that `data.where` selects, as (where, number, sentences of `data.columns`); blank rows are kept.

    Raises:
      InputError: columns that are absent or hold no text, or a row that cannot be read.
    """
    header = source.header()
    if header is None and (config.columns or config.where):
        raise InputError(
            f"{source.name} is plain text, one sentence per line: data.columns and data.where do not apply"
        )
    picked = _pick(source.name, header, config) if header else ()
    wanted = [_value(source, name, value) for name, value in config.where.items()]
    size = len(picked)
    for where, number, values in source.rows((*picked, *config.where)):
        if wanted:
            if any(values) and [text_of(value) for value in values[size:]] != wanted:
                continue
            values = values[:size]
        for place, value in enumerate(values):
            if not isinstance(value, str):
                raise InputError(f"{where} {number} has no text in column {picked[place]}")
            if not value.isascii() and value.encode(errors="ignore").decode() != value:
                raise InputError(
                    f"{where} {number} has half of a surrogate pair in column {picked[place]}: it is not Unicode text"
                )
        yield where, number, values


def _pick(name: str, header: tuple[str, ...], config: DataConfig) -> tuple[str, ...]:
    """The columns that hold sentences."""
    check_columns(name, header, (*config.columns, *config.where))
    picked = config.columns or tuple(column for column in header if column not in config.where)
    if twice := next((column for column in (*picked, *config.where) if header.count(column) > 1), None):
        raise InputError(f"{name} has two columns {twice!r}: give each a name of its own")
    if not 1 <= len(picked) <= 3:
        raise InputError(
            f"{name} has {len(picked)} columns ({', '.join(picked)}); expected 1 (sentence), 2 (sentence, positive) or "
            "3 (sentence, positive, hard negative): name the ones to use with data.columns"
        )
    return picked


def check_columns(name: str, header: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raises `InputError` unless the header has all wanted columns."""
    if missing := [column for column in wanted if column not in header]:
        raise InputError(f"{name} has no column {', '.join(missing)}; it has {', '.join(header)}")


def _value(source: Source, column: str, wanted: str) -> str:
    """A value of `data.where` in the form that rows have: the number, for the name of a class."""
    names = source.labels(column)
    return str(names.index(wanted)) if wanted in names else wanted


def text_of(value: Any) -> str | None:
    """A value written as JSON, whole numbers without a point; text as it is, None for None."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value, default=str)
