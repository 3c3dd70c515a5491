"""Augmented positives: which words stay, in which share, and that any device draws the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simcse_jax.config import DataConfig
from simcse_jax.data.augment import Augmenter, make_augmenter
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.feed import Feed
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.tokens import encode_batch, tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runtime.mesh import make_mesh

LENGTH = 24
CLS, SEP, PAD = 2, 3, 0
# Tokens from 50 on continue a word.
STARTS = np.arange(100) < 50


def augmenter(kind: str, share: float = 0.0, synonyms: dict | None = None) -> Augmenter:
    return Augmenter(kind, share, 7, STARTS, PAD, synonyms or {})


def sentences(n: int = 64) -> tuple[np.ndarray, np.ndarray, list[list[list[int]]]]:
    """Ids, lengths, and the words of each as lists of tokens: words of one to three tokens, each word once."""
    generator = np.random.default_rng(0)
    ids, lengths, words = np.full((n, LENGTH), PAD, np.int32), np.zeros(n, np.int32), []
    for row in range(n):
        count = row % 8
        starts = generator.permutation(np.arange(10, 50))[:count]
        split = [[int(s), *generator.integers(50, 100, s % 3).tolist()] for s in starts]
        tokens = [CLS, *(t for word in split for t in word), SEP]
        if len(tokens) > LENGTH:
            split, tokens = split[:3], [CLS, *(t for word in split[:3] for t in word), SEP]
        ids[row, : len(tokens)], lengths[row] = tokens, len(tokens)
        words.append(split)
    return ids, lengths, words


def words_of(ids: np.ndarray, length: int) -> list[list[int]]:
    """A sentence cut at what begins a word, between its specials."""
    assert (ids[0], ids[length - 1]) == (CLS, SEP)
    assert not np.any(ids[length:])
    words: list[list[int]] = []
    for token in ids[1 : length - 1].tolist():
        if STARTS[token]:
            words.append([])
        words[-1].append(token)
    return words


def augmented(made: Augmenter, step: int = 0) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Words before and after."""
    ids, lengths, words = sentences()
    before = ids.copy()
    new, counts = made(ids, lengths, made.draws(step, len(ids), LENGTH))
    np.testing.assert_array_equal(ids, before)
    assert new.dtype == ids.dtype
    return [(w, words_of(row, n)) for w, row, n in zip(words, new, counts, strict=True)]


