"""What counts as sentences, the names that others give to settings, and how objects show themselves."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.errors import InputError
from simcse_jax.evaluation.mteb import MTEBEncoder
from simcse_jax.inference.index import Index
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.names import translated
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.inference.texts import as_texts
from simcse_jax.poolers import check_pooler
from simcse_jax.runs.quiet import no_root_handler


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> SimCSE:
    return SimCSE(tiny_bert, "avg")


def test_several_sentences_in_an_order_are_taken() -> None:
    pandas = pytest.importorskip("pandas")
    for given in (
        ["a", "b"],
        ("a", "b"),
        (letter for letter in "ab"),
        {"x": "a", "y": "b"}.values(),
        np.array(["a", "b"]),
        np.array(["a", "b"], object),
        pandas.Series(["a", "b"]),
        pandas.Series(["a", "b"], dtype="string"),
        pandas.Index(["a", "b"]),
    ):
        assert as_texts(given) == ["a", "b"], given
    assert as_texts("ab") == ["ab"]
    assert as_texts(np.str_("ab")) == ["ab"]
    assert as_texts([]) == []


class Table:
    """A table as pandas and pyarrow have it: to iterate over it gives the names of its columns."""

    columns, ndim = ("text", "label"), 2

    def __iter__(self) -> Any:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": "a"}, "are a dict.*values"),
        ({"a", "b"}, "are a set.* no order"),
        (frozenset("a"), "are a frozenset.* no order"),
        (Table(), r'are a Table.*one column, e.g. x\["text"\]'),
        (b"a", "are a bytes.*decode"),
        (Path("a.txt"), "are a .*Path.* lines of the file"),
        (None, "are a NoneType"),
        (5, "are a int"),
        (np.array([["a", "b"]]), "are a ndarray.*one dimension"),
        (np.array("a"), "are a ndarray.*one dimension"),
        ([["a"]], r"number 1 is a list, \['a'\]"),
        (["a", None], "number 2 is a NoneType"),
        (["a", float("nan")], "number 2 is a float, nan"),
        ([{"text": "a"}], "number 1 is a dict"),
        ([b"a"], "number 1 is a bytes"),
        (np.arange(2), "number 1 is a int"),
    ],
)
def test_anything_else_is_refused_with_what_to_give(given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_texts(given)


def test_names_of_other_libraries(model: SimCSE) -> None:
    plain = model.encode(["a", "b"], normalize=False)
    theirs = {"show_progress_bar": None, "convert_to_numpy": True, "convert_to_tensor": False, "device": None}
    theirs |= {"output_value": "sentence_embedding", "precision": "float32"}
    np.testing.assert_array_equal(model.encode(["a", "b"], normalize_embeddings=False, **theirs), plain)
    np.testing.assert_array_equal(model.encode(["a", "b"], normalize_to_unit=False, return_numpy=True), plain)
    short = model.encode(["a", "b"], truncate_dim=5)
    np.testing.assert_allclose(short, plain[:, :5] / np.linalg.norm(plain[:, :5], axis=1, keepdims=True), rtol=1e-5)
    for settings, words in [
        ({"convert_to_tensor": True}, "convert_to_tensor=True is not possible: .*torch.from_numpy"),
        ({"device": "cuda"}, "device='cuda' is not possible: .*JAX_PLATFORMS"),
        ({"precision": "int8"}, "astype"),
        ({"output_value": "token_embeddings"}, "token vectors"),
        ({"keepdim": True}, "a list of one sentence"),
        ({"batchsize": 8}, "no setting batchsize: did you mean 'batch_size'"),
        ({"normalise": True}, "did you mean 'normalize'"),
        ({"truncate_dim": 0}, "from 1 to 32"),
        ({"truncate_dim": 33}, "from 1 to 32"),
    ]:
        with pytest.raises(InputError, match=words):
            model.encode("a", **settings)
    assert translated({"show_progress_bar": True}, SimCSE.encode) == {"progress": True}
    for settings, words in [
        ({"device": "cuda"}, "device='cuda' is not possible"),
        ({"truncate_dim": 64}, "truncate_dim=64 is not possible: give it to encode"),
        ({"maxlength": 5}, "no setting maxlength: did you mean 'max_length'[?] there are pooler, max_length"),
    ]:
        with pytest.raises(InputError, match=words):
            SimCSE("anywhere", **settings)
    with pytest.raises(AttributeError, match="max_seq_length"):
        model.max_seq_length = 5  # type: ignore[attr-defined]  # which would change nothing


def test_poolers_of_other_libraries_are_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    for given, meant in {
        "mean": "avg",
        "pooling_mode_mean_tokens": "avg",
        "cls_token": "cls_before_pooler",
        "avg_frist_last": "avg_first_last",
        "CLS": "cls",
    }.items():
        with pytest.raises(InputError, match=f"unknown pooler '{given}': did you mean .{meant}.[?]"):
            check_pooler(given)
    with pytest.raises(InputError, match="unknown pooler '5': choose one of"):
        check_pooler(5)
    with pytest.raises(SystemExit):
        main(["encode", "MODEL", "a.txt", "a.npy", "--pooler", "mean"])
    assert "did you mean 'avg'?" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_objects_show_what_they_are(model: SimCSE, tiny_bert: Path) -> None:
    index = Index(["a"] * 1200, np.ones((1200, 3), np.float32))
    assert repr(index) == "Index(1,200 sentences, width=3, backend='jax')"
    about = "pooler='avg', width=32, max_length=40"
    assert repr(model) == f"SimCSE('{tiny_bert}', {about}, index=None)"
    assert repr(load_model(tiny_bert, "avg")) == f"LoadedModel('{tiny_bert}', {about})"
    assert repr(MTEBEncoder(tiny_bert, pooler="avg")) == f"MTEBEncoder({model!r})"


def test_paths_of_other_types() -> None:
    """In a process of its own: in this one, annotated types are checked first."""
    code = """
