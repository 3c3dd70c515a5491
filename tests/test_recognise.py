"""Models that others saved: whose vectors they give, against the libraries that wrote them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simcse_jax.errors import InputError
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.pooling import Pooling
from simcse_jax.pretrained.tokenizers import load_tokenizer
from tests.conftest import SENTENCES, TINY_ROBERTA, write_model

ODD = [
    "",
    " ",
    "🙂🙃 👩‍👩‍👧‍👦",
    "שלום עולם, זה משפט.",
    "هذا نص عربي من اليمين إلى اليسار",
    "long " * 2000,
    "x" * 10_000,
    "\u202eabc\u202c\tdef\n\nghi",
    " Leading and trailing blanks  ",
    "ＦＵＬＬ width, Ĉapitalo, İstanbul",
]


@pytest.mark.full
def test_minilm_equals_sentence_transformers(minilm: Path, real_data: Path) -> None:
    """1,000 real sentences, and texts of every odd kind."""
    library = pytest.importorskip("sentence_transformers", reason="the reference")
    lines = (real_data / "senteval" / "STS" / "STSBenchmark" / "sts-test.csv").read_text("utf-8").splitlines()
    sentences = list(dict.fromkeys(text for line in lines for text in line.split("\t")[5:7]))[: 1000 - len(ODD)] + ODD
    assert len(sentences) == 1000
    theirs = library.SentenceTransformer(str(minilm), device="cpu").encode(sentences, batch_size=100)
    ours = SimCSE(minilm).encode(sentences)
    assert np.max(np.abs(theirs - ours)) < 1e-5


@pytest.fixture(scope="module")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer RoBERTa."""
    return write_model(tmp_path_factory.mktemp("tiny") / "roberta", TINY_ROBERTA)


def st_modules(transformer: Any, mode: str, kinds: str) -> list[Any]:
    """Transformer, Pooling, and a module a letter: T, I, G a Dense with Tanh, Identity, GELU; N Normalize."""
    import torch
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    width = transformer.get_embedding_dimension()
    made = [transformer, modules.Pooling(width, pooling_mode=mode)]
    activations = {"T": torch.nn.Tanh(), "I": torch.nn.Identity(), "G": torch.nn.GELU()}
    for i, kind in enumerate(kinds):
        if kind == "N":
            made.append(modules.Normalize())
        else:
            made.append(modules.Dense(width, width - 5, bias=i % 2 == 0, activation_function=activations[kind]))
            width -= 5
    return made


@pytest.mark.parametrize(
    ("mode", "kinds", "lower"), [("cls", "T", False), ("mean", "IN", True), ("mean", "NGI", False), ("cls", "N", False)]
)
def test_folders_that_sentence_transformers_writes(
    tmp_path: Path, tiny_bert: Path, mode: str, kinds: str, lower: bool
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the reference")
    from sentence_transformers.sentence_transformer import modules

    source = tmp_path / "cased"
    shutil.copytree(tiny_bert, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    transformer = modules.Transformer(str(source), max_seq_length=20)
    library.SentenceTransformer(modules=st_modules(transformer, mode, kinds), device="cpu").save(str(tmp_path / "st"))
    if lower:
        file = tmp_path / "st" / "sentence_bert_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": True}))
    sentences = SENTENCES + ODD
    theirs = library.SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(sentences)
    ours = SimCSE(tmp_path / "st")
    assert ours.width == 32 - 5 * sum(kind != "N" for kind in kinds)
    assert np.max(np.abs(theirs - ours.encode(sentences, normalize=kinds.endswith("N")))) < 1e-5

    # Exported, both read it the same.
    folder = export(load_model(tmp_path / "st"), tmp_path / "export")
    again = library.SentenceTransformer(str(folder), device="cpu").encode(sentences, normalize_embeddings=True)
    assert np.max(np.abs(again - SimCSE(folder).encode(sentences))) < 1e-5
    unscaled = library.SentenceTransformer(str(folder), device="cpu").encode(sentences)
    assert np.max(np.abs(unscaled - theirs)) < 1e-5
    assert np.max(np.abs(ours.encode(sentences) - SimCSE(folder).encode(sentences))) < 1e-6

    # A pooler that is given stands for all after the encoder.
    assert load_model(tmp_path / "st", "avg").width == 32


def st_folder(source: Path, folder: Path, *kinds: str, **dense: Any) -> Path:
    """A sentence-transformers folder with mean pooling, written without it."""
    shutil.copytree(source, folder)
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(("Transformer", "Pooling", *kinds))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    for module in listed[2:]:
        (folder / module["path"]).mkdir()
        if module["type"].endswith("Dense"):
            config = {"in_features": 32, "out_features": 7, "activation_function": "torch.nn.modules.activation.Tanh"}
            (folder / module["path"] / "config.json").write_text(json.dumps(config | dense))
            rng = np.random.default_rng(0)
            weights = {"linear.weight": rng.normal(size=(7, 32)), "linear.bias": rng.normal(size=7)}
            weights = {name: x.astype(np.float32) for name, x in weights.items()}
            save_file(weights, folder / module["path"] / "model.safetensors")
    return folder


