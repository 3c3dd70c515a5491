"""Text tokenised once, kept on disk as flat arrays and read through memory maps."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from simcse_jax.config.values import shown
from simcse_jax.data.columns import MOST
from simcse_jax.data.corpus import Corpus
from simcse_jax.data.reading import few
from simcse_jax.data.rows import Example
from simcse_jax.data.table import TokenTable
from simcse_jax.data.token_cache import FORMAT, TokenCache
from simcse_jax.data.token_files import complete, dtype_of, report_share, reports
from simcse_jax.data.token_store import TokenStore, check_cache
from simcse_jax.errors import InputError, some
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.pretrained.tokenizers import encodings, largest_id
from simcse_jax.reports.progress import progress_bar
from simcse_jax.runtime.provenance import software
from simcse_jax.storage.files import is_remote, local_cache
from simcse_jax.storage.objects import url_of

_IDENTITY = 1  # in the fingerprint, which runs keep: raise it when the same text gives other tokens
_CHUNK = 8192
_FAIR = 1.1  # times the mean work of a process


def pad(
    sentences: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
    """Token lists as one array of `length` columns, and their lengths."""
    ids = np.full((len(sentences), length), pad_id, np.int32)
    for row, tokens in zip(ids, sentences, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.array([len(tokens) for tokens in sentences], np.int32)


def encode_batch(tokenizer: Any, sentences: list[str], max_length: int) -> list[list[int]]:
    """Token ids of each sentence, specials included, cut to `max_length`.

    The result is that of calling the tokenizer. That takes half as long again, because it also records where in the
    text each token was, and it sets the length for every thread that shares the tokenizer.
    """
    return encode_counted(tokenizer, sentences, max_length)[0]


def encode_counted(tokenizer: Any, sentences: list[str], max_length: int) -> tuple[list[list[int]], list[int]]:
    """`encode_batch`, and the number of tokens of each sentence before the cut."""
    found = encodings(tokenizer, sentences)
    ids = [next(_pieces(encoding, max_length, tokenizer.truncation_side)) for encoding in found]
    return ids, [len(encoding) for encoding in found]


def encode_windows(tokenizer: Any, sentences: list[str], max_length: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of each window of at most `max_length` tokens, specials included, and the number of its sentence.

    The windows of a sentence do not overlap; they stand one after the other.
    """
    windows: list[list[int]] = []
    numbers: list[int] = []
    for number, encoding in enumerate(encodings(tokenizer, sentences)):
        for piece in _pieces(encoding, max_length, tokenizer.truncation_side):
            windows.append(piece)
            numbers.append(number)
    return windows, numbers


