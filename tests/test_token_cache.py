"""Tokens on disk: written in shares by the processes of a job, and read as one text of which little stays in memory."""

import gc
import json
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import pytest

import simcse_jax.data.pieces as pieces_module
import simcse_jax.data.token_cache as cache_module
import simcse_jax.data.tokens as tokens_module
from simcse_jax.config import DataConfig
from simcse_jax.data.corpus import Corpus, open_corpus
from simcse_jax.data.files import Files
from simcse_jax.data.pieces import Pieces
from simcse_jax.data.table import TokenTable
from simcse_jax.data.token_cache import TokenCache
from simcse_jax.data.tokens import _owners, _write_share, chunked, corpus_blocks, tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.reports.progress import telling
from simcse_jax.storage import records
from simcse_jax.storage.manifest import MANIFEST

T = TypeVar("T")
WORDS = np.array(["man", "woman", "dog", "cat", "runs", "eats", "sees", "red", "house", "river", "never", "two", " "])


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return load_tokenizer(tiny_bert)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_CHUNK", 7)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences, some of them blank."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(count)]


def text_of(kind: str, folder: Path) -> Corpus:
    config: dict[str, Any] = {}
    path = folder / "text.txt"
    if kind == "files":
        path = folder / "text"
        path.mkdir()
        for number, count in enumerate((30, 3, 0, 41, 9)):
            (path / f"{number}.txt").write_text("".join(f"{line}\n" for line in sentences(count, number)))
    elif kind == "triplets":
        path = folder / "text.jsonl"
        rows = zip(sentences(90), sentences(90, 1), sentences(90, 2), strict=True)
        named = [dict(zip(("sentence", "positive", "negative"), row, strict=True)) for row in rows]
        for row in named[::3]:
            row["negative"] = ""
        path.write_text("".join(json.dumps(row) + "\n" for row in named))
    else:
        path.write_text("".join(f"{line}\n" for line in sentences(100)))
        config = {"neighbours": 3} if kind == "neighbours" else {}
    return open_corpus(DataConfig(train=str(path), **config))


def run_as(
    count: int,
    action: Callable[[int], T],
    monkeypatch: pytest.MonkeyPatch,
) -> list[T]:
    """Runs an action as each process of a job would, in threads; caches of one path are shared."""
    here, barrier, said = threading.local(), threading.Barrier(count), [None] * count

    def gather(value: Any) -> list[Any]:
        said[here.process] = value
        barrier.wait(60)
        found = list(said)
        barrier.wait(60)
        return found

    def sharing(folder: Path | None) -> list[int]:
        return [process for process, other in enumerate(gather(folder)) if folder is not None and other == folder]

    def run(process: int) -> T:
        here.process = process
        try:
            return action(process)
        except BaseException:
            barrier.abort()
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(jax, "process_index", lambda: here.process)
        patch.setattr(cache_module, "gather_texts", gather)
        patch.setattr(cache_module, "sharing", sharing)
        return [started.result() for started in [pool.submit(run, process) for process in range(count)]]


def check_same(found: TokenTable, whole: TokenTable) -> None:
    np.testing.assert_array_equal(found.ids, whole.ids)
    np.testing.assert_array_equal(found.offsets, whole.offsets)
    chosen = np.random.default_rng(1).permutation(len(whole))
    for name in ("rows", "spans", "texts", "present"):
        ours, theirs = jax.tree.leaves(getattr(found, name)(chosen)), jax.tree.leaves(getattr(whole, name)(chosen))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    for name in ("columns", "skipped", "fingerprint", "origin", "mean_length"):
        assert getattr(found, name) == getattr(whole, name), name


