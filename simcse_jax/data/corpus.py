"""Sentences from files and from data sets of the hub."""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from simcse_jax.config import DataConfig
from simcse_jax.errors import InputError, reason

Example = tuple[str, ...]
FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Corpus:
    """A source of examples of one, two or three sentences.

    Attributes:
      name: for messages: the file, or the data set.
      fingerprint: changes when the content does.
      config: where it came from.
    """

    name: str
    fingerprint: str
    config: DataConfig

    def __iter__(self) -> Iterator[Example]:
        """Examples in order, with the same number of sentences each; blank sentences are kept."""
        path = Path(self.config.train).expanduser()
        rows = _read_file(path, self.config) if path.is_file() else _read_hub(self.config)
        for number, row in _with_neighbours(rows, self.config.neighbours) if self.config.neighbours else rows:
            if not 1 <= len(row) <= 3:
                raise InputError(
                    f"{self.name}, row {number} has {len(row)} columns; expected 1 (sentence), 2 (sentence, positive) "
                    "or 3 (sentence, positive, hard negative): name the ones to use with data.columns"
                )
            yield row


def open_corpus(config: DataConfig) -> Corpus:
    """Finds the training text that a config names, without reading it.

    Raises:
      InputError: a missing file, an unknown ending, or a hub data set that cannot be had.
    """
    path = Path(config.train).expanduser()
    identity: list[Any]
    if path.is_file():
        if _format(path) not in FORMATS:
            raise InputError(f"{path} ends in '{path.suffix}'; expected {', '.join(FORMATS)}, each also with .gz")
        try:
            with path.open("rb") as file:
                identity = [_format(path), hashlib.file_digest(file, "sha256").hexdigest(), config.columns]
                identity += [config.neighbours] if config.neighbours else []
                identity += [sorted(config.where.items())] if config.where else []
        except OSError as error:
            raise InputError(f"{path} cannot be read ({reason(error)})") from error
    elif path.is_dir():
        raise InputError(f"data.train is the folder {path}; give a file")
    elif any(s in FORMATS for s in path.suffixes) or config.train.startswith((".", "/", "~")):
        raise InputError(f"no file {path} (data.train)")
    else:
        identity = ["hub", config.train, config.subset, config.split, config.columns, _load_hub(config)._fingerprint]
        identity += [config.neighbours] if config.neighbours else []
        identity += [sorted(config.where.items())] if config.where else []
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Corpus(config.train, fingerprint, config)


def read_sentences(path: Path, limit: int | None = None) -> list[str]:
    """The lines of a text file, plain or .gz; the first `limit` where that is given.

    Raises:
      InputError: no such file, not UTF-8, or empty.
    """
    if not path.expanduser().is_file():
        raise InputError(f"no file {path}")
    if _format(path) != ".txt":
        raise InputError(f"{path} ends in '{path.suffix}'; expected .txt, one sentence a line, or .txt.gz")
    sentences = [row[0] for _, row in islice(_read_file(path.expanduser(), DataConfig()), limit)]
    if not sentences:
        raise InputError(f"{path} is empty")
    return sentences


def _with_neighbours(rows: Iterable[tuple[int, Example]], reach: int) -> Iterator[tuple[int, Example]]:
    """Each sentence with one of the `reach` that follow it in its document; the last of a document has none."""
    generator = np.random.default_rng(0)
    document: list[tuple[int, str]] = []
    for number, row in chain(rows, [(0, ("",))]):
        if len(row) != 1:
            raise InputError(f"data.neighbours needs text of one sentence a row; row {number} has {len(row)}")
        if row[0].strip():
            document.append((number, row[0]))
            continue
        for i, (at, sentence) in enumerate(document[:-1]):
            step = int(generator.integers(1, min(reach, len(document) - 1 - i) + 1))
            yield at, (sentence, document[i + step][1])
        document = []


