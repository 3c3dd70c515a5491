"""Models and data sets that change where they lie: all processes of a job take the version of process 0."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import pytest

from simcse_jax.config import DataConfig
from simcse_jax.data import hub as hub_module
from simcse_jax.data import tfds
from simcse_jax.data.corpus import open_source
from simcse_jax.errors import InputError
from simcse_jax.pretrained.folders import locate
from simcse_jax.runtime import processes
from tests.jobs import Job

OLD, NEW = "0" * 40, "1" * 40


class Hub:
    """A hub that moves from commit to commit, and the caches of the hosts."""

    def __init__(self, root: Path) -> None:
        self.commit, self.reachable, self._root = OLD, True, root
        self.cached: set[str] = set()

    def info(self, name: str, revision: str | None = None, **options: Any) -> Any:
        if not self.reachable:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=revision or self.commit)

    def download(self, name: str, revision: str | None = None, local_files_only: bool = False, **options: Any) -> str:
        commit = revision or (self.commit if self.reachable else max(self.cached, default=""))
        if local_files_only or not self.reachable:
            if commit not in self.cached:
                raise FileNotFoundError("not in the cache")
        else:
            self.cached.add(commit)
        folder = self._root / name / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").touch()
        return str(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    found = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, *given, **options: found.info(*given, **options))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda _, *given, **options: found.info(*given, **options)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.download)
    monkeypatch.setattr(hub_module, "_missing", lambda *_: [])
    monkeypatch.setattr(hub_module, "_cached_commit", lambda *_: None)
    return found


@pytest.fixture
def act_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets this process stand for one of a job."""
    store: dict[str, str] = {}

    def read(key: str, milliseconds: int) -> str:
        assert key in store, f"waits for ever for {key}"
        return store[key]

    def write(key: str, value: str, allow_overwrite: bool) -> None:
        store[key] = value

    def look(key: str) -> str:
        if key not in store:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return store[key]

    client = SimpleNamespace(blocking_key_value_get=read, key_value_set=write, key_value_try_get=look, store=store)
    monkeypatch.setattr(processes, "private", lambda *_: SimpleNamespace(client=client))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)

    def act(process: int) -> None:
        monkeypatch.setattr(jax, "process_index", lambda: process)

    return act


def model() -> str:
    return locate("org/name").name


def data() -> str:
    version: str = open_source(DataConfig(train="org/name")).version  # type: ignore[attr-defined]
    return version


@pytest.mark.parametrize("find", [model, data])
def test_all_take_the_commit_of_process_0(find: Callable[[], str], hub: Hub, act_as: Callable[[int], None]) -> None:
    """Also where the hub moves meanwhile, and where a process does not reach it and has that commit."""
    act_as(0)
    assert find() == OLD
    hub.commit = NEW
    assert find() == OLD  # as long as the job lasts
    act_as(1)
    assert find() == OLD
    hub.cached, hub.reachable = {OLD, NEW}, False
    assert find() == OLD


def test_a_process_that_lacks_the_commit_says_so(hub: Hub, act_as: Callable[[int], None]) -> None:
    act_as(0)
    model()
    data()
    act_as(1)
    hub.cached, hub.reachable = {NEW}, False
    with pytest.raises(
        InputError, match=rf"process 1 \({socket.gethostname()}\) does not find model org/name .*{OLD}: .*no network"
    ):
        model()
    # A data set need not be read where tokens of it are in the cache.
    source = open_source(DataConfig(train="org/name"))
    assert source.identity()[1] == OLD
    with pytest.raises(InputError, match=r"'org/name' is not .*no network"):
        source.header()


@pytest.mark.parametrize("find", [model, data])
def test_process_0_may_be_the_one_without_network(
    find: Callable[[], str], hub: Hub, act_as: Callable[[int], None]
) -> None:
    act_as(0)
    hub.cached, hub.reachable, hub.commit = {OLD}, False, NEW
    assert find() == OLD
    act_as(1)
    hub.cached, hub.reachable = set(), True
    assert find() == OLD


def test_another_job_has_the_version_of_its_own_time(hub: Hub, act_as: Callable[[int], None]) -> None:
    """Of a Python process that ends a job and begins another."""
    act_as(0)
    assert model() == OLD
    hub.commit = NEW
    processes.private().client.store.clear()  # type: ignore[call-arg]
    assert model() == NEW
    act_as(1)
    assert model() == NEW


