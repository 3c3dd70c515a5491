"""Models out to PyTorch and back: the same tensors, the same vectors, and a folder that says where it is from."""

import json
import os
import shutil
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from simcse_jax.config import CheckpointConfig, Config, DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig
from simcse_jax.data.demo import demo_similarity
from simcse_jax.errors import InputError
from simcse_jax.evaluation.sts import load_task
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import LoadedModel, kept_steps, load_model
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.model.build import build_model
from simcse_jax.poolers import POOLERS
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.reports.paths import portable
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.training.prepare import prepare
from simcse_jax.training.state import initial_params
from simcse_jax.training.trainer import train
from tests.conftest import SENTENCES, TINY_BERT, TINY_ROBERTA, full, write_tokenizer

SETTINGS = [*((pooler, False) for pooler in POOLERS), ("cls", True)]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """100 sentences: of STS-B where it is there, else of the demonstration."""
    if "SIMCSE_DATA" in os.environ:
        task = load_task("STSBenchmark", Path(os.environ["SIMCSE_DATA"]) / "senteval", "dev")
    else:
        task = load_task(str(demo_similarity("test")), "")
    chosen = list(dict.fromkeys(s for u in task.subsets for pair in zip(u.first, u.second, strict=True) for s in pair))
    return chosen[:100]


def with_settings(folder: Path, pooler: str, mlp_only_train: bool) -> LoadedModel:
    loaded = load_model(folder, pooler)
    return replace(loaded, model=loaded.model.clone(mlp_only_train=mlp_only_train))


def encode(loaded: LoadedModel, sentences: list[str]) -> np.ndarray:
    """Vectors on one device."""
    device = jax.devices()[0]
    tokenizer = load_tokenizer(loaded.checkpoint.folder)
    encoder = BatchEncoder(loaded.model, tokenizer, make_mesh(devices=[device]), loaded.checkpoint.max_length, 32)
    return encoder(jax.device_put(loaded.params, device), sentences)


def assert_bytes_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        assert actual[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    ("pooler", "mlp_only_train"),
    [s if s in (("avg_top2", False), ("cls", True)) else full(*s) for s in SETTINGS],
)
def test_the_same_vectors_everywhere(
    tmp_path: Path, minilm: Path, sentences: list[str], pooler: str, mlp_only_train: bool
) -> None:
    """all-MiniLM-L6-v2, ours, in transformers and in sentence-transformers."""
    torch = pytest.importorskip("torch", reason="reads the export")
    library = pytest.importorskip("sentence_transformers", reason="reads the export")
    from transformers import AutoModel, AutoTokenizer

    from tests.test_torch_parity import torch_poolers

    assert len(sentences) == 100
    loaded = with_settings(minilm, pooler, mlp_only_train)
    folder = export(loaded, tmp_path / "model")
    ours = encode(loaded, sentences)
    expected, params = loaded.model, jax.device_get(loaded.params)
    del loaded  # one copy per device

    theirs = library.SentenceTransformer(str(folder), device="cpu")
    vectors = theirs.encode(sentences, show_progress_bar=False)
    assert np.max(np.abs(vectors - ours)) < 1e-5

    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "BertModel"
    assert not any(info.values()), info
    tokens = AutoTokenizer.from_pretrained(folder)(sentences[:10], padding=True, return_tensors="np")
    with torch.no_grad():
        pooled = torch_poolers(model.eval(), tokens["input_ids"], tokens["attention_mask"].sum(axis=1))
    head_is_off = pooler == "cls" and mlp_only_train
    assert np.max(np.abs(pooled["cls_before_pooler" if head_is_off else pooler].numpy() - ours[:10])) < 1e-5

    again = load_model(folder)
    assert (again.model.pooler, again.model.mlp_only_train) == (pooler, mlp_only_train)
    assert again.model == expected
    assert again.checkpoint.max_length == 256
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    assert_bytes_equal(
        load_file(folder / "model.safetensors"),
        {name: x for name, x in load_file(minilm / "model.safetensors").items() if "position_ids" not in name},
    )


def test_minilm_vectors_are_those_of_sentence_transformers(minilm: Path, sentences: list[str]) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the peer")
    theirs = library.SentenceTransformer(str(minilm), device="cpu").encode(sentences, show_progress_bar=False)
    model = SimCSE(minilm)
    ours = model.encode(sentences)
    assert np.max(np.abs(theirs - ours)) < 1e-5
    assert np.max(np.abs(model.similarity(sentences[:3], sentences[:5]) - theirs[:3] @ theirs[:5].T)) < 1e-5


