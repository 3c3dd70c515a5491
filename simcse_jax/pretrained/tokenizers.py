"""Fast tokenizers: reading them from model folders and writing them there."""

import os
from pathlib import Path
from typing import Any

from simcse_jax.errors import InputError, reason, system_error
from simcse_jax.pretrained.pooling import TRANSFORMER_FILE, lower_cases, read_object
from simcse_jax.storage.files import write_json

_TOKENIZERS = {"bert": "BertTokenizerFast", "roberta": "RobertaTokenizerFast"}
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder.

    Raises:
      InputError: the folder holds no readable tokenizer, or only a slow one.
    """
    # Without any of these transformers makes a tokenizer of special tokens only, to which all text is unknown.
    if not any((Path(folder) / name).is_file() for name in _VOCABULARIES):
        raise InputError(f"{folder} has no tokenizer: expected one of {', '.join(_VOCABULARIES)} (with merges.txt)")
    try:
        tokenizer = _tokenizer_class(Path(folder)).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many types, down to bare Exception from the Rust side
        raise InputError(f"{folder} has no readable tokenizer ({reason(error)}): copy the model again") from error
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer in {folder} has no fast form: save it as tokenizer.json")
    if lower_cases(Path(folder)):
        from tokenizers.normalizers import Lowercase, Sequence

        rules = tokenizer.backend_tokenizer
        rules.normalizer = Sequence([Lowercase(), *([rules.normalizer] if rules.normalizer else [])])
        tokenizer.lower_cases = True
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """The class that reads the tokenizer of a folder: that of its model, unless the folder names another.

    AutoTokenizer would find the same class, but loads PyTorch where it is installed and takes three times as long.
    """
    # transformers warns at import where PyTorch is absent; the tokenizer does not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    files = (folder / "tokenizer_config.json", folder / "config.json")
    about, model = (read_object(file, "") if file.is_file() else {} for file in files)
    own = _TOKENIZERS.get(model.get("model_type", ""), "AutoTokenizer")
    named = str(about.get("tokenizer_class") or model.get("tokenizer_class") or own)
    plain = "auto_map" not in about and named.removesuffix("Fast") == own.removesuffix("Fast")
    return getattr(transformers, own if plain else "AutoTokenizer")


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
