"""Trained models: loading from a run, an export or a Hugging Face folder."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from simcse_jax import postprocess, rng
from simcse_jax.config import ENCODE_ROW, LongText, ModelConfig
from simcse_jax.errors import InputError
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.model import SentenceEncoder, init_mlm_head
from simcse_jax.model.build import build_model, with_fresh_head
from simcse_jax.model.params import Params
from simcse_jax.poolers import check_pooler
from simcse_jax.pretrained.folders import Checkpoint, read_checkpoint
from simcse_jax.pretrained.pooling import Pooling
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params, param_shapes
from simcse_jax.reports.progress import note
from simcse_jax.runs.checkpoints import Progress, check_whole, checkpoint_folders, none_whole, record_of, restore
from simcse_jax.runs.folder import Run, is_run, open_run, reading_from
from simcse_jax.runtime.mesh import find_devices, make_mesh, put, replicated, state_sharding, with_sharding
from simcse_jax.storage.files import check_readable
from simcse_jax.storage.manifest import Damage
from simcse_jax.storage.objects import local_path

Step = int | Literal["best", "latest"]
"""A checkpoint of a run: its step, that of the best dev score, or the last."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be evaluated, encoded with or exported."""

    model: SentenceEncoder
    params: Params
    checkpoint: Checkpoint
    run: Run | None
    step: int | None
    """Step of the run whose parameters these are."""
    mlm: Params | None = None
    """Head of the masked language model, where the run trained nothing else."""
    postprocessor: dict[str, Any] | None = None
    """Metadata of the post-processor among the parameters, see `postprocess.fit`; None without one."""
    normalizes: bool = False
    """Whether an export tells sentence-transformers to scale vectors to length 1, as the folder that was read, or the
    model that a run began from, does. In this package the callers of `encode` decide."""
    selection: str = ""
    """The reason why `step` was taken, in words."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """What made the parts of the run up to `step`, see `record_of`."""

    def __repr__(self) -> str:
        """The model's folder, pooler, width and limit; not its parameters."""
        source = f"{self.run.folder}, step {self.step:,}" if self.run else str(self.checkpoint.root)
        about = f"pooler={self.pooler!r}, width={self.width}, max_length={self.checkpoint.max_length}"
        return f"LoadedModel({source!r}, {about})"

    @property
    def origin(self) -> str:
        """The step of the run whose parameters these are, and why it was taken, in words; "" for a model of no run."""
        if self.run is None:
            return ""
        untrained = ": the model before training" if self.step == 0 else ""
        return f"parameters of step {self.step:,}, {self.selection}{untrained}"

    @property
    def width(self) -> int:
        """Width of the sentence vectors."""
        return int(self.postprocessor["width"]) if self.postprocessor else self.model.config.hidden_size

    @property
    def pooler(self) -> str:
        """The pooler that gives the sentence vectors, or the input of the post-processor."""
        return Pooling(self.model.pooler, self.model.mlp_only_train).at_evaluation

    def encoder(
        self,
        max_length: int | None = None,
        batch_size: int = 64,
        packed_length: int = ENCODE_ROW,
        long_text: LongText = "cut",
    ) -> BatchEncoder:
        """The encoder of its sentences on all devices, to be called with `params`.

        Args:
          max_length: most tokens per sentence; the model's own limit where None.
          batch_size, packed_length, long_text: see `BatchEncoder`.

        Raises:
          InputError: see `BatchEncoder`; or a tokenizer that cannot be read.
        """
        tokenizer = load_tokenizer(self.checkpoint.folder)
        return encoder_of(
            *(self.checkpoint, self.model, tokenizer, make_mesh(), max_length),
            batch_size=batch_size,
            packed_length=packed_length,
            long_text=long_text,
        )

    def check_no_postprocessor(self) -> None:
        """Raises `InputError` if the model has a post-processor: another would be fitted to the output of that one."""
        if self.postprocessor:
            raise InputError(
                f"the model has a post-processor already ({postprocess.describe(self.postprocessor)}): "
                "start from the model that it was made from"
            )

    def with_postprocessor(self, post: postprocess.PostProcessor, about: dict[str, Any]) -> "LoadedModel":
        """The same model with a post-processor, applied wherever `params` encode sentences.

        Args:
          post: from `postprocess.fit`.
          about: its metadata.

        Raises:
          InputError: the model has one already.
        """
        self.check_no_postprocessor()
        dtype = self.model.param_dtype
        host = jax.tree.map(lambda x: np.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else None), post)
        placed = put(host, jax.tree.map(lambda _: replicated(make_mesh()), host))
        return replace(self, params={**self.params, postprocess.KEY: placed}, postprocessor=about)


