"""Triplets of a premise, a hypothesis that follows from it and one that contradicts it (SimCSE, section 4.1)."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from simcse_jax.data.files import find_columns
from simcse_jax.data.rows import Source, is_null, text_of
from simcse_jax.errors import InputError, some

CLASSES = ("entailment", "neutral", "contradiction")
"""The classes in the order of their numbers, for data sets that have numbers without names."""
_COLUMNS = (("premise", "hypothesis", "label"), ("sentence1", "sentence2", "gold_label"))


@dataclass(frozen=True)
class Pair:
    """A premise and a hypothesis; the label is one of `CLASSES`, or empty where annotators did not agree."""

    premise: str
    hypothesis: str
    label: str


@dataclass
class Triplets:
    """Triplets, and counts of the pairs behind them.

    Attributes:
      rows: (premise, entailment, contradiction), in the order in which premises first appear.
      pairs: number of pairs read, by label.
      blank: number of pairs left out because a sentence is blank.
      premises: number of distinct premises.
    """

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    pairs: Counter[str] = field(default_factory=Counter)
    blank: int = 0
    premises: int = 0


def read_pairs(source: Source) -> Iterator[Pair]:
    """The labelled pairs of a source, in the formats of SNLI and MultiNLI.

    Args:
      source: rows of premise, hypothesis and label, or of sentence1, sentence2 and gold_label; the last column may
        always be called label. A label is a name, or '-' for no label; or a number, of the source's named classes or of
        `CLASSES`, or −1 for no label.

    Raises:
      InputError: other columns, or a row without text or with another label.
    """
    source, header, columns = find_columns(source, _find)
    if columns is None:
        there = "plain text" if header is None else f"the columns {some(header)}"
        raise InputError(
            f"{source.name} has {there}; expected premise, hypothesis and label, or sentence1, sentence2 and gold_label"
        )
    names = source.labels(columns[2]) or CLASSES
    known = {str(number): name for number, name in enumerate(names)} | {name: name for name in CLASSES}
    known |= dict.fromkeys(("-", "-1", ""), "")
    for where, number, (premise, hypothesis, label) in source.rows(columns):
        premise, hypothesis = ("" if is_null(text) else text for text in (premise, hypothesis))
        if not isinstance(premise, str) or not isinstance(hypothesis, str):
            raise InputError(f"{where} {number} has no text in column {' or '.join(columns[:2])}")
        name = known.get("" if is_null(label) else text_of(label) or "")
        if name is None or name not in (*CLASSES, ""):
            raise InputError(
                f"{where} {number} has the label {label!r} in column {columns[2]}; expected {', '.join(CLASSES)}, "
                "their numbers 0, 1, 2, or - or -1 for no agreement of the annotators"
            )
        yield Pair(premise.strip(), hypothesis.strip(), name)


def _find(header: tuple[str, ...]) -> tuple[str, str, str] | None:
    """The columns of premise, hypothesis and label; None where the header has none."""
    return next((found for wanted in _COLUMNS if (found := _match(header, wanted))), None)


def _match(header: tuple[str, ...], wanted: tuple[str, str, str]) -> tuple[str, str, str] | None:
    """The wanted columns; `label` may stand for the last."""
    label = wanted[2] if wanted[2] in header else "label"
    columns = (*wanted[:2], label)
    return columns if set(columns) <= set(header) else None


def build_triplets(pairs: Iterable[Pair], seed: int) -> Triplets:
    """One triplet for each distinct premise that has an entailed and a contradicting hypothesis.

    If it has several of a kind, one is drawn, as in the paper ("we only sample one as the hard negative"). A
    hypothesis that is labelled both as entailed and as a contradiction does not count as a contradiction.

    Args:
      pairs: labelled pairs from any number of sources.
      seed: the seed of the draws, which also depend on the order of the pairs.
    """
    found = Triplets()
    hypotheses: dict[str, tuple[list[str], list[str]]] = {}
    for pair in pairs:
        found.pairs[pair.label] += 1
        if not pair.premise or not pair.hypothesis:
            found.blank += 1
            continue
        entailed, contradicting = hypotheses.setdefault(pair.premise, ([], []))
        if pair.label == CLASSES[0]:
            entailed.append(pair.hypothesis)
        elif pair.label == CLASSES[2]:
            contradicting.append(pair.hypothesis)
    found.premises = len(hypotheses)
    generator = np.random.default_rng(seed)
    for premise, (entailed, contradicting) in hypotheses.items():
        negatives = [sentence for sentence in contradicting if sentence not in entailed]
        if entailed and negatives:
            positive = entailed[int(generator.integers(len(entailed)))]
            found.rows.append((premise, positive, negatives[int(generator.integers(len(negatives)))]))
    return found
