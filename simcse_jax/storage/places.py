"""Files at places that may be local or on gs://, where they are read as `epath.Path`s."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax

from simcse_jax.errors import InputError, limit, reason, room
from simcse_jax.storage.files import is_remote

Place: TypeAlias = Path | Any
"""A local path, or the `epath.Path` of a file or folder on gs:// (`objects.native_place`)."""


class StoreError(InputError):
    """A store that cannot be reached, read or written, or a file that cannot be opened for now: no fault of either."""


@contextmanager
def reached(place: str | Place) -> Iterator[None]:
    """Turns the exceptions of a store's package, but for `FileNotFoundError`, into `StoreError`.

    Of local errors, it does so with those of the system's limits, such as too many open files.
    """
    try:
        yield
    except (InputError, FileNotFoundError, jax.errors.JaxRuntimeError):  # the last of another process that is lost
        raise
    except Exception as error:  # dozens of types, from missing credentials to lost connections
        if not is_remote(place):
            if advice := limit(error):
                raise StoreError(f"{place} cannot be opened ({reason(error)}): {advice}") from error
            raise
        space = room(error)
        advice = f"{space} on the local disk" if space else "check the name, credentials and network"
        raise StoreError(f"{place} cannot be read or written ({reason(error)}): {advice}") from error
