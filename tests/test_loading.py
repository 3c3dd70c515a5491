"""Checkpoints in the shapes that users have them in, and what starts from none."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simcse_jax.config import Config, DataConfig, ModelConfig
from simcse_jax.errors import InputError
from simcse_jax.inference.loading import load_model
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.model import read_encoder_config
from simcse_jax.model.build import build_model
from simcse_jax.pretrained.folders import locate, read_checkpoint
from simcse_jax.pretrained.pooling import Pooling
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params, to_tensors
from simcse_jax.training.prepare import prepare
from tests.conftest import SENTENCES, TINY_BERT, TINY_ROBERTA, full, write_model

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer RoBERTa."""
    return write_model(tmp_path_factory.mktemp("tiny") / "roberta", TINY_ROBERTA)


def variant(source: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a model with its weights and its configuration changed."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    settings = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path) -> Any:
    return load_params(read_checkpoint(folder))


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bit for bit, and of the same structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def without_head(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if not name.startswith("pooler.")}


# Weights of pretraining heads, as transformers names them.
BERT_HEADS = {
    "cls.predictions.bias": (120,),
    "cls.predictions.transform.dense.weight": (32, 32),
    "cls.predictions.transform.dense.bias": (32,),
    "cls.predictions.transform.LayerNorm.gamma": (32,),
    "cls.predictions.transform.LayerNorm.beta": (32,),
    "cls.predictions.decoder.weight": (120, 32),
    "cls.predictions.decoder.bias": (120,),
    "cls.seq_relationship.weight": (2, 32),
    "cls.seq_relationship.bias": (2,),
}
ROBERTA_HEADS = {
    "lm_head.bias": (120,),
    "lm_head.dense.weight": (32, 32),
    "lm_head.dense.bias": (32,),
    "lm_head.layer_norm.weight": (32,),
    "lm_head.layer_norm.bias": (32,),
    "lm_head.decoder.weight": (120, 32),
    "lm_head.decoder.bias": (120,),
}


@pytest.mark.parametrize(("architecture", "heads"), [("bert", BERT_HEADS), ("roberta", ROBERTA_HEADS)])
def test_pretraining_heads_and_prefix(
    tmp_path: Path, tiny_bert: Path, tiny_roberta: Path, architecture: str, heads: dict[str, tuple[int, ...]]
) -> None:
    source = {"bert": tiny_bert, "roberta": tiny_roberta}[architecture]

    def change(tensors: Tensors) -> Tensors:
        named = {f"{architecture}.{name}": x for name, x in tensors.items()}
        return named | {name: np.ones(shape, np.float32) for name, shape in heads.items()}

    assert_same(load(variant(source, tmp_path, change)), load(source))


def test_other_unknown_weights_are_named(tmp_path: Path, tiny_bert: Path) -> None:
    """A model with more in it, such as adapters, is not silently cut down."""
    folder = variant(tiny_bert, tmp_path, lambda t: t | {"encoder.layer.0.adapter.weight": np.ones(3, np.float32)})
    with pytest.raises(InputError, match=r"unexpected encoder\.layer\.0\.adapter\.weight"):
        load(folder)


def test_missing_and_misshapen_weights_are_named(tmp_path: Path, tiny_bert: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        del tensors["encoder.layer.1.output.dense.bias"]
        tensors["encoder.layer.2.intermediate.dense.weight"] = np.ones((47, 32), np.float32)
        return tensors

    with pytest.raises(InputError) as caught:
        load(variant(tiny_bert, tmp_path, change))
    assert "missing encoder.layer.1.output.dense.bias" in str(caught.value)
    assert "has shape [47, 32], config.json asks for [48, 32]" in str(caught.value)


def test_gamma_and_beta(tmp_path: Path, tiny_bert: Path) -> None:
    """The names of the first BERT releases."""

    def rename(name: str) -> str:
        return f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    folder = variant(tiny_bert, tmp_path, lambda t: {rename(name): x for name, x in t.items()})
    assert sum(name.endswith("gamma") for name in load_file(folder / "model.safetensors")) == 7
    assert_same(load(folder), load(tiny_bert))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_buffers_of_older_transformers(tmp_path: Path, tiny_bert: Path, prefix: str) -> None:
    def change(tensors: Tensors) -> Tensors:
        buffers = {f"embeddings.{name}": np.arange(40)[None] for name in ("position_ids", "token_type_ids")}
        return {prefix + name: x for name, x in (tensors | buffers).items()}

    assert_same(load(variant(tiny_bert, tmp_path, change)), load(tiny_bert))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_widened(tmp_path: Path, tiny_bert: Path, dtype: Any) -> None:
    folder = variant(tiny_bert, tmp_path, lambda t: {name: x.astype(dtype) for name, x in t.items()})
    params = load(folder)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_same(params, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), load(tiny_bert)))


