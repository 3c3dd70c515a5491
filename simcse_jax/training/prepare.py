"""Before the first step: a config checked against the machine and the files it names, and all that a run needs."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from simcse_jax.config import Config
from simcse_jax.data.augment import Augmenter, make_augmenter
from simcse_jax.data.batch import Packing
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.feed import fit_packing
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.tokens import TokenTable, read_vocabulary, tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.model import SentenceEncoder
from simcse_jax.model.build import build_model
from simcse_jax.model.params import Params
from simcse_jax.objectives import check_objective
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runs.folder import Run, check_output, check_resume, create_run, is_run, open_run
from simcse_jax.runs.tracking import check_tracking
from simcse_jax.runtime.mesh import check_batch_size, make_mesh
from simcse_jax.runtime.processes import _first_on_process_0, check_shared
from simcse_jax.storage.files import is_remote
from simcse_jax.storage.mirror import Manifest, fetch_run, working_folder
from simcse_jax.training.compiled_step import CompiledStep, compile_step, state_shapes
from simcse_jax.training.optimizer import learning_rate_schedule, make_optimizer
from simcse_jax.training.scores import _scorers
from simcse_jax.training.state import initial_params


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
    checkpoint = read_checkpoint(resuming.model_folder if resuming else config.model.path)
    if config.data.max_length > checkpoint.config.max_length:
        raise InputError(
            f"data.max_length is {config.data.max_length} but {config.model.path} has positions for "
            f"{checkpoint.config.max_length} tokens: use at most that"
        )
    check_objective(config.objective, checkpoint.config.hidden_size)
    model = build_model(checkpoint.config, config.model)
    tokenizer = load_tokenizer(checkpoint.folder)
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
