"""The modules of a sentence-transformers model after pooling: Dense and Normalize."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from simcse_jax.errors import InputError
from simcse_jax.objectives import moderate
from simcse_jax.pretrained import pooling as recognise
from simcse_jax.pretrained.tensors import Stored, find_tensors

# By the names of torch.nn's classes.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "ReLU": jax.nn.relu,
    "GELU": partial(jax.nn.gelu, approximate=False),
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
}


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["activation"])
@dataclass(frozen=True)
class Dense:
    """x ↦ f(x W + b).

    Attributes:
      weight: W, [H, D].
      bias: b, [D].
      activation: f, one of `ACTIVATIONS`.
    """

    weight: Any
    bias: Any
    activation: str

    def __call__(self, x: Float[Array, "S H"]) -> Float[Array, "S D"]:
        """The mapped rows."""
        return ACTIVATIONS[self.activation](jnp.matmul(x, self.weight, precision="highest") + self.bias[None])


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class Normalize:
    """x ↦ x / ‖x‖."""

    def __call__(self, x: Float[Array, "S H"]) -> Float[Array, "S H"]:
        """The rows, of length 1."""
        x = moderate(x)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclass(frozen=True)
class Modules:
    """Several modules, one after the other; the last is a `Dense`."""

    layers: tuple[Dense | Normalize, ...]

    @property
    def width(self) -> int:
        """D, the width of the mapped rows."""
        return int(np.shape(self.layers[-1].bias)[0]) if isinstance(self.layers[-1], Dense) else 0

    def __call__(self, x: Float[Array, "S H"]) -> Float[Array, "S D"]:
        """The mapped rows."""
        for layer in self.layers:
            x = layer(x)
        return x


def read_modules(folder: Path, width: int) -> Modules | None:
    """Reads the modules after the pooling of a sentence-transformers folder; None if there are none.

    Args:
      folder: the model folder.
      width: width of the pooled vectors.

    Raises:
      InputError: an activation or option that is not among ours, or weights that are missing or do not fit.
    """
    layers: list[Dense | Normalize] = []
    for module in recognise.after_pooling(folder):
        if module.kind == "Normalize":
            layers.append(Normalize())
            continue
        dense = _read_dense(module.folder, width)
        width = dense.weight.shape[1]
        layers.append(dense)
    return Modules(tuple(layers)) if layers else None


_NOTHING = Stored((0, 0), lambda: np.zeros((0, 0)))


def _read_dense(folder: Path, width: int) -> Dense:
    config = recognise.read_object(folder / "config.json", f"{folder} is not a Dense module")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rsplit(".", 1)[-1]
    places = {str(config.get(key) or "sentence_embedding") for key in ("module_input_name", "module_output_name")}
    if not activation.startswith("torch.nn.") or name not in ACTIVATIONS:
        problem = f"has the activation {activation}; supported are {', '.join(ACTIVATIONS)} of torch.nn"
    elif config.get("use_residual") or places != {"sentence_embedding"}:
        problem = "has a residual connection, or does not map the sentence vector; such modules are not supported"
    else:
        tensors = find_tensors(folder)
        weight, bias = tensors.get("linear.weight", _NOTHING), tensors.get("linear.bias")
        rows, given = weight.shape[:1], bias.shape if bias else weight.shape[:1]
        problem = weight.problem or (bias.problem if bias else "")
        if not problem and weight.shape[1:] == (width,) and given == rows:
            offset = bias.read() if bias else np.zeros(rows)
            return Dense(np.ascontiguousarray(weight.read().T, np.float32), offset.astype(np.float32), name)
        problem = problem or f"holds weights of shape {list(weight.shape)}, bias {list(given)}"
        problem += f"; expected [D, {width}] and [D]"
    raise InputError(f"{folder} {problem}: give the pooler, e.g. --pooler avg, to use the encoder alone")
