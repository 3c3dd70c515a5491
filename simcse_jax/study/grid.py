"""The grid of a study: its settings, its cells, and the training run of each cell."""

import itertools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from simcse_jax.config import Config
from simcse_jax.config.values import check_types, differences, with_settings
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName
from simcse_jax.storage.files import local_only

Rule = Literal["constant", "sqrt", "linear"]
EXPONENTS: dict[str, float] = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0, "reference": 0.0}
"""lr(B) = lr_ref · (B / B_ref)^exponent."""

_LOGGED = 64  # lines of training metrics per cell; the last quarter is averaged


Settings = tuple[tuple[str, Any], ...]
"""Fields of a config by their dotted names, and values for them."""
Budget = Literal["", "sentences", "steps"]
"""What runs of all batches have in common; empty where a study has one such number."""


@dataclass(frozen=True)
class Series:
    """What runs of different batches and seeds share: a line of the figures."""

    rule: Rule
    settings: Settings = ()
    """Values of the factors."""
    budget: Budget = ""


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    batch_size: int
    rule: Literal["constant", "sqrt", "linear", "reference"]
    """`reference` at the reference batch, where all rules give the same run."""
    seed: int
    settings: Settings = ()
    budget: Budget = ""
    """Empty, too, where both budgets are the same number of steps."""

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        words = [f"batch{self.batch_size}", self.rule]
        words += [slug(self.settings)] * bool(self.settings)
        return "-".join([*words, *([self.budget] if self.budget else []), f"seed{self.seed}"])


def slug(settings: Settings) -> str:
    """Settings as a part of a file's name."""
    return "-".join(re.sub(r"[^\w.+-]+", "_", f"{_last(name)}_{in_words(value)}") for name, value in settings)