from pathlib import Path
import numpy as np
from simcse_jax import Config, InputError, SimCSE, export, load_model, train
from simcse_jax.config import ModelConfig
from simcse_jax.inference.index import Index

for call in (
    lambda: SimCSE(None),
    lambda: load_model(5),
    lambda: export(None, "out"),
    lambda: Index(["a"], np.ones((1, 2))).save(None),
    lambda: Index.load(5),
    lambda: train(Config(output=Path("runs/a"))),
    lambda: train(Config(model="bert")),
    lambda: train(Config(model=ModelConfig(pooler="mean"))),
):
    try:
        call()
    except InputError as error:
        print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    words = ["None is a NoneType; expected a name or a path", "5 is a int", "None is a", "None is a", "5 is a"]
    words += ["expected str: give 'runs/a'", "model is 'bert'; expected ModelConfig", "did you mean 'avg'?"]
    assert len(out) == len(words)
    for line, expected in zip(out, words, strict=True):
        assert expected in line


def test_loading_leaves_the_root_logger_alone(tiny_bert: Path) -> None:
    """In a process of its own, where no one has set up logging: else the caller's basicConfig would do nothing."""
    code = f"import logging; from simcse_jax import SimCSE; SimCSE({str(tiny_bert)!r}, 'avg'); "
    code += "import simcse_jax.training.trainer; print(logging.root.handlers)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_callers_own_handlers_stay() -> None:
    before = [*logging.root.handlers]
    try:
        logging.root.handlers[:] = []
        with no_root_handler():
            logging.basicConfig()
        assert logging.root.handlers == []
        logging.basicConfig()
        (mine,) = logging.root.handlers
        with no_root_handler():
            logging.basicConfig()
        assert logging.root.handlers == [mine]
    finally:
        logging.root.handlers[:] = before
