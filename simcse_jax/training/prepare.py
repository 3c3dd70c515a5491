"""Before the first step: a config checked against the machine and the files it names, and all that a run needs.

Five functions, in this order: `check_request` reads the tasks and the first lines of the text, `load_parts` the model,
`make_feed` the text, `fit` compiles the step, and `begin` alone writes.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simcse_jax.config import Config
from simcse_jax.config.values import check_types
from simcse_jax.data.augment import make_augmenter
from simcse_jax.data.corpus import Corpus, open_corpus
from simcse_jax.data.feed import Feed, order_of
from simcse_jax.data.files import Files
from simcse_jax.data.token_store import check_cache
from simcse_jax.data.tokens import read_vocabulary, tokenize_corpus
from simcse_jax.errors import InputError, check_all
from simcse_jax.inference.loading import LoadedModel, encoder_of
from simcse_jax.model import SentenceEncoder
from simcse_jax.model.build import build_model
from simcse_jax.model.params import Params
from simcse_jax.objectives import check_objective, find_loss, wants_clean
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.pretrained.folders import Checkpoint, read_checkpoint
from simcse_jax.pretrained.pooling import pooling_of, settled
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.reports.progress import note
from simcse_jax.runs.folder import (
    Run,
    changes,
    check_contents,
    check_output,
    check_resume,
    create_run,
    is_run,
    open_run,
)
from simcse_jax.runs.lock import check_free
from simcse_jax.runs.tracking import check_tracking
from simcse_jax.runtime.mesh import check_batch_size, make_mesh
from simcse_jax.runtime.processes import check_shared, first_on_process_0
from simcse_jax.storage.files import check_readable, is_remote
from simcse_jax.storage.mirror import Manifest, fetch_run, working_folder
from simcse_jax.storage.objects import native_place
from simcse_jax.storage.places import Place
from simcse_jax.training.compiled_step import CompiledStep, compile_step
from simcse_jax.training.contents import digest_model, digests_of, read_start
from simcse_jax.training.guide import digest_guide, load_guide, make_guide
from simcse_jax.training.scores import Scorer, Tasks, check_selects, load_tasks, make_scorers
from simcse_jax.training.spec import StepSpec
from simcse_jax.training.state import initial_params

_GUIDE = "objective.negatives.guide"
_SETTINGS = ("run.json", "model/", "manifest.json", "results.json")
"""What processes but the first read of a run on a store."""


@dataclass(frozen=True)
class Request:
    """What is asked for, and where: a config that was checked, the devices and the run folder."""

    config: Config
    mesh: Mesh
    tasks: Tasks
    corpus: Corpus
    folder: Path
    """The local folder that the run is worked on in."""
    store: Place | None
    """The place on gs:// that its checkpoints are written to."""
    fetched: Manifest | None
    """What an object store had of the run."""
    resuming: Run | None
    """The run that is in the folder already."""


@dataclass(frozen=True)
class Parts:
    """The model and the tasks of a run, without its weights."""

    config: Config
    """The run, with the pooler that its config leaves open taken from the model."""
    start: Checkpoint
    """The model that the run starts from; in a run that is resumed, its own."""
    checkpoint: Checkpoint
    """The model that the run trains: its pooler, limit, Normalize and prompts."""
    model: SentenceEncoder
    tokenizer: Any
    vocabulary: Vocabulary | None
    """Token ids that masking draws from, where the objective masks tokens."""
    dev_scores: Scorer | None
    """See `Scorers`, also for the others."""
    test_scores: Scorer | None
    dev_metric: str
    test_metric: str
    dev_about: str
    contents: dict[str, Any]
    """Digests of the tasks and of the guide, as in `Run.contents`."""
    guide: LoadedModel | None
    """The model that judges negatives, if the run has one."""


