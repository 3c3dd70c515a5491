"""Every input that fuzzing has kept, escapes of the past among them, is taken or refused, in little time and memory."""

import json
import resource
import time
from pathlib import Path

import pytest

from tests.fuzz.mutate import mutate
from tests.fuzz.record import RECORD, table
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS, run_one

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
SECONDS, MIB = 5, 512  # on a busy machine, and far below what an escape of memory takes


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs(name: str, tmp_path: Path) -> None:
    """With a few changed ones each, so that a reader that lets an exception out has many chances."""
    kept = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert kept
    slow = TARGETS[name].share < 0.5
    run_one(name, kept[0], tmp_path)  # imports what the target needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, content in enumerate(kept):
        changed = [] if slow else [mutate(content, TARGETS[name].most, number, lambda data, most: data[1:])]
        for data in (content, *changed):
            begin = time.process_time()
            run_one(name, data, tmp_path)
            assert time.process_time() - begin < SECONDS, data
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB * 1024


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_to_start_from(name: str, tmp_path: Path) -> None:
    """At least one is taken: else fuzzing would see refusals alone."""
    assert any(run_one(name, data, tmp_path) for data in SEEDS[name]())


def test_the_corpus_is_small_and_has_no_other_folders() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 300_000


def test_the_table_in_the_docs_is_that_of_the_record() -> None:
    record = json.loads(RECORD.read_text())
    assert record["targets"].keys() == TARGETS.keys()
    assert sum(line["executions"] for line in record["targets"].values()) >= 1_000_000
    page = (Path(__file__).parents[1] / "docs" / "fuzzing.md").read_text()
    assert table(record) in page
    assert record["machine"] in page


def test_changes_keep_the_form_of_json() -> None:
    """Most of what the mutator makes of JSON is JSON still."""
    data = json.dumps({"a": {"b": [1, 2.5, "c"]}, "step": 3}).encode()
    made = [mutate(data, 4096, seed, lambda given, most: given) for seed in range(200)]
    assert len({*made}) > 80
    whole = 0
    for text in made:
        try:
            json.loads(text)
            whole += 1
        except (ValueError, RecursionError):
            pass
    assert whole > 150
    assert made == [mutate(data, 4096, seed, lambda given, most: given) for seed in range(200)]
