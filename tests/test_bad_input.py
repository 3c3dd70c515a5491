"""What cannot be used is refused with one line that names it, and leaves no trace on disk."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simcse_jax.cli import main
from simcse_jax.config import Config, ModelConfig
from simcse_jax.config.load import guess_field
from simcse_jax.errors import InputError, room
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.runs.folder import writing_to
from simcse_jax.storage.files import new_folder, writing
from tests.conftest import write_model

CONFIG = """
from simcse_jax.config import *
config = Config(
    batch_size=16, max_steps=2, log_every=1,
    model=ModelConfig(path={model!r}, pooler="cls", mlp_only_train=True),
    data=DataConfig(train={text!r}, max_length=12, cache={cache!r}),
)
"""
DEV = "sentence1\tsentence2\tscore\na man runs\ta woman runs\t3\nthe dog eats\ta dog eats\t5\nred house\tnever two\t0\n"

Fails = Callable[..., str]


@pytest.fixture
def config_file(tiny_bert: Path, text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(model=str(tiny_bert), text=str(text_file), cache=str(tmp_path / "cache")))
    return path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def error_line(stderr: str) -> str:
    """The one error that a command prints, which is the last line; progress bars may come before it."""
    assert "Traceback" not in stderr
    assert stderr.count("simcse-jax: error: ") == 1
    last = stderr.splitlines()[-1]
    assert last.startswith("simcse-jax: error: ")
    return last.removeprefix("simcse-jax: error: ")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fails:
    """Runs a command that must fail, and returns its error; complete entries of the token cache may be new."""

    def run(*arguments: str | Path) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        assert caught.value.code == 2
        message = error_line(capsys.readouterr().err)
        after = snapshot(tmp_path)
        new = {name for name in after if name not in before}
        assert all(name == "cache" or name.startswith("cache/tokens-") for name in new)
        assert {name: after.get(name) for name in before} == before
        return message

    return run


@pytest.fixture
def train_fails(fails: Fails, config_file: Path, tmp_path: Path) -> Fails:
    """`fails` for training into the folder `run`, which must not exist afterwards."""

    def run(*overrides: str | Path) -> str:
        return fails("train", config_file, "--output", tmp_path / "run", *overrides)

    return run


LATIN1 = b"".join(b"sentence %d\n" % i for i in range(5000)) + b"caf\xe9\n" + b"more\n" * 5000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", b"", ["holds no sentence", "it is empty"]),
        ("empty.csv", b"", ["holds no sentence", "it is empty"]),
        ("header.csv", b"a,b\n", ["holds no sentence", "the columns are named (a, b) and no row follows"]),
        ("blank.txt", b"\n \n\t\n\r\n", ["holds no sentence", "only blank ones (4)"]),
        ("latin1.txt", LATIN1, ["not UTF-8", "line 5001", f"byte {LATIN1.index(0xE9)} ", "iconv"]),
        ("latin1.csv", b"a,b\nok,ok\nok,caf\xe9\n", ["not UTF-8", "line 3", "byte 16 "]),
        ("utf16.txt", "text\n".encode("utf-16"), ["not UTF-8", "zero bytes", "iconv", "utf-16"]),
        ("workbook.csv", b"PK\x03\x04\x14\0\0\0", ["not UTF-8", "binary"]),
        (
            "four.csv",
            b"a,b,c,d\nw,x,y,z\n",
            ["has 4 columns", "a ('w'), b ('x'), c ('y'), d ('z')", "--data.columns a b"],
        ),
        ("four.jsonl", b'{"a": "w", "b": "x", "c": "y", "d": "z"}\n', ["has 4 columns", "--data.columns a b"]),
        ("ragged.csv", b"a,b\nw,x\nw,x,y\n", ["line 3 has 3 columns but the header has 2 (a, b)", "quote"]),
        ("ragged.tsv", b"a\tb\nw\n", ["line 2 has 1 columns but the header has 2"]),
        ("quote.csv", b'a\none\n"never closed\ntwo\n\nthree\n', ["line 3", "unexpected end of data", "close"]),
        ("broken.jsonl", b'{"a": "x"}\n{"a"\n', ["line 2 is not JSON"]),
        ("list.jsonl", b'["a"]\n', ["line 1 is a JSON list; expected an object"]),
        ("null.jsonl", b'{"a": null}\n{"a": null}\n', ["only blank ones (2)"]),
        ("number.jsonl", b'{"a": "x"}\n{"a": 5}\n', ["line 2 has no text in column a, but 5"]),
        ("other.jsonl", b'{"a": "x"}\n{"b": "x"}\n', ["line 1 has no text in column b; its columns are a: give each"]),
        ("fake.parquet", b"text\n", ["not a readable parquet file"]),
        ("fake.txt.gz", b"text\n", ["not a complete gzip file"]),
        ("fake.csv.gz", b"text\n", ["not a complete gzip file"]),
        ("fake.parquet.gz", b"text\n", ["not a readable parquet file"]),
        ("text.docx", b"text\n", ["ends in '.docx'", ".txt, .csv, .tsv, .jsonl, .parquet"]),
    ],
)
def test_training_text(name: str, content: bytes, expected: list[str], train_fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = train_fails("--data.train", path)
    assert str(path) in message
    for part in expected:
        assert part in message
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "stored"])
def test_damaged_gzip(damage: str, text_file: Path, train_fails: Fails, tmp_path: Path) -> None:
    """Also where the damage is first seen as text that is not UTF-8."""
    import gzip

    level = 0 if damage == "stored" else 9
    packed = bytearray(gzip.compress(text_file.read_bytes(), level, mtime=0))
    if damage == "cut":
        del packed[-100:]
    else:
        packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / "text.txt.gz"
    path.write_bytes(packed)
    assert f"{path} is not a complete gzip file" in train_fails("--data.train", path)


def test_text_that_is_not_there(train_fails: Fails, tmp_path: Path) -> None:
    assert f"no file {tmp_path / 'none.txt'}: check the path" in train_fails("--data.train", tmp_path / "none.txt")
    assert "no file none.csv.gz" in train_fails("--data.train", "none.csv.gz")
    (tmp_path / "empty").mkdir()
    assert f"the folder {tmp_path / 'empty'} holds no file" in train_fails("--data.train", tmp_path / "empty")
    assert "data.train is empty" in train_fails("--data.train", "")


def test_columns_that_are_not_there(text_file: Path, train_fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("first,second\na,b\n")
    message = train_fails("--data.train", path, "--data.columns", "anchor")
    assert message == (
        f"{path} has no column anchor; its columns are first ('a'), second ('b'); name those of sentence, positive and "
        "hard negatives in this order: --data.columns first second"
    )
    message = train_fails("--data.train", path, "--data.columns", *"abcdefghijk")
    assert "data.columns names 11 columns (a, b, c, d, e, f, g, h, i, j, k) but an example has 10 at most" in message
    assert "do not apply" in train_fails("--data.columns", "first")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--batch-size", "12"], ["global batch of 12", "8 devices", "multiple of 8, e.g. 8 or 16"]),
        (["--batch-size", "0"], ["batch_size is 0", "greater than 0"]),
        (["--mesh.data", "3"], ["mesh data 3 × fsdp 1 does not fit 8 devices"]),
        (["--data.max-length", "41"], ["data.max_length is 41", "positions for 40 tokens"]),
        (["--data.max-length", "2"], ["data.max_length is 2", "at least 3"]),
        (["--model.dropout", "1"], ["model.dropout is 1", "below 1"]),
        (["--model.pooler", "avg"], ["model.mlp_only_train", "'avg'", "set mlp_only_train to False or the pooler"]),
        (["--model.dtype", "float64"], ["float64", "JAX_ENABLE_X64=1"]),
        (
            ["--objective.loss", "infonce"],
            ["no objective 'infonce'", "did you mean 'info_nce'?", "simcse_jax/objectives"],
        ),
        (["--objective.loss", "contrast"], ["'contrast' is not an objective"]),
        (["--objective.options", "margin", "0.1"], ["'margin'", "'info_nce' takes no options"]),
        (["--objective.loss", "focal", "--objective.options", "margin", "nan"], ["margin is nan", "finite"]),
        (
            ["--objective.loss", "off_dropout", "--objective.options", "negative_weight", "0"],
            ["negative_weight of off_dropout is 0", "greater than 0"],
        ),
        (["--objective.widths", "8", "9999"], ["objective.widths is [8, 9999]", "width of the vectors, 32"]),
        (
            ["--objective.smoothing.weight", "0.1", "--objective.smoothing.buffer-size", "18", "--batch-size", "24"],
            ["buffer_size is 18 but batch_size is 24", "larger one"],
        ),
        (
            ["--objective.loss", "own_negative", "--objective.smoothing.weight", "0.1"],
            ["own_negative has no in-batch negatives to smooth"],
        ),
        (["--data.augment", "crop", "--data.neighbours", "1"], ["data.augment is 'crop' and data.neighbours 1"]),
        (["--data.augment", "synonyms"], ["data.synonyms is empty"]),
        (["--optimizer.clip-norm", "inf"], ["optimizer.clip_norm is inf", "a finite number"]),
        (["--objective.temperature", "nan"], ["objective.temperature is nan", "greater than 0"]),
        (["--evaluation.dev", "STSb"], ["unknown task 'STSb': did you mean 'STSBenchmark'?"]),
        (
            ["--evaluation.dev", "STSBenchmark"],
            ["--evaluation.data FOLDER", "--evaluation.dev PAIRS.tsv", "--evaluation.dev ''"],
        ),
        (["--evaluation.test", "sts"], ["evaluation.test STS12 needs SentEval's data", "--evaluation.test PAIRS.tsv"]),
        (["--evaluation.test", "none.tsv"], ["no file none.tsv"]),
    ],
)
def test_settings(overrides: list[str], expected: list[str], train_fails: Fails) -> None:
    message = train_fails(*overrides)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--batch-siz", "16"], ["train has no option --batch-siz: did you mean --batch-size?"]),
        (["--data.max-lenght", "16"], ["no option --data.max-lenght: did you mean --data.max-length?"]),
        (["--batch-size", "many"], ["--batch-size", "'many'"]),
        (["--optimizer.learning-rate", "fast"], ["--optimizer.learning-rate", "fast"]),
        (["--model.pooler", "clz"], ["--model.pooler is 'clz': did you mean 'cls'?", "avg_first_last"]),
        (["--model.pooler=mean", "--lr", "1"], ["2 problems", "did you mean 'avg'?", "no option --lr"]),
    ],
)
def test_overrides(
    overrides: list[str], expected: list[str], config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt name gets a suggestion, a wrong value is quoted beside its option."""
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(config_file), "--output", str(tmp_path / "run"), *overrides])
    assert caught.value.code == 2
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for part in expected:
        assert part in text
    assert "Traceback" not in text
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("config = 3", ["does not define `config = Config(...)`", "int"]),
        ("", ["does not define `config"]),
        ("config = (", ["config.py", "line 1", "never closed"]),
        ("from simcse_jax.config import *\n\nconfig = Config(bach_size=3)", ["line 3", "bach_size"]),
        ("1 / 0", ["line 1", "ZeroDivisionError"]),
    ],
)
def test_config_files(content: str, expected: list[str], fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(content)
    message = fails("train", path)
    for part in (str(path), *expected):
        assert part in message


def test_a_misspelt_field_of_a_config() -> None:
    assert (
        guess_field("DataConfig.__init__() got an unexpected keyword argument 'max_len'")
        == "did you mean 'max_length'?"
    )
    assert guess_field("Own.__init__() got an unexpected keyword argument 'max_len'") == ""


def test_config_names(fails: Fails, tmp_path: Path) -> None:
    message = fails("train", "unsup_bert_bas")
    known = "Configs that come with the package: iscse_bert_base, iscse_bert_large, "
    assert message.startswith(f"no config file 'unsup_bert_bas': did you mean 'unsup_bert_base'? {known}")
    assert fails("train", "nowhere").startswith(f"no config file 'nowhere'. {known}")
    assert "did you mean 'sup_roberta_base'?" in fails("train", "Sup-RoBERTa-base.py")
    assert "'dropout': it is one for simcse-jax ablate." in fails("train", "dropout")
    assert "'sup_bert_base': it is one for simcse-jax train." in fails("ablate", "sup_bert_base")
    (run := tmp_path / "run").mkdir()
    assert f"'{run}': it is a folder." in fails("train", run)
    (run / "run.json").write_text("{}")
    assert f"it is a run: give the config that it was begun with, and --output {run}." in fails("train", run)


def test_what_a_published_config_lacks_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in one error after the other: text of one's own, no SentEval, and the config's folder in use."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.csv").write_text("question,answer\na,b\n")
    (tmp_path / "runs/sup_bert_base").mkdir(parents=True)
    (tmp_path / "runs/sup_bert_base/notes.txt").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["train", "sup_bert_base", "--data.train", "own.csv"])
    message = capsys.readouterr().err
    assert message.startswith("simcse-jax: error: 3 problems\n  - ")
    for part in (
        *("has no column sent0, sent1, hard_neg; its columns are question ", "--data.columns question answer"),
        *("--evaluation.data FOLDER", "--evaluation.dev PAIRS.tsv", "--evaluation.dev ''", "--output runs/NEW"),
    ):
        assert part in message


