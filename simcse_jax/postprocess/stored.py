"""Post-processors in a model folder: their arrays as files, the rest in config.json."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from simcse_jax.errors import InputError
from simcse_jax.postprocess.fit import PostProcessor
from simcse_jax.postprocess.flow import Flow
from simcse_jax.postprocess.linear import Affine
from simcse_jax.postprocess.modules import Dense, read_modules
from simcse_jax.pretrained.folders import Checkpoint
from simcse_jax.pretrained.pooling import after_pooling, own_settings
from simcse_jax.pretrained.weights import read_safetensors

KEY = "postprocess"
"""Key of a post-processor among a model's parameters, and among our settings in config.json."""
_MODULES = "sentence-transformers modules"


def tensors_of(post: Affine | Dense | Flow) -> dict[str, np.ndarray]:
    """The arrays by name; an affine map takes the names and shapes of sentence-transformers' Dense: W is transposed."""
    if isinstance(post, Affine | Dense):
        weight = np.ascontiguousarray(np.asarray(post.weight, np.float32).T)
        return {"linear.weight": weight, "linear.bias": np.asarray(post.bias, np.float32)}
    named = {**post.params, **{f"fixed.{name}": value for name, value in post.fixed.items()}}
    return {name: np.ascontiguousarray(value) for name, value in named.items()}


def read_saved(
    checkpoint: Checkpoint, dtype: Any, modules: bool = True
) -> tuple[PostProcessor | None, dict[str, Any] | None]:
    """The post-processor of a model folder, and its description; None for both if the folder has none.

    It is one of ours, which config.json describes, or, with `modules`, the modules after the pooling of a
    sentence-transformers model.

    Raises:
      InputError: see `read`, `read_modules` and `own_settings`.
    """
    width, settings = checkpoint.config.hidden_size, own_settings(checkpoint.root, checkpoint.hf_config)
    about = settings.get(KEY)
    if about and not isinstance(about, dict):
        raise InputError(
            f"{checkpoint.folder / 'config.json'} has the post-processor {about!r}; expected an object: export it again"
        )
    if about and about.get("method") != _MODULES:
        return read(checkpoint.folder, about, width, dtype), about
    # In a folder of ours that does not name such modules, a Dense is the head.
    post = read_modules(checkpoint.root, width) if modules and (about or not settings) else None
    if post is None:
        return None, None
    names = [layer.activation if isinstance(layer, Dense) else "Normalize" for layer in post.layers]
    return _cast(post, dtype), {"method": _MODULES, "modules": names, "width": post.width}


def has_more_modules(folder: Path, hf_config: dict[str, Any]) -> bool:
    """Whether a model folder has a post-processor, or modules after its pooling other than a Normalize at the end."""
    # In a folder of ours that does not name such modules, a Dense is the head.
    settings = own_settings(folder, hf_config)
    return KEY in settings if settings else bool(after_pooling(folder))


def read(folder: Path, about: dict[str, Any], width: int, dtype: Any) -> PostProcessor:
    """Reads the post-processor that config.json of a model folder describes.

    Args:
      folder: the model folder.
      about: the description: `method`, `folder` (of the arrays) and `width` are used here.
      width: width of the vectors to map.
      dtype: type of the returned arrays.

    Raises:
      InputError: unknown method, or arrays that are missing, damaged or of another shape.
    """
    method = about.get("method")
    if method not in ("whitening", "all-but-the-top", "flow"):
        raise InputError(f"{folder} names the post-processor {method!r}: written by another version of simcse_jax?")
    if not isinstance(about.get("sentences"), int):
        raise InputError(f"{folder} does not say to how many sentences its post-processor was fitted: export it again")
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
        raise InputError(
            f"{file} lacks {error}: it does not hold a post-processor of method {method}, so export it again"
        ) from error
    if (given, post.width) != (width, about.get("width")):
        raise InputError(
            f"{file} maps vectors of width {given} to {post.width}; config.json asks for {width} to "
            f"{about.get('width')}: they are not of one model, so export it again"
        )
    return _cast(post, dtype)


def _cast(post: PostProcessor, dtype: Any) -> PostProcessor:
    cast: PostProcessor = jax.tree.map(lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x, post)
    return cast


def describe(about: dict[str, Any]) -> str:
    """A post-processor in a few words, e.g. "whitening to width 256, fitted to 10,000 sentences of wiki.txt"."""
    if about["method"] == _MODULES:
        return f"{_MODULES} ({', '.join(about['modules'])}) to width {about['width']}"
    detail = {
        "whitening": f" to width {about['width']}",
        "all-but-the-top": f" without {about.get('components')} components",
    }.get(about["method"], "")
    source = f" of {about['source']}" if about.get("source") else ""
    return f"{about['method']}{detail}, fitted to {about['sentences']:,} sentences{source}"
