"""Text tokenised once, kept on disk as flat arrays and read through memory maps."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
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
from simcse_jax.errors import InputError, reason, room, some
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.pretrained.tokenizers import encodings, largest_id
from simcse_jax.reports.progress import note, progress_bar
from simcse_jax.runtime.provenance import software
from simcse_jax.storage.files import make_folder
from simcse_jax.storage.manifest import Damage, read_manifest, verify, write_manifest

_FORMAT = 3  # in the name of a cache folder: raise it when the files below change
_IDENTITY = 1  # in the fingerprint, which runs keep: raise it when the same text gives other tokens
_CHUNK = 8192
_PARTIAL = f"partial-{socket.gethostname()}@"  # begins the names of folders that are being filled
_YOUNG = 10  # seconds in which a process has surely locked such a folder
_OLD = 24 * 3600  # seconds after which one of another host, whose locks may not be seen here, is left over
_PART = 2**20  # tokens, or sentences, that are checked at a time


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

    Examples with a blank sentence are left out.

    Args:
      corpus: the text.
      tokenizer: a fast Hugging Face tokenizer.
      max_length: most tokens per sentence, specials included.
      cache: folder that holds one folder per (text, tokenizer, length).
      progress: show a progress bar.

    Raises:
      InputError: no sentence at all, a row that cannot be read, or a cache folder that cannot be written.
    """
    identity = [_IDENTITY, corpus.fingerprint, behaviour_of(tokenizer), max_length]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = Path(cache).expanduser() / f"tokens-{_FORMAT}-{fingerprint}"
    if (table := _found(folder, fingerprint, tokenizer, max_length)) is None:
        try:
            if folder.exists():
                shutil.rmtree(folder)
            make_folder(folder.parent)
            _remove_leftovers(folder.parent)
            private = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
        except OSError as error:
            raise InputError(
                f"cannot write to the cache {folder.parent} ({reason(error)}): set data.cache to another folder"
            ) from error
        partial = private / folder.name  # unlike the folder around it, others may read it as the user's umask says
        try:
            with _locked(private, fcntl.LOCK_SH):
                partial.mkdir()
                _write(corpus, tokenizer, max_length, partial, progress)
                _publish(partial, folder)
        except OSError as error:
            advice = f"{room(error)} or set data.cache to another folder".removeprefix(" or ")
            raise InputError(f"cannot write tokens to {folder.parent} ({reason(error)}): {advice}") from error
        finally:
            shutil.rmtree(private, ignore_errors=True)
        try:
            table = _open(folder, fingerprint, tokenizer, max_length)
        except Damage as damage:
            raise InputError(
                f"the tokens just written to {folder} are damaged ({damage}): set data.cache to another disk"
            ) from damage
    return table


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