def test_all_values_that_no_run_can_use_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.py"
    values = "batch_size=-8, data=DataConfig(max_length=2), optimizer=OptimizerConfig(b1=1.5)"
    path.write_text(f"from simcse_jax.config import *\nconfig = Config({values})\n")
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(path)])
    message = capsys.readouterr().err
    for name in ("batch_size is -8", "data.max_length is 2", "optimizer.b1 is 1.5", "data.train is empty"):
        assert message.count(name) == 1
    config = Config()
    for name, value in {"seed": None, "batch_size": "8"}.items():
        object.__setattr__(config, name, value)
    with pytest.raises(InputError, match=r"2 problems\n  - seed is None; .* int\n  - batch_size is '8'; expected int$"):
        config.validate()
    object.__setattr__(model := ModelConfig(), "dtype", "fp16")
    with pytest.raises(InputError, match=r"model\.dtype is 'fp16'; did you mean 'bfloat16'\? expected one of"):
        Config(model=model).validate()


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("Unable to initialize backend 'tpu': no libtpu.so")], ids=type
)
def test_a_platform_that_is_not_there(
    error: Exception, text_file: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX raises an AssertionError without a word for JAX_PLATFORMS=cuda where no GPU is visible."""

    def devices() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    why = str(error) or "no GPU is visible"
    encode = ["encode", "model", str(text_file), str(text_file.parent / "vectors.npy")]
    for words in (encode, ["train", "sup_bert_base"], ["ablate", "dropout"]):
        assert f"JAX finds no device for JAX_PLATFORMS=cuda ({why}" in fails(*words)


def test_a_file_that_nothing_has_checked(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("simcse_jax.cli.parse", lambda argv: refuse(tmp_path / "locked"))
    assert fails("train").startswith(f"{tmp_path / 'locked'} cannot be used (Permission denied): check that")
    with pytest.raises(PermissionError):
        main(["train", "--debug"])


def run_python(program: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        **environment,
    }
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def test_values_of_a_config_file(tmp_path: Path) -> None:
    """In a process where nothing but the package itself checks annotations."""
    values = {
        "model=ModelConfig(pooler='clz')": "model.pooler is 'clz'; did you mean 'cls'? expected one of 'cls', "
        "'cls_before_pooler', 'avg', 'avg_top2', 'avg_first_last', 'avg_static_last', 'avg_static' or None",
        "batch_size='64'": "batch_size is '64'; expected int",
        "data=DataConfig(train=3)": "data.train is 3; expected str",
        "data=DataConfig(columns=['a'])": "data.columns is ['a']; expected tuple[str, ...]",
        "model=DataConfig()": "model is DataConfig(",
        "micro_batch='all'": "micro_batch is 'all'; expected int or 'auto'",
        "model=ModelConfig(dropout=True)": "model.dropout is True; expected float or None",
    }
    for i, value in enumerate(values):
        (tmp_path / f"{i}.py").write_text(f"from simcse_jax.config import *\nconfig = Config({value})\n")
    program = (
        "import sys\n"
        "from simcse_jax.cli import main\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        main(['train', path])\n"
        "    except SystemExit as error:\n"
        "        assert error.code == 2\n"
    )
    done = run_python(program, *(tmp_path / f"{i}.py" for i in range(len(values))))
    assert done.returncode == 0, done.stderr
    for line, expected in zip(done.stderr.splitlines(), values.values(), strict=True):
        assert line.startswith(f"simcse-jax: error: {expected}")


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def change_weights(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def change_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ["is not a model folder", "no config.json"]),
    "no JSON": (lambda m: (m / "config.json").write_text("{"), ["config.json is not valid JSON"]),
    "a list": (lambda m: (m / "config.json").write_text("[]"), ["config.json holds a JSON list"]),
    "other type": (lambda m: change_config(m, model_type="t5"), ["model_type is 't5'", "'bert' and 'roberta'"]),
    "no width": (lambda m: change_config(m, hidden_size=None), ["config.json lacks hidden_size"]),
    "bad width": (lambda m: change_config(m, hidden_size="32"), ["hidden_size is '32'; expected int"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["has no weights", "model.safetensors"]),
    "truncated": (
        lambda m: os.truncate(m / "model.safetensors", 9000),
        ["model.safetensors cannot be read", "truncated or damaged"],
    ),
    "missing": (
        lambda m: change_weights(m, lambda t: t.pop("encoder.layer.1.output.dense.bias")),
        ["missing encoder.layer.1.output.dense.bias"],
    ),
    "extra": (
        lambda m: change_weights(m, lambda t: t.update({"encoder.layer.7.x": np.zeros(1, np.float32)})),
        ["unexpected encoder.layer.7.x"],
    ),
    "misshapen": (
        lambda m: change_weights(m, lambda t: t.update({"pooler.dense.bias": np.zeros(5, np.float32)})),
        ["pooler.dense.bias has shape [5], config.json asks for [32]"],
    ),
    "no tokenizer": (
        lambda m: [(m / name).unlink() for name in ("vocab.txt", "tokenizer_config.json")],
        ["has no tokenizer", "tokenizer.json, vocab.txt"],
    ),
    "other tokenizer": (
        lambda m: (m / "vocab.txt").write_text("\n".join(f"word{i}" for i in range(300))),
        ["tokenizer", "vocabulary has 120", "not of one model"],
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("command", ["train", "encode"])
def test_model_folders(
    damage: str, command: str, model: Path, text_file: Path, fails: Fails, train_fails: Fails, tmp_path: Path
) -> None:
    apply, expected = DAMAGES[damage]
    apply(model)
    if command == "train":
        message = train_fails("--model.path", model)
    else:
        message = fails("encode", model, text_file, tmp_path / "out.npy", "--pooler", "avg")
    for part in (str(model), *expected):
        assert part in message


def test_a_model_that_is_not_there(train_fails: Fails, tmp_path: Path) -> None:
    message = train_fails("--model.path", tmp_path / "none")
    assert message == f"'{tmp_path / 'none'}' is not a folder: give a Hugging Face model folder or a name on the hub"


def forbidden(tmp_path: Path) -> dict[Path, str]:
    """Places where nobody can make a folder, root neither."""
    file = tmp_path / "file"
    file.write_text("text")
    return {
        file: "exists and is not",
        file / "out": f"{file} is not a folder",
        file / "a" / "out": f"{file} is not a folder",
        Path("/proc/out"): "",
        Path("/proc/a/out"): "",
    }


def test_outputs_that_cannot_be_made(train_fails: Fails, tmp_path: Path) -> None:
    for output, expected in forbidden(tmp_path).items():
        message = train_fails("--output", output)
        assert str(output) in message
        assert expected in message
        assert "choose another" in message


def test_exports_that_cannot_be_made(tiny_bert: Path, fails: Fails, tmp_path: Path) -> None:
    for output in forbidden(tmp_path):
        message = fails("export", tiny_bert, output, "--pooler", "cls")
        assert message.startswith(f"output {output} ")
        assert "choose another" in message


def test_a_cache_that_cannot_be_made(train_fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for cache in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/cache")):
        message = train_fails("--data.cache", cache)
        assert f"cannot write to the cache {cache}" in message
        assert "set data.cache" in message


def test_folders_of_others_are_left_alone(tiny_bert: Path, train_fails: Fails, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "exists and is not a run of ours" in train_fails("--output", tmp_path / "mine")
    message = fails("export", tiny_bert, tmp_path / "mine", "--pooler", "cls")
    assert "exists and is not an empty folder" in message


LIMITED = """
import json, resource, sys
from simcse_jax.cli import main
for limit, command in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main(command)
        code = 0
    except SystemExit as error:
        code = error.code
    print("\\nexit", code, file=sys.stderr, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # for `make coverage`
"""


def test_a_full_disk_leaves_nothing(tiny_bert: Path, config_file: Path, text_file: Path, tmp_path: Path) -> None:
    """Files that cannot grow beyond a limit stand for the disk: each command reaches the limit at another write."""
    old = tmp_path / "old.npy"
    old.write_bytes(b"earlier vectors")
    dev = tmp_path / "dev.tsv"
    dev.write_text(DEV)
    train = ["train", str(config_file), "--output", str(tmp_path / "run")]
    scores = ["evaluate", str(tiny_bert), "--pooler", "avg", "--tasks", str(dev), "--json", str(tmp_path / "x.json")]
    commands: list[tuple[int, list[str], str]] = [
        (20_000, ["export", str(tiny_bert), str(tmp_path / "export"), "--pooler", "cls"], f"output {tmp_path}/export"),
        (100, ["encode", str(tiny_bert), str(text_file), str(old), "--pooler", "avg"], f"{old} cannot be written"),
        (100, scores, f"{tmp_path}/x.json cannot be written"),
        (2_000, train, f"cannot write tokens to {tmp_path}/cache"),
    ]
    before = snapshot(tmp_path)
    done = run_python(LIMITED, json.dumps([(limit, command) for limit, command, _ in commands]))
    assert done.returncode == 0, done.stderr
    parts = done.stderr.split("\nexit 2\n")
    assert parts.pop() == ""
    for part, (*_, expected) in zip(parts, commands, strict=True):
        message = error_line(part)
        assert expected in message
        assert "File too large" in message
        assert "raise the limit on the size of a file (ulimit -f)" in message
        assert "free space" not in message
    after = snapshot(tmp_path)
    assert after.pop("cache") is None
    assert after == before


def test_a_full_disk_while_a_run_is_made(config_file: Path, text_file: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """The text is tokenised already; the limit is met by the tokenizer, which Rust writes."""
    from simcse_jax.config.load import load_config_file
    from simcse_jax.data.corpus import open_corpus
    from simcse_jax.data.tokens import tokenize_corpus
    from simcse_jax.pretrained.tokenizers import load_tokenizer

    data = load_config_file(str(config_file)).data
    tokenize_corpus(open_corpus(data), load_tokenizer(tiny_bert), data.max_length, data.cache, progress=False)
    before = snapshot(tmp_path)
    command = ["train", str(config_file), "--output", str(tmp_path / "run")]
    done = run_python(LIMITED, json.dumps([(2_000, command)]))
    assert done.returncode == 0, done.stderr
    message = error_line(done.stderr.removesuffix("\nexit 2\n"))
    assert f"output {tmp_path / 'run'} cannot be written" in message
    assert "File too large" in message
    assert snapshot(tmp_path) == before


FULL = {
    "the system's": OSError(errno.ENOSPC, "No space left on device"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "without a number": OSError("[Errno 28] No space left on device"),
    "tensorstore's": ValueError(
        'OUT_OF_RANGE: Failed writing: "/runs/a": Failed to write 96 bytes to file 23: No space left on device '
        "[os_error_code='28']\nmore lines"
    ),
    "numpy's": OSError("27500 requested and 12800 written"),
    "tensorstore's, without its code": ValueError("UNKNOWN: Failed to write: Disk quota exceeded"),
    "Rust's": Exception("No space left on device (os error 28)"),
}
OTHER = {
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "tensorstore's": ValueError("PERMISSION_DENIED: Error opening: Permission denied [os_error_code='13']"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_recognised(error: Exception, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert room(error) == "free space"
    with pytest.raises(
        InputError, match=r"(No space left|Disk quota|12800 written).*free space and run the same command again"
    ):
        raise_in(writing_to(tmp_path), error)


@pytest.mark.parametrize("error", OTHER.values(), ids=OTHER)
def test_another_refusal_says_nothing_of_space(error: Exception, tmp_path: Path) -> None:
    assert room(error) == ""
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"(Permission denied|Read-only file system).*make it writable") as raised:
        raise_in(writing_to(tmp_path), error)
    assert "space" not in str(raised.value)
    if isinstance(error, OSError):
        for block in (writing(tmp_path / "a.json"), new_folder(tmp_path / "new")):
            with pytest.raises(InputError, match=r"cannot be written .(Permission|Read-only)") as raised:
                raise_in(block, error)
            assert "space" not in str(raised.value)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "run"
    with pytest.raises(InputError, match=r"No such file or directory.: the folder is gone, and the same"):
        raise_in(writing_to(gone), FileNotFoundError(errno.ENOENT, "No such file or directory", str(gone / "a")))


@pytest.mark.parametrize("error", [TypeError("a bug"), ValueError("28"), KeyError("params"), RuntimeError("XLA")])
def test_what_is_no_refusal_to_write_passes(error: Exception, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    for block in (writing_to(tmp_path), writing(tmp_path / "a.json"), new_folder(tmp_path / "new")):
        with pytest.raises(type(error)) as raised:
            raise_in(block, error)
        assert raised.value is error


@pytest.mark.parametrize(
    "error", [ConnectionError("no network"), FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/text")]
)
def test_errors_of_other_files_are_not_those_of_the_folder(error: OSError, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised:
        raise_in(new_folder(tmp_path / "new"), error)
    assert raised.value is error
    assert not list(tmp_path.iterdir())


def raise_in(block: AbstractContextManager[Any], error: Exception) -> None:
    with block:
        raise error


def test_a_full_disk_while_training(config_file: Path, tmp_path: Path) -> None:
    """The run ends with an error, and its last complete checkpoint can be used and continued."""
    output = tmp_path / "run"
    program = "import sys; from simcse_jax.cli import main; main(sys.argv[1:])"
    overrides = ["--max-steps", "100000", "--checkpoint.every", "5", "--checkpoint.keep", "2"]
    command = [sys.executable, "-c", program, "train", str(config_file), "--output", str(output), *overrides]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while not (output / "checkpoints" / "10").is_dir():
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.05)
        limit = (output / "metrics.jsonl").stat().st_size + 5_000
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, limit))
        _, stderr = run.communicate(timeout=120)
    assert run.returncode == 2, stderr
    # Threads of tensorstore may print that their event loop is closed, before and after the error.
    assert "simcse_jax/" not in stderr
    (message,) = [line for line in stderr.splitlines() if "simcse-jax: error: " in line]
    assert f"writing to {output} failed" in message
    assert "File too large" in message
    assert "(ulimit -f) and run the same command again; it continues from the last complete checkpoint" in message
    loaded = load_model(output)
    assert loaded.step is not None
    assert loaded.step >= 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(loaded.params))


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config file of a finished run, its text and the run itself."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(text_file, folder / "text.txt")
    values = {"model": str(tiny_bert), "text": str(folder / "text.txt"), "cache": str(folder / "cache")}
    (folder / "config.py").write_text(CONFIG.format(**values))
    main(["train", str(folder / "config.py"), "--output", str(folder / "run")])
    return folder


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--optimizer.learning-rate", "1"], "optimizer.learning_rate was 3e-05, is 1.0"),
        (["--seed", "1"], "seed was 42, is 1"),
        (["--batch-size", "8"], "batch_size was 16, is 8"),
        (["--model.path", "other"], "model.path was "),
        (["--model.pooler", "avg", "--model.no-mlp-only-train"], "model.pooler was 'cls', is 'avg'; "),
    ],
)
def test_a_run_of_other_settings_is_not_continued(
    overrides: list[str], expected: str, finished: Path, fails: Fails
) -> None:
    before = snapshot(finished)
    message = fails("train", finished / "config.py", "--output", finished / "run", *overrides)
    assert f"{finished / 'run'} is a run with other settings" in message
    assert expected in message
    assert "another folder, e.g. --output runs/NEW" in message
    assert snapshot(finished) == before


def test_a_run_of_other_text_is_not_continued(finished: Path, fails: Fails) -> None:
    text = finished / "text.txt"
    original = text.read_bytes()
    text.write_bytes(original + b"one sentence more\n")
    before = snapshot(finished / "run")
    try:
        message = fails("train", finished / "config.py", "--output", finished / "run")
    finally:
        text.write_bytes(original)
    assert f"{finished / 'run'} was trained on other text than {text} now holds: choose another folder" in message
    assert snapshot(finished / "run") == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": []}', '{"config": {"sed": 1}, "data_fingerprint": ""}'])
def test_a_damaged_run_is_named(content: str, train_fails: Fails, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text(content)
    for message in (
        train_fails("--output", tmp_path / "broken"),
        fails("export", tmp_path / "broken", tmp_path / "export"),
    ):
        assert f"{tmp_path / 'broken' / 'run.json'} is not a run's config" in message


def test_a_diverged_run_keeps_its_checkpoint(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of step 0, which has the best dev score."""
    dev, output = tmp_path / "dev.tsv", tmp_path / "run"
    dev.write_text(DEV)
    overrides = ["--optimizer.learning-rate", "1e30", "--evaluation.dev", str(dev), "--max-steps", "20"]
    with pytest.raises(SystemExit) as caught:
        main(["train", str(config_file), "--output", str(output), *overrides])
    assert caught.value.code == 1
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("simcse-jax: training diverged: at step ")
    assert "the last checkpoint, of step 0, is intact" in last
    assert "Lower the learning rate" in last
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["0"]
    assert np.isfinite(SimCSE(output).encode("A man runs.")).all()


@pytest.mark.parametrize("pooler", [[], ["--pooler", "cls"]])
def test_evaluate_without_data(
    pooler: list[str], tiny_bert: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIMCSE_DATA", raising=False)
    message = fails("evaluate", tiny_bert, *pooler)
    assert message == (
        "task STS12 needs SentEval's data: give the folder that holds STS/ and SICK/ (--data), or set SIMCSE_DATA"
        "; or name a .tsv file of graded pairs as the task"
    )


def test_evaluate(tiny_bert: Path, fails: Fails, tmp_path: Path) -> None:
    dev = tmp_path / "dev.tsv"
    dev.write_text(DEV)
    message = fails("evaluate", tiny_bert, "--tasks", dev)
    assert message.startswith(f"{tiny_bert} does not say how its sentence vectors are pooled: give the pooler")
    assert "no task given" in fails("evaluate", tiny_bert, "--tasks")
    assert "batch_size is 0" in fails("evaluate", tiny_bert, "--batch-size", "0")
    assert "did you mean 'SICKRelatedness'?" in fails("evaluate", tiny_bert, "--tasks", "SICK-Relatedness")
    assert f"no file {tmp_path}/STS/" in fails("evaluate", tiny_bert, "--data", tmp_path, "--tasks", "STS12")
    unwritable = tmp_path / "none" / "scores.json"
    for option in ("--json", "--csv", "--markdown"):
        assert f"{unwritable} cannot be written" in fails("evaluate", tiny_bert, "--tasks", dev, option, unwritable)
    out = tmp_path / "out"
    assert "given for two outputs" in fails("evaluate", tiny_bert, "--tasks", dev, "--json", out, "--csv", out)
    assert "bootstrap is -1" in fails("evaluate", tiny_bert, "--tasks", dev, "--bootstrap", "-1")
    (qa := tmp_path / "qa.csv").write_text("question,answer\nwho?,me\nwhy?,so\n")
    assert "no task has graded pairs" in fails("evaluate", tiny_bert, "--tasks", qa, "--bootstrap", "9")
    assert f"model {tiny_bert} is given twice" in fails("evaluate", tiny_bert, tiny_bert, "--tasks", dev)
    assert f"model {tiny_bert}/ is given twice" in fails("evaluate", tiny_bert, f"{tiny_bert}/", "--tasks", dev)
    assert "a query is blank: give words" in fails("search", tiny_bert, tmp_path / "text.txt", "a man", " ")
    assert "no model given" in fails("evaluate", "--tasks", dev)
    assert "unknown task 'MPQ': did you mean 'MPQA'?" in fails("evaluate", tiny_bert, "--tasks", "MPQ")
    assert f"no file {tmp_path}/MR/" in fails("evaluate", tiny_bert, "--data", tmp_path, "--tasks", "MR")
    # Data are read before the models, and all models before any is encoded with.
    assert f"no file {tmp_path}/none.tsv" in fails("evaluate", "no-such-model", "--tasks", tmp_path / "none.tsv")
    assert not list(tmp_path.glob("*.json"))


def test_encode(tiny_bert: Path, text_file: Path, fails: Fails, tmp_path: Path) -> None:
    empty, table, out = tmp_path / "empty.txt", tmp_path / "table.csv", tmp_path / "out.npy"
    empty.write_bytes(b"")
    table.write_text("a\nb\n")
    pooler = ("--pooler", "avg")
    assert (
        fails("encode", tiny_bert, empty, out, *pooler) == f"{empty} is empty: give a file with one sentence per line"
    )
    assert f"no file {tmp_path / 'none.txt'}" in fails("encode", tiny_bert, tmp_path / "none.txt", out, *pooler)
    assert "ends in '.csv'; expected .txt" in fails("encode", tiny_bert, table, out, *pooler)
    assert f"{tmp_path / 'out.txt'} must end in .npy" in fails("encode", tiny_bert, text_file, tmp_path / "out.txt")
    assert "does not say how" in fails("encode", tiny_bert, text_file, out)
    for length in ("0", "-1", "2"):
        message = fails("encode", tiny_bert, text_file, out, *pooler, "--max-length", length)
        assert f"max_length is {length}; it must be at least 3" in message
    unwritable = tmp_path / "none" / "out.npy"
    assert f"{unwritable} cannot be written" in fails("encode", tiny_bert, text_file, unwritable, *pooler)


def test_the_python_interface_raises_the_same(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown pooler 'clz': did you mean 'cls'\\? choose one of cls, "):
        SimCSE(tiny_bert, "clz")
    headless = write_model(tmp_path / "headless", json.loads((tiny_bert / "config.json").read_text()))
    change_weights(headless, lambda t: [t.pop(f"pooler.dense.{name}") for name in ("weight", "bias")])
    with pytest.raises(InputError, match=r"no weights pooler\.dense, which pooler 'cls' needs"):
        SimCSE(headless, "cls")


def test_a_refused_write_is_told_under_a_path_with_dots(tmp_path: Path) -> None:
    """The names of temporary files have their dots resolved, on some versions of Python."""
    (tmp_path / "a").mkdir()
    with (
        pytest.raises(InputError, match=r"output .*run cannot be written \(Permission denied\): choose another"),
        new_folder(tmp_path / "a" / ".." / "run") as partial,
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str((partial / "x").resolve()))
    assert not (tmp_path / "run").exists()


def test_train_takes_a_config_alone() -> None:
    """In a process of its own: here, annotations are checked first."""
    code = "from simcse_jax import train; train('quickstart')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "InputError: train takes a Config, not str: make one, or read one with" in done.stderr
