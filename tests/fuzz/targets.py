"""The targets: each gives bytes to a reader, which may return or refuse them, and nothing else."""

import asyncio
import contextlib
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from simcse_jax.config import Config, DataConfig
from simcse_jax.errors import InputError
from simcse_jax.reports.progress import telling
from simcse_jax.storage.manifest import Damage

PARTS = b"\n%%\n"
"""Stands between the files of one input."""
REFUSALS = (InputError, Damage)
Reader = Callable[[bytes, Path], Any]
TARGETS: dict[str, "Target"] = {}


@dataclass(frozen=True)
class Target:
    """A reader, and how it is tried.

    Attributes:
      read: takes the bytes and an empty folder.
      share: its part of all executions.
      most: most bytes of an input.
    """

    read: Reader
    share: float = 1.0
    most: int = 4096


def target(share: float = 1.0, most: int = 4096) -> Callable[[Reader], Reader]:
    """Enters a function into `TARGETS` under its name."""

    def enter(read: Reader) -> Reader:
        TARGETS[read.__name__] = Target(read, share, most)
        return read

    return enter


def run_one(name: str, data: bytes, folder: Path) -> bool:
    """Gives bytes to a target; whether it took them. Any exception but a refusal passes."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with telling(quiet=True), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            TARGETS[name].read(data, folder)
        except REFUSALS:
            return False
    return True


def split(data: bytes, number: int) -> list[bytes]:
    """The files of an input, empty ones for those that it lacks."""
    parts = data.split(PARTS, number - 1)
    return parts + [b""] * (number - len(parts))


def write(folder: Path, **files: bytes) -> None:
    """Writes files whose names have __ for a point, and ___ for a slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _read_corpus(path: Path, data: bytes) -> None:
    """Reads a file as training text, with settings that the first byte chooses."""
    from simcse_jax.data.corpus import open_corpus

    way, path = (data[:1] or b"0")[0], Path(path)
    packed = way & 64 and path.suffix != ".parquet"
    path = path.with_name(f"{path.name}.gz") if packed else path
    path.write_bytes(gzip.compress(data[1:], 1) if packed else data[1:])
    table = path.name.startswith(("a.csv", "a.tsv"))
    config = DataConfig(
        train=str(path),
        delimiter=("", ";", "\t", "")[way & 3] if table else "",
        header=not way & 4 if table else True,
        columns=("sentence",) if way & 8 and not path.name.startswith("a.txt") else (),
        where={"label": "1"} if way & 16 and not path.name.startswith("a.txt") else {},
        neighbours=2 if way & 32 else 0,
    )
    corpus = open_corpus(config)
    for example in islice(corpus, 1000):
        assert all(isinstance(sentence, str) for sentence in example)
        corpus.describe(example)
        break
    for _ in islice(corpus, 10_000):
        pass


@target(3)
def text(data: bytes, folder: Path) -> None:
    _read_corpus(folder / "a.txt", data)


@target(3)
def packed_text(data: bytes, folder: Path) -> None:
    from simcse_jax.data.corpus import read_sentences

    write(folder, a__txt__gz=data)
    read_sentences(folder / "a.txt.gz")


@target(3)
def csv(data: bytes, folder: Path) -> None:
    _read_corpus(folder / "a.csv", data)


@target(2)
def tsv(data: bytes, folder: Path) -> None:
    _read_corpus(folder / "a.tsv", data)


@target(3)
def jsonl(data: bytes, folder: Path) -> None:
    _read_corpus(folder / "a.jsonl", data)


@target(0.5, 8192)
def parquet(data: bytes, folder: Path) -> None:
    _read_corpus(folder / "a.parquet", data)


def _table(data: bytes, folder: Path) -> str:
    ending = ("tsv", "csv", "jsonl", "txt")[(data[:1] or b"0")[0] & 3]
    (folder / f"a.{ending}").write_bytes(data[1:])
    return str(folder / f"a.{ending}")


@target(1.5)
def pairs(data: bytes, folder: Path) -> None:
    from simcse_jax.evaluation.sts import load_task

    load_task(_table(data, folder), "")


