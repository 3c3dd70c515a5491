"""The service: its API, its limits, requests that share a pass, and its beginning and end."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'simcse-jax[serve]'")
pytest.importorskip("httpx2", reason="FastAPI's test client needs it")
from fastapi.testclient import TestClient
from pydantic import ValidationError

from simcse_jax.commands.serve import Serve
from simcse_jax.errors import InputError
from simcse_jax.inference.index import Index
from simcse_jax.inference.nearest import better
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.serve import schema
from simcse_jax.serve.app import create_app
from simcse_jax.serve.batching import Batcher, NotReady, Overloaded, TooSlow
from simcse_jax.serve.engine import Answer, Engine, Job
from simcse_jax.serve.limits import Limits
from simcse_jax.serve.plane import principal_plane
from simcse_jax.serve.server import bind, is_loopback, url

LIMITS = Limits(
    max_sentences=20, max_characters=100, max_hits=20, max_request_hits=380, max_plot=6, max_body=4000, batch=8
)


@pytest.fixture(autouse=True)
def _little_memory() -> None:
    """Programs are kept: the service is compiled once for all tests of this file."""


@pytest.fixture(scope="module")
def model(tiny_bert: Path, text_file: Path) -> SimCSE:
    model = SimCSE(tiny_bert, "avg")
    model.build_index(text_file)
    return model


@pytest.fixture(scope="module")
def client(model: SimCSE) -> Iterator[TestClient]:
    engine = Engine(model, model.index, LIMITS.max_hits, LIMITS.batch)
    with serving(engine, hosts=["127.0.0.1"]) as client:
        yield client


@contextmanager
def serving(engine: Engine, limits: Limits = LIMITS, hosts: Sequence[str] = ("*",)) -> Iterator[TestClient]:
    """A client of the engine's application, once that is ready."""
    ready: Future[Exception | None] = Future()
    app = create_app(engine, "tiny", limits, hosts, ready.set_result)
    with TestClient(app, "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        if error := ready.result(120):
            raise error
        yield client


def posted(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(f"/api/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: TestClient, path: str, status: int, **body: Any) -> str:
    response = client.post(f"/api/{path}", json=body)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return response.json()["error"]


def test_health(client: TestClient, model: SimCSE) -> None:
    health = client.get("/api/health").json()
    assert (health["ready"], health["model"], health["width"]) == (True, "tiny", 32)
    assert model.index is not None
    assert health["index_size"] == len(model.index) == 203
    assert health["limits"]["max_hits"] == 20
    assert health["max_length"] == model.max_length
    assert client.get("/api/ready").json() == {"ready": True}


def test_search_is_the_tools(client: TestClient, model: SimCSE) -> None:
    queries = ["a man runs", "", "Naïve café — 東京 🙂"]
    found = posted(client, "search", query=queries, top_k=3)["results"]
    expected = model.search(queries, top_k=3, threshold=-1.0)
    assert [result["query"] for result in found] == queries
    for result, hits in zip(found, expected, strict=True):
        assert [hit["sentence"] for hit in result["hits"]] == [hit.sentence for hit in hits]
        assert [hit["index"] for hit in result["hits"]] == [hit.index for hit in hits]
        np.testing.assert_allclose([hit["score"] for hit in result["hits"]], [hit.score for hit in hits], atol=1e-5)
    one = posted(client, "search", query=queries[0])["results"]
    assert len(one) == 1
    assert len(one[0]["hits"]) == 10
    least = one[0]["hits"][3]["score"]
    assert len(posted(client, "search", query=queries[0], threshold=least)["results"][0]["hits"]) == 4


def test_encode_and_similarity_are_the_tools(client: TestClient, model: SimCSE) -> None:
    sentences = ["a man runs", "the dog eats", "a man runs"]
    for normalize in (True, False):
        answer = posted(client, "encode", sentences=sentences, normalize=normalize)
        assert answer["width"] == 32
        np.testing.assert_allclose(answer["vectors"], model.encode(sentences, normalize=normalize), atol=1e-5)
    scores = posted(client, "similarity", a=sentences[0], b=sentences)["scores"]
    np.testing.assert_allclose(scores, model.similarity(sentences[0], sentences), atol=1e-5)
    assert scores[0][0] == pytest.approx(1, abs=1e-6)


def test_plot(client: TestClient, model: SimCSE) -> None:
    sentences = ["a man runs", "the dog eats", "a cat", "never two"]
    answer = posted(client, "plot", sentences=sentences)
    assert [point["sentence"] for point in answer["points"]] == sentences
    vectors = np.asarray(model.encode(sentences))
    plane = np.array([[point["x"], point["y"]] for point in answer["points"]])
    # No plane keeps more of the distances: the variance in it is that of the two largest singular values.
    values = np.linalg.svd(vectors - vectors.mean(0))[1] ** 2
    np.testing.assert_allclose((plane**2).sum(0), values[:2], rtol=1e-3)
    np.testing.assert_allclose(answer["explained"], values[:2] / values.sum(), rtol=1e-3)


def test_texts_that_are_cut_say_so(tiny_bert: Path) -> None:
    short, full, long = "a man", "a man runs", "a man runs now"
    tokenizer = SimCSE(tiny_bert, "avg")._encoder.tokenizer
    limit, more = (len(tokenizer(text)["input_ids"]) for text in (full, long))
    assert more > limit
    model = SimCSE(tiny_bert, "avg", limit)
    assert model.are_cut([long, short, full, ""]) == [True, False, False, False]
    assert SimCSE(tiny_bert, "avg", limit, long_text="windows").are_cut([long]) == [False]
    model.build_index([long, full])
    with serving(Engine(model, model.index, LIMITS.max_hits, LIMITS.batch)) as client:
        assert posted(client, "encode", sentences=[full, long])["cut"] == [False, True]
        similarity = posted(client, "similarity", a=[long, short], b=full)
        assert (similarity["cut_a"], similarity["cut_b"]) == ([True, False], [False])
        points = posted(client, "plot", sentences=[short, long])["points"]
        assert [point["cut"] for point in points] == [False, True]
        for query, cut in ((short, False), (long, True)):
            (found,) = posted(client, "search", query=query, top_k=2)["results"]
            assert found["cut"] == cut
            assert {hit["sentence"]: hit["cut"] for hit in found["hits"]} == {long: True, full: False}


def test_plane_of_little() -> None:
    for vectors in (np.ones((1, 4), np.float32), np.full((3, 4), 0.1, np.float32)):
        plane, explained = principal_plane(vectors)
        assert not plane.any()
        assert explained == [0, 0]
    plane, explained = principal_plane(np.array([[0, 1.0], [0, 3]], np.float32))
    np.testing.assert_allclose(np.abs(plane), [[1, 0], [1, 0]], atol=1e-6)
    assert explained[0] == pytest.approx(1)


def test_what_is_beyond_a_limit_is_refused_with_the_limit(client: TestClient) -> None:
    assert "at most 100" in refused(client, "search", 422, query="x" * 101)
    assert "sentence 2 has 101" in refused(client, "encode", 422, sentences=["a", "x" * 101])
    assert "may have 20" in refused(client, "encode", 422, sentences=["a"] * 21)
    assert "may have 20" in refused(client, "similarity", 422, a=["a"] * 11, b=["b"] * 10)
    assert "may have 6" in refused(client, "plot", 422, sentences=["a"] * 7)
    assert "at most 20 hits" in refused(client, "search", 422, query="a", top_k=21)
    assert len(posted(client, "search", query=["a"] * 20, top_k=19)["results"]) == 20
    in_all = refused(client, "search", 422, query=["a"] * 20, top_k=20)
    assert in_all == "20 queries of 20 hits: a request may have 380 hits in all"
    assert "no queries" in refused(client, "search", 422, query=[])
    assert "larger than 4,000 bytes" in refused(client, "encode", 413, sentences=["a" * 99] * 50)
    in_parts = client.post(
        "/api/encode", content=(b"x" * 100 for _ in range(50)), headers={"Content-Type": "application/json"}
    )
    assert "content-length" not in in_parts.request.headers
    assert in_parts.status_code == 413
    assert "larger than 4,000 bytes" in in_parts.json()["error"]


def test_what_is_not_a_request_is_refused_with_what_is_expected(client: TestClient) -> None:
    assert refused(client, "search", 422) == "query: field required"
    assert "query: input should be a valid string or input should be a valid list" in refused(
        client, "search", 422, query=3
    )
    assert "top_k: input should be greater than or equal to 1" in refused(client, "search", 422, query="a", top_k=0)
    assert "topk: extra inputs are not permitted" in refused(client, "search", 422, query="a", topk=3)
    assert "threshold" in refused(client, "search", 422, query="a", threshold=2)
    long = refused(client, "search", 422, query="a", **{"x" * 3000: 1})
    assert long == f"{'x' * 50}: extra inputs are not permitted"
    assert refused(client, "search", 422, query="a", **dict.fromkeys("abcdefgh")).count(";") == 4
    cut = client.post("/api/search", content=b'{"query": "a"', headers={"Content-Type": "application/json"})
    assert cut.json() == {"error": "the body is not JSON (at character 13)"}
    unnamed = client.post("/api/search", content='{"query": "a"}', headers={"Content-Type": "text/plain"})
    assert unnamed.status_code == 422
    assert "with the header Content-Type: application/json" in unnamed.json()["error"]
    json_type = {"Content-Type": "application/json"}
    for content, headers in (
        (b"{", json_type),
        (b'{"query": "\\ud800"}', json_type),
        (b"\xff", json_type),
        (b"{}", {}),
    ):
        response = client.post("/api/search", content=content, headers=headers)
        assert response.status_code in (400, 422), response.text
        assert response.json()["error"]
    assert client.get("/api/nothing").json() == {"error": "Not Found"}
    assert client.get("/api/search").status_code == 404
    # What was refused has harmed nobody.
    assert posted(client, "search", query="a", top_k=1)["results"]


def test_many_faults_take_no_longer_than_one(model: SimCSE) -> None:
    # Their number is what takes the time.
    many = [1] * 300_000
    requests: list[tuple[type[schema.Request], dict[str, Any]]] = [
        (schema.SearchRequest, {"query": many}),
        (schema.SimilarityRequest, {"a": many, "b": many}),
        (schema.EncodeRequest, {"sentences": many}),
        (schema.PlotRequest, {"sentences": many}),
        (schema.SearchRequest, {"query": "a"} | {str(number): 1 for number in range(300_000)}),
    ]
    for kind, body in requests:
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(body)
        assert caught.value.error_count() <= 4
    with serving(Engine(model, None, 5, 8), replace(LIMITS, max_body=2**20)) as client:
        assert "query.0: input should be a valid string" in refused(client, "search", 422, query=many)
        said = refused(client, "search", 422, **{str(number): 1 for number in range(50_000)})
        assert said == "the body: 50,000 fields are more than any request has"


def test_a_name_that_another_site_points_here_is_refused(client: TestClient) -> None:
    for name in ("evil.example:8000", "evil.example", "127.0.0.1.evil.example", "127.0.0.1:80@evil.example", ""):
        answer = client.get("/api/health", headers={"Host": name})
        assert answer.status_code == 400
        assert answer.json() == {"error": "the Host header must name one of 127.0.0.1"}
        assert has_guards_headers(answer)
    assert client.get("/api/health", headers={"Host": "127.0.0.1"}).status_code == 200


def test_pages_of_other_sites_are_refused(client: TestClient) -> None:
    def status(**headers: str) -> int:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return int(client.post("/api/encode", json={"sentences": ["a"]}, headers=given).status_code)

    assert status() == 200  # a program
    assert status(Origin="http://127.0.0.1:8000", Sec_Fetch_Site="same-origin") == 200
    assert status(Origin="http://127.0.0.1:8000") == 200  # an older browser
    assert status(Origin="https://search.example", Sec_Fetch_Site="same-origin") == 200  # through a proxy
    for origin in ("https://evil.example", "null", "http://127.0.0.1:8001", "http://127.0.0.1:8000.evil.example", ""):
        assert status(Origin=origin) == 403, origin
        assert status(Origin=origin, Sec_Fetch_Site="cross-site") == 403, origin
    assert status(Sec_Fetch_Site="same-site") == 403
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link


def has_guards_headers(answer: Any) -> bool:
    return "default-src 'none'" in answer.headers["Content-Security-Policy"] and (
        answer.headers["X-Content-Type-Options"] == "nosniff"
    )


def test_schema_and_page_name_nothing_elsewhere(client: TestClient) -> None:
    described = client.get("/api/openapi.json").json()
    names = ("health", "ready", "search", "encode", "similarity", "plot")
    assert {f"/api/{name}" for name in names} == set(described["paths"])
    for path in ("search", "encode", "similarity", "plot"):
        responses = described["paths"][f"/api/{path}"]["post"]["responses"]
        for status in ("413", "422", "503", "504"):
            assert responses[status]["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")
    assert client.get("/docs").status_code == 404
    page = client.get("/")
    assert has_guards_headers(page)
    for file in ("", "page.css", "main.js", "search.js", "compare.js", "plot.js", "labels.js", "api.js", "theme.js"):
        text = client.get(f"/{file}").text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), file


def test_without_an_index_everything_else_works(model: SimCSE) -> None:
    with serving(Engine(model, None, 5, 8)) as client:
        assert client.get("/api/health").json()["index_size"] == 0
        assert "start the service with a file" in refused(client, "search", 404, query="a")
        assert len(posted(client, "encode", sentences=["a"])["vectors"]) == 1


class Counted(Engine):
    """An engine that counts its passes, each of which takes a while."""

    def __init__(self, model: SimCSE, index: Index | None, seconds: float = 0.0) -> None:
        super().__init__(model, index, LIMITS.max_hits, LIMITS.batch)
        self.seconds = seconds
        self.batches: list[int] = []

    def __call__(self, jobs: Sequence[Job]) -> list[Answer]:
        self.batches.append(sum(len(job.sentences) for job in jobs))
        time.sleep(self.seconds)
        return super().__call__(jobs)


def test_concurrent_requests_share_passes_and_get_the_answers_of_their_own(model: SimCSE) -> None:
    assert model.index is not None
    queries = [*model.index.sentences[:20], "a man", "", *(f"{c} dog sees {c}" for c in "abcdefghij")]
    engine = Counted(model, model.index, 0.02)
    with serving(engine) as client:

        def ask(number: int) -> Any:
            query, kind = queries[number], number % 3
            if kind == 0:
                return posted(client, "encode", sentences=[query])["vectors"]
            threshold = -1.0 if kind == 1 else 0.5
            found = posted(client, "search", query=query, top_k=number % 7 + 1, threshold=threshold)
            return [[hit["index"], hit["score"]] for hit in found["results"][0]["hits"]]

        alone = [ask(number) for number in range(len(queries))]
        assert engine.batches == [1] * len(queries)
        engine.batches.clear()
        with ThreadPoolExecutor(len(queries)) as pool:
            together = list(pool.map(ask, range(len(queries))))
    assert sum(engine.batches) == len(queries)
    assert max(engine.batches) <= LIMITS.batch
    assert len(engine.batches) <= len(queries) / 3
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_nothing_is_compiled_once_it_is_ready(client: TestClient, model: SimCSE) -> None:
    forward = model._encoder._forward
    compiled = forward._cache_size(), better._cache_size()
    rng = np.random.default_rng(0)
    for number in (1, 2, 3, 5, 8, 13, 20):
        for most in (1, 6, 90):
            words = ["a dog runs " * 9, "", "x", "red house", "q w e r t y u i o p"]
            sentences = ["".join(rng.choice(words, 2))[:most] for _ in range(number)]
            posted(client, "encode", sentences=sentences)
            posted(client, "search", query=sentences, top_k=int(rng.integers(1, 20)))
    assert (forward._cache_size(), better._cache_size()) == compiled


class Gate:
    """Work that waits until it may go on."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.calls: list[list[int]] = []

    def __call__(self, jobs: Sequence[int]) -> list[int]:
        self.calls.append(list(jobs))
        assert self.open.wait(10)
        if -1 in jobs:
            raise ValueError("no such job")
        return [10 * job for job in jobs]


def batcher(work: Any, **settings: Any) -> Batcher[int, int]:
    return Batcher(work, lambda job: 1, **({"batch": 4, "max_queue": 6, "gather": 0.01, "max_seconds": 5.0} | settings))


async def started(batcher: Batcher[int, int], prepare: Any = lambda: None) -> None:
    ready: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    batcher.start(prepare, ready.set_result)
    error = await ready
    if error:
        raise error


async def called(batcher: Batcher[int, int], work: Any, job: int) -> asyncio.Task[int]:
    """A first job, once the call with it has begun."""
    task = asyncio.create_task(batcher.submit(job))
    while not work.calls:
        await asyncio.sleep(0.005)
    return task


def test_a_queue_is_served_in_order_and_bounded() -> None:
    async def check() -> None:
        work = Gate()
        shared = batcher(work)
        with pytest.raises(NotReady):
            await shared.submit(0)
        await started(shared)
        first = await called(shared, work, 0)
        waiting = [asyncio.create_task(shared.submit(number)) for number in range(1, 7)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await shared.submit(7)
        waiting[1].cancel()  # its client has gone
        await asyncio.sleep(0)
        work.open.set()
        assert await first == 0
        assert [await task for task in waiting if task is not waiting[1]] == [10, 30, 40, 50, 60]
        assert work.calls == [[0], [1, 3, 4, 5], [6]]
        assert await shared.submit(7) == 70
        await shared.stop(5)
        with pytest.raises(NotReady):
            await shared.submit(8)

    asyncio.run(check())


def test_what_takes_too_long_is_given_up_and_nothing_is_taken_until_it_ends() -> None:
    async def check() -> None:
        work = Gate()
        shared = batcher(work, max_seconds=0.2, gather=0.0)
        await started(shared)
        first = await called(shared, work, 1)
        second = asyncio.create_task(shared.submit(2))  # dropped while it waits
        for task in (first, second):
            with pytest.raises(TooSlow):
                await task
        assert "at one call for more than 0.2 s" in str(shared.unready)
        with pytest.raises(NotReady, match="at one call"):
            await shared.submit(2)
        work.open.set()
        while shared.busy:
            await asyncio.sleep(0.005)
        assert shared.unready is None
        assert await shared.submit(3) == 30
        assert work.calls == [[1], [3]]
        await shared.stop(5)

    asyncio.run(check())


def test_a_fault_is_its_jobs_alone_whatever_it_is() -> None:
    class Faulty(Gate):
        """Work with faults: an error, an exit, no answer at all, and what no future takes."""

        def __call__(self, jobs: Sequence[int]) -> list[int]:
            self.calls.append(list(jobs))
            assert self.open.wait(10)
            faults = {-1: ValueError("no such job"), -2: SystemExit(3), -4: StopIteration()}
            for job in jobs:
                if job in faults:
                    raise faults[job]
            return [10 * job for job in jobs if job != -3]

    async def check() -> None:
        work = Faulty()
        shared = batcher(work, batch=5, max_queue=20)
        await started(shared)
        first = await called(shared, work, 7)
        together = asyncio.gather(*(shared.submit(job) for job in (1, -1, -2, -3, -4)), return_exceptions=True)
        await asyncio.sleep(0)
        work.open.set()
        assert await first == 70
        answers = await together
        assert answers[0] == 10
        said = ["no such job", "SystemExit", "0 answers to 1 jobs", "StopIteration"]
        for answer, what in zip(answers[1:], said, strict=True):
            assert what in str(answer)
        assert await shared.submit(2) == 20
        assert work.calls == [[7], [1, -1, -2, -3, -4], [1], [-1], [-2], [-3], [-4], [2]]
        await shared.stop(5)

    asyncio.run(asyncio.wait_for(check(), 20))


def test_who_has_gone_waits_no_longer() -> None:
    async def check() -> None:
        work = Gate()
        shared = batcher(work)
        await started(shared)
        tasks = [await called(shared, work, 0)]
        for _ in range(3):  # leaves no trace in the queue, however often
            waiting = [asyncio.create_task(shared.submit(number)) for number in range(6)]
            await asyncio.sleep(0)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        tasks.append(asyncio.create_task(shared.submit(1)))
        await asyncio.sleep(0)
        work.open.set()
        assert await asyncio.gather(*tasks) == [0, 10]
        assert work.calls == [[0], [1]]
        await shared.stop(5)

    asyncio.run(asyncio.wait_for(check(), 20))


def test_stopping_waits_for_a_call_that_hangs_no_longer_than_told() -> None:
    async def check() -> None:
        work = Gate()
        shared = batcher(work)
        await started(shared)
        first = await called(shared, work, 1)
        await shared.stop(0.05)
        with pytest.raises(NotReady, match="is stopping"):
            await first
        assert shared.busy
        work.open.set()

    asyncio.run(asyncio.wait_for(check(), 20))


def test_a_worker_that_ends_by_a_fault_is_told_and_takes_nothing_more() -> None:
    async def check() -> None:
        told: asyncio.Queue[Exception | None] = asyncio.Queue()
        shared = batcher(Gate())
        shared.start(lambda: None, told.put_nowait)
        assert await told.get() is None
        shared._gather = None  # type: ignore[assignment]  # any fault of its own
        with pytest.raises(NotReady):
            await shared.submit(1)
        assert isinstance(await told.get(), TypeError)
        assert shared.unready
        await shared.stop(5)

    asyncio.run(asyncio.wait_for(check(), 20))


def test_stopping_answers_the_call_that_goes_on() -> None:
    async def check() -> None:
        work = Gate()
        shared = batcher(work)
        await started(shared)
        first = await called(shared, work, 1)
        second = asyncio.create_task(shared.submit(2))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(shared.stop(5))
        await asyncio.sleep(0.01)
        assert not stopping.done()
        work.open.set()
        await stopping
        assert await first == 10
        with pytest.raises(NotReady):
            await second
        assert work.calls == [[1]]

    asyncio.run(asyncio.wait_for(check(), 20))


def test_stopped_while_it_prepares_it_is_never_ready() -> None:
    async def check() -> None:
        compiled = threading.Event()
        told: list[Exception | None] = []
        shared = batcher(Gate())
        shared.start(lambda: compiled.wait(10) and None, told.append)
        await asyncio.sleep(0.01)
        stopping = asyncio.create_task(shared.stop(5))
        await asyncio.sleep(0.01)
        compiled.set()
        await stopping
        assert told == []
        assert shared.unready

    asyncio.run(asyncio.wait_for(check(), 20))


def test_overload_slowness_and_faults_are_said_in_json(model: SimCSE) -> None:
    slow = Counted(model, None, 0.3)
    with serving(slow, replace(LIMITS, max_seconds=0.1)) as client:
        assert "no answer within 0.1 s" in refused(client, "encode", 504, sentences=["a"])
    with serving(slow, replace(LIMITS, max_queue=20)) as client, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(client.post, "/api/encode", json={"sentences": ["a"] * 15}) for _ in range(4)]
        answers = [task.result() for task in waiting]
    busy = [answer for answer in answers if answer.status_code == 503]
    assert busy
    assert "too many requests wait" in busy[0].json()["error"]
    assert busy[0].headers["Retry-After"] == "1"

    class Broken(Counted):
        def __call__(self, jobs: Sequence[Job]) -> list[Answer]:
            raise RuntimeError("a secret")

    with serving(Broken(model, None)) as client:
        assert "the service's log" in refused(client, "encode", 500, sentences=["a"])
        assert has_guards_headers(client.post("/api/encode", json={"sentences": ["a"]}))


@pytest.mark.parametrize("fault", ["few", "nan"])
def test_vectors_that_are_not_there_are_an_error_of_their_requests_alone(fault: str) -> None:
    class Odd(SimCSE):
        """A model that forgets sentences, or gives numbers that are none."""

        width, max_length = 2, 8  # type: ignore[assignment]

        def __init__(self) -> None:
            pass

        def warm_up(self) -> None:
            pass

        def are_cut(self, sentences: Any) -> list[bool]:
            return [False] * len(sentences)

        def encode(self, sentences: Any, **_: Any) -> Any:
            time.sleep(0.05)  # so that the next requests come together
            kept = [s for s in sentences if s != "bad" or fault == "nan"]
            return np.array([[np.nan if s == "bad" else 1, 2] for s in kept], np.float32).reshape(-1, 2)

    engine = Engine(Odd(), None, 5, 8)
    with serving(engine) as client, ThreadPoolExecutor(8) as pool:
        texts = ["a", "bad", "b", "c", "bad", "d", "e", "f"]
        answers = list(pool.map(lambda text: client.post("/api/encode", json={"sentences": [text]}), texts))
        assert [answer.status_code for answer in answers] == [500 if text == "bad" else 200 for text in texts]
        assert client.get("/api/ready").status_code == 200


def test_not_ready_while_compiling_and_told_where_that_fails(model: SimCSE) -> None:
    class Slow(Counted):
        compiled = threading.Event()

        def warm_up(self) -> None:
            assert self.compiled.wait(10)
            raise RuntimeError("no memory")

    told: list[Exception | None] = []
    with TestClient(create_app(Slow(model, None), "tiny", LIMITS, on_ready=told.append)) as client:
        assert client.get("/api/health").json()["ready"] is False
        assert client.get("/api/ready").status_code == 503
        assert "ask again in a few seconds" in refused(client, "encode", 503, sentences=["a"])
        Slow.compiled.set()
        while not told:
            time.sleep(0.01)
        assert client.get("/api/health").json()["ready"] is False
    assert str(told[0]) == "no memory"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0"),
        ({"gather": -1.0}, "gather is -1.0; it must be at least 0"),
        ({"max_queue": 10}, "less than the 256 sentences"),
        ({"max_hits": 3_000}, "less than the 3000 hits of a single query"),
        ({"max_seconds": float("inf")}, "max_seconds is inf; it must be finite"),
        ({"gather": float("inf")}, "gather is inf; it must be finite"),
    ],
)
def test_limits_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Limits(), **settings).validate()


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.2", "example.org")] == [False] * 4


def test_a_port_in_use_is_said_before_a_model_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert url(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {port} .*choose another with --port"):
            Serve("no-such-model", port=port).run()
        with pytest.raises(InputError, match=f"port {port}"):
            bind("127.0.0.1", port)
    with pytest.raises(InputError, match="between 0"):
        bind("127.0.0.1", 70000)
    with pytest.raises(InputError, match="give an address of this machine"):
        bind("no-such-host.invalid", 0)


def test_the_command_starts_answers_and_ends_cleanly(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simcse_jax", "serve", str(tiny_bert), str(text_file), "--pooler", "avg"]
    quickly = ["--max-length", "16", "--batch", "1", "--max-hits", "8"]  # has little to compile
    with subprocess.Popen(
        [*command, *quickly, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("ready: "):
                    break
            address = line.split()[1]
            host, port = address.removeprefix("http://").split(":")
            body = json.dumps({"query": "a man runs", "top_k": 1}).encode()
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                head = f"POST /api/search HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        finally:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.endswith("stopped\n")
    assert "Traceback" not in err