def test_dense_by_hand(tmp_path: Path, tiny_bert: Path) -> None:
    """Without the other library: tanh(x W^T + b), and early folders, whose encoder has one of its own."""
    folder = st_folder(tiny_bert, tmp_path / "st", "Dense", "Normalize")
    x = SimCSE(tiny_bert, "avg").encode(SENTENCES, normalize=False)
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    expected = np.tanh(x @ weights["linear.weight"].T + weights["linear.bias"])
    np.testing.assert_allclose(SimCSE(folder).encode(SENTENCES, normalize=False), expected, atol=1e-5)

    early = folder / "0_Transformer"
    early.mkdir()
    for file in [*folder.glob("*.txt"), *folder.glob("*.safetensors"), *folder.glob("*config.json")]:
        file.rename(early / file.name)
    (early / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = early.name
    (folder / "modules.json").write_text(json.dumps(listed))
    model = SimCSE(folder, max_length=40)
    np.testing.assert_allclose(model.encode(SENTENCES, normalize=False), expected, atol=1e-5)
    assert SimCSE(folder).max_length == 12


@pytest.mark.parametrize(
    ("kinds", "dense", "words"),
    [
        (("LayerNorm",), {}, ["LayerNorm", "supported are Transformer", "--pooler"]),
        (("Dense",), {"activation_function": "torch.nn.modules.activation.PReLU"}, ["PReLU", "--pooler"]),
        (("Dense",), {"activation_function": "mine.Tanh"}, ["mine.Tanh", "--pooler"]),
        (("Dense",), {"use_residual": True}, ["residual", "--pooler"]),
    ],
)
def test_what_is_not_read_is_said(
    tmp_path: Path, tiny_bert: Path, kinds: tuple[str, ...], dense: Any, words: list[str]
) -> None:
    folder = st_folder(tiny_bert, tmp_path / "st", *kinds, **dense)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert all(word in str(caught.value) for word in words), caught.value
    assert load_model(folder, "avg").width == 32


def test_a_dense_that_does_not_fit(tmp_path: Path, tiny_bert: Path) -> None:
    folder = st_folder(tiny_bert, tmp_path / "st", "Dense", "Dense")
    with pytest.raises(InputError, match=r"3_Dense holds weights of shape \[7, 32\].* expected \[D, 7\]"):
        load_model(folder)


@pytest.mark.parametrize("kinds", [("Normalize",), ("Dense", "Normalize", "Normalize")])
def test_a_trailing_normalize_is_exported(tmp_path: Path, tiny_bert: Path, kinds: tuple[str, ...]) -> None:
    """One of it, also by a re-export; not with a pooler that is given, nor where there was none."""

    def exported(name: str, source: Path, pooler: str | None = None) -> tuple[Path, list[str]]:
        folder = export(load_model(source, pooler), tmp_path / name)
        listed = json.loads((Path(folder) / "modules.json").read_text())
        return Path(folder), [module["type"].rsplit(".", 1)[-1] for module in listed[2:]]

    source = st_folder(tiny_bert, tmp_path / "st", *kinds)
    width = 7 if "Dense" in kinds else 32
    expected = SimCSE(source).encode(SENTENCES, normalize=False)
    assert expected.shape[1] == width
    once, modules = exported("once", source)
    twice, again = exported("twice", once)
    kept = list(dict.fromkeys(kinds))
    assert (modules, again) == (kept, kept)
    np.testing.assert_allclose(SimCSE(twice).encode(SENTENCES, normalize=False), expected, atol=1e-6)
    assert exported("pooler", source, "avg")[1] == []
    assert exported("plain", st_folder(tiny_bert, tmp_path / "without"))[1] == []


DAMAGED = {
    "a number as module": ("modules.json", [1], "is not a list of modules"),
    "no modules": ("modules.json", None, "is not a list of modules"),
    "a string of modules": ("modules.json", "abc", "is not a list of modules"),
    "a module without a path": ("modules.json", [{"type": "a.Transformer"}], "is not a list of modules"),
    "pooling": ("1_Pooling/config.json", [], "config.json holds a JSON list"),
    "encoder settings": ("sentence_bert_config.json", [], "sentence_bert_config.json holds a JSON list"),
    "a word as length": ("sentence_bert_config.json", {"max_seq_length": "x"}, "max_seq_length is 'x'; expected float"),
    "no end": (
        "sentence_bert_config.json",
        {"max_seq_length": float("inf")},
        "max_seq_length is inf; it must be a finite",
    ),
    "prompts": ("config_sentence_transformers.json", {"prompts": ["a"]}, "prompts is .* expected dict"),
    "no such prompt": ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "not among its prompts"),
    "a Dense": ("2_Dense/config.json", [], "config.json holds a JSON list"),
    "weights": ("model.safetensors.index.json", [], "holds a JSON list"),
    "no weights": ("model.safetensors.index.json", {}, "no weight_map"),
}