@dataclass(frozen=True)
class Start:
    """The parameters that a run starts from."""

    params: Callable[[], Params | Callable[[], Params]]
    """Host parameters before the first step, or a function to be jitted that draws them."""
    mlm_head: Literal["fresh", "checkpoint"] | None
    """Where the head of the masked language model is from, in a run that begins."""
    digest: str = ""
    """Digest of the weights, in a run that begins."""


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, checked and loaded before anything is written to the run folder."""

    run: Run
    fetched: Manifest | None
    """What an object store had of the run."""
    parts: Parts
    feed: Feed
    spec: StepSpec
    step: CompiledStep | None
    """None where the run has ended."""
    start: Start


def prepare(config: Config, write: bool = True) -> Prepared:
    """Checks a config against the machine and the files it names, tokenises the text, and makes the run folder.

    Args:
      config: the run.
      write: whether to make the run folder; without it, only caches are written.

    Raises:
      InputError: anything that the run could not work with; the run folder is then as it was.
    """
    request = check_request(config)
    parts = load_parts(request)
    feed = make_feed(request, parts)
    feed, spec, step, start = fit(request, parts, feed)
    run = begin(request, parts, feed, start) if write else Run(request.folder, parts.config, feed.fingerprint)
    return Prepared(replace(run, store=request.store), request.fetched, parts, feed, spec, step, start)


def check_request(config: Config) -> Request:
    """Checks all that can be checked without the model and the whole text, and reads the tasks.

    Raises:
      InputError: see `prepare`; it has the messages of all checks that need no other.
    """
    check_types(config)
    checks: list[Callable[[], Any]] = [
        *(partial(_find_mesh, config), partial(load_tasks, config.evaluation), partial(_find_text, config)),
        *(config.validate, partial(check_objective, config.objective), partial(check_tracking, config.tracking)),
        partial(check_cache, config.data.cache),
    ]
    find_run = partial(_find_run, config)
    if is_remote(config.output):  # nothing is fetched for a run that cannot be
        mesh, tasks, corpus, *_ = check_all(*checks)
        return Request(config, mesh, tasks, corpus, *find_run())
    mesh, tasks, corpus, *_, found = check_all(*checks, find_run)
    return Request(config, mesh, tasks, corpus, *found)


def _find_mesh(config: Config) -> Mesh:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, dcn=config.mesh.dcn)
    check_batch_size(mesh, config.batch_size)
    return mesh


def _find_text(config: Config) -> Corpus | None:
    """The text; None where none is named, which `validate` says.

    Raises:
      InputError: no such text, or, in files, no columns as the config asks for.
    """
    if not config.data.train:
        return None
    # A run that goes on compares the whole text with that of its beginning.
    corpus = replace(open_corpus(config.data), doubt=not is_run(_folder_of(config)))
    if isinstance(corpus.source, Files):  # the first rows of a data set may have to be downloaded
        _ = corpus.columns
    return corpus


def _folder_of(config: Config) -> Path:
    return working_folder(config.output, config.data.cache, jax.process_index())


def _find_run(config: Config) -> tuple[Path, Place | None, Manifest | None, Run | None]:
    """The folder of the run; its place on gs://; what an object store had of it; and the run that is there already."""
    folder, store = _folder_of(config), native_place(config.output)
    check_readable(folder)
    if is_run(folder):
        check_free(folder)
    fetched: Manifest | None = None
    if is_remote(config.output):
        if jax.process_count() > 1 and not store:
            raise InputError(
                f"output {config.output} is on s3://, where one process can train: give the processes an --output on "
                "gs://, or a folder that all share and that can rename folders, such as NFS, FSx or Lustre"
            )
        wanted = ("",) if jax.process_index() == 0 else _SETTINGS
        (fetched,) = first_on_process_0(lambda: (fetch_run(config.output, folder, wanted),))
    check_output(folder)
    if not store:
        check_shared(folder)
    resuming = open_run(folder) if is_run(folder) else None
    if resuming:
        # Before anything is loaded: settings that changed make the rest pointless.
        check_resume(resuming, config, resuming.data_fingerprint)
    return folder, store, fetched, resuming


