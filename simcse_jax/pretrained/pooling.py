"""The description of a model folder's sentence vectors: from our settings, from sentence-transformers' modules.json, or
from the name of a checkpoint of the SimCSE authors."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from simcse_jax.config import ModelConfig
from simcse_jax.config.values import FINITE, FROM_ONE, POSITIVE, from_json, shown
from simcse_jax.errors import InputError, reason
from simcse_jax.poolers import check_pooler
from simcse_jax.storage.files import inside
from simcse_jax.storage.records import parse_json, read_bounded

SETTINGS = "simcse_jax"
"""Key of config.json for the pooler settings of a model that this package saved."""

TRANSFORMER_FILE = "sentence_bert_config.json"
"""sentence-transformers' settings of the encoder."""

# sentence-transformers' names of poolers: one switch per mode until its release 5, then one word.
_POOLERS = {"mean": "avg", "pooling_mode_mean_tokens": "avg"}
_POOLERS |= dict.fromkeys(("cls", "pooling_mode_cls_token"), "cls_before_pooler")

# Names of the authors' checkpoints and of the folders that their scripts train into; IS-CSE's are all unsupervised.
_ORIGINAL = re.compile(r"(?:^|[-_/])(?:(un)?sup-simcse|(is-?cse))(?:[-_/]|$)")


@dataclass(frozen=True)
class Pooling:
    """The pooler of a saved model."""

    pooler: str
    mlp_only_train: bool = False

    @property
    def at_evaluation(self) -> str:
        """The pooler whose vectors the trained model gives."""
        return "cls_before_pooler" if self.pooler == "cls" and self.mlp_only_train else self.pooler


@dataclass(frozen=True)
class Module:
    """A module of sentence-transformers: its class, without the package, and its folder."""

    kind: str
    folder: Path


@dataclass(frozen=True)
class _OwnSettings:
    """Our settings in config.json."""

    pooler: str
    mlp_only_train: bool
    max_length: Annotated[int | None, POSITIVE] = None
    normalize: bool = False


@dataclass(frozen=True)
class _TransformerFile:
    """The fields of `TRANSFORMER_FILE` that are read here."""

    max_seq_length: Annotated[float | None, FROM_ONE, FINITE] = None
    do_lower_case: bool = False


@dataclass(frozen=True)
class TokenizerFile:
    """The fields of tokenizer_config.json that are read here."""

    model_max_length: Annotated[float | None, FROM_ONE, FINITE] = None
    tokenizer_class: str | None = None


def read_json(path: Path, problem: str) -> Any:
    """The JSON value in a file; raises `InputError` if it is no JSON, or absent, where `problem` begins the message."""
    try:
        return parse_json(read_bounded(path))
    except FileNotFoundError as error:
        raise InputError(f"{problem}: it has no {path.name}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): get permission for it, or copy it") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error


def read_object(path: Path, problem: str) -> dict[str, Any]:
    """`read_json` for a file that must hold an object; raises `InputError` if it holds anything else."""
    value = read_json(path, problem)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}; expected an object: copy the model again")
    return value


def read_fields(cls: type, path: Path) -> Any:
    """A dataclass from a JSON object in a file, see `from_json`; with its defaults where there is no such file."""
    return from_json(cls, read_object(path, "") if path.is_file() else {}, str(path))


