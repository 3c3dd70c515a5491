"""The commands, one after the other, as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simcse_jax import SimCSE
from simcse_jax.cli import COMMANDS, GROUPS, command_class, main, parse
from simcse_jax.commands.train import Train
from simcse_jax.config import Config
from simcse_jax.config.load import load_config_file
from simcse_jax.errors import InputError

PUBLISHED = {
    "unsup_bert_base": ("bert-base-uncased", 64, 3e-5, 1, True),
    "unsup_bert_large": ("bert-large-uncased", 64, 1e-5, 1, True),
    "unsup_roberta_base": ("roberta-base", 512, 1e-5, 1, True),
    "unsup_roberta_large": ("roberta-large", 512, 3e-5, 1, True),
    "sup_bert_base": ("bert-base-uncased", 512, 5e-5, 3, False),
    "sup_bert_large": ("bert-large-uncased", 512, 1e-5, 3, False),
    "sup_roberta_base": ("roberta-base", 512, 5e-5, 3, False),
    "sup_roberta_large": ("roberta-large", 512, 1e-5, 3, False),
    "iscse_bert_base": ("bert-base-uncased", 64, 3e-5, 1, True),
    "iscse_bert_large": ("bert-large-uncased", 64, 1e-5, 1, True),
    "iscse_roberta_base": ("roberta-base", 512, 1e-5, 1, True),
    "iscse_roberta_large": ("roberta-large", 512, 3e-5, 1, True),
}


def test_train_evaluate_encode_export(
    tiny_bert: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.tsv"
    lines = ["a man runs\ta woman runs\t3", "the dog eats\ta dog eats\t5", "red house\tnever two\t0"]
    pairs.write_text("sentence1\tsentence2\tscore\n" + "\n".join(lines) + "\n")
    run, exported = str(tmp_path / "run"), str(tmp_path / "exported")
    options = ["--model.path", str(tiny_bert), "--data.train", str(text_file), "--data.cache", str(tmp_path / "cache")]
    options += ["--max-steps", "4", "--batch-size", "16", "--evaluation.dev", str(pairs), "--evaluation.every", "2"]
    main(["train", "unsup_bert_base", "--output", run, *options, "--evaluation.test", str(pairs)])
    printed = capsys.readouterr().out
    assert "batch     16 over all devices: 15 negatives per anchor, dense InfoNCE" in printed
    assert "encoding  2 examples a device, at once" in printed
    assert re.search(r"memory    0\.\d+ GB a device for the step, \d+\.\d+ GB available", printed)
    assert "before" in printed
    assert f"export    simcse-jax export {run} OUT" in printed

    scores = tmp_path / "scores.json"
    main(["evaluate", run, "--tasks", str(pairs), "--json", str(scores)])
    assert f"{run} (cls_before_pooler)" in capsys.readouterr().out
    from_run = json.loads(scores.read_text())["models"][0]["sts"]
    results = json.loads((Path(run) / "results.json").read_text())
    assert from_run["reported"]["Avg."] == pytest.approx(results["after"]["Avg."], abs=1e-6)

    main(["export", run, exported])
    main(["evaluate", exported, "--tasks", str(pairs), "--json", str(scores)])
    assert json.loads(scores.read_text())["models"][0]["sts"] == from_run

    vectors = tmp_path / "vectors.npy"
    main(["encode", exported, str(text_file), str(vectors), "--no-normalize"])
    sentences = text_file.read_text().splitlines()
    expected = SimCSE(run).encode(sentences, normalize=False)
    assert np.load(vectors).dtype == np.float32
    np.testing.assert_allclose(np.load(vectors), expected, atol=1e-6)


def test_encode_takes_one_sentence_or_many(tiny_bert: Path) -> None:
    model = SimCSE(tiny_bert, "avg")
    sentences = ["a man runs", "the dog eats", ""]
    before = list(sentences)
    vectors = model.encode(sentences)
    assert sentences == before
    assert vectors.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.encode("a man runs"), vectors[0], atol=1e-6)
    assert model.encode([]).shape == (0, 32)
    np.testing.assert_allclose(model.similarity("a man runs", sentences), vectors[:1] @ vectors.T, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    config = load_config_file(name)
    config.validate()
    values = PUBLISHED[name]
    assert (
        config.model.path,
        config.batch_size,
        config.optimizer.learning_rate,
        config.epochs,
        config.model.mlp_only_train,
    ) == values
    optimizer, objective = config.optimizer, config.objective
    assert (optimizer.warmup_steps, optimizer.weight_decay, optimizer.clip_norm) == (0, 0.0, 1.0)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (objective.temperature, objective.hard_negative_log_weight) == (0.05, 0.0)
    assert (config.data.max_length, config.seed, config.evaluation.every) == (32, 42, 125)
    assert (config.model.pooler, config.model.head, config.model.dropout) == ("cls", "fresh", None)
    assert (objective.loss, objective.mlm.weight, objective.contrastive_weight) == ("info_nce", 0.0, 1.0)
    smoothing = objective.smoothing
    if not name.startswith("iscse"):
        assert smoothing.weight == 0
        return
    assert (smoothing.buffer_size, smoothing.neighbours, smoothing.temperature) == (1024, 16, 2.0)
    assert (smoothing.grouping, smoothing.aggregation) == ("nearest", "attention")
    large = ("cosine", 0.005, 0.05) if name.endswith("large") else ("constant", smoothing.start_weight, 0.1)
    assert (smoothing.schedule, smoothing.start_weight, smoothing.weight) == large


def test_help_names_every_field_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "unsup_bert_base", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option in ("--batch-size INT", "--model.pooler", "--optimizer.learning-rate", "--checkpoint.keep"):
        assert option in shown
    assert "Largest global gradient norm; 0 does not clip. (default: 1.0)" in shown


def test_help_lists_each_command_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, (_, about) in COMMANDS.items():
        assert command_class(name).__doc__ == about
        if " " not in name:
            assert f"• {name} {about}" in shown
    for group, about in GROUPS.items():
        assert f"• {group} {about}" in shown
    assert "Every command takes --debug" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "unsup_bert_base"], "'simcse-jax' has no command 'trian': did you mean 'train'? Its commands are"),
        (["replace_words"], "did you mean 'replace-words'?"),
        (["xyz"], "'simcse-jax' has no command 'xyz': Its commands are train, plan,"),
        (["data", "inspekt"], "'simcse-jax data' has no command 'inspekt': did you mean 'inspect'? Its commands are"),
    ],
)
def test_a_misspelt_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_debug(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    assert "--debug" in (shown := capsys.readouterr().out)
    assert "Show the traceback of an error." in shown


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_debug_shows_the_traceback(place: int, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "nli", str(text_file)]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err.startswith("simcse-jax: error: give one source or more")
    with pytest.raises(InputError, match="give one source or more"):
        main([*words[:place], "--debug", *words[place:]])
    assert capsys.readouterr().err == ""


def test_debug_may_stand_before_the_config_file() -> None:
    command = parse(["train", "--debug", "unsup_bert_base", "--batch-size", "8"])
    assert isinstance(command, Train)
    assert command.debug
    assert command.config.batch_size == 8
    assert not parse(["train", "unsup_bert_base"]).debug


def test_config_survives_json() -> None:
    from simcse_jax.config.values import from_dict, to_dict

    config = load_config_file("sup_bert_base")
    assert from_dict(Config, to_dict(config)) == config


def test_an_option_before_the_config_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would otherwise be taken for a run of default settings."""
    with pytest.raises(SystemExit):
        main(["train", "--batch-size", "8", "unsup_bert_base"])
    assert "give the config file right after train" in capsys.readouterr().err


def test_text_in_the_place_of_a_config_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text := tmp_path / "text.txt").write_text("A man plays.\n")
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(text)])
    assert f"{text} is not a Python file" in (message := capsys.readouterr().err)
    assert "text goes to --data.train" in message


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`simcse-jax search ... | head`."""
    code = """
from simcse_jax import cli
class Talk:
    keeps_programs = False
    def run(self):
        for _ in range(100_000):
            print("a line of some length")
cli.parse = lambda argv: Talk()
cli.main(["talk"])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
