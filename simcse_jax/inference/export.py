"""One folder that transformers, sentence-transformers and this package read."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simcse_jax.errors import InputError, warn
from simcse_jax.inference.loading import LoadedModel, Step, load_model
from simcse_jax.postprocess import KEY, Affine, Dense, Flow, Modules, describe, tensors_of
from simcse_jax.pretrained.pooling import SETTINGS, Pooling, lower_cases
from simcse_jax.pretrained.prompts import ABOUT_FILE, read_about
from simcse_jax.pretrained.tokenizers import load_tokenizer, save_tokenizer
from simcse_jax.pretrained.weights import to_tensors
from simcse_jax.reports.paths import portable
from simcse_jax.reports.progress import note
from simcse_jax.reports.tables import formatted, metric_title
from simcse_jax.runs.folder import Run
from simcse_jax.runtime.provenance import provenance
from simcse_jax.storage.files import write_json, write_tensors
from simcse_jax.storage.manifest import digest, write_manifest
from simcse_jax.storage.objects import check_new_output, written_folder
from simcse_jax.storage.records import read_record

# The name of a flow in modules.json. No such class exists, so that sentence-transformers refuses the folder, with this
# name in its message, instead of giving the vectors from before the flow.
_NO_MODULE = "simcse_jax.only_simcse_jax_applies_this_flow"

# The hidden states hs[0..n] that sentence-transformers averages before it pools, where that is not hs[n] alone.
_LAYERS = {"avg_top2": (-2, -1), "avg_first_last": (1, -1), "avg_static_last": (0, -1), "avg_static": (0, 0)}


def export(model: LoadedModel | str | Path, output: str | Path, step: Step | None = None) -> str | Path:
    """Writes a model as a Hugging Face folder.

    The folder holds config.json (with our pooler settings), model.safetensors under Hugging Face's names (the head as
    `pooler.dense`), the tokenizer, the sentence-transformers modules that pool as the model does at evaluation, a model
    card, and a manifest with the digests of these. `export` writes it beside the target and renames it, so that it
    exists complete or not at all; on an object store, and in an empty folder that is there, config.json comes last,
    without which the folder is no model.

    A run that trained a masked language model and nothing else keeps its prediction head, under the names of
    `BertForMaskedLM` or `RobertaForMaskedLM`; `AutoModel` ignores it.

    Args:
      model: from `load_model`; or a run, a model folder or a name on the hub, which `load_model` then reads.
      output: a folder that does not exist yet, or is empty; also of an object store (gs://, s3://).
      step: the checkpoint of a run that is given by its path; by default the best, or the latest without dev scores.

    Returns:
      The absolute path of the folder, or its URL.

    Raises:
      InputError: the folder exists and is not empty, or cannot be written; or see `load_model`.
    """
    folder = check_new_output(output)
    if isinstance(model, LoadedModel) and step is not None:
        raise InputError(f"step {step} is given for a model that is loaded already: give it to load_model")
    loaded = model if isinstance(model, LoadedModel) else load_model(model, step=step)
    checkpoint, config = loaded.checkpoint, loaded.checkpoint.config
    params = jax.tree.map(np.asarray, loaded.params)
    tensors = to_tensors(params, config)
    with_head = tensors if loaded.mlm is None else to_tensors({**params, "mlm": loaded.mlm}, config)
    tokenizer = load_tokenizer(checkpoint.folder)
    with written_folder(folder) as partial:
        write_tensors(partial / "model.safetensors", with_head)
        save_tokenizer(tokenizer, partial)
        postprocessor = _write_modules(partial, loaded, tensors)
        write_json(partial / "config.json", _config(loaded, postprocessor))
        (partial / "README.md").write_text(model_card(loaded), "utf-8", "replace")  # names may not be UTF-8
        write_manifest(partial, _about(loaded))
    return folder


def _about(loaded: LoadedModel) -> dict[str, Any]:
    """What the manifest says of an export: what made it and, of a run, the step and what made that."""
    about: dict[str, Any] = {"made": provenance()}
    if loaded.run:
        about |= {"step": loaded.step, "parts": loaded.parts, "text": loaded.run.data_fingerprint}
        about["run"] = digest(loaded.run.folder / "run.json")
    return about


def _config(loaded: LoadedModel, postprocessor: str | None) -> dict[str, Any]:
    config: dict[str, Any] = portable(loaded.checkpoint.hf_config)  # older files name the folder they came from
    family = "Bert" if loaded.checkpoint.config.model_type == "bert" else "Roberta"
    config["architectures"] = [f"{family}Model" if loaded.mlm is None else f"{family}ForMaskedLM"]
    if loaded.mlm is not None:
        config["tie_word_embeddings"] = True  # the decoder is not stored
    config["dtype"] = str(np.dtype(loaded.model.param_dtype))
    config.pop("torch_dtype", None)  # the older spelling of dtype
    # Poolers over other layers than the last need the hidden states from sentence-transformers' Transformer module.
    if loaded.model.pooler in _LAYERS:
        config["output_hidden_states"] = True
    config[SETTINGS] = {"pooler": loaded.model.pooler, "mlp_only_train": loaded.model.mlp_only_train}
    if loaded.normalizes:
        config[SETTINGS]["normalize"] = True
    if loaded.postprocessor:
        config[SETTINGS][KEY] = {**loaded.postprocessor, "folder": postprocessor}
    return config


def _write_modules(folder: Path, loaded: LoadedModel, tensors: dict[str, np.ndarray]) -> str | None:
    """Writes the sentence-transformers side, modules.json and one folder per module.

    Returns:
      The place of a post-processor among the modules; None without one.
    """
    size, layers = loaded.model.config.hidden_size, loaded.model.config.num_hidden_layers
    pooler = loaded.pooler
    modules = [("", "sentence_transformers.models.Transformer")]

    def add(kind: str, config: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> None:
        path = folder / f"{len(modules)}_{kind}"
        path.mkdir()
        write_json(path / "config.json", config)
        if weights:
            write_tensors(path / "model.safetensors", weights)
        modules.append((path.name, f"sentence_transformers.models.{kind}"))

    if pooler in _LAYERS:
        states = [i % (layers + 1) for i in _LAYERS[pooler]]
        first = min(states)
        weights = np.zeros(layers + 1 - first, np.float32)
        weights[[i - first for i in states]] = 1
        add(
            "WeightedLayerPooling",
            {"word_embedding_dimension": size, "layer_start": first, "num_hidden_layers": layers},
            {"layer_weights": weights},
        )
    mode = "cls" if pooler.startswith("cls") else "mean"
    kinds = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "sqrt"}
    pooling = {"word_embedding_dimension": size, **{f"pooling_mode_{k}": v == mode for k, v in kinds.items()}}
    add("Pooling", pooling if loaded.checkpoint.prompts.pooled else pooling | {"include_prompt": False})
    if pooler == "cls":
        head = {"linear.weight": tensors["pooler.dense.weight"], "linear.bias": tensors["pooler.dense.bias"]}
        add("Dense", _dense(size, size, "activation.Tanh"), head)
    post = loaded.params.get(KEY)
    if isinstance(post, Affine):
        add("Dense", _dense(size, post.width, "linear.Identity"), tensors_of(post))
    elif isinstance(post, Modules):
        for layer in post.layers:
            if isinstance(layer, Dense):
                package = "linear" if layer.activation == "Identity" else "activation"
                before, after = layer.weight.shape
                add("Dense", _dense(before, after, f"{package}.{layer.activation}"), tensors_of(layer))
            else:
                add("Normalize", {})
    elif post is not None:
        (folder / KEY).mkdir()
        write_tensors(folder / KEY / "model.safetensors", tensors_of(post))
        modules.append((KEY, _NO_MODULE))
    place = None if post is None else modules[-1][0]
    if loaded.normalizes:
        add("Normalize", {})
    # Every release of sentence-transformers since 2 loads these names.
    write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)],
    )
    limit = loaded.checkpoint.max_length
    lower = lower_cases(loaded.checkpoint.folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": lower})
    write_json(folder / ABOUT_FILE, {"similarity_fn_name": "cosine", **read_about(loaded.checkpoint.root)})
    return place


def _dense(size: int, width: int, activation: str) -> dict[str, Any]:
    """The config of sentence-transformers' Dense."""
    activation = f"torch.nn.modules.{activation}"
    return {"in_features": size, "out_features": width, "bias": True, "activation_function": activation}


def model_card(loaded: LoadedModel) -> str:
    """The README.md of an exported model: its use, its training and its scores."""
    pooling = Pooling(loaded.model.pooler, loaded.model.mlp_only_train)
    only_ours = isinstance(loaded.params.get(KEY), Flow)
    library, name = ("simcse_jax", "SimCSE") if only_ours else ("sentence_transformers", "SentenceTransformer")
    label = library.replace("_", "-")
    lines = [
        "---",
        f"library_name: {label}",
        "pipeline_tag: sentence-similarity",
        f"tags: [{'' if only_ours else f'{label}, '}sentence-similarity, simcse, jax]",
        "---",
        "",
        "# Sentence encoder",
        "",
        f"Written by simcse_jax {version('simcse-jax')}. The sentence vector is pooler `{pooling.at_evaluation}`"
        + (" (the head was used in training only)." if pooling.at_evaluation != pooling.pooler else "."),
        "",
        *_postprocessor(loaded),
        "```python",
        f"from {library} import {name}",
        "",
        f'vectors = {name}("this folder").encode(["A man is playing a flute."])',
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
        about = read_record(loaded.run.folder / "run.json")
        lines += [
            "",
            "## Training",
            "",
            f"- starting point: `{portable(config.model.path)}`",
            f"- text: `{portable(config.data.train)}` (content {loaded.run.data_fingerprint})",
            f"- {loaded.origin}",
            "",
            "```json",
            json.dumps(portable(about), indent=2, ensure_ascii=False),
            "```",
            *_scores(_results(loaded.run)),
        ]
    return "\n".join(lines) + "\n"


def _postprocessor(loaded: LoadedModel) -> list[str]:
    if loaded.postprocessor is None:
        return []
    text = f"Post-processor: {describe(loaded.postprocessor)}."
    if isinstance(loaded.params[KEY], Flow):
        text += (
            " **Only simcse_jax applies this flow**: sentence-transformers refuses this folder, and what transformers "
            "loads from it is the encoder before the flow."
        )
    return [text, ""]


def _results(run: Run) -> dict[str, Any]:
    """The results of a run; {} where they are damaged or not there, which no weight depends on."""
    try:
        results = run.results()
    except InputError as error:
        warn(f"the model card has no scores: {error}")
        return {}
    if "step" not in results:
        note(f"the model card has no scores: {run.results_file} has none yet, since the run has not ended")
    return results


def _scores(results: dict[str, Any]) -> list[str]:
    lines = []
    if results.get("dev") is not None:
        metric = metric_title(results.get("metric", "spearman"))
        lines += ["", "## Scores", "", f"Dev, {metric} × 100: {results['dev']:.2f} (step {results['best_step']})."]
    if results.get("after"):
        metric, tasks = metric_title(results.get("test_metric", "spearman")), list(results["after"])
        names = [t if t == "Avg." else Path(t).stem for t in tasks]
        lines += ["", f"Test, {metric} × 100:", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(tasks)}"]
        for moment in ("before", "after"):
            if moment in results:
                lines.append(f"| {moment} | {' | '.join(formatted('{:.2f}', results[moment][t]) for t in tasks)} |")
    return lines
