"""Hugging Face checkpoints in and out: one table of parameter names, used both ways."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simcse_jax.errors import InputError, reason, system_error
from simcse_jax.files import write_json
from simcse_jax.model import EncoderConfig, read_encoder_config
from simcse_jax.recognise import SETTINGS as SETTINGS
from simcse_jax.recognise import (
    TRANSFORMER_FILE,
    encoder_folder,
    ends_in_normalize,
    lower_cases,
    read_max_length,
    read_object,
    read_pooling,
)
from simcse_jax.recognise import Pooling as Pooling
from simcse_jax.storage import local_path

Params = dict[str, Any]
HUB_TIMEOUT = 10.0
"""Seconds that the hub has for its first answer."""

_TOKENIZERS = {"bert": "BertTokenizerFast", "roberta": "RobertaTokenizerFast"}
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")

# Hugging Face prefix -> ours, for modules that hold (weight, bias). `{i}` runs over the layers.
_LAYER_MODULES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")

# The head of a masked language model: dense, LayerNorm, bias over the vocabulary. Its decoder is the word embeddings.
_MLM_NAMES = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
}

# Weights of pretraining heads and constant buffers that a checkpoint may hold and a sentence encoder has no use for.
_UNUSED = re.compile(r"^(cls\.|lm_head\.|embeddings\.position_ids$|embeddings\.token_type_ids$)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read."""

    folder: Path
    """Where config.json, the weights and the tokenizer are."""
    hf_config: dict[str, Any]
    config: EncoderConfig
    max_length: int | None
    """Length a sentence-transformers folder cuts sentences to; None elsewhere: the encoder's own limit."""
    root: Path
    """The folder of the whole model: `folder`, but for models of early sentence-transformers."""

    @property
    def pooling(self) -> Pooling | None:
        """The pooler that the folder names; None where it does not say, as for a plain BERT.

        Raises:
          InputError: see `read_pooling`. The weights can be used with another all the same.
        """
        return read_pooling(self.root, self.hf_config)

    @property
    def normalizes(self) -> bool:
        """Whether the model's own vectors have length 1, see `ends_in_normalize`."""
        return ends_in_normalize(self.root, self.hf_config)


def locate(name_or_path: str | Path) -> Path:
    """The local folder of a checkpoint, downloaded from the hub when `name_or_path` is not a folder.

    Raises:
      InputError: a path that does not exist, or a name that the hub does not give.
    """
    path = local_path(name_or_path)
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"'{name}' is not a folder: give a Hugging Face model folder or a name on the hub")
    from huggingface_hub import HfApi, snapshot_download

    unreachable = None
    try:
        # The download begins with the same request but sets no limit, and waits for minutes where packets are dropped.
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub client raises a dozen types, from name errors to connection errors
        unreachable = error  # what was downloaded before is still there

    def download(weights: str) -> Path:
        patterns = [
            "*.json",
            "*.txt",
            "*.model",
            "*_Pooling/*",
            "*_Dense/*",
            "postprocess/*",
            weights,
            f"*_Transformer/{weights}",
        ]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=unreachable is not None))

    try:
        folder = download("model*.safetensors")
        if not list(encoder_folder(folder).glob("model*.safetensors")):
            folder = download("pytorch_model*.bin")
    except Exception as error:  # as above
        cause = unreachable or error
        raise InputError(
            f"model '{name}' is neither a folder here nor to be had from the hub ({reason(cause)}): "
            "check the name and the network, or download the model elsewhere and give its folder"
        ) from cause
    return folder