def _remove_leftovers(cache: Path) -> None:
    """Removes from a cache what killed processes have left: what no process of this host fills, or an old one."""
    for left in cache.glob("partial-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > (_YOUNG if left.name.startswith(_PARTIAL) else _OLD):
                with _locked(left, fcntl.LOCK_EX):
                    shutil.rmtree(left)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Holds a lock on a folder; where the file system has no locks, a shared one is done without."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError) if kind == fcntl.LOCK_SH else nullcontext():
            fcntl.flock(number, kind | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


def _publish(partial: Path, folder: Path) -> None:
    """Renames a finished folder into place; another process may have been first with the same content."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _found(folder: Path, fingerprint: str, tokenizer: Any, max_length: int) -> TokenTable | None:
    """The tokens in a folder; None where there are none, or damaged ones, which a line names."""
    try:
        if folder.is_dir():
            verify(folder)
            return _open(folder, fingerprint, tokenizer, max_length)
    except PermissionError as error:
        raise InputError(
            f"the token cache {folder} belongs to another user and cannot be read ({reason(error)}): have its owner "
            "make it readable (chmod -R a+rX), or set data.cache to another folder"
        ) from error
    except Damage as damage:
        note(f"the token cache {folder} is damaged ({damage}): the text is tokenised again")
    return None


def _open(folder: Path, fingerprint: str, tokenizer: Any, max_length: int) -> TokenTable:
    """The tokens in a folder that is whole; raises `Damage` where they are not what was asked for."""
    about, largest = read_manifest(folder)["about"], largest_id(tokenizer)
    dtype = _dtype(largest)
    try:
        ids = np.memmap(folder / "ids.bin", dtype=dtype, mode="r")
        offsets = np.memmap(folder / "offsets.bin", dtype=np.int64, mode="r")
        missing = np.fromfile(folder / "missing.bin", np.int64) if about["missing"] else None
        table = TokenTable(
            ids,
            offsets,
            columns=about["columns"],
            pad_id=tokenizer.pad_token_id,
            max_length=about["max_length"],
            skipped=about["skipped"],
            # Earlier versions left examples out that lack a hard negative.
            fingerprint=fingerprint if missing is None else f"{fingerprint}-missing",
            origin=tuple(about["origin"]),
            missing=missing,
        )
        asked = about["dtype"] == dtype and table.max_length == max_length and table.columns in range(1, MOST + 1)
        whole = asked and type(table.skipped) is int and all(isinstance(line, str) for line in table.origin)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damage(f"it cannot be read: {reason(error)}") from error
    if not whole or not _is_consistent(table, largest):
        raise Damage("its files do not fit one another")
    return table


def _is_consistent(table: TokenTable, largest: int) -> bool:
    """Whether the sentences lie one after the other, none too long, with tokens of the vocabulary alone."""
    offsets, ids = table.offsets, table.ids
    if (len(offsets) - 1) % table.columns or offsets[0] != 0 or offsets[-1] != len(ids):
        return False
    if (missing := table.missing) is not None and not (
        len(missing) and missing[0] >= 0 and missing[-1] < len(offsets) - 1 and np.all(np.diff(missing) > 0)
    ):
        return False
    parts = range(0, len(offsets) - 1, _PART)
    lengths = ((np.diff(part).min(), np.diff(part).max()) for part in (offsets[i : i + _PART + 1] for i in parts))
    if not all(shortest > 0 and longest <= table.max_length for shortest, longest in lengths):
        return False
    return all(ids[i : i + _PART].max() <= largest for i in range(0, len(ids), _PART))


def _dtype(largest: int) -> str:
    """The type of token ids up to the largest."""
    return "uint16" if largest < 2**16 else "uint32"


def _write(corpus: Corpus, tokenizer: Any, max_length: int, folder: Path, progress: bool) -> None:
    dtype = _dtype(largest_id(tokenizer))
    columns, skipped, total, sentences = 0, 0, 0, 0
    missing: list[int] = []
    origin: tuple[str, ...] = ()
    with (
        (folder / "ids.bin").open("wb") as ids_file,
        (folder / "offsets.bin").open("wb") as offsets_file,
        progress_bar(None, "sentences", "tokenising", shown=progress) as bar,
    ):
        offsets_file.write(np.zeros(1, np.int64).tobytes())
        for chunk in chunked(iter(corpus)):
            kept = list(filter(is_complete, chunk))
            skipped += len(chunk) - len(kept)
            if not kept:
                continue
            columns = columns or len(kept[0])
            origin = origin or corpus.describe(kept[0])
            texts = [s for example in kept for s in example]
            tokens = encode_batch(tokenizer, texts, max_length)
            for n, text in enumerate(texts):
                if not text.strip():
                    tokens[n] = [0]  # a token that every vocabulary has
                    missing.append(sentences + n)
            sentences += len(texts)
            if not all(tokens):
                empty = texts[list(map(len, tokens)).index(0)]
                raise InputError(
                    f"{corpus.name} has a sentence without a token, {shown(empty)}: this tokenizer adds no special "
                    "tokens, so leave the sentence out"
                )
            ends = total + np.cumsum([len(t) for t in tokens], dtype=np.int64)
            ids_file.write(np.concatenate([np.asarray(t, dtype) for t in tokens]).tobytes())
            offsets_file.write(ends.tobytes())
            total = int(ends[-1])
            bar.update(len(tokens))
    if not columns:
        raise nothing_found(corpus, skipped)
    if missing:
        check_columns_hold_text(
            corpus, np.bincount(np.array(missing) % columns, minlength=columns), sentences // columns
        )
        np.array(missing, np.int64).tofile(folder / "missing.bin")
    about = {
        "missing": len(missing),
        "dtype": dtype,
        "columns": columns,
        "pad_id": tokenizer.pad_token_id,
        "max_length": max_length,
        "skipped": skipped,
        "source": corpus.name,
        "origin": origin,
        "made": software(),
    }
    write_manifest(folder, about)


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