@pytest.mark.parametrize(("name", "content", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_modules(tmp_path: Path, tiny_bert: Path, name: str, content: Any, words: str) -> None:
    folder = st_folder(tiny_bert, tmp_path / "st", "Dense")
    (folder / name).write_text(json.dumps(content))
    if name == "model.safetensors.index.json":  # read where the weights are not in one file
        (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=words):
        load_model(folder)


@pytest.mark.parametrize(
    "settings", [[1], "avg", {"pooler": "avg"}, {"mlp_only_train": False}, {"pooler": 1, "mlp_only_train": False}]
)
def test_damaged_settings(tmp_path: Path, tiny_bert: Path, settings: Any) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"simcse_jax": settings}))
    with pytest.raises(InputError, match=r"config.json has 'simcse_jax': .*(lacks|expected)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("post", "words"),
    [("x", "the post-processor 'x'; expected an object"), ({"method": "flow"}, "lacks folder, sentences, width")],
)
def test_a_damaged_post_processor(tmp_path: Path, tiny_bert: Path, post: Any, words: str) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    settings = {"pooler": "avg", "mlp_only_train": False, "postprocess": post}
    (folder / "config.json").write_text(json.dumps(config | {"simcse_jax": settings}))
    with pytest.raises(InputError, match=words):
        load_model(folder)


def original(source: Path, folder: Path, architecture: str, **config: Any) -> Path:
    """A checkpoint as the authors' code trains it, or with `architecture` Model, as their script converts it."""
    shutil.copytree(source, folder)
    settings = json.loads((source / "config.json").read_text())
    family = settings["model_type"].capitalize()
    config = settings | {"architectures": [family + architecture]} | config
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    if architecture == "ForCL":
        tensors = {n.replace("pooler.", "mlp."): x for n, x in tensors.items()}
        tensors = {n if n.startswith("mlp") else f"{settings['model_type']}.{n}": x for n, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("architecture", ["ForCL", "Model"])
@pytest.mark.parametrize(
    ("place", "config", "pooler"),
    [
        ("unsup-simcse-bert-base-uncased", {}, "cls_before_pooler"),
        ("sup-simcse-roberta-large", {}, "cls"),
        ("my-unsup-simcse-bert-base-uncased", {}, "cls_before_pooler"),
        ("models--princeton-nlp--sup-simcse-bert-base-uncased/snapshots/0123", {}, "cls"),
        ("models--princeton-nlp--unsup-simcse-roberta-base/snapshots/0123", {}, "cls_before_pooler"),
        ("iscse-bert-base-constant-alpha-0.1", {}, "cls_before_pooler"),
        ("copy", {"_name_or_path": "princeton-nlp/sup-simcse-bert-base-uncased"}, "cls"),
        ("copy", {"_name_or_path": "result/my-unsup-simcse-bert-base-uncased"}, "cls_before_pooler"),
    ],
)
def test_the_authors_checkpoints(
    tmp_path: Path, tiny_bert: Path, architecture: str, place: str, config: Any, pooler: str
) -> None:
    folder = original(tiny_bert, tmp_path / place, architecture, **config)
    assert read_checkpoint(folder).pooling == Pooling("cls", pooler != "cls")
    assert load_model(folder).pooler == pooler


def test_the_authors_checkpoints_give_their_vectors(tmp_path: Path, tiny_roberta: Path) -> None:
    """Supervised with the head, unsupervised without; of a name that does not tell, asked for."""
    torch = pytest.importorskip("torch", reason="the reference")
    import transformers

    peer = transformers.AutoModel.from_pretrained(tiny_roberta).eval()
    tokens = load_tokenizer(tiny_roberta)(SENTENCES, padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        out = peer(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    expected = {"sup": out.pooler_output.numpy(), "unsup": out.last_hidden_state[:, 0].numpy()}
    for kind, vectors in expected.items():
        for architecture in ("ForCL", "Model"):
            folder = original(tiny_roberta, tmp_path / architecture / f"{kind}-simcse-roberta-base", architecture)
            ours = SimCSE(folder).encode(SENTENCES, normalize=False)
            np.testing.assert_allclose(ours, vectors, atol=1e-5)


def test_an_original_checkpoint_without_a_name(tmp_path: Path, tiny_bert: Path) -> None:
    folder = original(tiny_bert, tmp_path / "checkpoint-125", "ForCL")
    with pytest.raises(InputError, match=r"original SimCSE code.*--pooler cls_before_pooler.*--pooler cls"):
        load_model(folder)
    assert load_model(folder, "cls").pooler == "cls"
    # Converted, it is like any BERT.
    with pytest.raises(InputError, match="does not say how its sentence vectors are pooled"):
        load_model(original(tiny_bert, tmp_path / "converted", "Model"))
    # Fine-tuned to something else from theirs, it is not theirs.
    name = {"_name_or_path": "princeton-nlp/sup-simcse-bert-base-uncased"}
    other = original(tiny_bert, tmp_path / "other", "ForMaskedLM", **name)
    assert read_checkpoint(other).pooling is None
