"""The run folder: its layout, its creation in one step, and the settings that may differ when a run is resumed.

run.json            the resolved config, and the fingerprint of the training text
model/              config.json and tokenizer of the encoder; a checkpoint adds the weights
checkpoints/<step>  latest and best train states
metrics.jsonl       one line every `log_every` steps and one for every evaluation
results.json        scores before and after, once the run has ended
figures/            figures that the command draws from metrics.jsonl at the end
tensorboard/        files of TensorBoard, if it tracks the run; wandb/ and wandb.json if Weights & Biases does
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simcse_jax.config import Config
from simcse_jax.config.values import differences, field_value, from_dict, to_dict
from simcse_jax.errors import InputError, is_full, reason, system_error
from simcse_jax.pretrained.folders import Checkpoint
from simcse_jax.pretrained.pooling import SETTINGS
from simcse_jax.pretrained.tokenizers import save_tokenizer
from simcse_jax.storage.files import check_writable_folder, new_folder, write_json

# Settings that may change between the parts of one run: none changes the parameters by more than rounding.
_FREE_SETTINGS = (
    *("output", "log_every", "tracking", "multi_host", "mesh.", "checkpoint.", "model.remat", "model.scan"),
    *("evaluation.data", "evaluation.geometry_every"),
    *("micro_batch", "objective.implementation", "objective.block_size", "data.packed_length"),
    *("data.cache", "data.train", "data.revision"),  # the fingerprint of the text is compared, not the path
)


@dataclass(frozen=True)
class Run:
    """An existing run folder."""

    folder: Path
    config: Config
    data_fingerprint: str

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

    def has_ended(self) -> bool:
        """Whether all steps of the run are done and scored."""
        return "step" in self.results()

    def results(self) -> dict[str, Any]:
        """The content of `results_file`: first the scores before training, all scores once the run has ended; or {}."""
        if not self.results_file.is_file():
            return {}
        results: dict[str, Any] = json.loads(self.results_file.read_text("utf-8"))
        return results


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
        remedy = "free space there" if is_full(error) else "make it writable"
        advice = f"{remedy} and run the same command again; it continues from the last complete checkpoint"
        if gone:
            advice = "the folder is gone, and the same command starts from the beginning"
        raise InputError(f"writing to {folder} failed ({reason(error)}): {advice}") from error


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return (folder / "run.json").is_file()


def open_run(folder: Path) -> Run:
    """Reads an existing run folder.

    Raises:
      InputError: run.json cannot be read.
    """
    try:
        about = json.loads((folder / "run.json").read_text("utf-8"))
        return Run(folder, from_dict(Config, about["config"]), about["data_fingerprint"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'run.json'} is not a run's config ({reason(error)}): restore it, or remove the folder"
        ) from error


def check_output(folder: Path) -> None:
    """Raises `InputError` unless `folder` is a run, or absent or empty and can be created."""
    if is_run(folder):
        parent = folder
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"output {folder} exists and is not a run of ours: choose another, e.g. --output runs/NEW, or remove it"
        )
    else:
        parent = next(p for p in folder.absolute().parents if p.exists())
    check_writable_folder(folder, parent)


def changes(before: Config, now: Config) -> list[str]:
    """Names of the fields that differ and make `now` another run than `before`."""
    return [name for name in differences(before, now) if not name.startswith(_FREE_SETTINGS)]


def check_resume(run: Run, config: Config, data_fingerprint: str) -> None:
    """Raises `InputError` if a run with `config` would not continue `run`."""
    changed = changes(run.config, config)
    if changed:
        shown = "; ".join(f"{n} was {field_value(run.config, n)!r}, is {field_value(config, n)!r}" for n in changed)
        raise InputError(
            f"{run.folder} is a run with other settings ({shown}): give those, or another folder, "
            "e.g. --output runs/NEW"
        )
    if data_fingerprint != run.data_fingerprint:
        raise InputError(
            f"{run.folder} was trained on other text than {config.data.train} now holds: choose another folder, "
            "e.g. --output runs/NEW"
        )


def create_run(folder: Path, config: Config, data_fingerprint: str, checkpoint: Checkpoint, tokenizer: Any) -> Run:
    """Makes a run folder, complete or not at all."""
    with new_folder(folder) as partial:
        save_tokenizer(tokenizer, partial / "model")
        hf_config = {k: v for k, v in checkpoint.hf_config.items() if k != SETTINGS}
        write_json(partial / "model" / "config.json", hf_config)
        write_json(partial / "run.json", {"config": to_dict(config), "data_fingerprint": data_fingerprint})
    return Run(folder, config, data_fingerprint)
