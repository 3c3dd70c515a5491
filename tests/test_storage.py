"""Text, models, runs and exports on s3://, whose protocol is spoken over a socket."""

import errno
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.config import CheckpointConfig, Config
from simcse_jax.errors import InputError
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import load_model
from simcse_jax.runs.metrics_log import TIMES, read_log
from simcse_jax.storage import objects as storage
from simcse_jax.storage.files import is_remote, write_text
from simcse_jax.storage.mirror import Mirror, copy_again, fetch_run, working_folder
from simcse_jax.storage.objects import MANIFEST, check_new_output, local_path
from simcse_jax.training.trainer import train

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
# The packages of S3 and its stand-in have warnings of their own.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of an empty S3 on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The file system of that store, with a bucket of the test's own as `s3.bucket`."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # of a server that has stopped, where tests of this file run in two parts
    store = s3fs.S3FileSystem(use_listings_cache=False)
    store.bucket = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    store.mkdir(store.bucket)
    return store


@pytest.fixture
def config(small_run: Config) -> Config:
    settings = replace(small_run.evaluation, every=3)
    return replace(small_run, max_steps=6, log_every=1, evaluation=settings, checkpoint=CheckpointConfig(every=2))


def figures(file: Path) -> list[dict[str, float]]:
    return [{name: x for name, x in line.items() if name not in TIMES} for line in read_log(file)]


