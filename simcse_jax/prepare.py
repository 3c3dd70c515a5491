"""Before the first step: a config checked against the machine and the files it names, and all that a run needs."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float

from simcse_jax import hf
from simcse_jax.batch import Packing
from simcse_jax.config import Config
from simcse_jax.data.augment import Augmenter, make_augmenter
from simcse_jax.data.batches import EpochOrder, fit_packing
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.tokens import TokenTable, read_vocabulary, tokenize_corpus
from simcse_jax.embedder import build_model, init_params, with_fresh_head
from simcse_jax.encode import BatchEncoder
from simcse_jax.errors import InputError
from simcse_jax.evaluation.geometry import geometry
from simcse_jax.evaluation.sts import Task, distinct_sentences, evaluate, load_task
from simcse_jax.files import is_remote
from simcse_jax.hf import Params
from simcse_jax.loss import uses_tiles
from simcse_jax.memory import CompiledStep, compile_step, state_shapes
from simcse_jax.mirror import Manifest, fetch_run, working_folder
from simcse_jax.model import SentenceEncoder
from simcse_jax.objectives import check_objective
from simcse_jax.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.run import Run, check_output, check_resume, create_run, is_run, open_run
from simcse_jax.sharding import check_batch_size, check_shared, make_mesh
from simcse_jax.tracking import check_tracking


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, checked and loaded before anything is written to the run folder."""

    run: Run
    fetched: Manifest | None
    """What an object store had of the run."""
    mesh: Mesh
    model: SentenceEncoder
    initial: Callable[[], Params | Callable[[], Params]]
    """Host parameters before the first step, or a function to be jitted that draws them."""
    tokens: TokenTable
    order: EpochOrder
    augmenter: Augmenter | None
    packing: Packing | None
    total_steps: int
    step: CompiledStep | None
    """None where the run has ended."""
    mlm_head: Literal["fresh", "checkpoint"] | None
    """Where the head of the masked language model is from, in a run that begins."""
    dev_scores: Callable[[Params], dict[str, float]] | None
    """`dev`, and alignment and uniformity of the dev pairs as `dev_alignment` and `dev_uniformity`."""
    test_scores: Callable[[Params], dict[str, float]] | None


