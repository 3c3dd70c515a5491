"""Rows of named columns, the form of all text, and the examples that a config takes from them."""

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from simcse_jax.errors import InputError, some

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


def read_examples(
    source: Source, columns: tuple[str, ...], where: dict[str, str]
) -> Iterator[tuple[str, int, Example]]:
    """The rows that `data.where` selects, as (where, number, sentences of the columns); null cells are blank.

    Raises:
      InputError: columns that hold no text, or a row that cannot be read.
    """
    wanted = [_value(source, name, value) for name, value in where.items()]
    size = len(columns)
    for place, number, values in source.rows((*columns, *where)):
        if wanted:
            if any(values) and [text_of(value) for value in values[size:]] != wanted:
                continue
            values = values[:size]
        texts = tuple("" if is_null(value) else value for value in values)
        for at, value in enumerate(texts):
            if not isinstance(value, str):
                raise InputError(f"{place} {number} has no text in column {columns[at]}, but {text_of(value)}")
            if not value.isascii() and value.encode(errors="ignore").decode() != value:
                raise InputError(
                    f"{place} {number} has half of a surrogate pair in column {columns[at]}: it is not Unicode text"
                )
        yield place, number, texts


def check_columns(name: str, header: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raises `InputError` unless the header has all wanted columns."""
    if missing := [column for column in wanted if column not in header]:
        raise InputError(f"{name} has no column {some(missing)}; it has {some(header)}")


def _value(source: Source, column: str, wanted: str) -> str:
    """A value of `data.where` in the form that rows have: the number, for the name of a class."""
    names = source.labels(column)
    return str(names.index(wanted)) if wanted in names else wanted


def is_null(value: Any) -> bool:
    """Whether a cell is empty: null in JSON and Parquet, or the NaN that pandas puts in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(value: Any) -> str | None:
    """A value written as JSON, whole numbers without a point; text as it is, None for None."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value, default=str)
