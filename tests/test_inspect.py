"""`simcse-jax data inspect`: what is said of a text, against what is counted of it by other means."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.config import Config, DataConfig, ModelConfig
from simcse_jax.data.augment import make_augmenter
from simcse_jax.data.corpus import open_corpus
from simcse_jax.data.inspection import Repetitions, _repeated_in_batch, format_report, inspect_corpus
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.pretrained.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return load_tokenizer(tiny_bert)


def inspect(path: Path, tokenizer: Any, **data: Any) -> dict[str, Any]:
    config = Config(data=DataConfig(train=str(path), **data), batch_size=16)
    return inspect_corpus(open_corpus(config.data), config, tokenizer, progress=False)


@pytest.mark.parametrize("max_length", [3, 20, 100])
def test_lengths_are_those_of_the_token_table(max_length: int, text_file: Path, tokenizer: Any, tmp_path: Path) -> None:
    whole, cut = (
        tokenize_corpus(open_corpus(DataConfig(train=str(text_file))), tokenizer, length, tmp_path, progress=False)
        for length in (512, max_length)
    )
    lengths, kept = np.diff(whole.offsets), np.diff(cut.offsets)
    report = inspect(text_file, tokenizer, max_length=max_length)
    column = report["columns"]["sentence"]
    assert (report["examples"], report["blank"]) == (203, 0)
    assert column["mean_length"] == pytest.approx(lengths.mean())
    assert column["longest"] == lengths.max()
    expected = {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in (1, 5, 25, 50, 75, 95, 99)}
    assert column["percentiles"] == expected
    assert column["truncated"] == pytest.approx(np.mean(lengths > max_length))
    assert column["tokens_cut"] == pytest.approx(1 - kept.sum() / lengths.sum())
    assert column["padding"] == pytest.approx(1 - kept.mean() / max_length)
    assert sum(count for _, _, count in column["histogram"]) == 203
    for first, last, count in column["histogram"]:
        assert count == np.count_nonzero((lengths >= first) & (lengths <= last))


def test_sentences_that_are_the_same_once_cut(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(["abc", "xyz", "ABC", "abcd", "", "xyz"]) + "\n")
    report = inspect(tmp_path / "text.txt", tokenizer, max_length=10)
    assert report["columns"]["sentence"]["repeated"] == pytest.approx(2 / 5)  # the tokenizer lower-cases
    assert report["blank"] == 1
    assert report["repeated_in_batch"] == pytest.approx(4)  # a batch holds all: abc twice, xyz twice
    cut = inspect(tmp_path / "text.txt", tokenizer, max_length=4)
    assert cut["columns"]["sentence"]["repeated"] == pytest.approx(3 / 5)  # abcd as abc


def test_the_beginning_is_cut_where_the_tokenizer_cuts_it(tiny_bert: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    tokenizer.truncation_side = "left"
    (tmp_path / "text.txt").write_text("abcdefgh\nxyzdefgh\n")
    report = inspect(tmp_path / "text.txt", tokenizer, max_length=7)
    assert report["columns"]["sentence"]["repeated"] == pytest.approx(1 / 2)
    assert report["shown"][0][0]["tokens"] == ["[CLS]", "##d", "##e", "##f", "##g", "##h", "[SEP]"]
    assert report["shown"][0][0]["cut"] == 3


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16, 30, 50])
def test_expected_repetitions_in_a_batch(batch_size: int) -> None:
    """Against batches as training draws them; the last, short one of an epoch left out."""
    sentences = np.repeat(np.arange(14), [1] * 8 + [2, 2, 3, 3, 5, 7])
    _, counts = np.unique(sentences, return_counts=True)
    expected = _repeated_in_batch(*np.unique(counts, return_counts=True), batch_size)
    found = []
    for seed in range(600):
        batch = sentences[EpochOrder(len(sentences), batch_size, seed).examples(0)]
        _, at, times = np.unique(batch, return_inverse=True, return_counts=True)
        found.append(np.count_nonzero(times[at] > 1))
    assert expected == pytest.approx(np.mean(found), abs=4 * np.std(found) / 600**0.5 + 1e-9)


def test_repetitions_are_exact_up_to_a_limit_and_estimated_beyond() -> None:
    rng = np.random.default_rng(0)
    distinct = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    values = rng.permutation(np.concatenate([distinct, distinct[:5000], distinct[:1000]]))
    exact, estimated = Repetitions(), Repetitions(limit=4000)
    for part in np.array_split(values, 37):
        exact.add(part)
        estimated.add(part)
    assert [group.tolist() for group in exact.groups()] == [[1, 2, 3], [15_000, 4000, 1000]]
    times, number = estimated.groups()
    assert estimated.mask == 7
    assert len(estimated.values) <= 4000
    assert times.tolist() == [1, 2, 3]
    np.testing.assert_allclose(number, [15_000, 4000, 1000], rtol=0.3)


def test_packing_is_that_of_training(text_file: Path, tokenizer: Any) -> None:
    report = inspect(text_file, tokenizer, max_length=20, packed_length=60)["packing"]
    assert (report["packed_length"], report["sentences"]) == (60, 16)
    assert 0.6 < report["text"] <= 1
    assert report["tokens"] == pytest.approx(report["rows"] * 60 / (16 * 20))


def test_examples_are_shown_as_the_model_sees_them(text_file: Path, tokenizer: Any) -> None:
    data = DataConfig(train=str(text_file), augment="delete_word", max_length=20)
    shown = inspect(text_file, tokenizer, augment="delete_word", max_length=20)["shown"]
    sentences = text_file.read_text().splitlines()[:3]
    encoded = tokenizer(sentences, max_length=20, truncation=True)["input_ids"]
    augmenter = make_augmenter(data, tokenizer, Config().seed)
    assert augmenter is not None
    for example, sentence, ids in zip(shown, sentences, encoded, strict=True):
        original, view = example
        assert original["text"] == sentence
        assert original["tokens"] == tokenizer.convert_ids_to_tokens(ids)
        assert original["cut"] == len(tokenizer(sentence)["input_ids"]) - len(ids)
        assert view["role"] == "positive (delete_word)"
        assert view["tokens"][0], view["tokens"][-1] == ("[CLS]", "[SEP]")
        assert len(view["tokens"]) < len(original["tokens"])


def test_columns_have_reports_of_their_own(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "nli.csv").write_text("a,b,c\np,long hypothesis,x\np,h,\np,i,y\n")
    report = inspect(tmp_path / "nli.csv", tokenizer)
    assert list(report["columns"]) == ["sentence", "positive", "hard negative"]
    assert (report["examples"], report["blank"]) == (3, 0)
    assert [c["repeated"] for c in report["columns"].values()] == [pytest.approx(2 / 3), 0, 0]
    assert [s["role"] for s in report["shown"][0]] == ["sentence", "positive", "hard negative"]


def test_a_text_without_sentences(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n \n")
    with pytest.raises(InputError, match=r"no sentence to train on; found only blank ones \(2\)"):
        inspect(tmp_path / "text.txt", tokenizer)


def test_the_command_takes_the_options_of_train(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["label,a,b", "entailment,a man,someone", "neutral,x,y", "entailment,a dog,an animal"]
    (tmp_path / "nli.csv").write_text("\n".join(rows) + "\n")
    options = ["--model.path", str(tiny_bert), "--data.train", str(tmp_path / "nli.csv"), "--batch-size", "2"]
    output = tmp_path / "report.json"
    command = ["data", "inspect", "sup_bert_base", *options, "--data.columns", "a", "b", "--json", str(output)]
    main([*command, "--data.where", "label", "entailment"])
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'nli.csv'}: 2 pairs" in printed
    assert "  sentence: [CLS] a m ##a ##n [SEP]" in printed
    assert "batch of 2: 0 expected examples" in printed
    assert json.loads(output.read_text())["examples"] == 2


def test_figures_do_not_replace_the_text(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They go to a .json file alone, in the user's folder too."""
    text = tmp_path / "text.txt"
    text.write_text("one\ntwo\n")
    command = ["data", "inspect", "unsup_bert_base", "--model.path", str(tiny_bert), "--data.train", str(text)]
    with pytest.raises(SystemExit):
        main([*command, "--json", str(text)])
    assert re.search(r"text\.txt must end in \.json", capsys.readouterr().err)
    assert text.read_text() == "one\ntwo\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    main([*command, "--json=~/report.json"])
    assert json.loads((tmp_path / "report.json").read_text())["examples"] == 2


