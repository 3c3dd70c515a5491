"""BERT-flow: a normalising flow from sentence vectors to a standard Gaussian (Li et al., arXiv 2011.05864).

The flow is Glow (Kingma & Dhariwal, arXiv 1807.03039) on plain vectors: steps of ActNorm, an invertible linear map and
an affine coupling, z = f(x). It is fitted by maximum likelihood, log p(x) = log N(f(x); 0, I) + log |det ∂f/∂x|, and
the latent z is the sentence vector. The encoder's weights stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from simcse_jax.config.postprocess import FlowSettings
from simcse_jax.errors import InputError

Tree = dict[str, Any]
_SAMPLE = 8192  # vectors over which the likelihood is reported


@partial(jax.tree_util.register_dataclass, data_fields=["params", "fixed"], meta_fields=[])
@dataclass(frozen=True)
class Flow:
    """A Glow on vectors of width H, in K steps, from `fit_flow`.

    A step, row by row:

    - ActNorm: y = (x + b) ⊙ exp(log s)
    - linear: y = W x, W = P L (U + diag(sign ⊙ exp(log d))) with L unit lower and U strictly upper triangular, P a
      permutation; log |det W| = Σ log d
    - coupling, with x = [u, v] cut in halves: y = [u, (v + t) ⊙ σ], (a, t) = MLP(u), σ = sigmoid(a + 2)

    Attributes:
      params: the fitted arrays, each stacked over the steps: bias, scale [K, H]; lower, upper [K, H, H]; diagonal
        [K, H]; w0, b0, w1, b1, w2, b2 of the MLP.
      fixed: permutation int32 [K, H], sign [K, H].
    """

    params: Tree
    fixed: Tree

    @property
    def width(self) -> int:
        """H."""
        return int(np.shape(self.fixed["sign"])[-1])

    def __call__(self, x: Float[Array, "S H"]) -> Float[Array, "S H"]:
        """z = f(x)."""
        return self.forward(x)[0]

    def forward(self, x: Float[Array, "S H"]) -> tuple[Float[Array, "S H"], Float[Array, " S"]]:
        """z = f(x) and log |det ∂f/∂x|, one number per row."""

        def body(carry: tuple[Array, Array], step: tuple[Tree, Tree]) -> tuple[tuple[Array, Array], None]:
            x, log_det = carry
            x, added = _step(*step, x)
            return (x, log_det + added), None

        (z, log_det), _ = jax.lax.scan(body, (x, jnp.zeros(x.shape[0], x.dtype)), (self.params, self.fixed))
        return z, log_det

    def inverse(self, z: Float[Array, "S H"]) -> Float[Array, "S H"]:
        """x = f⁻¹(z)."""

        def body(z: Array, step: tuple[Tree, Tree]) -> tuple[Array, None]:
            return _inverse_step(*step, z), None

        return jax.lax.scan(body, z, (self.params, self.fixed), reverse=True)[0]

    def log_likelihood(self, x: Float[Array, "S H"]) -> Float[Array, " S"]:
        """log p(x), in nats, one number per row."""
        z, log_det = self.forward(x)
        return -0.5 * jnp.sum(z**2, axis=1) - 0.5 * z.shape[1] * jnp.log(2 * jnp.pi) + log_det


_product: Callable[..., Any] = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _triangles(p: Tree, fixed: Tree) -> tuple[Array, Array]:
    lower = jnp.tril(p["lower"], -1) + jnp.eye(p["lower"].shape[0], dtype=p["lower"].dtype)
    return lower, jnp.triu(p["upper"], 1) + jnp.diag(fixed["sign"] * jnp.exp(p["diagonal"]))


def _scale_and_shift(p: Tree, u: Array) -> tuple[Array, Array]:
    """log σ and t of a coupling."""
    hidden = jax.nn.relu(_product(u, p["w0"]) + p["b0"][None])
    hidden = jax.nn.relu(_product(hidden, p["w1"]) + p["b1"][None])
    a, t = jnp.split(_product(hidden, p["w2"]) + p["b2"][None], 2, axis=1)
    return jax.nn.log_sigmoid(a + 2), t


def _step(p: Tree, fixed: Tree, x: Array) -> tuple[Array, Array]:
    x = (x + p["bias"][None]) * jnp.exp(p["scale"])[None]
    lower, upper = _triangles(p, fixed)
    x = _product(_product(x, upper.T), lower.T)[:, fixed["permutation"]]
    u, v = jnp.split(x, [x.shape[1] // 2], axis=1)
    log_scale, t = _scale_and_shift(p, u)
    x = jnp.concatenate([u, (v + t) * jnp.exp(log_scale)], axis=1)
    return x, jnp.sum(p["scale"]) + jnp.sum(p["diagonal"]) + jnp.sum(log_scale, axis=1)


def _inverse_step(p: Tree, fixed: Tree, y: Array) -> Array:
    u, v = jnp.split(y, [y.shape[1] // 2], axis=1)
    log_scale, t = _scale_and_shift(p, u)
    y = jnp.concatenate([u, v * jnp.exp(-log_scale) - t], axis=1)
    lower, upper = _triangles(p, fixed)
    y = y[:, jnp.argsort(fixed["permutation"])]
    y = solve_triangular(upper, solve_triangular(lower, y.T, lower=True, unit_diagonal=True)).T
    x: Array = y * jnp.exp(-p["scale"])[None] - p["bias"][None]
    return x


def init_flow(vectors: Float[np.ndarray, "S H"], settings: FlowSettings) -> Flow:
    """A flow before training: random rotations, couplings that scale by sigmoid(2), and ActNorms that give the sample
    mean 0 and variance 1 in front of each linear map (data-dependent initialisation, Glow, section 3.1).

    Args:
      vectors: the sample, float32 or float64; the flow has the same type.
      settings: its size.
    """
    from scipy.linalg import lu

    rng, width, dtype = np.random.default_rng(settings.seed), vectors.shape[1], vectors.dtype
    half, hidden = width // 2, settings.hidden
    x = jnp.asarray(vectors)
    steps: list[tuple[Tree, Tree]] = []
    for _ in range(settings.steps):
        rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
        permutation, lower, upper = lu(rotation, p_indices=True)
        mean, spread = np.mean(x, axis=0), np.std(x, axis=0)
        params = {
            "bias": -mean,
            "scale": -np.log(np.maximum(spread, 1e-6)),
            "lower": lower,
            "upper": upper,
            "diagonal": np.log(np.abs(np.diag(upper))),
            "w0": rng.normal(size=(half, hidden)) * (2 / half) ** 0.5,
            "b0": np.zeros(hidden),
            "w1": rng.normal(size=(hidden, hidden)) * (2 / hidden) ** 0.5,
            "b1": np.zeros(hidden),
            "w2": np.zeros((hidden, 2 * (width - half))),
            "b2": np.zeros(2 * (width - half)),
        }
        step = {name: np.asarray(value, dtype) for name, value in params.items()}
        fixed = {"permutation": permutation.astype(np.int32), "sign": np.sign(np.diag(upper)).astype(dtype)}
        x = jax.jit(_step)(step, fixed, x)[0]
        steps.append((step, fixed))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
    return Flow(*stacked)


def fit_flow(vectors: Float[np.ndarray, "S H"], settings: FlowSettings | None = None) -> tuple[Flow, list[float]]:
    """Fits a flow by maximum likelihood with Adam, the gradient clipped to norm 1.

    Args:
      vectors: the sample, float32 or float64; the arithmetic has the same type.
      settings: size and training.

    Returns:
      The flow, of NumPy arrays; and the mean log-likelihood in nats per dimension, before each pass and at the end,
      over the sample or its first 8,192.

    Raises:
      InputError: too few vectors, or training that diverged.
    """
    import optax

    settings = settings or FlowSettings()
    settings.validate()
    if len(vectors) < settings.batch_size:
        raise InputError(
            f"a flow is fitted in batches of {settings.batch_size} sentences but only {len(vectors):,} are given: "
            "give more distinct sentences, or a smaller flow.batch_size"
        )
    if vectors.shape[1] < 2:
        raise InputError("a flow needs vectors of width 2 or more, to cut them in halves")
    x, flow = jnp.asarray(vectors), init_flow(vectors, settings)
    params, fixed = flow.params, flow.fixed
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(settings.learning_rate))
    state = optimizer.init(params)

    def loss(params: Tree, rows: Array) -> Array:
        return -jnp.mean(Flow(params, fixed).log_likelihood(rows)) / rows.shape[1]

    def step(carry: tuple[Tree, Any], rows: Array) -> tuple[tuple[Tree, Any], Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, x[rows])
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    epoch = jax.jit(lambda carry, order: jax.lax.scan(step, carry, order)[0])
    likelihood = jax.jit(lambda params: -loss(params, x[:_SAMPLE]))
    rng, history = np.random.default_rng(settings.seed), [float(likelihood(params))]
    batches = len(x) // settings.batch_size
    for _ in range(settings.epochs):
        order = rng.permutation(len(x))[: batches * settings.batch_size].reshape(batches, -1)
        params, state = epoch((params, state), order)
        history.append(float(likelihood(params)))
    # Also where it is not a number; the first steps may lower it by a few hundredths.
    if not history[-1] > history[0] - 1:
        raise InputError(
            f"the flow diverged: its log-likelihood went from {history[0]:.3g} to {history[-1]:.3g} nats per "
            "dimension: lower flow.learning_rate"
        )
    return Flow(jax.tree.map(np.asarray, params), fixed), history
