"""Post-processors in a model folder: their arrays as files, the rest in config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np

from simcse_jax.config.values import NOT_NEGATIVE, SIZE, from_json, shown
from simcse_jax.errors import InputError
from simcse_jax.postprocess.fit import PostProcessor
from simcse_jax.postprocess.flow import Flow
from simcse_jax.postprocess.linear import Affine
from simcse_jax.postprocess.modules import Dense, read_modules
from simcse_jax.pretrained.folders import Checkpoint
from simcse_jax.pretrained.pooling import after_pooling, own_settings
from simcse_jax.pretrained.tensors import Stored, find_safetensors
from simcse_jax.storage.files import inside

KEY = "postprocess"
"""Key of a post-processor among a model's parameters, and among our settings in config.json."""
_PERMUTATION = "fixed.permutation"
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
            f"{checkpoint.folder / 'config.json'} has the post-processor {shown(about)}; expected an object: "
            "export it again"
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


@dataclass(frozen=True)
class _Described:
    """The description of a post-processor in config.json."""

    method: Literal["whitening", "all-but-the-top", "flow"]
    folder: str
    sentences: Annotated[int, NOT_NEGATIVE]
    width: Annotated[int, SIZE]
    components: Annotated[int | None, NOT_NEGATIVE] = None
    source: str | None = None


def _shapes(described: _Described, width: int, stored: dict[str, Stored]) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a post-processor; of a flow, the number of steps and the width inside are the file's
    own."""
    if described.method != "flow":
        return {"linear.weight": (described.width, width), "linear.bias": (described.width,)}
    inner = stored["b1"].shape if "b1" in stored else ()
    steps, hidden = inner if len(inner) == 2 and min(inner) else (1, 1)
    half, rest = width // 2, width - width // 2
    vectors = dict.fromkeys(("bias", "scale", "diagonal", _PERMUTATION, "fixed.sign"), (described.width,))
    shapes: dict[str, tuple[int, ...]] = {
        **vectors,
        **dict.fromkeys(("lower", "upper"), (width, width)),
        **{"w0": (half, hidden), "b0": (hidden,), "w1": (hidden, hidden), "b1": (hidden,)},
        **{"w2": (hidden, 2 * rest), "b2": (2 * rest,)},
    }
    return {name: (steps, *shape) for name, shape in shapes.items()}


def read(folder: Path, about: dict[str, Any], width: int, dtype: Any) -> PostProcessor:
    """Reads the post-processor that config.json of a model folder describes.

    Args:
      folder: the model folder.
      about: the description: `method`, `folder` (of the arrays), `width` and notes.
      width: width of the vectors to map.
      dtype: type of the returned arrays.

    Raises:
      InputError: a description that is not as an export writes it, or arrays that are missing, damaged or of another
        shape.
    """
    where = folder / "config.json"
    described: _Described = from_json(_Described, about, f"{where}, '{KEY}'")
    file = inside(folder, described.folder, where) / "model.safetensors"
    if not file.is_file():
        raise InputError(
            f"{folder} names a post-processor ({described.method}) whose file {file} is missing: copy it again"
        )
    stored = find_safetensors(file)
    shapes = _shapes(described, width, stored)
    for name, shape in shapes.items():
        if name not in stored:
            problem = f"lacks '{name}', so it does not hold a post-processor of method {described.method}"
        elif (found := stored[name]).shape != shape:
            problem = f"holds {name} of shape {list(found.shape)}, config.json asks for {list(shape)}"
        elif found.problem and name != _PERMUTATION:
            problem = f"is damaged: {name} {found.problem}"
        else:
            continue
        raise InputError(f"{file} {problem}: export the model again")
    arrays = {name: stored[name].read() for name in shapes}
    post: PostProcessor
    if described.method == "flow":
        order = arrays[_PERMUTATION]
        if not np.array_equal(np.sort(order), np.broadcast_to(np.arange(width), order.shape)):
            raise InputError(f"{file} is damaged: {_PERMUTATION} is no permutation of {width}: export the model again")
        fixed = {n: arrays.pop(f"fixed.{n}") for n in ("permutation", "sign")}
        post = Flow(arrays, fixed)
    else:
        post = Affine(np.ascontiguousarray(arrays["linear.weight"].T), arrays["linear.bias"])
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
