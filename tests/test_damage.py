"""Damage on disk is found before it is used, and costs no more than the steps since the last whole checkpoint."""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simcse_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.inference.index import Index
from simcse_jax.inference.loading import load_model
from simcse_jax.model.build import build_model, with_fresh_head
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.pooling import Pooling
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params
from simcse_jax.reports.progress import telling
from simcse_jax.runs.checkpoints import (
    Progress,
    check_whole,
    checkpoint_folders,
    drop_damaged_results,
    open_checkpoints,
    read_progress,
    restore,
    set_damaged_aside,
)
from simcse_jax.runs.folder import create_run
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.storage.manifest import MANIFEST, Damage, read_manifest, verify, write_manifest, write_sealed
from simcse_jax.storage.places import StoreError, reached
from simcse_jax.training.spec import StepSpec, create_state
from simcse_jax.training.state import to_items
from simcse_jax.training.trainer import train
from tests.conftest import first_devices
from tests.test_resume import assert_identical, config, dev_file, final_state, lines, tiny_bert

__all__ = ["config", "dev_file", "tiny_bert"]


def flip_a_bit(path: Path, seed: int = 0) -> None:
    content, place = bytearray(path.read_bytes()), random.Random(seed)
    content[place.randrange(len(content))] ^= 1 << place.randrange(8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    """A file whose name reached the disk and whose content did not."""
    path.write_bytes(b"")


def zero_a_block(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes(min(512, len(content))) + content[512:])


DAMAGES = [flip_a_bit, cut, empty, zero_a_block, Path.unlink]


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Leaves a file as it was before the block."""
    content = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of steps 1 to 3, the second the best, of 7 MB each."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text("{}")
    params = {"w": jax.random.normal(jax.random.key(0), (1300, 1300)), "b": jnp.arange(7.0)}
    with open_checkpoints(folder, CheckpointConfig(keep=3)) as checkpoints:
        for step in (1, 2, 3):
            score = {1: 50.0, 2: 60.0, 3: 55.0}[step]
            checkpoints.save({"params": params}, step, Progress(min(step, 2), max(score, 55.0), step // 3), score)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_whole_checkpoint_is_whole(run: Path) -> None:
    for folder in checkpoint_folders(run).values():
        check_whole(folder)
    assert read_progress(folder) == Progress(2, 55.0, 1)
    assert set_damaged_aside(run) == []
    assert not (run / "damaged").exists()


def test_a_run_is_read_by_its_relative_path(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"w": (1300, 1300), "b": (7,)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for name, shape in shapes.items()}
    found = restore(checkpoint_folders(Path(run.name))[3], {"params": params})
    np.testing.assert_array_equal(found["params"]["b"], np.arange(7))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_of_any_file_is_found(run: Path, damage: Callable[[Path], None]) -> None:
    folder = checkpoint_folders(run)[3]
    # orbax notes in this one, and nobody reads, when the checkpoint took its name.
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "commit_success.txt"]
    assert len(files) > 8
    for path in files:
        with kept(path):
            damage(path)
            if damage is flip_a_bit and path.name == "_CHECKPOINT_METADATA":
                # The bit may be one of the time when the checkpoint took its name.
                path.write_text(path.read_text("utf-8", "replace").replace("best_step", "best_steq"))
            with pytest.raises(Damage):
                check_whole(folder)
    check_whole(folder)


def test_every_flipped_bit_of_the_arrays_is_found(run: Path) -> None:
    folder = checkpoint_folders(run)[3]
    array = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    assert array.stat().st_size > 6e6
    with kept(array):
        for seed in range(120):
            flip_a_bit(array, seed)
            with pytest.raises(Damage, match=f"content of params/.*{array.name} was changed"):
                check_whole(folder)
            flip_a_bit(array, seed)
    check_whole(folder)


def test_a_folder_with_a_step_for_a_name(copy: Path) -> None:
    """An empty one, one with foreign files, and a checkpoint under the number of another."""
    steps = copy / "checkpoints"
    (steps / "7").mkdir()
    (steps / "8").mkdir()
    (steps / "8" / "notes.txt").write_text("mine")
    shutil.copytree(steps / "2", steps / "9")
    for step, problem in ((7, "cannot be read"), (8, "cannot be read"), (9, "it is the checkpoint of step 2")):
        with pytest.raises(Damage, match=problem):
            read_progress(steps / str(step))
    said = set_damaged_aside(copy)
    assert [line.split(" is damaged")[0] for line in said] == [f"the checkpoint of step {step}" for step in (7, 8, 9)]
    assert all("newest whole one is that of step 3" in line for line in said)
    assert list(checkpoint_folders(copy)) == [1, 2, 3]
    assert (copy / "damaged" / "8" / "notes.txt").read_text() == "mine"


def test_where_none_is_whole_nothing_is_touched(copy: Path) -> None:
    for folder in checkpoint_folders(copy).values():
        cut(folder / MANIFEST)
    with pytest.raises(InputError, match=r"no checkpoint of .* is whole \(step 1: .*; step 2: .*; step 3: .*\): put a"):
        set_damaged_aside(copy)
    assert list(checkpoint_folders(copy)) == [1, 2, 3]


def test_checkpoints_of_before_there_were_manifests(copy: Path) -> None:
    """They are read as ever, and their progress must be complete."""
    folder = copy / "checkpoints" / "3"
    metadata = folder / "_CHECKPOINT_METADATA"
    (folder / MANIFEST).unlink()
    metadata.write_text(metadata.read_text().replace(', "manifest": true', ""))
    check_whole(folder)
    assert read_progress(folder) == Progress(2, 55.0, 1)
    metadata.write_text(metadata.read_text().replace('"stale": 1', '"stall": 1'))
    with pytest.raises(Damage, match="lacks the progress"):
        read_progress(folder)


def test_what_is_restored_is_what_was_saved(run: Path) -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"w": jax.ShapeDtypeStruct((1300, 1300), np.float32, sharding=sharding)}
    found = restore(
        checkpoint_folders(run)[2],
        {"params": shapes | {"b": jax.ShapeDtypeStruct((7,), np.float32, sharding=sharding)}},
    )
    np.testing.assert_array_equal(found["params"]["w"], jax.random.normal(jax.random.key(0), (1300, 1300)))


@pytest.mark.parametrize("shapes", [{"w": (2**31, 2**20), "b": (7,)}, {"w": (1300, 1300), "b": (8,), "c": (1,)}])
def test_parameters_that_do_not_fit_are_named_before_they_are_read(run: Path, shapes: dict[str, Any]) -> None:
    """As where the config.json of a run was changed."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for name, shape in shapes.items()}
    with pytest.raises(InputError, match=r"does not fit the config\.json of its run: .* asks for"):
        restore(checkpoint_folders(run)[2], {"params": params})


def test_a_manifest_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_text("text")
    (tmp_path / "b").write_text("")
    (tmp_path / "changes").write_text("1")
    write_manifest(tmp_path, {"step": 3}, without=["changes"])
    (tmp_path / "changes").write_text("22")
    (tmp_path / "new").write_text("of someone else")
    verify(tmp_path)
    assert read_manifest(tmp_path)["about"] == {"step": 3}
    assert set(read_manifest(tmp_path)["files"]) == {"inner/a", "b"}
    (tmp_path / "b").write_text("x")
    with pytest.raises(Damage, match="b has 1 bytes, not 0"):
        verify(tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(Damage, match=r"b cannot be read \(No such file or directory\)"):
        verify(tmp_path)
    manifest = tmp_path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(Damage, match="was changed"):
        verify(tmp_path)
    write_sealed(manifest, {"about": {}, "files": {"../other": [4, "0" * 32]}})
    with pytest.raises(Damage, match=r"manifest\.json cannot be read"):
        verify(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("step", [7, 4], ids=["newest", "best"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    config: Config, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bits of a run without damage; a best checkpoint that is lost no longer counts."""
    scores = iter([10.0, 30.0, 20.0, 15.0] * 2)
    monkeypatch.setattr(
        "simcse_jax.training.scores.evaluate", lambda tasks, encode: {"reported": {tasks[0].name: next(scores)}}
    )
    whole, folder = Path(f"{config.output}-whole"), Path(config.output)
    with first_devices(1):
        assert train(replace(config, output=str(whole)))["best_step"] == 4
        with monkeypatch.context() as patch:
            patch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 7)
            assert train(config) == {"stopped": 7}
        assert list(checkpoint_folders(folder)) == [4, 6, 7]
        for path in (folder / "checkpoints" / str(step) / "params" / "d").iterdir():
            flip_a_bit(path)
        capsys.readouterr()
        results = train(config)
        said = capsys.readouterr().out
        assert f"the checkpoint of step {step} is damaged (the content of params/d/" in said
        assert f"the newest whole one is that of step {6 if step == 7 else 7}" in said
        assert ("the best checkpoint, of step 4, is gone" in said) == (step == 4)
        assert results["best_step"] == (8 if step == 4 else 4)
        assert (folder / "damaged" / str(step)).is_dir()
        assert_identical(final_state(folder), final_state(whole))
        assert [x for x in lines(folder) if "loss" in x] == [x for x in lines(whole) if "loss" in x]


@pytest.fixture(scope="module")
def trained(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1 to 3, the second the best; all three have the weights it began with."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = Config(output=str(folder), model=ModelConfig(path=str(tiny_bert), pooler="cls"))
    checkpoint = read_checkpoint(tiny_bert)
    create_run(folder, settings, "", checkpoint.trained(Pooling("cls"), 32), load_tokenizer(tiny_bert))
    with first_devices(1):
        spec = StepSpec(settings, build_model(checkpoint.config, settings.model), make_mesh(), 1, 1)
        params = with_fresh_head(load_params(checkpoint), spec.model, 0)
        with open_checkpoints(folder, CheckpointConfig(keep=3)) as checkpoints:
            for step in (1, 2, 3):
                items = to_items(create_state(spec, params))
                checkpoints.save(items, step, Progress(min(step, 2), 60.0, 0), 60.0 if step == 2 else 50.0)
    return folder


@pytest.mark.parametrize(
    ("damaged", "asked", "expected"),
    [
        ({}, None, 2),
        ({2: "params"}, None, 3),
        ({2: "params", 3: "params"}, None, 1),
        ({3: "params"}, "latest", 2),
        ({3: "training"}, "latest", 3),  # a reader needs no more than the parameters
        ({2: "params"}, "best", r"the best checkpoint of .*, that of step 2, is not whole \(the content of params/"),
        ({1: "params"}, 1, r"the checkpoint of step 1 in .* is damaged \(.*\): choose another of 1, 2, 3"),
        ({1: "params", 2: "params", 3: "params"}, None, r"no checkpoint of .* is whole \(step 1: .*; step 3: "),
    ],
)
def test_a_reader_takes_a_whole_checkpoint(
    trained: Path,
    tmp_path: Path,
    damaged: dict[int, str],
    asked: Any,
    expected: int | str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says which ones it passed over, and touches none."""
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    for step, item in damaged.items():
        flip_a_bit(
            max((folder / "checkpoints" / str(step) / item / "d").iterdir(), key=lambda path: path.stat().st_size)
        )
    before = sorted(path for path in folder.rglob("*"))
    with first_devices(1), telling(quiet=False):
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                load_model(folder, step=asked)
        else:
            assert load_model(folder, step=asked).step == expected
            said = capsys.readouterr().err
            passed_over = [
                step for step in damaged if f"the checkpoint of step {step} in {folder} is not whole" in said
            ]
            assert passed_over == [step for step, item in damaged.items() if item == "params"]
    assert sorted(path for path in folder.rglob("*")) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_token_cache_is_made_again(
    tiny_bert: Path, text_file: Path, tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of its files was changed."""
    tokenizer, corpus = load_tokenizer(tiny_bert), open_corpus(DataConfig(train=str(text_file)))

    def tokens() -> list[np.ndarray]:
        table = tokenize_corpus(corpus, tokenizer, 12, tmp_path, progress=False)
        return [np.array(table.ids), np.array(table.offsets)]

    expected = tokens()
    (folder,) = tmp_path.iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["blocks.bin", "ids-0.bin", MANIFEST, "offsets-0.bin"]
    with telling(quiet=False):
        for name in names:
            made = (folder / MANIFEST).stat().st_mtime_ns
            damage(folder / name)
            for found, wanted in zip(tokens(), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
            assert f"the token cache {folder} is damaged" in capsys.readouterr().err
            tokens()
            assert (folder / MANIFEST).stat().st_mtime_ns != made
            assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    folder = Index([f"sentence {n}" for n in range(50)], vectors).save(tmp_path / "index")
    files = sorted(folder.iterdir())
    assert len(files) == 4
    for path in files:
        with kept(path):
            damage(path)
            with pytest.raises(InputError, match=rf"the index {folder} is damaged|{folder} is not a saved index"):
                Index.load(folder)
    np.testing.assert_array_equal(Index.load(folder).vectors, Index.load(folder).vectors)


def test_damaged_results_of_a_copy_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    for _ in range(2):
        assert drop_damaged_results(tmp_path) == []
        assert not (tmp_path / "results.json").exists()


def test_a_lost_process_is_no_fault_of_a_store() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError), reached("gs://bucket/run"):
        raise jax.errors.JaxRuntimeError("connection closed by peer")
    with pytest.raises(StoreError), reached("gs://bucket/run"):
        raise OSError("forbidden")