def test_without_pooler(tmp_path: Path, tiny_bert: Path) -> None:
    folder = variant(tiny_bert, tmp_path, without_head)
    assert_same(load(folder), {"encoder": load(tiny_bert)["encoder"]})
    loaded = load_model(folder, "avg")
    assert np.any(np.asarray(loaded.params["head"]["dense"]["kernel"]))
    with pytest.raises(InputError, match=r"no weights pooler\.dense"):
        load_model(folder, "cls")


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_checkpoints_of_the_original_simcse_code(
    tmp_path: Path, tiny_bert: Path, tiny_roberta: Path, architecture: str
) -> None:
    """Their head is `mlp.dense`, beside the encoder and, with its MLM objective, the language model's head."""
    source = {"bert": tiny_bert, "roberta": tiny_roberta}[architecture]

    def change(tensors: Tensors) -> Tensors:
        heads = {name: np.ones(shape, np.float32) for name, shape in ROBERTA_HEADS.items()}
        named = {f"{architecture}.{name}": x for name, x in without_head(tensors).items()}
        return named | heads | {f"mlp.dense.{kind}": tensors[f"pooler.dense.{kind}"] for kind in ("weight", "bias")}

    assert_same(load(variant(source, tmp_path, change)), load(source))


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM", "RobertaForMaskedLM"])
def test_pretraining_models_of_transformers_in_shards(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch", reason="writes the checkpoint")
    import transformers

    bert = name.startswith("Bert")
    config = {k: v for k, v in (TINY_BERT if bert else TINY_ROBERTA).items() if k != "model_type"}
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, "BertConfig" if bert else "RobertaConfig")(**config))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    checkpoint = read_checkpoint(tmp_path)
    params = load_params(checkpoint)
    theirs = {k: v.numpy() for k, v in getattr(model, "bert" if bert else "roberta").state_dict().items()}
    assert ("head" in params) == ("pooler.dense.weight" in theirs) == (name == "BertForPreTraining")
    with_head = params if "head" in params else params | {"head": load_head_of_zeros()}
    for tensor, value in to_tensors(with_head, checkpoint.config).items():
        if tensor in theirs:
            np.testing.assert_array_equal(value, theirs[tensor], err_msg=tensor)
        else:
            assert tensor.startswith("pooler.")
    shards[1].unlink()
    with pytest.raises(InputError, match=f"{shards[1].name} is named by the weights' index but does not exist"):
        load_params(checkpoint)


def load_head_of_zeros() -> Any:
    return {"dense": {"kernel": np.zeros((32, 32), np.float32), "bias": np.zeros(32, np.float32)}}


