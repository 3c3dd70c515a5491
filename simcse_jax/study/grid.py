"""The grid of a study: its settings, its cells, and the training run of each cell."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from simcse_jax.config import Config
from simcse_jax.config.values import check_types, differences
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName
from simcse_jax.storage.files import local_only

Rule = Literal["constant", "sqrt", "linear"]
EXPONENTS: dict[str, float] = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0, "reference": 0.0}
"""lr(B) = lr_ref · (B / B_ref)^exponent."""

_LOGGED = 64  # lines of training metrics per cell; the last quarter is averaged


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    batch_size: int
    rule: Literal["constant", "sqrt", "linear", "reference"]
    """`reference` at the reference batch, where all rules give the same run."""
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return f"batch{self.batch_size}-{self.rule}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A grid of training runs that differ in global batch, learning-rate rule and seed."""

    base: Config = field(default_factory=Config)
    """Config of all runs. The study sets its output, seed, batch_size, epochs, max_steps, log_every, evaluation.every,
    .patience and checkpoint.every; its learning rate is that of the reference batch."""
    output: str = "runs/study"
    """Study folder. A study there with the same settings continues; you may add batch sizes, rules and seeds."""
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
    """Budget of each run in steps. 0: `sentences` counts."""
    evaluations: int = 8
    """Evaluations on base.evaluation.dev during each run, besides the one before the first step."""
    reference_model: str = ""
    """Frozen model that says which negatives are false; base.model.path if empty."""
    reference_pooler: PoolerName | None = None
    """Pooler of the frozen model; by default the one saved with reference_model, or that of base.model."""
    false_negative_threshold: float = 0.7
    """Two training sentences with a cosine above this under the frozen model are false negatives of each other."""
    noise_scale_batches: int = 4
    """Batches whose gradients estimate the gradient noise scale: two or more, or as many as the text has; 0 leaves it
    out."""
    noise_scale_sentences: int = 0
    """For small batches: take more batches, as many as fit in this number of sentences."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of a cell once it is measured."""

    def validate(self) -> None:
        """Raises `InputError` for a value that a study cannot use."""
        from simcse_jax.objectives import check_objective  # JAX, which the settings do without

        check_types(self)
        for name in ("batch_sizes", "rules", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} is {list(values)}; give at least one, each once")
        if bool(self.sentences) == bool(self.steps) or min(self.sentences, self.steps) < 0:
            raise InputError(
                f"the budget is sentences {self.sentences} and steps {self.steps}: set one of them, the other 0"
            )
        for name in ("reference_batch_size", "evaluations"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        if not -1 <= self.false_negative_threshold < 1:
            raise InputError(
                f"false_negative_threshold is {self.false_negative_threshold}; a cosine from -1 to below 1 was expected"
            )
        if self.noise_scale_batches < 0 or self.noise_scale_batches == 1 or self.noise_scale_sentences < 0:
            raise InputError(
                f"noise_scale_batches is {self.noise_scale_batches} and noise_scale_sentences "
                f"{self.noise_scale_sentences}: batches must be 0 (off) or at least 2, sentences 0 or more"
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

    @property
    def folder(self) -> Path:
        """The study folder."""
        return local_only(self.output)

    def cell(self, batch_size: int, rule: Rule, seed: int) -> Cell:
        """The cell of a point of the grid."""
        return Cell(batch_size, "reference" if batch_size == self.reference_batch_size else rule, seed)

    def cells(self) -> list[Cell]:
        """The distinct runs, seed by seed."""
        grid = [self.cell(b, r, s) for s in self.seeds for b in self.batch_sizes for r in self.rules]
        return list(dict.fromkeys(grid))

    def cell_folder(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.folder / "cells" / cell.name

    def learning_rate(self, cell: Cell) -> float:
        """lr(B) = lr_ref · (B / B_ref)^exponent of the rule."""
        ratio = cell.batch_size / self.reference_batch_size
        scale: float = ratio ** EXPONENTS[cell.rule]
        return self.base.optimizer.learning_rate * scale

    def steps_of(self, cell: Cell) -> int:
        """Steps of a cell: the budget in steps, or the steps that see the budget in sentences."""
        return self.steps or -(-self.sentences // cell.batch_size)

    def config(self, cell: Cell) -> Config:
        """The training run of a cell."""
        base, steps = self.base, self.steps_of(cell)
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
_EXTENDABLE = ("base.", "output", "batch_sizes", "rules", "seeds", "keep_checkpoints")


def changes(before: Study, now: Study) -> list[str]:
    """Names of the fields whose difference makes the cells of `now` other than those of `before`."""
    from simcse_jax.runs import folder as run

    own = [name for name in differences(before, now) if not name.startswith(_EXTENDABLE)]
    return own + [f"base.{n}" for n in run.changes(before.base, now.base) if n not in _SET_BY_STUDY]
