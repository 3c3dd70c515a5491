"""The cells of each experiment."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from benchmarks.results.cells import Cell, Records
from benchmarks.results.equivalence import train_side
from benchmarks.results.measure import DEV, encode_and_measure, postprocess_and_measure, train_and_measure
from simcse_jax.ablation import Ablation
from simcse_jax.config import Config
from simcse_jax.config.load import load_config_file, load_variable
from simcse_jax.config.values import differences, field_value, with_settings

Experiment = Literal["learning_rate", "ladder", "equivalence", "ablations"]
EXPERIMENTS: tuple[Experiment, ...] = get_args(Experiment)
SEEDS = {"learning_rate": 1, "ladder": 3, "equivalence": 5, "ablations": 3}
"""The number of seeds, the first of them 42. The last of the ablations is that of `PATHS` alone."""
STEPS = {"learning_rate": 250, "ladder": 1000, "equivalence": 250, "ablations": 500}
RATES = (1e-5, 3e-5, 1e-4)
"""The learning rates that STS-B dev chooses from, for all unsupervised runs."""
SUPERVISED_RATE = 5e-5  # as published
BATCH, LENGTH = 64, 24

UNTRAINED = {
    "static average": "avg_static",
    "last average": "avg",
    "first-last average": "avg_first_last",
    "[CLS]": "cls_before_pooler",
}
POSTPROCESSED = ("whitening", "all-but-the-top", "flow")
"""Of the first-last average, as in the papers."""
SMOOTHING = "objective.smoothing"
MAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "unsupervised SimCSE": ("unsup_bert_base", {}),
    "IS-CSE, constant": ("iscse_bert_base", {}),
    "IS-CSE, cosine": (
        "iscse_bert_base",
        {f"{SMOOTHING}.weight": 0.05, f"{SMOOTHING}.schedule": "cosine", f"{SMOOTHING}.start_weight": 0.005},
    ),
    "unsupervised SimCSE + MLM": ("unsup_bert_base", {"objective.mlm.weight": 0.1}),
    "supervised SimCSE": ("sup_bert_base", {}),
    "supervised, without hard negatives": ("sup_bert_base", {"data.columns": ("sent0", "sent1")}),
}
"""The trained rows of the ladder: config and changes."""
TRANSFER = ("unsupervised SimCSE", "IS-CSE, constant", "unsupervised SimCSE + MLM", "supervised SimCSE")
"""The trained rows that are scored on the transfer tasks, too, besides the first-last average."""
TRANSFER_ALWAYS = ("unsupervised SimCSE", "unsupervised SimCSE + MLM")
"""Those of them whose every seed is, for a claim; of the others the first."""
ABLATIONS = (
    *("dropout", "augmentations", "objectives", "pooler", "temperature", "hard_negatives", "mlm", "smoothing"),
)
"""The ablations of the package whose variants are run."""
PATHS: dict[str, dict[str, Any]] = {
    "dropout 0.1": {},
    "no dropout": {"model.dropout": 0.0},
    "the same noise twice": {"model.dropout": 0.1, "objective.noise": "shared"},
    "delete one word": {"data.augment": "delete_word"},
}
"""The variants of SimCSE's figure 2, whose first seed is measured every 10 steps."""
SYNONYMS: dict[str, Any] = {"data.augment": "synonyms", "data.synonyms": "WordNet 3.1"}
"""Not among the package's ablations, which have no table of synonyms."""
MODELS = {"minilm": "all-MiniLM-L6-v2", "model": "pretrained encoder"}
SIDES = {"torch": "PyTorch", "jax": "ours"}
"""Starts and trainers of the comparison with PyTorch, in words."""
FIRST = 42
"""The seed whose vectors and paths are kept."""
_USUAL = {"model.dropout": 0.1}  # the encoder's own