def test_truncated_file(tmp_path: Path, tiny_bert: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or damaged"):
        load(tmp_path)


def as_pickle(source: Path, folder: Path) -> Tensors:
    """A copy of a model without weights, and its weights."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    return load_file(source / "model.safetensors")


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_pickles(tmp_path: Path, tiny_bert: Path, sharded: bool) -> None:
    torch = pytest.importorskip("torch", reason="reads these files")
    tensors = {f"bert.{name}": torch.tensor(x) for name, x in as_pickle(tiny_bert, tmp_path).items()}
    if sharded:
        names = sorted(tensors)
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        parts = {"pytorch_model.bin": sorted(tensors)}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, tmp_path / file)
    assert_same(load(tmp_path), load(tiny_bert))


class Payload:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_pickles_that_would_run_code_are_refused(tmp_path: Path, tiny_bert: Path, form: str) -> None:
    torch = pytest.importorskip("torch", reason="reads these files")
    tensors: dict[str, Any] = {name: torch.tensor(x) for name, x in as_pickle(tiny_bert, tmp_path / "model").items()}
    tensors["embeddings.position_ids"] = Payload(tmp_path / "executed")
    file = tmp_path / "model" / "pytorch_model.bin"
    if form == "torch":
        torch.save(tensors, file)
    else:
        file.write_bytes(pickle.dumps({"embeddings.position_ids": tensors["embeddings.position_ids"]}))
    with pytest.raises(InputError, match="cannot be read as weights"):
        load(tmp_path / "model")
    assert not (tmp_path / "executed").exists()
    if form == "pickle":  # the payload is live
        pickle.loads(file.read_bytes())
        assert (tmp_path / "executed").exists()


def test_pickles_need_torch(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_pickle(tiny_bert, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="torch is not installed"):
        load(tmp_path)


def test_no_weights(tmp_path: Path, tiny_bert: Path) -> None:
    as_pickle(tiny_bert, tmp_path)
    with pytest.raises(InputError, match=r"no weights: expected model\.safetensors"):
        load(tmp_path)


KINDS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


def sentence_transformer(source: Path, folder: Path, pooling: dict[str, Any], *more: str) -> Path:
    """A copy of a model with the files that sentence-transformers adds."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    kinds = ("Transformer", "Pooling", *more)
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def pooling_config(mode: str, style: str) -> dict[str, Any]:
    """1_Pooling/config.json: a switch a mode until release 5, then one word."""
    if style == "old":
        return {"word_embedding_dimension": 32, **{f"pooling_mode_{k}": k.startswith(mode + "_t") for k in KINDS}}
    return {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}


@pytest.mark.parametrize(("mode", "pooler"), [("mean", "avg"), ("cls", "cls_before_pooler")])
@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("normalize", [(), ("Normalize",)])
def test_sentence_transformers_folders(
    tmp_path: Path, tiny_bert: Path, mode: str, pooler: str, style: str, normalize: tuple[str, ...]
) -> None:
    folder = sentence_transformer(tiny_bert, tmp_path / "model", pooling_config(mode, style), *normalize)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.pooling == Pooling(pooler)
    assert checkpoint.max_length == 20
    # A length beyond the positions, here that of a tokenizer without one, is none.
    (folder / "sentence_bert_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    assert read_checkpoint(folder).max_length == TINY_BERT["max_position_embeddings"]


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize(("mode", "more"), [("max", ()), ("mean", ("LayerNorm",))])
def test_other_sentence_transformers_need_a_pooler(
    tmp_path: Path, tiny_bert: Path, mode: str, more: tuple[str, ...], style: str
) -> None:
    folder = sentence_transformer(tiny_bert, tmp_path / "model", pooling_config(mode, style), *more)
    with pytest.raises(InputError, match="give the pooler yourself"):
        load_model(folder)
    assert load_model(folder, "avg").model.pooler == "avg"


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_folders_that_sentence_transformers_writes(tmp_path: Path, tiny_bert: Path, mode: str) -> None:
    pytest.importorskip("torch", reason="sentence-transformers needs it")
    library = pytest.importorskip("sentence_transformers", reason="writes the folder")
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(str(tiny_bert), max_seq_length=20)
    peer = library.SentenceTransformer(
        modules=[transformer, modules.Pooling(transformer.get_embedding_dimension(), pooling_mode=mode)], device="cpu"
    )
    peer.save(str(tmp_path))
    assert read_checkpoint(tmp_path).max_length == 20
    ours = SimCSE(tmp_path).encode(SENTENCES, normalize=False)
    assert np.max(np.abs(ours - peer.encode(SENTENCES, show_progress_bar=False))) < 1e-5


def test_minilm_names_its_pooler(minilm: Path) -> None:
    loaded = load_model(minilm)
    assert (loaded.model.pooler, loaded.checkpoint.max_length) == ("avg", 256)


def test_a_plain_model_needs_a_pooler(tiny_bert: Path) -> None:
    assert read_checkpoint(tiny_bert).pooling is None
    with pytest.raises(InputError, match="give the pooler"):
        load_model(tiny_bert)


def test_no_such_folder() -> None:
    for path in ("./absent", "/absent/model", "~/absent", "a/b/c"):
        with pytest.raises(InputError, match="is not a folder"):
            locate(path)


_HUB = """
from simcse_jax.errors import InputError
from simcse_jax.pretrained import folders
try:
  {code}
except InputError as e:
  print(e)
"""


def hub(tmp_path: Path, code: str, **environment: str) -> tuple[str, float]:
    """Output of a process with a hub cache of its own, and its seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _HUB.format(code=code)],
        env={**os.environ, "HF_HOME": str(tmp_path / "hub"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), time.perf_counter() - start


@pytest.fixture
def silent_port() -> Any:
    """A port that takes connections and never answers, as a firewall that drops packets."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "offline mode"),
        # Nothing listens on the discard port.
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused"),
        # It waits for HUB_TIMEOUT, which is the limit to a fast test.
        full({"HF_ENDPOINT": "http://127.0.0.1:SILENT"}, "timed out"),
    ],
    ids=["offline", "refused", "silent"],
)
def test_hub_names_without_network(
    tmp_path: Path, silent_port: int, environment: dict[str, str], reason: str, tiny_bert: Path
) -> None:
    """A clear message in seconds; a model downloaded before is still found."""
    environment = {k: v.replace("SILENT", str(silent_port)) for k, v in environment.items()}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    locate = "folders.HUB_TIMEOUT = 1; print(folders.locate('someone/tiny-bert'))"
    message, seconds = hub(tmp_path, locate, **environment)
    assert "model 'someone/tiny-bert' is neither a local folder nor available from the hub" in message
    assert re.search(reason, message), message
    assert "check the name and the network" in message
    assert seconds < 30
    # The layout of the hub's cache.
    cached = tmp_path / "hub" / "hub" / "models--someone--tiny-bert"
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_bert, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert hub(tmp_path, locate, **environment)[0] == str(snapshot)


