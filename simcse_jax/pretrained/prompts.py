"""Prompts and the similarity function of a sentence-transformers model: config_sentence_transformers.json."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simcse_jax.config.values import shown
from simcse_jax.errors import InputError
from simcse_jax.pretrained.pooling import modules, read_fields

ABOUT_FILE = "config_sentence_transformers.json"


@dataclass(frozen=True)
class Prompts:
    """Texts that a model wants before its sentences."""

    by_name: dict[str, str] = field(default_factory=dict)
    default: str | None = None
    """Name of the prompt that every sentence gets where the caller chooses none."""
    pooled: bool = True
    """Whether the mean over tokens includes those of a prompt."""

    def text(self, prompt: str | None = None, name: str | None = None) -> str:
        """The text to put before each sentence, "" for none.

        Args:
          prompt: the text itself; "" for none.
          name: name of one of the model's prompts, where `prompt` is None; the default prompt where both are None.

        Raises:
          InputError: no prompt of that name, or a model whose mean leaves the prompt out.
        """
        if prompt is not None and not isinstance(prompt, str):
            raise InputError(f"prompt is {prompt!r}; expected the text to put before each sentence, a str")
        if prompt is None:
            name = self.default if name is None else name
            if name is not None and name not in self.by_name:
                known = ", ".join(map(repr, self.by_name)) or "none"
                raise InputError(f"prompt_name is {name!r}; the model's prompts are {known}: or give prompt, a text")
            prompt = "" if name is None else self.by_name[name]
        if prompt and not self.pooled:
            raise InputError(
                f"the model leaves the tokens of the prompt '{prompt[:40]}' out of the mean (include_prompt), which is "
                'not supported here: give prompt=""'
            )
        return prompt


@dataclass(frozen=True)
class _About:
    """The fields of `ABOUT_FILE` that an export keeps."""

    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None


@dataclass(frozen=True)
class _PoolingFile:
    """The field of a Pooling module's config.json that is read here."""

    include_prompt: bool = True


def read_about(folder: Path) -> dict[str, Any]:
    """What an export keeps of a folder's config_sentence_transformers.json: its prompts and its similarity function.

    Raises:
      InputError: the file is not as sentence-transformers writes it.
    """
    file = folder / ABOUT_FILE
    about: _About = read_fields(_About, file)
    if about.default_prompt_name is not None and about.default_prompt_name not in (about.prompts or {}):
        name = shown(about.default_prompt_name)
        raise InputError(f"{file} has default_prompt_name {name}, which is not among its prompts: correct it")
    return {name: value for name, value in vars(about).items() if value is not None}


def read_prompts(folder: Path) -> Prompts:
    """The prompts of a model folder.

    Raises:
      InputError: see `read_about`.
    """
    about = read_about(folder)
    # The Pooling module, where there is one, says whether it counts the prompt's tokens.
    pooling = next((module.folder / "config.json" for module in modules(folder) if module.kind == "Pooling"), None)
    pooled = read_fields(_PoolingFile, pooling).include_prompt if pooling else True
    by_name = {name: text or "" for name, text in about.get("prompts", {}).items()}
    return Prompts(by_name, about.get("default_prompt_name"), pooled)
