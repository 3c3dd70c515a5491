"""The batches of a run, loaded and brought to the devices ahead of time."""

import math
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from simcse_jax.data.augment import Augmenter
from simcse_jax.data.batch import Batch, Packing
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.packing import first_fit, pack
from simcse_jax.data.table import TokenTable
from simcse_jax.runtime.mesh import put_batch

_READ = 2**16  # examples whose texts are read at a time
_FITTED = 2**24  # elements of the table of free room while rows are fitted


def order_of(table: TokenTable, batch_size: int, seed: int, distinct: bool) -> EpochOrder:
    """The order of a table's examples; for `distinct` see `DataConfig`."""
    texts = None
    if distinct:
        parts = (np.arange(i, min(i + _READ, len(table))) for i in range(0, len(table), _READ))
        texts = np.concatenate([table.texts(part).view(np.uint64)[..., 0] for part in parts])
    return EpochOrder(len(table), batch_size, seed, texts)


@dataclass(frozen=True)
class Feed:
    """The batches of a run: their text, order and packing, and the devices that take them."""

    table: TokenTable
    """The tokenised text."""
    order: EpochOrder
    mesh: Mesh
    augmenter: Augmenter | None = None
    """Makes the positive from the sentence; None where the text holds it, or it is the sentence itself."""
    packing: Packing | None = None
    """The shape of packed rows; None where a row is a sentence."""
    compares: bool = False
    """Whether batches have the ids of their texts."""
    guide: Callable[[Batch], Batch] | None = None
    """Adds the guide's vectors to a batch on the devices."""

    @property
    def columns(self) -> int:
        """C, sentences of each example."""
        return 2 if self.augmenter else self.table.columns

    @property
    def fingerprint(self) -> str:
        """A digest of the text and its augmentation: runs with the same fingerprint see the same examples."""
        return self.table.fingerprint + (self.augmenter.fingerprint if self.augmenter else "")

    def packed(self, length: int, steps: int) -> "Feed":
        """The same feed with sentences packed into rows of `length` tokens, as many rows as the fullest of `steps`
        batches needs."""
        return replace(self, packing=fit_packing(self.table, self.order, self.mesh.size, steps, length, self.augmenter))

    def rows(self, step: int, rows: slice) -> Batch:
        """Rows of the global batch of a step, on the host.

        Rows behind the end of an epoch repeat its examples and are not valid. With an augmenter, examples of one
        sentence get its augmented form as their positive. With a packing, `rows` are the examples of one device.
        """
        table, order = self.table, self.order
        wanted = np.arange(*rows.indices(order.batch_size))
        valid = wanted < len(order.examples(step))
        examples = order.filled(step)[wanted]
        ids, lengths = table.rows(examples)
        present, texts = table.present(examples), table.texts(examples) if self.compares else None
        reserved = lengths
        if self.augmenter is not None:
            draws = self.augmenter.draws(step, order.batch_size, ids.shape[2])[wanted]
            positive, count = self.augmenter(ids[:, 0], lengths[:, 0], draws)
            # Rows are chosen by the lengths that the run was fitted to, whatever augmentation does to them.
            reserved = np.repeat(lengths, 2, axis=1)
            if self.augmenter.lengthens:
                reserved[:, 1] = table.max_length
            ids, lengths = np.stack([ids[:, 0], positive], axis=1), np.stack([lengths[:, 0], count], axis=1)
        if self.packing is None:
            return Batch(ids, lengths[:, :, None], valid, None, present, texts)
        packed, sizes, places = pack(ids, lengths, reserved, self.packing, table.pad_id)
        return Batch(packed, sizes, valid, places, present, texts)

    def batch(self, step: int) -> Batch:
        """The global batch of a step, on the devices."""
        return self._guided(self._placed(step))

    def _placed(self, step: int) -> Batch:
        batch: Batch = put_batch(self.mesh, self.order.batch_size, lambda rows: self.rows(step, rows))
        return batch

    def _guided(self, batch: Batch) -> Batch:
        return batch if self.guide is None else self.guide(batch)

    def batches(self, start: int, stop: int, ahead: int = 2) -> Generator[Batch, None, None]:
        """Global batches of steps start..stop-1 on the devices, loaded `ahead` steps early by a thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            queue: deque[Future[Batch]] = deque()
            try:
                for step in range(start, stop):
                    queue.append(pool.submit(self._placed, step))
                    if len(queue) > ahead:
                        # The guide is run by the thread of the steps, so that all processes run programs in one order.
                        yield self._guided(queue.popleft().result())
                while queue:
                    yield self._guided(queue.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)


def fit_packing(
    table: TokenTable, order: EpochOrder, devices: int, steps: int, length: int, augmenter: Augmenter | None = None
) -> Packing:
    """The shape of rows of `length` tokens that holds every batch of a run, with each of `devices` packed on its own.

    A device with few sentences has shorter rows: no longer than its sentences could fill.
    """
    share = order.batch_size // devices
    mean = table.mean_length
    slots = max(1, min(share, math.ceil(1.5 * length / mean)))
    length = min(length, slots * table.max_length)
    rows = -(-share // min(slots, length // table.max_length)) if augmenter and augmenter.lengthens else 1
    at_once = max(1, _FITTED // (devices * share**2))
    for start in range(0, steps, at_once):
        chosen = [order.filled(step) for step in range(start, min(start + at_once, steps))]
        _, lengths = table.spans(np.concatenate(chosen).reshape(-1, share))
        for column in range(table.columns):
            rows = max(rows, int(first_fit(lengths[..., column], length, slots)[0].max()) + 1)
    return Packing(length, slots, rows)
