"""One typed, frozen description of a run. Configs are built in Python files, overridden on the command line, and saved
as JSON beside the checkpoints."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from simcse_jax.config.objective import NegativesConfig, ObjectiveConfig
from simcse_jax.config.values import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, check_types, out_of_bounds
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName
from simcse_jax.storage.files import CACHE

MIN_LENGTH = 3
"""Smallest `max_length`: two special tokens around one token of the sentence."""

ENCODE_ROW = 64
"""Default tokens per row when encoding."""

LongText = Literal["cut", "windows", "error"]
"""Treatment of a text of more than `max_length` tokens. `cut` encodes its beginning. `windows` encodes all of it, in
windows of `max_length` tokens, and averages their vectors, weighted by their tokens (specials not counted). `error`
refuses it."""

RetrievalMetric = Literal["ndcg@10", "mrr@10", "recall@1", "recall@5", "recall@10"]
"""The figures of retrieval, see `simcse_jax.evaluation.retrieval`."""

Backend = Literal["jax", "faiss-flat", "faiss-ivf"]
"""`jax`: exact, on JAX's first device. `faiss-flat`: exact, on the CPU. `faiss-ivf`: approximate and faster."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder and its pooler."""

    path: str = "bert-base-uncased"
    """BERT or RoBERTa to start from: a Hugging Face folder, a name on the hub, an export or a run (its best checkpoint,
    or the latest where it has no dev scores)."""
    pooler: PoolerName | None = None
    """Method that turns token vectors into one sentence vector. If not given, that of the model in `path` where it has
    one (with its `mlp_only_train`), else `cls`."""
    mlp_only_train: bool = False
    """With pooler `cls`: use the tanh head while training and drop it afterwards (the unsupervised setting)."""
    head: Literal["fresh", "checkpoint"] = "fresh"
    """The `cls` head starts from N(0, initializer_range) (`fresh`, as published) or from the checkpoint's pooler."""
    random_init: bool = False
    """Draw the encoder's weights from `seed` instead of loading them; only the config and tokenizer are read."""
    encoders: Literal[1, 2] = 1
    """Number of encoders to train. With 2, both start from the same weights, the second encodes positives and hard
    negatives, and after training the first encodes sentences (an ablation of SimCSE)."""
    dropout: Annotated[float | None, BELOW_ONE] = None
    """Dropout probability in all four places; the checkpoint's own if not given."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type. Weights stay float32 (float64 needs JAX_ENABLE_X64=1 and is for verification)."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    scan: bool | None = None
    """Compile one layer and run it for all (`jax.lax.scan`). If false, each layer is compiled by itself: compiling
    takes longer, and a step moves less memory. If not given, TPUs scan the layers, CPUs and GPUs only with `remat`."""


@dataclass(frozen=True)
class DataConfig:
    """Training text."""

    train: str = ""
    """A .txt, .csv, .tsv, .jsonl or .parquet file (each also .gz), a folder of such files, a pattern (`wiki/*.txt.gz`),
    the name of a data set on the hub, the folder of a copy of one, or tfds:NAME/CONFIG (docs/data.md)."""
    columns: tuple[str, ...] = ()
    """Columns that hold the sentence, its positive and its hard negatives (up to 8), in this order. Hard negatives may
    be missing: a blank cell. If not given, all columns, which must then look like text: numbers, ids, labels and scores
    are refused."""
    delimiter: str = ""
    """Character between the columns of a .csv or .tsv file, such as ; or \\t (a tab); if empty, a comma in .csv and
    a tab in .tsv files. With it, .txt files are tables, too."""
    header: bool = True
    """The first row of a .csv or .tsv file names its columns. If false, it is an example like the others, and the
    columns are called 1, 2, 3 and so on."""
    where: dict[str, str] = field(default_factory=dict)
    """Use only the rows whose columns have these values, e.g. {"label": "entailment"} (`--data.where label
    entailment`). Write numbers and truth values as JSON does, classes by name or number."""
    split: str = "train"
    """Split of a data set on the hub or in TFDS."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; its newest commit if not given."""
    max_length: int = 32
    """Most tokens per sentence, specials included; longer sentences are cut."""
    packed_length: Annotated[int, NOT_NEGATIVE] = 0
    """Pack several sentences into each row of this many tokens, e.g. 128, so that less padding is computed. The results
    are the same, in less time where most sentences are much shorter than `max_length`. 0: one sentence per row."""
    neighbours: Annotated[int, NOT_NEGATIVE] = 0
    """For text with one sentence per line: the positive of a sentence is one of this many sentences after it, drawn
    once. A blank line ends a document. 0: the positive is the sentence itself."""
    augment: Literal["none", "crop", "delete_words", "delete_word", "synonyms", "repetition"] = "none"
    """Change that makes the positive of a single sentence, drawn again in each step: `crop` keeps a span of its words
    and drops `augment_share` of them, `delete_words` drops that share at random, `delete_word` drops one, `synonyms`
    replaces one word by a synonym, `repetition` doubles some tokens: as many as are drawn from 0 to `augment_share` of
    them, or to 2 if that is more (ESimCSE, arXiv 2109.04380, which takes 0.32)."""
    augment_share: Annotated[float, BELOW_ONE] = 0.1
    """Share of words that `crop` and `delete_words` drop, or of tokens that `repetition` doubles at most."""
    synonyms: str = ""
    """File for `synonyms`: each line holds a word and its synonyms, separated by tabs."""
    distinct: bool = False
    """Make batches in which no text occurs twice: an example that shares one with its batch goes into the next batch
    that has none of its texts, and is left out of the epoch where there is none."""
    cache: str = CACHE
    """Folder for tokenised text, which the processes of a job may share, or a place on gs://, of which each host keeps
    a copy in ~/.cache/simcse_jax."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear decay to zero, or others."""

    learning_rate: Annotated[float, NOT_NEGATIVE] = 3e-5
    """Peak learning rate."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps of linear warm-up from zero."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled weight decay, on matrices only (not on biases and LayerNorm)."""
    b1: Annotated[float, BELOW_ONE] = 0.9
    """Decay of the first moment."""
    b2: Annotated[float, BELOW_ONE] = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, POSITIVE] = 1e-8
    """Added to the root of the second moment."""
    clip_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest global gradient norm; 0 does not clip."""
    name: Literal["adamw", "lamb"] = "adamw"
    """`lamb` (arXiv 1904.00962) scales the update of each array of weights to its norm, for large batches."""
    schedule: Literal["linear", "cosine", "constant", "warmup_stable_decay"] = "linear"
    """The learning rate after warm-up: it falls to 0 in a line or along a cosine, stays at its peak, or stays there and
    falls to 0 in a line over the last `decay_share` of the steps."""
    decay_share: Annotated[float, SHARE] = 0.1
    """Share of the steps after warm-up in which `warmup_stable_decay` decays."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices. The batch is split over all axes; parameters and optimizer state over `fsdp`."""

    data: int = -1
    """Devices along the data axis; -1 takes all remaining devices."""
    fsdp: Annotated[int, POSITIVE] = 1
    """Devices that share one copy of the parameters and the optimizer state."""
    dcn: Annotated[int, POSITIVE] = 1
    """TPU slices, or nodes of GPUs, between which the network is slow: all there are, or 1 to treat them as one."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores during and after training: of STS, or of retrieval."""

    data: str = ""
    """Folder in SentEval's layout (holds STS/ and SICK/). If empty, only tasks that are files can be scored."""
    dev: str = ""
    """Task whose dev split selects the best checkpoint (`STSBenchmark`), or graded pairs: a file with the columns
    sentence1, sentence2, score, or tfds:glue/stsb, or a hub data set (docs/data.md); or questions and their answers: a
    file of two columns. If empty, nothing is evaluated."""
    metric: Literal["spearman"] | RetrievalMetric | None = None
    """The score that selects; by default `spearman` of graded pairs, `ndcg@10` of questions and answers."""
    columns: tuple[str, ...] = ()
    """Columns of the question and of its answer, for files that have others as well."""
    every: Annotated[int, POSITIVE] = 125
    """Steps between evaluations on `dev`."""
    geometry_every: Annotated[int, NOT_NEGATIVE] = 0
    """Also write the dev score, alignment and uniformity to metrics.jsonl every this many steps, for the path that
    `simcse-jax analyze` draws. They do not select the checkpoint. 0: only at the evaluations."""
    patience: Annotated[int, NOT_NEGATIVE] = 0
    """Stop after this many evaluations without a better score; 0 never stops early."""
    test: tuple[str, ...] = ()
    """Tasks whose test split is scored before the first step and, with the best checkpoint, at the end; `sts` stands
    for all seven."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    every: Annotated[int, POSITIVE] = 500
    """Steps between checkpoints; an evaluation that improves on the best score writes one too."""
    keep: Annotated[int, POSITIVE] = 1
    """Number of latest checkpoints to keep, besides the best one."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    output: str = "runs/default"
    """Run folder. If it holds a run with the same settings, that run is resumed."""
    seed: Annotated[int, NOT_NEGATIVE] = 42
    """Seed of the data order, the dropout noise and fresh weights."""
    batch_size: Annotated[int, POSITIVE] = 64
    """Sentences (or pairs, or triplets) per step over all devices: the global batch."""
    micro_batch: Annotated[int | Literal["auto"], NOT_NEGATIVE] = 0
    """Examples that each device encodes at a time; 0 encodes all at once, `auto` as many as fit its memory. The
    gradient is that of the whole batch (GradCache), at the price of a second forward pass."""
    epochs: Annotated[int, POSITIVE] = 1
    """Passes over the data; the last, smaller batch of each pass is used too."""
    max_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Train for this many steps, learning rate decay included, and ignore `epochs`; 0 follows `epochs`."""
    log_every: Annotated[int, POSITIVE] = 10
    """Steps between lines in metrics.jsonl."""
    tracking: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also write the metrics to TensorBoard files, in `tensorboard/` of the run folder, or to Weights & Biases
    (`pip install "simcse-jax[tracking]"`)."""
    profile: str = ""
    """Steps to trace, the first and the last, e.g. 10:13: `profile/` of the run folder then holds what each device did
    in them, for xprof and TensorBoard. Steps that an earlier part of the run has done are not traced."""
    multi_host: bool = False
    """Join the other processes of a TPU pod, SLURM or MPI job (implied by JAX_COORDINATOR_ADDRESS)."""
    heartbeat: Annotated[int, POSITIVE] = 60
    """Seconds without a sign of life after which a process of such a job is lost, and all others end."""
    join_timeout: Annotated[int, POSITIVE] = 300
    """Seconds for all processes of such a job to join, after which those that have come end."""
    compilation_cache: str = ""
    """Folder of compiled programs, on a file system that all processes of such a job share or on gs://, for a job that
    starts again. A process alone keeps its programs anyway, in ~/.cache/simcse_jax."""
    gpu_memory: Annotated[float | None, SHARE] = None
    """Share of each GPU's memory that the run may take; None leaves it to JAX, which takes 0.75."""
    gpu_preallocate: bool | None = None
    """Whether that share is taken at the start; None leaves it to JAX, which takes it."""
    xla_preset: bool = False
    """Compile the train step with options of XLA that hide communication behind computation and search for faster
    matrix products, on GPUs and TPUs: docs/gpus.md lists them. Not measured here so far."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step to trace; None where none is."""
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        return (int(found[1]), int(found[2])) if found else None

    def validate(self) -> None:
        """Raises `InputError` for values that no run can use, all of them."""
        check_types(self)
        if problems := [*out_of_bounds(self), *self._conflicts()]:
            raise InputError(*problems)

    def _conflicts(self) -> Iterator[str]:
        """A message for each value that does not go with the others."""
        if self.seed >= 2**32:
            yield f"seed is {self.seed}; it must be below 2**32 = {2**32}"
        if self.data.max_length < MIN_LENGTH:
            yield (
                f"data.max_length is {self.data.max_length}; it must be at least {MIN_LENGTH}: "
                "two special tokens and one of the sentence"
            )
        if 0 < self.data.packed_length < self.data.max_length:
            yield (
                f"data.packed_length is {self.data.packed_length} and data.max_length {self.data.max_length}: a row "
                "must hold the longest sentence, so set packed_length to at least that, or to 0 not to pack"
            )
        if self.model.mlp_only_train and self.model.pooler not in (None, "cls"):
            yield (
                f"model.mlp_only_train drops the head of pooler 'cls' after training, but model.pooler is "
                f"'{self.model.pooler}', which has no head: set mlp_only_train to False or the pooler to 'cls'"
            )
        if self.objective.product_dtype == "bfloat16" and self.objective.implementation != "tiled":
            yield (
                f"objective.product_dtype is 'bfloat16' but objective.implementation is "
                f"'{self.objective.implementation}': only 'tiled' can use it, so set that"
            )
        steps = self.profiled
        if self.profile and (steps is None or not 0 < steps[0] <= steps[1]):
            yield (
                f"profile is '{self.profile}': give the first and the last step to trace, counted from 1, with a colon "
                "between them, e.g. 10:13"
            )
        smoothing = self.objective.smoothing
        if smoothing.weight:
            name, size = ("neighbours", smoothing.neighbours + 1)
            if smoothing.grouping == "kmeans":
                name, size = ("clusters", smoothing.clusters)
            if size > smoothing.buffer_size:
                yield (
                    f"objective.smoothing.{name} is {getattr(smoothing, name)} but objective.smoothing.buffer_size is "
                    f"{smoothing.buffer_size}: use fewer, or a larger buffer"
                )
            if smoothing.buffer_size < self.batch_size:
                yield (
                    f"objective.smoothing.buffer_size is {smoothing.buffer_size} but batch_size is {self.batch_size}: "
                    "the buffer must hold the whole batch, so use a larger one"
                )
        if not self.objective.contrastive_weight:
            yield from self._conflicts_without_contrast()
        if self.objective.product_dtype == "bfloat16" and self.model.dtype == "float64":
            yield "objective.product_dtype is 'bfloat16' but model.dtype is 'float64': leave one out"
        if self.data.augment != "none" and self.data.neighbours:
            yield (
                f"data.augment is '{self.data.augment}' and data.neighbours {self.data.neighbours}: both say what the "
                "positive of a sentence is, so leave one out"
            )
        if self.data.augment == "synonyms" and not self.data.synonyms:
            yield "data.augment is 'synonyms' but data.synonyms is empty: give a table of synonyms"
        if self.evaluation.geometry_every and not self.evaluation.dev:
            yield (
                f"evaluation.geometry_every is {self.evaluation.geometry_every} but evaluation.dev is empty: "
                "name the pairs to measure, e.g. --evaluation.dev STSBenchmark"
            )
        if not self.data.train:
            yield "data.train is empty: give a file of sentences, e.g. --data.train wiki.txt"

    def _conflicts_without_contrast(self) -> Iterator[str]:
        if not self.objective.mlm.weight:
            yield (
                "objective.contrastive_weight and objective.mlm.weight are both 0: nothing is left to minimise, so "
                "set one above 0"
            )
        if self.objective.smoothing.weight:
            yield (
                f"objective.smoothing.weight is {self.objective.smoothing.weight} but objective.contrastive_weight is "
                "0: smoothing is a part of the contrast, so leave one out"
            )
        of_contrast = {
            "queue.size": self.objective.queue.size,
            "negatives": self.objective.negatives != NegativesConfig(),
            "learned": self.objective.learned,
        }
        for name in (name for name, given in of_contrast.items() if given):
            yield (
                f"objective.{name} is set but objective.contrastive_weight is 0: it is a part of the contrast, so "
                "leave one out"
            )
        if self.data.augment != "none" or self.data.neighbours:
            yield (
                "data.augment and data.neighbours say what the positive is, but objective.contrastive_weight is 0: "
                "leave them out"
            )
        if self.model.encoders == 2:
            yield (
                "model.encoders is 2 but objective.contrastive_weight is 0: only the contrast uses two "
                "encoders, so set model.encoders to 1"
            )
