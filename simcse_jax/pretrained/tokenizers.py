"""Fast tokenizers: reading them from model folders and writing them there."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simcse_jax.config.values import from_json
from simcse_jax.errors import InputError, reason, system_error
from simcse_jax.pretrained.pooling import TRANSFORMER_FILE, TokenizerFile, lower_cases, read_object
from simcse_jax.storage.files import inside, write_json

_TOKENIZERS = {"bert": "BertTokenizerFast", "roberta": "RobertaTokenizerFast"}
_loading = threading.Lock()  # transformers imports its parts at their first use, which fails in two threads at once
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder, without truncation and padding: whoever encodes cuts and pads the result.

    Raises:
      InputError: the folder holds no readable tokenizer, or only a slow one.
    """
    # Without any of these transformers makes a tokenizer of special tokens only, to which all text is unknown.
    if not any((Path(folder) / name).is_file() for name in _VOCABULARIES):
        raise InputError(f"{folder} has no tokenizer: expected one of {', '.join(_VOCABULARIES)} (with merges.txt)")
    for file in Path(folder).iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise InputError(f"{file} is a pipe or a device, which nothing is read from: remove it")
    with _loading, _told(f"{folder} has no readable tokenizer"):
        kind = _tokenizer_class(Path(folder))
        # Earlier releases of transformers take the paths in tokenizer_config.json where none are given.
        files = {key: Path(folder) / name for key, name in getattr(kind, "vocab_files_names", {}).items()}
        named = {key: str(file) if file.is_file() else None for key, file in files.items()}
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **named)
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer in {folder} has no fast form: save it as tokenizer.json")
    if lower_cases(Path(folder)):
        from tokenizers.normalizers import Lowercase, Sequence

        rules = tokenizer.backend_tokenizer
        rules.normalizer = Sequence([Lowercase(), *([rules.normalizer] if rules.normalizer else [])])
        tokenizer.lower_cases = True
    _check_growth(folder, tokenizer.backend_tokenizer.normalizer)
    _set_free(tokenizer.backend_tokenizer, tokenizer.split_special_tokens)
    return tokenizer


