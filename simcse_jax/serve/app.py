"""The application: its API, its page, and its errors as JSON."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from simcse_jax.inference.vectors import cosines
from simcse_jax.serve import schema
from simcse_jax.serve.batching import Batcher, NotReady, Overloaded, TooSlow
from simcse_jax.serve.engine import Answer, Engine, Job
from simcse_jax.serve.guard import HEADERS, Guard
from simcse_jax.serve.limits import Limits
from simcse_jax.serve.plane import principal_plane

_MAX_ERRORS = 5  # most errors reported of a request
_MAX_NAME = 50  # most characters of a field's name in a report

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    408: {"model": schema.Problem, "description": "The body did not arrive in time"},
    413: {"model": schema.Problem, "description": "The body is too large"},
    422: {"model": schema.Problem, "description": "The request is malformed or beyond a limit"},
    503: {"model": schema.Problem, "description": "The service is not ready yet, or too many requests wait"},
    504: {"model": schema.Problem, "description": "No answer in time"},
}


def create_app(
    engine: Engine,
    name: str,
    limits: Limits,
    hosts: Sequence[str] = ("*",),
    on_ready: Callable[[Exception | None], None] = lambda error: None,
) -> FastAPI:
    """The application of a model.

    Args:
      engine: the model and its index.
      name: name of the model.
      limits: bounds of requests.
      hosts: host names that requests may use. A service on loopback alone must list them: otherwise a page of another
        site could reach it under a name of its own that resolves to this machine.
      on_ready: called with None once the service takes requests, and with the error that kept it from that or ended
        it later.
    """
    batcher: Batcher[Job, Answer] = Batcher(
        engine, lambda job: len(job.sentences), limits.batch, limits.max_queue, limits.gather, limits.max_seconds
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start(engine.warm_up, on_ready)
        yield
        # Requests have had their time by now: nobody waits for a call that goes on.
        await batcher.stop(limits.max_stop / 10)

    app = FastAPI(
        title="simcse_jax",
        summary="Sentence vectors, similarities and search.",
        version=version("simcse-jax"),
        docs_url=None,  # FastAPI's page would load scripts from another site
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=lifespan,
    )
    app.state.batcher = batcher
    app.add_middleware(Guard, hosts=hosts, max_body=limits.max_body, max_seconds=limits.max_seconds)
    _say_what_is_wrong(app, limits)

    def checked(sentences: str | list[str], most: int = limits.max_sentences, what: str = "sentences") -> list[str]:
        given = [sentences] if isinstance(sentences, str) else sentences
        if not given:
            raise HTTPException(422, f"no {what}: give at least one")
        if len(given) > most:
            raise HTTPException(422, f"{len(given):,} {what}: a request may have {most:,}")
        for number, sentence in enumerate(given, 1):
            if not _is_text(sentence):
                raise HTTPException(422, f"sentence {number} is not text: it has half of a surrogate pair")
            if len(sentence) > limits.max_characters:
                most_said = f"at most {limits.max_characters:,} are taken"
                raise HTTPException(422, f"sentence {number} has {len(sentence):,} characters: {most_said}")
        return given

    @app.get("/api/health", tags=["service"])
    async def health() -> schema.Health:
        """The service runs: whether it takes requests, with which model and index, within which limits."""
        return schema.Health(
            ready=batcher.unready is None,
            model=name,
            width=engine.model.width,
            max_length=engine.model.max_length,
            index_size=0 if engine.index is None else len(engine.index),
            version=app.version,
            limits=schema.Bounds.model_validate(asdict(limits)),
        )

    @app.get("/api/ready", tags=["service"], responses={503: _PROBLEMS[503]})
    async def ready() -> schema.Ready:
        """Status 200 where the service takes requests, 503 where it does not: for what sends requests to it."""
        if why := batcher.unready:
            raise NotReady(why)
        return schema.Ready()

    @app.post("/api/search", responses=_PROBLEMS | {404: {"model": schema.Problem, "description": "No index"}})
    async def search(request: schema.SearchRequest) -> schema.SearchAnswer:
        """The sentences of the index that are nearest to each query, by cosine."""
        queries = checked(request.query, what="queries")
        if engine.index is None:
            raise HTTPException(404, "no sentences to search: start the service with a file of them, or a saved index")
        if request.top_k > limits.max_hits:
            raise HTTPException(422, f"top_k is {request.top_k:,}: at most {limits.max_hits:,} hits are given")
        if len(queries) * request.top_k > limits.max_request_hits:
            asked = f"{len(queries):,} queries of {request.top_k:,} hits"
            raise HTTPException(422, f"{asked}: a request may have {limits.max_request_hits:,} hits in all")
        answer = await batcher.submit(Job(queries, top_k=request.top_k, threshold=request.threshold))
        hits = [[schema.SearchHit(**asdict(hit), cut=hit.sentence in answer.cut) for hit in row] for row in answer.hits]
        results = [schema.QueryHits(query=q, cut=q in answer.cut, hits=h) for q, h in zip(queries, hits, strict=True)]
        return schema.SearchAnswer(results=results)

    @app.post("/api/encode", responses=_PROBLEMS)
    async def encode(request: schema.EncodeRequest) -> schema.EncodeAnswer:
        """The vectors of sentences."""
        sentences = checked(request.sentences)
        answer = await batcher.submit(Job(sentences, normalize=request.normalize))
        cut = [s in answer.cut for s in sentences]
        return schema.EncodeAnswer(width=engine.model.width, vectors=answer.vectors.tolist(), cut=cut)

    @app.post("/api/similarity", responses=_PROBLEMS)
    async def similarity(request: schema.SimilarityRequest) -> schema.SimilarityAnswer:
        """The cosine of every sentence of `a` with every sentence of `b`."""
        a, b = checked(request.a), checked(request.b)
        answer = await batcher.submit(Job(checked(a + b)))
        scores = cosines(answer.vectors[: len(a)], answer.vectors[len(a) :])
        cut_a, cut_b = ([s in answer.cut for s in side] for side in (a, b))
        return schema.SimilarityAnswer(scores=scores.tolist(), cut_a=cut_a, cut_b=cut_b)

    @app.post("/api/plot", responses=_PROBLEMS)
    async def plot(request: schema.PlotRequest) -> schema.PlotAnswer:
        """A few sentences in two dimensions: the first two principal components of their vectors."""
        sentences = checked(request.sentences, limits.max_plot)
        answer = await batcher.submit(Job(sentences))
        plane, explained = await asyncio.to_thread(principal_plane, answer.vectors)
        points = [
            schema.PlotPoint(x=x, y=y, sentence=s, cut=s in answer.cut)
            for (x, y), s in zip(plane.tolist(), sentences, strict=True)
        ]
        return schema.PlotAnswer(points=points, explained=explained)

    app.mount("/", StaticFiles(directory=Path(__file__).parent / "static", html=True))
    return app


def _is_text(sentence: str) -> bool:
    """Whether the sentence can be encoded: JSON's escapes can spell half a character, on which a tokenizer fails."""
    try:
        sentence.encode()
    except UnicodeEncodeError:
        return False
    return True


