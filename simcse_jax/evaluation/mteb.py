"""Our models in the package mteb (Muennighoff et al. 2023), which is not a dependency: pip install mteb.

import mteb
from simcse_jax.evaluation.mteb import MTEBEncoder

model = MTEBEncoder("runs/quickstart")
results = mteb.evaluate(model, mteb.get_tasks(tasks=["STS12", "STSBenchmark"]), cache=None)
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from simcse_jax.inference.simcse import SimCSE
from simcse_jax.inference.vectors import as_cosines, cosines, unit


class MTEBEncoder:
    """A model behind mteb's `EncoderProtocol` (mteb 2): `encode`, `similarity`, `similarity_pairwise`, metadata.

    Vectors are of length 1 and the similarity is the cosine. Where the model names prompts, `encode` takes the one
    whose name fits the task best, as mteb does for sentence-transformers, else the model's default.
    """

    def __init__(
        self, model: str | Path, revision: str | None = None, *, device: str | None = None, pooler: str | None = None
    ) -> None:
        """Loads a model onto all devices.

        Args:
          model: a run folder, an exported folder, a Hugging Face folder or a name on the hub.
          revision: mteb files the results under the name and this revision.
          device: ignored; the model runs on JAX's devices.
          pooler: overrides the pooler saved with the model.

        Raises:
          InputError: see `load_model`.
        """
        self._model = SimCSE(model, pooler)
        self._name, self._revision = str(model), revision

    def __repr__(self) -> str:
        """The model."""
        return f"MTEBEncoder({self._model!r})"

    @cached_property
    def mteb_model_meta(self) -> Any:
        """mteb's description of the model: its name, as organisation/name, and revision."""
        from mteb.models.model_meta import ModelMeta

        name = Path(self._name).expanduser()
        local = name.exists() or len(name.parts) != 2
        values = {"name": f"simcse_jax/{name.resolve().name}" if local else self._name, "framework": ["JAX"]}
        if self._revision:
            values["revision"] = self._revision
        return ModelMeta.create_empty(overwrites=values)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Float[np.ndarray, "S H"]:
        """Vectors of length 1.

        Args:
          inputs: mteb's DataLoader of batches; each has its sentences under "text".
          task_metadata, prompt_type: choose a prompt, by task-type, task, kind of task-type, kind of task, or type.
          hf_split, hf_subset, kwargs: mteb's; ignored, except for `show_progress_bar`.
        """
        sentences = [sentence for batch in inputs for sentence in batch["text"]]
        side = str(getattr(prompt_type, "value", prompt_type or ""))
        names = [getattr(task_metadata, key, None) for key in ("name", "type")]
        wanted = [name for task in names if task for name in (f"{task}-{side}", str(task))] + [side]
        chosen = next((name for name in wanted if name in self._model.prompts), None)
        progress = bool(kwargs.get("show_progress_bar", False))
        return np.asarray(self._model.encode(sentences, prompt_name=chosen, progress=progress))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, "A B"]:
        """Cosine of every vector of the first with every vector of the second."""
        return cosines(_rows(embeddings1), _rows(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, " A"]:
        """Cosine of each vector with its counterpart."""
        products: Float[np.ndarray, " A"] = as_cosines(
            np.sum(unit(_rows(embeddings1)) * unit(_rows(embeddings2)), axis=1)
        )
        return products


def _rows(vectors: Any) -> Float[np.ndarray, "A H"]:
    return np.atleast_2d(np.asarray(vectors))
