"""The commands, one after the other, as a user types them."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from simcse_jax import SimCSE
from simcse_jax.cli import COMMANDS, GROUPS, command_class, main, parse
from simcse_jax.commands import names
from simcse_jax.commands.names import arguments_of
from simcse_jax.commands.train import Train
from simcse_jax.config import Config
from simcse_jax.config.load import load_config_file
from simcse_jax.errors import InputError
from simcse_jax.runtime.open_files import LEAST

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
    main(["train", "unsup_bert_base", "--output", run, *options, "--evaluation.test", str(pairs), "--dry-run"])
    assert "\ndry run   the run there has ended; " in capsys.readouterr().out

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
    assert "Every command takes --help" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "unsup_bert_base"], "'simcse-jax' has no command 'trian': did you mean 'train'? Its commands are"),
        (["replace_words"], "did you mean 'replace-words'?"),
        (["xyz"], "'simcse-jax' has no command 'xyz': Its commands are train, configs,"),
        (["eval", "model"], "did you mean 'evaluate'?"),
        (["embed"], "did you mean 'encode'?"),
        (["inspect"], "did you mean 'data inspect'?"),
        (["--debug-not-known"], "Unrecognized options: --debug-not-known"),
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
    shown = capsys.readouterr().out
    assert "--debug" in shown
    assert "Show the traceback of an error." in shown
    options = {
        o for line in re.findall(r"^[│ ] (--\w.*)", shown, re.M) for o in re.findall(r"--[\w.-]+", line.split("  ")[0])
    }
    known = {spelling for argument in arguments_of(command_class(name)) for spelling in argument.spellings}
    assert options == known, "what is checked is what tyro takes"


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["encode"], "simcse-jax encode [-h] [OPTIONS] MODEL INPUT OUTPUT"),
        (["search"], "simcse-jax search [-h] [OPTIONS] MODEL SENTENCES [QUERY ...]"),
        (["evaluate"], "simcse-jax evaluate [-h] [OPTIONS] MODEL [MODEL ...]"),
        (["train"], "simcse-jax train [-h] [OPTIONS] CONFIG"),
        (["data"], "simcse-jax data [-h] {inspect,nli,mine}"),
        ([], "simcse-jax [-h] [--debug] [--quiet] [--verbose] [--no-verify] [--version] {train,"),
    ],
)
def test_usage_names_the_arguments(words: list[str], usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    assert f"usage: {usage}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["train", "quickstart", "--lr", "1e-5"],
            ["train has no option --lr: did you mean --optimizer.learning-rate?"],
        ),
        (["train", "quickstart", "--learning_rate=1"], ["did you mean --optimizer.learning-rate?"]),
        (["train", "quickstart", "--optimizer.lr", "1"], ["no option --optimizer.lr: did you mean --optimizer.lea"]),
        (["train", "quickstart", "--data.path", "x"], ["no option --data.path: did you mean --data.train?"]),
        (
            ["train", "quickstart", "--temp", "1", "--lr", "1"],
            ["2 problems", "--objective.temperature?", "--optimizer."],
        ),
        (
            ["train", "quickstart", "--optimizer.nesterov", "1"],
            ["--optimizer.nesterov: simcse-jax train CONFIG --help"],
        ),
        (["train", "quickstart", "--lr_scheduler_type", "cosine"], ["did you mean --optimizer.schedule?"]),
        (["train", "quickstart", "--optimizer.weigth-decay", "1"], ["did you mean --optimizer.weight-decay?"]),
        (["train", "quickstart", "--evaluation.tasks", "sts"], ["did you mean --evaluation.test?"]),
        (["train", "quickstart", "--text_column", "t"], ["did you mean --data.columns?"]),
        (["ablate", "dropout", "--seed", "1"], ["did you mean --seeds?"]),
        (["train", "quickstart", "--temperature", "1"], ["--objective.temperature or --objective.smoothing.temp"]),
        (["train", "quickstart", "--per_device_train_batch_size", "8"], ["did you mean --batch-size?"]),
        (["train", "quickstart", "--num_train_epochs", "1"], ["did you mean --epochs?"]),
        (["train", "--model_name_or_path", "bert"], ["did you mean --model.path?"]),
        (["ablate", "dropout", "--lr", "1"], ["did you mean --base.optimizer.learning-rate?"]),
        (
            ["encode", "--model", "m", "--input", "t"],
            ["give MODEL without an option: simcse-jax encode MODEL INPUT OUTPUT"],
        ),
        (["encode", "--max_seq_length", "9"], ["encode has no option --max_seq_length: did you mean --max-length?"]),
        (["encode", "--poler", "avg"], ["encode has no option --poler: did you mean --pooler?"]),
        (
            ["evaluate", "m", "--mode", "validation"],
            ["--mode is 'validation': did you mean 'dev'? expected one of test,"],
        ),
        # What is none of the choices is no guess.
        (["search", "m", "a.txt", "q", "--backend", "mean"], ["--backend is 'mean': expected one of jax, faiss-flat,"]),
        (
            ["encode", "m", "--checkpoint.every", "3"],
            ["encode has no option --checkpoint.every: simcse-jax encode MODEL"],
        ),
        (
            ["train", "sup_bert_base", "wiki.txt"],
            ["train takes no argument 'wiki.txt': simcse-jax train CONFIG [OPTIONS]"],
        ),
        (["train", "sup_bert_base", "--seed", "x"], ["simcse-jax train --help"]),
    ],
)
def test_an_option_that_a_command_does_not_have(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    message = capsys.readouterr().err
    for part in expected:
        assert part in message


def test_names_of_other_programs_stand_for_arguments_of_ours() -> None:
    ours = {argument.name for name in COMMANDS for argument in arguments_of(command_class(name))}
    assert set(names._OTHER_NAMES) <= ours


def test_the_flags_of_the_page_for_movers_are_answered_with_its_options() -> None:
    page = (Path(__file__).parents[1] / "docs/from_simcse.md").read_text().partition("## `evaluation.py`")[0]
    arguments = list(arguments_of(Train))
    rows = re.findall(r"^\| ((?:`--[^|]*`(?:, )?)+) \| ((?:`--[^|]*`(?:, )?)+) \|", page, re.M)
    assert len(rows) > 10
    for theirs, ours in rows:
        shown = re.findall(r"`(--[\w.-]+)", ours)
        for n, flag in enumerate(re.findall(r"`(--\w+)", theirs)):
            if flag not in ("--max_steps", "--seed"):  # ours, too
                assert shown[min(n, len(shown) - 1)] in [a.shown for a in names._meant(flag, arguments)]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"simcse-jax {version('simcse-jax')}\n"


def test_configs_are_listed_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    shown = capsys.readouterr().out
    assert re.search(r"sup_bert_base +Supervised SimCSE from BERT-base, as published: NLI triplets", shown)
    assert shown.index("simcse-jax ablate CONFIG") < shown.index("  dropout  ")
    main(["configs", "sup_bert_base"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("configs/sup_bert_base.py")
    assert {"batch_size = 512", "objective.mlm.weight = 0.0", "data.columns = ('sent0', 'sent1', 'hard_neg')"} <= set(
        lines
    )
    main(["configs", "dropout", "--json"])
    assert json.loads(capsys.readouterr().out)["variants"]["0.5"] == {"model.dropout": 0.5}
    (own := tmp_path / "own.py").write_text("config = 3\n")
    with pytest.raises(SystemExit, match="2"):
        main(["configs", str(own)])
    assert f"{own} defines none of config, study, ablation" in capsys.readouterr().err


def test_a_shell_without_completion_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--tyro-print-completion", "tcsh"])
    assert "completion is written for bash, zsh and fish" in capsys.readouterr().err


def test_a_shell_completes_the_options_of_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tyro-print-completion", "bash"])
    script = capsys.readouterr().out
    for name in ("--optimizer.learning-rate", "--base.optimizer.learning-rate", "replace-words", "nli"):
        assert name in script


def test_a_dry_run_checks_prints_and_writes_nothing(
    tiny_bert: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, cache = tmp_path / "run", tmp_path / "cache"
    words = ["train", "unsup_bert_base", "--dry-run", "--model.path", str(tiny_bert), "--output", str(output)]
    words += ["--data.train", str(text_file), "--data.cache", str(cache), "--batch-size", "16", "--evaluation.dev", ""]
    words += ["--model.pooler", "None", "--model.no-mlp-only-train"]  # the model's own, or cls
    main(words)
    shown = capsys.readouterr().out
    assert "\nmodel.pooler = 'cls'\n" in shown
    assert ", pooler cls\n" in shown
    assert "\noptimizer.learning_rate = 3e-05\n" in shown
    assert "\nbatch     16 over all devices: 15 negatives per anchor, dense InfoNCE\n" in shown
    assert shown.endswith("dry run   nothing was written there; leave out --dry-run to train\n")
    assert [path for path in tmp_path.iterdir() if path != cache] == []
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--data.max-length", "41"])
    assert "positions for 40 tokens" in capsys.readouterr().err


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


@pytest.mark.parametrize("limit", [40, 64])
def test_too_few_open_files_are_said_at_once(limit: int) -> None:
    command = f"ulimit -n {limit}; exec '{sys.executable}' -m simcse_jax configs"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == (0 if limit == LEAST else 2), done.stderr
    assert limit == LEAST or f"may have {limit} files open at a time, and a command needs {LEAST}" in done.stderr


def test_an_error_does_not_wait_for_a_thread_that_hangs() -> None:
    """As orbax's do where a disk fails, for five minutes."""
    code = (
        "import threading, time\n"
        "from simcse_jax import cli\n"
        "cli._PATIENCE = 0.5\n"
        "threading.Thread(target=time.sleep, args=(90,)).start()\n"
        "cli.program(['configs', 'absent'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("simcse-jax: error: ")
