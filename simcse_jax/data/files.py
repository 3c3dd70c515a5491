"""Text in local files: one file, a folder of shards, or all files that a pattern names."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from simcse_jax.data.delimited import WIDEST, Layout
from simcse_jax.data.reading import digest, format_of, is_packed, read_lines
from simcse_jax.data.rows import Row, Source, check_columns
from simcse_jax.errors import InputError, reason, some
from simcse_jax.storage.records import parse_json

FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
_FIRST = 1000  # objects
_PACKED = 2**30  # bytes of a .parquet.gz
_BATCH = 1024  # rows of a .parquet; a few bytes of one may stand for long texts


def is_shard(path: Path) -> bool:
    """Whether a path is a shard: a file that is neither hidden nor named `_…`, as marks of completion are."""
    return path.is_file() and not path.name.startswith((".", "_"))


@dataclass(frozen=True)
class Files:
    """Files of one format, read one after the other.

    Attributes:
      name: the name that the user gave.
      paths: the files, sorted.
      layout: the form of tables of delimited cells; None for other formats.
    """

    name: str
    paths: tuple[Path, ...]
    layout: Layout | None = None

    def identity(self) -> list[Any]:
        """Format and content of the files, without their names and folders, and a layout that is not the usual one."""
        digests = [digest(path) for path in self.paths]
        unusual = self.layout if self.layout != Layout() else None
        layout: list[Any] = [[unusual.delimiter, unusual.has_header]] if unusual else []
        if self.layout and any(map(self.layout.quotes_tabs, self.paths)):
            layout.append("quoted")  # which earlier versions read as text
        return [format_of(self.paths[0]), digests[0] if len(digests) == 1 else digests, *layout]

    def header(self) -> tuple[str, ...] | None:
        """The columns of the first file that holds any."""
        read = self._readers[0]
        return read and next((names for path in self.paths if (names := read(path))), ())

    def labels(self, column: str) -> tuple[str, ...]:
        """An empty tuple: files hold the labels themselves."""
        return ()

    def rows(self, columns: tuple[str, ...]) -> Iterator[Row]:
        """The rows of all files; the number is the line's where the format has lines."""
        for path in self.paths:
            yield from self._readers[1](path, columns)

    def joined_by(self) -> str | None:
        """The delimiter of a table that is read as one column, as .csv files with semicolons are; None for others."""
        return self.layout.joined_by(self.paths[0]) if self.layout else None

    def divided_for(self, accepts: Callable[[tuple[str, ...]], Any]) -> "Files":
        """The files, also .txt, as tables whose delimiter gives an accepted header; as they are where none does."""
        own = self.layout or (Layout() if format_of(self.paths[0]) == ".txt" else None)
        for layout, rows in own.candidates(self.paths[0]) if own else ():
            if rows and accepts(layout.names(rows[0])):
                return replace(self, layout=layout)
        return self

    @property
    def _readers(self) -> tuple[Callable[[Path], tuple[str, ...]] | None, Callable[..., Iterator[Row]]]:
        """What reads the header of a file, None for plain text, and what reads its rows."""
        if self.layout:
            return self.layout.header, self.layout.rows
        return {
            ".txt": (None, _read_text),
            ".jsonl": (_jsonl_header, _read_jsonl),
            ".parquet": (_parquet_header, _read_parquet),
        }[format_of(self.paths[0])]


Found = TypeVar("Found")


def find_columns(
    source: Source, find: Callable[[tuple[str, ...]], Found]
) -> tuple[Source, tuple[str, ...] | None, Found]:
    """Columns looked for in a header; of tables in files, whatever their delimiter.

    Args:
      source: the text.
      find: what it finds in a header, true for one that has the columns; () stands for plain text.

    Returns:
      The source, read with the delimiter that shows the columns where there is one; its header, None for plain text;
      and what `find` finds in that.
    """
    if isinstance(source, Files):
        source = source.divided_for(find)
    header = source.header()
    return source, header, find(header or ())


def find_files(name: str, paths: list[Path], layout: Layout = Layout()) -> Files:  # noqa: B008 (frozen)
    """Files of one format.

    Args:
      name: the name that the user gave, for messages.
      paths: the files found.
      layout: the form of tables, for other formats of no effect; a delimiter makes tables of .txt files, too.

    Raises:
      InputError: no file, an unknown ending, or several formats.
    """
    files = tuple(sorted(paths))
    if not files:
        raise InputError(f"{name} holds no file; expected files that end in {', '.join(FORMATS)}")
    if strange := next((p for p in files if format_of(p) not in FORMATS), None):
        hint = "" if len(files) == 1 else "; to take some files of a folder, give a pattern such as folder/*.jsonl"
        known = ", ".join(FORMATS)
        raise InputError(f"{strange} ends in '{strange.suffix}'; expected {known}, each also with .gz{hint}")
    if len(formats := sorted({format_of(p) for p in files})) > 1:
        raise InputError(
            f"{name} holds files of several formats ({', '.join(formats)}); give a pattern that names one, such as "
            f"folder/*{formats[0]}"
        )
    if formats[0] in (".csv", ".tsv") or (formats[0] == ".txt" and layout.delimiter):
        return Files(name, files, layout)
    return Files(name, files)


def _read_text(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    where = f"{path}, line"
    for number, line in read_lines(path):
        yield Row(where, number, (line,))


def _jsonl_header(path: Path) -> tuple[str, ...]:
    """The keys of the first objects: the first alone may lack some, which would never be read."""
    names: dict[str, None] = {}
    for _, row in islice(_objects(path), _FIRST):
        names |= dict.fromkeys(row)
        if len(names) > WIDEST:
            raise InputError(f"{path} has objects of {len(names):,} keys; expected {WIDEST:,} at most")
    return tuple(names)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file, one per line, with the line's number."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error}); expected an object of sentences") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise InputError(f"{path}, line {number} is a JSON {kind}; expected an object of sentences")
        yield number, row


def _read_jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    where = f"{path}, line"
    for number, row in _objects(path):
        if not row:
            raise InputError(f"{where} {number} is an empty object; expected an object of sentences")
        if absent := [name for name in columns if name not in row]:
            there = some(row)
            raise InputError(
                f"{where} {number} has no text in column {some(absent)}; its columns are {there}: "
                "give each line all columns, with null where a text is missing, or name others"
            )
        yield Row(where, number, tuple(row[name] for name in columns))


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        content = file.read(_PACKED + 1)
    if len(content) > _PACKED:
        raise InputError(f"{path} unpacks to more than {_PACKED:,} bytes: unpack it with gunzip")
    return content


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.BufferReader(_unpacked(path)) if is_packed(path) else path
        yield pyarrow.parquet.ParquetFile(source)
    except InputError:
        raise
    except Exception as error:  # Arrow's own, those of gzip, and Python's for values that it lacks, such as the year 0
        raise InputError(f"{path} is not a readable parquet file ({reason(error)}): write it again") from error


def _parquet_header(path: Path) -> tuple[str, ...]:
    with _open_parquet(path) as table:
        return tuple(table.schema_arrow.names)


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    where, number = f"{path}, row", 0
    with _open_parquet(path) as table:
        check_columns(str(path), tuple(table.schema_arrow.names), columns)
        for batch in table.iter_batches(_BATCH, columns=list(dict.fromkeys(columns))):
            for row in batch.to_pylist():
                number += 1
                yield Row(where, number, tuple(row[name] for name in columns))