def _say_what_is_wrong(app: FastAPI, limits: Limits) -> None:
    """Makes every error {"error": a sentence}."""

    def problem(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if "json" not in request.headers.get("content-type", ""):
            return problem(422, "the body must be JSON: send it with the header Content-Type: application/json")
        # A value that may be of several types has one error per type: the answer lists all under one name.
        found: dict[str, list[str]] = {}
        for one in error.errors()[:_MAX_ERRORS]:
            if one["type"] == "json_invalid":
                return problem(422, f"the body is not JSON (at character {one['loc'][1]})")
            at = ".".join(str(part)[:_MAX_NAME] for part in one["loc"][1:] if part not in ("str", "list[str]"))
            text = one["msg"].removeprefix("Value error, ")
            found.setdefault(at or "the body", []).append(text[:1].lower() + text[1:])
        return problem(422, "; ".join(f"{at}: {' or '.join(texts)}" for at, texts in found.items()))

    @app.exception_handler(NotReady)
    async def not_ready(request: Request, error: NotReady) -> JSONResponse:
        return problem(503, str(error), **{"Retry-After": "2"})

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> JSONResponse:
        return problem(503, "too many requests wait already: ask again in a moment", **{"Retry-After": "1"})

    @app.exception_handler(TooSlow)
    async def too_slow(request: Request, error: TooSlow) -> JSONResponse:
        return problem(504, f"no answer within {limits.max_seconds:g} s: ask for less, or later")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return problem(500, "something went wrong here; the service's log has the details", **HEADERS)
