"""One object of a store that several processes may write: on gs://, a write fails where another came between."""

from typing import Any

from simcse_jax.storage.objects import native_place, open_store, readable


class Guarded:
    """An object, read and replaced whole.

    On gs://, `write` succeeds only if the object is as it was at the last `read` or `write`. s3fs does not say what it
    replaces, so on s3:// it always succeeds.
    """

    def __init__(self, url: str) -> None:
        """Reads nothing yet.

        Args:
          url: the URL of the object.
        """
        self._store, self._path = open_store(url)
        self._object: Any = None
        self._generation: bytes | None = None
        if native_place(url):
            import tensorstore

            bucket, _, name = self._path.partition("/")
            with readable(url):
                self._object = tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket, "path": name}).result()

    def read(self) -> bytes | None:
        """The content; None where there is no such object."""
        if self._object is None:
            try:
                content: bytes = self._store.cat_file(self._path)
            except FileNotFoundError:
                return None
            return content
        found = self._object.read("").result()
        self._generation = found.stamp.generation
        return bytes(found.value) if found.state == "value" else None

    def write(self, content: bytes) -> bool:
        """Replaces the object, or makes it; False, and nothing is written, where it has changed meanwhile."""
        if self._object is None:
            self._store.pipe_file(self._path, content)
            return True
        stamp = self._object.write("", content, if_equal=self._generation).result()
        if not stamp.generation:
            return self.read() == content  # the answer to the write was lost, and it was tried again
        self._generation = stamp.generation
        return True
