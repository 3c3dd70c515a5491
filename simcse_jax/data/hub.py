"""Data sets of the Hugging Face hub, and local copies: streamed, so that no data set is downloaded whole."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from simcse_jax.data.reading import digest
from simcse_jax.data.rows import Row, check_columns
from simcse_jax.errors import InputError, reason
from simcse_jax.pretrained.folders import HUB_TIMEOUT
from simcse_jax.runtime.processes import same_version

_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubData:
    """A data set that `datasets` reads.

    Attributes:
      name: its name on the hub, or its folder.
      version: commit on the hub, or digest of the files; both, if the files may not be all of the commit.
      subset: configuration.
      split: split.
      places: arguments for `datasets`, tried in order: (path, commit or None).
      unreachable: the error, if the hub cannot be reached.
    """

    name: str
    version: str
    subset: str | None
    split: str
    places: tuple[tuple[str, str | None], ...]
    unreachable: Exception | None = field(default=None, compare=False)

    def identity(self) -> list[Any]:
        """The version, subset and split; a commit is known without a download."""
        return ["hub", self.version, self.subset, self.split]

    def header(self) -> tuple[str, ...]:
        """Names of the columns, from the description of the data set or else from its first row."""
        with self._readable():
            return tuple(self._data.column_names or next(iter(self._data), {}))

    def labels(self, column: str) -> tuple[str, ...]:
        """The names of a `ClassLabel`."""
        return tuple(getattr((self._data.features or {}).get(column), "names", None) or ())

    def rows(self, columns: tuple[str, ...]) -> Iterator[Row]:
        """The rows, in order."""
        where = f"{self.name}, row"
        check_columns(self.name, self.header(), columns)
        with self._readable():
            for number, row in enumerate(self._data, 1):
                yield Row(where, number, tuple(row[name] for name in columns))

    @cached_property
    def _data(self) -> Any:
        from datasets import load_dataset

        # Parts of a split, such as train[:1%] or train+test, cannot be streamed.
        streaming = self.split.isidentifier()
        errors: list[Exception] = []
        for path, commit in self.places:
            if self.unreachable and path == self.name and _cached_commit(path, self.subset) != _commit_of(self.version):
                continue  # what `datasets` has prepared is of another commit, or nothing
            try:
                with _offline(self.unreachable is not None):
                    return load_dataset(path, self.subset, split=self.split, revision=commit, streaming=streaming)
            except Exception as error:  # datasets raises many types, from a wrong name to a lost connection
                errors.append(error)
        raise _unavailable(self.name, self.unreachable or errors[-1])

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # as above: streams read as they go
            raise InputError(
                f"'{self.name}' could not be read to its end ({reason(error)}): try again, from the beginning"
            ) from error


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder is a copy of a data set's repository: it then has a card with metadata, or .gitattributes."""
    card = folder / "README.md"
    if (folder / ".gitattributes").is_file():
        return True
    return card.is_file() and card.read_bytes().startswith((b"---\n", b"---\r\n"))


def open_hub_folder(folder: Path, subset: str | None, split: str) -> HubData:
    """A copy of a data set's repository in a local folder."""
    return HubData(str(folder), _digest(folder), subset, split, ((str(folder), None),))


def _files(folder: Path) -> list[Path]:
    """The files of a data set's repository, without git's."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.relative_to(folder).parts[0].startswith("."))


def _digest(folder: Path) -> str:
    content = [(str(p.relative_to(folder)), digest(p)) for p in _files(folder)]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def open_hub(name: str, subset: str | None, split: str, revision: str | None) -> HubData:
    """A data set of the hub, at its present commit or at that of `revision`; in a job, at that of process 0.

    If the hub cannot be reached, or with HF_HUB_OFFLINE=1, the data come from the caches of Hugging Face, where an
    earlier call or `datasets` itself left them. A download that may be partial does not count as the commit.

    Raises:
      InputError: no such data set, or no network and nothing in the caches; or see `same_version`.
    """
    return same_version(
        name_in_job(name, subset, split, revision),
        lambda version: _open(name, subset, split, _commit_of(version) if version else revision),
        lambda data: data.version,
    )


def name_in_job(name: str, subset: str | None, split: str, revision: str | None) -> str:
    """The name that `same_version` knows a data set by."""
    return " ".join(["data set", name, *(f"({part})" for part in (subset, split, revision) if part)])


def _open(name: str, subset: str | None, split: str, revision: str | None) -> HubData:
    from huggingface_hub import HfApi, snapshot_download

    unreachable: Exception | None = None
    try:
        # A request with a limit: `datasets` would try again for half a minute.
        commit = HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT).sha
        assert commit is not None
        # Only the card: it records the commit for times without a network, when a cache of tokens may still serve.
        snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns="README.md")
        return HubData(name, commit, subset, split, ((name, commit),))
    except Exception as error:  # the hub client raises a dozen types, from name errors to connection errors
        unreachable = error
    prepared = (name, None)
    try:
        # This pattern also finds a partial snapshot.
        found = snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns="README.md", local_files_only=True
        )
    except (OSError, ValueError):  # nothing in the cache, or a revision that cannot be one
        commit = revision if _COMMIT.fullmatch(revision or "") else _cached_commit(name, subset)
        if commit is None:
            raise _unavailable(name, unreachable) from unreachable
        return HubData(name, commit, subset, split, (prepared,), unreachable)
    folder = Path(found)
    commit = folder.name
    if _files(folder) in ([], [folder / "README.md"]):
        return HubData(name, commit, subset, split, (prepared,), unreachable)
    missing = _missing(name, folder)
    if missing:
        unreachable = FileNotFoundError(
            f"{reason(unreachable)}; the download {folder} lacks {missing[0]}, one of {len(missing)} missing files: "
            "to use it as it is, name that folder in its place"
        )
        return HubData(name, commit, subset, split, (prepared,), unreachable)
    version = commit if missing is not None else f"{commit}-{_digest(folder)}"
    return HubData(name, version, subset, split, ((str(folder), None), prepared), unreachable)


def _commit_of(version: str) -> str:
    return version.partition("-")[0]


def _missing(name: str, snapshot: Path) -> list[str] | None:
    """The files of the commit that a snapshot lacks; None where they are unknown: older clients kept no list."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # an older client
        return None
    try:
        listed = get_cached_repo_tree(name, repo_type="dataset", revision=snapshot.name)
    except (CachedRepoTreeNotFoundError, OSError, ValueError):  # no list, or one that cannot be read
        return None
    return [file.path for file in listed if not file.path.startswith(".") and not (snapshot / file.path).is_file()]


def _cached_commit(name: str, subset: str | None) -> str | None:
    """The commit of the data that `datasets` has prepared and kept; None where it has none."""
    from datasets import load_dataset_builder

    try:
        with _offline(True):
            return str(load_dataset_builder(name, subset).hash)
    except Exception:  # not prepared, for which datasets raises many types
        return None


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """A block in which `datasets` only reads its caches; it would otherwise try to reach the hub for half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _unavailable(name: str, error: Exception) -> InputError:
    return InputError(
        f"'{name}' is not a local file, nor a data set that the hub gives ({reason(error)}): check the path or "
        "name, its subset and split, and the network"
    )