@contextmanager
def _told(problem: str) -> Iterator[None]:
    """Turns the exceptions of transformers and tokenizers, of many types, into `InputError`."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # what a panic of the Rust side is, such as that of an expression that never ends
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{problem} ({reason(error)}): copy the model again") from error


def encodings(tokenizer: Any, sentences: list[str]) -> list[Any]:
    """The encodings of sentences, specials included, neither cut nor padded.

    Raises:
      InputError: a rule of the tokenizer fails: it lacks its unknown token, say.
    """
    with _told(f"the tokenizer in {tokenizer.name_or_path} cannot encode the text"):
        found: list[Any] = free_rules(tokenizer).encode_batch_fast(sentences)
    return found


_GROWTH = 2**16


def _check_growth(folder: str | Path, normalizer: Any) -> None:
    """Raises `InputError` where replacements, one after the other, make a text more than `_GROWTH` times as long."""
    growth, open_rules = 1.0, [json.loads(normalizer.__getstate__())] if normalizer else []
    while open_rules:
        rule = open_rules.pop()
        open_rules += rule.get("normalizers", [])
        if rule["type"] == "Replace":
            new, old = len(rule["content"]), len(rule["pattern"].get("String", ""))
            growth *= max(1.0, new / old if old else new + 1)  # an expression may match between any two characters
    if growth > _GROWTH:
        raise InputError(
            f"the normalizer of the tokenizer in {folder} makes texts up to {growth:.1g} times as long; at most "
            f"{_GROWTH:,} times is read: copy the model again, from its maker"
        )


def free_rules(tokenizer: Any) -> Any:
    """The rules of a tokenizer, without truncation and padding, to be read alone: threads that share them may encode.

    They are the tokenizer's own if it is as `load_tokenizer` left it, otherwise a copy.
    """
    rules, split = tokenizer.backend_tokenizer, tokenizer.split_special_tokens
    if rules.truncation is None and rules.padding is None and rules.encode_special_tokens == split:
        return rules
    copy = type(rules).from_str(rules.to_str())
    _set_free(copy, split)
    return copy


def _set_free(rules: Any, split_special_tokens: bool) -> None:
    rules.no_truncation()
    rules.no_padding()
    rules.encode_special_tokens = split_special_tokens


def largest_id(tokenizer: Any) -> int:
    """The largest token id that a tokenizer may give.

    It may exceed the number of tokens: added tokens may leave gaps, and the template of the special tokens may have ids
    that the vocabulary lacks.
    """
    return max((*tokenizer.get_vocab().values(), *encodings(tokenizer, [""])[0].ids), default=-1)


def token_names(tokenizer: Any) -> list[str]:
    """The tokens by their ids, "" where an id has none."""
    return [name or "" for name in tokenizer.convert_ids_to_tokens(range(largest_id(tokenizer) + 1))]


_RARE = "a 𓀀"  # a hieroglyph, which needs the unknown token


def check_tokenizer(tokenizer: Any, size: int) -> None:
    """Checks a tokenizer against the `size` word embeddings of a model.

    Raises:
      InputError: an id beyond the embeddings, no padding token, another token type than 0, or a sentence that cannot be
        encoded.
    """
    name = f"the tokenizer in {tokenizer.name_or_path}"
    if (largest := largest_id(tokenizer)) >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"{name} has the token '{token}' with id {largest:,} but the model's vocabulary has {size:,} rows, 0 to "
            f"{size - 1:,}: they are not of one model, so give the tokenizer that the weights were trained with"
        )
    if tokenizer.pad_token_id is None:
        raise InputError(f"{name} has no padding token: name one as pad_token in its tokenizer_config.json")
    rare = encodings(tokenizer, [_RARE])[0]
    if "token_type_ids" in tokenizer.model_input_names and any(rare.type_ids):
        raise InputError(
            f"{name} gives single sentences a token type other than 0, which this encoder does not read: correct the "
            "template in its tokenizer.json"
        )


def _tokenizer_class(folder: Path) -> Any:
    """The class that reads the tokenizer of a folder: that of its model, unless the folder names another.

    AutoTokenizer would find the same class, but loads PyTorch where it is installed and takes three times as long.
    """
    # transformers warns at import where PyTorch is absent; the tokenizer does not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    files = (folder / "tokenizer_config.json", folder / "config.json")
    contents = [read_object(file, "") if file.is_file() else {} for file in files]
    about, model = contents
    _check_config(files[0], about)
    kinds = [from_json(TokenizerFile, x, str(file)).tokenizer_class for x, file in zip(contents, files, strict=True)]
    own = _TOKENIZERS.get(str(model.get("model_type")), "AutoTokenizer")
    named = next(filter(None, kinds), own)
    plain = "auto_map" not in about and named.removesuffix("Fast") == own.removesuffix("Fast")
    return getattr(transformers, own if plain else "AutoTokenizer")


_PARTS = ("vocab", "merges", "tokenizer_object", "gguf_file", "init_inputs")


def _check_config(file: Path, about: dict[str, Any]) -> None:
    """Raises `InputError` for a tokenizer_config.json that has transformers read a file outside of its folder."""
    if part := next((part for part in _PARTS if about.get(part)), None):
        raise InputError(f"{file} has {part}, which belongs into the tokenizer's own files: remove it there")
    names = about.get("fast_tokenizer_files") or []
    for name in names if isinstance(names, list) else [names]:
        inside(file.parent, name, file)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer, and sentence-transformers' file for lower case if the tokenizer lower-cases text first.

    Raises:
      OSError: the tokenizer cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
        if getattr(tokenizer, "lower_cases", False):
            # transformers builds a BERT's normaliser again when it reads the tokenizer.
            write_json(folder / TRANSFORMER_FILE, {"do_lower_case": True})
    except Exception as error:  # the Rust side raises a bare Exception, with the system's number in its text
        if isinstance(error, OSError) or (number := system_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number)) from error