@pytest.mark.full
def test_a_run_on_s3_goes_on_elsewhere_and_is_read_and_exported(
    s3: Any, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, model, dev pairs, run and export all on the store: the same figures as without it, bit for bit."""
    train(config)
    base = f"s3://{s3.bucket}/some/where"
    for name, file in (("text.txt", config.data.train), ("dev.tsv", config.evaluation.dev)):
        s3.put_file(file, f"{base}/{name}")
    s3.put(config.model.path, f"{base}/model", recursive=True)
    monkeypatch.setattr(storage, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(local_path, "__defaults__", (str(tmp_path / "cache"),))
    there = replace(
        config,
        output=f"{base}/run",
        model=replace(config.model, path=f"{base}/model"),
        data=replace(config.data, train=f"{base}/text.txt"),
        evaluation=replace(config.evaluation, dev=f"{base}/dev.tsv"),
    )
    with monkeypatch.context() as patch:
        patch.setattr("simcse_jax.training.trainer.StopRequest.__call__", lambda self, step: step == 3)
        assert train(there) == {"stopped": 3}
    names = {path.split("/run/", 1)[1] for path in s3.find(f"{base}/run")}
    assert {"run.json", "metrics.jsonl", "model/config.json", MANIFEST} <= names
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} >= {"3"}
    assert not any("tmp" in name or name.endswith((".lock", ".partial")) for name in names)

    shutil.rmtree(tmp_path / "cache" / "runs")  # on another machine
    results = train(there)
    assert results["step"] == 6
    work = working_folder(there.output, there.data.cache)
    assert figures(work / "metrics.jsonl") == figures(tmp_path / "run" / "metrics.jsonl")
    assert s3.cat_file(f"{base}/run/metrics.jsonl") == (work / "metrics.jsonl").read_bytes()
    assert json.loads(s3.cat_file(f"{base}/run/results.json"))["best_step"] == results["best_step"]
    kept = {p.split("/checkpoints/")[1].split("/")[0] for p in s3.find(f"{base}/run/checkpoints")}
    assert kept == {path.name for path in (work / "checkpoints").iterdir()}  # what was dropped here is dropped there

    shutil.rmtree(tmp_path / "cache" / "runs")
    local, remote = load_model(config.output), load_model(there.output)
    assert local.step == remote.step
    for a, b in zip(jax.tree.leaves(local.params), jax.tree.leaves(remote.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert export(remote, f"{base}/exported") == f"{base}/exported"
    exported = load_model(f"{base}/exported")
    for a, b in zip(jax.tree.leaves(local.params), jax.tree.leaves(exported.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(InputError, match=r"output s3://.*/exported exists"):
        export(remote, f"{base}/exported")
    with pytest.raises(InputError, match="is not a run of ours"):
        train(replace(there, output=f"{base}/exported"))


def test_what_is_read_is_copied_once_and_anew_where_it_changed(s3: Any, tmp_path: Path) -> None:
    url, cache = f"s3://{s3.bucket}/folder/text.txt", str(tmp_path)
    s3.pipe_file(url, b"one")
    first = local_path(url, cache)
    assert (first.name, first.read_bytes()) == ("text.txt", b"one")
    changed = first.stat().st_mtime_ns
    assert local_path(Path(url), cache) == first  # pathlib makes one slash of two
    assert first.stat().st_mtime_ns == changed
    s3.pipe_file(url, b"two")
    assert local_path(url, cache).read_bytes() == b"two"
    assert local_path(f"s3://{s3.bucket}/folder", cache).joinpath("text.txt").read_bytes() == b"two"
    assert local_path(str(tmp_path)) == tmp_path


def make_run(folder: Path, step: int) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in (f"{step}", f"{step + 1}.orbax-checkpoint-tmp"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "data").write_text(str(step))
    write_text(folder / "run.json", "{}")


def test_a_mirror_writes_what_is_complete_and_ends_where_another_took_over(s3: Any, tmp_path: Path) -> None:
    url = f"s3://{s3.bucket}/run"
    here, other = tmp_path / "here", tmp_path / "other"
    make_run(here, 1)
    mirror = Mirror(here, url, fetch_run(url, here))
    mirror.push()
    s3.pipe_file(f"{url}/checkpoints/9/data", b"cut short")  # put by one that was killed before its manifest
    make_run(here, 2)
    mirror.push()
    assert not s3.exists(f"{url}/checkpoints/1/data")
    fetched = fetch_run(url, other)
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == ["2"]
    make_run(other, 3)
    Mirror(other, url, fetched).push()
    make_run(here, 4)
    with pytest.raises(InputError, match="another process now trains in s3://"):
        mirror.push()
    with pytest.raises(InputError, match="another process now trains in s3://"):
        mirror.check()
    with pytest.raises(InputError, match="another process now trains in s3://"):
        copy_again(here, url)
    fetch_run(url, here)
    assert sorted(path.name for path in (here / "checkpoints").iterdir()) == ["3"]


def test_what_was_copied_since_a_run_was_fetched_is_not_removed(s3: Any, tmp_path: Path) -> None:
    url = f"s3://{s3.bucket}/run"
    here, other = tmp_path / "here", tmp_path / "other"
    make_run(here, 1)
    mirror = Mirror(here, url, fetch_run(url, here))
    mirror.push()
    fetched = fetch_run(url, other)
    make_run(here, 2)
    write_text(here / "results.json", "{}")
    mirror.push()
    with pytest.raises(InputError, match=r"s3://.*/run has changed in the meantime: run the same command again"):
        Mirror(other, url, fetched).push()
    assert s3.exists(f"{url}/results.json")
    assert s3.exists(f"{url}/checkpoints/2/data")
    write_text(here / "figure.svg", "drawn at the end")
    copy_again(here, url)
    Mirror(other, url, fetch_run(url, other)).push()
    assert s3.cat_file(f"{url}/checkpoints/2/data") == b"2"
    assert s3.cat_file(f"{url}/figure.svg") == b"drawn at the end"


def test_a_run_that_is_gone_from_the_store_is_kept_here(s3: Any, tmp_path: Path) -> None:
    url, here = f"s3://{s3.bucket}/run", tmp_path / "here"
    make_run(here, 1)
    Mirror(here, url, None).push()
    s3.rm(url, recursive=True)
    with pytest.raises(InputError, match=rf"copied to {url} is no longer there, but {here} still has it: remove that"):
        fetch_run(url, here)
    (here / ".owner").unlink()
    Mirror(here, url, fetch_run(url, here)).push()
    assert s3.cat_file(f"{url}/checkpoints/1/data") == b"1"


@pytest.mark.parametrize("owned", [True, False])
def test_a_first_copy_that_was_cut_short_goes_on(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owned: bool
) -> None:
    """Killed after some objects were put; or before the working folder had even the name of its owner."""
    url, here = f"s3://{s3.bucket}/run", tmp_path / "here"
    make_run(here, 1)
    mirror = Mirror(here, url, fetch_run(url, here))
    with monkeypatch.context() as patch:
        patch.setattr(mirror._store, "put_file", lambda *given: 1 / 0)
        with pytest.raises(InputError, match="cannot be written"):
            mirror.push()
    s3.pipe_file(f"{url}/model/config.json", b"{}")
    with pytest.raises(InputError, match=rf"the run at {url} has no checkpoint yet"):
        local_path(url, str(tmp_path))
    if not owned:
        (here / ".owner").unlink()
    assert fetch_run(url, tmp_path / "other") == {"owner": mirror._owner, "files": {}}
    assert not (tmp_path / "other").exists()
    Mirror(here, url, fetch_run(url, here)).push()
    assert (local_path(url, str(tmp_path)) / "checkpoints" / "1" / "data").read_text() == "1"


def test_folder_keys_of_web_consoles_are_passed_over(s3: Any, tmp_path: Path) -> None:
    for key in ("folder/", "folder/empty/", "folder/some/", "run/"):
        s3.call_s3("put_object", Bucket=s3.bucket, Key=key, Body=b"")
    s3.pipe_file(f"s3://{s3.bucket}/folder/some/text.txt", b"one")
    copy = local_path(f"s3://{s3.bucket}/folder", str(tmp_path))
    assert [path.relative_to(copy).as_posix() for path in copy.rglob("*")] == ["some", "some/text.txt"]
    assert fetch_run(f"s3://{s3.bucket}/run", tmp_path / "run") is None
    assert check_new_output(f"s3://{s3.bucket}/run") == f"s3://{s3.bucket}/run"


def test_nothing_is_written_outside_of_the_cache(s3: Any, tmp_path: Path) -> None:
    s3.call_s3("put_object", Bucket=s3.bucket, Key="folder/../../../outside.txt", Body=b"one")
    with pytest.raises(InputError, match=r"names the file .* which leads out of its folder"):
        local_path(f"s3://{s3.bucket}/folder", str(tmp_path / "cache"))
    assert not list(tmp_path.rglob("outside.txt"))


def test_errors_of_the_store_and_of_the_disk_are_told_apart(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3.bucket}/text.txt"
    s3.pipe_file(url, b"one")
    for error, said in (
        (PermissionError("no access"), "no access.: check the name, credentials and network"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.: free space on the local disk"),
    ):

        def get_file(*given: Any, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(storage.open_store(url)[0], "get_file", get_file)
        with pytest.raises(InputError, match=f"{url} cannot be read or written .{said}"):
            local_path(url, str(tmp_path))


def test_a_run_that_is_copied_while_it_is_read_is_read_again(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, here = f"s3://{s3.bucket}/run", tmp_path / "here"
    make_run(here, 1)
    mirror = Mirror(here, url, None)
    mirror.push()
    make_run(here, 2)
    read = storage.read_manifest

    def read_late(*given: Any) -> Any:
        mirror.push()
        return read(*given)

    monkeypatch.setattr("simcse_jax.storage.objects.read_manifest", read_late)
    assert (local_path(url, str(tmp_path)) / "checkpoints" / "2" / "data").read_text() == "2"


def test_an_unreachable_store_does_not_end_a_run(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so once, goes on when the store is back, and says where the run is if it never is."""
    make_run(tmp_path / "run", 1)
    monkeypatch.setattr("simcse_jax.storage.mirror._INTERVAL", 0.05)
    said: list[str] = []
    mirror = Mirror(tmp_path / "run", f"s3://{s3.bucket}/run", None, said.append)
    failing = True
    put = mirror._store.pipe_file

    def pipe_file(*given: Any) -> None:
        if failing:
            raise ConnectionError("gone")
        put(*given)

    mirror.__enter__()
    monkeypatch.setattr(mirror._store, "pipe_file", pipe_file)
    for number, failing in enumerate((True, False, True), 1):  # noqa: B007  (what pipe_file sees)
        write_text(tmp_path / "run" / "metrics.jsonl", "x" * number)
        for _ in range(200):
            if len(said) >= number:
                break
            time.sleep(0.05)
    with pytest.raises(InputError, match=r"cannot be written \(gone\); the run is in .*run and is copied when"):
        mirror.__exit__(None, None, None)
    fetch_run(f"s3://{s3.bucket}/run", tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "xxx"  # newer than what the store has
    gone, again = "cannot be written for now (gone)", "can be written again"
    assert [line.split("/run ")[1] for line in said] == [gone, again, gone]


def test_what_stores_cannot_hold_is_refused(
    s3: Any, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{s3.bucket}/x"
    for command in (
        ["encode", config.model.path, config.data.train, f"{url}.npy", "--pooler", "avg"],
        ["vocabulary", config.data.train, url],
        ["ablate", "dropout", "--output", url, "--base.data.train", config.data.train],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert "is on an object store, where only runs and exports can be written" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"data.cache is {url}: .* Give a folder, or a place on gs://"):
        train(replace(config, data=replace(config.data, cache=url)))  # pathlib would make a folder named s3:
    with pytest.raises(InputError, match=f"there is nothing at {url}"):
        local_path(url)
    with pytest.raises(InputError, match=r"cannot be read or written|nothing at"):
        local_path("s3://no-such-bucket-at-all/x")
    with pytest.raises(InputError, match=r"nothing at s3://.*jsonl, and patterns are for local folders"):
        local_path(f"s3://{s3.bucket}/*.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("simcse_jax.training.prepare.jax.process_count", lambda: 2)
        with pytest.raises(InputError, match="where one process can train"):
            train(replace(config, output=url))
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs the Python package gcsfs: pip install "simcse-jax\[storage\]"'):
        local_path("gs://bucket/text.txt")


@pytest.mark.parametrize(
    ("name", "remote"),
    [("s3://b/x", True), ("gs:/b/x", True), ("s3", False), ("s3:", False), ("hf://x", False), ("/s3://b", False)],
)
def test_what_a_url_is(name: str, remote: bool) -> None:
    assert is_remote(name) == remote
