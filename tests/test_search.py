"""Search: the index against NumPy, the Python tool, the command."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.errors import InputError
from simcse_jax.inference import nearest
from simcse_jax.inference.index import Hit, Index
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.inference.vectors import cosines
from simcse_jax.storage.manifest import write_manifest
from tests.conftest import SENTENCES, TINY_BERT, write_model

RNG = np.random.default_rng(0)


def unit(count: int, width: int = 16) -> np.ndarray:
    """Vectors of length 1."""
    x = RNG.normal(size=(count, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def names(count: int) -> list[str]:
    return [f"sentence {i}" for i in range(count)]


def by_hand(vectors: np.ndarray, queries: np.ndarray, top_k: int) -> list[list[int]]:
    """Numbers of the best; of equal scores the lower number first."""
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    return [np.argsort(-row, kind="stable")[:top_k].tolist() for row in scores]


def numbers(found: list[list[Hit]]) -> list[list[int]]:
    return [[hit.index for hit in hits] for hits in found]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_exact(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Also over several blocks, the last of them full or not, and over several parts of the queries."""
    monkeypatch.setattr(nearest, "_BLOCK", 256)
    vectors, queries = unit(count), unit(70)
    index = Index(names(count), vectors)
    found = index.search(queries, top_k=7)
    assert numbers(found) == by_hand(vectors, queries, 7)
    for row, hits in enumerate(found):
        assert [type(hit.score) for hit in hits] == [float] * min(7, count)
        expected = vectors[[hit.index for hit in hits]] @ queries[row]
        np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-6)
        assert [hit.sentence for hit in hits] == [f"sentence {hit.index}" for hit in hits]
    json.dumps([hit.score for hit in found[0]])
    assert np.array_equal(index.vectors, vectors)


def test_more_than_there_are() -> None:
    vectors = unit(11)
    found = Index(names(11), vectors).search(vectors[:2], top_k=1000)
    assert numbers(found) == by_hand(vectors, vectors[:2], 1000)
    assert len(found[0]) == 11


@pytest.mark.parametrize("backend", ["jax", "faiss-flat"])
def test_blank_sentences_are_not_found(tmp_path: Path, backend: Any) -> None:
    """They keep their numbers and vectors, added and saved as well, and do not count among the hits asked for."""
    if backend != "jax":
        pytest.importorskip("faiss")
    vectors = unit(7)
    texts = ["", "a", " \t", "b", "c", "", "d"]
    index = Index(texts[:4], vectors[:4], backend)
    index.add(texts[4:], vectors[4:])
    index.save(tmp_path / "index")
    filled = np.array([1, 3, 4, 6])
    for searched in (index, Index.load(tmp_path / "index")):
        found = searched.search(vectors, top_k=3)
        assert numbers(found) == [filled[row].tolist() for row in by_hand(vectors[filled], vectors, 3)]
        assert [[hit.sentence for hit in hits] for hits in found] == [[texts[i] for i in row] for row in numbers(found)]
        assert [len(hits) for hits in searched.search(vectors, top_k=100)] == [4] * 7
        assert (len(searched), searched.sentences) == (7, texts)
        np.testing.assert_array_equal(searched.vectors, vectors)
        assert all(np.array_equal(searched.vector(i), vectors[i]) for i in range(7))
    assert Index(["", " "], vectors[:2], backend).search(vectors[:1]) == [[]]


@pytest.mark.parametrize("width", [3, 384, 1024])
@pytest.mark.parametrize("backend", ["jax", "faiss-flat"])
def test_copies_have_a_cosine_of_one(backend: Any, width: int) -> None:
    """All of them, in their order, found with the threshold 1, and no cosine is beyond it."""
    if backend != "jax":
        pytest.importorskip("faiss")
    vectors = unit(40, width)
    index = Index(names(80), np.concatenate([vectors, vectors]), backend)
    found = index.search(vectors, top_k=5, threshold=1.0)
    assert [sorted(row) for row in numbers(found)] == [[i, i + 40] for i in range(40)]
    if backend == "jax":
        assert numbers(found) == [[i, i + 40] for i in range(40)]
    assert {hit.score for row in found for hit in row} == {1.0}
    opposite = index.search(-vectors, top_k=80)
    assert {row[-1].score for row in opposite} == {-1.0}
    assert np.all(np.diag(cosines(7 * vectors, vectors)) == 1)
    assert np.all(np.abs(cosines(vectors, np.concatenate([vectors, -vectors]))) <= 1)
    # Inner products of other vectors are what they are.
    assert Index(["a"], 3 * vectors[:1], backend).search(vectors[:1])[0][0].score == pytest.approx(3)
    assert Index(["a"], vectors[:1], backend).search(3 * vectors[:1])[0][0].score == pytest.approx(3)


