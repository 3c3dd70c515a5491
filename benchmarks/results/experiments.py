"""The cells of each experiment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.results.cells import Cell, Records
from benchmarks.results.equivalence import train_side
from benchmarks.results.measure import encode_and_measure, postprocess_and_measure, train_and_measure
from simcse_jax.ablation import Ablation
from simcse_jax.config.load import load_variable

EXPERIMENTS = ("learning_rate", "ladder", "equivalence", "ablations")
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
    "supervised, without hard negatives": ("sup_bert_base", {"data.columns": ["sent0", "sent1"]}),
}
"""The trained rows of the ladder: config and changes."""
TRANSFER = ("unsupervised SimCSE", "IS-CSE, constant", "unsupervised SimCSE + MLM", "supervised SimCSE")
"""The trained rows whose first seed is scored on the transfer tasks, too, besides the first-last average."""
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
_USUAL = {"model.dropout": 0.1}  # the encoder's own


@dataclass(frozen=True)
class Scale:
    """How much of each experiment is run."""

    seeds: tuple[int, ...] = ()
    """The seeds; as many as each experiment asks for where empty."""
    steps: int = 0
    """Most steps of each run; as many as each experiment asks for where 0."""

    def seeds_of(self, experiment: str) -> tuple[int, ...]:
        """The seeds of an experiment."""
        return self.seeds or tuple(range(42, 42 + SEEDS[experiment]))

    def steps_of(self, experiment: str) -> int:
        """The steps of its runs."""
        return min(self.steps, STEPS[experiment]) if self.steps else STEPS[experiment]


def cells_of(experiment: str, scale: Scale, rate: float) -> list[Cell]:
    """The cells of an experiment, seed by seed.

    Args:
      experiment: one of `EXPERIMENTS`.
      scale: what of it is run.
      rate: the learning rate of unsupervised runs, see `chosen_rate`.
    """
    seeds = scale.seeds_of(experiment)
    if experiment == "learning_rate":
        return [training(experiment, f"{x:g}", "unsup_bert_base", {}, seeds[0], scale, x) for x in RATES]
    if experiment == "ladder":
        trained = [main_cell(name, seed, scale, rate) for seed in seeds for name in MAIN]
        return [*(untrained_cell(name) for name in UNTRAINED), *map(postprocessed_cell, POSTPROCESSED), *trained]
    if experiment == "equivalence":
        pairs = [(model, side) for model in ("minilm", "model") for side in ("torch", "jax")]
        return [equivalence_cell(model, side, seed, scale) for seed in seeds for model, side in pairs]
    found = [
        ablation_cell(ablation.base_name, changes, seed, scale, rate)
        for number, seed in enumerate(seeds)
        for ablation in ablations()
        for changes in ablation.variants.values()
        if number < SEEDS[experiment] - 1 or _drawn(ablation.base_name, changes)
    ]
    return list({cell.name: cell for cell in found}.values())


def chosen_rate(records: Records, scale: Scale) -> float | None:
    """The learning rate with the best score on STS-B dev; None until all are measured."""
    found = {x: records.read(cell) for x, cell in zip(RATES, cells_of("learning_rate", scale, 0.0), strict=True)}
    scores = {x: figures.get("best", -1.0) for x, figures in found.items() if figures is not None}
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
    first = seed == scale.seeds_of("ladder")[0]
    measures = ["sts", *(["transfer"] if first and name in TRANSFER else []), *(["vectors"] if first else [])]
    return training("ladder", name, config, changes, seed, scale, rate, measures)


def ablation_cell(config: str, changes: Mapping[str, Any], seed: int, scale: Scale, rate: float) -> Cell:
    """A variant of an ablation. Ablations that share a config share the run without changes."""
    changed = {name: x for name, x in changes.items() if _USUAL.get(name) != x}
    if _drawn(config, changes) and seed == scale.seeds_of("ablations")[0]:
        changed |= {"evaluation.geometry_every": 10}
    shown = {n: x for n, x in changed.items() if n not in ("evaluation.geometry_every", "data.synonyms")}
    name = "-".join(slug(f"{n.rpartition('.')[2]} {_word(x)}") for n, x in shown.items())
    return training("ablations", f"{config}-{name or 'as_published'}", config, changed, seed, scale, rate)


def _drawn(config: str, changes: Mapping[str, Any]) -> bool:
    """Whether a variant is one of `PATHS`, whose claims need a seed more."""
    usual = {name: x for name, x in changes.items() if _USUAL.get(name) != x}
    paths = [{name: x for name, x in path.items() if _USUAL.get(name) != x} for path in PATHS.values()]
    return config == "unsup_bert_base" and usual in paths


def training(
    experiment: str,
    name: str,
    config: str,
    changes: Mapping[str, Any],
    seed: int,
    scale: Scale,
    rate: float,
    measures: list[str] | None = None,
) -> Cell:
    """A training run of the pretrained encoder."""
    supervised = config.startswith("sup")
    steps, measures = scale.steps_of(experiment), measures or []
    run = f"{experiment}/{slug(name)}-seed{seed}"
    settings = {
        "config": config,
        "changes": {n: list(x) if isinstance(x, tuple) else x for n, x in changes.items()},
        "model": "model",
        "text": "nli" if supervised else "running" if "data.neighbours" in changes else "wiki",
        "rate": SUPERVISED_RATE if supervised else rate,
        "batch": BATCH,
        "length": LENGTH,
        "dtype": "bfloat16",
        "steps": steps,
        "every": max(1, min(steps // 4, 125)),
        "seed": seed,
        "measures": measures,
        "run": run,
    }
    cost = 1.5 if supervised and "data.columns" not in changes else 1.0
    cost *= 2.0 if changes.get("objective.mlm.weight") else 1.0
    score = 200 * ("sts" in measures) + 400 * ("transfer" in measures)
    paths = 10.0 * steps / 10 if changes.get("evaluation.geometry_every") else 0.0
    needs = "synonyms" if "data.synonyms" in changes else ""
    return Cell(run, settings, train_and_measure, cost * steps + score + paths, needs)


def equivalence_cell(model: str, side: str, seed: int, scale: Scale) -> Cell:
    """A run of one of the two trainers."""
    steps = scale.steps_of("equivalence")
    settings = {
        "config": "unsup_bert_base",
        "changes": {},
        "side": side,
        "model": model,
        "text": "wiki",
        "rate": 3e-5,
        "batch": BATCH,
        "length": LENGTH,
        "dtype": "float32",
        "steps": steps,
        "every": max(1, steps // 5),
        "seed": seed,
    }
    weight = {"minilm": 0.4, "model": 1.5}[model]
    return Cell(f"equivalence/{model}-{side}-seed{seed}", settings, train_side, weight * steps)


@dataclass(frozen=True)
class Variants:
    """An ablation of the package."""

    name: str
    base_name: str
    """Its config, as the package names it."""
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
        found.append(Variants(name, base, ablation.variants | more, paper))
    return found


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_").lower()


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