def in_words(value: Any) -> str:
    """A value of a factor; of a path its last part, which is the same on every machine."""
    return (Path(value).name or "none") if isinstance(value, str) else str(value)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class Study:
    """A grid of training runs that differ in global batch, learning-rate rule and seed."""

    base: Config = field(default_factory=Config)
    """Config of all runs. The study sets its output, seed, batch_size, epochs, max_steps, log_every, evaluation.every,
    .patience and checkpoint.every; its learning rate is that of the reference batch."""
    output: str = "runs/study"
    """Study folder. A study there with the same settings continues; you may add batch sizes, rules, seeds and values of
    factors."""
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)
    """Global batches."""
    rules: tuple[Rule, ...] = ("constant", "sqrt", "linear")
    """Learning rate by batch: lr · (B / reference_batch_size) to the power 0, 1/2 or 1."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Seeds; each batch size and rule is trained once with each."""
    reference_batch_size: int = 64
    """The batch that base.optimizer.learning_rate is meant for."""
    sentences: int = 0
    """Budget of each run in examples: it takes the fewest steps that see at least this number. 0: `steps` counts."""
    steps: int = 0
    """Budget of each run in steps. 0: `sentences` counts. With both, each run is trained once with either."""
    evaluations: int = 8
    """Evaluations on base.evaluation.dev during each run, besides the one before the first step."""
    reference_model: str = ""
    """Frozen model that says which negatives are false; base.model.path if empty."""
    reference_pooler: PoolerName | None = None
    """Pooler of the frozen model; by default the one saved with reference_model, or that of base.model."""
    false_negative_threshold: float = 0.7
    """Two training sentences with a cosine above this under the frozen model are false negatives of each other."""
    false_negative_sentences: int = 0
    """Count false negatives in the first batches of a run that hold this many sentences, at least one batch; 0: in all.
    The frozen model encodes each sentence that is counted."""
    noise_scale_batches: int = 4
    """Batches whose gradients estimate the gradient noise scale: two or more, or as many as the text has; 0 leaves it
    out."""
    noise_scale_sentences: int = 0
    """For small batches: take more batches, as many as fit in this number of sentences."""
    direction_batch: int = 0
    """Measure the cosine of the gradient of a batch with that of a batch of this many examples, or of all; 0 leaves it
    out."""
    hardest: float = 0.01
    """Share of the negatives, the hardest, whose share of the gradient is measured; 0 leaves it out."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of a cell once it is measured."""
    factors: Annotated[dict[str, tuple[Any, ...]], tyro.conf.Suppress] = field(default_factory=dict)
    """Other fields of the config that the grid varies, each with its values, the usual one first, e.g.
    {"objective.negatives.duplicates": (False, True)}. All combinations are trained."""

    def validate(self) -> None:
        """Raises `InputError` for a value that a study cannot use."""
        from simcse_jax.objectives import check_objective  # JAX, which the settings do without

        check_types(self)
        for name in ("batch_sizes", "rules", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} is {list(values)}; give at least one, each once")
        if not (self.sentences or self.steps) or min(self.sentences, self.steps) < 0:
            raise InputError(
                f"the budget is sentences {self.sentences} and steps {self.steps}: set one of them, or both, above 0"
            )
        self._check_factors()
        for name in ("reference_batch_size", "evaluations"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        if not -1 <= self.false_negative_threshold < 1:
            raise InputError(
                f"false_negative_threshold is {self.false_negative_threshold}; a cosine from -1 to below 1 was expected"
            )
        if self.false_negative_sentences < 0:
            raise InputError(
                f"false_negative_sentences is {self.false_negative_sentences}: give a number of sentences, or 0 for all"
            )
        if self.noise_scale_batches < 0 or self.noise_scale_batches == 1 or self.noise_scale_sentences < 0:
            raise InputError(
                f"noise_scale_batches is {self.noise_scale_batches} and noise_scale_sentences "
                f"{self.noise_scale_sentences}: batches must be 0 (off) or at least 2, sentences 0 or more"
            )
        if self.direction_batch < 0 or not 0 <= self.hardest < 1:
            raise InputError(
                f"direction_batch is {self.direction_batch} and hardest {self.hardest}: give a number of examples and "
                "a share below 1, or 0 to leave a measure out"
            )
        if not self.base.evaluation.dev or not self.base.evaluation.test:
            raise InputError(
                "a study compares scores: name a dev task in base.evaluation.dev and test tasks in base.evaluation.test"
            )
        if self.base.data.augment != "none" or not self.base.objective.contrastive_weight:
            raise InputError(
                "a study measures the contrast of sentences as they are: leave base.data.augment at 'none' and "
                "base.objective.contrastive_weight above 0"
            )
        check_objective(self.base.objective)
        for cell in self.cells():
            self.config(cell).validate()

    def _check_factors(self) -> None:
        for name, values in self.factors.items():
            if name in _SET_BY_STUDY or name.startswith("evaluation."):
                raise InputError(f"factors has {name}, which the study sets or compares by: leave it out")
            if len(values) < 2 or len(set(map(repr, values))) < len(values):
                raise InputError(f"factors has {name} with {list(values)}: give two values or more, each once")
            for value in values:
                check_types(with_settings(self.base, {name: value}))
        names = [cell.name for cell in self.cells()]
        if len(set(names)) < len(names):
            raise InputError("factors have values whose runs would have the same name: write them apart")

    @property
    def folder(self) -> Path:
        """The study folder."""
        return local_only(self.output)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What runs are given: examples, steps, or one after the other."""
        return ("sentences", "steps") if self.sentences and self.steps else ("",)

    @property
    def series(self) -> list[Series]:
        """The lines of the figures, by rule, then by factor, then by budget."""
        values = [[(name, value) for value in self.factors[name]] for name in self.factors]
        return [Series(*point) for point in itertools.product(self.rules, itertools.product(*values), self.budgets)]

    def label(self, series: Series) -> str:
        """A series in words: what of it the study varies."""
        several = len(self.rules) > 1 or len(self.series) == 1
        words = [f"{series.rule} learning rate"] * several
        words += [f"{_last(name)} {in_words(value)}" for name, value in series.settings]
        words += [f"equal {'examples' if series.budget == 'sentences' else 'steps'}"] * bool(series.budget)
        return ", ".join(words)

    def cell(self, batch_size: int, series: Series, seed: int) -> Cell:
        """The cell of a point of the grid."""
        rule = "reference" if batch_size == self.reference_batch_size else series.rule
        same = -(-self.sentences // batch_size) == self.steps
        return Cell(batch_size, rule, seed, series.settings, "" if same else series.budget)

    def cells(self) -> list[Cell]:
        """The distinct runs, seed by seed."""
        grid = [self.cell(b, x, s) for s in self.seeds for b in self.batch_sizes for x in self.series]
        return list(dict.fromkeys(grid))

    def base_of(self, cell: Cell) -> Config:
        """The config of all runs that share a cell's values of the factors."""
        config: Config = with_settings(self.base, dict(cell.settings))
        return config

    def cell_folder(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.folder / "cells" / cell.name

    def key(self, cell: Cell) -> Settings:
        """The settings of a cell that say what model and text it has."""
        return tuple((name, x) for name, x in cell.settings if name.startswith(_OF_MODEL_AND_TEXT))

    def text_key(self, cell: Cell) -> Settings:
        """The settings of a cell that say what text it has, and how much of a sentence the model reads."""
        return tuple((name, x) for name, x in cell.settings if name.startswith(("model.", "data.")))

    def learning_rate(self, cell: Cell) -> float:
        """lr(B) = lr_ref · (B / B_ref)^exponent of the rule."""
        ratio = cell.batch_size / self.reference_batch_size
        scale: float = ratio ** EXPONENTS[cell.rule]
        return self.base_of(cell).optimizer.learning_rate * scale

    def steps_of(self, cell: Cell) -> int:
        """Steps of a cell: the budget in steps, or the steps that see the budget in sentences."""
        by_steps = cell.budget == "steps" if self.sentences else True
        return self.steps if by_steps else -(-self.sentences // cell.batch_size)

    def config(self, cell: Cell) -> Config:
        """The training run of a cell."""
        base, steps = self.base_of(cell), self.steps_of(cell)
        # Never more evaluations than asked for: the best of more candidates would score higher for that alone.
        every = -(-steps // self.evaluations)
        return replace(
            base,
            output=str(self.cell_folder(cell)),
            seed=cell.seed,
            batch_size=cell.batch_size,
            epochs=1,
            max_steps=steps,
            log_every=max(1, steps // _LOGGED),
            optimizer=replace(base.optimizer, learning_rate=self.learning_rate(cell)),
            # The study scores the test tasks itself, once per cell.
            evaluation=replace(base.evaluation, every=every, patience=0, test=()),
            checkpoint=replace(base.checkpoint, every=every),
        )


# Fields of the base config that `Study.config` sets.
_SET_BY_STUDY = (
    *("output", "seed", "batch_size", "epochs", "max_steps", "log_every"),
    *("evaluation.every", "evaluation.patience", "checkpoint.every"),
)
# Fields of a study that may change without a change to its cells.
# Factors that change model, text, or what judges negatives: cells that differ in one are measured apart.
_OF_MODEL_AND_TEXT = ("model.", "data.", "mesh.", "objective.negatives.guide")
_EXTENDABLE = ("base.", "factors", "output", "batch_sizes", "rules", "seeds", "keep_checkpoints")


def changes(before: Study, now: Study) -> list[str]:
    """Names of the fields whose difference makes the cells of `now` other than those of `before`."""
    from simcse_jax.runs import folder as run

    own = [name for name in differences(before, now) if not name.startswith(_EXTENDABLE)]
    return own + [f"base.{n}" for n in run.changes(before.base, now.base) if n not in _SET_BY_STUDY]
