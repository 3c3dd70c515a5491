"""Runs on gs://, of one process and of several, against a store on loopback that speaks Google's protocol."""

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from simcse_jax.cli import main
from simcse_jax.config import CheckpointConfig, Config
from simcse_jax.errors import InputError
from simcse_jax.inference.loading import load_model
from simcse_jax.runs.checkpoints import (
    Progress,
    check_whole,
    checkpoint_folders,
    open_checkpoints,
    restore,
    set_damaged_aside,
)
from simcse_jax.storage import objects
from simcse_jax.storage.guarded import Guarded
from simcse_jax.storage.manifest import Damage, write_manifest
from simcse_jax.storage.mirror import Mirror, copy_again, fetch_run, working_folder
from simcse_jax.storage.objects import MANIFEST, local_path, native_place
from simcse_jax.training.trace import save_memory
from simcse_jax.training.trainer import train
from tests.conftest import first_devices, full, release
from tests.gcs import Store, serve
from tests.jobs import Job
from tests.test_resume import assert_identical, config, dev_file, final_state, lines, tiny_bert
from tests.test_storage import make_run

__all__ = ["config", "dev_file", "tiny_bert"]

if find_spec("gcsfs") is None:
    pytest.skip("gcsfs is not installed", allow_module_level=True)
# The packages of the store have warnings of their own.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with serve() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        import gcsfs  # which reads one of them when it is imported

        gcsfs.GCSFileSystem.clear_instance_cache()
        yield store


