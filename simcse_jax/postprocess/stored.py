"""Post-processors in a model folder: their arrays as files, the rest in config.json."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from simcse_jax.errors import InputError
from simcse_jax.hf import read_safetensors
from simcse_jax.postprocess.fit import PostProcessor
from simcse_jax.postprocess.flow import Flow
from simcse_jax.postprocess.linear import Affine

KEY = "postprocess"
"""Where a post-processor stands: among a model's parameters, and among our settings in config.json."""


def tensors_of(post: PostProcessor) -> dict[str, np.ndarray]:
    """The arrays by name: those of sentence-transformers' Dense for an affine map, which multiplies from the left."""
    if isinstance(post, Affine):
        weight = np.ascontiguousarray(np.asarray(post.weight, np.float32).T)
        return {"linear.weight": weight, "linear.bias": np.asarray(post.bias, np.float32)}
    named = {**post.params, **{f"fixed.{name}": value for name, value in post.fixed.items()}}
    return {name: np.ascontiguousarray(value) for name, value in named.items()}


def read(folder: Path, about: dict[str, Any], width: int, dtype: Any) -> PostProcessor:
    """Reads the post-processor that config.json of a model folder describes.

    Args:
      folder: the model folder.
      about: the description: `method`, `folder` (of the arrays) and `width` are used here.
      width: of the vectors it is applied to.
      dtype: type of the returned arrays.

    Raises:
      InputError: unknown method, or arrays that are missing, damaged or of another shape.
    """
    method = about.get("method")
    if method not in ("whitening", "all-but-the-top", "flow"):
        raise InputError(f"{folder} names the post-processor {method!r}: written by another version of simcse_jax?")
    file = folder / str(about.get("folder")) / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{folder} names a post-processor ({method}) whose file {file} is missing: copy it again")
    stored = read_safetensors(file)
    try:
        post: PostProcessor
        if method == "flow":
            fixed = {n: stored.pop(f"fixed.{n}") for n in ("permutation", "sign")}
            post, given = Flow(stored, fixed), fixed["sign"].shape[1]
        else:
            post = Affine(np.ascontiguousarray(stored["linear.weight"].T), stored["linear.bias"])
            given = post.weight.shape[0]
    except KeyError as error:
        raise InputError(f"{file} lacks {error}: it does not hold a post-processor of method {method}") from error
    if (given, post.width) != (width, about.get("width")):
        raise InputError(
            f"{file} maps vectors of width {given} to {post.width}; config.json asks for {width} to "
            f"{about.get('width')}: they are not of one model"
        )
    return jax.tree.map(lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x, post)


def describe(about: dict[str, Any]) -> str:
    """A post-processor in a few words, e.g. "whitening to width 256, fitted to 10,000 sentences of wiki.txt"."""
    detail = {
        "whitening": f" to width {about['width']}",
        "all-but-the-top": f" without {about.get('components')} components",
    }.get(about["method"], "")
    source = f" of {about['source']}" if about.get("source") else ""
    return f"{about['method']}{detail}, fitted to {about['sentences']:,} sentences{source}"
