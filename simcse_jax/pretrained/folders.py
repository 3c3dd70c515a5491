"""Model folders in Hugging Face's layout, local or on the hub, and their configuration."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from simcse_jax.errors import InputError, reason
from simcse_jax.model import EncoderConfig, read_encoder_config
from simcse_jax.pretrained.pooling import (
    SETTINGS,
    Pooling,
    encoder_folder,
    ends_in_normalize,
    read_max_length,
    read_object,
    read_pooling,
)
from simcse_jax.pretrained.prompts import Prompts, read_prompts
from simcse_jax.runtime.processes import same_version, tell_version
from simcse_jax.storage.manifest import check_unchanged
from simcse_jax.storage.objects import local_path

COPY = "copy the model or export it again"
"""Advice for the reader of an error about a damaged model."""

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""


@dataclass(frozen=True)
class Checkpoint:
    """The folder and the configuration of a checkpoint."""

    folder: Path
    """Folder of config.json, the weights and the tokenizer."""
    hf_config: dict[str, Any]
    config: EncoderConfig
    max_length: int
    """Most tokens per sentence: where a run or a sentence-transformers folder names it, that, else as many as the
    encoder has positions for."""
    root: Path
    """The folder of the whole model: `folder`, except for models of early sentence-transformers."""
    prompts: Prompts
    """The texts that the model wants before its sentences."""

    @property
    def pooling(self) -> Pooling | None:
        """The pooler that the folder names; None if it names none, like a plain BERT.

        Raises:
          InputError: see `read_pooling`. The weights can still be used with another pooler.
        """
        return read_pooling(self.root, self.hf_config)

    @property
    def normalizes(self) -> bool:
        """Whether the model's own vectors have length 1; see `ends_in_normalize`."""
        return ends_in_normalize(self.root, self.hf_config)

    def trained(self, pooling: Pooling, max_length: int) -> "Checkpoint":
        """The model trained from this one: its limit stays, unless training goes beyond, and its Normalize where the
        pooler does.

        Args:
          pooling: the pooler that it is trained with.
          max_length: most tokens per sentence in training.
        """
        limit = max(self.max_length, max_length)
        settings = {"pooler": pooling.pooler, "mlp_only_train": pooling.mlp_only_train, "max_length": limit}
        if self.normalizes and self.own_pooling == pooling.at_evaluation:
            settings["normalize"] = True
        return replace(self, hf_config=self.hf_config | {SETTINGS: settings}, max_length=limit)

    @property
    def own_pooling(self) -> str | None:
        """The pooler whose vectors the model gives; None where it names none, or one that we do not have."""
        try:
            return self.pooling.at_evaluation if self.pooling else None
        except InputError:
            return None


def locate(name_or_path: str | Path) -> Path:
    """The local folder of a checkpoint, downloaded from the hub if `name_or_path` is not a folder.

    A run has one inside, with config.json and the tokenizer; its weights are in its checkpoints. The processes of a job
    take the commit of process 0.

    Raises:
      InputError: a path that does not exist, or a name that the hub does not know; or see `same_version`.
    """
    path, name = local_path(name_or_path), str(name_or_path)
    if path.is_dir():
        tell_version(f"model {name}", "")
        return path / "model" if (path / "run.json").is_file() else path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"'{name}' is not a folder: give a Hugging Face model folder or a name on the hub")
    # A snapshot's folder has the name of its commit.
    return same_version(f"model {name}", partial(_download, name), lambda folder: folder.name)


def _download(name: str, commit: str | None) -> Path:
    """The folder of a model of the hub, at its present commit or another."""
    from huggingface_hub import HfApi, snapshot_download

    unreachable = None
    try:
        # The download begins with the same request but sets no limit, and waits for minutes where packets are dropped.
        HfApi().model_info(name, revision=commit, timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub client raises a dozen types, from name errors to connection errors
        unreachable = error  # what was downloaded before is still there

    def download(weights: str) -> Path:
        patterns = [
            "*.json",
            "*.txt",
            "*.model",
            "*_Pooling/*",
            "*_Dense/*",
            "*_WeightedLayerPooling/*",
            "postprocess/*",
            weights,
            f"*_Transformer/{weights}",
        ]
        offline = unreachable is not None
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns, local_files_only=offline))

    try:
        folder = download("model*.safetensors")
        if not list(encoder_folder(folder).glob("model*.safetensors")):
            folder = download("pytorch_model*.bin")
    except Exception as error:  # as above
        cause = unreachable or error
        raise InputError(
            f"model '{name}' is neither a local folder nor available from the hub ({reason(cause)}): "
            "check the name and the network, or download the model elsewhere and give its folder"
        ) from cause
    return folder


def inside_run(folder: Path) -> str:
    """Advice for the reader of an error, where a folder is a part of a run; otherwise empty."""
    run = next((path for path in folder.absolute().parents if (path / "run.json").is_file()), None)
    return f" (it is inside of the run {run}: give that folder)" if run else ""


def read_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Reads the configuration of a checkpoint, not its weights.

    Raises:
      InputError: no such model, no readable `config.json`, not a BERT or RoBERTa, or an export whose files have
        changed.
    """
    root = locate(name_or_path)
    # The weights are compared when they are read; a card is read by nobody here and edited by many.
    check_unchanged(root, COPY, lambda name: not name.endswith((".safetensors", ".md")))
    folder = encoder_folder(root)
    hf_config = read_object(folder / "config.json", f"'{folder}' is not a model folder{inside_run(folder)}")
    config = read_encoder_config(hf_config, str(folder / "config.json"))
    limit = read_max_length(root, hf_config, config.max_length)
    return Checkpoint(folder, hf_config, config, limit, root, read_prompts(root))
