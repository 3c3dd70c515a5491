"""The run folder: its layout, its creation in one step, and the settings that may differ when a run is resumed.

run.json            the resolved config, the fingerprint of the training text, digests of the model and the dev and test
                    pairs
model/              config.json (with pooler and limit), tokenizer and prompts; a checkpoint adds the weights
manifest.json       digests of these, and what made them
checkpoints/<step>  latest and best train states
metrics.jsonl       one line every `log_every` steps and one for every evaluation
results.json        scores before and after, once the run has ended, and a digest of them
damaged/            what was found damaged and no longer counts
figures/            figures that the command draws from metrics.jsonl at the end
tensorboard/        files of TensorBoard, if it tracks the run; wandb/ and wandb.json if Weights & Biases does
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simcse_jax.config import Config
from simcse_jax.config.values import check_types, differences, field_value, fits, from_dict, to_dict
from simcse_jax.errors import InputError, reason, room, system_error
from simcse_jax.pretrained.folders import Checkpoint
from simcse_jax.pretrained.pooling import Pooling, pooling_of, settled
from simcse_jax.pretrained.prompts import ABOUT_FILE, read_about
from simcse_jax.pretrained.tokenizers import save_tokenizer
from simcse_jax.runtime.provenance import provenance
from simcse_jax.storage.files import (
    check_new_folder,
    check_readable,
    check_writable_folder,
    expanded,
    is_remote,
    new_folder,
    write_json,
)
from simcse_jax.storage.manifest import MANIFEST, Damage, check_unchanged, is_on, read_sealed, write_manifest
from simcse_jax.storage.places import Place
from simcse_jax.storage.records import parse_record, read_bounded

# Settings that may change between the parts of one run: none changes the parameters by more than rounding.
_FREE_SETTINGS = (
    *("output", "log_every", "tracking", "profile", "multi_host", "heartbeat", "join_timeout", "mesh.", "checkpoint."),
    *("compilation_cache", "gpu_memory", "gpu_preallocate", "xla_preset"),
    *("model.remat", "model.scan", "evaluation.data", "evaluation.geometry_every"),
    *("micro_batch", "objective.implementation", "objective.block_size", "data.packed_length"),
    *("data.cache", "data.train", "data.revision"),  # the fingerprint of the text is compared, not the path
)
_WRITTEN = ("metrics.jsonl", "results.json", "wandb.json")
"""Files in a run folder that training writes, besides `figures/` and `profile/`. A link to a folder, such as a larger
disk, may be there, and so may other files of the user."""
_PLACES = ("model.path", "evaluation.dev", "evaluation.test", "objective.negatives.guide")
"""Settings that name files or folders, by any spelling of their paths."""


@dataclass(frozen=True)
class Run:
    """An existing run folder."""

    folder: Path
    config: Config
    data_fingerprint: str
    contents: dict[str, Any] = field(default_factory=dict)
    """Digests of what settings named when the run began, by setting; runs of earlier versions have none."""
    store: Place | None = None
    """The place on gs:// where the run's checkpoints are, if they are not in the folder."""

    @property
    def root(self) -> Place:
        """The place of the folder `checkpoints`."""
        return self.store or self.folder

    @property
    def model_folder(self) -> Path:
        """Config and tokenizer of the encoder."""
        return self.folder / "model"

    @property
    def metrics_file(self) -> Path:
        """The log: one JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def results_file(self) -> Path:
        """Scores, written at the end of the run."""
        return self.folder / "results.json"

    @property
    def pooling(self) -> Pooling:
        """The pooler that it trains."""
        return pooling_of(self.config.model)

    def has_ended(self) -> bool:
        """Whether all steps of the run are done and scored, as far as its results can be read."""
        try:
            with reading_from(self.folder):
                return "step" in read_results(self.folder, is_on())
        except Damage:
            return False

    def results(self) -> dict[str, Any]:
        """The content of `results_file`: first the scores before training, all scores once the run has ended; or {}.

        Raises:
          InputError: the file is damaged.
        """
        try:
            with reading_from(self.folder):
                results = read_results(self.folder, is_on())
        except Damage as damage:
            raise InputError(
                f"{self.results_file} is damaged ({damage}): give the command that trained the run again, which writes "
                "it from the newest checkpoint, or copy it back"
            ) from damage
        return results


_Scores = dict[str, float | None]


def _check_results(results: dict[str, Any]) -> None:
    """Raises `ValueError` for results of another form than a run writes."""
    end = {"step": int, "best_step": int | None, "dev": float | None}
    kinds = {**dict.fromkeys(("before", "after"), _Scores), **dict.fromkeys(("metric", "test_metric"), str)}
    ended = not end.keys().isdisjoint(results)
    for name, kind in (kinds | end).items():
        wrong = not fits(results[name], kind) if name in results else name in end and ended
        if wrong:
            raise ValueError(f"{name} is {str(results.get(name, 'missing'))[:40]}")
    if "before" in results and results["before"].keys() != results.get("after", results["before"]).keys():
        raise ValueError("before and after are scores of different tasks")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns a system error into `InputError`, in a block that does nothing but write in a run folder.

    Any other exception passes with its traceback.
    """
    try:
        yield
    except Exception as error:  # tensorstore reports errors of the system as ValueErrors
        gone = not is_run(folder)  # orbax raises different errors for a missing folder, by what it was about to do
        if system_error(error) is None and not gone:
            raise
        remedy = room(error) or "make it writable"
        advice = f"{remedy} and run the same command again; it continues from the last complete checkpoint"
        if gone:
            advice = "the folder is gone, and the same command starts from the beginning"
        raise InputError(f"writing to {folder} failed ({reason(error)}): {advice}") from error


