"""This project's contenders for encoding and the loss, and their common base on JAX."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import peak_bytes, seconds
from simcse_jax.config import ENCODE_ROW, NegativesConfig
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.vectors import unit
from simcse_jax.objectives import Marks, dense, info_nce, tiled
from simcse_jax.training.loss import BLOCK_SIZES


class OnJax:
    """The base of all contenders on JAX: memory and ceiling."""

    def peak(self) -> int:
        """Most bytes held: of an accelerator's memory if there is one, else of the process."""
        stats = None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()
        return int(stats["peak_bytes_in_use"]) if stats else peak_bytes()

    def ceiling(self, size: int, dtype: str, exact: bool = False) -> float:
        """FLOP/s of the best of five products of two square matrices; `exact`: without TF32."""
        a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
        # Some CPUs multiply bfloat16 at full speed only with float32 sums.
        product = jax.jit(partial(jnp.dot, preferred_element_type=jnp.float32, precision="highest" if exact else None))
        jax.block_until_ready(product(a, a))
        return 2 * size**3 / min(seconds(lambda: product(a, a)) for _ in range(5))


class Encode(OnJax):
    """Sentences to vectors of length 1, as in `SimCSE.encode`, in any type."""

    def __init__(
        self, model: str, sentences: list[str], batch_size: int, dtype: str, packed_length: int = ENCODE_ROW
    ) -> None:
        self._loaded = load_model(model, dtype=dtype)
        self._encoder = self._loaded.encoder(None, batch_size, packed_length)
        self._sentences = sentences

    def run(self) -> np.ndarray:
        """Encodes all sentences."""
        vectors = self._encoder(self._loaded.params, self._sentences)
        return unit(vectors)

    def check(self) -> dict[str, np.ndarray]:
        """The vectors."""
        with jax.default_matmul_precision("highest"):
            return {"vectors": self.run()}


class Loss(OnJax):
    """InfoNCE of two views, forward and backward, tiled or dense.

    Masks and hard negatives are given such facts that they change nothing: every text differs, and no hard negative is
    there.
    """

    def __init__(
        self,
        views: tuple[np.ndarray, np.ndarray],
        temperature: float,
        form: str,
        negatives: dict[str, Any] | None = None,
        hard: int = 0,
        guide: int = 0,
    ) -> None:
        self._views = tuple(map(jnp.asarray, views))
        n = len(views[0])
        texts = jnp.arange(2 * n, dtype=jnp.uint32).reshape(n, 1, 2)
        judged = jax.random.normal(jax.random.key(0), (n, 1, guide)) if guide else None
        marks = Marks(jnp.ones((n, 2 + hard), bool).at[:, 2:].set(False) if hard else None, texts, judged)
        z3 = jax.random.normal(jax.random.key(1), (n, hard, self._views[0].shape[1])) if hard else None
        block = BLOCK_SIZES[jax.default_backend()]
        pairs = dense if form == "dense" else partial(tiled, block=block)
        settings = NegativesConfig(**(negatives or {}))
        loss = partial(info_nce, temperature=temperature, pairs=pairs, negatives=settings)
        # Arguments: of constants, the compiler would compute what it can.
        self._facts = z3, marks
        self._function = jax.value_and_grad(lambda z, facts: loss(z[0], z[1], facts[0], marks=facts[1]), has_aux=True)
        self._compiled = jax.jit(self._function)

    def run(self) -> None:
        """Computes the loss and both gradients."""
        jax.block_until_ready(self._compiled(self._views, self._facts))

    def check(self) -> dict[str, Any]:
        """The loss and both gradients."""
        with jax.default_matmul_precision("highest"):
            (loss, _), gradients = jax.jit(self._function)(self._views, self._facts)
        return {"loss": float(loss), "gradient 1": np.asarray(gradients[0]), "gradient 2": np.asarray(gradients[1])}