def test_threshold_is_inclusive() -> None:
    index = Index(names(4), np.array([[1, 0], [0.5, 0], [0.25, 0], [-1, 0]], np.float32))
    query = np.array([[1, 0]], np.float32)
    assert numbers(index.search(query, 3, 0.5)) == [[0, 1]]
    assert numbers(index.search(query, 1, 0.5)) == [[0]]
    assert numbers(index.search(query, 4, 1.5)) == [[]]
    assert numbers(index.search(query, 4)) == [[0, 1, 2, 3]]


def test_ties_are_in_the_order_of_the_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a block and across blocks, with more ties than hits."""
    monkeypatch.setattr(nearest, "_BLOCK", 4096)
    few = unit(5)
    chosen = RNG.integers(0, 5, 9000)
    found = Index(names(9000), few[chosen]).search(few, top_k=12)
    for row, hits in enumerate(found):
        assert [hit.index for hit in hits] == np.flatnonzero(chosen == row)[:12].tolist()


@pytest.mark.parametrize("count", [1, 8, 16, 100])
def test_groups_give_what_top_k_gives(count: int) -> None:
    """With many ties, and rows that are nothing but ties."""
    scores = np.round(RNG.normal(size=(6, 4096)), 1).astype(np.float32)
    scores[4], scores[5, 100:] = 1, -np.inf
    found = nearest._top_k(jnp.asarray(scores), count)
    for ours, theirs in zip(found, jax.lax.top_k(scores, count), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("backend", ["jax", "faiss-flat"])
def test_empty_then_added_to(backend: Any) -> None:
    if backend != "jax":
        pytest.importorskip("faiss")
    index = Index([], np.zeros((0, 16), np.float32), backend)
    vectors = unit(300)
    assert (len(index), index.search(vectors[:2]), index.vectors.shape) == (0, [[], []], (0, 16))
    mine = names(100)
    index.add(mine, vectors[:100])
    index.add([], vectors[:0])
    index.add(["sentence 100"], vectors[100:101])
    index.add(names(300)[101:], vectors[101:])
    assert mine == names(100)
    assert index.sentences == names(300)
    assert np.array_equal(index.vectors, vectors)
    assert np.array_equal(index.vector(260), vectors[260])
    queries = unit(3)
    assert numbers(index.search(queries, 9)) == by_hand(vectors, queries, 9)
    assert index.search(np.zeros((0, 16), np.float32)) == []


def test_searches_beside_additions_see_all_or_nothing() -> None:
    """In threads: each sentence has the vector of its number, in whatever order they were added."""
    index = Index([], np.zeros((0, 8), np.float32))
    vectors = unit(160, 8)

    def work(number: int) -> bool:
        chosen = np.arange(number * 10, number * 10 + 10)
        index.add([str(n) for n in chosen], vectors[chosen])
        found = index.search(vectors[chosen], top_k=1)
        return [hits[0].sentence for hits in found] == [str(n) for n in chosen]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))
    added = [int(sentence) for sentence in index.sentences]
    np.testing.assert_array_equal(index.vectors, vectors[added])


def test_bad_input_leaves_the_index_as_it_was() -> None:
    vectors = unit(3)
    index = Index(names(3), vectors)
    bad = np.full((1, 16), np.nan, np.float32)
    for call, words in [
        (lambda: index.add(names(2), unit(1)), r"2 sentences and vectors of shape \[1, 16\]"),
        (lambda: index.add(["a"], unit(1, 8)), r"\[1, 8\]; expected .* \[N, 16\]"),
        (lambda: index.add("a", unit(1)), "one string"),
        (lambda: index.add(["a"], bad), "not all finite"),
        (lambda: index.search(bad), "not all finite"),
        (lambda: index.search(unit(1, 8)), r"\[queries, 16\]"),
        (lambda: index.add(["a"], np.full((1, 16), 1e300)), "not all finite as float32"),
        (lambda: index.search(np.full((1, 16), 1e300)), "not all finite as float32"),
        (lambda: index.search(unit(1), top_k=0), "top_k is 0"),
        (lambda: index.search(unit(1), threshold=float("nan")), "threshold"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    assert np.array_equal(index.vectors, vectors)
    assert index.sentences == names(3)


@pytest.mark.parametrize("backend", ["jax", "faiss-flat", "faiss-ivf"])
def test_saved_and_loaded(tmp_path: Path, backend: Any) -> None:
    if backend != "jax":
        pytest.importorskip("faiss")
    sentences = [*names(500), "line\nbreak\u2028 and 🙂", "", "\ud800 alone"]
    vectors, queries = unit(503), unit(5)
    index = Index(sentences, vectors, backend, {"model": "m"})
    folder = index.save(tmp_path / "index")
    again = Index.load(folder)
    assert (again.sentences, again.backend, again.about) == (sentences, backend, {"model": "m"})
    assert np.array_equal(again.vectors, vectors)
    assert again.search(queries, 9) == index.search(queries, 9)
    again.add(["more"], queries[:1])
    assert again.search(queries[:1], 1)[0][0].sentence == "more"
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        index.save(folder)

    (folder / "sentences.jsonl").write_text('"one"\n')
    with pytest.raises(InputError, match="is damaged"):
        Index.load(folder)
    (folder / "index.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        Index.load(folder)
    with pytest.raises(InputError, match="not a saved index"):
        Index.load(tmp_path)


@pytest.mark.parametrize("line", ["1", "null", '["a"]'])
def test_damaged_sentences(tmp_path: Path, line: str) -> None:
    folder = Index(names(3), unit(3)).save(tmp_path / "index")
    (folder / "sentences.jsonl").write_text(f'"a"\n{line}\n"b"\n')
    with pytest.raises(InputError, match=r"is damaged \(a line of sentences.jsonl that is no string"):
        Index.load(folder)


def test_damaged_vectors(tmp_path: Path) -> None:
    folder = Index(names(3), unit(3)).save(tmp_path / "index")
    for kind in (np.complex64, np.float64, bool):
        np.save(folder / "vectors.npy", unit(3).astype(kind))
        with pytest.raises(InputError, match=rf"is damaged .*vectors.npy is of type {np.dtype(kind)}"):
            Index.load(folder)
    with (folder / "vectors.npy").open("wb") as file:
        np.savez(file, unit(3))
    with pytest.raises(InputError, match="is damaged"):
        Index.load(folder)


def at(cells: np.ndarray, place: int, number: int) -> np.ndarray:
    """A copy of cells with another number at a place."""
    return np.frombuffer(
        cells.tobytes()[:place] + number.to_bytes(8, "little") + cells.tobytes()[place + 8 :], np.uint8
    )


def test_damaged_cells(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    folder = Index(names(100), unit(100), "faiss-ivf").save(tmp_path / "index")
    cells = np.load(folder / "cells.npy")
    other = Index(names(100), unit(100, 8), "faiss-ivf").save(tmp_path / "other")
    for damaged, words in [
        (cells[:120], "2 cells of width 16 in 120 bytes"),
        (cells[:0], "cells that are no IndexIVFFlat"),
        (cells.astype(np.float32), "cells.npy is of type float32"),
        (np.load(other / "cells.npy"), "cells that are no IndexIVFFlat of width 16"),
        # faiss's reader would take 8 GiB for the first, and look for its end for the second.
        (at(cells, 37, 2**31), "2,147,483,648 cells"),
        (at(cells, 45, 2**40), None),
        (at(cells, 90, 2**31), "2 cells"),
        (at(cells, 98, 0x7FC00000), "cells whose centres are not finite"),
    ]:
        np.save(folder / "cells.npy", damaged)
        write_manifest(folder, {})  # as if a program that is not ours had written them
        if words is None:  # a number of cells to search, which we choose ourselves
            assert len(Index.load(folder).search(unit(1), 3)[0]) == 3
            continue
        with pytest.raises(InputError, match=rf"the index .* is damaged \({words}"):
            Index.load(folder)


def test_an_index_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simcse_jax.inference.index.write_json", full)
    with pytest.raises(InputError, match="No space left"):
        Index(names(3), unit(3)).save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_faiss_cells_find_nearly_all() -> None:
    """With vectors in clusters, as those of sentences are."""
    pytest.importorskip("faiss")
    centres = unit(40)
    vectors = centres[RNG.integers(0, 40, 4000)] + 0.1 * RNG.normal(size=(4000, 16)).astype(np.float32)
    queries = vectors[:50] + 0.02 * RNG.normal(size=(50, 16)).astype(np.float32)
    exact = by_hand(vectors, queries, 10)
    index = Index(names(4000), vectors, "faiss-ivf")
    found = numbers(index.search(queries, 10))
    assert index._nearest._index.nlist == 63  # type: ignore[attr-defined]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.9
    with pytest.raises(InputError, match="learns its cells"):
        Index([], unit(0), "faiss-ivf")


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'simcse-jax\[search\]'"):
        Index(names(2), unit(2), "faiss-flat")


def test_settings_are_checked_before_the_sentences_are_encoded(
    model: SimCSE, tiny_bert: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def encoded(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(model, "index", Index(["a"], unit(1, 32)))
    monkeypatch.setattr(SimCSE, "encode", encoded)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="faiss-cpu"):
        model.build_index(["a"], "faiss-flat")
    with pytest.raises(InputError, match="top_k is 0"):
        model.search("a", top_k=0)
    for option, words in [(["--top-k", "0"], "top_k is 0"), (["--backend", "faiss-ivf"], "faiss-cpu")]:
        with pytest.raises(SystemExit, match="2"):
            main(["search", str(tiny_bert), str(text_file), "a", "--pooler", "avg", *option])
        assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> SimCSE:
    return SimCSE(tiny_bert, "avg")


def test_tool(model: SimCSE, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no index"):
        model.search("a man")
    mine = list(SENTENCES)
    model.build_index(mine)
    model.add_to_index(["Two dogs run."])
    assert mine == SENTENCES
    hits = model.search(SENTENCES[1], top_k=3, threshold=-1.0)
    cosines = model.similarity(SENTENCES[1], [*SENTENCES, "Two dogs run."])[0]
    assert [hit.index for hit in hits] == np.argsort(-cosines, kind="stable")[:3].tolist()
    assert hits[0].sentence == SENTENCES[1]
    np.testing.assert_allclose([score for _, score in hits], np.sort(cosines)[::-1][:3], atol=1e-6)
    json.dumps([score for _, score in hits])
    several = model.search(SENTENCES[:2], top_k=3, threshold=-1.0)
    assert [hit.index for hit in several[1]] == [hit.index for hit in hits]
    assert model.search([]) == []
    assert [hit.index for hit in model.search(SENTENCES[1], top_k=8, threshold=1.0)] == [1]
    assert len(model.search(SENTENCES[1], top_k=8)) == 8  # whatever their cosine
    np.testing.assert_allclose(model.similarity(SENTENCES[1], 3 * model.encode(SENTENCES))[0], cosines[:-1], atol=1e-6)

    model.save_index(tmp_path / "index")
    again = SimCSE(tiny_bert, "avg")
    again.load_index(tmp_path / "index")
    assert again.search(SENTENCES[1], 3, -1.0) == hits
    again.add_to_index(["a"])
    kept = again.index
    with pytest.raises(InputError, match=r"pooler was 'avg', is 'cls'\): load the model with pooler='avg'"):
        SimCSE(tiny_bert, "cls").load_index(tmp_path / "index")
    other = SimCSE(write_model(tmp_path / "other", TINY_BERT, seed=1), "avg")
    with pytest.raises(InputError, match=r"another vector for .* load it with the model and the settings"):
        other.load_index(tmp_path / "index")
    with pytest.raises(InputError, match="not a saved index"):
        again.load_index(tmp_path)
    assert again.index is kept
    narrow = TINY_BERT | {"hidden_size": 16}
    other = SimCSE(write_model(tmp_path / "narrow", narrow), "avg")
    with pytest.raises(InputError, match=r"vectors of width 32, those of .* have 16"):
        other.load_index(tmp_path / "index")


def test_a_string_is_not_taken_for_a_path(model: SimCSE, text_file: Path) -> None:
    for call in (model.build_index, model.add_to_index):
        with pytest.raises(InputError, match=r"not from the string .* Path\(name\)"):
            call(str(text_file))
    model.build_index(text_file)
    assert model.index is not None
    assert model.index.sentences == text_file.read_text().splitlines()
    with pytest.raises(InputError, match="no file"):
        model.build_index(Path("nowhere.txt"))


def test_similarity_of_vectors(model: SimCSE) -> None:
    """Of NumPy's and of JAX's, of one and of several, of any type of number."""
    vectors = model.encode(SENTENCES)
    expected = model.similarity(SENTENCES[0], SENTENCES)
    for one in (vectors[0], vectors[:1], jnp.asarray(vectors[0]), vectors[0].astype(np.float64)):
        np.testing.assert_allclose(model.similarity(one, jnp.asarray(vectors)), expected, atol=1e-6)
    half = model.similarity(jnp.asarray(vectors[0], jnp.bfloat16), vectors)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, expected, atol=1e-2)


def test_text_that_is_not_unicode(model: SimCSE, tiny_bert: Path, text_file: Path, capsys: Any) -> None:
    """Half of a surrogate pair, and bytes of another encoding on the command line."""
    for call in (model.encode, model.build_index):
        with pytest.raises(InputError, match="sentence number 2 has half of a surrogate pair at character 4"):
            call(["a", "caf\udce9"])
    with pytest.raises(SystemExit, match="2"):
        main(["search", str(tiny_bert), str(text_file), "caf\udce9", "--pooler", "avg"])
    assert "sentence number 1 has half of a surrogate pair" in capsys.readouterr().err


def test_encode_settings(model: SimCSE) -> None:
    reference = model.encode(SENTENCES)
    assert isinstance(model.encode(SENTENCES, output="jax"), jax.Array)
    np.testing.assert_array_equal(model.encode(SENTENCES, output="jax"), reference)
    np.testing.assert_allclose(model.encode(SENTENCES, batch_size=2), reference, atol=1e-6)
    assert np.max(np.abs(model.encode(SENTENCES, max_length=5) - reference)) > 1e-2
    np.testing.assert_allclose(model.encode("", normalize=True), model.encode([""])[0])
    for settings, words in [({"batch_size": 0}, "batch_size is 0"), ({"max_length": 0}, "max_length is 0")]:
        with pytest.raises(InputError, match=words):
            model.encode(["a"], **settings)


def test_wrong_types(tiny_bert: Path) -> None:
    """In a process of its own: in this one, annotated types are checked first."""
    code = f"""
