"""The settings of the loss, a part of `Config`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from simcse_jax.config.values import BELOW_ONE, FINITE, NOT_NEGATIVE, POSITIVE, SHARE


@dataclass(frozen=True)
class SmoothingConfig:
    """Instance smoothing (IS-CSE, section 3): a second contrast, with averaged positives."""

    weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """α; 0 leaves smoothing out."""
    schedule: Literal["constant", "cosine"] = "constant"
    """α over the run: `cosine` rises from `start_weight` to `weight` at half of the steps and stays there."""
    start_weight: Annotated[float, NOT_NEGATIVE] = 0.005
    """α at the first step, with `cosine`."""
    buffer_size: Annotated[int, POSITIVE] = 1024
    """Q: number of positives to keep. The buffer is split over the devices of mesh axis `fsdp`, like the weights."""
    grouping: Literal["nearest", "kmeans"] = "nearest"
    """Neighbours of a positive: the `neighbours` nearest in the buffer, or those of its k-means cluster."""
    neighbours: Annotated[int, POSITIVE] = 16
    """k: number of neighbours, for `nearest`."""
    clusters: Annotated[int, POSITIVE] = 64
    """Number of clusters of the buffer, for `kmeans`."""
    aggregation: Literal["attention", "mean"] = "attention"
    """Method that turns a group into one vector."""
    temperature: Annotated[float, POSITIVE] = 2.0
    """β of the attention."""


@dataclass(frozen=True)
class MLMConfig:
    """Masked language modelling of every sentence (SimCSE, section 5 and appendix)."""

    weight: Annotated[float, NOT_NEGATIVE, FINITE] = 0.0
    """Weight of the cross-entropy of the hidden tokens; 0 leaves it out. The paper uses 0.1 for transfer tasks."""
    probability: Annotated[float, SHARE] = 0.15
    """Share of the tokens to choose; 80 % of these become [MASK], 10 % a random token, 10 % stay."""


@dataclass(frozen=True)
class NegativesConfig:
    """The negatives of the contrast: which sentences count, and how much (docs/objectives.md has the equations).

    A masked negative counts in no sum and gets no gradient. Each mask applies to in-batch and to hard negatives.
    """

    duplicates: bool = False
    """Mask sentences of examples that share a text with the anchor's own example, and hard negatives that are one of
    its texts: the same tokens."""
    margin: Annotated[float | None, FINITE] = None
    """Mask negatives whose cosine with the anchor exceeds that of its positive by more than this; negative values mask
    those that come near it, too. If not given, none."""
    margin_kind: Literal["absolute", "relative"] = "absolute"
    """`margin` itself, or `margin` times the size of the positive's cosine."""
    guide: str = ""
    """A frozen model that judges (GIST, arXiv 2402.16829): mask negatives that it finds more similar to the anchor than
    its positive. A run, an export, or a sentence-transformers folder or name, which say how they pool; with the same
    vocabulary."""
    guide_margin: Annotated[float, FINITE] = 0.0
    """As `margin`, of the guide's cosines."""
    guide_margin_kind: Literal["absolute", "relative"] = "absolute"
    """As `margin_kind`."""
    directions: tuple[
        Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"], ...
    ] = ("query_to_document",)
    """Which pairs are contrasted. A query is the first sentence of an example, its document the positive;
    `query_to_document` (with hard negatives) must be among them."""
    softmax: Literal["joint", "anchor", "direction"] = "joint"
    """Negatives of all directions in one softmax per example (GTE, arXiv 2308.03281), in one for the query and one for
    the document (SimCLR, arXiv 2002.05709), or in one per direction; the loss is the mean of the two or more."""
    hardness: Annotated[float, NOT_NEGATIVE, FINITE] = 0.0
    """β: weigh each negative by exp(β cosine), divided by the mean of these weights (arXiv 2010.04592)."""
    debias: Annotated[float, BELOW_ONE] = 0.0
    """τ⁺: share of negatives that are really positives, to subtract from their sum (arXiv 2007.00224)."""


@dataclass(frozen=True)
class QueueConfig:
    """Sentences of earlier batches as further negatives, encoded without dropout by a copy of the encoder that moves
    slowly (MoCo, arXiv 1911.05722; for sentences ESimCSE, arXiv 2109.04380, section 3.2)."""

    size: Annotated[int, NOT_NEGATIVE] = 0
    """Number of sentences to keep, the latest; 0 leaves the queue out. ESimCSE keeps 2.5 batches."""
    momentum: Annotated[float, BELOW_ONE] = 0.995
    """λ: after each step, the copy becomes λ copy + (1 − λ) encoder."""
    positives: Literal["encoder", "copy"] = "encoder"
    """What encodes the positives, which are the negatives of the others in their batch: the trained encoder (ESimCSE),
    or the copy, without dropout and gradient (MoCo)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss over the global batch (SimCSE, section 2)."""

    loss: str = "info_nce"
    """The contrast: info_nce, symmetric, decoupled, sigmoid, focal, off_dropout or own_negative, or your own function
    as module:function (docs/objectives.md)."""
    options: dict[str, float] = field(default_factory=dict)
    """Settings that only this loss has, e.g. margin of `focal`."""
    widths: tuple[int, ...] = ()
    """Matryoshka (arXiv 2205.13147): for each width w, the loss of the first w dimensions of the vectors; training
    minimises the mean of these losses. If empty, the loss of all dimensions."""
    noise: Literal["independent", "shared"] = "independent"
    """Dropout noise of a sentence and its positive: drawn for each, or shared (an ablation, which collapses)."""
    smoothing: SmoothingConfig = field(default_factory=SmoothingConfig)
    contrastive_weight: Annotated[float, NOT_NEGATIVE, FINITE] = 1.0
    """Weight of the contrast and its smoothing. 0 trains `mlm` alone: plain pretraining."""
    mlm: MLMConfig = field(default_factory=MLMConfig)
    temperature: Annotated[float, POSITIVE, FINITE] = 0.05
    """τ: similarities are divided by it."""
    learned: tuple[Literal["temperature", "bias"], ...] = ()
    """Settings of the loss that are trained with the weights, from the values given here on: `temperature`, as log 1/τ
    and within `temperature_range`; `bias`, of `sigmoid`. They are logged and never decayed."""
    temperature_range: tuple[float, ...] = (0.01, 1.0)
    """Least and greatest τ where it is learned."""
    hard_negative_log_weight: Annotated[float, FINITE] = 0.0
    """log α, added to the logit of a sentence's own hard negatives (SimCSE, section 4 and appendix)."""
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    implementation: Literal["auto", "dense", "tiled"] = "auto"
    """`dense` holds the matrix of logits, `tiled` never does (over several devices, it uses a ring). Both give the same
    results to rounding. `auto` takes `tiled` where the logits of one device would take more than 64 MiB."""
    block_size: Annotated[int, NOT_NEGATIVE] = 0
    """Largest side of a tile, with `tiled`; 0 chooses by the kind of device."""
    product_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the factors of products in tiles; sums are float32. `bfloat16` is faster on accelerators, but a cosine is
    then exact only to about 1e-3."""
