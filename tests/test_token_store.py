"""Tokens on gs://, made once by all processes that reach the store, each of which reads a copy on its own disk."""

import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest

import simcse_jax.data.tokens as tokens_module
from simcse_jax.config import DataConfig
from simcse_jax.data.corpus import Corpus
from simcse_jax.data.table import TokenTable
from simcse_jax.data.token_store import TokenStore, check_cache
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.inference.verification import inspect
from simcse_jax.reports.progress import telling
from simcse_jax.storage.manifest import MANIFEST
from simcse_jax.storage.places import StoreError
from tests.gcs import Store
from tests.jobs import Job
from tests.test_gcs import server, store
from tests.test_multihost import TOKENISE, long_text
from tests.test_token_cache import check_same, run_as, short_blocks, text_of, tokenizer

__all__ = ["long_text", "server", "short_blocks", "store", "tokenizer"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the store's packages

CACHE, BELOW = "gs://bucket/some/cache", "bucket/some/cache"
Tokenise = Callable[..., list[TokenTable]]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return text_of("triplets", tmp_path)


@pytest.fixture
def whole(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> TokenTable:
    return tokenize_corpus(corpus, tokenizer, 6, tmp_path / "whole", progress=False)


@pytest.fixture
def tokenise(
    store: Store, corpus: Corpus, tokenizer: Any, whole: TokenTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Tokenise:
    """Runs a job whose processes have these disks; its tokens are compared with those of a process without a store."""

    def run(*disks: str) -> list[TokenTable]:
        with monkeypatch.context() as patch:
            patch.setattr(tokens_module, "local_cache", lambda cache: tmp_path / disks[jax.process_index()])
            found = run_as(
                len(disks), lambda _: tokenize_corpus(corpus, tokenizer, 6, CACHE, progress=False), monkeypatch
            )
        for table in found:
            check_same(table, whole)
        return found

    return run


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shares that are tokenised, and of how many."""
    shares, original = list[tuple[int, int]](), tokens_module._write_share

    def write(*given: Any) -> None:
        shares.append(given[-2:])
        original(*given)

    monkeypatch.setattr(tokens_module, "_write_share", write)
    return shares


def test_hosts_that_share_a_store_alone_tokenise_a_share_each(
    tokenise: Tokenise,
    filled: list[tuple[int, int]],
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two processes have one disk, the third has another; a later job with other disks copies what they have made."""
    tokenise("a", "a", "b")
    assert sorted(filled) == [(0, 3), (1, 3), (2, 3)]
    names = store.names(BELOW)
    (folder,) = (tmp_path / "a").iterdir()
    assert sorted({name.rpartition("/")[2] for name in names}) == sorted(path.name for path in folder.iterdir())
    assert len(names) == 3 * 3 + 2
    for disk in "ab":
        (copy,) = (tmp_path / disk).iterdir()
        assert [path.read_bytes() for path in sorted(copy.iterdir())] == [
            path.read_bytes() for path in sorted(folder.iterdir())
        ]
    assert inspect(CACHE).whole
    capsys.readouterr()
    with telling(quiet=False):
        tokenise("c", "b", "c")
    assert len(filled) == 3
    assert store.names(BELOW) == names
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"10 of 10 files of tokens, 0.0 MB, are copied from {CACHE}/{folder.name}", line)
    with telling(quiet=False):
        tokenise("c", "b")
    assert capsys.readouterr().err == ""


def test_a_host_that_has_the_tokens_gives_them_to_the_store(
    tokenise: Tokenise, filled: list[tuple[int, int]], store: Store
) -> None:
    tokenise("a")
    store.objects.clear()
    tokenise("a")
    assert len(store.names(BELOW)) == 5
    store.objects.clear()
    tokenise("b", "a", "c")
    assert filled == [(0, 1)]
    assert len(store.names(BELOW)) == 5


def damage(store: Store, name: str, how: str) -> None:
    """Changes an object whose name ends so."""
    (name,) = (full for full in store.objects if full.endswith(name))
    content, generation = store.objects.pop(name)
    half = len(content) // 2
    if how != "missing":
        content = content[:half] + (bytes([content[half] ^ 1]) + content[half + 1 :]) * (how == "flipped")
        store.objects[name] = content, generation + 10**6


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("ids-1.bin", "flipped"),
        ("offsets-0.bin", "cut"),
        ("missing-1.bin", "missing"),
        (MANIFEST, "flipped"),
        (MANIFEST, "cut"),
    ],
)
def test_damage_in_the_store_is_mended(
    name: str,
    how: str,
    tokenise: Tokenise,
    filled: list[tuple[int, int]],
    store: Store,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once a host lacks the tokens; by that of another, if one has them."""
    tokenise("a", "b")
    damage(store, name, how)
    with telling(quiet=False):
        tokenise("c", "d")
    said = capsys.readouterr().err
    assert f"the token cache {CACHE}/tokens-" in said
    assert "is damaged (" in said
    assert len(filled) == 4
    tokenise("e")
    assert len(filled) == 4
    damage(store, next(n for n in sorted(store.objects, reverse=True) if n.endswith("ids-1.bin"))[-30:], "missing")
    tokenise("f", "a")
    tokenise("g")
    assert len(filled) == 4


def test_damage_on_the_way_and_on_a_disk_is_mended_from_the_store(
    tokenise: Tokenise,
    filled: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenise("a")
    ids = next((tmp_path / "a").glob("*/ids-0.bin"))
    ids.write_bytes(b"1" + ids.read_bytes()[1:])
    original, damaged = TokenStore._get, list[str]()

    def get(self: TokenStore, job: str, path: Path) -> None:
        original(self, job, path)
        if path.name not in damaged:
            damaged.append(path.name)
            path.write_bytes(b"1")

    monkeypatch.setattr(TokenStore, "_get", get)
    with telling(quiet=False):
        tokenise("a")
    assert re.search(rf"{ids.parent} is damaged \(.*\): it is copied from {CACHE}/\S+ again", capsys.readouterr().err)
    assert len(damaged) == 4
    assert filled == [(0, 1)]


def test_tokens_that_are_whole_and_wrong_are_made_again(
    tokenise: Tokenise, filled: list[tuple[int, int]], store: Store, tmp_path: Path
) -> None:
    tokenise("a")
    place = TokenStore(f"{CACHE}/{next((tmp_path / 'a').iterdir()).name}")
    job, manifest = place._read()
    (manifest["about"])["columns"] = 7
    store.objects.pop(f"{place.url[5:]}/{MANIFEST}")
    place.publish(job, manifest, "")
    tokenise("b")
    tokenise("c")
    assert len(filled) == 2


@pytest.mark.parametrize("fault", ["forbidden", "gone"])
def test_a_store_out_of_reach_is_not_taken_for_damaged(
    fault: str, tokenise: Tokenise, filled: list[tuple[int, int]], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenise("a")
    before = dict(store.objects)
    store.forbids = lambda name: name.endswith(MANIFEST if fault == "gone" else "ids-0.bin")
    for disk in "ab" if fault == "gone" else "b":
        with pytest.raises(StoreError, match=r"gs://.* cannot be read or written"):
            tokenise(disk)
    assert store.objects == before
    assert len(filled) == 1


def test_a_store_that_cannot_be_written_is_refused_before_any_work(
    tokenise: Tokenise, filled: list[tuple[int, int]], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "protects", lambda name: True)
    with pytest.raises(StoreError, match=r"gs://.* cannot be read or written"):
        tokenise("a")
    assert not filled


def test_processes_with_other_places_are_refused(
    store: Store, corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for one another in vain."""
    caches = [CACHE, f"{CACHE}/", str(tmp_path / "cache")]
    monkeypatch.setattr(tokens_module, "local_cache", lambda cache: tmp_path / "a")
    found = run_as(2, lambda process: tokenize_corpus(corpus, tokenizer, 6, caches[process], False), monkeypatch)
    check_same(*found)
    assert len(store.names(BELOW)) == 3 * 2 + 2

    def refused(process: int) -> None:
        with pytest.raises(InputError, match=r"other places on gs:// in data.cache"):
            tokenize_corpus(corpus, tokenizer, 6, caches[process], False)

    run_as(3, refused, monkeypatch)


def test_of_two_jobs_both_use_the_tokens_of_the_first(
    tokenise: Tokenise,
    corpus: Corpus,
    tokenizer: Any,
    whole: TokenTable,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, original, here = threading.Barrier(2), TokenStore.publish, threading.local()

    def publish(self: TokenStore, *given: Any) -> None:
        both.wait(60)  # both have written all
        original(self, *given)

    def job(disk: str) -> None:
        here.disk = disk
        check_same(tokenize_corpus(corpus, tokenizer, 6, CACHE, progress=False), whole)

    monkeypatch.setattr(TokenStore, "publish", publish)
    monkeypatch.setattr(tokens_module, "local_cache", lambda cache: tmp_path / here.disk)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(job, "ab"))
    assert len(store.names(BELOW)) == 5


def test_what_failed_jobs_left_goes_when_it_is_old(tokenise: Tokenise, store: Store, tmp_path: Path) -> None:
    """Of any text; never what is published, however old."""
    tokenise("a")
    name = next((tmp_path / "a").iterdir()).name
    published = {f"{BELOW}/{found}" for found in store.names(BELOW)}
    other = name[:-16] + "0" * 16
    left = [f"{BELOW}/{text}/{job * 16}/ids-0.bin" for text in (name, other) for job in "12"]
    foreign = [f"{BELOW}/{name}/notes.txt", f"{BELOW}/mine/{'1' * 16}/ids-0.bin"]
    for path in (*left, *foreign):
        store.objects[path] = b"1", 10**6
    store.written = dict.fromkeys({*published, left[0], left[2], *foreign}, "2026-01-01T00:00:00.000Z")
    damage(store, next(path for path in published if "ids-" in path), "cut")
    tokenise("b")  # which makes them again
    kept = published | {left[1], left[3], *foreign}
    assert kept <= store.objects.keys()
    assert not {left[0], left[2]} & store.objects.keys()
    store.written = {}


def test_a_cache_on_another_store_is_refused(corpus: Corpus, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"data.cache is s3://b/c: .* Give a folder, or a place on gs://"):
        tokenize_corpus(corpus, tokenizer, 6, "s3://b/c", progress=False)
    check_cache(str(DataConfig().cache))


@pytest.mark.full
@pytest.mark.parametrize("moment", ["object", "body", "answer"])
def test_a_process_killed_between_uploads_leaves_no_tokens(
    moment: str, tiny_bert: Path, long_text: Path, store: Store, tmp_path: Path
) -> None:
    words = ["-c", TOKENISE, str(tiny_bert), str(long_text)]
    homes = {process: {"HOME": str(tmp_path / f"home-{process}")} for process in range(2)}
    writes = 0
    with Job(2, [*words, CACHE], tmp_path / "killed", homes) as job:

        def on_write(when: str) -> None:
            nonlocal writes
            writes += when == moment
            if writes == 4:
                job.send(signal.SIGKILL, 1)
                raise ConnectionError("killed")

        store.on_write = on_write
        job.ends(120, without=1)
        assert job.processes[1].wait(10) == -9
        store.on_write = Store.on_write
    assert not any(name.endswith(MANIFEST) for name in store.objects)
    said = []
    for attempt in range(2):  # makes them; finds them
        with Job(2, [*words, CACHE], tmp_path / f"again-{attempt}", homes) as job:
            assert job.ends(180) == [0, 0], job.said()
            said += [job.log(process) for process in range(2)]
        homes = {process: {"HOME": str(tmp_path / f"new-{process}")} for process in range(2)}
    with Job(1, [*words, str(tmp_path / "local")], tmp_path / "alone") as job:
        assert job.ends(180) == [0], job.said()
        said.append(job.log(0))
    found = [line for log in said for line in log.splitlines() if line.startswith("tokens")]
    assert len(found) == 5
    assert len(set(found)) == 1
    assert ["are copied to gs://" in log for log in said] == [True, True, False, False, False]
    names = [name for name in store.names(BELOW) if "/ids-" in name]
    assert {name.split("/")[-1] for name in names} >= {"ids-0.bin", "ids-1.bin"}
