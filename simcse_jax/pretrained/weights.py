"""Weights under Hugging Face's names: one table of parameter names, used both ways."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simcse_jax.errors import InputError, warn
from simcse_jax.model import EncoderConfig
from simcse_jax.model.params import Params
from simcse_jax.pretrained.folders import COPY, Checkpoint
from simcse_jax.pretrained.tensors import WORDS, Stored, find_tensors
from simcse_jax.storage.manifest import check_unchanged

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

# What an encoder's weights are called behind the prefix that its checkpoint gives them.
_INSIDE = ("embeddings.", "encoder.", "pooler.")

# Heads beside the encoder: that of the original SimCSE code, one that is named as within it, and those of pretraining.
_BESIDE = ("mlp.dense.", "pooler.dense.", "cls.", "lm_head.")

# Weights of pretraining heads and constant buffers that a checkpoint may hold and a sentence encoder has no use for.
_UNUSED = re.compile(r"^(cls\.|lm_head\.|embeddings\.position_ids$|embeddings\.token_type_ids$)")


def _names(config: EncoderConfig, mlm: bool = False) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    """The table: our path, Hugging Face's name, and our shape of every weight of the encoder and the head, and with
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
      mlm: also read the head of a masked language model.

    Returns:
      `{"encoder": ..., "head": ...}` of NumPy arrays, most matrices as transposed views; without "head" where the
      checkpoint has no pooler weights; with "mlm" if the caller asks for it and the checkpoint has it.

    A line on stderr names what else the checkpoint holds outside of the encoder, such as a classifier.

    Raises:
      InputError: unreadable file, several encoders, or a missing, unexpected or misshapen weight, each named; also a
        head of a masked language model whose decoder is not the word embeddings; or numbers that are not finite.
    """
    if (checkpoint.folder / "adapter_config.json").is_file():
        raise InputError(
            f"{checkpoint.folder} has an adapter (adapter_config.json), which is not read here: merge it into the "
            "weights first, with merge_and_unload of the package peft"
        )
    check_unchanged(checkpoint.root, COPY, lambda name: name.endswith(".safetensors"))
    stored = find_tensors(checkpoint.folder)
    tensors, outside, twice = _sort(stored, checkpoint.folder)
    wanted: list[tuple[tuple[str, ...], Stored, str]] = []
    problems: list[str] = []
    expected = set()
    has_head = "pooler.dense.weight" in tensors
    has_mlm = mlm and f"{_MLM_NAMES[checkpoint.config.model_type][0]}.weight" in tensors
    for path, name, shape in _names(checkpoint.config, has_mlm):
        if path[0] == "head" and not has_head:
            continue
        expected.add(name)
        if name not in tensors:
            problems.append(f"missing {name}")
            continue
        value = stored[tensors[name]]
        given = shape[::-1] if path[-1] == "kernel" else shape
        if value.problem:
            problems.append(f"{tensors[name]} {value.problem}")
        elif value.shape != given:
            problems.append(f"{name} has shape {list(value.shape)}, config.json asks for {list(given)}")
        else:
            wanted.append((path, value, tensors[name]))
    problems += [f"unexpected {tensors[name]}" for name in sorted(set(tensors) - expected) if not _UNUSED.match(name)]
    if WORDS not in tensors:
        problems += [f"unexpected {name}" for name in outside]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InputError(f"the weights in {checkpoint.folder} do not fit its config.json: {shown}")
    # Now that all shapes are those of config.json, memory is taken.
    for one, other in twice:
        if not _equal(stored[one], stored[other]):
            raise InputError(
                f"the weights in {checkpoint.folder} hold {one} and {other}, which differ: remove one of them"
            )
    if has_mlm:
        _check_decoder(checkpoint, {name: stored[tensors[name]] for name in tensors})
    params: Params = {}
    spoilt = []
    for path, weight, name in wanted:
        array = weight.read()
        if not _is_finite(array):
            spoilt.append(name)
        _place(params, path, (array.T if path[-1] == "kernel" else array).astype(dtype, copy=False))
    if spoilt:
        raise InputError(
            f"the weights in {checkpoint.folder} hold numbers that are not finite, in {spoilt[0]}"
            + (f" and {len(spoilt) - 1} others" if spoilt[1:] else "")
            + ": the training that wrote them diverged, or the file is damaged, so take another checkpoint or copy"
        )
    if outside:
        modules = sorted({name.removesuffix(".weight").removesuffix(".bias") for name in outside})
        more = f" and {len(modules) - 8} more" if len(modules) > 8 else ""
        warn(f"{checkpoint.folder}: not read, as outside of the encoder: {', '.join(modules[:8])}{more}")
    return params


def _is_finite(array: np.ndarray) -> bool:
    flat = array.ravel(order="K")
    with np.errstate(over="ignore", invalid="ignore"):
        if flat.dtype == np.float32 and np.isfinite(np.dot(flat, flat)):  # ten times as fast as looking at each
            return True
    return bool(np.isfinite(flat).all())


def _sort(stored: dict[str, Stored], folder: Path) -> tuple[dict[str, str], list[str], list[tuple[str, str]]]:
    """The weights of a checkpoint's encoder and of the heads beside it, by their canonical names; all others; and pairs
    of names of one weight.

    Raises:
      InputError: the checkpoint holds several encoders.
    """
    prefixes = [name.removesuffix(WORDS) for name in stored if f".{name}".endswith(f".{WORDS}")] or [""]
    if len(prefixes) > 1:
        raise InputError(
            f"the weights in {folder} hold {len(prefixes)} encoders ({', '.join(map(repr, sorted(prefixes)))}): save "
            "the one to be read alone"
        )
    prefix = prefixes[0]
    parent = prefix[: prefix[:-1].rfind(".") + 1]
    found: dict[str, str] = {}
    outside: list[str] = []
    twice: list[tuple[str, str]] = []
    mlp = f"{parent}mlp."
    # The head of the original SimCSE code comes first: it takes the place of the encoder's own.
    for name in sorted(stored, key=lambda name: (not name.startswith(mlp), name)):
        within, beside = name.removeprefix(prefix), name.removeprefix(parent)
        if name.startswith(prefix) and within.startswith(_INSIDE):
            key = _canonical(within)
        elif name.startswith(parent) and beside.startswith(_BESIDE):
            key = _canonical(beside)
        else:
            outside.append(name)
            continue
        if (other := found.setdefault(key, name)) == name:
            continue
        if other.startswith(mlp):
            outside.append(name)
        elif key.startswith(_INSIDE):
            twice.append((other, name))
    return found, outside, twice


def _equal(a: Stored, b: Stored) -> bool:
    return a.shape == b.shape and not b.problem and np.array_equal(a.read(), b.read())


def _check_decoder(checkpoint: Checkpoint, tensors: dict[str, Stored]) -> None:
    bias = _MLM_NAMES[checkpoint.config.model_type][2]
    name = bias.replace("bias", "decoder.weight")
    if name in tensors and WORDS in tensors and not _equal(tensors[WORDS], tensors[name]):
        raise InputError(
            f"{checkpoint.folder} has a {name} that differs from its {WORDS}; the head of a masked language model is "
            f"read with the two tied: remove {bias.removesuffix('bias')}* from the weights to train a fresh head, or "
            "set objective.mlm.weight to 0"
        )


def _canonical(name: str) -> str:
    """The name of a weight, without its prefix, in today's spelling.

    The first BERT releases use gamma and beta; `mlp.dense` is the head in checkpoints of the original SimCSE code; the
    decoder's bias is the same as that of the head of a masked language model.
    """
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    name = re.sub(r"^(cls\.predictions|lm_head)\.decoder\.bias$", r"\1.bias", name)
    return re.sub(r"^mlp\.dense\.", "pooler.dense.", name)


def to_tensors(params: Params, config: EncoderConfig) -> dict[str, np.ndarray]:
    """The weights under Hugging Face's names and shapes, the head as `pooler.dense`.

    If they include the head of a masked language model, those of the encoder are named as in `BertForMaskedLM` and
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