@dataclass(frozen=True)
class Scale:
    """The size of the experiments."""

    seeds: tuple[int, ...] = ()
    """The seeds; as many as each experiment asks for where empty."""
    steps: int = 0
    """Most steps of each run; as many as each experiment asks for where 0."""

    def seeds_of(self, experiment: str) -> tuple[int, ...]:
        """The seeds of an experiment."""
        return self.seeds or tuple(range(FIRST, FIRST + SEEDS[experiment]))

    def steps_of(self, experiment: str) -> int:
        """The steps of its runs."""
        return min(self.steps, STEPS[experiment]) if self.steps else STEPS[experiment]


def cells_of(experiment: str, scale: Scale, rate: float) -> list[Cell]:
    """The cells of an experiment, seed by seed.

    Args:
      experiment: one of `EXPERIMENTS`.
      scale: its size.
      rate: the learning rate of unsupervised runs, see `chosen_rate`.
    """
    seeds = scale.seeds_of(experiment)
    if experiment == "learning_rate":
        return [training(experiment, f"{x:g}", "unsup_bert_base", {}, FIRST, scale, x) for x in RATES]
    if experiment == "ladder":
        trained = [main_cell(name, seed, scale, rate) for seed in seeds for name in MAIN]
        return [*(untrained_cell(name) for name in UNTRAINED), *map(postprocessed_cell, POSTPROCESSED), *trained]
    if experiment == "equivalence":
        pairs = [(model, side) for model in MODELS for side in SIDES]
        return [equivalence_cell(model, side, seed, scale) for seed in seeds for model, side in pairs]
    found = [
        ablation_cell(ablation.base_name, changes, seed, scale, rate, ablation.text)
        for seed in seeds
        for ablation in ablations()
        for changes in ablation.variants.values()
        if seed != FIRST + SEEDS[experiment] - 1 or is_drawn(ablation.base_name, changes, ablation.text)
    ]
    return list({cell.name: cell for cell in found}.values())


def chosen_rate(records: Records, scale: Scale) -> float | None:
    """The learning rate with the best score on STS-B dev; None until all are measured."""
    found = {x: records.read(cell) for x, cell in zip(RATES, cells_of("learning_rate", scale, 0.0), strict=True)}
    scores = {x: figures.get("best") or -math.inf for x, figures in found.items() if figures is not None}
    return max(scores, key=lambda x: scores[x]) if len(scores) == len(RATES) else None


def untrained_cell(name: str) -> Cell:
    """The pretrained encoder with a pooler."""
    main = name == "first-last average"
    measures = ["dev", "sts", *(["transfer"] if main else []), *(["vectors"] if main or name == "[CLS]" else [])]
    settings = {"model": "model", "pooler": UNTRAINED[name], "dtype": "bfloat16", "measures": measures}
    return Cell(f"ladder/untrained/{slug(name)}", settings, encode_and_measure, 200.0 if main else 50.0)


def postprocessed_cell(method: str) -> Cell:
    """A post-processor on the first-last average."""
    settings = {"model": "model", "pooler": "avg_first_last", "dtype": "bfloat16", "method": method}
    return Cell(f"ladder/postprocessed/{slug(method)}", settings, postprocess_and_measure, 100.0)


def main_cell(name: str, seed: int, scale: Scale, rate: float) -> Cell:
    """A trained row of the ladder."""
    config, changes = MAIN[name]
    transferred = name in TRANSFER_ALWAYS or (seed == FIRST and name in TRANSFER)
    measures = ["sts", *(["transfer"] if transferred else []), *(["vectors"] if seed == FIRST else [])]
    return training("ladder", name, config, changes, seed, scale, rate, measures)


def ablation_cell(
    config: str, changes: Mapping[str, Any], seed: int, scale: Scale, rate: float, text: str = "wiki"
) -> Cell:
    """A variant of an ablation. Ablations that share a config and a text share the run without changes."""
    base = _config(config)
    usual = {name: _USUAL.get(name, field_value(base, name)) for name in changes}
    changed = {name: x for name, x in changes.items() if x != usual[name]}
    name = "-".join(slug(f"{n.rpartition('.')[2]} {_word(x)}") for n, x in changed.items() if n != "data.synonyms")
    if seed == FIRST and is_drawn(config, changed, text):
        changed |= {"evaluation.geometry_every": 10}
    words = [config, *([text] if text != "wiki" else []), name or "as_published"]
    return training("ablations", "-".join(words), config, changed, seed, scale, rate, text=text)