def _format(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _read_file(path: Path, config: DataConfig) -> Iterator[tuple[int, Example]]:
    """(row number, sentences) of a file; the number is the line's where the format has lines."""
    if _format(path) == ".parquet":
        yield from _read_parquet(path, config)
        return
    readers = {".txt": _read_lines, ".csv": _read_delimited, ".tsv": _read_delimited, ".jsonl": _read_jsonl}
    try:
        with _open_text(path) as file:
            yield from readers[_format(path)](path, file, config)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({_undecodable(path)}): convert it with iconv -t utf-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a complete gzip file ({error}): copy or compress it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from error


def _undecodable(path: Path) -> str:
    """Where the first bytes are that are not UTF-8; the decoder itself only knows their place in its buffer."""
    start = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {start + error.start} of the text: {error.reason}"
            start += len(line)
    return "the file has changed meanwhile"


def _open_text(path: Path) -> TextIOWrapper:
    # utf-8-sig drops the byte-order mark that Windows editors write.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_lines(path: Path, file: TextIOWrapper, config: DataConfig) -> Iterator[tuple[int, Example]]:
    if config.columns or config.where:
        raise InputError(f"{path} is plain text, one sentence a line; data.columns and data.where do not apply")
    for number, line in enumerate(file, 1):
        yield number, (line.rstrip("\r\n"),)


def _read_delimited(path: Path, file: TextIOWrapper, config: DataConfig) -> Iterator[tuple[int, Example]]:
    """CSV with standard quoting; TSV without any, as sentence files are written. The first row names the columns."""
    tabs = _format(path) == ".tsv"
    reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        picked = [header.index(name) for name in _pick(path, header, config)]
        conditions = [(header.index(name), value) for name, value in config.where.items()]
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num} has {len(row)} columns but the header has {len(header)} "
                    f"({', '.join(header)}): quote sentences that hold the delimiter"
                )
            if not row or all(row[i] == value for i, value in conditions):
                yield reader.line_num, tuple(row[i] for i in picked) if row else ("",) * len(picked)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error


def _pick(path: Path, header: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """The columns that hold sentences."""
    missing = [c for c in (*config.columns, *config.where) if c not in header]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; it has {', '.join(header)}")
    picked = config.columns or tuple(name for name in header if name not in config.where)
    if twice := next((name for name in (*picked, *config.where) if header.count(name) > 1), None):
        raise InputError(f"{path} has two columns {twice!r}: give each a name of its own")
    if not 1 <= len(picked) <= 3:
        raise InputError(
            f"{path} has {len(picked)} columns ({', '.join(picked)}); expected 1 (sentence), 2 (sentence, positive) or "
            "3 (sentence, positive, hard negative): name the ones to use with data.columns"
        )
    return picked


def _meets(row: dict[str, Any], where: dict[str, str]) -> bool:
    return all(row[name] is not None and _text(row[name]) == value for name, value in where.items())


def _text(value: Any) -> str:
    """A value as it would be written in JSON, whole numbers without a point; text as it is."""
    if isinstance(value, str):
        return value
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value, default=str)


def _read_jsonl(path: Path, file: TextIOWrapper, config: DataConfig) -> Iterator[tuple[int, Example]]:
    """One JSON object a line; the first line's keys are the columns where none are named."""
    columns: tuple[str, ...] = ()
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is a JSON {type(row).__name__}; expected an object of sentences")
        columns = columns or _pick(path, tuple(row), config)
        if absent := [name for name in config.where if name not in row]:
            raise InputError(f"{path}, line {number} has no {', '.join(absent)} (data.where); it has {', '.join(row)}")
        if _meets(row, config.where):
            yield number, _sentences(f"{path}, line {number}", row, columns)


def _sentences(where: str, row: dict[str, Any], columns: tuple[str, ...]) -> Example:
    wrong = [c for c in columns if not isinstance(row.get(c), str)]
    if wrong:
        raise InputError(f"{where} has no text in column {', '.join(wrong)}; its columns are {', '.join(row)}")
    broken = [c for c in columns if not row[c].isascii() and row[c].encode(errors="ignore").decode() != row[c]]
    if broken:
        raise InputError(f"{where} has half of a surrogate pair in column {', '.join(broken)}: not a Unicode text")
    return tuple(row[c] for c in columns)


def _read_parquet(path: Path, config: DataConfig) -> Iterator[tuple[int, Example]]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.BufferReader(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        file = pyarrow.parquet.ParquetFile(source)
        names = _pick(path, file.schema_arrow.names, config)
        number = 0
        for batch in file.iter_batches(columns=list({*names, *config.where})):
            for row in batch.to_pylist():
                number += 1
                if _meets(row, config.where):
                    yield number, _sentences(f"{path}, row {number}", row, names)
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a readable parquet file ({reason(error)}): write it again") from error


def _load_hub(config: DataConfig) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(config.train, config.subset, split=config.split)
    except Exception as error:  # datasets raises many types, from a wrong name to a lost connection
        raise InputError(
            f"'{config.train}' is no file here, and the hub does not give it as a data set "
            f"({reason(error)}): check the path or name, data.subset, data.split and the network"
        ) from error


def _read_hub(config: DataConfig) -> Iterator[tuple[int, Example]]:
    data = _load_hub(config)
    columns = _pick(Path(config.train), data.column_names, config)
    for number, row in enumerate(data, 1):
        if _meets(row, config.where):
            yield number, _sentences(f"{config.train}, row {number}", row, columns)
