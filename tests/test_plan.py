"""Plans: the real step compiled for devices that are here and, where their compilers are installed, that are not."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from simcse_jax.cli import main
from simcse_jax.config import Config, DataConfig, MeshConfig, ModelConfig, NegativesConfig, ObjectiveConfig, QueueConfig
from simcse_jax.config.load import load_config_file
from simcse_jax.errors import InputError
from simcse_jax.model import read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.plan.plan import PUBLISHED, Plan, plan
from simcse_jax.plan.table import format_plans
from tests.conftest import TINY_BERT
from tests.test_roofline import KNOWN

LAYERS, WIDTH, INNER, LENGTH = 2, 32, 48, 12
NO_TPU = importlib.util.find_spec("libtpu") is None
NO_GPU = importlib.util.find_spec("jax_cuda13_plugin") is None


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but config.json: neither weights nor tokenizer are needed."""
    folder = tmp_path_factory.mktemp("plan") / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_BERT | {"num_hidden_layers": LAYERS}))
    return folder


def run_of(encoder: Path, batch_size: int = 32, **model: Any) -> Config:
    return Config(
        batch_size=batch_size,
        # Without dropout, of which most of the program would be.
        model=ModelConfig(path=str(encoder), dropout=0.0, **model),
        data=DataConfig(train="nowhere.csv", columns=("a", "b", "c"), max_length=LENGTH),
    )


def encoder_flops(sentences: int) -> int:
    """Forward and, twice that, backward: projections and feed-forward, attention, head.

    Of the last layer, keys and values of all tokens, and the rest at [CLS] alone.
    """
    keys_and_values = 2 * 2 * WIDTH**2
    rest = 2 * (2 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * LENGTH * WIDTH
    layer, last = LENGTH * (keys_and_values + rest), LENGTH * keys_and_values + rest
    return 3 * sentences * ((LAYERS - 1) * layer + last + 2 * WIDTH**2)


def test_cpu_plan_by_hand(encoder: Path) -> None:
    n, devices = 32, 8
    p = plan(run_of(encoder, n), "cpu:8")
    assert (p.topology, p.devices, p.data, p.fsdp, p.batch_size, p.columns) == ("cpu:8", 8, 8, 1, n, 3)
    # The products of InfoNCE, two matrices of n × n, ask for full precision.
    assert p.flops == {
        "float32": encoder_flops(3 * n) / devices,
        "float32 highest": 3 * 2 * 2 * n * n * WIDTH / devices,
    }
    model = build_model(read_encoder_config(TINY_BERT | {"num_hidden_layers": LAYERS}), ModelConfig())
    weights = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(model, 0))))
    assert p.memory is not None
    # Parameters and two moments, step and counts, and a device's rows of the batch.
    batch = n // devices * 3 * (LENGTH + 1) * 4 + n // devices
    assert 0 <= p.memory.arguments - 3 * weights * 4 - batch < 1000
    assert p.memory.total == p.memory_needed < 10 * p.memory.arguments
    gathered = [c for c in p.collectives if c.kind == "all-gather" and c.bytes > 2 * n]  # but for which of them count
    assert [c.bytes for c in gathered] == [2 * n * WIDTH * 4]
    assert p.sent >= 2 * 7 / 8 * weights * 4 * 0.9
    assert p.work is not None
    # Where [CLS] alone asks, in the last layer, the gradients of keys and values are outer products: nothing is summed,
    # and the compiler writes plain multiplications, which are no products to `work`.
    outer = 2 * 3 * n // devices * 2 * LENGTH * WIDTH
    assert p.work.flops == sum(p.flops.values()) - outer
    # Every number of the state is read and written at least once.
    assert p.work.bytes > p.memory.arguments + p.memory.outputs
    assert (p.fits, p.seconds, p.step_seconds, p.pairs_per_second) == (None, {}, None, None)


