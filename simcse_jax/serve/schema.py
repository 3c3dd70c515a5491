"""The API's requests and answers, as in its OpenAPI schema."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The thread that serves all connections reads requests, so reading stops at the first of many errors.
Sentences = Annotated[list[str], Field(fail_fast=True)]
OneOrMore = str | Sentences
_MAX_FIELDS = 10


class Request(BaseModel):
    """The rule of all requests: a misspelt field is an error, not a default."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        # Each unknown field would be an error of its own.
        if isinstance(given, dict) and len(given) > _MAX_FIELDS:
            raise ValueError(f"{len(given):,} fields are more than any request has")
        return given


class SearchRequest(Request):
    """Sentences to search for."""

    query: Annotated[OneOrMore, Field(description="A sentence, or several", examples=["a man plays music"])]
    top_k: Annotated[int, Field(ge=1, description="Most hits per query")] = 10
    threshold: Annotated[float | None, Field(ge=-1, le=1, description="Least cosine of a hit; any if null")] = None


class EncodeRequest(Request):
    """Sentences to turn into vectors."""

    sentences: Annotated[Sentences, Field(examples=[["A man is playing a flute."]])]
    normalize: Annotated[bool, Field(description="Scale each vector to length 1")] = True


class SimilarityRequest(Request):
    """Two sentences, or two lists of them."""

    a: Annotated[OneOrMore, Field(examples=["A man is playing a flute."])]
    b: Annotated[OneOrMore, Field(examples=[["Someone plays an instrument.", "The market fell."]])]


class PlotRequest(Request):
    """Sentences to lay out in two dimensions."""

    sentences: Annotated[Sentences, Field(examples=[["A cat.", "A dog.", "The market fell."]])]


Cut = Annotated[bool, Field(description="Whether it is longer than the model takes, so that its end does not count")]


class SearchHit(BaseModel):
    """A sentence of the index."""

    index: Annotated[int, Field(description="Its place in the index, from 0")]
    score: Annotated[float, Field(description="Its cosine with the query")]
    sentence: str
    cut: Cut


class QueryHits(BaseModel):
    """The nearest sentences of a query, the nearest first."""

    query: str
    cut: Cut
    hits: list[SearchHit]


class SearchAnswer(BaseModel):
    """Hits, by query."""

    results: list[QueryHits]


class EncodeAnswer(BaseModel):
    """Vectors, in the order of the sentences."""

    width: int
    vectors: list[list[float]]
    cut: Annotated[list[Cut], Field(description="By sentence")]


class SimilarityAnswer(BaseModel):
    """Cosines."""

    scores: Annotated[list[list[float]], Field(description="A row for each sentence of a, a column for each of b")]
    cut_a: Annotated[list[Cut], Field(description="By sentence of a")]
    cut_b: Annotated[list[Cut], Field(description="By sentence of b")]


class PlotPoint(BaseModel):
    """A sentence's place."""

    x: float
    y: float
    sentence: str
    cut: Cut


class PlotAnswer(BaseModel):
    """The first two principal components of the sentences' vectors."""

    points: list[PlotPoint]
    explained: Annotated[list[float], Field(description="Share of the variance along each axis")]


class Bounds(BaseModel):
    """The limits of a request."""

    max_body: int
    max_sentences: int
    max_characters: int
    max_hits: int
    max_request_hits: int
    max_plot: int
    max_seconds: float


class Ready(BaseModel):
    """The service takes requests."""

    ready: Literal[True] = True


class Health(BaseModel):
    """Whether the service answers requests, and with which model."""

    ready: Annotated[
        bool,
        Field(description="False during compilation and while a call hangs: requests that need the model get 503"),
    ]
    model: str
    width: Annotated[int, Field(description="Of a sentence vector")]
    max_length: Annotated[int, Field(description="Most tokens per sentence; longer ones are cut")]
    index_size: Annotated[int, Field(description="Sentences in the index; 0 without an index")]
    version: str
    limits: Bounds


class Problem(BaseModel):
    """The reason why a request was not answered."""

    error: str