def is_drawn(config: str, changes: Mapping[str, Any], text: str) -> bool:
    """Whether a variant is one of `PATHS`, whose claims need a seed more."""
    several = [{name: x for name, x in some.items() if _USUAL.get(name) != x} for some in (changes, *PATHS.values())]
    return config == "unsup_bert_base" and text == "wiki" and several[0] in several[1:]


def training(
    experiment: str,
    name: str,
    config: str,
    changes: Mapping[str, Any],
    seed: int,
    scale: Scale,
    rate: float,
    measures: list[str] | None = None,
    text: str = "wiki",
) -> Cell:
    """A training run of the pretrained encoder."""
    supervised = config.startswith("sup")
    settings = {
        "config": configured(
            config, changes, scale.steps_of(experiment), seed, SUPERVISED_RATE if supervised else rate
        ),
        "model": "model",
        "text": "nli" if supervised else text,
        "measures": measures or [],
    }
    steps, scored = scale.steps_of(experiment), measures or []
    cost = (1.5 if supervised and "data.columns" not in changes else 1.0) * (2.0 if "mlm" in str(changes) else 1.0)
    cost = cost * steps + 200 * ("sts" in scored) + 400 * ("transfer" in scored)
    cost += 1.0 * steps if "evaluation.geometry_every" in changes else 0.0
    needs = "synonyms" if "data.synonyms" in changes else ""
    return Cell(f"{experiment}/{slug(name)}-seed{seed}", settings, train_and_measure, cost, needs)


def configured(
    name: str, changes: Mapping[str, Any], steps: int, seed: int, rate: float, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """The settings of a run that differ from the defaults of `Config`, but for paths: all that its figures follow from.

    Args:
      name: a config of the package.
      changes: what the run changes in it.
      steps, seed, rate, dtype: its size.
    """
    every = max(1, min(steps // 4, 125))
    size: dict[str, Any] = {"seed": seed, "batch_size": BATCH, "max_steps": steps, "data.max_length": LENGTH}
    size |= {"model.dtype": dtype, "optimizer.learning_rate": rate}
    size |= {"evaluation.dev": DEV, "evaluation.test": (), "evaluation.every": every, "checkpoint.every": every}
    config: Config = with_settings(_config(name), size | dict(changes))
    found = {field: field_value(config, field) for field in differences(Config(), config)}
    places = ("output", "model.path", "data.train", "evaluation.data")
    return {n: list(x) if isinstance(x, tuple) else x for n, x in sorted(found.items()) if n not in places}


def equivalence_cell(model: str, side: str, seed: int, scale: Scale) -> Cell:
    """A run of one of the two trainers."""
    steps = scale.steps_of("equivalence")
    config = configured("unsup_bert_base", {}, steps, seed, 3e-5, "float32")
    settings = {"config": config, "side": side, "model": model, "text": "wiki"}
    weight = {"minilm": 0.4, "model": 1.5}[model]
    return Cell(f"equivalence/{model}-{side}-seed{seed}", settings, train_side, weight * steps)


@dataclass(frozen=True)
class Variants:
    """An ablation of the package."""

    name: str
    base_name: str
    """Its config, as the package names it."""
    text: str
    """Its text: what compares the next sentence with the same one must read both from running text."""
    variants: dict[str, dict[str, Any]]
    paper: dict[str, float]


def ablations() -> list[Variants]:
    """The ablations that are run."""
    found = []
    for name in ABLATIONS:
        ablation = load_variable(name, "ablation", Ablation)
        base = ablation.base.output.rpartition("/")[2]
        more = {"synonyms": SYNONYMS} if name == "augmentations" else {}
        paper = ablation.paper | ({"synonyms": 77.4} if more else {})
        text = "running" if name == "objectives" else "wiki"
        found.append(Variants(name, base, text, ablation.variants | more, paper))
    return found


@cache
def _config(name: str) -> Config:
    return load_config_file(name)


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_").lower()


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