def test_fsdp_splits_the_state(encoder: Path) -> None:
    config = run_of(encoder)
    whole, split = plan(config, "cpu:4", 2), plan(replace(config, mesh=MeshConfig(fsdp=4)), "cpu:4", 2)
    assert whole.memory is not None
    assert split.memory is not None
    assert split.memory.arguments < whole.memory.arguments / 2
    assert (split.data, split.fsdp, whole.data, whole.fsdp) == (1, 4, 4, 1)


def test_rematerialisation_needs_less_memory(tmp_path: Path) -> None:
    """On a CPU, too, where layers are otherwise compiled each by itself."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_BERT | {"num_hidden_layers": 6}))
    kept, again = (plan(run_of(tmp_path, 512, remat=remat), "cpu:1", 2) for remat in (False, True))
    assert kept.memory is not None
    assert again.memory is not None
    assert again.memory.total < 0.7 * kept.memory.total


def test_command(encoder: Path, tmp_path: Path) -> None:
    """In a process of its own, which has one CPU device until the command asks for more."""
    settings = ["--model.path", str(encoder), "--model.dropout", "0", "--data.max-length", "4"]
    command = ["plan", "sup_bert_base", "--topology", "cpu:1", "cpu:4", "--batch-size", "8", *settings]
    command += ["--json", str(tmp_path / "plans.json")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "simcse_jax", *command],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")},
    )
    assert done.returncode == 0, done.stderr
    plans = json.loads((tmp_path / "plans.json").read_text())["plans"]
    assert [(p["topology"], p["batch_size"], p["columns"]) for p in plans] == [("cpu:1", 8, 3), ("cpu:4", 8, 3)]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("cpu:") and "collectives" not in line]
    assert [row[:3] for row in rows] == [["cpu:1", "1", "8"], ["cpu:4", "4", "8"]]
    assert "cpu:1, batch 8, mesh data 1 × fsdp 1: collectives per step\n  none" in done.stdout
    assert "all-gather         over    4:" in done.stdout
    assert {"kind", "bytes", "sent", "count", "group"} <= set(plans[1]["collectives"][0])
    assert plans[0]["memory"]["arguments"] > 0
    assert {"kernels", "bytes", "flops"} == set(plans[0]["work"])


def test_each_batch_size_given_is_planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, int, int | None]] = []

    def figures(config: Config, topology: str, columns: int | None) -> Plan:
        assert type(config) is Config
        assert config.model.dtype == "bfloat16"
        asked.append((topology, config.batch_size, columns))
        return replace(KNOWN, topology=topology, batch_size=config.batch_size)

    module = importlib.import_module("simcse_jax.plan.plan")  # not the function, which the package has by that name
    monkeypatch.setattr(module, "plan", figures)
    monkeypatch.setattr(module, "check_plan", lambda *_: None)
    options = ["--batch-size", "512", "1024", "--columns", "2", "--model.dtype", "bfloat16"]
    main(["plan", "sup_bert_base", "--topology", "v5e:4x4", "h100:8", *options])
    assert asked == [("v5e:4x4", 512, 2), ("v5e:4x4", 1024, 2), ("h100:8", 512, 2), ("h100:8", 1024, 2)]
    asked.clear()
    main(["plan", "sup_bert_base", "--topology", "v5e:4x4", "--model.dtype", "bfloat16"])
    assert asked == [("v5e:4x4", 512, None)]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x4", "v4:2x2x1", "tpu7x:2x2x1"])
@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_tpu(encoder: Path, topology: str) -> None:
    p = plan(run_of(encoder, dtype="bfloat16"), topology)
    check_accelerator(p, 8 if topology in ("v6e:2x4", "tpu7x:2x2x1") else 4)


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_what_does_not_fit_is_said(encoder: Path) -> None:
    dense = ObjectiveConfig(implementation="dense")
    p = plan(replace(run_of(encoder, 2**17), objective=dense, micro_batch=1024), "v5e:1x1")
    assert p.fits is False
    assert p.memory_needed is not None
    assert p.memory_limit is not None
    # The logits are 2 × 2**34 numbers.
    assert p.memory_needed > p.memory_limit
    assert p.step_seconds is None
    assert "NO" in format_plans([p])


@pytest.mark.parametrize("topology", ["h200:8", "h100:2x4", "a100:8", "b200:2x4", "l4:8", "rtx4090:8"])
@pytest.mark.release
@pytest.mark.skipif(NO_GPU, reason="jax-cuda13-plugin, the compiler for GPUs, is not installed")
def test_gpu(encoder: Path, topology: str) -> None:
    p = plan(run_of(encoder, dtype="bfloat16"), topology)
    check_accelerator(p, 8)


def ring(encoder: Path, topology: str, dcn: int = 1) -> Plan:
    """A step of 1,024 triplets in tiles, encoded eight at a time."""
    objective = ObjectiveConfig(implementation="tiled", block_size=16)
    run = replace(run_of(encoder, 1024), objective=objective, micro_batch=8, mesh=MeshConfig(dcn=dcn))
    return plan(run, topology)


def check_ring(p: Plan) -> None:
    """The keys go round, W − 1 times forward and backward, there their gradients W + 1 times; nothing gathers them."""
    assert p.tiled
    share = 2 * 1024 * WIDTH * 4 // p.devices
    passed = [c for c in p.collectives if c.kind == "collective-permute"]
    # Besides, which rows count. A compiler may make one instruction of two.
    assert sum(c.bytes * (c.count or 0) for c in passed) == pytest.approx((3 * p.devices - 1) * share, rel=0.02)
    assert not [c for c in p.collectives if c.kind in ("all-gather", "all-to-all") and c.bytes >= share]
    # Once a step, however many chunks.
    assert all(c.count == 1 for c in p.collectives if c.kind in ("all-reduce", "reduce-scatter"))


def check_rings(p: Plan) -> None:
    """Keys and their gradients cross to other slices once per slice that is not their own, and nothing else does."""
    assert p.tiled
    share, node = 2 * 1024 * WIDTH * 4 / p.devices, p.devices // p.dcn
    crossing = [c for c in p.collectives if c.kind == "collective-permute" and c.by_network(node)[1]]
    sent = sum(c.by_network(node)[1] * (c.count or 0) for c in crossing)
    # Where there are two slices, a compiler sends the keys once for the forward pass and the backward pass.
    assert 2 * (p.dcn - 1) * share <= sent <= 3.06 * (p.dcn - 1) * share
    assert all(c.by_network(node)[0] == 0 for c in crossing)
    assert not [c for c in p.collectives if c.kind in ("all-gather", "all-to-all") and c.by_network(node)[1] >= share]


def masked_ring(encoder: Path, topology: str) -> Plan:
    """The same with all masks, every direction, and a queue of two batches."""
    directions = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")
    negatives = NegativesConfig(duplicates=True, margin=0.1, guide=str(encoder), directions=directions)
    objective = ObjectiveConfig(
        implementation="tiled", block_size=16, negatives=negatives, queue=QueueConfig(size=2048)
    )
    return plan(replace(run_of(encoder, 1024), objective=objective, micro_batch=8), topology)


def check_masked_ring(p: Plan) -> None:
    """No vectors, ids or marks are gathered: no more than a number per row."""
    assert p.tiled
    assert [c for c in p.collectives if c.kind == "collective-permute"]
    assert not [c for c in p.collectives if c.kind in ("all-gather", "all-to-all") and c.bytes > 4 * 1024]


def test_ring_on_cpus(encoder: Path) -> None:
    check_ring(ring(encoder, "cpu:8"))


def test_rings_over_slices_on_cpus(encoder: Path) -> None:
    p = ring(encoder, "cpu:8", dcn=4)
    assert (p.dcn, p.data, p.fsdp) == (4, 2, 1)
    check_rings(p)


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
@pytest.mark.parametrize("topology", ["2xv5e:4x4", "4xv5p:2x2x1"])
def test_rings_over_slices_on_tpu(encoder: Path, topology: str) -> None:
    p = ring(encoder, topology, dcn=int(topology[0]))
    check_rings(p)
    between = [c for c in p.collectives if c.by_network(p.devices // p.slices)[1]]
    assert all(c.overlapped for c in between if c.kind == "collective-permute")
    # Gradients are summed inside a slice first: each device sends its share of the sums, with padding, to other slices.
    assert p.memory
    weights = p.memory.arguments / 3  # and two moments of each
    sums = sum(c.bytes for c in between if c.kind == "all-reduce")
    assert sums < weights / 2
    flat = ring(encoder, topology)
    assert flat.networks["DCN"].bytes > 2 * p.networks["DCN"].bytes


@pytest.mark.release
@pytest.mark.skipif(NO_GPU, reason="jax-cuda13-plugin, the compiler for GPUs, is not installed")
def test_rings_over_nodes_of_gpus(encoder: Path) -> None:
    p = ring(encoder, "h200:2x4", dcn=2)
    check_rings(p)
    assert list(p.networks) == ["NVLink", "InfiniBand"]


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
@pytest.mark.parametrize(
    ("topology", "mesh", "message"),
    [
        ("2xv5e:2x2", MeshConfig(dcn=4), r"mesh.dcn is 4 but the 8 devices lie in 2 slice\(s\) of 4"),
        ("v5e:2x2", MeshConfig(dcn=2), r"mesh.dcn is 2 but the 4 devices lie in 1 slice\(s\) of 4"),
        ("2xv5e:2x2", MeshConfig(fsdp=8), "mesh.fsdp is 8 but a slice has 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_slices(encoder: Path, topology: str, mesh: MeshConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(replace(run_of(encoder), mesh=mesh), topology)


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_an_axis_of_the_torus_may_be_split(encoder: Path) -> None:
    p = plan(replace(run_of(encoder), mesh=MeshConfig(fsdp=2)), "v6e:4x4")
    assert (p.data, p.fsdp) == (8, 2)


def test_a_ring_with_masks_and_a_queue_on_cpus(encoder: Path) -> None:
    check_masked_ring(masked_ring(encoder, "cpu:8"))


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_a_ring_with_masks_and_a_queue_on_tpu(encoder: Path) -> None:
    check_masked_ring(masked_ring(encoder, "v5e:4x4"))


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_ring_on_tpu(encoder: Path) -> None:
    p = ring(encoder, "v5e:4x4")
    check_ring(p)
    check_overlap(p)


@pytest.mark.release
@pytest.mark.skipif(NO_GPU, reason="jax-cuda13-plugin, the compiler for GPUs, is not installed")
def test_ring_on_gpus(encoder: Path) -> None:
    p = ring(encoder, "h200:8")
    check_ring(p)
    check_overlap(p)


def check_overlap(p: Plan) -> None:
    """The permutes inside the loops run while blocks are multiplied."""
    turns = [c for c in p.collectives if c.kind == "collective-permute" and (c.count or 0) > 1]
    assert turns
    assert all(c.overlapped for c in turns)


def check_accelerator(p: Plan, devices: int) -> None:
    """What holds of the tiny step on any accelerator."""
    assert p.devices == devices
    assert p.fits is True
    assert p.flops["bfloat16"] == encoder_flops(3 * 32) / devices
    # The keys of InfoNCE are gathered once; a compiler may gather which of them count with them.
    gathered = [c.bytes for c in p.collectives if c.kind == "all-gather" and c.bytes > 1000]
    assert [n - n % 256 for n in gathered] == [2 * 32 * WIDTH * 4]
    # Each device's gradient is widened to float32 before it is summed over devices.
    sums = [c for c in p.collectives if c.kind in ("all-reduce", "reduce-scatter") and c.bytes > 1000]
    assert sums
    assert {kind for c in sums for kind, _ in c.arrays} == {"f32"}
    assert p.step_seconds == max(p.seconds.values()) > 0
    assert set(p.seconds) == {"compute", "memory", "communication"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """Their parameters, as published in millions, poolers included."""
    millions = {"bert-base": 109.5, "bert-large": 335.1, "roberta-base": 124.6, "roberta-large": 355.4}
    model = build_model(read_encoder_config(PUBLISHED[name]), ModelConfig())
    size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(model, 0))))
    assert round(size / 1e6, 1) == millions[name.removesuffix("-uncased")]
    assert model.config.max_length == 512


def test_columns_of_the_published_runs() -> None:
    assert load_config_file("sup_bert_base").data.columns == ("sent0", "sent1", "hard_neg")


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        ("cpu:9", {}, "needs 9 CPU devices and this process has 8: set the environment variable"),
        ("cpu:8", {"batch_size": 12}, "a global batch of 12 cannot be split over 8 devices"),
        ("cpu:8", {"mesh": MeshConfig(fsdp=3)}, "mesh data -1 × fsdp 3 does not fit 8 devices"),
        ("cpu:8", {"mesh": MeshConfig(dcn=3)}, "mesh dcn 3 × data -1 × fsdp 1 does not fit 8 devices"),
        ("cpu:8", {"mesh": MeshConfig(dcn=4, fsdp=4)}, "mesh dcn 4 × data -1 × fsdp 4 does not fit 8 devices"),
        ("cpu:8", {"model": ModelConfig(path="some/model")}, "model.path 'some/model' is not a folder: give one that"),
        ("cpu:8", {"data": DataConfig(train="a.csv")}, "data.columns is empty and a.csv is not read here: say with"),
        ("cpu:8", {"data": DataConfig(train="a.txt", max_length=41)}, "max_length is 41 but .* positions for 40"),
        ("v5e:2x2", {"model": ModelConfig(dtype="float64")}, "float64, for which v5e:2x2 has no peak"),
    ],
)
def test_bad_input(encoder: Path, topology: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(replace(run_of(encoder), **changes), topology)


@pytest.mark.release
@pytest.mark.skipif(NO_TPU, reason="libtpu, the compiler for TPUs, is not installed")
def test_a_slice_that_does_not_exist(encoder: Path) -> None:
    with pytest.raises(InputError, match="no devices to compile for as v5e:3x5"):
        plan(run_of(encoder), "v5e:3x5")


@pytest.mark.parametrize(
    ("topology", "package", "extra"),
    [("v5e:2x2", "libtpu", "tpu-compiler"), ("h200:8", "jax-cuda13-plugin", "gpu-compiler")],
)
def test_missing_compiler(
    encoder: Path, topology: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf'{package}: pip install "simcse-jax\[{extra}\]"'):
        plan(run_of(encoder), topology)


def test_the_config_file_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--columns", "1", "sup_bert_base"])
    assert "give the config file right after plan: simcse-jax plan" in capsys.readouterr().err


def test_all_is_checked_before_anything_is_compiled(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.path", str(encoder), "--data.max-length", "4", "--batch-size", "8"]
    with pytest.raises(SystemExit):
        main(["plan", "sup_bert_base", "--topology", "cpu:2", "cpu:3", *options])
    printed = capsys.readouterr().err
    assert "a global batch of 8 cannot be split over 3 devices" in printed
    assert "compiling" not in printed


def test_a_topology_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "sup_bert_base"])
    assert "name devices with --topology" in capsys.readouterr().err


def test_txt_is_one_sentence_a_line(encoder: Path) -> None:
    config = replace(run_of(encoder, 8), data=DataConfig(train="wiki.txt.gz", max_length=LENGTH))
    assert plan(config, "cpu:1").columns == 1


def test_json_is_checked_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "sup_bert_base", "--topology", "cpu:8", "--json", "/nowhere/plans.json"])
    assert "/nowhere/plans.json cannot be written" in capsys.readouterr().err
