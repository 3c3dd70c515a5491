"""A model's own limit, pooler, Normalize and prompts: every command keeps them, runs and exports hand them on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.config import Config, ModelConfig
from simcse_jax.errors import InputError
from simcse_jax.evaluation.mteb import MTEBEncoder
from simcse_jax.evaluation.sentences import unlabelled_sentences
from simcse_jax.evaluation.suite import load_suite
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.replace_words import WordReplacer
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.runs.folder import Run, changes, create_run, open_run
from simcse_jax.study import Study
from simcse_jax.study.measure import Meter
from simcse_jax.training.describe import _describe_start
from simcse_jax.training.prepare import Parts, check_request, load_parts
from simcse_jax.training.trainer import train

LIMIT = 12  # tokens; the tiny models have positions for 40
SAME = "abcdefghij"  # with two specials as long as the limit allows
ABOUT = {"prompts": {"query": "q: ", "none": ""}, "default_prompt_name": None, "similarity_fn_name": "dot"}


@pytest.fixture(scope="module")
def limited(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model that is cut at LIMIT, pools by mean, ends in Normalize and names prompts."""
    return sentence_transformer(tiny_bert, tmp_path_factory.mktemp("limited") / "model", ABOUT)


def sentence_transformer(source: Path, folder: Path, about: dict[str, Any], **pooling: Any) -> Path:
    shutil.copytree(source, folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    for path, content in {
        "modules.json": listed,
        "sentence_bert_config.json": {"max_seq_length": LIMIT},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, **pooling},
        "config_sentence_transformers.json": about,
    }.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    return folder


@pytest.fixture
def config(limited: Path, small_run: Config) -> Config:
    """A run that begins from the model and leaves its pooler open."""
    return replace(small_run, model=ModelConfig(path=str(limited)))


def parts_of(config: Config) -> Parts:
    return load_parts(check_request(config))


class Seen(Exception):
    """Stands for vectors: raised instead of encoding, with the settings of the encoder."""