KINDS = ("lines", "files", "triplets", "neighbours")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4, 7])
def test_shares_are_read_as_one_text(
    kind: str, count: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of processes that wrote them, they give what one process writes, to each that reads them."""
    corpus = text_of(kind, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "_CHUNK", 8192)
        whole = tokenize_corpus(corpus, tokenizer, 6, tmp_path / "whole", progress=False)
    cache = tmp_path / "cache"
    found = run_as(count, lambda _: tokenize_corpus(corpus, tokenizer, 6, cache, progress=False), monkeypatch)
    for table in found:
        check_same(table, whole)
    (folder,) = cache.iterdir()
    written = [(folder / f"ids-{share}.bin").stat().st_size for share in range(count)]
    assert all(written)
    assert max(written) < sum(written) * 2 / count
    check_same(tokenize_corpus(corpus, tokenizer, 6, cache, progress=False), whole)


def test_a_share_may_have_any_number_of_blocks(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what is read of a JSON file."""
    corpus = text_of("lines", tmp_path)
    whole = tokenize_corpus(corpus, tokenizer, 6, tmp_path / "whole", progress=False)
    monkeypatch.setattr(tokens_module, "_CHUNK", 1)
    monkeypatch.setattr(records, "LARGEST", 1200)
    for table in run_as(2, lambda _: tokenize_corpus(corpus, tokenizer, 6, tmp_path / "cache", False), monkeypatch):
        check_same(table, whole)


def test_a_process_reads_its_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as these can be divided among the processes; all read the others, so that none is left without work."""
    corpus, read = text_of("files", tmp_path), list[list[str]]()
    original = Files.rows

    def rows(self: Files, columns: tuple[str, ...]) -> Any:
        read[-1] += [path.name for path in self.paths]
        return original(self, columns)

    monkeypatch.setattr(Files, "rows", rows)
    found = []
    for share in range(2):
        read.append([])
        found += list(corpus_blocks(corpus, share, 2))
    assert [name for name in ("0.txt", "3.txt") if (name in read[0]) != (name in read[1])] == ["0.txt", "3.txt"]
    assert [example for _, block in sorted(found) for example in block] == list(corpus)
    read.append([])
    # A process tokenises neighbouring files together.
    assert [block for _, block in corpus_blocks(corpus, 0, 1)] == list(chunked(iter(corpus)))


@pytest.mark.parametrize(
    ("sizes", "shares", "owners"),
    [
        ([5, 5, 5, 5], 2, [0, 1, 0, 1]),
        ([5, 5, 5, 5, 5], 4, [0, 1, 2, 3, None]),
        ([2, 90, 3], 3, [1, None, 0]),
        ([7, 0, 4], 1, [0, 0, 0]),
        ([1], 2, [None]),
    ],
)
def test_files_are_divided_fairly(sizes: list[int], shares: int, owners: list[int | None]) -> None:
    assert _owners(sizes, shares) == owners


def test_processes_with_different_texts_are_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train on examples of its own."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"a man\n{name}\n")
    texts = [open_corpus(DataConfig(train=str(tmp_path / f"{name}.txt"))) for name in "aab"]

    def fails(process: int) -> None:
        with pytest.raises(InputError, match="process 2 of 3 has other text, or another tokenizer"):
            tokenize_corpus(texts[process], tokenizer, 6, tmp_path / "cache", progress=False)

    run_as(3, fails, monkeypatch)
    assert not (tmp_path / "cache").exists()


def test_caches_of_several_hosts(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has all of the text, made by its own processes; what is there already is not made again."""
    corpus = text_of("lines", tmp_path)
    caches = [tmp_path / name for name in ("a", "a", "b", "c", "b")]
    whole = tokenize_corpus(corpus, tokenizer, 6, tmp_path / "c", progress=False)
    (there,) = (tmp_path / "c").iterdir()
    made = (there / MANIFEST).stat().st_mtime_ns
    with telling(quiet=False):
        found = run_as(
            5, lambda process: tokenize_corpus(corpus, tokenizer, 6, caches[process], progress=False), monkeypatch
        )
    for table in found:
        check_same(table, whole)
    shares = {name: len(list((tmp_path / name).glob("*/ids-*.bin"))) for name in "abc"}
    assert shares == {"a": 2, "b": 2, "c": 1}
    assert (there / MANIFEST).stat().st_mtime_ns == made
    said = re.findall(r"4 processes need the tokens and 2 of them share the cache \S+/(\w):", capsys.readouterr().err)
    assert sorted(said) == ["a", "b"]


def test_a_folder_that_a_host_does_not_see_yet_is_waited_for(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems remember for a while that it was not there; the others show that it is."""
    corpus, cache = text_of("lines", tmp_path), tmp_path / "cache"
    whole = tokenize_corpus(corpus, tokenizer, 6, cache, progress=False)
    (folder,) = cache.iterdir()
    made, original, unseen = (folder / MANIFEST).stat().st_mtime_ns, TokenCache._copy, [1, 1, 1]

    def copy(self: TokenCache) -> str:
        return self.folder.name if jax.process_index() == 1 and unseen and unseen.pop() else original(self)

    monkeypatch.setattr(TokenCache, "_copy", copy)
    for table in run_as(3, lambda _: tokenize_corpus(corpus, tokenizer, 6, cache, progress=False), monkeypatch):
        check_same(table, whole)
    assert not unseen
    assert (folder / MANIFEST).stat().st_mtime_ns == made


@pytest.mark.parametrize("name", ["ids-2.bin", "offsets-1.bin", "missing-0.bin", "blocks.bin", MANIFEST])
def test_damage_that_one_process_finds_is_mended_by_all(
    name: str,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus, cache = text_of("triplets", tmp_path), tmp_path / "cache"
    act = partial(
        run_as, 3, lambda _: tokenize_corpus(corpus, tokenizer, 6, cache, progress=False), monkeypatch=monkeypatch
    )
    whole = act()[0]
    check_same(whole, tokenize_corpus(corpus, tokenizer, 6, tmp_path / "whole", progress=False))
    (folder,) = cache.iterdir()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    expected = [np.array(whole.ids), np.array(whole.offsets)]
    del whole
    (folder / name).write_bytes(content)
    with telling(quiet=False):
        found = act()
    assert f"the token cache {folder} is damaged" in capsys.readouterr().err
    for table in found:
        np.testing.assert_array_equal(table.ids, expected[0])
        np.testing.assert_array_equal(table.offsets, expected[1])
    assert list(cache.iterdir()) == [folder]
    with telling(quiet=False):
        act()
    assert capsys.readouterr().err == ""


def test_a_process_that_fails_leaves_no_tokens(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it in vain; the next job writes all."""
    corpus, cache = text_of("lines", tmp_path), tmp_path / "cache"

    def fail(corpus: Corpus, tokenizer: Any, length: int, progress: bool, folder: Path, share: int, n: int) -> None:
        _write_share(corpus, tokenizer, length, progress, folder, share, n)
        if share == 1:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "_write_share", fail)
        with pytest.raises((InputError, threading.BrokenBarrierError)):
            run_as(3, lambda _: tokenize_corpus(corpus, tokenizer, 6, cache, progress=False), patch)
    assert not list(cache.glob("tokens-*"))
    assert len(tokenize_corpus(corpus, tokenizer, 6, cache, progress=False)) > 90


@pytest.mark.parametrize("damaged", [False, True])
def test_two_jobs_fill_a_cache_at_once(
    damaged: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both go on, with what the first of them has published."""
    corpus, cache = text_of("lines", tmp_path), tmp_path / "cache"
    whole = tokenize_corpus(corpus, tokenizer, 6, tmp_path / "whole", progress=False)
    if damaged:
        (folder,) = (tmp_path / "whole").iterdir()
        shutil.copytree(folder, cache / folder.name)
        (cache / folder.name / "ids-0.bin").write_bytes(b"1")
    both, published = threading.Barrier(2), list[int]()
    original = TokenCache._publish

    def publish(self: TokenCache, partial: Path) -> None:
        both.wait(60)  # both have written all
        original(self, partial)
        published.append(self.folder.stat().st_ino)

    monkeypatch.setattr(TokenCache, "_publish", publish)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(tokenize_corpus, corpus, tokenizer, 6, cache, False) for _ in range(2)]
        for job in jobs:
            check_same(job.result(), whole)
    assert [path.stat().st_ino for path in cache.iterdir()] == published[-1:]
    if not damaged:
        assert published[0] == published[1]


@pytest.mark.parametrize("blank", [1, 2])
def test_blank_text_is_refused_whatever_the_shares(
    blank: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count is that of all shares."""
    path, last = tmp_path / "text.tsv", "" if blank == 2 else "c"
    path.write_text("sentence\tpositive\tnegative\n" + f"{'a' * (blank == 2)}\tb\t{last}\n" * 20)
    corpus = open_corpus(DataConfig(train=str(path), columns=("sentence", "positive", "negative")))
    expected = "only blank ones (20)" if blank == 1 else "is blank in all 20 examples"

    def fails(process: int) -> None:
        with pytest.raises((InputError, threading.BrokenBarrierError)) as refused:
            tokenize_corpus(corpus, tokenizer, 6, tmp_path / "cache", progress=False)
        assert process or expected in str(refused.value)
        raise refused.value

    with pytest.raises((InputError, threading.BrokenBarrierError)):
        run_as(3, fails, monkeypatch)


def pieces_of(folder: Path, added: bool) -> tuple[Pieces, np.ndarray]:
    """Pieces of three files, in another order than they lie there, and their numbers."""
    rng = np.random.default_rng(2)
    sizes, file = rng.integers(1, 90, 12), rng.integers(0, 3, 12)
    file[:3] = 2, 0, 1
    numbers = [rng.integers(0, 1000, sizes[file == n].sum()) for n in range(3)]
    for n, content in enumerate(numbers):
        content.tofile(folder / f"{n}.bin")
    start = np.array([sizes[:at][file[:at] == file[at]].sum() for at in range(12)])
    plus = rng.integers(0, 10**9, 12) if added else None
    whole = [
        numbers[n][a : a + size] + (0 if plus is None else plus[at])
        for at, (n, a, size) in enumerate(zip(file, start, sizes, strict=True))
    ]
    return Pieces([folder / f"{n}.bin" for n in range(3)], "int64", file, start, sizes, plus), np.concatenate(whole)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_pieces_are_indexed_as_an_array(
    added: bool, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(pieces_module, "_MAPPED", 0)
    pieces, expected = pieces_of(tmp_path, added)
    assert len(pieces) == len(expected)
    assert pieces.dtype == np.int64
    np.testing.assert_array_equal(pieces, expected)
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(0, len(expected) + 1, 2)
        np.testing.assert_array_equal(pieces[a:b], expected[a:b])
        assert pieces[int(a) - 1] == expected[a - 1]
        index = rng.integers(0, len(expected), (3, 4))
        np.testing.assert_array_equal(pieces[index], expected[index])
    np.testing.assert_array_equal(pieces[:], expected)
    with pytest.raises(IndexError):
        pieces[len(expected)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of NumPy, whose second number for a file is refused
@pytest.mark.full
def test_too_many_open_files_are_no_damage(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever file it is that cannot be opened any more."""
    corpus, cache = text_of("triplets", tmp_path), tmp_path / "cache"
    read = partial(tokenize_corpus, corpus, tokenizer, 6, cache, progress=False)
    run_as(4, lambda _: read(), monkeypatch)
    read()
    (folder,) = cache.iterdir()
    made, before, outcomes = (folder / MANIFEST).stat().st_mtime_ns, resource.getrlimit(resource.RLIMIT_NOFILE), []
    used = max(int(number.name) for number in Path("/proc/self/fd").iterdir())
    fillers = [os.open(os.devnull, os.O_RDONLY)]  # for numbers below that are free
    while fillers[-1] <= used:
        fillers.append(os.open(os.devnull, os.O_RDONLY))
    used = fillers[-1]
    for more in range(1, 25):
        gc.collect()
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, before[1]))
        try:
            with telling(quiet=False):
                read()
            outcomes.append("read")
        except InputError as error:
            outcomes.append(re.sub(r".*/", "", str(error)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for number in fillers:
        os.close(number)
    assert outcomes[-1] == "read"
    refused = set(outcomes) - {"read"}
    assert len(refused) > 1
    assert all(
        text.endswith("cannot be opened (Too many open files): raise the limit of a process (ulimit -n)")
        for text in refused
    ), refused
    assert capsys.readouterr().err == ""
    assert (folder / MANIFEST).stat().st_mtime_ns == made


def resident() -> int:
    """Bytes of files that are mapped into this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssFile:\s*(\d+)", status)[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_little_of_a_large_file_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**23
    np.arange(size).tofile(tmp_path / "a.bin")  # 64 MB
    monkeypatch.setattr(pieces_module, "_MAPPED", 2**25)
    one, files = np.array([0]), len(list(Path("/proc/self/fd").iterdir()))
    pieces = Pieces([tmp_path / "a.bin"], "int64", one, one, np.array([size]))
    before, most = resident(), 0
    for index in np.random.default_rng(0).integers(0, size, (20, 1000)):
        np.testing.assert_array_equal(pieces[index], index)
        most = max(most, resident() - before)
    assert most < 2**23
    (tmp_path / "a.bin").write_bytes(b"1" * 80)
    with pytest.raises(OSError, match="has become shorter"):
        pieces[index]
    del pieces
    assert len(list(Path("/proc/self/fd").iterdir())) == files