def settings_of(folder: Path, text_file: Path, tmp_path: Path, seed: int = 1, **model: Any) -> Config:
    return Config(
        output=str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"),
        seed=seed,
        batch_size=8,
        model=ModelConfig(path=str(folder), **model),
        data=DataConfig(train=str(text_file), max_length=16, cache=str(tmp_path / "cache")),
    )


@pytest.mark.usefixtures("two_devices")
def test_random_initialisation_needs_no_weights(tmp_path: Path, tiny_bert: Path, text_file: Path) -> None:
    as_pickle(tiny_bert, tmp_path / "model")
    config = settings_of(tmp_path / "model", text_file, tmp_path)
    with pytest.raises(InputError, match="has no weights"):
        prepare(config)
    assert not Path(config.output).exists()

    def drawn(seed: int) -> Any:
        initial = prepare(settings_of(tmp_path / "model", text_file, tmp_path, seed, random_init=True)).start.params()
        assert callable(initial)
        return jax.tree.map(np.asarray, jax.jit(initial)())

    params = drawn(1)
    assert jax.tree.structure(params) == jax.tree.structure(load(tiny_bert))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if x.ndim == 2:
            # Five deviations of the standard deviation of n normal draws.
            assert abs(x.std() / TINY_BERT["initializer_range"] - 1) < 5 / (2 * x.size) ** 0.5, path
        else:
            np.testing.assert_array_equal(x, 1.0 if path[-1].key == "scale" else 0.0)
    assert_same(drawn(1), params)
    assert np.all(drawn(2)["head"]["dense"]["kernel"] != params["head"]["dense"]["kernel"])


