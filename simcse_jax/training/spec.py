"""All that a compiled train step follows from, as one object."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from simcse_jax.config import Config
from simcse_jax.data.batch import Batch, Packing
from simcse_jax.model import SentenceEncoder
from simcse_jax.model.params import Params
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.pretrained.weights import param_shapes
from simcse_jax.runtime.mesh import batch_sharding, put, state_sharding, with_sharding
from simcse_jax.training.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.training.queue import empty_queue
from simcse_jax.training.state import TrainState, document_encoder, shardings_of, state_of


@dataclass(frozen=True)
class StepSpec:
    """A run's train step, before it is traced: settings, module, devices and the shape of a batch."""

    config: Config
    """The run."""
    model: SentenceEncoder
    mesh: Mesh
    columns: int
    """C, the number of sentences in each example: 1, 2 (with its positive) or more (with hard negatives too)."""
    total_steps: int
    """Steps of the run, for the learning rate and for weights that change over it."""
    vocabulary: Vocabulary | None = None
    """Token ids that masking draws from; needed where the objective masks tokens."""
    packing: Packing | None = None
    """The shape of packed rows; None where a row is a sentence."""
    ragged: bool = False
    """Whether some examples lack hard negatives that others have."""
    text_columns: int = 1
    """Sentences of an example in the text, without those that augmentation makes."""
    guide_width: int = 0
    """Width of the guide's vectors; 0 without a guide."""

    @cached_property
    def schedule(self) -> optax.Schedule:
        """The learning rate by step."""
        return learning_rate_schedule(self.config.optimizer, self.total_steps)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer under the schedule."""
        return make_optimizer(self.config.optimizer, self.schedule)

    @property
    def compiled_model(self) -> SentenceEncoder:
        """The module with its layers scanned or not, as the config says or as the mesh's compiler does best."""
        if self.config.model.scan is not None:
            return self.model
        # Outside of a loop, XLA's compiler for CPUs merges what `remat` computes again with what it was to replace.
        scanned: SentenceEncoder = self.model.clone(
            scan=self.model.remat or self.mesh.devices.flat[0].platform == "tpu"
        )
        return scanned

    @property
    def micro_batch(self) -> int:
        """Examples that a device encodes at a time; all where 0. `auto` has to be resolved first."""
        assert self.config.micro_batch != "auto"
        return self.config.micro_batch

    def with_micro_batch(self, size: int) -> "StepSpec":
        """The same step with `size` examples encoded at a time."""
        return replace(self, config=replace(self.config, micro_batch=size))

    def state_of(self, params: Params) -> TrainState:
        """The train state before the first step, for parameters that are in place. May be traced."""
        state = state_of(self.config, params, self.optimizer, self.model.config.initializer_range)
        if self.config.objective.queue.size:
            encoder = document_encoder(state.params)
            state = state._replace(queue=empty_queue(self.config.objective.queue, encoder, self.batch_shapes()))
        return state

    def state_shapes(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state, found without tracing the model."""
        params = param_shapes(self.model.config, self.model.param_dtype)
        shapes: TrainState = jax.eval_shape(self.state_of, params)
        placed: TrainState = with_sharding(shapes, shardings_of(self.mesh, shapes))
        return placed

    def batch_shapes(self) -> Batch:
        """Shapes, dtypes and shardings of a global batch."""
        n, c, devices = self.config.batch_size, self.columns, self.mesh.size
        length, slots, rows = self.packing or (self.config.data.max_length, 1, n // devices)
        shapes: Batch = jax.eval_shape(
            lambda: Batch(
                jnp.zeros((rows * devices, c, length), jnp.int32),
                jnp.zeros((rows * devices, c, slots), jnp.int32),
                jnp.zeros(n, bool),
                jnp.zeros((n, c), jnp.int32) if self.packing else None,
                jnp.zeros((n, c), bool) if self.ragged else None,
                jnp.zeros((n, self.text_columns, 2), jnp.uint32)
                if self.config.objective.negatives.duplicates
                else None,
                jnp.zeros((n, c, self.guide_width), jnp.float32) if self.guide_width else None,
            )
        )
        placed: Batch = with_sharding(shapes, jax.tree.map(lambda _: batch_sharding(self.mesh), shapes))
        return placed


def create_state(spec: StepSpec, params: Params | Callable[[], Params]) -> TrainState:
    """The state before the first step, placed on the mesh.

    Args:
      spec: the step.
      params: host arrays, the same on every process, or a function to be jitted that draws them.
    """
    if callable(params):
        params = jax.jit(params, out_shardings=state_sharding(spec.mesh, jax.eval_shape(params)))()
    else:
        params = put(params, state_sharding(spec.mesh, params))
    shardings = shardings_of(spec.mesh, jax.eval_shape(spec.state_of, params))
    # Donated, so that the parameters are not there twice.
    state: TrainState = jax.jit(spec.state_of, out_shardings=shardings, donate_argnums=0)(params)
    return state