@pytest.mark.parametrize("command", ["evaluate", "postprocess", "analyze", "encode", "search", "dev scores", "study"])
def test_everything_encodes_up_to_the_models_own_limit(
    command: str, limited: Path, config: Config, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(encoder: BatchEncoder, *_: Any, **__: Any) -> None:
        raise Seen(encoder.max_length, encoder.prompt)

    monkeypatch.setattr(BatchEncoder, "__call__", seen)
    default = sentence_transformer(limited, tmp_path / "model", ABOUT | {"default_prompt_name": "query"})
    pairs, out = config.evaluation.dev, str(tmp_path / "out")
    words = {
        "evaluate": ["--tasks", pairs],
        "postprocess": [str(text_file), out],
        "analyze": ["--output", out, "--task", pairs],
        "encode": [str(text_file), str(tmp_path / "x.npy")],
        "search": [str(text_file), "a"],
    }
    config = replace(config, model=ModelConfig(path=str(default)))
    calls: dict[str, Callable[[], Any]] = {}
    if command == "dev scores":
        calls[command] = partial(parts_of(config).dev_scores or main, {})
    elif command == "study":
        base = replace(config, evaluation=replace(config.evaluation, test=(pairs,)))
        calls[command] = partial(Meter(Study(base, batch_sizes=(16,), steps=1), base)._test, {})
    with pytest.raises(Seen) as caught:
        calls.get(command, lambda: main([command, str(default), *words[command]]))()
    assert caught.value.args == (LIMIT, "q: ")


def test_texts_that_differ_beyond_the_limit_are_the_same(limited: Path, tmp_path: Path) -> None:
    """In `evaluate` as in `encode`: the cosine of such a pair is 1 and no gold score counts."""
    file = tmp_path / "pairs.tsv"
    rows = [("a cat", "the dog", 1.0), ("ab", "ba", 2.0), (SAME + "xyz", SAME + "qrst", 0.0), (SAME, "xyzxyz", 3.0)]
    file.write_text("sentence1\tsentence2\tscore\n" + "".join(f"{a}\t{b}\t{score}\n" for a, b, score in rows))
    main(["evaluate", str(limited), "--tasks", str(file), "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["models"][0]["sts"]["reported"][str(file)]
    cosines = [SimCSE(limited).similarity(a, b)[0, 0] for a, b, _ in rows]
    assert cosines[2] == 1
    order, gold = np.argsort(np.argsort(cosines)), np.argsort(np.argsort([score for _, _, score in rows]))
    assert found == pytest.approx(100 * np.corrcoef(order, gold)[0, 1])


def test_tasks_and_sentences_may_be_paths(config: Config) -> None:
    pairs = Path(config.evaluation.dev)
    for names in (pairs, [pairs], str(pairs)):
        assert [task.name for task in load_suite(names, "").sts] == [str(pairs)]
    assert len(unlabelled_sentences(pairs)) == 8
    assert len(unlabelled_sentences(Path(config.data.train), limit=3)) == 3


def test_what_is_cut_is_said_once(limited: Path, text_file: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text(f"{SAME}\n{SAME}k\n" + "a\n" * 3 + f"{SAME * 9}\n")
    main(["encode", str(limited), str(file), str(tmp_path / "x.npy")])
    captured = capsys.readouterr()
    assert captured.err.count("2 of 6 texts have more than 12 tokens: only their beginning is encoded") == 1
    assert "tokens" not in captured.out
    main(["encode", str(limited), str(file), str(tmp_path / "y.npy"), "--max-length", "40"])
    assert "1 of 6 texts have more than 40 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("length", [41, 1000])
def test_more_tokens_than_positions_are_refused(
    limited: Path, text_file: Path, tmp_path: Path, length: int, capsys: Any
) -> None:
    model = SimCSE(limited)
    for call in (
        lambda: SimCSE(limited, max_length=length),
        lambda: model.encode("a", max_length=length),
        lambda: load_model(limited).encoder(length),
        lambda: WordReplacer(limited, max_length=length),
    ):
        with pytest.raises(InputError, match=rf"max_length is {length} but .* 40 tokens|no head"):
            call()
    with pytest.raises(SystemExit):
        main(["encode", str(limited), str(text_file), str(tmp_path / "x.npy"), "--max-length", str(length)])
    assert f"max_length is {length} but the model has positions for 40 tokens" in capsys.readouterr().err
    assert not (tmp_path / "x.npy").exists()
    assert SimCSE(limited, max_length=40).max_length == 40  # beyond the model's own limit, as asked for


def test_a_run_keeps_what_the_model_has(limited: Path, config: Config, tmp_path: Path) -> None:
    """Pooler, limit, Normalize and prompts; `create_run` writes them and `read_checkpoint` finds them."""
    parts = parts_of(config)
    assert (parts.config.model.pooler, parts.model.pooler) == ("avg", "avg")
    run = create_run(tmp_path / "made", parts.config, "text", parts.checkpoint, parts.tokenizer)
    assert open_run(run.folder).config.model.pooler == "avg"
    again = read_checkpoint(run.model_folder)
    assert (again.max_length, again.normalizes, again.own_pooling) == (LIMIT, True, "avg")
    assert again.prompts.by_name == ABOUT["prompts"]
    assert _describe_start(parts) == ["kept      of the starting model: pooler avg, Normalize, limit of 12 tokens"]
    # The same command continues the run, though its config names no pooler.
    assert changes(run.config, config) == []
    assert changes(run.config, replace(config, model=replace(config.model, pooler="cls"))) == ["model.pooler"]


def test_what_a_config_replaces_is_said(limited: Path, config: Config) -> None:
    model = replace(config.model, pooler="cls", mlp_only_train=True)
    parts = parts_of(replace(config, model=model, data=replace(config.data, max_length=20)))
    assert (parts.checkpoint.max_length, parts.checkpoint.normalizes) == (20, False)
    assert _describe_start(parts) == ["replaced  of the starting model: pooler avg, Normalize, limit of 12 tokens"]
    same = parts_of(replace(config, model=replace(config.model, pooler="avg")))
    assert same.checkpoint.normalizes


def test_a_plain_model_has_nothing_to_keep(small_run: Config) -> None:
    """Its pooler is `cls`, as before there was a choice; `mlp_only_train` alone says so, too."""
    model = ModelConfig(path=small_run.model.path)
    for settings in (model, replace(model, mlp_only_train=True)):
        parts = parts_of(replace(small_run, model=settings))
        assert parts.config.model == replace(settings, pooler="cls")
        assert parts.checkpoint.max_length == 40
        assert _describe_start(parts) == []


def test_a_head_that_starts_afresh_is_said(tiny_bert: Path, small_run: Config, tmp_path: Path) -> None:
    export(load_model(tiny_bert, "cls"), tmp_path / "exported")
    config = replace(small_run, model=ModelConfig(path=str(tmp_path / "exported")))
    lines = "\n".join(_describe_start(parts_of(config)))
    assert "kept      of the starting model: pooler cls" in lines
    assert "replaced  of the starting model: head (model.head 'checkpoint' keeps it)" in lines
    kept = replace(config, model=replace(config.model, head="checkpoint"))
    assert "replaced" not in "\n".join(_describe_start(parts_of(kept)))


def test_runs_of_earlier_versions_are_read(config: Config, tmp_path: Path) -> None:
    """They keep the limit that they were scored with: as many tokens as there are positions."""
    parts = parts_of(config)
    run = create_run(tmp_path / "made", parts.config, "text", parts.checkpoint, parts.tokenizer)
    (run.model_folder / "config_sentence_transformers.json").unlink()
    file = run.model_folder / "config.json"
    about = json.loads(file.read_text())
    del about["simcse_jax"]
    file.write_text(json.dumps(about))
    again = read_checkpoint(run.model_folder)
    assert (again.max_length, again.normalizes, again.prompts.by_name) == (40, False, {})
    assert Run(run.folder, parts.config, "text").pooling.at_evaluation == "avg"


@pytest.mark.full
def test_a_trained_run_gives_the_starting_models_kind_of_vectors(config: Config, tmp_path: Path) -> None:
    """From the start to sentence-transformers: limit, norm and prompts."""
    train(config)
    model = SimCSE(config.output)
    assert model.max_length == LIMIT
    folder = Path(export(config.output, tmp_path / "exported"))
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == LIMIT
    assert json.loads((folder / "modules.json").read_text())[-1]["type"].endswith("Normalize")
    library = pytest.importorskip("sentence_transformers", reason="the reference")
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    vectors = theirs.encode(["a cat", SAME * 3], prompt_name="query")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors, model.encode(["a cat", SAME * 3], prompt_name="query"), atol=1e-5)
    assert theirs.similarity_fn_name == "dot"


def test_an_index_belongs_to_the_settings_it_was_built_with(limited: Path, tmp_path: Path) -> None:
    model = SimCSE(limited)
    model.build_index(["a cat", SAME * 3])
    model.save_index(tmp_path / "index")
    model.load_index(tmp_path / "index")
    kept = model.index
    for other, words in [
        (SimCSE(limited, max_length=20), r"max_length was 12, is 20\): load the model with max_length=12"),
        (SimCSE(limited, long_text="windows"), r"long_text was 'cut', is 'windows'"),
    ]:
        with pytest.raises(InputError, match=words):
            other.load_index(tmp_path / "index")
        assert other.index is None
    assert model.index is kept
    # Indexes of earlier versions name neither, and have no manifest: there, the longest text tells.
    (tmp_path / "index" / "manifest.json").unlink()
    file = tmp_path / "index" / "index.json"
    stored = json.loads(file.read_text())
    del stored["manifest"]
    stored["about"] = {"model": "m", "pooler": "avg"}
    file.write_text(json.dumps(stored))
    model.load_index(tmp_path / "index")
    with pytest.raises(InputError, match=f"another vector for '{SAME * 3}'"):
        SimCSE(limited, max_length=20).load_index(tmp_path / "index")


def test_prompts(limited: Path, tmp_path: Path) -> None:
    model = SimCSE(limited)
    assert model.prompts == ABOUT["prompts"]
    expected = model.encode(["q: a", "q: bc"])
    for prompt in ({"prompt_name": "query"}, {"prompt": "q: "}, {"prompt": "q: ", "prompt_name": "none"}):
        np.testing.assert_array_equal(model.encode(["a", "bc"], **prompt), expected)
    plain = model.encode(["a", "bc"])
    np.testing.assert_array_equal(model.encode(["a", "bc"], prompt_name="none"), plain)
    with pytest.raises(InputError, match=r"prompt_name is 'passage'; the model's prompts are 'query', 'none'"):
        model.encode("a", prompt_name="passage")

    model.build_index(["a", "bc"], prompt_name="query")
    model.add_to_index(["a"])
    assert [hit.index for hit in model.search("a", threshold=1.0, prompt="q: ")] == [0, 2]
    assert model.search("a", threshold=1.0) == []
    model.save_index(tmp_path / "index")
    model.load_index(tmp_path / "index")

    default = SimCSE(sentence_transformer(limited, tmp_path / "model", ABOUT | {"default_prompt_name": "query"}))
    np.testing.assert_array_equal(default.encode(["a", "bc"]), expected)
    np.testing.assert_array_equal(default.encode(["a", "bc"], prompt=""), plain)


def test_an_export_keeps_prompts_and_similarity(limited: Path, tmp_path: Path) -> None:
    kept = {"prompts": ABOUT["prompts"], "similarity_fn_name": "dot"}
    again = export(export(limited, tmp_path / "once"), tmp_path / "twice")
    assert json.loads((Path(again) / "config_sentence_transformers.json").read_text()) == kept
    export(load_model(limited, "cls_before_pooler"), tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config_sentence_transformers.json").read_text()) == kept


def test_a_prompt_that_is_not_pooled_is_refused(limited: Path, tmp_path: Path) -> None:
    model = SimCSE(sentence_transformer(limited, tmp_path / "model", ABOUT, include_prompt=False))
    again = SimCSE(export(tmp_path / "model", tmp_path / "exported"))
    for read in (model, again):
        with pytest.raises(InputError, match=r"'q: ' out of the mean \(include_prompt\)"):
            read.encode("a", prompt_name="query")
    assert model.encode("a", prompt_name="none").shape == (32,)


def test_mteb_takes_the_prompt_of_the_task(limited: Path, tmp_path: Path) -> None:
    class Task:
        name, type = "STS12", "STS"

    about = {"prompts": {"STS12-query": "a: ", "STS12": "b: ", "STS": "c: ", "query": "d: "}}
    encoder, plain = MTEBEncoder(sentence_transformer(limited, tmp_path / "model", about)), SimCSE(limited)
    for task, side, prompt in [
        (Task, "query", "a: "),
        (Task, "document", "b: "),
        (type("Other", (), {"name": "X", "type": "STS"}), None, "c: "),
        (None, "query", "d: "),
        (None, None, ""),
    ]:
        found = encoder.encode([{"text": ["x"]}], task_metadata=task, prompt_type=side)
        np.testing.assert_array_equal(found, plain.encode([prompt + "x"]))
