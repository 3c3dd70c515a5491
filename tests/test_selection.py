"""Whatever selects a checkpoint can select one, and a batch teaches something: refused at the start where not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.config import CheckpointConfig, Config, ObjectiveConfig
from simcse_jax.errors import InputError
from simcse_jax.runs.checkpoints import Progress, checkpoint_folders, open_checkpoints
from simcse_jax.training.prepare import _check_learns, check_request, load_parts
from simcse_jax.training.trainer import train
from tests.conftest import first_devices

HEADER = "sentence1\tsentence2\tscore"
GOOD = ["a man runs\ta woman runs\t3", "the dog eats\ta dog eats\t5", "red house\tnever two\t0"]


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (GOOD[:1], "holds 1 scored pair, and 3 or more are needed"),
        (GOOD[:2], "holds 2 scored pairs, and 3 or more are needed"),
        ([pair.rsplit("\t", 1)[0] + "\t4" for pair in GOOD], "has the score 4 for every pair"),
        (["cat\tcat\t1", "a dog\tA dog\t2", "two\ttwo\t3"], "has pairs that are all alike to the model"),
        (["cat\tdog\t1", "cat\tdog\t2", "cat\tdog\t3"], "has pairs that are all alike to the model"),
        (["東\t京\t1", "大\t阪\t2", "北\t海\t3"], "has pairs that are all alike to the model"),
        (["cat\tdog\t1", "dog\tcat\t2", "cat\tdog\t3"], "has pairs that are all alike to the model"),
    ],
    ids=["one", "two", "constant", "same", "one pair", "unknown", "in both orders"],
)
def test_dev_pairs_that_select_nothing_are_refused(pairs: list[str], problem: str, small_run: Config) -> None:
    Path(small_run.evaluation.dev).write_text("\n".join([HEADER, *pairs]) + "\n", "utf-8")
    with pytest.raises(InputError) as raised:
        train(small_run)
    message = str(raised.value)
    assert f"evaluation.dev {small_run.evaluation.dev} {problem}" in message
    assert "give some hundred scored pairs of different scores, or --evaluation.dev '' to keep the last step" in message
    assert not Path(small_run.output).exists()


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (["who is it,東京", "where is it,大阪", "why is it,北京"], "has answers that are all alike to the model"),
        ([f"who is {q},me and {a}" for q in "abc" for a in "xyz"], "has every answer for every question"),
        (["who is it,Who is it", "where,where", "why,why"], "has the question itself for each answer"),
    ],
    ids=["unknown", "all", "copies"],
)
def test_questions_that_select_nothing_are_refused(
    pairs: list[str], problem: str, small_run: Config, tmp_path: Path
) -> None:
    dev = tmp_path / "dev.csv"
    dev.write_text("\n".join(["question,answer", *pairs]) + "\n", "utf-8")
    config = replace(small_run, evaluation=replace(small_run.evaluation, dev=str(dev)))
    with pytest.raises(InputError, match=problem):
        load_parts(check_request(config))


@pytest.mark.parametrize("loss", ["info_nce", "symmetric", "decoupled", "focal", "off_dropout"])
def test_a_batch_of_one_is_refused_where_its_gradient_is_zero(loss: str) -> None:
    config = Config(batch_size=1, objective=ObjectiveConfig(loss=loss))
    for columns in (1, 2):
        with pytest.raises(InputError, match=r"batch_size is 1: .* nothing is learnt; use 2 or more"):
            _check_learns(config, columns, 8)
    _check_learns(config, 3, 8)
    _check_learns(replace(config, batch_size=2), 1, 8)
    _check_learns(replace(config, objective=replace(config.objective, contrastive_weight=0.0)), 1, 8)


def test_a_batch_of_one_teaches_other_objectives() -> None:
    _check_learns(Config(batch_size=1, objective=ObjectiveConfig(loss="sigmoid")), 1, 8)
    _check_learns(Config(batch_size=1, objective=ObjectiveConfig(loss="own_negative")), 3, 8)


def test_a_batch_of_one_is_refused_by_train(small_run: Config) -> None:
    with first_devices(1), pytest.raises(InputError, match="batch_size is 1"):
        train(replace(small_run, batch_size=1))
    assert not Path(small_run.output).exists()


def test_the_best_of_a_run_is_kept_whichever_of_equal_scores_it_is(tmp_path: Path) -> None:
    """Earlier versions took the first of equal scores for the best, and their runs go on."""

    def state() -> dict[str, Any]:
        return {"params": {"x": np.zeros(2, np.float32)}}

    for best, kept in ((0, [0, 8]), (4, [4, 8])):
        with open_checkpoints(tmp_path / str(best), CheckpointConfig(keep=1)) as checkpoints:
            for step in (0, 4):
                checkpoints.save(state(), step, Progress(min(best, step), 5.0), 5.0)
        with open_checkpoints(tmp_path / str(best), CheckpointConfig(keep=1)) as checkpoints:
            checkpoints.save(state(), 8, Progress(best, 5.0), 1.0)
            checkpoints.wait()
            assert list(checkpoint_folders(tmp_path / str(best))) == kept
