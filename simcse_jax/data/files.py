"""Text in local files: one file, a folder of shards, or all files that a pattern names."""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from simcse_jax.data.rows import Row, check_columns
from simcse_jax.errors import InputError, reason

FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")


def format_of(path: Path) -> str:
    """The ending that names the format of a file, without .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def is_shard(path: Path) -> bool:
    """Whether a path is a shard: a file that is neither hidden nor named `_…`, as marks of completion are."""
    return path.is_file() and not path.name.startswith((".", "_"))


@dataclass(frozen=True)
class Files:
    """Files of one format, read one after the other.

    Attributes:
      name: the name that the user gave.
      paths: the files, sorted.
    """

    name: str
    paths: tuple[Path, ...]

    def identity(self) -> list[Any]:
        """Format and content of the files, without their names and folders."""
        digests = [digest(path) for path in self.paths]
        return [format_of(self.paths[0]), digests[0] if len(digests) == 1 else digests]

    def header(self) -> tuple[str, ...] | None:
        """The columns of the first file that holds any."""
        if format_of(self.paths[0]) == ".txt":
            return None
        return next((names for path in self.paths if (names := _header(path))), ())

    def labels(self, column: str) -> tuple[str, ...]:
        """An empty tuple: files hold the labels themselves."""
        return ()

    def rows(self, columns: tuple[str, ...]) -> Iterator[Row]:
        """The rows of all files; the number is the line's where the format has lines."""
        readers = {".txt": _read_lines, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
        for path in self.paths:
            yield from readers.get(format_of(path), _read_delimited)(path, columns)


def find_files(name: str, paths: list[Path]) -> Files:
    """Files of one format.

    Args:
      name: the name that the user gave, for messages.
      paths: the files found.

    Raises:
      InputError: no file, an unknown ending, or several formats.
    """
    files = tuple(sorted(paths))
    if not files:
        raise InputError(f"{name} holds no file (data.train); expected files that end in {', '.join(FORMATS)}")
    if strange := next((p for p in files if format_of(p) not in FORMATS), None):
        hint = "" if len(files) == 1 else "; to take some files of a folder, give a pattern such as folder/*.jsonl"
        known = ", ".join(FORMATS)
        raise InputError(f"{strange} ends in '{strange.suffix}'; expected {known}, each also with .gz{hint}")
    if len(formats := sorted({format_of(p) for p in files})) > 1:
        raise InputError(
            f"{name} holds files of several formats ({', '.join(formats)}); give a pattern that names one, such as "
            f"folder/*{formats[0]}"
        )
    return Files(name, files)


def digest(path: Path) -> str:
    """SHA-256 of a file's content; raises `InputError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from error


@contextmanager
def _open_text(path: Path) -> Iterator[TextIOWrapper]:
    """The text of a file; errors while it is read become an `InputError`."""
    try:
        # utf-8-sig drops the byte-order mark that Windows editors write.
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield file
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({_undecodable(path)}): convert it with iconv -t utf-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a complete gzip file ({error}): copy or compress it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from error


def _undecodable(path: Path) -> str:
    """The place of the first bytes that are not UTF-8; the decoder itself only knows their place in its buffer."""
    start = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {start + error.start} of the text: {error.reason}"
            start += len(line)
    return "the file has changed in the meantime"


def _header(path: Path) -> tuple[str, ...]:
    """The columns of a file; for .jsonl the keys of its first object that has any."""
    if format_of(path) == ".parquet":
        with _open_parquet(path) as table:
            return tuple(table.schema_arrow.names)
    if format_of(path) == ".jsonl":
        return next((tuple(row) for _, row in _objects(path) if row), ())
    with _open_text(path) as file, _csv_errors(path, reader := _reader(path, file)):
        return tuple(next(reader, ()))


def _read_lines(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    where = f"{path}, line"
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            yield Row(where, number, (line.rstrip("\r\n"),))


def _reader(path: Path, file: TextIOWrapper) -> Any:
    """A reader of CSV with standard quoting, or of TSV without quoting, which sentence files do not use."""
    tabs = format_of(path) == ".tsv"
    return csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)


@contextmanager
def _csv_errors(path: Path, reader: Any) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error


def _read_delimited(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a CSV or TSV file, whose first row names the columns."""
    where = f"{path}, line"
    with _open_text(path) as file, _csv_errors(path, reader := _reader(path, file)):
        header = tuple(next(reader, ()))
        if not header:
            return
        check_columns(str(path), header, columns)
        places = [header.index(name) for name in columns]
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{where} {reader.line_num} has {len(row)} columns but the header has {len(header)} "
                    f"({', '.join(header)}): quote sentences that hold the delimiter"
                )
            yield Row(where, reader.line_num, tuple(row[i] for i in places) if row else ("",) * len(places))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file, one per line, with the line's number."""
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON ({error})") from error
            except RecursionError as error:
                raise InputError(
                    f"{path}, line {number} is nested too deeply; expected an object of sentences"
                ) from error
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
            there = ", ".join(row)
            raise InputError(f"{where} {number} has no text in column {', '.join(absent)}; its columns are {there}")
        yield Row(where, number, tuple(row[name] for name in columns))


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.BufferReader(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        yield pyarrow.parquet.ParquetFile(source)
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a readable parquet file ({reason(error)}): write it again") from error


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    where, number = f"{path}, row", 0
    with _open_parquet(path) as table:
        check_columns(str(path), tuple(table.schema_arrow.names), columns)
        for batch in table.iter_batches(columns=list(dict.fromkeys(columns))):
            for row in batch.to_pylist():
                number += 1
                yield Row(where, number, tuple(row[name] for name in columns))