@contextmanager
def reading_from(folder: Path) -> Iterator[None]:
    """Turns a system error into `InputError`, in a block that does nothing but read in a run folder."""
    try:
        yield
    except Exception as error:  # tensorstore reports errors of the system as ValueErrors
        if isinstance(error, InputError) or system_error(error) is None:
            raise
        raise InputError(
            f"{folder} cannot be read ({reason(error)}): get permission for all that is in it, or copy the run again"
        ) from error


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return (folder / "run.json").is_file()


def read_results(folder: Path, compared: bool = True) -> dict[str, Any]:
    """The content of a run's results.json; {} where there is none.

    Args:
      folder: the run.
      compared: whether it is damaged if it differs from its seal.

    Raises:
      Damage: the file was changed.
    """
    if not (folder / "results.json").is_file():
        return {}
    required = compared and (folder / MANIFEST).exists()
    results = read_sealed(folder / "results.json", required, compared)
    try:
        _check_results(results)
    except ValueError as error:
        raise Damage(str(error)) from error
    return results


def open_run(folder: Path) -> Run:
    """Reads an existing run folder.

    Raises:
      InputError: run.json cannot be read, or a file differs from the run's manifest.
    """
    check_unchanged(folder, "copy the run's files back")
    with reading_from(folder):
        text = read_bounded(folder / "run.json")
    try:
        about = parse_record(text)
        config = from_dict(Config, about["config"])
        check_types(config)
        if not isinstance(about["data_fingerprint"], str):
            raise TypeError("data_fingerprint is no text")
        return Run(folder, config, about["data_fingerprint"], dict(about.get("contents", {})))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'run.json'} is not a run's config ({reason(error)}): restore it, or remove the folder"
        ) from error


def check_output(folder: Path) -> None:
    """Raises `InputError` unless `folder` is a run, or absent or empty and can be created outside of other runs."""
    check_readable(folder)
    if is_run(folder):
        check_writable_folder(folder)
        files = [*(folder / name for name in _WRITTEN), *folder.glob("figures/*")]
        # A link to a folder, such as one on a larger disk, may be there.
        if link := next((file for file in files if file.is_symlink() and not file.is_dir()), None):
            raise InputError(
                f"{link} is a link, and training would write to what it names: put a copy in its place, or remove it"
            )
    else:
        check_new_folder(folder, "a run of ours", "choose another, e.g. --output runs/NEW, or remove it")
        try:
            str(folder.resolve()).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"output {folder} has a name that is not UTF-8, under which no checkpoint can be written: give another"
            ) from error
        check_outside_runs(folder)