@target(1.5)
def retrieval(data: bytes, folder: Path) -> None:
    from simcse_jax.evaluation.retrieval import load_retrieval

    if task := load_retrieval(_table(data, folder), columns=("question", "answer") if data[:1] > b"8" else ()):
        task.describe()


@target(1)
def nli(data: bytes, folder: Path) -> None:
    from simcse_jax.data.corpus import open_source
    from simcse_jax.data.nli import build_triplets, read_pairs

    build_triplets(read_pairs(open_source(DataConfig(train=_table(data, folder)))), 0)


@target(2)
def sts(data: bytes, folder: Path) -> None:
    from simcse_jax.evaluation import sts as tasks

    first, second = split(data[1:], 2)
    if data[:1] < b"2":
        write(folder, STS___STSBenchmark___sts_test__csv=first)
        (folder / "STS/STSBenchmark/sts_test.csv").rename(folder / "STS/STSBenchmark/sts-test.csv")
        tasks.load_task("STSBenchmark", folder)
    elif data[:1] < b"4":
        write(folder, SICK___SICK_test_annotated__txt=first)
        tasks.load_task("SICKRelatedness", folder)
    else:
        write(folder, STS__input__x__txt=first, STS__gs__x__txt=second)
        tasks._read_sts("x", folder)


@target(1.5)
def transfer(data: bytes, folder: Path) -> None:
    from simcse_jax.evaluation import transfer_tasks as tasks

    names = ["MR", "SST2", "TREC", "MRPC", "SICKEntailment"]
    name = names[(data[:1] or b"0")[0] % len(names)]
    first, second = split(data[1:], 2)
    files = tasks._BINARY.get(name) or tuple(tasks._SPLITS[name].values())
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(second if number and second else first)
    tasks.load_transfer_task(name, folder, "fasttest")


def _run(folder: Path) -> Any:
    from simcse_jax.runs.folder import Run

    return Run(folder, Config(), "")


@target(3)
def results(data: bytes, folder: Path) -> None:
    from simcse_jax.inference.export import _scores

    write(folder, results__json=data)
    run = _run(folder)
    run.has_ended()
    _scores(run.results())


@target(1.5)
def metrics(data: bytes, folder: Path) -> None:
    from simcse_jax.runs.figures import _columns
    from simcse_jax.runs.metrics_log import MetricsLog, read_log
    from simcse_jax.study.measure import from_log

    write(folder, metrics__jsonl=data)
    file = folder / "metrics.jsonl"
    lines = read_log(file)
    for names in (("loss",), ("dev",), ("dev_uniformity", "dev_alignment")):
        _columns(lines, *names)
    if any("loss" in line and line["step"] > 6 for line in lines):
        from_log(file, 8, 4)
    log = MetricsLog(file, 4)
    log.write(5, {"loss": 1.0})
    log.close()
    assert read_log(file)[-1]["step"] == 5


@target(1)
def run(data: bytes, folder: Path) -> None:
    from simcse_jax.runs.folder import changes, open_run

    write(folder, run__json=data)
    found = open_run(folder)
    changes(found.config, Config())
    changes(Config(), found.config)
    found.config.validate()


@target(0.7)
def study(data: bytes, folder: Path) -> None:
    from simcse_jax.study.grid import Study
    from simcse_jax.study.run import _check_folder, _read

    write(folder, study__json=data)
    asked = Study(output=str(folder))
    _check_folder(asked)
    cell = asked.cells()[0]
    asked.cell_folder(cell).mkdir(parents=True)
    (asked.cell_folder(cell) / "cell.json").write_bytes(data)
    _read(asked, cell)


def _seal(data: bytes) -> bytes:
    """A manifest whose seal is right, where it is an object at all."""
    from simcse_jax.storage import manifest

    try:
        content = json.loads(data)
        content.pop("seal", None)
        return json.dumps(content | {"seal": manifest._seal(content)}).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


@target(2)
def manifest(data: bytes, folder: Path) -> None:
    from simcse_jax.storage.manifest import faults, verify

    content, file = split(data, 2)
    write(folder, manifest__json=_seal(content) if len(data) % 4 else content, a__bin=file)
    verify(folder)
    faults(folder, lambda name: len(data) % 3 > 0)


