"""Plans: the real step compiled for the CPUs that are here, the command, and what is refused."""

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
from simcse_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from simcse_jax.config.load import load_config_file
from simcse_jax.errors import InputError
from simcse_jax.model import read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.plan.plan import PUBLISHED, Plan, plan
from tests.conftest import TINY_BERT
from tests.plans import LAYERS, LENGTH, WIDTH, encoder, encoder_flops, run_of
from tests.test_roofline import KNOWN

__all__ = ["encoder"]


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
