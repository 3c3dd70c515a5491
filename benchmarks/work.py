"""The work that contenders share: models, text, batches, and the FLOPs that they ask for."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from simcse_jax.config import DataConfig, ModelConfig
from simcse_jax.data.corpus import open_corpus, read_sentences
from simcse_jax.data.demo import demo_sentences, minilm_folder
from simcse_jax.data.order import EpochOrder
from simcse_jax.data.table import TokenTable
from simcse_jax.data.tokens import tokenize_corpus
from simcse_jax.errors import InputError
from simcse_jax.evaluation.sentences import unlabelled_sentences
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import LoadedModel
from simcse_jax.model import EncoderConfig
from simcse_jax.model.build import build_model, init_params
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer, save_tokenizer

Lengths = Literal["padded", "wiki", "sts"]
DTYPES = Literal["float32", "bfloat16"]
SEED = 42
PROGRAMS = "BENCHMARK_PROGRAMS"
"""Environment variable with the folder of our compiled programs; if unset, they are not kept."""
BATCHES = 8
"""Number of different batches that a training loop here repeats."""


@dataclass(frozen=True)
class Size:
    """The size of a random BERT; BERT-base by default."""

    layers: int = 12
    width: int = 768
    """Width of the hidden states: a multiple of 64, the width of a head."""


QUICK = Size(layers=2, width=128)


def bert_folder(size: Size, folder: Path) -> Path:
    """A random BERT with MiniLM's tokenizer, written by our export so that every library reads the same weights.

    Args:
      size: its shape.
      folder: folder to make it in.

    Raises:
      InputError: MiniLM's tokenizer is not installed.
    """
    target = folder / f"bert-{size.layers}-{size.width}"
    if target.is_dir():
        return target
    source = folder / f"{target.name}-config"
    source.mkdir(parents=True)
    tokenizer = load_tokenizer(minilm_folder())
    save_tokenizer(tokenizer, source)
    config = {
        "model_type": "bert",
        "vocab_size": len(tokenizer),
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 64,
        "intermediate_size": 4 * size.width,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        # With the usual 0.02 all vectors point one way, and rounding errors are part of the compared gradients.
        "initializer_range": 0.05,
    }
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(source)
    model = build_model(checkpoint.config, ModelConfig(pooler="cls"))
    params = jax.jit(lambda: init_params(model, SEED))()
    export(LoadedModel(model, params, checkpoint, None, None), target)
    return target


def data_root() -> Path:
    """The folder of real text.

    Raises:
      InputError: SIMCSE_DATA is not set.
    """
    if "SIMCSE_DATA" not in os.environ:
        raise InputError("SIMCSE_DATA is not set: set it to the folder with the real text, see docs/data.md")
    return Path(os.environ["SIMCSE_DATA"])


def real_sentences(count: int) -> list[str]:
    """Sentences of the seven STS tasks, drawn at random; without SIMCSE_DATA, of Python's documentation."""
    sts = "SIMCSE_DATA" in os.environ
    sentences = unlabelled_sentences("sts", data_root() / "senteval") if sts else demo_sentences()
    chosen = np.random.default_rng(SEED).permutation(len(sentences))[:count]
    return [sentences[i] for i in chosen]


def training_text(lengths: Lengths, count: int, length: int, folder: Path) -> Path:
    """Writes a file of sentences, one per line.

    Args:
      lengths: `padded`: made-up sentences of at least `length` tokens; `wiki`, `sts`: real sentences as they are.
      count: number of sentences.
      length: number of tokens.
      folder: folder to write the file to.
    """
    if lengths == "wiki":
        sentences = read_sentences(data_root() / "wiki" / "wiki_en_1m.txt.gz", count)
    elif lengths == "sts":
        data_root()
        sentences = real_sentences(count)
    else:
        vocabulary = load_tokenizer(minilm_folder()).get_vocab()
        words = sorted(word for word in vocabulary if word.isascii() and word.isalpha())
        drawn = np.random.default_rng(SEED).choice(len(words), (count, length))  # a million words are slow as an array
        sentences = [" ".join(words[i] for i in row.tolist()) for row in drawn]
    file = folder / f"{lengths}-{count}-{length}.txt"
    file.write_text("\n".join(sentences) + "\n", "utf-8")
    return file


def token_table(model: Path, text: Path, length: int, cache: Path) -> TokenTable:
    """Tokenises the text into the cache where our run will find it."""
    corpus = open_corpus(DataConfig(train=str(text)))
    return tokenize_corpus(corpus, load_tokenizer(model), length, cache, progress=False)


def peer_batches(table: TokenTable, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and lengths of the batches of our run, in its order, each cut to its longest sentence as peers do."""
    order = EpochOrder(len(table), batch_size, SEED)
    batches = []
    for step in range(order.steps_per_epoch):
        ids, lengths = table.rows(np.asarray(order.examples(step)))
        batches.append((ids[:, 0, : lengths.max()], lengths[:, 0]))
    return batches


def forward_flops(config: EncoderConfig, lengths: Any) -> float:
    """Multiplications and additions of all matrix products that encode sentences: 8H² + 4HF per token and layer, and 4H
    per pair of a sentence's tokens. Training takes three times as many.

    Only real tokens count, and nothing counts twice, so that the figure measures the work and not the way it is done.

    Args:
      config: the encoder's shape.
      lengths: tokens of each sentence.
    """
    h, n = config.hidden_size, np.asarray(lengths, np.float64)
    layer = n.sum() * (8 * h**2 + 4 * h * config.intermediate_size) + 4 * h * (n**2).sum()
    return float(config.num_hidden_layers * layer)
