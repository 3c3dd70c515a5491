"""Hard negatives mined from a corpus: as by brute force, on any devices, in parts, and as training reads them."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.config import DataConfig, MiningConfig
from simcse_jax.data.corpus import open_corpus
from simcse_jax.errors import InputError
from simcse_jax.inference import mining
from simcse_jax.inference.mining import Counts, Miner, mine_to_file
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.storage import records
from tests.conftest import TINY_BERT, full, write_model
from tests.jobs import Job

WIDTH = 16


def vector_of(text: str) -> np.ndarray:
    """A vector that a text always has; texts of one first letter are near each other."""
    own = np.random.default_rng(list(text.encode())).normal(size=WIDTH)
    return np.random.default_rng(ord(text[0])).normal(size=WIDTH) + 0.8 * own


def encode(texts: list[str]) -> np.ndarray:
    return np.stack([vector_of(text) for text in texts]).astype(np.float32)


def pairs(count: int) -> list[tuple[str, str]]:
    """Every seventh sentence occurs twice, with another positive each time."""
    return [(f"{'abcdef'[n % 6]} question {n - (n % 7 == 6)}", f"{'abcdef'[n % 6]} answer {n}") for n in range(count)]


def brute_force(examples: list[tuple[str, str]], corpus: list[str], config: MiningConfig) -> list[list[str]]:
    """The nearest, in float64, one example after the other."""
    texts = list(dict.fromkeys(text.strip() for text in corpus if text.strip()))
    vectors = encode(texts).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = []
    for sentence, positive in examples:
        query, own = (v / np.linalg.norm(v) for v in encode([sentence, positive]).astype(np.float64))
        limit = query @ own
        left_out = {sentence} | {p for s, p in examples if s == sentence}
        ranked = sorted((-float(v @ query), n) for n, v in enumerate(vectors) if texts[n] not in left_out)
        least = min(limit - config.margin, limit - config.relative_margin * abs(limit))
        window = ranked[config.first_rank : config.last_rank]
        found.append([texts[n] for score, n in window if -score < least][: config.negatives])
    return found


def mined(miner: Miner, start: int, stop: int, counts: Counts | None = None) -> list[list[str]]:
    found = miner.mine(start, stop, counts or Counts())
    return [[miner.texts[number] for number in numbers] for numbers in found]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    "config",
    [
        MiningConfig(negatives=3),
        MiningConfig(negatives=8, first_rank=2, last_rank=12, margin=-0.2, relative_margin=0.0),
        full(MiningConfig(negatives=1, margin=0.1)),
        full(MiningConfig(negatives=5, last_rank=400, relative_margin=0.3)),
    ],
)
def test_mined_negatives_are_those_of_brute_force(config: MiningConfig, devices: int) -> None:
    examples = pairs(120)
    corpus = [*(p for _, p in examples), *(f"{'abcdef'[n % 6]} text {n}" for n in range(200)), " ", "b text 1 "]
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    counts = Counts()
    found = mined(Miner(encode, corpus, examples, config, mesh), 0, len(examples), counts)
    assert found == brute_force(examples, corpus, config)
    report = counts.report()
    assert report["examples"] == 120
    assert sum(report["with_negatives"].values()) == 120
    assert sum(int(n) * count for n, count in report["with_negatives"].items()) == sum(map(len, found))


def test_negatives_drawn_at_random_are_of_the_candidates_and_of_the_seed() -> None:
    examples = pairs(60)
    corpus = [p for _, p in examples] + [f"{'abcdef'[n % 6]} text {n}" for n in range(100)]
    config = MiningConfig(negatives=2, last_rank=30, choose="random", relative_margin=0.0)
    miner = Miner(encode, corpus, examples, config, make_mesh())
    first = mined(miner, 0, 60)
    assert [*mined(miner, 0, 25), *mined(miner, 25, 60)] == first
    every = brute_force(examples, corpus, replace(config, negatives=30))
    assert all(set(found) <= set(candidates) for found, candidates in zip(first, every, strict=True))
    other = Miner(encode, corpus, examples, replace(config, seed=1), make_mesh())
    assert mined(other, 0, 60) != first


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_an_interrupted_call_goes_on(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "_PART", 16)
    examples, output, config = pairs(50), tmp_path / f"mined{ending}", MiningConfig(negatives=2)
    corpus = [p for _, p in examples]
    made: list[int] = []

    def make(calls: int) -> Miner:
        miner = Miner(encode, corpus, examples, config, make_mesh())
        mine = miner.mine

        def counted(start: int, stop: int, counts: Counts) -> Any:
            if len(made) == calls:
                raise KeyboardInterrupt
            made.append(start)
            return mine(start, stop, counts)

        monkeypatch.setattr(miner, "mine", counted)
        return miner

    with pytest.raises(KeyboardInterrupt):
        mine_to_file(output, corpus, examples, lambda: make(2), {"a": 1})
    assert not output.exists()
    with pytest.raises(InputError, match="parts of a call with another model, text or settings"):
        mine_to_file(output, corpus, examples, lambda: make(9), {"a": 2})
    (tmp_path / f"mined{ending}.parts" / "16.json").write_text("{")  # cut off by a crash
    report = mine_to_file(output, corpus, examples, lambda: make(9), {"a": 1})
    assert made == [0, 16, 16, 32, 48]
    assert report["examples"] == 50
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name]
    expected = brute_force(examples, corpus, config)
    rows = list(open_corpus(DataConfig(train=str(output))))
    assert [list(filter(None, row[2:])) for row in rows] == expected
    assert [row[:2] for row in rows] == examples


def test_parts_of_long_texts_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is read up to a limit, which the texts of a part may exceed."""
    monkeypatch.setattr(records, "LARGEST", 2000)
    examples = [(q, f"{a} {'long ' * 500}".strip()) for q, a in pairs(30)]
    corpus, output = [p for _, p in examples], tmp_path / "mined.jsonl"
    config = MiningConfig(negatives=2, relative_margin=0.0, margin=-2.0)
    mine_to_file(output, corpus, examples, lambda: Miner(encode, corpus, examples, config, make_mesh()), {})
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [[row["negative_1"], row["negative_2"]] for row in rows] == brute_force(examples, corpus, config)


