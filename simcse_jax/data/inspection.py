"""The training text as a model will see it: counts, lengths, cut and padded tokens, repetitions, examples.

The text is streamed; memory is bounded by the longest sentence and by `Repetitions`, whatever the text's size.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from simcse_jax.config import Config
from simcse_jax.data.augment import Augmenter, make_augmenter
from simcse_jax.data.columns import MOST, kind_of, role_of
from simcse_jax.data.corpus import Corpus
from simcse_jax.data.feed import fit_packing
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.rows import Example
from simcse_jax.data.table import TokenTable
from simcse_jax.data.tokens import (
    check_columns_hold_text,
    chunked,
    encode_batch,
    encode_counted,
    is_complete,
    nothing_found,
    pad,
)
from simcse_jax.reports.progress import progress_bar

_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_SHOWN = 3  # examples
_PACKED = 128  # tokens per row, where the config does not pack
_BATCHES, _MOST = 8, 1024  # batches to which a packing is fitted, and the most sentences of each


@dataclass
class Repetitions:
    """The number of times that values occur: exact for up to `limit` distinct values, otherwise from a sample of them.

    The values are hashes. Once there are too many, only those whose last bits are 0 are kept, each with all its
    occurrences: an unbiased sample of the distinct values.
    """

    limit: int = 2**21
    values: UInt64[np.ndarray, " V"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    counts: Int[np.ndarray, " V"] = field(default_factory=lambda: np.zeros(0, np.int64))
    mask: int = 0
    _pending: list[UInt64[np.ndarray, " _"]] = field(default_factory=list)

    def add(self, hashes: UInt64[np.ndarray, " _"]) -> None:
        """Counts more values."""
        self._pending.append(hashes[hashes & np.uint64(self.mask) == 0])
        if sum(map(len, self._pending)) > self.limit // 2:
            self._merge()

    def groups(self) -> tuple[Int[np.ndarray, " G"], Int[np.ndarray, " G"]]:
        """(c, n): n distinct values occur c times, an estimate where `mask` is not 0."""
        self._merge()
        times, number = np.unique(self.counts, return_counts=True)
        return times, number * (self.mask + 1)

    def _merge(self) -> None:
        values = np.concatenate([self.values, *self._pending])
        counts = np.ones(len(values), np.int64)
        counts[: len(self.counts)] = self.counts
        self._pending = []
        self.values, at = np.unique(values, return_inverse=True)
        self.counts = np.bincount(at, weights=counts, minlength=len(self.values)).astype(np.int64)
        while len(self.values) > self.limit:
            self.mask = 2 * self.mask + 1
            kept = self.values & np.uint64(self.mask) == 0
            self.values, self.counts = self.values[kept], self.counts[kept]


@dataclass
class _Column:
    """The sentences of one column: the number of each length, before the cut, and repetitions."""

    lengths: Int[np.ndarray, " L"] = field(default_factory=lambda: np.zeros(1, np.int64))
    repetitions: Repetitions = field(default_factory=Repetitions)

    def add(self, cut: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        new = np.bincount(lengths, minlength=len(self.lengths))
        new[: len(self.lengths)] += self.lengths
        self.lengths = new
        contents = (np.asarray(ids, np.uint32).tobytes() for ids in cut)
        hashes = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
        self.repetitions.add(np.frombuffer(hashes, np.uint64))

    def report(self, max_length: int) -> dict[str, Any]:
        lengths, total = np.arange(len(self.lengths)), int(self.lengths.sum())
        tokens = int(self.lengths @ lengths)
        reached = np.cumsum(self.lengths)
        cut = int(self.lengths @ np.maximum(lengths - max_length, 0))
        times, number = self.repetitions.groups()
        return {
            "mean_length": tokens / total,
            "percentiles": {str(p): int(np.searchsorted(reached, p / 100 * total)) for p in _PERCENTILES},
            "longest": int(lengths[-1]),
            "truncated": int(self.lengths[max_length + 1 :].sum()) / total,
            "tokens_cut": cut / tokens,
            "padding": 1 - (tokens - cut) / (total * max_length),
            "repeated": float(((times - 1) * number).sum() / (times * number).sum()),
            "repetitions_exact": self.repetitions.mask == 0,
            "histogram": _histogram(self.lengths, max_length),
        }


def inspect_corpus(corpus: Corpus, config: Config, tokenizer: Any, progress: bool) -> dict[str, Any]:
    """Reads a corpus once.

    Args:
      corpus: the text.
      config: of the run; only its batch size, seed, data.max_length, data.packed_length and data.augment matter.
      tokenizer: a fast Hugging Face tokenizer.
      progress: show a progress bar.

    Returns:
      JSON values. `origin`: lines that say which column each sentence is from. `columns`: for each of sentence,
      positive and hard negative, the lengths in tokens, specials included (mean, percentiles, longest, a histogram as
      [first, last, sentences]), and the shares of truncated sentences, of cut tokens, of padding in rows of
      `max_length`, and of sentences that, once cut, have occurred before.
      `repeated_in_batch`: expected examples of a global batch whose first sentence occurs there again. `packing`: rows
      of `packed_length` that sentences of these lengths take, and the share of their tokens that is text.

    Raises:
      InputError: text that cannot be read or has no sentence.
    """
    max_length = config.data.max_length
    augmenter = make_augmenter(config.data, tokenizer, config.seed)
    columns: list[_Column] = []
    shown: list[Example] = []
    examples = skipped = 0
    blank = np.zeros(MOST, int)
    with progress_bar(None, "examples", "reading", shown=progress) as bar:
        for chunk in chunked(iter(corpus)):
            kept = list(filter(is_complete, chunk))
            skipped += len(chunk) - len(kept)
            examples += len(kept)
            shown += kept[: _SHOWN - len(shown)]
            for place in range(len(kept[0]) if kept else 0):
                if len(columns) == place:
                    columns.append(_Column())
                texts = [row[place] for row in kept if row[place].strip()]  # hard negatives may be missing
                blank[place] += len(kept) - len(texts)
                if texts:
                    columns[place].add(*encode_counted(tokenizer, texts, max_length))
            bar.update(len(chunk))
    if not columns:
        raise nothing_found(corpus, skipped)
    check_columns_hold_text(corpus, blank, examples)
    return {
        "source": corpus.name,
        "fingerprint": corpus.fingerprint,
        "origin": list(corpus.describe(shown[0])),
        "examples": examples,
        "blank": skipped,
        "batch_size": config.batch_size,
        "max_length": max_length,
        "columns": {role_of(n): column.report(max_length) for n, column in enumerate(columns)},
        "repeated_in_batch": _repeated_in_batch(*columns[0].repetitions.groups(), config.batch_size),
        "packing": _packing(columns, config),
        "shown": _show(shown, tokenizer, max_length, augmenter),
    }


def _repeated_in_batch(times: Int[np.ndarray, " G"], number: Int[np.ndarray, " G"], batch_size: int) -> float:
    """Expected number of examples of a batch that occur there more than once.

    A batch is B of N examples without replacement. If a sentence occurs c times, one of them that is in the batch is
    alone there with probability C(N − c, B − 1) / C(N − 1, B − 1).
    """
    total = int((times * number).sum())
    others = min(batch_size, total) - 1

    def log_choices(m: int) -> float:
        """log C(m, others), up to log others!, which cancels."""
        return math.lgamma(m + 1) - math.lgamma(m - others + 1) if m >= others else -math.inf

    expected = 0.0
    for c, n in zip(times.tolist(), number.tolist(), strict=True):
        if c > 1:
            alone = log_choices(total - c) - log_choices(total - 1)
            expected += n * c * (others + 1) / total * -math.expm1(alone)
    return expected


def _packing(columns: list[_Column], config: Config) -> dict[str, Any]:
    """Rows that random sentences with the lengths of the first column take."""
    max_length = config.data.max_length
    length = config.data.packed_length or max(_PACKED, max_length)
    size = min(config.batch_size, _MOST)
    counts = columns[0].lengths
    generator = np.random.default_rng(config.seed)
    drawn = generator.choice(len(counts), size * _BATCHES, p=counts / counts.sum())
    lengths = np.minimum(drawn, max_length)
    table = TokenTable(np.zeros(0, np.int64), np.concatenate([[0], np.cumsum(lengths)]), 1, 0, max_length, 0, "")
    fitted = fit_packing(table, EpochOrder(len(lengths), size, config.seed), 1, _BATCHES, length)
    tokens = fitted.rows * fitted.length
    return {
        "packed_length": fitted.length,
        "sentences": size,
        "rows": fitted.rows,
        "text": float(lengths.sum() / _BATCHES / tokens),
        "tokens": tokens / (size * max_length),
    }


def _histogram(lengths: Int[np.ndarray, " L"], max_length: int) -> list[list[int]]:
    """Bins [first, last, sentences] of one width, and a last bin for the few longest."""
    most = int(np.searchsorted(np.cumsum(lengths), 0.99 * lengths.sum()))
    width = 2 ** max(0, math.ceil(math.log2((max(most, max_length) + 1) / 12)))
    bins = [
        [first, first + width - 1, int(lengths[first : first + width].sum())] for first in range(0, most + 1, width)
    ]
    if rest := int(lengths[bins[-1][1] + 1 :].sum()):
        bins.append([bins[-1][1] + 1, len(lengths) - 1, rest])
    return bins


def _show(
    examples: list[Example], tokenizer: Any, max_length: int, augmenter: Augmenter | None
) -> list[list[dict[str, Any]]]:
    """The sentences of the first examples as tokens, with the number of cut tokens, and the augmented form of each."""
    result = []
    for example in examples:
        tokens, lengths = encode_counted(tokenizer, list(example), max_length)
        result.append(
            [
                {
                    "role": role_of(n),
                    "text": text,
                    "tokens": tokenizer.convert_ids_to_tokens(ids),
                    "cut": length - len(ids),
                }
                for n, (text, ids, length) in enumerate(zip(example, tokens, lengths, strict=True))
            ]
        )
    if augmenter:
        cut = encode_batch(tokenizer, [example[0] for example in examples], max_length)
        ids, filled = pad(cut, max_length, tokenizer.pad_token_id)
        changed, counts = augmenter(ids, filled, augmenter.draws(0, len(examples), max_length))
        for sentences, row, count in zip(result, changed, counts, strict=True):
            view = tokenizer.convert_ids_to_tokens(row[:count].tolist())
            sentences.append({"role": f"positive ({augmenter.kind})", "text": "", "tokens": view, "cut": 0})
    return result


def format_report(report: dict[str, Any]) -> str:
    """Formats a report of `inspect_corpus` for the terminal."""
    blank = f", and {report['blank']:,} with a blank sentence, which are left out" if report["blank"] else ""
    lines = [f"{report['source']}: {report['examples']:,} {kind_of(len(report['columns']))}{blank}", *report["origin"]]
    for role, column in report["columns"].items():
        spread = ", ".join(f"{p} % {n}" for p, n in column["percentiles"].items())
        about = "" if column["repetitions_exact"] else "about "
        lines += [
            "",
            f"{role}: tokens, specials included",
            f"  mean {column['mean_length']:.1f}; percentiles {spread}; longest {column['longest']:,}",
            f"  {column['truncated']:.2%} are cut to {report['max_length']} tokens and lose "
            f"{column['tokens_cut']:.2%} of all tokens; of rows of that length {column['padding']:.1%} is padding",
            f"  {about}{column['repeated']:.3%} have occurred before, as cut",
            *_bars(column["histogram"], report["max_length"]),
        ]
    packing, of = report["packing"], ", first column" if len(report["columns"]) > 1 else ""
    lines += [
        "",
        f"batch of {report['batch_size']:,}: {report['repeated_in_batch']:.3g} expected examples whose {role_of(0)} "
        "occurs there more than once",
        f"packed{of}: {packing['sentences']:,} sentences in {packing['rows']:,} rows of {packing['packed_length']}, "
        f"{packing['text']:.0%} text: {packing['tokens']:.0%} of the tokens of one sentence per row "
        "(--data.packed-length)",
    ]
    for number, sentences in enumerate(report["shown"], 1):
        lines += ["", f"example {number}"]
        for sentence in sentences:
            more = f" (+{sentence['cut']} cut)" if sentence["cut"] else ""
            lines.append(f"  {sentence['role']}: {' '.join(sentence['tokens'])}{more}")
    return "\n".join(lines)


def _bars(histogram: list[list[int]], max_length: int) -> list[str]:
    most = max(count for _, _, count in histogram)
    total = sum(count for _, _, count in histogram)
    labels = [f"{first}–{last}" if last > first else str(first) for first, last, _ in histogram]
    width = max(map(len, labels))
    return [
        f"    {label:>{width}} {'█' * round(40 * count / most)} {count / total:.1%}"
        for label, (_, _, count) in zip(labels, histogram, strict=True)
    ]
