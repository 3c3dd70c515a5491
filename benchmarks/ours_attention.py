"""This project's contenders for encoding long rows: the ways of computing attention without dropout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ours import OnJax
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.vectors import unit
from simcse_jax.model import Layout, fused_attention, long_attention
from simcse_jax.model.attention import attend
from simcse_jax.model.long_attention import Attention, allowed_keys, attend_in_blocks
from simcse_jax.runtime.mesh import make_mesh


def attend_at_once(query: jax.Array, key: jax.Array, value: jax.Array, layout: Layout) -> jax.Array:
    """Attention with the weights of whole rows in memory, as in training."""
    return attend(query, key, value, allowed_keys(layout.sentence, layout), None, 0.0)


WAYS: dict[str, Callable[[], Attention]] = {
    "ours": lambda: fused_attention(make_mesh()),
    "in blocks of queries": lambda: attend_in_blocks,
    "all weights at once": lambda: attend_at_once,
}
"""The ways, first that which encoding takes: the fused kernel of the accelerator where that works."""


class LongRows(OnJax):
    """Rows of token ids to vectors."""

    def __init__(self, model: str, ids: np.ndarray, lengths: np.ndarray, dtype: str, way: str) -> None:
        loaded = load_model(model, dtype=dtype)
        self._config, self._dtype = loaded.model.config, dtype
        module = loaded.model.clone(attention=WAYS[way]())
        self._arguments = loaded.params, jnp.asarray(ids), jnp.asarray(lengths)
        self._forward = jax.jit(lambda params, *batch: module.apply({"params": params}, *batch))

    def run(self) -> None:
        """Encodes the rows."""
        jax.block_until_ready(self._forward(*self._arguments))

    def check(self) -> dict[str, np.ndarray]:
        """The vectors, of length 1."""
        with jax.default_matmul_precision("highest"):
            vectors = np.asarray(self._forward(*self._arguments), np.float32)
        return {"vectors": unit(vectors.reshape(-1, vectors.shape[-1]))}

    def kernel(self) -> str:
        """Whether encoding takes the fused kernel of this device, or why it does not, in words."""
        device, heads = jax.devices()[0], self._config.num_attention_heads
        kernel = long_attention._KERNELS.get(device.platform)
        if kernel is None:
            return f"there is none for this device ({device.platform})"
        size, (_, ids, lengths) = self._config.hidden_size // heads, self._arguments
        length, packed = ids.shape[1], lengths.shape[1] > 1
        problem = long_attention._problem(kernel, device, heads, length, size, packed, self._dtype)
        return f"not taken: {problem}" if problem else "taken"