def test_parts_of_other_weights_in_the_same_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "pairs.tsv", tmp_path / "mined.jsonl"
    text.write_text("question\tanswer\n" + "".join(f"{q}\t{a}\n" for q, a in pairs(8)))
    model = write_model(tmp_path / "model", TINY_BERT)
    command = ["data", "mine", str(model), str(text), str(output), "--pooler", "avg"]

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Miner, "mine", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(command)
    write_model(model, TINY_BERT, seed=1)
    with pytest.raises(SystemExit):
        main(command)
    assert "parts of a call with another model" in capsys.readouterr().err
    assert not output.exists()


def test_the_command(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "pairs.tsv"
    text.write_text("question\tanswer\n" + "".join(f"{q}\t{a}\n" for q, a in pairs(20)))
    output = tmp_path / "mined.jsonl"
    settings = ["--pooler", "avg", "--negatives", "2", "--relative-margin", "0"]
    main(["data", "mine", str(tiny_bert), str(text), str(output), *settings])
    assert json.loads(capsys.readouterr().out)["examples"] == 20
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 20
    assert set(rows[0]) <= {"sentence", "positive", "negative_1", "negative_2"}
    for arguments, message in (
        ([str(text), str(output)], "exists"),
        ([str(text), str(tmp_path / "a.csv")], "must end in .jsonl or .parquet"),
        ([str(text), str(tmp_path / "b.jsonl"), "--negatives", "9"], "at most 8"),
        ([str(text), str(tmp_path / "b.jsonl"), "--first-rank", "100"], "do not fit between them"),
        ([str(text), str(tmp_path / "b.jsonl"), "--columns", "question"], "mining needs a sentence and its positive"),
    ):
        with pytest.raises(SystemExit):
            main(["data", "mine", str(tiny_bert), *arguments, "--pooler", "avg"])
        assert message in capsys.readouterr().err


@pytest.mark.full
def test_two_processes_mine_what_one_mines(tiny_bert: Path, tmp_path: Path) -> None:
    text = tmp_path / "pairs.tsv"
    text.write_text("question\tanswer\n" + "".join(f"{q}\t{a}\n" for q, a in pairs(60)))
    command = [
        "data",
        "mine",
        str(tiny_bert),
        str(text),
        "--pooler",
        "avg",
        "--negatives",
        "3",
        "--relative-margin",
        "0",
    ]
    main([*command[:4], str(tmp_path / "one.jsonl"), *command[4:]])
    arguments = ["-m", "simcse_jax", *command[:4], str(tmp_path / "two.jsonl"), *command[4:]]
    with Job(2, arguments, tmp_path / "logs") as job:
        assert [process.wait(200) for process in job.processes] == [0, 0]
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.release
def test_mining_20000_real_sentences_is_brute_force(real_data: Path, minilm: Path) -> None:
    from simcse_jax import SimCSE
    from simcse_jax.data.corpus import read_sentences

    texts = list(dict.fromkeys(read_sentences(real_data / "wiki" / "wiki_en_1m.txt.gz", 20400)))[:20200]
    model = SimCSE(str(minilm))
    vectors = dict(zip(texts, np.asarray(model.encode(texts)), strict=True))
    examples = list(pairwise(texts[:201]))
    config = MiningConfig(negatives=8, relative_margin=0.0, margin=-1.0)
    miner = Miner(lambda x: np.stack([vectors[t] for t in x]), texts[:20000], examples, config, make_mesh())
    found = mined(miner, 0, 200)
    matrix = np.stack([vectors[t] for t in texts[:20000]]).astype(np.float64)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    for n, (sentence, positive) in enumerate(examples):
        cosine = matrix @ matrix[n]
        cosine[[texts.index(sentence), texts.index(positive)]] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:8]
        numbers = [texts.index(text) for text in found[n]]
        assert np.allclose(cosine[numbers], cosine[order], atol=1e-6)