def is_subsequence(part: list[list[int]], whole: list[list[int]]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_crop_keeps_a_span(share: float) -> None:
    starts = set()
    for before, after in augmented(augmenter("crop", share)):
        kept = len(before) - round(share * len(before))
        assert len(after) == max(kept, min(len(before), 1))
        where = [i for i in range(len(before) + 1) if before[i : i + len(after)] == after]
        assert where
        starts |= {where[0]}
    assert len(starts) > 1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_deletion_drops_its_share_of_words(share: float) -> None:
    gone = set()
    for before, after in augmented(augmenter("delete_words", share)):
        assert len(after) == max(len(before) - round(share * len(before)), min(len(before), 1))
        assert is_subsequence(after, before)
        gone |= {i for i, word in enumerate(before) if word not in after}
    assert len(gone) > 3


def test_one_word_goes_unless_it_is_the_only_one() -> None:
    for before, after in augmented(augmenter("delete_word")):
        assert len(after) == (len(before) - 1 if len(before) > 1 else len(before))
        assert is_subsequence(after, before)


def test_a_synonym_replaces_one_word() -> None:
    synonyms = {(12,): [(13,), (14, 60)], (20, 55): [(21,)]}
    ids = np.array([[CLS, 12, 30, SEP], [CLS, 30, 31, SEP], [CLS, 30, 12, SEP]], np.int32)
    made = augmenter("synonyms", synonyms=synonyms)
    seen = set()
    for step in range(20):
        new, lengths = made(ids, np.full(3, 4), made.draws(step, 3, 4))
        # The longer synonym does not fit in four tokens: the sentence stays as it was.
        assert new.tolist() in ([ids[0].tolist(), ids[1].tolist(), ids[2].tolist()],) or lengths.tolist() == [4, 4, 4]
        assert new[1].tolist() == ids[1].tolist()
        seen |= {tuple(new[0].tolist())}
    assert seen == {(CLS, 12, 30, SEP), (CLS, 13, 30, SEP)}
    wide = np.pad(ids, ((0, 0), (0, 1)))
    grown = {tuple(made(wide, np.full(3, 4), made.draws(s, 3, 5))[0][2].tolist()) for s in range(20)}
    assert grown == {(CLS, 30, 13, SEP, PAD), (CLS, 30, 14, 60, SEP)}


def test_draws_belong_to_step_and_row(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    """Any part of a global batch, in any order, is what the whole holds; another step or seed draws anew."""
    tokenizer = load_tokenizer(tiny_bert)
    config = DataConfig(train=str(text_file), augment="delete_words", augment_share=0.4)
    table = tokenize_corpus(open_corpus(config), tokenizer, 20, tmp_path, progress=False)
    order, made = EpochOrder(len(table), 16, 0), make_augmenter(config, tokenizer, 0)
    whole = Feed(table, order, make_mesh(), made).rows(3, slice(0, 16))
    part = Feed(table, order, make_mesh(), made).rows(3, slice(4, 8))
    assert whole.input_ids.shape == (16, 2, 20)
    np.testing.assert_array_equal(part.input_ids, whole.input_ids[4:8])
    np.testing.assert_array_equal(
        whole.input_ids[:, 0], Feed(table, order, make_mesh()).rows(3, slice(0, 16)).input_ids[:, 0]
    )
    other = Feed(table, order, make_mesh(), make_augmenter(config, tokenizer, 1)).rows(3, slice(0, 16))
    assert np.any(other.input_ids != whole.input_ids)
    assert np.any(made.draws(4, 16, 20) != made.draws(3, 16, 20))


def test_words_of_a_real_tokenizer(minilm: Path, tmp_path: Path) -> None:
    """No word is cut, and synonyms are found in the middle of a sentence."""
    tokenizer = load_tokenizer(minilm)
    table = tmp_path / "synonyms.tsv"
    table.write_text("unbelievable\tincredible\tastonishing\nman\tfellow\n")
    ids = encode_batch(tokenizer, ["an unbelievable man ate embeddings"], 32)
    padded, length = np.array([ids[0] + [0] * (32 - len(ids[0]))], np.int32), np.array([len(ids[0])])
    made = make_augmenter(DataConfig(augment="synonyms", synonyms=str(table)), tokenizer, 0)
    texts = {
        tokenizer.decode(made(padded, length, made.draws(s, 1, 32))[0][0], skip_special_tokens=True) for s in range(30)
    }
    assert texts == {
        "an incredible man ate embeddings",
        "an astonishing man ate embeddings",
        "an unbelievable fellow ate embeddings",
    }
    shorter = make_augmenter(DataConfig(augment="delete_word"), tokenizer, 0)
    texts = {
        tokenizer.decode(shorter(padded, length, shorter.draws(s, 1, 32))[0][0], skip_special_tokens=True)
        for s in range(50)
    }
    assert texts == {
        "unbelievable man ate embeddings",
        "an man ate embeddings",
        "an unbelievable ate embeddings",
        "an unbelievable man embeddings",
        "an unbelievable man ate",
    }


@pytest.mark.parametrize("content", ["", "word\n", "a\tb\nlonely\n", "a\tb\t\n", None])
def test_tables_that_are_none(content: str | None, minilm: Path, tmp_path: Path) -> None:
    table = tmp_path / "synonyms.tsv"
    if content is not None:
        table.write_text(content)
    with pytest.raises(InputError, match="synonym"):
        make_augmenter(DataConfig(augment="synonyms", synonyms=str(table)), load_tokenizer(minilm), 0)


def test_neighbours_are_of_the_same_document(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a1\na2\na3\na4\na5\n\nb1\nb2\n\n\nc1\n")
    config = DataConfig(train=str(text), neighbours=1)
    following = [("a1", "a2"), ("a2", "a3"), ("a3", "a4"), ("a4", "a5"), ("b1", "b2")]
    assert list(open_corpus(config)) == following
    three = list(open_corpus(replace(config, neighbours=3)))
    assert [first for first, _ in three] == [first for first, _ in following]
    assert all(a[0] == b[0] and 1 <= int(b[1]) - int(a[1]) <= 3 for a, b in three)
    assert three == list(open_corpus(replace(config, neighbours=3)))
    assert len({open_corpus(replace(config, neighbours=n)).fingerprint for n in (0, 1, 3)}) == 3
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a,b\nx,y\n")
    with pytest.raises(InputError, match="one sentence per row"):
        list(open_corpus(DataConfig(train=str(pairs), neighbours=1)))