@pytest.fixture
def store(server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store, empty; what is read from it is copied to a cache of the test's own."""
    server.objects.clear()
    monkeypatch.setattr(objects, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(local_path, "__defaults__", (str(tmp_path / "cache"),))
    yield server
    server.on_write, server.forbids = Store.on_write, Store.forbids


URL = "gs://bucket/runs/a"


def test_of_two_writers_the_later_one_finds_that_it_is_late(store: Store) -> None:
    one, other = Guarded(f"{URL}/x"), Guarded(f"{URL}/x")
    assert one.read() is None
    assert other.read() is None
    assert one.write(b"one")
    assert not other.write(b"other")
    assert other.read() == b"one"
    assert other.write(b"other")
    assert not one.write(b"one again")
    assert store.objects["bucket/runs/a/x"][0] == b"other"


def test_a_write_whose_answer_is_lost_is_no_other_writer(store: Store) -> None:
    def lose(when: str) -> None:
        if when == "answer":
            store.on_write = Store.on_write
            raise ConnectionError("lost")

    one = Guarded(f"{URL}/x")
    one.read()
    store.on_write = lose
    assert one.write(b"one")
    assert one.write(b"one again")
    assert store.objects["bucket/runs/a/x"][0] == b"one again"


def test_a_mirror_names_no_checkpoint_and_the_store_is_right(store: Store, tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    make_run(here, 1)
    shutil.rmtree(here / "checkpoints")
    assert fetch_run(URL, tmp_path / "none") is None
    mirror = Mirror(here, URL, None)
    mirror.push()
    store.objects["bucket/runs/a/checkpoints/7/data"] = b"7", 10**6
    (here / "results.json").write_text("{}")
    mirror.push()
    assert store.names("bucket/runs/a") == [MANIFEST, "checkpoints/7/data", "results.json", "run.json"]
    # What was written here and is not there was written by a process that has lost the run.
    (here / "results.json").write_text("later")
    (here / "more.json").write_text("later")
    fetched = fetch_run(URL, here)
    assert (here / "results.json").read_text() == "{}"
    assert not (here / "more.json").exists()
    fetch_run(URL, other)
    assert sorted(path.name for path in other.iterdir()) == ["results.json", "run.json"]
    fetch_run(URL, tmp_path / "second", ("run.json", "model/"))
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["run.json"]
    # The mirror of a version that copied checkpoints names them.
    fetched["files"]["checkpoints/7/data"] = [1, 1]
    store.objects[f"bucket/runs/a/{MANIFEST}"] = json.dumps(fetched).encode(), 10**6
    assert fetch_run(URL, other) == fetched
    assert not (other / "checkpoints").exists()
    Mirror(other, URL, fetched).push()
    assert "checkpoints/7/data" in store.names("bucket/runs/a")
    with pytest.raises(InputError, match=r"lies in the folder of another run, bucket/runs/a: choose another --output"):
        fetch_run(f"{URL}/inner/b", tmp_path / "inner")
    store.forbids = lambda name: not name.startswith("bucket/runs/a/inner/")
    assert fetch_run(f"{URL}/inner/b", tmp_path / "inner") is None
    store.forbids = Store.forbids
    with pytest.raises(InputError, match="another process now trains in gs://"):
        mirror.push()
    store.objects.clear()
    assert fetch_run(URL, here) is None


def test_of_two_that_begin_a_run_at_once_one_ends(store: Store, tmp_path: Path) -> None:
    mirrors = []
    for name in ("one", "other"):
        make_run(tmp_path / name, 1)
        mirrors.append(Mirror(tmp_path / name, URL, None))
    one, other = mirrors
    read = other._manifest.read

    def read_early() -> bytes | None:
        content = read()
        other._manifest.read = read
        one.push()
        return content

    other._manifest.read = read_early
    with pytest.raises(InputError, match="another process now trains in gs://"):
        other.push()
    one.push()
    (tmp_path / "one" / "figure.svg").write_text("drawn at the end")
    copy_again(tmp_path / "one", URL)
    assert "figure.svg" in store.names("bucket/runs/a")


@pytest.mark.parametrize("name", ["runs//a", "runs/../a", "./a", "a?b", "a#1", "lr*", "seed[1]"])
def test_places_that_orbax_would_not_find_are_refused(store: Store, name: str) -> None:
    with pytest.raises(InputError, match=r"gs://bucket/.* cannot be the place of a run"):
        native_place(f"gs://bucket/{name}")


def tree() -> dict[str, Any]:
    return {"params": {"w": jax.random.normal(jax.random.key(0), (64, 64)), "b": jnp.arange(7.0)}}


@pytest.fixture
def run(store: Store, tmp_path: Path) -> Path:
    """The working folder of a run with checkpoints of steps 1 to 3 on the store, the second the best."""
    folder = tmp_path / "work" / "a"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    with Mirror(folder, URL, None) as mirror:
        place = native_place(URL)
        with open_checkpoints(folder, CheckpointConfig(keep=3), place, mirror.push) as checkpoints:
            for step in (1, 2, 3):
                score = {1: 50.0, 2: 60.0, 3: 55.0}[step]
                (folder / "metrics.jsonl").write_text(f"{step}\n")
                checkpoints.save(tree(), step, Progress(min(step, 2), max(score, 55.0), step // 3), score)
    return folder


def test_each_process_puts_its_memory_profile_on_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirror is that of process 0; a store that cannot be written leaves the file on the host."""
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")
    file = tmp_path / "profile" / "memory-3.prof"
    told = f"; what held the memory is in {{}}: pprof --text {file}"
    assert save_memory(tmp_path, native_place(URL), error) == told.format(f"{URL}/profile/memory-3.prof")
    assert store.objects["bucket/runs/a/profile/memory-3.prof"][0] == file.read_bytes()

    def denied(*_: Any) -> None:
        raise PermissionError("no access")

    place = native_place(URL)
    monkeypatch.setattr(type(place), "write_bytes", denied)
    assert save_memory(tmp_path, place, error) == told.format(file)


def test_a_checkpoint_on_the_store_is_whole_and_restored(store: Store, run: Path) -> None:
    place = native_place(URL)
    folders = checkpoint_folders(place)
    assert list(folders) == [1, 2, 3]
    for folder in folders.values():
        check_whole(folder)
    assert set_damaged_aside(run, place) == []
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree())
    assert_identical(restore(folders[2], shapes), tree())
    copy = local_path(URL)
    assert list(checkpoint_folders(copy)) == [1, 2, 3]
    check_whole(checkpoint_folders(copy)[3])


def test_a_checkpoint_without_its_last_object_is_none(store: Store, run: Path) -> None:
    del store.objects["bucket/runs/a/checkpoints/3/commit_success.txt"]
    assert list(checkpoint_folders(native_place(URL))) == [1, 2]
    assert list(checkpoint_folders(local_path(URL))) == [1, 2]
    with open_checkpoints(run, CheckpointConfig(keep=3), native_place(URL)) as checkpoints:
        assert not any(name.startswith("checkpoints/3/") for name in store.names("bucket/runs/a"))
        checkpoints.save(tree(), 3, Progress(), None)
    check_whole(checkpoint_folders(native_place(URL))[3])


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damage_on_the_store_is_found_and_set_aside(store: Store, run: Path, damage: str) -> None:
    place = native_place(URL)
    name = max((n for n in store.objects if "/checkpoints/3/" in n), key=lambda n: len(store.objects[n][0]))
    content, generation = store.objects[name]
    changed = {"flipped": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1]}.get(damage)
    store.objects.update({name: (changed, generation + 10**6)} if changed else {})
    if not changed:
        del store.objects[name]
    with pytest.raises(Damage):
        check_whole(checkpoint_folders(place)[3])
    (line,) = set_damaged_aside(run, place)
    assert "now in gs://bucket/runs/a/damaged/3: the newest whole one is that of step 2" in line
    assert list(checkpoint_folders(place)) == [1, 2]
    assert any(name.startswith("damaged/3/") for name in store.names("bucket/runs/a"))
    assert not (local_path(URL) / "damaged").exists()


@pytest.mark.parametrize("part", ["_CHECKPOINT_METADATA", "manifest.json", "params/_METADATA"])
def test_what_cannot_be_read_is_not_taken_for_damaged(store: Store, run: Path, part: str) -> None:
    store.forbids = lambda name: name == f"bucket/runs/a/checkpoints/3/{part}"
    with pytest.raises(InputError, match=r"gs://.* cannot be read or written .*: check the name, credentials"):
        set_damaged_aside(run, native_place(URL))
    assert not any(name.startswith("damaged/") for name in store.names("bucket/runs/a"))


def test_no_checkpoint_is_completed_once_another_took_over(
    store: Store, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, fetched = native_place(URL), fetch_run(URL, run)
    mirror = Mirror(run, URL, fetched)
    mirror.push()

    def write_late(*given: Any, **named: Any) -> None:
        """Takes the run over before orbax ends the checkpoint."""
        Mirror(run, URL, fetch_run(URL, run.parent / "other")).push()
        write_manifest(*given, **named)

    monkeypatch.setattr("simcse_jax.runs.checkpoints.write_manifest", write_late)
    with (
        pytest.raises(InputError, match="another process now trains in gs://"),
        open_checkpoints(run, CheckpointConfig(keep=3), place, mirror.push) as checkpoints,
    ):
        checkpoints.save(tree(), 4, Progress(), None)  # of which closing waits for the end
    assert list(checkpoint_folders(place)) == [1, 2, 3]
    with (
        pytest.raises(InputError, match="another process now trains in gs://"),
        open_checkpoints(run, CheckpointConfig(keep=3), place, mirror.push) as checkpoints,
    ):
        checkpoints.save(tree(), 5, Progress(), None)
    assert not any("/checkpoints/5/" in name for name in store.objects)


def test_a_run_that_loses_a_checkpoint_while_it_is_read_is_read_again(
    store: Store, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = objects._copy

    def copy_late(*given: Any) -> None:
        for name in [name for name in store.objects if "/checkpoints/1/" in name]:
            del store.objects[name]
        copy(*given)

    monkeypatch.setattr(objects, "_copy", copy_late)
    assert list(checkpoint_folders(local_path(URL))) == [2, 3]


@pytest.fixture
def here(config: Config, tmp_path: Path) -> Path:
    """The same run in a local folder, of one process with two devices."""
    with first_devices(2):
        train(replace(config, output=str(tmp_path / "here")))
    return tmp_path / "here"


def assert_same(copy: Path, other: Path) -> None:
    """The log, the results and the train state, bit for bit."""
    assert lines(copy) == lines(other)
    results = [json.loads((folder / "results.json").read_text()) for folder in (copy, other)]
    for name in ("memory", "seal"):  # the program of two processes differs
        results[0][name] = results[1][name]
    assert results[0] == results[1]
    assert_identical(final_state(copy), final_state(other))
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (copy, other)]
    assert kept[0] == kept[1]


ODD = "gs://bucket/my runs/a, b=1"


@pytest.mark.full
def test_a_run_goes_on_elsewhere_and_the_commands_read_it(
    store: Store, config: Config, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = replace(config, output=f"{ODD}/")
    for folder in (
        "bucket/my runs/",
        "bucket/my runs/a, b=1/",
        "bucket/my runs/a, b=1/checkpoints/",
    ):  # made in a web console
        store.objects[folder] = b"", 10**6
    with first_devices(2):
        with monkeypatch.context() as patch:
            patch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 5)
            assert train(there) == {"stopped": 5}
        work = working_folder(there.output, there.data.cache)
        assert not (work / "checkpoints").exists()
        shutil.rmtree(work)
        results = train(there)
    assert results["steps"] == 7
    assert_same(local_path(ODD), here)
    local, remote = load_model(str(here)), load_model(ODD)
    assert local.step == remote.step
    assert_identical(local.params, remote.params)
    assert main(["verify", ODD]) in (None, 0)
    main(["evaluate", ODD, "--tasks", str(config.evaluation.dev)])
    main(["export", ODD, "gs://bucket/exports/a"])
    main(["encode", "gs://bucket/exports/a", config.data.train, str(tmp_path / "vectors.npy")])
    assert_identical(load_model("gs://bucket/exports/a").params, local.params)
    with pytest.raises(InputError, match="other settings"):
        train(replace(there, seed=7))


CONFIG = """
from simcse_jax.config import *
config = Config(
    batch_size=16, max_steps=12, log_every=1,
    model=ModelConfig(path={model!r}, pooler="cls", mlp_only_train=True),
    data=DataConfig(train={text!r}, max_length=12, cache={cache!r}),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    evaluation=EvaluationConfig(dev={dev!r}, every=4),
    checkpoint=CheckpointConfig(every=3, keep=2),
)
"""


@pytest.fixture
def command(config: Config, tmp_path: Path) -> list[str]:
    names = {"model": config.model.path, "text": config.data.train, "dev": config.evaluation.dev}
    (tmp_path / "config.py").write_text(CONFIG.format(**names, cache=str(tmp_path / "cache")))
    return ["-m", "simcse_jax", "train", str(tmp_path / "config.py"), "--output", URL]


@pytest.mark.full
def test_two_processes_equal_one_on_disk(store: Store, here: Path, command: list[str], tmp_path: Path) -> None:
    """They share no disk: their tokens lie on the store, too."""
    homes = {process: {"HOME": str(tmp_path / f"home-{process}")} for process in range(2)}
    command += ["--data.cache", "gs://bucket/cache"]
    with Job(2, command, tmp_path / "logs", homes) as job:
        assert job.ends(300) == [0, 0], job.said()
    names = store.names("bucket/runs/a")
    assert "figures/loss.svg" in names
    assert {name.split("/")[3] for name in names if "/params/ocdbt.process_" in name} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    assert_same(local_path(URL), here)
    assert [name[-9:] for name in store.names("bucket/cache") if "/ids-" in name] == ["ids-0.bin", "ids-1.bin"]
    with Job(2, command, tmp_path / "logs", homes) as job:  # the run has ended
        assert job.ends(300) == [0, 0], job.said()
    assert_same(local_path(URL), here)


@pytest.mark.full
def test_all_processes_end_where_another_job_takes_over(store: Store, command: list[str], tmp_path: Path) -> None:
    with Job(2, [*command, "--max-steps", "5000", "--heartbeat", "10"], tmp_path / "logs") as job:
        job.until(lambda: len(checkpoint_folders(native_place(URL))) > 1)
        for _ in range(20):  # the run may claim its state anew at any moment
            with suppress(InputError):
                Mirror(tmp_path / "other", URL, fetch_run(URL, tmp_path / "other")).push()
                break
        assert job.ends(60) == [2, 2]
        for process in (0, 1):
            (line,) = job.errors(process)
            assert "another process now trains in gs://bucket/runs/a: this one ends" in line
    kept = checkpoint_folders(native_place(URL))
    assert len(kept) > 1
    for folder in kept.values():
        check_whole(folder)


@pytest.mark.parametrize("kills", [full(3), release(12)])
def test_kill_9_between_and_inside_uploads_ends_bit_identical(
    store: Store, here: Path, command: list[str], tmp_path: Path, kills: int
) -> None:
    """A process or both die when one writes: half of an object sent, all of it, or the object there and no answer."""
    generator, killed = random.Random(0), 0
    for kill in range(kills):
        moment, last = ("object", "body", "answer")[kill % 3], generator.randrange(5, 90)
        with Job(2, [*command, "--heartbeat", "10"], tmp_path / "logs") as job:
            victims = job.processes if kill % 2 else [generator.choice(job.processes)]
            writes = itertools.count(1)

            def on_write(
                when: str, victims: list[Any] = victims, moment: str = moment, last: int = last, writes: Any = writes
            ) -> None:
                if when == moment and next(writes) == last:
                    for process in victims:
                        process.kill()
                    raise ConnectionError("killed")

            store.on_write = on_write
            ended = job.ends(300)
            store.on_write = Store.on_write
            if not any(ended):  # it came to its end before
                break
            assert ended.count(-9) == len(victims), job.said()
            killed += 1
    assert killed > kills // 3
    with Job(2, command, tmp_path / "logs") as job:
        assert job.ends(300) == [0, 0], job.said()
    assert_same(local_path(URL), here)
