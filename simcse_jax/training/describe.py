"""The lines that a run begins with: what it is about to do."""

import jax

from simcse_jax.config import Config
from simcse_jax.data.columns import kind_of
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.table import TokenTable
from simcse_jax.objectives.find import masks_of
from simcse_jax.postprocess.stored import has_more_modules
from simcse_jax.pretrained.pooling import pooling_of
from simcse_jax.pretrained.weights import param_shapes
from simcse_jax.runtime.mesh import layout
from simcse_jax.storage.files import is_remote
from simcse_jax.training.compiled_step import CompiledStep
from simcse_jax.training.loss import uses_tiles
from simcse_jax.training.prepare import Parts, Prepared

_LOSSES = {"info_nce": "InfoNCE"}


def describe(prepared: Prepared) -> str:
    """What a run is about to do, in a few lines."""
    config, mesh, tokens = prepared.run.config, prepared.spec.mesh, prepared.feed.table
    size = sum(x.size for x in jax.tree.leaves(param_shapes(prepared.spec.model.config)))
    n = min(config.batch_size, len(tokens))
    skipped = f" ({tokens.skipped:,} with a blank sentence left out)" if tokens.skipped else ""
    pairs = "tiled" if uses_tiles(config, mesh, tokens.columns) else "dense"
    batch = (
        f"{_negatives(config, tokens, n)}, {pairs} {_LOSSES.get(config.objective.loss, config.objective.loss)}"
        if config.objective.contrastive_weight
        else "no contrast"
    )
    return "\n".join(
        [
            f"model     {config.model.path}, {size / 1e6:.1f} M parameters, {config.model.dtype}, "
            f"pooler {config.model.pooler}{' (head in training only)' if config.model.mlp_only_train else ''}",
            *_describe_start(prepared.parts),
            f"devices   {mesh.size} × {mesh.devices.flat[0].device_kind} in {jax.process_count()} process(es), "
            f"{layout(mesh.shape)}",
            f"data      {len(tokens):,} {kind_of(tokens.columns)}{skipped} from {config.data.train}",
            *(f"          {line}" for line in tokens.origin),
            f"batch     {config.batch_size:,} over all devices: {batch}",
            *_describe_distinct(prepared.feed.order),
            *_describe_mlm(prepared),
            *_describe_packing(prepared),
            *(_describe_step(prepared.step, config.batch_size // mesh.size) if prepared.step else []),
            *_describe_dev(prepared),
            f"steps     {prepared.spec.total_steps:,}, peak learning rate {config.optimizer.learning_rate:g}",
            f"output    {_describe_output(prepared)}",
        ]
    )


def _describe_output(prepared: Prepared) -> str:
    folder, store, output = prepared.run.folder, prepared.run.store, prepared.run.config.output
    if store:
        return f"{store}: checkpoints, written by all processes; the rest copied from {folder} by the first"
    return f"{folder}, copied to {output}" if is_remote(output) else str(folder)


def _negatives(config: Config, tokens: TokenTable, batch: int) -> str:
    """The number of negatives of an anchor in a whole batch."""
    hard, settings = batch * max(tokens.columns - 2, 0), config.objective.negatives
    count = (batch - 1) * len(settings.directions) + hard
    found = ", ".join(masks_of(settings))
    queue = config.objective.queue.size
    notes = [f" ({hard:,} of them hard negatives)"] * bool(hard) + [f" and {queue:,} of a queue"] * bool(queue)
    most = "up to " if found or tokens.missing is not None else ""
    return f"{most}{count:,} negatives per anchor{''.join(notes)}{f', masked by {found}' if found else ''}"


def _describe_distinct(order: EpochOrder) -> list[str]:
    """What batches without repeated texts leave out."""
    if order.texts is None:
        return []
    left = order.n - sum(order.size(step) for step in range(order.steps_per_epoch))
    return [
        f"distinct  {left:,} of {order.n:,} examples left out of the first epoch: each batch has one of their texts"
    ]


def _describe_start(parts: Parts) -> list[str]:
    """What a run that begins keeps of a model that was a sentence encoder already, and what its settings replace."""
    start, trained, settings = parts.start, parts.checkpoint, parts.config.model
    if trained is start:  # resumed
        return []
    kept: list[str] = []
    replaced: list[str] = []
    if own := start.own_pooling:
        (kept if own == pooling_of(settings).at_evaluation else replaced).append(f"pooler {own}")
    if own == "cls" == settings.pooler and settings.head == "fresh":
        replaced.append("head (model.head 'checkpoint' keeps it)")
    if start.normalizes:
        (kept if trained.normalizes else replaced).append("Normalize")
    if start.max_length < start.config.max_length:
        (kept if trained.max_length == start.max_length else replaced).append(f"limit of {start.max_length} tokens")
    if has_more_modules(start.root, start.hf_config):
        replaced.append("modules after the pooler")
    if prompt := start.prompts.text():
        kept.append(f"prompt '{prompt}' (where sentences are encoded, not in the training text)")
    found = (("kept", kept), ("replaced", replaced))
    return [f"{what:<9} of the starting model: {', '.join(names)}" for what, names in found if names]


def _describe_mlm(prepared: Prepared) -> list[str]:
    settings = prepared.run.config.objective.mlm
    if not settings.weight:
        return []
    heads = {"fresh": ", its head fresh", "checkpoint": ", its head from the checkpoint", None: ""}
    return [
        f"masked    {settings.probability:.0%} of the tokens of every sentence, weight {settings.weight:g}"
        f"{heads[prepared.start.mlm_head]}"
    ]


def _describe_dev(prepared: Prepared) -> list[str]:
    parts = prepared.parts
    return [f"dev       {parts.dev_about}; selects by {parts.dev_metric}"] if parts.dev_scores else []


def _describe_packing(prepared: Prepared) -> list[str]:
    feed = prepared.feed
    if (packing := feed.packing) is None:
        return []
    table, share = feed.table, feed.order.batch_size // feed.mesh.size
    tokens = share * table.mean_length
    computed = packing.rows * packing.length
    return [
        f"packing   {share:,} sentences in {packing.rows:,} rows of {packing.length}, {computed:,} tokens of which "
        f"{tokens / computed:.0%} are text; padded {share * table.max_length:,}"
    ]


def _describe_step(step: CompiledStep, rows: int) -> list[str]:
    chunks = "at once" if step.micro_batch == rows else f"{step.micro_batch:,} at a time, twice (GradCache)"
    free = "" if step.available is None else f", {step.available / 1e9:.2f} GB available"
    return [
        f"encoding  {rows:,} examples a device, {chunks}",
        f"memory    {(step.needed or 0) / 1e9:.2f} GB a device for the step{free}",
    ]
