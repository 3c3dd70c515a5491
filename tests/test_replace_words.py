"""Words replaced by a masked language model: which, by what, and what stays."""

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simcse_jax.cli import main
from simcse_jax.data.vocabulary import make_model_folder
from simcse_jax.errors import InputError
from simcse_jax.inference.replace_words import WordReplacer, check_settings
from simcse_jax.model import SentenceEncoder, build_mlm_head, init_mlm_head, read_encoder_config
from simcse_jax.model.build import init_params
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params, to_tensors
from simcse_jax.storage.files import write_tensors

TEXT = [
    "The old man crossed the quiet river before dawn.",
    "Nobody in the village had heard the bells; nobody cared!",
    "A river, a village, an old bell.",
]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights and a prediction head, its vocabulary that of `TEXT`."""
    root = tmp_path_factory.mktemp("predictor")
    (root / "text.txt").write_text("\n".join(TEXT * 3))
    folder = make_model_folder(str(root / "text.txt"), root / "model", size=120, layers=2, hidden=16, positions=40)
    config = json.loads((folder / "config.json").read_text())
    model = SentenceEncoder(read_encoder_config(config))
    params = jax.tree.map(lambda x: 10 * x, init_params(model, 0))
    table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    params["mlm"] = init_mlm_head(jax.random.key(1), table, 1.0)
    write_tensors(folder / "model.safetensors", to_tensors(params, model.config))
    return folder


def changed(before: str, after: str) -> list[tuple[str, str]]:
    """Words that differ; the sentences have the same blanks."""
    return [(a, b) for a, b in zip(before.split(), after.split(), strict=True) if a != b]


def test_a_share_of_the_words_is_replaced_and_the_rest_stays(predictor: Path) -> None:
    replace = WordReplacer(predictor, batch_size=2)
    for share, counts in ((0.01, [1, 1, 1]), (0.25, [2, 3, 2])):  # of 10, 11 and 9 words, marks among them
        after = list(replace(TEXT, share))
        assert [len(changed(a, b)) for a, b in zip(TEXT, after, strict=True)] == counts
        assert after == list(replace(TEXT, share))
        assert after != list(replace(TEXT, share, seed=1))
    after = list(replace(TEXT, 1.0))
    assert all(mark in after[1] for mark in (";", "!"))  # marks are words of the tokenizer, but not replaced


def test_each_is_the_likeliest_other_word(predictor: Path) -> None:
    """By hand: one sentence, no padding, a probability for each token of the vocabulary."""
    tokenizer, checkpoint = load_tokenizer(predictor), read_checkpoint(predictor)
    params = jax.tree.map(jnp.asarray, load_params(checkpoint, mlm=True))
    model = SentenceEncoder(checkpoint.config)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    (after,) = WordReplacer(predictor)(TEXT[:1], 0.3)
    old, new = (tokenizer(text)["input_ids"] for text in (TEXT[0], after.lower()))
    places = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    assert len(places) == 3
    ids = jnp.array([[tokenizer.mask_token_id if i in places else token for i, token in enumerate(old)]])
    states = model.apply(
        {"params": {"encoder": params["encoder"]}},
        ids,
        jnp.array([[ids.shape[1]]]),
        method=SentenceEncoder.hidden_states,
    )
    head = build_mlm_head(checkpoint.config, jnp.float32, jnp.float32)
    table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    logits = np.asarray(head.apply({"params": params["mlm"]}, states[-1][0], table))
    for place in places:
        order = np.argsort(-logits[place])
        best = next(t for t in order if names[t].isalnum() and t != old[place])
        assert new[place] == best


def test_the_command_writes_pairs(predictor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("\n".join([*TEXT, "", "!!!"]))
    main(["replace-words", str(predictor), str(tmp_path / "in.txt"), str(tmp_path / "out.csv"), "--share", "0.2"])
    assert "4 pairs, 1 of them without a word that could be replaced" in capsys.readouterr().out
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["sentence"] for row in rows] == [*TEXT, "!!!"]
    assert [row["sentence"] == row["positive"] for row in rows] == [False, False, False, True]


def test_what_cannot_be(predictor: Path, minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no head of a masked language model"):
        WordReplacer(minilm)
    with pytest.raises(InputError, match=r"share is 1\.5; it must be above 0 and at most 1"):
        WordReplacer(predictor)(TEXT, 1.5)
    for settings, message in (
        ((0.1, -1, None, 1), "seed is -1"),
        ((0.1, 0, 2, 1), "max_length is 2"),
        ((0.1, 0, 9, 0), "batch_size is 0"),
    ):
        with pytest.raises(InputError, match=message):
            check_settings(*settings)


def test_a_word_that_is_cut_stays(predictor: Path) -> None:
    """Its beginning would be a word by itself."""
    tokenizer = load_tokenizer(predictor)
    replace = WordReplacer(predictor, max_length=5)
    sentence = "the old manhear crossed"
    names = tokenizer.convert_ids_to_tokens(tokenizer(sentence)["input_ids"])
    assert names[:4] == ["[CLS]", "the", "old", "man"]
    assert names[4].startswith("##")
    (after,) = replace([sentence], 1.0)
    assert after.split()[2:] == ["manhear", "crossed"]
    assert after.split()[0] != "the"


def test_byte_level_tokens_are_texts(tmp_path: Path) -> None:
    """A vocabulary with `##` in it is not WordPiece for that, and bytes are not letters."""
    from tokenizers.implementations import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    text = ["a café – a ##note, a café – the ##note, the end"] * 3
    trained.train_from_iterator(text, 320, 2, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    trained.save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    replace = object.__new__(WordReplacer)
    replace._tokenizer = load_tokenizer(tmp_path)
    names = replace._tokenizer.convert_ids_to_tokens(range(len(replace._tokenizer)))
    assert any(name.startswith("##") for name in names)
    texts, whole = replace._whole_words(len(names))
    found = {text for text, word in zip(texts, whole, strict=True) if word}
    assert {"café", "the", "a"} <= found
    assert not {"note", "–", "âĢĵ"} & found