@pytest.mark.parametrize("find", [model, data])
def test_what_process_0_does_not_find_is_an_error_of_all(
    find: Callable[[], str], hub: Hub, act_as: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do not wait for it, while it may wait for them."""

    def fails(*given: Any, **options: Any) -> None:
        raise InputError("no such name")

    with monkeypatch.context() as patch:
        patch.setattr("simcse_jax.data.hub._open", fails)
        patch.setattr("simcse_jax.pretrained.folders._download", fails)
        act_as(0)
        with pytest.raises(InputError, match=r"^no such name"):
            find()
    act_as(1)
    with pytest.raises(InputError, match=r"process 0 does not find .*org/name.*: no such name"):
        find()


def test_a_process_says_what_it_waits_for(
    hub: Hub, act_as: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    act_as(0)
    model()
    act_as(1)
    client, waits = processes.private().client, iter([True, True, False])  # type: ignore[call-arg]

    def late(key: str, milliseconds: int) -> str:
        if next(waits):
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return str(heard(key, milliseconds))

    heard = client.blocking_key_value_get
    monkeypatch.setattr(client, "blocking_key_value_get", late)
    model()
    assert capfd.readouterr().err.count("waiting   for process 0 to find model org/name: if") == 2


@pytest.mark.parametrize("find", [model, data])
def test_a_path_of_process_0_alone_is_an_error(
    find: Callable[[], str], hub: Hub, act_as: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do not wait for a commit that never comes, nor take what the hub has by that name."""
    folder = tmp_path / "here" / "org" / "name"
    folder.mkdir(parents=True)
    (folder / ".gitattributes").touch()
    monkeypatch.chdir(tmp_path / "here")
    act_as(0)
    find()
    monkeypatch.chdir(tmp_path)
    act_as(1)
    with pytest.raises(InputError, match="a path there, and not here"):
        find()


def test_all_take_the_prepared_version_of_process_0(
    act_as: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ["1.0.0"]

    def find(name: str, split: str, wanted: str | None) -> Any:
        version = wanted or prepared[-1]
        if version not in prepared:
            raise InputError("not prepared")
        return tfds.TfdsData(name, split, SimpleNamespace(info=SimpleNamespace(version=version)))

    monkeypatch.setattr(tfds, "_open", find)
    act_as(0)
    assert tfds.open_tfds("tfds:a/b", "train").builder.info.version == "1.0.0"
    act_as(1)
    prepared.append("2.0.0")
    assert tfds.open_tfds("tfds:a/b", "train").builder.info.version == "1.0.0"
    del prepared[0]
    with pytest.raises(InputError, match=r"tfds:a/b \(train\) as process 0 has it, 1\.0\.0: not prepared"):
        tfds.open_tfds("tfds:a/b", "train")


def test_prepared_data_of_another_commit_are_not_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, `datasets` gives what it prepared last, of whatever commit."""
    datasets = pytest.importorskip("datasets")
    hub.reachable = False
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: SimpleNamespace(column_names=["text"]))
    for prepared in (OLD, NEW):
        monkeypatch.setattr(hub_module, "_cached_commit", lambda *_, prepared=prepared: prepared)
        found = open_source(DataConfig(train="org/name", revision=OLD))
        assert found.identity()[1] == OLD
        if prepared == OLD:
            assert found.header() == ("text",)
        else:
            with pytest.raises(InputError, match="no network"):
                found.header()


PROGRAM = """
import json, os, pathlib, sys, time
import huggingface_hub
from types import SimpleNamespace
from simcse_jax.errors import InputError
from simcse_jax.pretrained.folders import locate
from simcse_jax.runtime.processes import joined_processes

process, root = os.environ["JAX_PROCESS_ID"], pathlib.Path(sys.argv[1])
newest = process * 40  # the hub moves between the calls
asked = []

def download(name, revision=None, **options):
    asked.append(revision)
    folder = root / (revision or newest)
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    return str(folder)

huggingface_hub.HfApi.model_info = lambda self, name, **options: SimpleNamespace(sha=newest)
huggingface_hub.snapshot_download = download
with joined_processes():
    if process == "0":
        time.sleep(1)
        (root / "here" / "org" / "other").mkdir(parents=True)
        os.chdir(root / "here")
    found = locate("org/name").name
    locate(root)  # a path, for which nobody waits
    try:
        locate("org/other")
        problem = ""
    except InputError as error:
        problem = str(error)
    print(json.dumps([found, asked, problem]))
"""


@pytest.mark.full
def test_two_processes_take_one_commit(tmp_path: Path) -> None:
    with Job(2, ["-c", PROGRAM, str(tmp_path)], tmp_path / "logs") as job:
        assert job.ends(120) == [0, 0], job.said()
        found = [json.loads(job.log(process).splitlines()[-1]) for process in range(2)]
    assert found[0] == [OLD, [None], ""]
    assert found[1][:2] == [OLD, [None, OLD]]
    assert "does not find model org/other as process 0 has it, which is a path there, and not here" in found[1][2]
