"""The order of examples: batches in which no text occurs twice, and epochs that several threads ask for."""

import threading
from collections import Counter

import numpy as np
import pytest

from simcse_jax.data.distinct import _Batches, distinct_batches
from simcse_jax.data.order import EpochOrder


def test_no_text_occurs_twice_in_a_distinct_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simcse_jax.data.distinct._AT_ONCE", 10)
    generator = np.random.default_rng(0)
    texts = generator.integers(0, 60, size=(103, 2)).astype(np.uint64)
    order = EpochOrder(103, 8, 3, texts)
    for epoch in (0, 1):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.examples(step) for step in steps]
        for step, batch in zip(steps, batches, strict=True):
            assert order.size(step) == len(batch) > 0
            assert max(Counter(text for row in texts[batch].tolist() for text in set(row)).values()) == 1
        seen = np.concatenate(batches)
        assert len(np.unique(seen)) == len(seen) > 90
        # Any step, asked for alone, gives the same.
        for step, batch in zip(steps, batches, strict=True):
            np.testing.assert_array_equal(EpochOrder(103, 8, 3, texts).examples(step), batch)
    # Each example, in the order of the permutation, is in the first batch that has room and none of its texts.
    expected: list[list[int]] = [[] for _ in range(order.steps_per_epoch)]
    plain = EpochOrder(103, 8, 3)
    for example in np.concatenate([plain.examples(step) for step in range(plain.steps_per_epoch)]):
        fits = (b for b in expected if len(b) < 8 and set(texts[example]).isdisjoint(texts[b].ravel().tolist()))
        next(fits, []).append(int(example))
    assert [order.examples(step).tolist() for step in range(order.steps_per_epoch)] == expected
    # Where no text occurs twice the order is the plain one.
    apart = np.arange(206, dtype=np.uint64).reshape(103, 2)
    for step in range(14):
        np.testing.assert_array_equal(EpochOrder(103, 8, 3, apart).examples(step), EpochOrder(103, 8, 3).examples(step))


def one_by_one(permutation: np.ndarray, texts: np.ndarray, most: int) -> list[list[int]]:
    """The definition of `distinct_batches`."""
    batches: list[list[int]] = [[] for _ in range(-(-len(permutation) // most))]
    seen: list[set[int]] = [set() for _ in batches]
    for example in permutation.tolist():
        own = texts[example].tolist()
        for batch, held in zip(batches, seen, strict=True):
            if len(batch) < most and held.isdisjoint(own):
                batch.append(example)
                held.update(own)
                break
    return batches


@pytest.mark.parametrize("seed", range(4))
def test_distinct_batches_are_those_of_the_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever share of the texts are copies, and however many examples are looked at together."""
    generator = np.random.default_rng(seed)
    for _ in range(60):
        n, columns, most = (int(generator.integers(1, high)) for high in (300, 4, 50))
        monkeypatch.setattr("simcse_jax.data.distinct._AT_ONCE", int(generator.choice([1, 3, 10, 64, 1000])))
        texts = generator.integers(0, generator.choice([2, 20, 100, 10**6]), size=(n, columns)).astype(np.uint64)
        texts[generator.random(texts.shape) < generator.choice([0.0, 0.1, 0.7])] = 7
        permutation = generator.permutation(n).astype(np.int32)
        examples, sizes = distinct_batches(permutation, texts, most)
        expected = one_by_one(permutation, texts, most)
        found = [row[:size].tolist() for row, size in zip(examples.reshape(-1, most), sizes, strict=True)]
        assert found == expected
        assert examples.dtype == permutation.dtype


def test_many_copies_of_one_text_are_placed_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy goes into the first batch that has none, without a look at those before it."""
    looks: list[int] = []
    takes = _Batches._takes
    monkeypatch.setattr(_Batches, "_takes", lambda self, batch, own: looks.append(batch) or takes(self, batch, own))
    n, copies, most = 6000, 2000, 2
    texts = np.arange(1, n + 1, dtype=np.uint64)[:, None]
    texts[:copies] = 0
    examples, sizes = distinct_batches(np.arange(n), texts, most)
    assert sizes.tolist() == [2] * (n // 2)
    assert examples.reshape(-1, 2)[:copies, 0].tolist() == list(range(copies))
    assert len(looks) < 5 * copies


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("batch_size", [16, 203])
def test_an_epoch_is_drawn_once(batch_size: int, distinct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread loads batches ahead into the next epochs, and others ask for the last steps of this one."""
    drawn: list[int] = []
    draw = EpochOrder._drawn
    monkeypatch.setattr(EpochOrder, "_drawn", lambda self, epoch: (drawn.append(epoch), draw(self, epoch))[1])
    texts = np.arange(203, dtype=np.uint64)[:, None]
    order = EpochOrder(203, batch_size, 3, texts if distinct else None)
    steps, wrong = 4 * order.steps_per_epoch, list[int]()
    reference = [EpochOrder(203, batch_size, 3).examples(step) for step in range(steps + 3)]
    drawn.clear()
    barrier = threading.Barrier(3)

    def reader(ahead: int) -> None:
        for step in range(steps):
            barrier.wait(10)
            wrong.extend([step] * (not np.array_equal(order.examples(step + ahead), reference[step + ahead])))
            wrong.extend([step] * (order.size(step) != len(reference[step])))

    threads = [threading.Thread(target=reader, args=(ahead,)) for ahead in (0, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(drawn) == list(range((steps + 2) // order.steps_per_epoch + 1))


def test_an_epoch_is_kept_no_longer_than_it_is_used() -> None:
    """At 100 M examples each takes 0.4 GB."""
    order = EpochOrder(203, 16, 3)
    for step in range(3 * order.steps_per_epoch):
        order.examples(step)
        turn = step % order.steps_per_epoch < 4
        assert len(order._epochs) == 1 + (turn and step >= order.steps_per_epoch)
