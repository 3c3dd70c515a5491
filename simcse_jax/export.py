"""One folder that transformers, sentence-transformers and this package read."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from simcse_jax import __version__, hf
from simcse_jax.embedder import LoadedModel
from simcse_jax.errors import InputError
from simcse_jax.evaluation.sts import STS_TASKS
from simcse_jax.files import new_folder, write_json

# Layers that sentence-transformers averages before it pools, for the poolers that look at two of n + 1 hidden states.
_FIRST_LAYER = {"avg_static_last": 0, "avg_first_last": 1}


def export(loaded: LoadedModel, output: str | Path) -> Path:
    """Writes a model as a Hugging Face folder.

    The folder holds config.json (with our pooler settings), model.safetensors under Hugging Face's names (the head as
    `pooler.dense`), the tokenizer, the sentence-transformers modules that pool as the model does at evaluation, and a
    model card. It is written beside the target and renamed, so it is there complete or not at all.

    A run that trained a masked language model and nothing else is written with its head, under the names of
    `BertForMaskedLM` or `RobertaForMaskedLM`; `AutoModel` ignores it.

    Args:
      loaded: from `load_model`.
      output: a folder that does not exist yet, or is empty.

    Raises:
      InputError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(output).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {folder} exists and is not an empty folder: choose another, or remove it")
    checkpoint, config = loaded.checkpoint, loaded.checkpoint.config
    params = loaded.params if loaded.mlm is None else {**loaded.params, "mlm": loaded.mlm}
    tensors = hf.to_tensors(jax.tree.map(np.asarray, params), config)
    tokenizer = hf.load_tokenizer(checkpoint.folder)
    with new_folder(folder) as partial:
        _write_weights(partial / "model.safetensors", tensors)
        write_json(partial / "config.json", _config(loaded))
        hf.save_tokenizer(tokenizer, partial)
        _write_modules(partial, loaded)
        (partial / "README.md").write_text(model_card(loaded), "utf-8")
    return folder


def _write_weights(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    # Not `save_file`, whose files since safetensors 0.8 only their owner can read.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _config(loaded: LoadedModel) -> dict[str, Any]:
    config = dict(loaded.checkpoint.hf_config)
    family = "Bert" if loaded.checkpoint.config.model_type == "bert" else "Roberta"
    config["architectures"] = [f"{family}Model" if loaded.mlm is None else f"{family}ForMaskedLM"]
    if loaded.mlm is not None:
        config["tie_word_embeddings"] = True  # the decoder is not stored
    config["dtype"] = str(np.dtype(loaded.model.param_dtype))
    config.pop("torch_dtype", None)  # the older spelling of dtype
    # Poolers over several layers need the hidden states from sentence-transformers' Transformer module.
    if loaded.model.pooler in ("avg_top2", *_FIRST_LAYER):
        config["output_hidden_states"] = True
    config[hf.SETTINGS] = {"pooler": loaded.model.pooler, "mlp_only_train": loaded.model.mlp_only_train}
    return config


def _write_modules(folder: Path, loaded: LoadedModel) -> None:
    """The sentence-transformers side: modules.json and one folder a module."""
    size, layers = loaded.model.config.hidden_size, loaded.model.config.num_hidden_layers
    pooler = hf.Pooling(loaded.model.pooler, loaded.model.mlp_only_train).at_evaluation
    modules = [("", "Transformer")]

    def add(kind: str, config: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> None:
        path = folder / f"{len(modules)}_{kind}"
        path.mkdir()
        write_json(path / "config.json", config)
        if weights:
            _write_weights(path / "model.safetensors", weights)
        modules.append((path.name, kind))

    if pooler == "avg_top2" or pooler in _FIRST_LAYER:
        first = _FIRST_LAYER.get(pooler, layers - 1)
        weights = np.zeros(layers + 1 - first, np.float32)
        weights[[0, -1]] += 1
        add(
            "WeightedLayerPooling",
            {"word_embedding_dimension": size, "layer_start": first, "num_hidden_layers": layers},
            {"layer_weights": weights},
        )
    mode = "cls" if pooler.startswith("cls") else "mean"
    kinds = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "sqrt"}
    add(
        "Pooling",
        {"word_embedding_dimension": size, **{f"pooling_mode_{k}": v == mode for k, v in kinds.items()}},
    )
    if pooler == "cls":
        head = jax.tree.map(np.asarray, loaded.params["head"]["dense"])
        add(
            "Dense",
            {
                "in_features": size,
                "out_features": size,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            },
            {"linear.weight": np.ascontiguousarray(head["kernel"].T), "linear.bias": head["bias"]},
        )
    # The names that every release of sentence-transformers since 2 loads.
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    limit = loaded.checkpoint.max_length or loaded.model.config.max_length
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


def model_card(loaded: LoadedModel) -> str:
    """The README.md of an exported model: how to use it, what it was trained on and how, and its scores."""
    pooling = hf.Pooling(loaded.model.pooler, loaded.model.mlp_only_train)
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [sentence-transformers, sentence-similarity, simcse, jax]",
        "---",
        "",
        "# Sentence encoder",
        "",
        f"Written by simcse_jax {__version__}. The sentence vector is pooler `{pooling.at_evaluation}`"
        + (" (the head was used in training only)." if pooling.at_evaluation != pooling.pooler else "."),
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'vectors = SentenceTransformer("this folder").encode(["A man is playing a flute."])',
        "```",
    ]
    if loaded.mlm is not None:
        lines += [
            "",
            "It was trained as a masked language model alone and is a starting point, not a sentence encoder yet; the",
            "prediction head is in the weights (`transformers.AutoModelForMaskedLM`).",
        ]
    if loaded.run:
        config = loaded.run.config
        lines += [
            "",
            "## Training",
            "",
            f"- starting point: `{config.model.path}`",
            f"- text: `{config.data.train}` (content {loaded.run.data_fingerprint})",
            f"- parameters of step {loaded.step}",
            "",
            "```json",
            (loaded.run.folder / "run.json").read_text("utf-8").strip(),
            "```",
            *_scores(loaded.run.results()),
        ]
    return "\n".join(lines) + "\n"


def _scores(results: dict[str, Any]) -> list[str]:
    lines = []
    if results.get("dev") is not None:
        lines += ["", "## Scores", "", f"Dev, Spearman × 100: {results['dev']:.2f} (step {results['best_step']})."]
    if results.get("after"):
        tasks = list(results["after"])
        names = [t if t in (*STS_TASKS, "Avg.") else Path(t).stem for t in tasks]
        lines += ["", "Test, Spearman × 100:", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(tasks)}"]
        for moment in ("before", "after"):
            if moment in results:
                lines.append(f"| {moment} | {' | '.join(f'{results[moment][t]:.2f}' for t in tasks)} |")
    return lines
