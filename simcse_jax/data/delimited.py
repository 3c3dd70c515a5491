"""Tables of delimited cells: .csv and .tsv files, and others for which a delimiter is given."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

import numpy as np

from simcse_jax.data.reading import LONGEST, few, format_of, lines_of, open_text
from simcse_jax.data.rows import Row, check_columns
from simcse_jax.errors import InputError, some

_DELIMITERS = (",", "\t", ";", "|")
WIDEST = 2**14  # columns, as many as spreadsheets have
_COMPARED = 50  # rows
_ADVICE = "write a quote inside a quoted cell twice, and close every one"


class _QuotesError(InputError):
    """A table whose quotes cannot be read."""


@dataclass(frozen=True)
class Layout:
    """The form of a table.

    Attributes:
      delimiter: what stands between the cells of a row; if empty, a tab in .tsv files and a comma in others.
      has_header: whether the first row names the columns; without it they are called 1, 2, ...
    """

    delimiter: str = ""
    has_header: bool = True

    def __post_init__(self) -> None:
        """Raises `InputError` for a delimiter that cannot be used."""
        if len(self.delimiter) > 1 or self.delimiter in ('"', "\n", "\r"):
            raise InputError(
                f"data.delimiter is {self.delimiter!r}; it must be one character, such as ; or \\t for a tab"
            )

    def header(self, path: Path) -> tuple[str, ...]:
        """The names of the columns; () for a file without any row."""
        with open_text(path) as file:
            return self.names(next((row for _, row in self._lines(path, file) if row), []))

    def rows(self, path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
        """The cells of these columns, row by row; blank ones for a blank line."""
        where = f"{path}, line"
        with open_text(path) as file:
            lines = self._lines(path, file)
            line, first = next(((n, row) for n, row in lines if row), (0, []))
            header = self.names(first)
            if not header:
                return
            check_columns(str(path), header, columns)
            places = [header.index(name) for name in columns]
            for number, row in lines if self.has_header else chain([(line, first)], lines):
                blank = len(row) <= 1 and not "".join(row).strip()
                if len(row) != len(header) and not blank:
                    raise InputError(
                        f"{where} {number} has {len(row)} columns but the header has {len(header)} "
                        f"({some(header)}): quote sentences that hold the delimiter"
                    )
                yield Row(where, number, ("",) * len(places) if blank else tuple(row[i] for i in places))

    def candidates(self, path: Path) -> Iterator[tuple["Layout", list[list[str]]]]:
        """This layout and, if it has no delimiter, one for each usual delimiter; each with the first rows of a file.

        Blank rows are left out; there is no row where the quotes of the file cannot be read so.
        """
        for layout in (self, *(replace(self, delimiter=d) for d in _DELIMITERS if not self.delimiter)):
            try:
                with open_text(path) as file:
                    filled = (row for _, row in layout._lines(path, file) if row)
                    rows = list(few(filled, _COMPARED, lambda row: sum(map(len, row))))
            except _QuotesError:
                rows = []
            yield layout, rows

    def joined_by(self, path: Path) -> str | None:
        """The delimiter that divides header and rows, where this layout finds a single column or cannot read it."""
        (_, own), *others = self.candidates(path)
        for other, rows in others if not own or len(own[0]) == 1 else ():
            header, *rest = rows or [[]]
            # A few rows may hold it in their text, too.
            if len(header) > 1 and rest and np.mean([len(row) >= len(header) for row in rest]) > 0.9:
                return other.delimiter
        return None

    def names(self, first: list[str]) -> tuple[str, ...]:
        """The names of the columns, from the first row."""
        return tuple(cell.strip() if self.has_header else str(n) for n, cell in enumerate(first, 1))

    def quotes_tabs(self, path: Path) -> bool:
        """Whether the header of a table with tabs is in quotes, so that they are no part of its text."""
        if self._delimiter(path) != "\t" or format_of(path) == ".csv":
            return False
        with open_text(path) as file:
            return self._quotes(next(lines_of(path, file), ""))

    def _quotes(self, first: str) -> bool:
        cells = first.rstrip("\r\n").split("\t")
        return self.has_header and all(re.fullmatch('"[^"]*"', cell) for cell in cells)

    def _delimiter(self, path: Path) -> str:
        return self.delimiter or ("\t" if format_of(path) == ".tsv" else ",")

    def _lines(self, path: Path, file: TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
        """The rows, each with the number of its first line; [] for an empty line.

        Quoting is standard, except that tabs go without quotes outside of .csv files, unless the header has them:
        sentences in them are not quoted.
        """
        csv.field_size_limit(LONGEST)
        delimiter = self._delimiter(path)
        number = size = 0  # the row that is being read: its first line, and its characters so far
        plain = lines_of(path, file)
        first = next(plain, "")

        def bounded() -> Iterator[str]:
            nonlocal size
            for line in chain([first] if first else [], plain):
                size += len(line)
                if size > LONGEST:
                    raise _QuotesError(
                        f"{path}, line {number}: a row of more than {LONGEST:,} characters begins here; {_ADVICE}"
                    )
                yield line

        lines = bounded()
        if delimiter == "\t" and format_of(path) != ".csv" and not self._quotes(first):
            reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            number, size = reader.line_num + 1, 0
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _QuotesError(f"{path}, line {number}: {error}; {_ADVICE}") from error
            if len(row) > WIDEST:
                raise _QuotesError(f"{path}, line {number} has {len(row):,} columns; expected {WIDEST:,} at most")
            yield number, row