def read_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Reads the configuration of a checkpoint, not its weights.

    Raises:
      InputError: no such model, no readable `config.json`, or not a BERT or RoBERTa.
    """
    root = locate(name_or_path)
    folder = encoder_folder(root)
    hf_config = read_object(folder / "config.json", f"'{folder}' is not a model folder")
    try:
        config = read_encoder_config(hf_config)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return Checkpoint(folder, hf_config, config, read_max_length(root, config.max_length), root)


def _names(config: EncoderConfig, mlm: bool = False) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    """The table: our path, Hugging Face's name, and our shape, for every weight of the encoder and the head, and with
    `mlm` of the head of a masked language model."""
    h, f = config.hidden_size, config.intermediate_size
    rows = (config.vocab_size, config.max_position_embeddings, config.type_vocab_size)
    modules: list[tuple[tuple[str, ...], str, tuple[int, ...]]] = []
    for name, n in zip(_EMBEDDINGS, rows, strict=True):
        yield ("encoder", "embeddings", name, "embedding"), f"embeddings.{name}.weight", (n, h)
    modules.append((("encoder", "embeddings", "layer_norm"), "embeddings.LayerNorm", (h,)))
    shapes: dict[str, tuple[int, ...]] = {"intermediate": (h, f), "output": (f, h)}
    for i in range(config.num_hidden_layers):
        for theirs, ours in _LAYER_MODULES.items():
            shape = (h,) if ours.endswith("norm") else shapes.get(ours, (h, h))
            modules.append((("encoder", f"layer_{i}", ours), f"encoder.layer.{i}.{theirs}", shape))
    modules.append((("head", "dense"), "pooler.dense", (h, h)))
    if mlm:
        dense, norm, bias = _MLM_NAMES[config.model_type]
        modules += [(("mlm", "dense"), dense, (h, h)), (("mlm", "layer_norm"), norm, (h,))]
        yield ("mlm", "bias"), bias, (config.vocab_size,)
    for path, name, shape in modules:
        yield (*path, "kernel" if len(shape) == 2 else "scale"), f"{name}.weight", shape
        yield (*path, "bias"), f"{name}.bias", shape[-1:]


def _place(params: Params, path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        params = params.setdefault(part, {})
    params[path[-1]] = value


def param_shapes(config: EncoderConfig, dtype: Any = np.float32) -> Params:
    """Shapes and dtypes of the parameters of `SentenceEncoder`, as `ShapeDtypeStruct`, without tracing it."""
    shapes: Params = {}
    for path, _, shape in _names(config):
        _place(shapes, path, jax.ShapeDtypeStruct(shape, dtype))
    return shapes


def load_params(checkpoint: Checkpoint, dtype: Any = np.float32, mlm: bool = False) -> Params:
    """Reads the weights of a checkpoint as the parameter tree of `SentenceEncoder`.

    Args:
      checkpoint: from `read_checkpoint`.
      dtype: type of the returned arrays.
      mlm: read the head of a masked language model, too.

    Returns:
      `{"encoder": ..., "head": ...}` of NumPy arrays, most matrices as transposed views; without "head" where the
      checkpoint has no pooler weights; with "mlm" where it is asked for and there.

    Raises:
      InputError: unreadable file, or a missing, unexpected or misshapen weight, each named; also a head of a masked
        language model whose decoder is not the word embeddings.
    """
    stored = read_tensors(checkpoint.folder)
    tensors = {_canonical(name): name for name in stored}
    params: Params = {}
    problems: list[str] = []
    expected = set()
    has_head = "pooler.dense.weight" in tensors
    has_mlm = mlm and f"{_MLM_NAMES[checkpoint.config.model_type][0]}.weight" in tensors
    if has_mlm:
        _check_decoder(checkpoint, {name: stored[tensors[name]] for name in tensors})
    for path, name, shape in _names(checkpoint.config, has_mlm):
        if path[0] == "head" and not has_head:
            continue
        expected.add(name)
        if name not in tensors:
            problems.append(f"missing {name}")
            continue
        value = stored[tensors[name]]
        value = value.T if path[-1] == "kernel" else value
        if value.shape != shape:
            given, wanted = stored[tensors[name]].shape, shape[::-1] if path[-1] == "kernel" else shape
            problems.append(f"{name} has shape {list(given)}, config.json asks for {list(wanted)}")
            continue
        _place(params, path, value.astype(dtype, copy=False))
    problems += [f"unexpected {tensors[name]}" for name in sorted(set(tensors) - expected) if not _UNUSED.match(name)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InputError(f"the weights in {checkpoint.folder} do not fit its config.json: {shown}")
    return params


def _check_decoder(checkpoint: Checkpoint, tensors: dict[str, np.ndarray]) -> None:
    bias = _MLM_NAMES[checkpoint.config.model_type][2]
    name, words = bias.replace("bias", "decoder.weight"), "embeddings.word_embeddings.weight"
    if name in tensors and words in tensors and not np.array_equal(tensors[name], tensors[words]):
        raise InputError(
            f"{checkpoint.folder} has a {name} that differs from its {words}; the head of a masked language model is "
            f"read with the two tied: remove {bias.removesuffix('bias')}* from the weights to train a fresh head, or "
            "set objective.mlm.weight to 0"
        )


def _canonical(name: str) -> str:
    """A weight's name without the model prefix and in today's spelling.

    `bert.` and `roberta.` lead the names of checkpoints saved with a pretraining head; gamma and beta are those of the
    first BERT releases; `mlp.dense` is the head in checkpoints of the original SimCSE code; the decoder's bias is one
    and the same as that of the head of a masked language model.
    """
    name = re.sub(r"^(bert|roberta)\.", "", name)
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    name = re.sub(r"^(cls\.predictions|lm_head)\.decoder\.bias$", r"\1.bias", name)
    return re.sub(r"^mlp\.dense\.", "pooler.dense.", name)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a folder, in safetensors, in shards or not, or as a PyTorch pickle.

    Raises:
      InputError: there are none, or they cannot be read.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            shards = read_object(index, "").get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
                raise InputError(f"{index} has no weight_map from weights to files: copy it again")
            files = sorted({folder / file for file in shards.values()})
        elif (folder / f"{stem}.{suffix}").is_file():
            files = [folder / f"{stem}.{suffix}"]
        else:
            continue
        tensors: dict[str, np.ndarray] = {}
        for file in files:
            tensors |= read_safetensors(file) if suffix == "safetensors" else _read_torch(file)
        return tensors
    raise InputError(f"{folder} has no weights: expected model.safetensors, its sharded form, or pytorch_model.bin")


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; raises `InputError` where it is damaged or absent."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise InputError(f"{file} is named by the weights' index but does not exist") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}): truncated or damaged, copy it again") from error


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{file} is a PyTorch pickle and torch is not installed: pip install torch, "
            "or save the model as safetensors elsewhere"
        ) from error
    try:
        # weights_only refuses pickles that could run code.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}
    except Exception as error:  # torch raises many types for damaged or refused pickles
        raise InputError(f"{file} cannot be read as weights ({reason(error)})") from error


def to_tensors(params: Params, config: EncoderConfig) -> dict[str, np.ndarray]:
    """The weights under Hugging Face's names and shapes, the head as `pooler.dense`.

    With the head of a masked language model among them, those of the encoder are named as in `BertForMaskedLM` and
    `RobertaForMaskedLM`, whose decoder is left out because it is the word embeddings.
    """
    tensors = {}
    for path, name, _ in _names(config, "mlm" in params):
        value: Any = params
        for part in path:
            value = value[part]
        # safetensors writes the wrong values for an array that is not contiguous, such as a transposed one.
        name = f"{config.model_type}.{name}" if "mlm" in params and path[0] != "mlm" else name
        tensors[name] = np.ascontiguousarray(value.T if path[-1] == "kernel" else value)
    return tensors


def with_dropout(config: EncoderConfig, probability: float | None) -> EncoderConfig:
    """The config with both dropout probabilities set, unchanged for None."""
    if probability is None:
        return config
    return replace(config, hidden_dropout_prob=probability, attention_probs_dropout_prob=probability)


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder.

    Raises:
      InputError: the folder holds no tokenizer that can be read, or only a slow one.
    """
    # Without any of these transformers makes a tokenizer of special tokens only, to which all text is unknown.
    if not any((Path(folder) / name).is_file() for name in _VOCABULARIES):
        raise InputError(f"{folder} has no tokenizer: expected {', '.join(_VOCABULARIES)} (with merges.txt)")
    try:
        tokenizer = _tokenizer_class(Path(folder)).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many types, down to bare Exception from the Rust side
        raise InputError(f"{folder} has no tokenizer that can be read ({reason(error)})") from error
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer in {folder} has no tokenizer.json (no fast form)")
    if lower_cases(Path(folder)):
        from tokenizers.normalizers import Lowercase, Sequence

        rules = tokenizer.backend_tokenizer
        rules.normalizer = Sequence([Lowercase(), *([rules.normalizer] if rules.normalizer else [])])
        tokenizer.lower_cases = True
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """The class that reads the tokenizer of a folder: its model's own, where the folder names no other.

    AutoTokenizer would come to the same, but loads PyTorch where that is installed and takes three times as long.
    """
    # Said at import where PyTorch is absent; the tokenizer does not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    files = (folder / "tokenizer_config.json", folder / "config.json")
    about, model = (read_object(file, "") if file.is_file() else {} for file in files)
    own = _TOKENIZERS.get(model.get("model_type", ""), "AutoTokenizer")
    named = str(about.get("tokenizer_class") or model.get("tokenizer_class") or own)
    plain = "auto_map" not in about and named.removesuffix("Fast") == own.removesuffix("Fast")
    return getattr(transformers, own if plain else "AutoTokenizer")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer, and where it puts text in lower case first, sentence-transformers' file that says so.

    Raises:
      OSError: it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
        if getattr(tokenizer, "lower_cases", False):
            # transformers makes the normaliser of a BERT anew.
            write_json(folder / TRANSFORMER_FILE, {"do_lower_case": True})
    except Exception as error:  # the Rust side raises a bare Exception, with the system's number in its text
        if isinstance(error, OSError) or (number := system_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number)) from error
