"""What is unusual and whole is read, and what ordinary users change is no damage."""

import grp
import os
import shutil
from pathlib import Path

import pytest

from simcse_jax.cli import main
from simcse_jax.config import DataConfig
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.verification import inspect
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params
from simcse_jax.runs.checkpoints import check_whole, set_damaged_aside
from simcse_jax.runs.folder import check_output, open_run
from simcse_jax.runtime import compilation_cache
from simcse_jax.storage.manifest import (
    MANIFEST,
    VERIFY,
    Damage,
    faults,
    has_manifest,
    read_manifest,
    read_sealed,
    write_manifest,
    write_sealed,
)
from simcse_jax.storage.records import parse_record
from tests.conftest import tiny_bert
from tests.test_outputs import open_folder, without_rights
from tests.test_verify import write_run

__all__ = ["open_folder", "tiny_bert"]

LATIN_1 = os.fsdecode(b"caf\xe9.txt")
"""The name of a file from a system of before UTF-8."""


@pytest.fixture(scope="module")
def exported(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(export(load_model(tiny_bert, "cls"), tmp_path_factory.mktemp("exports") / "model"))


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tiny_bert).folder


def test_texts_whose_names_are_not_utf_8(tiny_bert: Path, tmp_path: Path) -> None:
    """They are tokenised, and what is noted of them is read again."""
    (tmp_path / LATIN_1).write_text("A man plays.\nTwo dogs run.\n")
    tokenizer = load_tokenizer(tiny_bert)
    for _ in range(2):
        corpus = open_corpus(DataConfig(train=str(tmp_path / LATIN_1)))
        table = tokenize_corpus(corpus, tokenizer, 16, tmp_path / "cache", progress=False)
        assert len(table) == 2
    assert inspect(tmp_path / "cache").whole
    write_sealed(tmp_path / "scores.json", {"before": {LATIN_1: 1.5}})
    assert read_sealed(tmp_path / "scores.json") == {"before": {LATIN_1: 1.5}}
    with pytest.raises(ValueError, match="surrogates not allowed"):
        parse_record(r'"\ud800"')


def test_no_run_begins_under_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    """Which the library that writes checkpoints cannot spell."""
    with pytest.raises(InputError, match="a name that is not UTF-8, under which no checkpoint can be written"):
        check_output(tmp_path / LATIN_1)
    check_output(tmp_path / "café")


@pytest.mark.parametrize("content", ['{"files": ["config.json"]}', '{"about": "a page", "name": "page"}', "{}", "[1]"])
def test_the_manifest_of_another_program_is_none_of_ours(content: str, tmp_path: Path, tiny_bert: Path) -> None:
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (model / MANIFEST).write_text(content)
    assert not has_manifest(model)
    load_params(read_checkpoint(model))


def test_line_ends_that_git_has_changed_are_no_damage(exported: Path, tmp_path: Path) -> None:
    """As in a clone on Windows; the values are the same."""
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    files = list(model.rglob("*.json"))
    for file in files:
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert inspect(model).whole
    load_params(read_checkpoint(model))
    config = model / "config.json"
    config.write_bytes(config.read_bytes().replace(b"gelu", b"relu", 1))
    assert not inspect(model).whole


def test_a_run_whose_line_ends_were_changed_goes_on(run: Path) -> None:
    file = run / "run.json"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    open_run(run)
    assert set_damaged_aside(run) == []


def test_what_the_disk_cannot_give_is_no_end_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    write_manifest(tmp_path, {})
    (tmp_path / "weights").unlink()
    (tmp_path / "weights").symlink_to("/proc/self/mem")  # whose first byte cannot be read
    assert faults(tmp_path) == ["weights cannot be read (Input/output error)"]


def test_a_change_of_ones_own_in_the_results(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--no-verify accepts it as any other, and the file stays where it is; verify names it all the same."""
    monkeypatch.setenv(VERIFY, "")
    scores = {"step": 2, "best_step": 2, "dev": 50.0}
    write_sealed(run / "results.json", scores)
    file = run / "results.json"
    file.write_text(file.read_text().replace("50.0", "51.0"))
    with pytest.raises(InputError, match=r"results\.json was changed"):
        open_run(run).results()
    monkeypatch.setenv(VERIFY, "0")
    assert open_run(run).results() == scores | {"dev": 51.0}
    assert open_run(run).has_ended()
    assert set_damaged_aside(run) == []
    assert not inspect(run).whole


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(run: Path, open_folder: Path) -> None:
    """It stays where it is: its owner can make it readable."""
    copy = Path(shutil.copytree(run, open_folder / "run"))
    file = copy / "checkpoints" / "2" / MANIFEST
    file.chmod(0)
    with without_rights(), pytest.raises(PermissionError):
        set_damaged_aside(copy)
    file.chmod(0o644)
    check_whole(file.parent)


@pytest.mark.parametrize(
    "about",
    [
        5,
        {"made": "x"},
        {"made": {"jax": 5}},
        {"made": None},
        {"parts": 5},
        {"parts": [{"from": 1}]},
        {"parts": [{"from": [1], "made": {}}]},
        {"step": "1"},
        {"run": {}},
        {"record": 5},
        {"record": {"parts": 7}},
        {"record": {"log": 5}},
        {"record": {"log": {"lines": "x", "digest": ""}}},
        {"record": {"log": {"lines": 1}}},
        {"record": {"log": {"lines": 1, "digest": "", "gaps": ["x"]}}},
    ],
)
def test_facts_of_other_types_under_a_seal_that_is_right(about: object, tmp_path: Path) -> None:
    """One who forges a manifest can give it anything; its readers need not expect it."""
    write_sealed(tmp_path / MANIFEST, {"about": about, "files": {}})
    with pytest.raises(Damage, match="cannot be read"):
        read_manifest(tmp_path)
    assert not inspect(tmp_path).whole


def test_links_to_files_that_training_does_not_write(run: Path, tmp_path: Path) -> None:
    for name in ("notes.md", "log", ".hidden"):
        (run / name).symlink_to(tmp_path / "elsewhere")
    check_output(run)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    (run / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"metrics\.jsonl is a link"):
        check_output(run)


def test_one_path_that_is_none_of_ours_hides_no_other(
    exported: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(tiny_bert), str(exported)])
    out, err = capsys.readouterr()
    assert f"{exported}: an export, whole" in out
    assert f"{tiny_bert} has no {MANIFEST}" in err


@pytest.mark.parametrize(
    ("name", "members", "own"),
    [("me", [], True), ("me", ["me"], True), ("me", ["me", "you"], False), ("us", [], False)],
)
def test_the_group_of_one_user_is_no_other(
    name: str, members: list[str], own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a umask of 002: what an earlier version has made is still of use."""
    user = compilation_cache.pwd.struct_passwd(("me", "", 0, 0, "", "", ""))
    monkeypatch.setattr(compilation_cache.pwd, "getpwuid", lambda _: user)
    monkeypatch.setattr(compilation_cache.grp, "getgrgid", lambda _: grp.struct_group((name, "", 0, members)))
    tmp_path.chmod(0o775)
    assert compilation_cache._is_of_others(tmp_path) is not own
    tmp_path.chmod(0o777)
    assert compilation_cache._is_of_others(tmp_path)