def encoder_of(
    checkpoint: Checkpoint,
    model: SentenceEncoder,
    tokenizer: Any,
    mesh: Mesh,
    max_length: int | None = None,
    **settings: Any,
) -> BatchEncoder:
    """The encoder of a model's sentences, with the limit and the prompt that the model itself names.

    Args:
      checkpoint: the model's own settings.
      model: the module.
      tokenizer: its tokenizer.
      mesh: devices.
      max_length: most tokens per sentence; the model's own limit where None.
      settings: others of `BatchEncoder`.

    Raises:
      InputError: see `BatchEncoder` and `Prompts.text`.
    """
    limit = checkpoint.max_length if max_length is None else max_length
    return BatchEncoder(model, tokenizer, mesh, limit, prompt=checkpoint.prompts.text(), **settings)


def load_model(
    name_or_path: str | Path, pooler: str | None = None, dtype: str = "float32", step: Step | None = None
) -> LoadedModel:
    """Loads a run folder (its best checkpoint, or its latest without dev scores), an export of ours, a Hugging Face
    folder or a name on the hub.

    Args:
      name_or_path: the model.
      pooler: overrides the pooler saved with the model, and drops the modules that a sentence-transformers folder has
        after pooling; needed for a model that names no pooler.
      dtype: compute type.
      step: the kept checkpoint of a run to load instead, see `kept_steps`; `best` or `latest`.

    Raises:
      InputError: no device, no such model, damaged weights, no checkpoint (yet, or of that step), no pooler known, or
        one given for a model whose post-processor was fitted to the vectors of another.
    """
    if pooler is not None:
        check_pooler(pooler)
    find_devices()
    note(f"loading {name_or_path}" + ("" if step is None else f", step {step}"))
    folder = local_path(name_or_path)
    run = open_run(folder) if is_run(folder) else None
    checkpoint = read_checkpoint(run.model_folder if run else name_or_path)
    pooling: Pooling | None
    if pooler is not None:
        pooling = Pooling(pooler)
    elif run:
        pooling = run.pooling
    else:
        pooling = checkpoint.pooling
    if pooling is None:
        raise InputError(
            f"{name_or_path} does not say how its sentence vectors are pooled: give the pooler, e.g. --pooler avg"
        )
    settings = ModelConfig(pooler=pooling.pooler, mlp_only_train=pooling.mlp_only_train, dtype=dtype)  # type: ignore[arg-type]
    model = build_model(checkpoint.config, settings)
    # A given pooler replaces everything after the encoder.
    normalizes = pooler is None and checkpoint.normalizes
    if run:
        return LoadedModel(model, run=run, checkpoint=checkpoint, normalizes=normalizes, **_restore(run, model, step))
    if step is not None:
        raise InputError(f"{name_or_path} is not a run, and has no steps to choose from: leave out the step, {step}")
    host = load_params(checkpoint, model.param_dtype)
    if "head" not in host:
        if pooling.at_evaluation == "cls":
            raise InputError(f"{name_or_path} has no weights pooler.dense, which pooler 'cls' needs: give another")
        host = with_fresh_head(host, model, seed=0)
    mesh = make_mesh()
    placed = put(host, state_sharding(mesh, host))
    loaded = LoadedModel(model, placed, checkpoint, None, None, normalizes=normalizes)
    post, about = postprocess.read_saved(checkpoint, model.param_dtype, modules=pooler is None)
    if post is None or about is None:
        return loaded
    fitted_to = checkpoint.pooling.at_evaluation if checkpoint.pooling else None
    if loaded.pooler != fitted_to:
        raise InputError(
            f"the post-processor of {name_or_path} was fitted to vectors of pooler {fitted_to}, not {loaded.pooler}: "
            "leave the pooler out, or start from the model that it was made from"
        )
    return loaded.with_postprocessor(post, about)


def initial_weights(name_or_path: str | Path, model: SentenceEncoder, mlm: bool = False) -> Params:
    """The weights of anything that `load_model` takes, to train from.

    Args:
      name_or_path: the model; of a run, the best checkpoint, or the latest without dev scores.
      model: the module.
      mlm: also read the head of a masked language model.

    Returns:
      See `load_params`.

    Raises:
      InputError: see `load_params`; or a run without a checkpoint yet.
    """
    folder = local_path(name_or_path)
    if not is_run(folder):
        return load_params(read_checkpoint(name_or_path), model.param_dtype, mlm=mlm)
    found = _restore(open_run(folder), model, None)
    params: Params = jax.tree.map(np.asarray, found["params"])
    if mlm and "mlm" in found:
        params["mlm"] = jax.tree.map(np.asarray, found["mlm"])
    return params