@pytest.mark.parametrize("config", [TINY_BERT, TINY_ROBERTA], ids=["bert", "roberta"])
def test_a_torch_checkpoint_comes_out_as_it_went_in(tmp_path: Path, config: dict[str, Any]) -> None:
    pytest.importorskip("torch", reason="writes the checkpoint")
    from transformers import AutoModel

    from tests.test_torch_parity import save_torch_model

    save_torch_model(tmp_path / "in", config)
    write_tokenizer(tmp_path / "in")
    folder = export(load_model(tmp_path / "in", "cls"), tmp_path / "out")
    stored = load_file(tmp_path / "in" / "model.safetensors")
    assert len(stored) == 5 + 16 * 3 + 2
    assert_bytes_equal(load_file(folder / "model.safetensors"), stored)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == {"bert": "BertModel", "roberta": "RobertaModel"}[config["model_type"]]
    assert not any(info.values()), info
    assert model.config.hidden_size == 32
    assert str(model.dtype) == "torch.float32"


@pytest.mark.parametrize(("pooler", "mlp_only_train"), SETTINGS)
def test_our_loader_keeps_the_settings(tmp_path: Path, tiny_bert: Path, pooler: str, mlp_only_train: bool) -> None:
    loaded = with_settings(tiny_bert, pooler, mlp_only_train)
    again = load_model(export(loaded, tmp_path / "model"))
    assert again.model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    # A pooler that is given wins.
    assert load_model(tmp_path / "model", "avg_top2").model.pooler == "avg_top2"


@pytest.fixture(scope="module")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, text_file: Path
) -> tuple[Path, dict[str, Any]]:
    """A run of six steps with dev and test scores."""
    folder = tmp_path_factory.mktemp("runs")
    header, *pairs = demo_similarity("dev").read_text("utf-8").splitlines()
    for name, part in (("small_dev", pairs[:12]), ("small_test", pairs[12:24])):
        (folder / f"{name}.tsv").write_text("\n".join([header, *part]) + "\n", "utf-8")
    config = Config(
        output=str(folder / "run"),
        batch_size=8,
        max_steps=6,
        model=ModelConfig(path=str(tiny_bert), mlp_only_train=True),
        data=DataConfig(train=str(text_file), max_length=16, cache=str(folder / "cache")),
        evaluation=EvaluationConfig(dev=str(folder / "small_dev.tsv"), every=3, test=(str(folder / "small_test.tsv"),)),
        checkpoint=CheckpointConfig(every=3),
    )
    return folder / "run", train(config)


def test_the_model_card_of_a_run(
    tmp_path: Path, finished_run: tuple[Path, dict[str, Any]], tiny_bert: Path, text_file: Path
) -> None:
    """It holds the text, the whole config and the scores."""
    run, results = finished_run
    loaded = load_model(run)
    assert loaded.step == results["best_step"]
    folder = export(loaded, tmp_path / "model")
    card = (folder / "README.md").read_text("utf-8")
    about = json.loads((run / "run.json").read_text("utf-8"))
    assert f"- text: `{text_file.name}` (content {about['data_fingerprint']})" in card
    assert f"- starting point: `{tiny_bert.name}`" in card
    best = f"the best dev score ({results['dev']:.2f})"
    untrained = "" if results["best_step"] else ": the model before training"
    assert f"- parameters of step {results['best_step']}, {best}{untrained}\n" in card
    assert json.loads(card.split("```json")[1].split("```")[0]) == portable(about)
    assert str(tiny_bert) in json.dumps(about)
    assert str(tiny_bert.parent) not in card
    assert f"Dev, Spearman × 100: {results['dev']:.2f} (step {results['best_step']})." in card
    assert "| | small_test | Avg. |" in card
    for moment in ("before", "after"):
        figures = [f"{results[moment][task]:.2f}" for task in results[moment]]
        assert f"| {moment} | {' | '.join(figures)} |" in card
    assert "The sentence vector is pooler `cls_before_pooler` (the head was used in training only)." in card
    again = load_model(folder)
    assert (again.model.pooler, again.model.mlp_only_train, again.run) == ("cls", True, None)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    np.testing.assert_allclose(encode(again, SENTENCES), encode(loaded, SENTENCES), atol=1e-6)


