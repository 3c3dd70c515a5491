"""Valid inputs of every target, from which fuzzing starts."""

import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from simcse_jax.config import Config, DataConfig, EvaluationConfig
from simcse_jax.config.values import to_dict
from simcse_jax.storage.manifest import digest
from tests.fuzz.targets import PARTS

_BERT = {
    **{"model_type": "bert", "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"intermediate_size": 48, "hidden_act": "gelu", "max_position_embeddings": 40, "type_vocab_size": 2},
    **{"pad_token_id": 0, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}
_SENTENCES = ["a man plays a flute", "someone plays an instrument", "the market fell, again", "naïve 東京 🙂"]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _npy(array: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), **how)
    return file.getvalue()


def _table(*rows: tuple[Any, ...], delimiter: str = "\t") -> bytes:
    return "\n".join(delimiter.join(map(str, row)) for row in rows).encode() + b"\n"


def _lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(_json(row) + b"\n" for row in rows)


def _tensors(**arrays: Any) -> bytes:
    from safetensors.numpy import save

    return save({name.replace("__", "."): np.asarray(x) for name, x in arrays.items()})


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.table({"sentence": _SENTENCES, "label": ["1", "0", "1", None]})
    pyarrow.parquet.write_table(table, file, compression="snappy")
    return file.getvalue()


def _text() -> list[bytes]:
    return ["\n".join(_SENTENCES).encode(), b"a\r\nb\n\nc\n"]


def _tables(delimiter: str) -> list[bytes]:
    rows = [("sentence", "positive", "label"), *((s, s[::-1], n % 2) for n, s in enumerate(_SENTENCES[:2]))]
    quoted = "sentence,label\n" + "".join(f'"{s}, ""b""",1\n' for s in _SENTENCES)
    return [_table(*rows, delimiter=delimiter), _table(*rows, delimiter=";"), quoted.encode()]


def _jsonl() -> list[bytes]:
    rows = [{"sentence": s, "label": "1", "id": n} for n, s in enumerate(_SENTENCES)]
    return [_lines(*rows), _lines({"sentence": "a", "negative": None}, {"sentence": "b", "meta": {"a": [1]}})]


def _ways(seeds: list[bytes], ways: str) -> list[bytes]:
    """Each input with each of the first bytes that choose settings."""
    return [way.encode("latin-1") + seed for way in ways for seed in seeds]


def _pairs(names: tuple[str, ...], *rows: tuple[Any, ...]) -> list[bytes]:
    """A table as .tsv, .csv and .jsonl."""
    objects = _lines(*(dict(zip(names, row, strict=True)) for row in rows))
    return [b"0" + _table(names, *rows), b"1" + _table(names, *rows, delimiter=","), b"2" + objects]


def _run_json() -> bytes:
    config = Config(output="a", data=DataConfig(train="a.txt"), evaluation=EvaluationConfig(dev="a.tsv"))
    return _json({"config": to_dict(config), "data_fingerprint": "abc", "contents": {"model.path": "def"}})


def _results() -> list[bytes]:
    scores = {"STSBenchmark": 70.5, "Avg.": 70.5}
    ended = {"step": 8, "best_step": 4, "dev": 80.0, "metric": "spearman", "test_metric": "spearman", "after": scores}
    return [
        _json({"before": scores}),
        _json({"before": scores | {"Avg.": None}, **ended}),
        _json({**ended, "memory": 9}),
    ]


def _metrics() -> list[bytes]:
    figures = {"loss": 1.5, "alignment": 0.5, "uniformity": -2.0, "sentences_per_second": 9.0}
    dev = {"dev": 70.0, "dev_alignment": 0.3, "dev_uniformity": -1.0}
    return [_lines(*({"step": n, **(dev if n % 4 == 0 else figures)} for n in range(9))), b'{"step": 3, "loss": nu']


def _array(kind: Any = np.float32) -> list[bytes]:
    two = np.eye(2, 3, dtype=kind)
    later = [_npy(two, version=(v, 0)) for v in (2, 3)]
    return [
        _npy(two),
        _npy(two.T),
        _npy(np.zeros((0, 3), kind)),
        *later,
        _npy(np.array([{}], object), allow_pickle=True),
    ]


def _index() -> list[bytes]:
    about = {"format": 1, "sentences": 2, "width": 3, "backend": "jax", "about": {"model": "m"}}
    sentences = _json("a man") + b"\n" + _json(" ") + b"\n"
    return [
        PARTS.join([_json(about | extra), sentences, _npy(np.eye(2, 3, dtype=np.float32))])
        for extra in ({}, {"about": {}})
    ]


def _manifest(**files: bytes) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        entries = {}
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
            entries[name.replace("__", ".")] = [len(content), digest(Path(folder) / name)]
    return _json({"about": {"step": 5, "best_step": 4, "best_score": 70.0, "stale": 1}, "files": entries, "seal": ""})


def _progress() -> list[bytes]:
    progress = {"best_step": 4, "best_score": 70.0, "stale": 1}
    plain = {"custom_metadata": progress, "init_timestamp_nsecs": 1}
    return [_json(plain), PARTS.join([_json(plain | {"custom_metadata": progress | {"manifest": True}}), _manifest()])]


def _token_table() -> list[bytes]:
    about = {
        "dtype": "uint16",
        "columns": 1,
        "pad_id": 0,
        "max_length": 12,
        "missing": 0,
        "skipped": 0,
        "source": "a",
        "origin": ["a"],
    }
    offsets, ids = np.array([0, 3, 7, 9], np.int64), np.array([2, 5, 3, 2, 6, 7, 3, 2, 3], np.uint16)

    def table(change: dict[str, int], blocks: list[list[int]], missing: list[int]) -> bytes:
        arrays = np.array(blocks), offsets, ids, np.array(missing, np.int64)
        return PARTS.join([_json(about | change), *(array.tobytes() for array in arrays)])

    return [
        table({}, [[0, 1, 3], [0, 2, 6]], []),
        table({"columns": 3}, [[0, 1, 9]], []),
        table({"columns": 3, "missing": 1}, [[0, 1, 9]], [2]),
    ]


def _postprocessor() -> list[bytes]:
    width, steps = 4, 2
    linear = _tensors(linear__weight=np.eye(2, 4, dtype=np.float32), linear__bias=np.zeros(2, np.float32))
    shapes = {
        "bias": (width,),
        "scale": (width,),
        "lower": (width, width),
        "upper": (width, width),
        "diagonal": (width,),
    }
    shapes |= {"w0": (2, 3), "b0": (3,), "w1": (3, 3), "b1": (3,), "w2": (3, 4), "b2": (4,)}
    flow = {name: np.zeros((steps, *shape), np.float32) for name, shape in shapes.items()}
    flow |= {
        "fixed.permutation": np.tile(np.arange(4, dtype=np.int32), (2, 1)),
        "fixed.sign": np.ones((2, 4), np.float32),
    }
    about = {"method": "whitening", "width": 2, "sentences": 100, "source": "a.txt"}
    return [
        PARTS.join([_json(about), linear]),
        PARTS.join([_json(about | {"method": "flow", "width": 4}), _tensors(**flow)]),
        PARTS.join([_json(about | {"method": "all-but-the-top", "components": 1}), linear]),
    ]


def _model_folder() -> list[bytes]:
    ours = _BERT | {"simcse_jax": {"pooler": "cls", "mlp_only_train": True, "max_length": 32, "normalize": True}}
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    modules = [{"idx": n, "type": f"sentence_transformers.models.{k}", "path": p} for n, (k, p) in enumerate(kinds)]
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "include_prompt": True}
    about = {
        "prompts": {"query": "query: ", "none": None},
        "default_prompt_name": "query",
        "similarity_fn_name": "cosine",
    }
    dense = {
        "in_features": 32,
        "out_features": 2,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    bert = {"max_seq_length": 24, "do_lower_case": False}
    tensors = _tensors(linear__weight=np.ones((2, 32), np.float32), linear__bias=np.zeros(2, np.float32))
    original = _BERT | {"architectures": ["BertForCL"], "_name_or_path": "x/unsup-simcse-bert"}
    parts = [_BERT, modules, pooling, about, bert, dense]
    return [
        _json(ours),
        _json(original),
        _json(_BERT | {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 42}),
        PARTS.join([*map(_json, parts), tensors, _json({"model_max_length": 512})]),
        PARTS.join([_json(ours | {"simcse_jax": {**ours["simcse_jax"], "postprocess": {"method": "flow"}}})]),
    ]


def _weights() -> list[bytes]:
    tensors = _tensors(a=np.ones((2, 3), np.float32), b=np.zeros(2, np.float16))
    return [PARTS + tensors, PARTS.join([_json({"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}), tensors])]


def _tokenizer() -> list[bytes]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "##s"])}
    rules = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    rules.normalizer, rules.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    rules.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    about = _json({"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "model_max_length": 24})
    return [PARTS.join([rules.to_str().encode(), about]), PARTS.join(["\n".join(words).encode(), about])]


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "text": lambda: _ways(_text(), " @`"),
    "packed_text": lambda: [gzip.compress(seed, mtime=0) for seed in _text()],
    "csv": lambda: _ways(_tables(","), " !$(0@p"),
    "tsv": lambda: _ways(_tables("\t"), " $(@"),
    "jsonl": lambda: _ways(_jsonl(), " (0@"),
    "parquet": lambda: [b" " + _parquet(), b"(" + _parquet()],
    "pairs": lambda: _pairs(("sentence1", "sentence2", "score"), ("a man", "a dog", 3.5), ("cats", "dogs", 1)),
    "retrieval": lambda: _pairs(("question", "answer"), ("who runs", "a man runs"), ("what is it", "a red house")),
    "nli": lambda: _pairs(
        ("premise", "hypothesis", "label"), *(("a man", h, label) for h, label in zip("abc", (0, 1, 2), strict=True))
    ),
    "sts": lambda: [
        b"1" + _table(("a", "b", "c", "d", "3.5", "one man", "two men"), ("a", "b", "c", "d", "1", "x", "y")),
        b"3" + _table(("id", "A", "B", "score", "label"), ("1", "one man", "two men", "3.5", "NEUTRAL")),
        b"5" + PARTS.join([_table(("one man", "two men"), ("x", "y")), b"3.5\n\n"]),
    ],
    "transfer": lambda: [
        b"\x00" + PARTS.join([b"good\n" * 8, b"bad\n" * 8]),
        b"\x01" + _table(*[("a film", n % 2) for n in range(8)]),
        b"\x02" + b"".join(f"{k}:x what is it\n".encode() for k in ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")) * 6,
        b"\x03" + _table(("Quality", "id", "id", "1", "2"), *[(n % 2, "1", "2", "a man", "a dog") for n in range(12)]),
        b"\x04"
        + _table(
            ("n", "a", "b", "s", "l"), *[("1", "a", "b", "3", k) for k in ("NEUTRAL", "ENTAILMENT", "CONTRADICTION")]
        ),
    ],
    "results": _results,
    "metrics": _metrics,
    "run": lambda: [_run_json()],
    "study": lambda: [
        _json({"study": {"output": "a", "seeds": [1], "base": {}}, "data_fingerprint": "a", "contents": {}})
    ],
    "manifest": lambda: [
        PARTS.join([_manifest(a__bin=b"abc"), b"abc"]),
        PARTS.join([_manifest(a__bin=b"abc"), b"abd "]),
    ],
    "progress": _progress,
    "stored_run": lambda: [_json({"owner": "a", "files": {"run.json": [3, 1], "checkpoints/1/a": [4, 2]}})],
    "tokens": _token_table,
    "index": _index,
    "array": _array,
    "postprocessor": _postprocessor,
    "model_folder": _model_folder,
    "weights": _weights,
    "tokenizer": _tokenizer,
    "synonyms": lambda: [b"man\tperson\tguy\ndog\tcat\n"],
    "options": lambda: [
        b"train\nquickstart\n--data.columns\na\nb\n--batch-size\n16",
        b"evaluate\nmodel\n--tasks\nsts\n--pooler\navg",
        b"search\nmodel\ntext.txt\n--top-k\n3",
        b"train\nquickstart\n--data.where\nlabel\n1\n--optimizer.learning-rate\n1e-5\n--evaluation.test\nsts",
        b"serve\nmodel\n--port\n80",
    ],
    "request": lambda: [
        b"0" + _json({"query": "a man", "top_k": 3, "threshold": 0.5}),
        b"1" + _json({"sentences": _SENTENCES, "normalize": False}),
        b"2" + _json({"a": "a", "b": ["b", "c"]}),
        b"3" + _json({"sentences": ["a", "b", "c"]}),
    ],
}