def test_rows_are_chosen_alike_whatever_the_config_file_sets(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dict that is not empty would otherwise have another syntax on the command line."""
    (tmp_path / "nli.csv").write_text("label,a\nentailment,one\nneutral,two\nneutral,three\n")
    base = Config(
        model=ModelConfig(path=str(tiny_bert)),
        data=DataConfig(train=str(tmp_path / "nli.csv"), where={"label": "entailment"}),
    )
    for n, config in enumerate([base, replace(base, data=replace(base.data, where={}))]):
        file = tmp_path / f"config{n}.py"
        file.write_text(f"from simcse_jax.config import *\nfrom simcse_jax.objectives import *\nconfig = {config!r}\n")
        main(["data", "inspect", str(file), "--data.where", "label", "neutral"])
        assert ": 2 sentences" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(["data", "inspect", str(file), "--data.where", "label"])
        assert "expected pairs of a name and a value" in capsys.readouterr().err
    main(["data", "inspect", str(tmp_path / "config0.py")])
    assert ": 1 sentences" in capsys.readouterr().out


def test_a_config_file_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "inspect", "--batch-size", "8", "unsup_bert_base"])
    assert "give the config file right after data inspect" in capsys.readouterr().err


def test_several_hard_negatives_some_missing(tokenizer: Any, tmp_path: Path) -> None:
    rows = [["a dog", "dog", "cat", "red", "two"], ["a man", "man", "", "house", ""]]
    names = ("query", "answer", "negative_1", "negative_2", "negative_3")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    report = inspect(path, tokenizer, max_length=10)
    assert list(report["columns"])[2:] == ["hard negative", "hard negative 2", "hard negative 3"]
    assert [sum(n for *_, n in column["histogram"]) for column in report["columns"].values()] == [2, 2, 1, 2, 1]
    assert "2 examples of up to 3 hard negatives" in format_report(report)