def load_parts(request: Request) -> Parts:
    """Reads the configuration of the model and its tokenizer.

    Raises:
      InputError: see `prepare`.
    """
    config, resuming = request.config, request.resuming
    start = read_checkpoint(resuming.model_folder if resuming else config.model.path)
    if config.data.max_length > start.config.max_length:
        raise InputError(
            f"data.max_length is {config.data.max_length} but {config.model.path} has positions for "
            f"{start.config.max_length} tokens: use at most that"
        )
    check_objective(config.objective, start.config.hidden_size)
    config = replace(config, model=settled(config.model, lambda: resuming.pooling if resuming else start.pooling))
    checkpoint = start
    if not resuming:
        checkpoint = start.trained(pooling_of(config.model), config.data.max_length)
    model = build_model(checkpoint.config, config.model)
    tokenizer = load_tokenizer(checkpoint.folder)
    vocabulary = None
    if config.objective.mlm.weight:
        vocabulary = read_vocabulary(tokenizer, checkpoint.config.vocab_size)
    encoder = encoder_of(checkpoint, model, tokenizer, request.mesh)
    tasks = request.tasks
    guide = load_guide(config, tokenizer)
    contents = digests_of(tasks)
    if guide or (resuming and _GUIDE in resuming.contents):  # which this config may lack
        contents[_GUIDE] = guide and digest_guide(guide)
    if resuming:
        if "model.path" in changes(resuming.config, config) and "model.path" in resuming.contents:
            check_contents(resuming, config, {"model.path": read_start(config)[1]})
        check_contents(resuming, config, contents)
    elif tasks.dev:
        check_selects(tasks.dev, encoder)
    scorers = make_scorers(tasks, config.evaluation, encoder)
    return Parts(config, start, checkpoint, model, tokenizer, vocabulary, *scorers, contents, guide)


def make_feed(request: Request, parts: Parts) -> Feed:
    """Tokenises the text, into the cache.

    Raises:
      InputError: see `prepare`.
    """
    config, tokenizer = request.config, parts.tokenizer
    settings = config.data
    table = tokenize_corpus(request.corpus, tokenizer, settings.max_length, settings.cache, jax.process_index() == 0)
    if len(table) < 2 and config.objective.contrastive_weight:
        raise InputError(f"{config.data.train} holds one example; contrast needs two or more")
    if not request.resuming:
        _check_learns(config, table.columns, parts.model.config.hidden_size)
    _check_guide(config, table.columns)
    augmenter = make_augmenter(config.data, tokenizer, config.seed)
    if augmenter and table.columns > 1:
        raise InputError(
            f"data.augment is '{config.data.augment}' but each example of {config.data.train} has its positive already "
            f"({table.columns} columns): name one column with data.columns, or set data.augment to 'none'"
        )
    order = order_of(table, config.batch_size, config.seed, settings.distinct)
    feed = Feed(table, order, request.mesh, augmenter, compares=config.objective.negatives.duplicates)
    if request.resuming:
        check_resume(request.resuming, config, feed.fingerprint)
    return feed