import numpy as np
from simcse_jax import InputError, SimCSE
from simcse_jax.inference.index import Index
from simcse_jax.storage.manifest import write_manifest

model = SimCSE({str(tiny_bert)!r}, "avg")
model.build_index(["a"])
for call in (
    lambda: Index([], np.zeros(16)),
    lambda: Index([], np.zeros((0, 16)), "annoy"),
    lambda: model.encode(["a", 3]),
    lambda: model.encode(["a"], long_text="fold"),
    lambda: model.encode(["a"], output="torch"),
    lambda: model.build_index("a.txt"),
    lambda: Index(["a"], np.ones((1, 16), complex)),
    lambda: Index(["a"], np.ones((1, 16))).search(np.ones((1, 16)), top_k=2.5),
    lambda: model.encode(["a"], max_length=3.5),
    lambda: model.encode(["a"], batch_size=2.5),
    lambda: model.similarity(np.array(["a"], bytes), "b"),
    lambda: model.similarity(np.ones((2, 2, 32)), "b"),
    lambda: model.search("a", threshold="b"),
    lambda: model.search("a", top_k=None),
    lambda: model.encode(None),
    lambda: model.encode(__import__("pathlib").Path("a.txt")),
    lambda: model.encode(["a"], prompt=5),
    lambda: model.build_index(["a"], ["jax"]),
    lambda: Index(["a"], [[1.0], [1.0, 2.0]]),
    lambda: Index(["a"], np.ones((1, 16))).search("a"),
    lambda: SimCSE("a", 5),
):
    try:
        call()
    except InputError as error:
        print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    words = ["shape [16]", "unknown backend 'annoy'", "number 2 is a int", "long_text is 'fold'", "output is 'torch'"]
    words += ["not from the string 'a.txt'", "vectors are of type complex128", "top_k is 2.5", "max_length is 3.5"]
    words += ["batch_size is 2.5", "an array of type |S1", "shape [2, 2, 32]"]
    words += ["threshold is 'b', not a number", "top_k is None", "are a NoneType", "lines of the file", "prompt is 5"]
    words += ["unknown backend", "rows of different lengths", "queries are a str", "unknown pooler '5'"]
    assert len(out) == len(words)
    for line, expected in zip(out, words, strict=True):
        assert expected in line


