"""The train state: what a step changes, how it begins, and how it lies on disk."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from simcse_jax import rng
from simcse_jax.config import Config
from simcse_jax.errors import InputError
from simcse_jax.inference.loading import initial_weights
from simcse_jax.model import SentenceEncoder, init_mlm_head
from simcse_jax.model.build import init_params, with_fresh_head
from simcse_jax.model.params import Params
from simcse_jax.objectives.find import initial_bias
from simcse_jax.runtime.mesh import state_sharding
from simcse_jax.training.queue import Queue, queue_sharding

Buffer = Float[Array, "Q H"] | None
"""Latest positives of length 1, where the run smooths instances."""


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]
    params: Params
    """Of the sentence encoder, `encoder` and `head`; besides, what only training needs: `second`, another encoder,
    `mlm`, the head of the masked language model, and `contrast`, the settings of the loss that are learned."""
    opt_state: optax.OptState
    buffer: Buffer = None
    """Latest positives of length 1, oldest first, where the run smooths instances."""
    queue: Queue | None = None
    """Negatives of earlier batches, where the run has them."""


def document_encoder(params: Params) -> Params:
    """The parameters of what encodes positives."""
    found: Params = params["second"] if "second" in params else sentence_encoder(params)
    return found


def shardings_of(mesh: Mesh, state: Any) -> Any:
    """Shardings of a `TrainState`, or of its shapes."""
    found: TrainState = state_sharding(mesh, state)
    return found if found.queue is None else found._replace(queue=queue_sharding(mesh, found.queue))


def sentence_encoder(params: Params) -> Params:
    """The parameters without those that only training needs."""
    return {name: params[name] for name in ("encoder", "head") if name in params}


def state_of(
    config: Config, params: Params, optimizer: optax.GradientTransformation, initializer_range: float
) -> TrainState:
    """The state before the first step, for parameters of a sentence encoder that are in place.

    Args:
      config: the run.
      params: `encoder` and `head`; also `mlm`, where the checkpoint had the head of a masked language model.
      optimizer: the optimizer.
      initializer_range: standard deviation of fresh weights, which are those of that head.
    """
    if config.model.encoders == 2:
        params = {**params, "second": jax.tree.map(jnp.copy, sentence_encoder(params))}
    if config.objective.mlm.weight and "mlm" not in params:
        table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
        params = {**params, "mlm": init_mlm_head(rng.key(config.seed, "init_mlm"), table, initializer_range)}
    if learned := config.objective.learned:
        first = {"temperature": -math.log(config.objective.temperature)}
        first |= {"bias": initial_bias(config.objective)} if "bias" in learned else {}
        dtype = jnp.promote_types(params["head"]["dense"]["bias"].dtype, jnp.float32)
        params = {**params, "contrast": {_LEARNED[name]: jnp.asarray(first[name], dtype) for name in learned}}
    buffer = None
    if config.objective.smoothing.weight:
        bias = params["head"]["dense"]["bias"]
        dtype = jnp.promote_types(bias.dtype, jnp.float32)
        buffer = jnp.zeros((config.objective.smoothing.buffer_size, len(bias)), dtype)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), buffer)


_LEARNED = {"temperature": "log_scale", "bias": "bias"}


def learned_settings(params: Params) -> dict[str, Float[Array, ""]]:
    """The temperature and the bias among the parameters, if any."""
    found = params.get("contrast", {})
    values = {name: found[key] for name, key in _LEARNED.items() if key in found}
    return values | ({"temperature": jnp.exp(-values["temperature"])} if "temperature" in values else {})


def bounded(config: Config, params: Params) -> Params:
    """The parameters with a learned temperature moved back into its range."""
    if "temperature" not in config.objective.learned:
        return params
    least, most = (-math.log(x) for x in reversed(config.objective.temperature_range))
    contrast = params["contrast"]
    return {**params, "contrast": {**contrast, "log_scale": jnp.clip(contrast["log_scale"], least, most)}}


def to_items(state: TrainState) -> dict[str, Any]:
    """A state as the named trees of a checkpoint: the sentence encoder's parameters apart from all that only training
    needs."""
    params = sentence_encoder(state.params)
    items: dict[str, Any] = {"params": params, "training": {"step": state.step, "opt_state": state.opt_state}}
    if auxiliary := {name: x for name, x in state.params.items() if name not in params}:
        items["auxiliary"] = auxiliary
    if state.buffer is not None:
        items["training"]["buffer"] = state.buffer
    if state.queue is not None:
        items["training"]["queue"] = {name: x for name, x in state.queue._asdict().items() if x is not None}
    return items


def from_items(items: dict[str, Any]) -> TrainState:
    """The inverse of `to_items`."""
    training = items["training"]
    params = items["params"] | items.get("auxiliary", {})
    queue = Queue(**training["queue"]) if "queue" in training else None
    return TrainState(training["step"], params, training["opt_state"], training.get("buffer"), queue)


def initial_params(config: Config, model: SentenceEncoder) -> Params | Callable[[], Params]:
    """Host parameters before the first step, or a function to be jitted that draws them.

    Where the run has a masked language model and the checkpoint its head, that is among them, as `mlm`.

    Raises:
      InputError: weights that cannot be read or do not fit, or no head where the config asks for the checkpoint's.
    """
    if config.model.random_init:
        return lambda: init_params(model, config.seed)
    params = initial_weights(config.model.path, model, mlm=config.objective.mlm.weight > 0)
    uses_head = model.pooler == "cls"
    if uses_head and config.model.head == "checkpoint" and "head" not in params:
        raise InputError(f"model.head is 'checkpoint' but {config.model.path} has no weights pooler.dense")
    # A head that no pooler uses stays what the checkpoint holds, so that exporting it changes nothing.
    if "head" not in params or (uses_head and config.model.head == "fresh"):
        params = with_fresh_head(params, model, config.seed)
    return params