def modules(folder: Path) -> list[Module]:
    """The modules of a sentence-transformers folder, in order; an empty list for any other folder.

    Raises:
      InputError: modules.json is not a list of modules, or names a folder outside of its own.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return []
    listed = read_json(file, "")
    entries = listed if isinstance(listed, list) else [listed]
    if not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) and isinstance(m.get("path"), str) for m in entries
    ):
        raise InputError(
            f'{file} is not a list of modules; expected [{{"type": …, "path": …}}, …], as sentence-transformers writes '
            "it: copy the model again"
        )
    return [Module(module["type"].rsplit(".", 1)[-1], inside(folder, module["path"], file)) for module in entries]


def encoder_folder(folder: Path) -> Path:
    """The folder of encoder and tokenizer: `folder` itself, except for models of early sentence-transformers."""
    first = modules(folder)[:1]
    return first[0].folder if first and first[0].kind == "Transformer" else folder


def read_max_length(folder: Path, hf_config: dict[str, Any], limit: int) -> int:
    """The most tokens per sentence, at most `limit`: as our settings say it of a run, or as a sentence-transformers
    folder does (since its release 6, in the tokenizer's config); `limit` where neither does.

    Raises:
      InputError: the named value is not a length.
    """
    encoder = encoder_folder(folder)
    named = [own_settings(folder, hf_config).get("max_length")]
    if modules(folder):
        named.append(read_fields(_TransformerFile, encoder / TRANSFORMER_FILE).max_seq_length)
        named.append(read_fields(TokenizerFile, encoder / "tokenizer_config.json").model_max_length)
    # A tokenizer without limit says 1e30.
    return int(min(next(filter(None, named), limit), limit))


def lower_cases(encoder: Path) -> bool:
    """Whether sentence-transformers puts text in lower case before the tokenizer, whatever the tokenizer does."""
    return bool(read_fields(_TransformerFile, encoder / TRANSFORMER_FILE).do_lower_case)


def read_pooling(folder: Path, hf_config: dict[str, Any]) -> Pooling | None:
    """The pooler that a folder names; None if it names none, like a plain BERT.

    Raises:
      InputError: the folder names a pooler that is not among ours, or is a checkpoint of the SimCSE authors' code that
        does not tell whether its head is used after training; also see `own_settings`.
    """
    if settings := own_settings(folder, hf_config):
        check_pooler(settings["pooler"])
        return Pooling(settings["pooler"], settings["mlp_only_train"])
    if modules(folder):
        problem, pooler = _sentence_transformers(folder)
        if problem:
            raise InputError(f"{folder} {problem}: give the pooler yourself, e.g. --pooler avg")
        return Pooling(pooler)
    return _original(folder, hf_config)


def own_settings(folder: Path, hf_config: dict[str, Any]) -> dict[str, Any]:
    """The settings in config.json of a model that this package saved; an empty dict for any other model.

    Raises:
      InputError: the settings are not as this package writes them.
    """
    settings = hf_config.get(SETTINGS) or {}
    where = f"{folder / 'config.json'} has '{SETTINGS}': {shown(settings)}"
    if not isinstance(settings, dict):
        raise InputError(f'{where}; expected {{"pooler": …, "mlp_only_train": …}}: export the model again')
    if settings:
        from_json(_OwnSettings, settings, where)
    return settings


def ends_in_normalize(folder: Path, hf_config: dict[str, Any]) -> bool:
    """Whether a model's own vectors have length 1, by our settings or by a Normalize at the end of its modules."""
    if settings := own_settings(folder, hf_config):
        return bool(settings.get("normalize"))
    return [module.kind for module in modules(folder)[2:]][-1:] == ["Normalize"]


def after_pooling(folder: Path) -> list[Module]:
    """Dense and Normalize modules that follow the pooling of a sentence-transformers folder, except a Normalize at the
    end: the caller of encoding chooses whether to normalise. An empty list where the user must give the pooler."""
    following = modules(folder)[2:]
    while following and following[-1].kind == "Normalize":
        following.pop()
    return following if following and not _sentence_transformers(folder)[0] else []


def pooling_of(model: ModelConfig) -> Pooling:
    """The pooler of a run's settings."""
    return Pooling(model.pooler or "cls", model.mlp_only_train)


def settled(model: ModelConfig, own: Callable[[], Pooling | None]) -> ModelConfig:
    """The settings of a run's model with a pooler: where they leave it open, the one that the model itself has.

    Args:
      model: the settings.
      own: gives the model's own pooler, and None where it names none; it is `cls` then.
    """
    if model.pooler is not None:
        return model
    pooling = (None if model.mlp_only_train else own()) or pooling_of(model)
    return replace(model, pooler=pooling.pooler, mlp_only_train=pooling.mlp_only_train)  # type: ignore[arg-type]


def _sentence_transformers(folder: Path) -> tuple[str, str]:
    """The problem that keeps us from reading a folder, or ""; and the pooler."""
    listed = modules(folder)
    kinds = [module.kind for module in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or not {"Dense", "Normalize"}.issuperset(kinds[2:]):
        return f"is a sentence-transformers model of modules {kinds}; supported are {_READ}", ""
    settings = read_object(listed[1].folder / "config.json", f"{folder} names a Pooling module")
    modes = [k for k, on in settings.items() if k.startswith("pooling_mode_") and on is True]
    mode = str(settings.get("pooling_mode", modes[0] if len(modes) == 1 else modes))
    if mode not in _POOLERS:
        return f"is a sentence-transformers model with pooling {mode}; supported are {_READ}", ""
    return "", _POOLERS[mode]


_READ = "Transformer + Pooling (mean or cls) [+ Dense, Normalize]"


def _original(folder: Path, hf_config: dict[str, Any]) -> Pooling | None:
    """The pooler of a checkpoint of the authors' code, or of one that its `simcse_to_huggingface.py` converted.

    Supervised models use the head at test (`cls`), unsupervised ones do not (SimCSE, section 6.3). Only names tell
    the two apart: that of the folder, of the repository in the hub's cache, or `_name_or_path`.
    """
    listed = hf_config.get("architectures")
    architectures = {str(name) for name in listed} if isinstance(listed, list) else set()
    if not architectures & {"BertModel", "RobertaModel", "BertForCL", "RobertaForCL"}:
        return None
    # The hub's cache: models--princeton-nlp--NAME/snapshots/COMMIT.
    cached = folder.parent.parent.name.replace("--", "/") if folder.parent.name == "snapshots" else ""
    for name in (cached, folder.resolve().name, str(hf_config.get("_name_or_path", ""))):
        if found := _ORIGINAL.search(name):
            return Pooling("cls", mlp_only_train=any(found.groups()))
    if architectures & {"BertForCL", "RobertaForCL"}:
        raise InputError(
            f"{folder} is a checkpoint of the original SimCSE code, and its name does not tell whether it was trained "
            "unsupervised or supervised: give --pooler cls_before_pooler for the former (--mlp_only_train), --pooler "
            "cls for the latter"
        )
    return None