def prepare(config: Config) -> Prepared:
    """Checks a config against the machine and the files it names, tokenises the text, and makes the run folder.

    Raises:
      InputError: anything that the run could not work with; the run folder is then as it was.
    """
    config.validate()
    check_objective(config.objective)
    check_tracking(config.tracking)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch_size(mesh, config.batch_size)
    folder = working_folder(config.output, config.data.cache)
    fetched: Manifest | None = None
    if is_remote(config.output):
        if jax.process_count() > 1:
            raise InputError(
                f"output {config.output} is on an object store, where one process can train: give the processes a "
                "folder that all share and that can rename folders, such as NFS, Filestore or Lustre"
            )
        fetched = fetch_run(config.output, folder)
    check_output(folder)
    check_shared(folder)

    resuming = open_run(folder) if is_run(folder) else None
    if resuming:
        # Before anything is loaded: settings that changed make the rest pointless.
        check_resume(resuming, config, resuming.data_fingerprint)
    checkpoint = hf.read_checkpoint(resuming.model_folder if resuming else config.model.path)
    if config.data.max_length > checkpoint.config.max_length:
        raise InputError(
            f"data.max_length is {config.data.max_length} but {config.model.path} has positions for "
            f"{checkpoint.config.max_length} tokens: use at most that"
        )
    check_objective(config.objective, checkpoint.config.hidden_size)
    model = build_model(checkpoint.config, config.model)
    tokenizer = hf.load_tokenizer(checkpoint.folder)
    mlm = config.objective.mlm.weight > 0
    vocabulary = read_vocabulary(tokenizer, checkpoint.config.vocab_size) if mlm else None
    encoder = BatchEncoder(model, tokenizer, mesh)
    dev_scores, test_scores = _scorers(config, encoder)

    corpus = open_corpus(config.data)
    # Process 0 fills a cache that others may share; where they do not, each fills its own afterwards.
    tokens = _first_on_process_0(
        lambda: tokenize_corpus(corpus, tokenizer, config.data.max_length, config.data.cache, jax.process_index() == 0)
    )
    if len(tokens) < 2 and config.objective.contrastive_weight:
        raise InputError(f"{config.data.train} holds one example; contrast needs two or more")
    order = EpochOrder(len(tokens), config.batch_size, config.seed)
    augmenter = make_augmenter(config.data, tokenizer, config.seed)
    if augmenter and tokens.columns > 1:
        raise InputError(
            f"data.augment is '{config.data.augment}' but each example of {config.data.train} has its positive already "
            f"({tokens.columns} columns): name one column with data.columns, or set data.augment to 'none'"
        )
    columns = 2 if augmenter else tokens.columns
    fingerprint = tokens.fingerprint + (augmenter.fingerprint if augmenter else "")
    total_steps = config.max_steps or config.epochs * order.steps_per_epoch

    def fit() -> tuple[Packing | None, CompiledStep]:
        length = config.data.packed_length
        packing = fit_packing(tokens, order, mesh.size, total_steps, length, augmenter) if length else None
        return packing, compile_step(config, model, mesh, columns, total_steps, vocabulary, packing)

    packing: Packing | None = None
    step: CompiledStep | None = None
    mlm_head: Literal["fresh", "checkpoint"] | None = None
    if resuming:
        check_resume(resuming, config, fingerprint)
        run, initial = replace(resuming, config=config), lambda: initial_params(config, model)
        if not run.has_ended():
            packing, step = fit()
    else:
        # Unreadable weights and a step that does not fit are found before the folder exists.
        loaded = initial_params(config, model)
        if mlm:
            mlm_head = "fresh" if callable(loaded) or "mlm" not in loaded else "checkpoint"
        _check_space(folder, config, model)
        packing, step = fit()
        _first_on_process_0(
            lambda: is_run(folder) or bool(create_run(folder, config, fingerprint, checkpoint, tokenizer))
        )
        run, initial = Run(folder, config, fingerprint), lambda: loaded
    return Prepared(
        run,
        fetched,
        mesh,
        model,
        initial,
        tokens,
        order,
        augmenter,
        packing,
        total_steps,
        step,
        mlm_head,
        dev_scores,
        test_scores,
    )


def initial_params(config: Config, model: SentenceEncoder) -> Params | Callable[[], Params]:
    """Host parameters before the first step, or a function to be jitted that draws them.

    Where the run has a masked language model and the checkpoint its head, that is among them, as `mlm`.

    Raises:
      InputError: weights that cannot be read or do not fit, or no head where the config asks for the checkpoint's.
    """
    if config.model.random_init:
        return lambda: init_params(model, config.seed)
    checkpoint = hf.read_checkpoint(config.model.path)
    params = hf.load_params(checkpoint, model.param_dtype, mlm=config.objective.mlm.weight > 0)
    uses_head = config.model.pooler == "cls"
    if uses_head and config.model.head == "checkpoint" and "head" not in params:
        raise InputError(f"model.head is 'checkpoint' but {config.model.path} has no weights pooler.dense")
    # A head that no pooler uses stays what the checkpoint holds, so that exporting it changes nothing.
    if "head" not in params or (uses_head and config.model.head == "fresh"):
        params = with_fresh_head(params, model, config.seed)
    return params