def fit(request: Request, parts: Parts, feed: Feed) -> tuple[Feed, StepSpec, CompiledStep | None, Start]:
    """Compiles the step, after the weights of a run that begins were read and its checkpoints were found room for.

    Returns:
      The feed, packed where the config asks for it; the step; the step compiled, None for a run that has ended; and the
      parameters to start from.

    Raises:
      InputError: see `prepare`.
    """
    config, resuming = parts.config, request.resuming
    total_steps = config.max_steps or config.epochs * feed.order.steps_per_epoch
    if config.profiled and config.profiled[0] > total_steps:
        raise InputError(f"profile is '{config.profile}' but the run has {total_steps:,} steps: give earlier ones")
    spec = StepSpec(config, parts.model, request.mesh, feed.columns, total_steps, parts.vocabulary)
    width = parts.guide.width if parts.guide else 0
    spec = replace(spec, ragged=feed.table.missing is not None, text_columns=feed.table.columns, guide_width=width)
    if resuming:
        start = Start(lambda: _unchanged_start(resuming, config), None)
        if replace(resuming, config=config).has_ended():
            return feed, spec, None, start
    else:
        # Unreadable weights and a step that does not fit are found before the folder exists.
        note(f"loading the weights of {config.model.path}")
        loaded = initial_params(config, parts.model)
        has_head = not callable(loaded) and "mlm" in loaded
        mlm_head: Any = ("checkpoint" if has_head else "fresh") if parts.vocabulary else None
        start = Start(lambda: loaded, mlm_head, digest_model(config, parts.start, loaded))
        if not request.store:
            _check_space(request.folder, spec)
    if config.data.packed_length:
        feed = feed.packed(config.data.packed_length, total_steps)
        spec = replace(spec, packing=feed.packing)
    step = compile_step(spec)
    if parts.guide:
        feed = replace(feed, guide=make_guide(parts.guide, request.mesh, step.micro_batch))
    return feed, spec, step, start


def begin(request: Request, parts: Parts, feed: Feed, start: Start) -> Run:
    """Makes the run folder, where there is none yet."""
    config, folder = parts.config, request.folder
    if request.resuming:
        return replace(request.resuming, config=config)
    contents = parts.contents | {"model.path": start.digest}
    made = (folder, config, feed.fingerprint, parts.checkpoint, parts.tokenizer, contents)
    first_on_process_0(lambda: is_run(folder) or bool(create_run(*made)))
    return Run(folder, config, feed.fingerprint, contents)


def _unchanged_start(run: Run, config: Config) -> Params | Callable[[], Params]:
    """The parameters that a run without a checkpoint began with."""
    params, digest = read_start(config)
    check_contents(run, config, {"model.path": digest})
    return params


def _check_learns(config: Config, columns: int, width: int) -> None:
    """Raises `InputError` for a batch of one example to which the objective gives no gradient."""
    if config.batch_size > 1 or not config.objective.contrastive_weight or config.objective.queue.size:
        return
    loss = find_loss(config.objective.loss)
    z = np.random.default_rng(0).normal(size=(max(columns, 2), 1, width)).astype(np.float32)
    settings = {"temperature": config.objective.temperature, **config.objective.options}

    def value(z1: jax.Array) -> jax.Array:
        z3 = jnp.asarray(z[2]) if columns > 2 else None
        clean = {"clean": z1} if wants_clean(loss) else {}
        result: jax.Array = loss(z1, jnp.asarray(z[1]), z3, **settings, **clean)[0]
        return result

    if not np.any(jax.grad(value)(jnp.asarray(z[0]))):
        raise InputError(
            "batch_size is 1: an example alone has no negative, the gradient is 0 and nothing is learnt; use 2 or "
            "more, or text with a hard negative in each example"
        )


def _check_guide(config: Config, columns: int) -> None:
    """Raises `InputError` for a guide that could mask nothing: of sentences alone, which are their own positives."""
    negatives = config.objective.negatives
    if negatives.guide and negatives.guide_margin >= 0 and columns == 1 and config.data.augment == "none":
        raise InputError(
            f"objective.negatives.guide {negatives.guide} masks what it finds more similar than the positive, which is "
            f"the sentence itself in {config.data.train}, of cosine 1: set objective.negatives.guide_margin below 0, "
            "e.g. -0.2"
        )


def _check_space(folder: Path, spec: StepSpec) -> None:
    config = spec.config
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(spec.state_shapes()))
    # One checkpoint more than is kept exists while the next is written.
    needed = size * (config.checkpoint.keep + 1 + bool(config.evaluation.dev))
    place = folder.resolve()  # which may be a volume of its own
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    if needed > free:
        raise InputError(
            f"checkpoints in {folder} need up to {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            "free space or choose another --output"
        )