@pytest.mark.usefixtures("two_devices")
def test_the_head_is_fresh_or_the_checkpoints(tmp_path: Path, tiny_bert: Path, text_file: Path) -> None:
    stored = load(tiny_bert)

    def initial(folder: Path = tiny_bert, **model: Any) -> Any:
        return prepare(settings_of(folder, text_file, tmp_path, **model)).start.params()

    fresh = initial(pooler="cls")
    assert_same(fresh["encoder"], stored["encoder"])
    kernel = fresh["head"]["dense"]["kernel"]
    assert np.all(kernel != stored["head"]["dense"]["kernel"])
    assert abs(kernel.std() / TINY_BERT["initializer_range"] - 1) < 5 / (2 * kernel.size) ** 0.5
    assert not np.any(fresh["head"]["dense"]["bias"])
    assert_same(fresh["head"], jax.tree.map(np.asarray, jax.jit(initial(random_init=True))()["head"]))
    assert_same(initial(pooler="cls", head="checkpoint"), stored)
    # Not used, so not drawn anew either.
    assert_same(initial(pooler="avg"), stored)
    headless = variant(tiny_bert, tmp_path / "headless", without_head)
    with pytest.raises(InputError, match=r"model\.head is 'checkpoint' but .* has no weights pooler\.dense"):
        initial(headless, pooler="cls", head="checkpoint")


@pytest.mark.parametrize("probability", [None, 0.0, 0.25])
def test_dropout_override(probability: float | None) -> None:
    config = read_encoder_config(TINY_BERT | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3})
    used = build_model(config, ModelConfig(dropout=probability)).config
    expected = (0.1, 0.3) if probability is None else (probability, probability)
    assert (used.hidden_dropout_prob, used.attention_probs_dropout_prob) == expected


@pytest.mark.parametrize("named", [None, "own", "ownFast", "TokenizersBackend", "PreTrainedTokenizerFast", "other"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_tokenizers_are_those_of_transformers(kind: str, named: str | None, tmp_path: Path) -> None:
    import transformers

    own = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer"}
    other = own["roberta" if kind == "bert" else "bert"]
    special = {"bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]}.get(
        kind, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    letters = "abcdefghijklmnopqrstuvwxyz\u0120."
    words = [*special, *letters, *(f"##{letter}" for letter in letters), "ma", "man"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = {} if kind == "bert" else {"merges": [("m", "a"), ("ma", "n")]}
    getattr(transformers, own[kind])(vocab=vocabulary, **merges).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    file = tmp_path / "tokenizer_config.json"
    about = json.loads(file.read_text())
    about["tokenizer_class"] = {"own": own[kind], "ownFast": f"{own[kind]}Fast", "other": other}.get(named or "", named)
    file.write_text(json.dumps(about))

    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours(SENTENCES)["input_ids"] == theirs(SENTENCES)["input_ids"]
    assert len({tuple(tokens) for tokens in ours(SENTENCES)["input_ids"]}) > 3


def test_a_tokenizer_needs_no_torch(tiny_bert: Path) -> None:
    """Which transformers loads where it is installed, for as long as all else takes to start."""
    code = (
        "import sys; from simcse_jax.pretrained.tokenizers import load_tokenizer; "
        f"load_tokenizer({str(tiny_bert)!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("answers", [True, False])
def test_the_hub_is_asked_for_files_where_it_answers(
    tiny_bert: Path, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does not, the files are looked for on this machine alone."""
    import huggingface_hub

    def model_info(*given: Any, **options: Any) -> None:
        if not answers:
            raise ConnectionError("no network")

    asked = []

    def snapshot_download(name: str, local_files_only: bool, **options: Any) -> str:
        asked.append((name, local_files_only))
        return str(tiny_bert)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("someone/tiny-bert") == tiny_bert
    assert asked == [("someone/tiny-bert", not answers)]