def _pieces(encoding: Any, max_length: int, side: str) -> Iterator[list[int]]:
    """The token ids of a sentence in pieces of at most `max_length`, each with the special tokens.

    As a tokenizer's truncation does, the pieces begin at the start of the text, or at its end if `side` is "left".
    """
    ids: list[int] = encoding.ids
    if len(ids) <= max_length:
        yield ids
        return
    special: list[int] = encoding.special_tokens_mask  # 0 for the text's tokens, also where it spells a special one
    if sum(special) >= max_length:
        raise InputError(
            f"the tokenizer adds {sum(special):,} special tokens to a sentence, which leaves it no room in max_length "
            f"({max_length}): correct the template in its tokenizer.json"
        )
    first, last = special.index(0), len(ids) - special[::-1].index(0)
    step = max_length - (first + len(ids) - last)
    for at in range(first, last, step):
        start, stop = (at, at + step) if side == "right" else (first + last - at - step, first + last - at)
        yield ids[:first] + ids[max(start, first) : min(stop, last)] + ids[last:]


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The properties of a tokenizer that masking needs.

    Args:
      tokenizer: a Hugging Face tokenizer.
      size: rows of the encoder's word embeddings.

    Raises:
      InputError: the tokenizer has no [MASK], or the encoder has no row for it.
    """
    mask = tokenizer.mask_token_id
    if mask is None or mask >= size:
        problem = "has no mask token" if mask is None else f"has its mask token at {mask}"
        raise InputError(
            f"a masked language model needs a mask token below the {size} words of the encoder, but the tokenizer "
            f"{problem}: use another model, or set objective.mlm.weight to 0"
        )
    return Vocabulary(mask, tuple(sorted(tokenizer.all_special_ids)), min(len(tokenizer), size))


def tokenize_corpus(corpus: Corpus, tokenizer: Any, max_length: int, cache: str | Path, progress: bool) -> TokenTable:
    """Tokenises a corpus, or opens the result of an earlier call.

    All processes of a job call it. Those that share the cache tokenise a share each. Examples with a blank sentence are
    left out.

    Args:
      corpus: the text.
      tokenizer: a fast Hugging Face tokenizer.
      max_length: most tokens per sentence, specials included.
      cache: folder that holds one folder per (text, tokenizer, length), or a place on gs:// for such folders. What is
        there is used in a copy, in the usual folder for caches.
      progress: show a progress bar.

    Raises:
      InputError: no sentence at all, a row that cannot be read, or a cache that cannot be written.
    """
    check_cache(cache)
    identity = [_IDENTITY, corpus.fingerprint, behaviour_of(tokenizer), max_length]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = f"tokens-{FORMAT}-{fingerprint}"
    store = TokenStore(f"{url_of(cache)}/{name}") if is_remote(cache) else None
    return TokenCache(local_cache(cache) / name, fingerprint, tokenizer, max_length, store).open(
        partial(_write_share, corpus, tokenizer, max_length, progress),
        partial(_finish, corpus, tokenizer, max_length),
    )


def is_complete(example: Example) -> bool:
    """Whether sentence and positive are there: a `TokenTable` leaves out other examples. A hard negative may lack."""
    return all(sentence.strip() for sentence in example[:2])


def behaviour_of(tokenizer: Any) -> dict[str, Any]:
    """All that the result of `encode_batch` follows from, besides text and length.

    Settings at their defaults are left out: the fingerprints of runs that exist rest on the rules alone.
    """
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    behaviour = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    if tokenizer.truncation_side != "right":
        behaviour["truncation_side"] = tokenizer.truncation_side
    if tokenizer.split_special_tokens:
        behaviour["split_special_tokens"] = True
    return behaviour


def _write_share(
    corpus: Corpus, tokenizer: Any, max_length: int, progress: bool, folder: Path, share: int, shares: int
) -> None:
    """Tokenises one of `shares` shares of a corpus into files of its own."""
    dtype = dtype_of(largest_id(tokenizer))
    columns, skipped, total, sentences = 0, 0, 0, 0
    blank = np.zeros(MOST, int)
    blocks: list[tuple[int, int, int]] = []
    origin: tuple[str, ...] = ()
    what = "tokenising" if shares == 1 else f"tokenising 1/{shares} of the text"
    ids_path, offsets_path, missing_path = (folder / f"{kind}-{share}.bin" for kind in ("ids", "offsets", "missing"))
    with (
        ids_path.open("wb") as ids_file,
        offsets_path.open("wb") as offsets_file,
        missing_path.open("wb") as missing_file,
        progress_bar(None, "sentences", what, shown=progress) as bar,
    ):
        offsets_file.write(np.zeros(1, np.int64).tobytes())
        for block, chunk in corpus_blocks(corpus, share, shares):
            kept = list(filter(is_complete, chunk))
            skipped += len(chunk) - len(kept)
            if not kept:
                continue
            columns = columns or len(kept[0])
            origin = origin or corpus.describe(kept[0])
            texts = [s for example in kept for s in example]
            tokens = encode_batch(tokenizer, texts, max_length)
            missing = np.array([n for n, text in enumerate(texts) if not text.strip()], np.int64)
            for n in missing:
                tokens[n] = [0]  # a token that every vocabulary has
            if not all(tokens):
                empty = texts[list(map(len, tokens)).index(0)]
                raise InputError(
                    f"{corpus.name} has a sentence without a token, {shown(empty)}: this tokenizer adds no special "
                    "tokens, so leave the sentence out"
                )
            blank += np.bincount(missing % columns, minlength=MOST)
            missing_file.write((sentences + missing).tobytes())
            sentences += len(texts)
            ends = total + np.cumsum([len(t) for t in tokens], dtype=np.int64)
            ids_file.write(np.concatenate([np.asarray(t, dtype) for t in tokens]).tobytes())
            offsets_file.write(ends.tobytes())
            blocks.append((block, len(kept), int(ends[-1]) - total))
            total = int(ends[-1])
            bar.update(len(tokens))
    if not blank.any():
        missing_path.unlink()
    about = {"columns": columns, "skipped": skipped, "blank": blank.tolist(), "origin": origin}
    report_share(folder, share, np.array(blocks, np.int64).reshape(-1, 3), about)


def corpus_blocks(corpus: Corpus, share: int, shares: int) -> Iterator[tuple[int, list[Example]]]:
    """The blocks of one of `shares` shares of a corpus, with numbers that are in their order; of some thousand examples
    each, or of fewer where these are long.

    A part of the corpus is read by one of them alone, unless their work would then be too unequal: all read the others,
    and each takes every so-manieth block. Blocks go on over neighbouring parts of the same share.
    """
    parts = corpus.parts()
    owned = zip(_owners([size for size, _ in parts], shares), (examples for _, examples in parts), strict=True)
    for number, (owner, group) in enumerate(groupby(owned, itemgetter(0))):
        if owner not in (None, share):
            continue
        for place, block in enumerate(chunked(chain.from_iterable(examples for _, examples in group))):
            if owner == share or (number + place) % shares == share:
                yield number * 2**32 + place, block


def _owners(sizes: list[int], shares: int) -> list[int | None]:
    """The share that each part goes to, the largest first, each to the share with the least; None where that would then
    have more than a fair share."""
    owners: list[int | None] = [None] * len(sizes)
    loads = [0] * shares
    for part in sorted(range(len(sizes)), key=lambda part: -sizes[part]):
        share = loads.index(min(loads))
        if loads[share] + sizes[part] <= _FAIR * sum(sizes) / shares:
            loads[share] += sizes[part]
            owners[part] = share
    return owners


def _finish(corpus: Corpus, tokenizer: Any, max_length: int, folder: Path, shares: int) -> None:
    """Completes the folder of a corpus, all shares of which are there."""
    found = reports(folder, shares)
    parts = [about for _, about in found]
    share = np.repeat(np.arange(shares), [len(blocks) for blocks, _ in found])
    blocks = np.column_stack([np.concatenate([blocks for blocks, _ in found]), share])
    skipped = sum(part["skipped"] for part in parts)
    if not len(blocks):
        raise nothing_found(corpus, skipped)
    blocks = blocks[np.argsort(blocks[:, 0])]
    columns = max(part["columns"] for part in parts)
    blank = np.sum([part["blank"] for part in parts], axis=0)[:columns]
    check_columns_hold_text(corpus, blank, int(blocks[:, 1].sum()))
    about = {
        "missing": int(blank.sum()),
        "dtype": dtype_of(largest_id(tokenizer)),
        "columns": columns,
        "pad_id": tokenizer.pad_token_id,
        "max_length": max_length,
        "skipped": skipped,
        "source": corpus.name,
        "origin": parts[blocks[0, 3]]["origin"],
        "made": software(),
    }
    complete(folder, shares, blocks[:, [3, 1, 2]], about)


def check_columns_hold_text(corpus: Corpus, missing: Int[np.ndarray, " C"], examples: int) -> None:
    """Raises `InputError` for a column of hard negatives that is blank in all of the examples."""
    if len(blank := np.flatnonzero(missing == examples)):
        name = (corpus.columns or ("1",))[blank[0]]
        raise InputError(
            f"column {name} of {corpus.name} is blank in all {examples:,} examples: name the others with data.columns"
        )


def nothing_found(corpus: Corpus, skipped: int) -> InputError:
    """The error for a corpus whose examples, `skipped` in number, are all blank."""
    wanted = ", ".join(f"{name} {value}" for name, value in corpus.config.where.items())
    if skipped:
        what = f"only blank ones ({skipped:,})"
    elif wanted:
        what = f"none: no row has {wanted} (data.where)"
    elif header := corpus.source.header():
        what = f"none: the columns are named ({some(header)}) and no row follows"
    else:
        what = "none: it is empty"
    return InputError(f"{corpus.name} holds no sentence to train on; found {what}")


def chunked(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Lists of some thousand examples each, of fewer where these are long."""
    while chunk := list(few(examples, _CHUNK, lambda example: sum(map(len, example)))):
        yield chunk