def check_outside_runs(folder: Path) -> None:
    """Raises `InputError` for a folder inside that of a run, whose files would be taken for those of the run."""
    if outer := next((parent for parent in folder.resolve().parents if is_run(parent)), None):
        raise InputError(f"output {folder} lies in the folder of another run, {outer}: choose another --output")


def changes(before: Config, now: Config) -> list[str]:
    """Names of the fields that differ and make `now` another run than `before`; a pooler left open is no difference."""
    before, now = (replace(c, model=settled(c.model, lambda: pooling_of(before.model))) for c in (before, now))
    changed = [name for name in differences(before, now) if not name.startswith(_FREE_SETTINGS)]
    return [name for name in changed if name not in _PLACES or not _same_places(before, now, name)]


def _same_places(before: Config, now: Config, name: str) -> bool:
    """Whether a setting of `_PLACES` names the same files, however their paths are written."""
    a, b = ([value] if isinstance(value := field_value(c, name), str) else list(value) for c in (before, now))
    return len(a) == len(b) and all(_same_place(x, y) for x, y in zip(a, b, strict=True))


def _same_place(a: str, b: str) -> bool:
    local = a and b and not is_remote(a) and not is_remote(b)
    return a == b or bool(local and expanded(a).resolve() == expanded(b).resolve())


def check_resume(run: Run, config: Config, data_fingerprint: str) -> None:
    """Raises `InputError` if a run with `config` would not continue `run`.

    Settings whose content the run knows are left to `check_contents`.
    """
    compared = set(run.contents)
    if not (is_remote(config.model.path) or expanded(config.model.path).is_dir()):
        compared.discard("model.path")  # nothing is downloaded for a comparison
    changed = [name for name in changes(run.config, config) if name not in compared]
    if changed:
        shown = "; ".join(f"{n} was {field_value(run.config, n)!r}, is {field_value(config, n)!r}" for n in changed)
        other = f"; {_OTHER_PAIRS.format(run.folder)}" if any(n.startswith("evaluation.") for n in changed) else ""
        raise InputError(
            f"{run.folder} is a run with other settings ({shown}): give those, or another folder, "
            f"e.g. --output runs/NEW{other}"
        )
    if data_fingerprint != run.data_fingerprint:
        raise InputError(
            f"{run.folder} was trained on other text than {config.data.train} now holds: choose another folder, "
            "e.g. --output runs/NEW"
        )


_OTHER_PAIRS = "simcse-jax evaluate {} --tasks FILE scores it on other pairs"


def check_contents(run: Run, config: Config, contents: dict[str, Any]) -> None:
    """Raises `InputError` if settings no longer name what `run` began with.

    Args:
      run: the run.
      config: the settings to go on with.
      contents: digests by setting, as in `Run.contents`, of those that are to be compared.
    """
    for name, digest in contents.items():
        if run.contents.get(name, digest) == digest:
            continue
        was, now = field_value(run.config, name), field_value(config, name)
        what, advice = "weights", "give those of its beginning"
        if name.startswith("evaluation."):
            what = "pairs"
            advice = f"its scores would be of two kinds, so give the earlier pairs ({_OTHER_PAIRS.format(run.folder)})"
        raise InputError(
            f"{run.folder} is a run with other {what} than {name} names now (was {was!r}, is {now!r}): {advice} or "
            "another --output"
        )


def create_run(
    folder: Path,
    config: Config,
    data_fingerprint: str,
    checkpoint: Checkpoint,
    tokenizer: Any,
    contents: dict[str, Any] | None = None,
) -> Run:
    """Makes a run folder, complete or not at all.

    Args:
      folder: the new folder.
      config: the run.
      data_fingerprint, contents: see `Run`.
      checkpoint: the model as `Checkpoint.trained` gives it.
      tokenizer: its tokenizer.
    """
    with new_folder(folder, last="run.json") as partial:
        save_tokenizer(tokenizer, partial / "model")
        write_json(partial / "model" / "config.json", checkpoint.hf_config)
        write_json(partial / "model" / ABOUT_FILE, read_about(checkpoint.root))
        about = {"config": to_dict(config), "data_fingerprint": data_fingerprint, "contents": contents or {}}
        write_json(partial / "run.json", about)
        write_manifest(partial, {"made": provenance()})
    return Run(folder, config, data_fingerprint, contents or {})