def kept_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that a run has kept, ascending.

    Raises:
      InputError: not a run, or one without a checkpoint yet.
    """
    if not is_run(folder):
        raise InputError(f"{folder} is not a run: only runs have checkpoints")
    run = open_run(folder)
    if not (folders := _checkpoint_folders(run)):
        raise _no_checkpoint(run)
    return list(folders)


def _checkpoint_folders(run: Run) -> dict[int, Path]:
    # orbax says of a file without permission that it is of no kind. `os.walk` passes over what a writer removes.
    for folder, folders, files in os.walk(run.folder / "checkpoints"):
        for name in (*folders, *files):
            check_readable(Path(folder, name))
    return checkpoint_folders(run.folder)


def _no_checkpoint(run: Run) -> InputError:
    if run.has_ended():
        return InputError(f"{run.folder} has ended and its checkpoints are gone: copy them back, or train it again")
    return InputError(f"{run.folder} has no checkpoint yet: continue the training first")


def _restore(run: Run, model: SentenceEncoder, wanted_step: Step | None) -> dict[str, Any]:
    """`step`, `selection`, `parts`, `params` and, where the run trained nothing else, `mlm`."""
    mesh, shapes = make_mesh(), param_shapes(model.config, model.param_dtype)
    wanted = {"params": with_sharding(shapes, state_sharding(mesh, shapes))}
    if not run.config.objective.contrastive_weight:
        table = shapes["encoder"]["embeddings"]["word_embeddings"]["embedding"]
        heads = {"mlm": jax.eval_shape(lambda t: init_mlm_head(rng.key(0, "init_mlm"), t, 1.0), table)}
        wanted["auxiliary"] = with_sharding(heads, state_sharding(mesh, heads))
    folders = _checkpoint_folders(run)
    step, selection = _choose(run, folders, wanted_step, tuple(wanted))
    with reading_from(run.folder):
        found, parts = restore(folders[step], wanted), record_of(folders[step]).get("parts", [])
    about = {"step": step, "selection": selection, "parts": parts}
    return {**about, "params": found["params"], **found.get("auxiliary", {})}


def _choose(run: Run, folders: dict[int, Path], wanted: Step | None, items: tuple[str, ...]) -> tuple[int, str]:
    """The step of a kept checkpoint whose `items` are whole, and the reason for it in words."""
    if not folders:
        raise _no_checkpoint(run)
    kept, damaged = ", ".join(map(str, folders)), dict[int, str]()

    def progress_of(step: int) -> Progress | None:
        try:
            return check_whole(folders[step], items)
        except Damage as damage:
            damaged[step] = str(damage)
            return None

    if isinstance(wanted, int):
        if wanted not in folders:
            raise InputError(f"{run.folder} keeps no checkpoint of step {wanted}; it keeps {kept}: choose one of these")
        if progress_of(wanted) is None:
            raise InputError(
                f"the checkpoint of step {wanted} in {run.folder} is damaged ({damaged[wanted]}): choose another of "
                f"{kept}"
            )
        return wanted, "as asked for"
    newest = next(((step, found) for step in reversed(folders) if (found := progress_of(step))), None)
    if newest is None:
        raise none_whole(run.folder, damaged)
    step, progress = newest
    best, reason = progress.best_step, "the latest"
    if best is None and wanted == "best":
        raise InputError(f"{run.folder} has no dev scores, so no best checkpoint: ask for latest, or one of {kept}")
    if best is not None and wanted != "latest":
        if best in folders and progress_of(best):
            step, reason = best, f"the best dev score ({progress.best_score:.2f})"
        elif wanted == "best":
            problem = damaged.get(best, "it is gone")
            raise InputError(
                f"the best checkpoint of {run.folder}, that of step {best}, is not whole ({problem}): ask for latest, "
                f"or one of {kept}"
            )
        else:
            damaged.setdefault(best, "it is gone")
    for passed, problem in damaged.items():
        note(f"the checkpoint of step {passed:,} in {run.folder} is not whole ({problem}): step {step:,} is read")
    return step, reason