def test_a_run_and_its_export_are_the_same_start(finished_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The weights, the configuration and the tokenizer of a training that begins from either."""
    run, _ = finished_run
    started = []
    for path in (run, export(run, tmp_path / "model")):
        checkpoint = read_checkpoint(path)
        settings = ModelConfig(path=str(path), head="checkpoint")
        params = initial_params(Config(model=settings), build_model(checkpoint.config, settings))
        started.append((checkpoint.config, load_tokenizer(checkpoint.folder)(SENTENCES)["input_ids"], params))
    assert started[0][:2] == started[1][:2]
    jax.tree.map(np.testing.assert_array_equal, started[0][2], started[1][2])
    jax.tree.map(np.testing.assert_array_equal, started[0][2], jax.tree.map(np.asarray, load_model(run).params))
    for part, words in (("model", "has no weights"), (f"checkpoints/{kept_steps(run)[0]}", "is not a model folder")):
        with pytest.raises(InputError, match=rf"{words}.* \(it is inside of the run {run}: give that folder\)"):
            load_model(run / part, "avg")


@pytest.mark.full
@pytest.mark.usefixtures("two_devices")
def test_a_run_is_trained_from(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    """From its latest checkpoint, where it has no dev scores."""
    for name, start in (("first", tiny_bert), ("second", tmp_path / "first")):
        config = Config(
            output=str(tmp_path / name),
            batch_size=8,
            max_steps=2,
            model=ModelConfig(path=str(start), head="checkpoint"),
            data=DataConfig(train=str(text_file), max_length=16, cache=str(tmp_path / "cache")),
            optimizer=OptimizerConfig(learning_rate=0.01),
        )
        begun = prepare(config).start.params()
        if name == "second":
            trained = load_model(tmp_path / "first").params
            jax.tree.map(np.testing.assert_array_equal, begun, jax.tree.map(np.asarray, trained))
        train(config)
    first, second = (jax.tree.leaves(load_model(tmp_path / name).params) for name in ("first", "second"))
    assert any(np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(first, second, strict=True))


def test_the_model_card_of_a_model_without_a_run(tmp_path: Path, tiny_bert: Path) -> None:
    card = (export(load_model(tiny_bert, "avg"), tmp_path / "model") / "README.md").read_text("utf-8")
    assert "pooler `avg`." in card
    assert "## Training" not in card
    assert "## Scores" not in card


def test_what_is_published_names_no_folder_of_the_machine(tmp_path: Path, tiny_bert: Path) -> None:
    """Also where the files of the model do, as those that older programs wrote."""
    copy = shutil.copytree(tiny_bert, tmp_path / "home" / "ada" / "bert")
    for name, keys in (
        ("config.json", ("_name_or_path",)),
        ("tokenizer_config.json", ("name_or_path", "tokenizer_file")),
    ):
        about = json.loads((copy / name).read_text("utf-8")) | dict.fromkeys(keys, f"{copy}/base")
        (copy / name).write_text(json.dumps(about), "utf-8")
    folder = Path(export(load_model(copy, "avg"), tmp_path / "model"))
    for file in folder.rglob("*.*"):
        if file.suffix in (".json", ".md"):
            assert str(tmp_path) not in file.read_text("utf-8"), file
    assert json.loads((folder / "config.json").read_text("utf-8"))["_name_or_path"] == "base"


def test_paths_that_are_published() -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    given = {
        "path": str(packages / "minilm" / "model"),
        "test": ["/home/ada/dev.tsv", "STSBenchmark", "runs/a"],
        "n": 3,
    }
    shown = {"path": "minilm/model", "test": ["dev.tsv", "STSBenchmark", "runs/a"], "n": 3}
    assert portable(given) == shown
    for kept in ("s3://bucket/text.txt", "tfds:glue/stsb", "~/.cache", "owner/name", "", None, 1.5):
        assert portable(kept) == kept


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_existing_folders_are_not_touched(tmp_path: Path, tiny_bert: Path) -> None:
    loaded = load_model(tiny_bert, "avg")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            export(loaded, tmp_path / name)
    with pytest.raises(InputError, match="cannot be written"):
        export(loaded, tmp_path / "file" / "below")
    assert content(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert load_model(export(loaded, tmp_path / "empty")).model == loaded.model


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simcse_jax.inference.export._write_modules", full)
    with pytest.raises(InputError, match="No space left on device"):
        export(load_model(tiny_bert, "avg"), tmp_path / "model")
    assert content(tmp_path) == {}


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=["022", "077", "002"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def test_permissions_are_those_of_any_new_file(tmp_path: Path, tiny_bert: Path, umask: int) -> None:
    folder = export(load_model(tiny_bert, "cls"), tmp_path / "deep" / "model")
    for path in (folder.parent, folder, *folder.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_a_model_is_exported_by_its_path(tiny_bert: Path, tmp_path: Path) -> None:
    """As the command does, with the settings that the folder itself holds."""
    folder = export(load_model(tiny_bert, "avg"), tmp_path / "first")
    again = export(str(folder), tmp_path / "again")
    for name in ("model.safetensors", "config.json", "modules.json"):
        assert (Path(again) / name).read_bytes() == (Path(folder) / name).read_bytes(), name
