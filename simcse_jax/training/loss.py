"""The loss of a global batch: its views encoded, its terms added up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from simcse_jax import rng
from simcse_jax.config import Config
from simcse_jax.data.batch import Batch
from simcse_jax.model import SentenceEncoder
from simcse_jax.model.params import Params
from simcse_jax.objectives import Marks, Pairs, dense, find_loss, tiled, unit, wants_clean
from simcse_jax.objectives.smoothing import is_full, push, smooth, smoothing_weight
from simcse_jax.runtime.mesh import AXES, batch_sharding, gather, gather_rows, replicated, state_sharding
from simcse_jax.training.masked_lm import MaskedSums, masked_mean, masked_sums
from simcse_jax.training.micro_batch import map_chunks
from simcse_jax.training.queue import Queue, earlier
from simcse_jax.training.spec import StepSpec
from simcse_jax.training.state import Buffer, learned_settings

Metrics = dict[str, Float[Array, ""]]

DENSE_BYTES = 2**26
"""Most that the logits of one device may take for the dense form to be chosen."""

BLOCK_SIZES = {"cpu": 1024, "tpu": 4096, "gpu": 8192}
"""Side of a tile, by platform."""


def encode_views(
    model: SentenceEncoder,
    params: Params,
    batch: Batch,
    key: Array,
    examples: Int[Array, " N"] | None = None,
    micro_batch: int = 0,
    shared_noise: bool = False,
    clean: bool = False,
) -> Float[Array, "N V H"]:
    """Training vectors of every view of every example: max(C, 2) of them, and one more with `clean`.

    An example of one sentence is encoded twice, each time under its own dropout noise (SimCSE, section 3). Sentence v
    of example n draws its noise from row n·V + v of `key`.

    With a micro-batch, that many examples are encoded at a time and only their vectors are kept; the backward pass
    encodes them again, under the same noise (GradCache, arXiv 2101.06983). Vectors and gradients do not depend on it.

    Args:
      model: the module.
      params: its parameters; where they hold those of a `second` encoder, it encodes all but the first sentences.
      batch: examples.
      key: key of the noise.
      examples: number of each example in the global batch; 0 to N−1 where None.
      micro_batch: examples encoded at a time; all where 0.
      shared_noise: all sentences of an example draw the noise of its first.
      clean: adds the first sentence once more, without noise, as the last view.
    """
    batch = batch.repeated(2 if batch.input_ids.shape[1] == 1 else 1)
    ids, lengths = jnp.asarray(batch.input_ids), jnp.asarray(batch.lengths)
    v = ids.shape[1]
    numbers = batch.numbers(jnp.arange(batch.valid.shape[0]) if examples is None else examples)
    if shared_noise:
        numbers = numbers // v * v
    if clean:
        ids, lengths = jnp.concatenate([ids, ids[:, :1]], axis=1), jnp.concatenate([lengths, lengths[:, :1]], axis=1)
        numbers = jnp.concatenate([numbers, jnp.full_like(numbers[:, :1], -1)], axis=1)

    def apply(params: Params, *part: Array) -> Float[Array, "r v S H"]:
        rows = (x.reshape(-1, x.shape[-1]) for x in part)
        vectors = jnp.asarray(model.apply({"params": params}, *rows, rngs={"dropout": key}))
        return vectors.reshape(*part[2].shape, -1)

    def encode(part: tuple[Array, ...]) -> Float[Array, "r V S H"]:
        first = {name: params[name] for name in ("encoder", "head")}
        if "second" not in params:
            return apply(first, *part)
        of_first = np.array([i in (0, v) for i in range(part[0].shape[1])])
        a = apply(first, *(x[:, of_first] for x in part))
        b = apply(params["second"], *(x[:, ~of_first] for x in part))
        return jnp.concatenate([a[:, :1], b, a[:, 1:]], axis=1)

    vectors = map_chunks(encode, (ids, lengths, numbers), batch.rows_at_a_time(micro_batch))
    return batch.by_example(vectors)


def uses_tiles(config: Config, mesh: Mesh, columns: int) -> bool:
    """Whether the step goes through its pairs in tiles.

    Args:
      config: the run.
      mesh: the mesh.
      columns: sentences of each example.
    """
    if config.objective.implementation != "auto":
        return config.objective.implementation == "tiled"
    itemsize = 8 if config.model.dtype == "float64" else 4
    kinds = max(columns - 1, 1) + ("query_to_query" in config.objective.negatives.directions)
    kinds += -(-config.objective.queue.size // config.batch_size)
    return kinds * config.batch_size**2 * itemsize / mesh.size > DENSE_BYTES


def choose_pairs(config: Config, mesh: Mesh, columns: int) -> Pairs:
    """How the step goes through its pairs; for the arguments see `uses_tiles`."""
    if not uses_tiles(config, mesh, columns):
        return partial(dense, gather=partial(gather_rows, mesh))
    settings = config.objective
    return partial(
        tiled,
        block=settings.block_size or BLOCK_SIZES[mesh.devices.flat[0].platform],
        mesh=mesh,
        axes=AXES,
        across=AXES[:1],
        dtype=None if settings.product_dtype == "float32" else settings.product_dtype,
    )


def make_loss(
    spec: StepSpec, params: Any, streams: str = ""
) -> Callable[..., tuple[Float[Array, ""], tuple[Metrics, Buffer]]]:
    """The loss of a global batch, `params, buffer, step, batch -> loss, (metrics, buffer)`, to be differentiated.

    With a queue, the function takes two arguments more: the queue, and what its copy of the encoder makes of the batch.

    Rows are encoded where they lie: devices exchange there the sum of the weights' gradients alone, once per step
    however many chunks there are. The objective is written over the global batch.

    Args:
      spec: the step.
      params: the parameters, or their `ShapeDtypeStruct`s.
      streams: begins the names of the streams of random numbers.

    Returns:
      A function whose metrics are `loss`, those of the contrast (see `contrast`), with smoothing its term `smoothing`
      and `smoothing_weight`, with a masked language model its cross-entropy `mlm` (nats per token) and `mlm_accuracy`,
      and with either of the two the contrast's own term, `contrastive`.
    """
    config, model, mesh, vocabulary = spec.config, spec.compiled_model, spec.mesh, spec.vocabulary
    shardings = state_sharding(mesh, params)
    objective, micro_batch = config.objective, spec.micro_batch
    loss_of = find_loss(objective.loss)
    clean = wants_clean(loss_of)
    rows, whole = batch_sharding(mesh).spec, replicated(mesh).spec

    # Unchecked, the transpose sums the weights' gradients over devices where they leave, once; checked, at each use, in
    # the loop over chunks. And jax 0.12 cannot check erf. Differentiated from outside, both are exact.
    @partial(jax.shard_map, mesh=mesh, in_specs=(whole, rows, whole), out_specs=rows, check_vma=False)
    def encode(params: Params, batch: Batch, keys: dict[str, Array]) -> tuple[Array | None, MaskedSums | None]:
        """Vectors for the contrast and sums of the masked language model, each None where it has no weight."""
        n, c = batch.valid.shape[0], batch.input_ids.shape[1]
        examples = jax.lax.axis_index(mesh.axis_names) * n + jnp.arange(n)
        z: Array | None = None
        sums: MaskedSums | None = None
        if objective.contrastive_weight:
            shared = objective.noise == "shared"
            z = encode_views(model, params, batch, keys["dropout"], examples, micro_batch, shared, clean)
        if objective.mlm.weight:
            assert vocabulary is not None
            # As many passes as the contrast makes: a sentence alone is masked twice (as in the public code).
            times = 2 if c == 1 and objective.contrastive_weight else 1
            drawn = keys["mlm"], keys["mlm_dropout"]
            probability = objective.mlm.probability
            repeated = batch.repeated(times)
            sums = masked_sums(model, params, repeated, examples, *drawn, vocabulary, probability, micro_batch)
        return z, sums

    def contrast(
        z1: Array,
        z2: Array,
        z3: Array | None,
        clean: Array | None,
        batch: Batch,
        learned: dict[str, Array],
        queue: Queue | None = None,
    ) -> tuple[Array, Metrics]:
        """The mean over Matryoshka widths, and the metrics of the last."""

        def fact(x: Any) -> Array | None:
            return None if x is None else jnp.asarray(x)[:, : None if z3 is not None else 2]

        marks = Marks(fact(batch.present), fact(batch.texts), fact(batch.guide))
        others = None if queue is None else earlier(objective.queue, queue)
        losses = []
        for width in objective.widths or (z1.shape[1],):
            extra = {} if clean is None else {"clean": clean[:, :width]}
            loss, metrics = loss_of(
                z1[:, :width],
                z2[:, :width],
                None if z3 is None else z3[..., :width],
                hard_negative_log_weight=objective.hard_negative_log_weight,
                valid=jnp.asarray(batch.valid),
                negatives=objective.negatives,
                marks=marks,
                earlier=None if others is None else others._replace(vectors=others.vectors[..., :width]),
                pairs=choose_pairs(config, mesh, columns=2 if z3 is None else batch.input_ids.shape[1]),
                **({"temperature": objective.temperature} | objective.options | learned),
                **extra,
            )
            losses.append(loss)
        return sum(losses) / len(losses), metrics

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=False)
    def smoothed(u: Array, buffer: Array) -> Array:
        return smooth(objective.smoothing, u, buffer)

    def contrastive(
        z: Array,
        batch: Batch,
        buffer: Buffer,
        step: Int[Array, ""],
        learned: dict[str, Array],
        queue: Queue | None,
        copied: Array | None,
    ) -> tuple[Float[Array, ""], Metrics, Buffer]:
        """The contrast and, with a buffer, its smoothing."""
        sentences = z.shape[1] - clean
        z3 = None if sentences == 2 else z[:, 2] if sentences == 3 else z[:, 2:sentences]
        noiseless = z[:, -1] if clean else None
        positives = z[:, 1] if copied is None or objective.queue.positives == "encoder" else copied
        loss, metrics = contrast(z[:, 0], positives, z3, noiseless, batch, learned, queue)
        metrics |= learned
        if buffer is not None:
            u = unit(z[:, 1])
            buffer = push(jax.lax.with_sharding_constraint(buffer, replicated(mesh)), u, jnp.asarray(batch.valid))
            term, _ = contrast(z[:, 0], smoothed(u, buffer), None, noiseless, batch, learned)
            weight = jnp.where(is_full(buffer), smoothing_weight(objective.smoothing, step, spec.total_steps), 0)
            metrics |= {"contrastive": loss, "smoothing": term, "smoothing_weight": weight}
            loss = loss + weight * term
        return loss, metrics, buffer

    def loss_fn(
        params: Params,
        buffer: Buffer,
        step: Int[Array, ""],
        batch: Batch,
        queue: Queue | None = None,
        copied: Array | None = None,
    ) -> tuple[Float[Array, ""], tuple[Metrics, Buffer]]:
        # Left to itself, XLA multiplies with split weights as they lie and moves the activations instead.
        params = jax.tree.map(gather, params, shardings)
        names = ["dropout"] * (objective.contrastive_weight > 0) + ["mlm", "mlm_dropout"] * (objective.mlm.weight > 0)
        keys = {name: rng.key(config.seed, streams + name, step) for name in names}
        z, sums = encode(params, batch, keys)
        loss: Array = jnp.zeros(())
        metrics: Metrics = {}
        if z is not None:
            loss, metrics, buffer = contrastive(z, batch, buffer, step, learned_settings(params), queue, copied)
            if sums is not None:
                metrics = {"contrastive": loss, **metrics}
            loss = objective.contrastive_weight * loss
        if sums is not None:
            mean = masked_mean(sums, jnp.asarray(batch.valid))
            loss = loss + objective.mlm.weight * mean.cross_entropy
            metrics |= {"mlm": mean.cross_entropy, "mlm_accuracy": mean.accuracy}
        return loss, ({"loss": loss, **metrics}, buffer)

    return loss_fn