def test_long_texts(model: SimCSE, tiny_bert: Path) -> None:
    """Windows: each as it would be encoded alone, their mean weighted by tokens without specials."""
    word = "abcdefghijklmnopqrs "  # 19 tokens: the vocabulary is of characters
    text = word * 5  # in windows of 40 tokens, 38 without specials
    parts = [word * 2, word * 2, word]
    weights = np.array([38, 38, 19]) / 95
    expected = weights @ model.encode(parts, normalize=False)
    found = model.encode(["first", text, *SENTENCES], normalize=False, long_text="windows")
    np.testing.assert_allclose(found[1], expected, atol=1e-5)
    np.testing.assert_allclose(found[0], model.encode("first", normalize=False), atol=1e-5)
    np.testing.assert_allclose(model.encode(text), model.encode(parts[0]), atol=1e-5)
    with pytest.raises(InputError, match=r"2 of 3 sentences have more than 40 tokens, the first is 'abcd"):
        model.encode(["short", text, text], long_text="error")
    np.testing.assert_array_equal(model.encode(["short"], long_text="error"), model.encode(["short"]))


def test_a_query_that_is_cut_is_said(tiny_bert: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = ["a man", "a man runs " * 9]
    main(["search", str(tiny_bert), str(text_file), *queries, "--pooler", "avg", "--max-length", "16"])
    said = [line for line in capsys.readouterr().err.splitlines() if "only the beginning counts" in line]
    assert len(said) == 1
    assert said[0].startswith("'a man runs a man runs")
    assert "longer than the 16 tokens" in said[0]


def test_command(tiny_bert: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = text_file.read_text().splitlines()
    index = tmp_path / "index"
    main(["search", str(tiny_bert), str(text_file), "--pooler", "avg", "--save-index", str(index)])
    saved = capsys.readouterr()
    assert saved.out == ""
    assert f"saved in {index}: give it as SENTENCES" in saved.err
    query = ["search", str(tiny_bert), str(index), lines[7], "naïve 🙂", "--pooler", "avg"]
    main([*query, "--top-k", "2", "--json"])
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["query"], second["query"]) == (lines[7], "naïve 🙂")
    assert first["hits"][0] == {"index": 7, "sentence": lines[7], "score": pytest.approx(1, abs=1e-5)}
    assert len(first["hits"]) == 2
    main([*query, "--threshold", "0.99999"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == lines[7]
    assert out[1].split() == ["1.0000", "8", *lines[7].split()]
    assert "try a lower --threshold" in out[-1]
    for arguments, words in [
        ([str(text_file)], "nothing to look for"),
        ([str(tmp_path), "a"], "neither a text file nor a saved index"),
        (["nowhere.txt", "a"], "no file nowhere.txt"),
        ([str(text_file), "a", "--save-index", str(index)], "is not an empty folder"),
        ([str(text_file), "a", "--top-k", "0"], "top_k is 0"),
        ([str(text_file), "a", "--threshold", "nan"], "threshold is nan"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(["search", str(tiny_bert), *arguments, "--pooler", "avg"])
        err = capsys.readouterr().err
        assert words in err
        assert "loading" not in err  # a model takes longer than a glance at the arguments