def describe(prepared: Prepared) -> str:
    """What a run is about to do, in a few lines."""
    config, mesh, tokens = prepared.run.config, prepared.mesh, prepared.tokens
    size = sum(x.size for x in jax.tree.leaves(hf.param_shapes(prepared.model.config)))
    n = min(config.batch_size, len(tokens))
    hard = tokens.columns == 3
    skipped = f" ({tokens.skipped:,} with a blank sentence left out)" if tokens.skipped else ""
    kind = {1: "sentences", 2: "pairs", 3: "triplets"}[tokens.columns]
    pairs = "tiled" if uses_tiles(config, mesh, 2 if hard else 1) else "dense"
    batch = (
        f"{2 * n - 1 if hard else n - 1:,} negatives per anchor{f' ({n:,} of them hard negatives)' if hard else ''}, "
        f"{pairs} InfoNCE"
        if config.objective.contrastive_weight
        else "no contrast"
    )
    return "\n".join(
        [
            f"model     {config.model.path}, {size / 1e6:.1f} M parameters, {config.model.dtype}, "
            f"pooler {config.model.pooler}{' (head in training only)' if config.model.mlp_only_train else ''}",
            f"devices   {mesh.size} × {mesh.devices.flat[0].device_kind} in {jax.process_count()} process(es), "
            f"data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}",
            f"data      {len(tokens):,} {kind}{skipped} from {config.data.train}",
            f"batch     {config.batch_size:,} over all devices: {batch}",
            *_describe_mlm(prepared),
            *_describe_packing(prepared),
            *(_describe_step(prepared.step, config.batch_size // mesh.size) if prepared.step else []),
            f"steps     {prepared.total_steps:,}, peak learning rate {config.optimizer.learning_rate:g}",
            f"output    {prepared.run.folder}" + (f", copied to {config.output}" if is_remote(config.output) else ""),
        ]
    )


def _describe_mlm(prepared: Prepared) -> list[str]:
    settings = prepared.run.config.objective.mlm
    if not settings.weight:
        return []
    heads = {"fresh": ", its head fresh", "checkpoint": ", its head from the checkpoint", None: ""}
    return [
        f"masked    {settings.probability:.0%} of the tokens of every sentence, weight {settings.weight:g}"
        f"{heads[prepared.mlm_head]}"
    ]


def _describe_packing(prepared: Prepared) -> list[str]:
    if (packing := prepared.packing) is None:
        return []
    table, share = prepared.tokens, prepared.order.batch_size // prepared.mesh.size
    tokens = share * float(np.mean(np.diff(table.offsets)))
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


def _scorers(
    config: Config, encoder: BatchEncoder
) -> tuple[Callable[[Params], dict[str, float]] | None, Callable[[Params], dict[str, float]] | None]:
    """Functions from parameters to the dev figures and to the table of test scores, where the config asks for them."""
    settings = config.evaluation
    dev = load_task(settings.dev, settings.data, "dev") if settings.dev else None
    test = [load_task(name, settings.data, "test") for name in settings.test]

    def dev_scores(task: Task, params: Params) -> dict[str, float]:
        sentences = distinct_sentences([task])
        vectors = dict(zip(sentences, encoder(params, sentences), strict=True))

        def encode(wanted: list[str]) -> Float[np.ndarray, "S H"]:
            return np.stack([vectors[sentence] for sentence in wanted])

        score = evaluate([task], encode)["reported"][task.name]
        return {"dev": score, **{f"dev_{name}": value for name, value in geometry(task, encode).items()}}

    def test_scores(params: Params) -> dict[str, float]:
        reported: dict[str, float] = evaluate(test, lambda sentences: encoder(params, sentences))["reported"]
        return reported

    return partial(dev_scores, dev) if dev else None, test_scores if test else None


T = TypeVar("T")


def _first_on_process_0(action: Callable[[], T]) -> T:
    """Runs `action` on process 0, then on the others."""
    result = action() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_on_process_0")
        result = action() if result is None else result
    assert result is not None
    return result


def _check_space(folder: Path, config: Config, model: SentenceEncoder) -> None:
    optimizer = make_optimizer(config.optimizer, learning_rate_schedule(config.optimizer, 1))
    state = state_shapes(config, model, optimizer)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # One checkpoint more than is kept exists while the next is written.
    needed = size * (config.checkpoint.keep + 1 + bool(config.evaluation.dev))
    free = shutil.disk_usage(next(p for p in folder.absolute().parents if p.exists())).free
    if needed > free:
        raise InputError(
            f"checkpoints in {folder} need up to {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            "free space or choose another --output"
        )