@target(2)
def progress(data: bytes, folder: Path) -> None:
    from simcse_jax.runs.checkpoints import read_progress

    about, content = split(data, 2)
    write(folder, **{"5____CHECKPOINT_METADATA": about})
    if content:
        write(folder, **{"5___manifest__json": _seal(content)})
    read_progress(folder / "5")


@target(3)
def stored_run(data: bytes, folder: Path) -> None:
    from simcse_jax.storage.objects import read_manifest

    if found := read_manifest(SimpleNamespace(cat_file=lambda path: data), "bucket/run"):
        {file: (stamp[0], stamp[1]) for file, stamp in found["files"].items()}


@cache
def _tokenizer() -> Any:
    """A small WordPiece tokenizer."""
    from simcse_jax.pretrained.tokenizers import load_tokenizer

    folder = _kept("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123)), *(f"##{c}" for c in "aeinorst")]
    write(folder, vocab__txt="\n".join(words).encode())
    write(folder, tokenizer_config__json=b'{"tokenizer_class": "BertTokenizer", "model_max_length": 40}')
    return load_tokenizer(folder)


@cache
def _kept(name: str) -> Path:
    """A folder for as long as the process lives."""
    import tempfile

    keeper = tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-")
    _KEEPERS.append(keeper)
    return Path(keeper.name)


_KEEPERS: list[Any] = []


@target(1)
def tokens(data: bytes, folder: Path) -> None:
    from simcse_jax.data.token_cache import TokenCache
    from simcse_jax.storage import manifest

    parts = split(data, 5)
    names = ("blocks.bin", "offsets-0.bin", "ids-0.bin", "missing-0.bin")
    for name, content in zip(names, parts[1:], strict=True):
        if content:
            (folder / name).write_bytes(content)
    files = {path.name: [path.stat().st_size, manifest.digest(path)] for path in folder.iterdir()}
    try:
        content = {"about": json.loads(parts[0]), "files": files}
        write(folder, manifest__json=json.dumps(content | {"seal": manifest._seal(content)}).encode())
    except (ValueError, RecursionError):
        write(folder, manifest__json=parts[0])
    table = TokenCache(folder, "", _tokenizer(), 12)._read(0, 1)
    table.rows(np.arange(min(len(table), 100)))


@target(0.7, 8192)
def index(data: bytes, folder: Path) -> None:
    from simcse_jax.inference.index import Index

    about, sentences, vectors = split(data, 3)
    write(folder, index__json=about, sentences__jsonl=sentences, vectors__npy=vectors)
    Index.load(folder)


@target(4)
def array(data: bytes, folder: Path) -> None:
    from simcse_jax.storage.records import open_array

    write(folder, a__npy=data)
    try:
        found = open_array(folder / "a.npy", np.float32, 2)
    except ValueError as error:
        raise InputError(str(error)) from error
    assert found.nbytes <= len(data)


@target(2)
def postprocessor(data: bytes, folder: Path) -> None:
    from simcse_jax.postprocess.stored import describe, read

    about, tensors = split(data, 2)
    try:
        given = json.loads(about)
    except (ValueError, RecursionError):
        return
    if isinstance(given, dict):
        write(folder, postprocess___model__safetensors=tensors)
        post = read(folder, given | {"folder": "postprocess"}, 4, np.float32)
        describe(given)
        assert post.width <= 2**16


_MODEL_FILES = (
    *("config.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"),
    *("sentence_bert_config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "tokenizer_config.json"),
)


@target(2, 8192)
def model_folder(data: bytes, folder: Path) -> None:
    from simcse_jax.postprocess.stored import has_more_modules, read_saved
    from simcse_jax.pretrained.folders import read_checkpoint

    for name, content in zip(_MODEL_FILES, split(data, len(_MODEL_FILES)), strict=True):
        if content:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    found = read_checkpoint(folder)
    found.prompts.text()
    found.own_pooling  # noqa: B018
    found.normalizes  # noqa: B018
    has_more_modules(folder, found.hf_config)
    read_saved(found, np.float32)


@target(2)
def weights(data: bytes, folder: Path) -> None:
    from simcse_jax.pretrained.tensors import find_tensors

    listed, tensors = split(data, 2)
    write(
        folder,
        **{"model__safetensors__index__json": listed, "a__safetensors": tensors}
        if listed
        else {"model__safetensors": tensors},
    )
    for found in find_tensors(folder).values():
        if not found.problem:
            assert found.read().nbytes <= 2 * len(tensors)


@target(0.2, 8192)
def tokenizer(data: bytes, folder: Path) -> None:
    from simcse_jax.data.tokens import encode_batch
    from simcse_jax.pretrained.tokenizers import check_tokenizer, load_tokenizer

    rules, about = split(data, 2)
    if rules.lstrip()[:1] == b"{":
        write(folder, tokenizer__json=rules)
    else:
        write(folder, vocab__txt=rules)
    if about:
        write(folder, tokenizer_config__json=about)
    write(folder, config__json=b'{"model_type": "bert"}')
    found = load_tokenizer(folder)
    check_tokenizer(found, 120)
    encode_batch(found, ["a man runs", "naïve 東京"], 8)


@target(1)
def synonyms(data: bytes, folder: Path) -> None:
    from simcse_jax.data.augment import _read_synonyms

    write(folder, a__txt=data)
    _read_synonyms(folder / "a.txt", _tokenizer())


@target(0.08)
def options(data: bytes, folder: Path) -> None:
    from simcse_jax.cli import parse

    words = data.decode("utf-8", "replace").split("\n")
    if any("tyro" in word for word in words):  # completion scripts, whose making is tyro's alone
        return
    with contextlib.suppress(SystemExit), contextlib.chdir(folder):
        try:
            command = parse(words)
            if validate := getattr(getattr(command, "config", None), "validate", None):
                validate()
        except OSError as error:  # of a file that nothing has checked, which `main` names
            if not error.filename:
                raise


@cache
def _service() -> Iterator[Any]:
    """The server's application, with a model that gives every sentence a vector, and the loop that it runs in."""
    from simcse_jax.inference.index import Hit
    from simcse_jax.serve.app import create_app
    from simcse_jax.serve.engine import Answer, Engine
    from simcse_jax.serve.limits import Limits

    class Constant(Engine):
        def __init__(self) -> None:
            self.model: Any = SimpleNamespace(width=2, max_length=32)
            self.index: Any = ("a sentence",)

        def warm_up(self) -> None:
            pass

        def __call__(self, jobs: Any) -> list[Answer]:
            hit = [Hit(0, 0.5, "a sentence")]
            return [Answer(np.ones((len(j.sentences), 2), np.float32), [hit for _ in j.sentences]) for j in jobs]

    ready: list[Exception | None] = []
    app: Any = create_app(Constant(), "name", Limits(gather=0.0), on_ready=ready.append)
    loop = asyncio.new_event_loop()
    context = app.router.lifespan_context(app)
    loop.run_until_complete(context.__aenter__())
    while not ready:
        loop.run_until_complete(asyncio.sleep(0.01))
    return app, loop  # type: ignore[return-value]


@target(1.5)
def request(data: bytes, folder: Path) -> None:
    app, loop = _service()  # type: ignore[misc]
    place = ("search", "encode", "similarity", "plot")[(data[:1] or b"0")[0] & 3]
    sent: list[dict[str, Any]] = []
    scope = {
        **{"type": "http", "method": "POST", "http_version": "1.1", "scheme": "http", "query_string": b""},
        **{"path": f"/api/{place}", "raw_path": f"/api/{place}".encode(), "root_path": "", "client": ("127.0.0.1", 1)},
        **{"server": ("127.0.0.1", 80), "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]},
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data[1:], "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    loop.run_until_complete(app(scope, receive, send))
    status = sent[0]["status"]
    body = json.loads(b"".join(message.get("body", b"") for message in sent))
    # On a busy machine the answer may come too late.
    refused = (400 <= status < 500 or status in (503, 504)) and isinstance(body["error"], str)
    assert status == 200 or refused, (status, body)


def scratch() -> str:
    """A place for files that is memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
