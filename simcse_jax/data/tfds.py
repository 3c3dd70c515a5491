"""Data sets of TensorFlow Datasets, prepared as ArrayRecord files, which do not need TensorFlow."""

import importlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from simcse_jax.data.reading import digest
from simcse_jax.data.rows import Row, check_columns
from simcse_jax.errors import InputError, reason
from simcse_jax.pretrained.folders import HUB_TIMEOUT
from simcse_jax.runtime.processes import same_version

PREFIX = "tfds:"
_NAME = re.compile(r"tfds:(\w+)(?:/([\w.-]+))?(?::(\d+\.\d+\.\d+))?")


@dataclass(frozen=True)
class TfdsData:
    """A split of a prepared data set.

    Attributes:
      name: the name that the user gave.
      split: split, or a part of one in TFDS's terms, such as train[:10%].
      builder: the builder from tensorflow_datasets.
    """

    name: str
    split: str
    builder: Any

    def identity(self) -> list[Any]:
        """The split, and digests of its files."""
        return ["tfds", self.split, [digest(Path(path)) for path in self.builder.info.splits[self.split].filepaths]]

    def header(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(self.builder.info.features)

    def labels(self, column: str) -> tuple[str, ...]:
        """The names of a `ClassLabel`."""
        return tuple(getattr(dict(self.builder.info.features).get(column), "names", None) or ())

    def rows(self, columns: tuple[str, ...]) -> Iterator[Row]:
        """The rows in the order of the files; text is decoded, other scalars are Python's."""
        check_columns(self.name, self.header(), columns)
        where = f"{self.name}, row"
        data = self.builder.as_data_source(split=self.split)
        for number in range(len(data)):
            row = data[number]
            try:
                values = tuple(_value(row[name]) for name in columns)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{where} {number + 1} has bytes that are not UTF-8 text ({error}): name other columns"
                ) from error
            yield Row(where, number + 1, values)


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if hasattr(value, "item") and not getattr(value, "ndim", 0) else value


def open_tfds(name: str, split: str) -> TfdsData:
    """A data set by its name in TensorFlow Datasets, prepared first if necessary.

    Args:
      name: `tfds:NAME[/CONFIG][:VERSION]`; without a version, the newest prepared version, in a job that of process 0.
      split: split, or a part of one.

    Raises:
      InputError: a package is not installed, the name or split is unknown, or the data set is not prepared and cannot
        be; or see `same_version`.
    """
    return same_version(
        f"data set {name} ({split})",
        lambda version: _open(name, split, version),
        lambda data: str(data.builder.info.version),
    )


def _open(name: str, split: str, wanted: str | None) -> TfdsData:
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise InputError(
            f"'{name}' is not a name of TFDS; expected tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:1.0.0"
        )
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"{name} needs packages that are not installed ({error}): pip install tensorflow-datasets array-record"
        ) from error
    root = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    dataset, config, version = parts.groups()
    if wanted and not version:
        name, version = f"{name}:{wanted}", wanted
    folder = _prepared(root / dataset / (config or ""), version) or _prepare(name[len(PREFIX) :], dataset, root)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # whatever reading its descriptions raises
        raise InputError(
            f"{folder} is not a data set that TFDS can read ({reason(error)}): prepare it again"
        ) from error
    if builder.info.file_format.value != "array_record":
        raise InputError(
            f"{folder} is prepared as {builder.info.file_format.value}, which only TensorFlow reads: where TensorFlow "
            f"is installed, run tfds.builder('{name[len(PREFIX) :]}', file_format='array_record')"
            ".download_and_prepare()"
        )
    try:
        builder.info.splits[split]
    except Exception as error:  # of several types, for a wrong name and a wrong slice
        known = ", ".join(builder.info.splits)
        raise InputError(f"{name} has no split '{split}'; it has {known}: take one of them") from error
    return TfdsData(name, split, builder)


def _prepared(folder: Path, version: str | None) -> Path | None:
    """The folder of a version, or of the newest version there; None if there is none."""
    # A preparation that was cut off leaves 1.0.0.incompleteA1B2.
    whole = (p for p in folder.glob(version or "*.*.*") if re.fullmatch(r"\d+\.\d+\.\d+", p.name))
    found = [p for p in whole if (p / "dataset_info.json").is_file()]
    return max(found, key=lambda p: [int(n) for n in p.name.split(".")], default=None)


def _prepare(name: str, dataset: str, root: Path) -> Path:
    """Downloads and prepares a data set, and returns its folder; raises `InputError` if that fails."""
    import tensorflow_datasets as tfds

    there = sorted(p.name for p in (root / dataset).glob("[!.]*") if p.is_dir())
    hint = f"; in {root / dataset} are {', '.join(there)}" if there else ""
    missing = f"tfds:{name} is not prepared in {root}{hint}"
    elsewhere = (
        f"prepare it elsewhere (tfds.builder('{name}', file_format='array_record')"
        ".download_and_prepare()) and name the folder of data sets with TFDS_DATA_DIR"
    )
    try:
        _register(dataset)
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except Exception as error:  # a wrong name, config or version
        cause = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{missing}, nor known to TFDS ({cause}): check the name") from error
    if not _reachable(builder.url_infos or ()):
        raise InputError(f"{missing}, and there is no network to download it: {elsewhere}")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:  # of the data set's own code
        raise InputError(f"{missing}, and cannot be prepared here ({reason(error)}): {elsewhere}") from error
    return Path(builder.data_dir)


def _register(dataset: str) -> None:
    """Imports the code of a data set that TFDS does not find by itself, such as glue in its package `text`."""
    import tensorflow_datasets as tfds

    root = Path(tfds.__file__).parent
    for file in root.glob(f"*/{dataset}.py"):
        importlib.import_module(f"{tfds.__name__}.{file.parent.name}.{dataset}")


def _reachable(urls: Any) -> bool:
    """Whether any host of the URLs answers, or no URL names a host; TFDS itself would try for minutes."""
    hosts = {f"{parts.scheme}://{parts.netloc}" for parts in map(urlsplit, urls) if parts.scheme.startswith("http")}

    def answers(host: str) -> bool:
        try:
            urlopen(Request(host, method="HEAD"), timeout=HUB_TIMEOUT).close()
        except HTTPError:
            return True
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        return not hosts or any(pool.map(answers, hosts))
