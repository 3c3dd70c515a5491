"""The measures of a trained cell."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from simcse_jax import rng
from simcse_jax.config import Config
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.feed import Feed, order_of
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.evaluation.geometry import average_cosine, effective_rank, singular_values
from simcse_jax.evaluation.sts import evaluate, load_task
from simcse_jax.evaluation.suite import expand_tasks
from simcse_jax.inference.loading import encoder_of, load_model
from simcse_jax.model.build import build_model
from simcse_jax.model.params import Params
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.pooling import Pooling, settled
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runs.metrics_log import read_log
from simcse_jax.runtime.mesh import check_batch_size, make_mesh, put, state_sharding
from simcse_jax.study.false_negatives import Reference, false_negatives, load_reference
from simcse_jax.study.grid import Cell, Settings, Study, slug
from simcse_jax.study.hardness import hardest_share
from simcse_jax.study.noise_scale import Gradient, batch_gradients, compared, make_gradient, mean_cosine, noise_scale
from simcse_jax.training.guide import load_guide, make_guide
from simcse_jax.training.loss import encode_views
from simcse_jax.training.scores import check_data
from simcse_jax.training.spec import StepSpec
from simcse_jax.training.state import initial_params, sentence_encoder

Measures = dict[str, Any]


class Meter:
    """Measures cells that have model and text in common; loads once whatever they share."""

    def __init__(self, study: Study, config: Config) -> None:
        """Loads model, text and tasks, and checks the study against them.

        Args:
          study: the study.
          config: a run with their model and text.

        Raises:
          InputError: see `prepare`; also a batch that exceeds the text or that the devices do not divide.
        """
        self._study, self._config = study, config
        self._mesh = make_mesh(config.mesh.data, config.mesh.fsdp, dcn=config.mesh.dcn)
        check_data(config.evaluation)
        names = expand_tasks(config.evaluation.test, "test")
        self._tasks = [load_task(name, config.evaluation.data, "test") for name in names]
        checkpoint = read_checkpoint(config.model.path)
        self._model = build_model(checkpoint.config, settled(config.model, lambda: checkpoint.pooling))
        self._pooling = Pooling(self._model.pooler, self._model.mlp_only_train)
        tokenizer = load_tokenizer(checkpoint.folder)
        trained = checkpoint.trained(self._pooling, config.data.max_length)
        self._encoder = encoder_of(trained, self._model, tokenizer, self._mesh)
        self._corpus = open_corpus(config.data)
        self.tokens = tokenize_corpus(
            self._corpus, tokenizer, config.data.max_length, config.data.cache, jax.process_index() == 0
        )
        for batch_size in study.batch_sizes:
            check_batch_size(self._mesh, batch_size)
            if batch_size > len(self.tokens):
                raise InputError(
                    f"batch_sizes holds {batch_size} but {config.data.train} has {len(self.tokens):,} examples: "
                    "leave out batches larger than the data"
                )
        guide = load_guide(config, tokenizer)
        self._judge = make_guide(guide, self._mesh) if guide else None
        self._views = jax.jit(partial(encode_views, self._model), static_argnames="micro_batch")
        self._gradients: dict[tuple[int, Settings], Gradient] = {}  # by batch size
        self._reference: Reference | None = None
        self._noise_before: dict[tuple[int, int, Settings], float | None] = {}

    def initial_scores(self) -> dict[str, float | None]:
        """Test scores before training, with the parameters of the first seed."""
        return self._test(self._initial(self._study.cells()[0]))[0]

    def __call__(self, cell: Cell, results: dict[str, Any]) -> Measures:
        """Measures a cell whose training has ended.

        Args:
          cell: the cell.
          results: the results of `train`.

        Returns:
          Scores and measures, named as the columns of study.csv; `path` holds [step, alignment, uniformity] on the dev
          pairs, evaluation by evaluation.
        """
        study, folder = self._study, self._study.cell_folder(cell)
        steps = study.steps_of(cell)
        params = load_model(folder).params
        test, vectors = self._test(params)
        seconds = results.get("seconds")
        # Of a size that training had memory for.
        micro_batch = results["micro_batch"] or cell.batch_size
        key = cell.batch_size, cell.seed, cell.settings  # before training, all rules are the same
        if key not in self._noise_before:
            self._noise_before[key], _ = self._noise(cell, self._initial(cell), micro_batch)
        noise, towards = self._noise(cell, params, micro_batch, study.direction_batch)
        log = from_log(folder / "metrics.jsonl", steps, results["best_step"])
        return {
            "best_step": results["best_step"],
            "dev": results["dev"],
            "test": test.pop("Avg."),
            **{f"test_{Path(name).stem}": score for name, score in test.items()},
            **log,
            **self._false_negatives(cell),
            "noise_scale_before": self._noise_before[key],
            "noise_scale": noise,
            "direction": towards,
            "hardest_share": self._hardest(cell, params, micro_batch, log["temperature"]),
            "effective_rank": effective_rank(singular_values(vectors)),
            "average_cosine": average_cosine(vectors),
            # Of the whole cell, even if this process trained only a part of it.
            "seconds": steps * seconds / results["steps"] if seconds and results["steps"] else None,
            "steps_per_second": results["steps"] / seconds if seconds else None,
            "memory_bytes": results["memory"],
        }

    def _test(self, params: Params) -> tuple[dict[str, float | None], Float[np.ndarray, "S H"]]:
        """Scores of the test tasks, and the vectors of their sentences."""
        seen = []

        def encode(sentences: list[str]) -> Float[np.ndarray, "S H"]:
            seen.append(self._encoder(params, sentences))
            return seen[-1]

        reported: dict[str, float | None] = evaluate(self._tasks, encode)["reported"]
        return reported, np.concatenate(seen)

    def _initial(self, cell: Cell) -> Params:
        initial = initial_params(self._study.config(cell), self._model)
        params: Params
        if callable(initial):
            params = jax.jit(initial, out_shardings=state_sharding(self._mesh, jax.eval_shape(initial)))()
        else:
            initial = sentence_encoder(initial)
            params = put(initial, state_sharding(self._mesh, initial))
        return params

    def _gradient(self, cell: Cell, size: int, micro_batch: int, params: Params) -> Gradient:
        """The gradient of a batch of `size` under a cell's loss."""
        if (size, cell.settings) not in self._gradients:
            config = replace(self._study.config(cell), batch_size=size, micro_batch=min(micro_batch, size))
            spec = StepSpec(config, self._model, self._mesh, self.tokens.columns, total_steps=1)
            self._gradients[size, cell.settings] = make_gradient(spec, params)
        return self._gradients[size, cell.settings]

    def _feed(self, cell: Cell, size: int) -> Feed:
        """Batches in an order that no run has: the seeds of runs are below 2³²."""
        config = self._study.base_of(cell)
        order = order_of(self.tokens, size, 2**32 + cell.seed, config.data.distinct)
        return Feed(self.tokens, order, self._mesh, compares=config.objective.negatives.duplicates, guide=self._judge)

    def _noise(self, cell: Cell, params: Params, micro_batch: int, large: int = 0) -> tuple[float | None, float | None]:
        """The noise scale of a cell's batches, and their mean cosine with the gradient of one of `large` examples, or
        of all; None where it is not asked for or cannot be had."""
        study, size = self._study, cell.batch_size
        large = min(large, len(self.tokens)) // self._mesh.size * self._mesh.size
        if not study.noise_scale_batches and large <= size:
            return None, None
        whole = None
        if large > size:
            gradient = self._gradient(cell, large, micro_batch, params)
            (whole,) = batch_gradients(gradient, params, self._feed(cell, large), 1)
        # Batches that share examples are not independent.
        wanted = max(study.noise_scale_batches, study.noise_scale_sentences // size, 1)
        count = min(wanted, len(self.tokens) // size)
        gradient = self._gradient(cell, size, micro_batch, params)
        gradients, cosines = batch_gradients(gradient, params, self._feed(cell, size), count), list[float]()
        noise = noise_scale(gradients if whole is None else compared(gradients, whole, cosines), size)
        return noise if study.noise_scale_batches else None, mean_cosine(cosines)

    def _hardest(self, cell: Cell, params: Params, micro_batch: int, temperature: float | None) -> float | None:
        share, config = self._study.hardest, self._study.config(cell)
        if not share or cell.batch_size < 2:
            return None
        batch = replace(self._feed(cell, cell.batch_size), guide=None).batch(0)
        key = rng.key(cell.seed, "hardest")
        z = self._views(params, batch, key, micro_batch=micro_batch)
        return float(hardest_share(z[:, 0], z[:, 1], temperature or config.objective.temperature, share))

    def _counted(self, cell: Cell) -> list[np.ndarray]:
        """The examples of each step of a cell, up to the number among which false negatives are counted."""
        study, steps = self._study, self._study.steps_of(cell)
        if study.false_negative_sentences:
            steps = min(steps, max(1, study.false_negative_sentences // cell.batch_size))
        order = order_of(self.tokens, cell.batch_size, cell.seed, study.base_of(cell).data.distinct)
        return [order.examples(step) for step in range(steps)]

    def _false_negatives(self, cell: Cell) -> Measures:
        study = self._study
        if self._reference is None:
            same = [c for c in study.cells() if study.text_key(c) == study.text_key(cell)]
            counted = np.zeros(len(self.tokens), bool)
            for batch in (batch for c in same for batch in self._counted(c)):
                counted[batch] = True
            wanted = np.flatnonzero(counted)
            model = study.reference_model or self._config.model.path
            pooler = study.reference_pooler or (None if study.reference_model else self._pooling.at_evaluation)
            text = study.text_key(cell)
            file = study.folder / f"reference{'-' if text else ''}{slug(text)}.npz"
            self._reference = load_reference(file, model, pooler, self._config, self._corpus, wanted)
        reference = self._reference
        shares = false_negatives((reference.of(b) for b in self._counted(cell)), study.false_negative_threshold)
        return {"sentences": study.steps_of(cell) * cell.batch_size, **shares}


def from_log(file: Path, steps: int, best_step: int | None) -> Measures:
    """The figures of a run's metrics.jsonl: means over the last quarter of its steps, and the dev figures."""
    lines = read_log(file)
    late = [line for line in lines if "loss" in line and line["step"] > 0.75 * steps]
    names = ("loss", "effective_negatives", "positive_similarity", "negative_similarity", "masked_share", "temperature")
    dev = {line["step"]: line for line in lines if "dev" in line}
    selected = dev.get(best_step, {})
    return {
        **{name: _mean([line.get(name) for line in late]) for name in names},
        "dev_before": dev.get(0, {}).get("dev"),
        "dev_last": dev.get(steps, {}).get("dev"),
        "alignment": selected.get("dev_alignment"),
        "uniformity": selected.get("dev_uniformity"),
        "path": [[s, d.get("dev_alignment"), d.get("dev_uniformity")] for s, d in dev.items()],
    }


def _mean(values: list[float | None]) -> float | None:
    """The mean of the steps that have the figure: a batch of one example, say, has no pairs."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
