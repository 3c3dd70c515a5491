"""Whitening, all-but-the-top and BERT-flow on the same vectors: the seven STS tasks, encoder by encoder.

    SIMCSE_DATA=... python benchmarks/postprocess.py --cache .cache/vectors

One pass over the text gives the vectors of all encoders, which are the poolers of one model: its last layer's mean
(`avg`) and [CLS] (`cls_before_pooler`), `avg_first_last`, the mean of its first layer (`first_layer`) and of its word
embeddings (`avg_static`). Each post-processor is fitted to the sentences of the task that is scored, without its gold
scores (`target`: train, dev and test split, as in the papers), or to the first lines of Wikipedia (`wiki`).
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simcse_jax.data.corpus import read_sentences
from simcse_jax.data.demo import minilm_folder
from simcse_jax.evaluation.geometry import average_cosine
from simcse_jax.evaluation.sentences import unlabelled_sentences
from simcse_jax.evaluation.sts import STS_TASKS, evaluate, load_task
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.inference.loading import load_model
from simcse_jax.model import Encoder, EncoderConfig, pool
from simcse_jax.postprocess import FitSettings, FlowSettings, fit
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.runtime.mesh import make_mesh

ENCODERS = ("avg", "cls_before_pooler", "avg_first_last", "first_layer", "avg_static")
METHODS = {
    **{f"whitening {dim}": FitSettings("whitening", dim=dim) for dim in (64, 128, 256)},
    "whitening all": FitSettings("whitening"),
    **{f"all-but-the-top {d}": FitSettings("all-but-the-top", components=d) for d in (1, 4)},
    "flow": FitSettings("flow"),
}


class Poolers:
    """A model that gives the vectors of several encoders, one after the other, and skips layers that none needs."""

    def __init__(self, config: EncoderConfig, names: list[str]) -> None:
        self.config, self.names = config, names

    def apply(self, variables: Any, ids: Any, lengths: Any) -> Any:
        states: Any = Encoder(self.config).apply({"params": variables["params"]["encoder"]}, ids, lengths)
        first = {"first_layer": pool(states[:2], lengths, "avg")}
        return jnp.concatenate([first[n] if n in first else pool(states, lengths, n) for n in self.names], axis=2)


def vectors_of(sentences: list[str], names: list[str], cache: Path, stem: str, model: str) -> dict[str, np.ndarray]:
    """Vectors by encoder, kept in the cache; Wikipedia's sentences are cut to 64 tokens."""
    files = {name: cache / f"{stem}-{name}.npy" for name in names}
    if missing := [name for name in names if not files[name].is_file()]:
        loaded = load_model(model, "avg")
        tokenizer = load_tokenizer(loaded.checkpoint.folder)
        poolers: Any = Poolers(loaded.checkpoint.config, missing)
        started = time.perf_counter()
        encoder = BatchEncoder(poolers, tokenizer, make_mesh(), 64 if stem.startswith("wiki") else None)
        vectors = encoder(loaded.params, sentences, progress=True)
        print(f"{len(sentences):,} sentences encoded in {time.perf_counter() - started:.0f} s", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        for name, part in zip(missing, np.split(vectors, len(missing), axis=1), strict=True):
            np.save(files[name], part)
    stored = {name: np.load(file) for name, file in files.items()}
    assert all(len(x) == len(sentences) for x in stored.values()), f"{cache} holds other sentences: remove it"
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a BERT folder; all-MiniLM-L6-v2 by default")
    parser.add_argument("--cache", type=Path, default=Path(".cache/vectors"))
    parser.add_argument("--lines", type=int, default=20_000, help="of Wikipedia")
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS))
    parser.add_argument("--fit-to", nargs="+", choices=("target", "wiki"), default=("target", "wiki"))
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS))
    parser.add_argument("--epochs", type=int, help="epochs of the flow; by default the flow's own")
    parser.add_argument("--dev", action="store_true", help="score the dev split of STS-B alone, to choose settings")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root = Path(os.environ["SIMCSE_DATA"])
    model = arguments.model or str(minilm_folder())

    data = root / "senteval"
    sts = unlabelled_sentences("sts", data)
    index = {sentence: i for i, sentence in enumerate(sts)}
    of_tasks = vectors_of(sts, arguments.encoders, arguments.cache, "sts", model)
    of_wiki: dict[str, np.ndarray] = {}
    if "wiki" in arguments.fit_to:
        wiki = list(dict.fromkeys(read_sentences(root / "wiki" / "wiki_en_1m.txt.gz", arguments.lines)))
        of_wiki = vectors_of(wiki, arguments.encoders, arguments.cache, f"wiki-{arguments.lines}", model)
    names = ("STSBenchmark",) if arguments.dev else STS_TASKS
    rows_of = {name: [index[s] for s in unlabelled_sentences(name, data)] for name in names}
    tasks = {name: load_task(name, data, "dev" if arguments.dev else "test") for name in names}
    rows: list[dict[str, Any]] = []
    apply = jax.jit(lambda post, x: post(x))

    def score(encoder: str, method: str, fitted_to: str, posts: dict[str, Any], seconds: float) -> None:
        scores = {}
        for name, task in tasks.items():

            def encode(sentences: list[str], name: str = name) -> np.ndarray:
                x = of_tasks[encoder][[index[s] for s in sentences]]
                return x if not posts else np.asarray(apply(posts[name], x))

            scores[name] = evaluate([task], encode)["reported"][name]
        scores["Avg."] = float(np.mean(list(scores.values())))
        rows.append({"encoder": encoder, "method": method, "fitted to": fitted_to, **scores, "seconds": seconds})
        figures = " | ".join(f"{scores[name]:.2f}" for name in scores)
        print(f"| {encoder} | {method} | {fitted_to} | {figures} | {seconds:.1f} |", flush=True)

    for encoder in arguments.encoders:
        print(f"{encoder}: average cosine {average_cosine(of_tasks[encoder]):.3f}", flush=True)
        score(encoder, "raw", "–", {}, 0.0)
        for method in arguments.methods:
            settings = METHODS[method]
            if arguments.epochs:
                settings = replace(settings, flow=FlowSettings(epochs=arguments.epochs))
            for fitted_to in arguments.fit_to:
                started = time.perf_counter()
                if fitted_to == "wiki":
                    posts = dict.fromkeys(tasks, fit(of_wiki[encoder], settings)[0])
                else:
                    posts = {name: fit(of_tasks[encoder][rows_of[name]], settings)[0] for name in tasks}
                score(encoder, method, fitted_to, posts, time.perf_counter() - started)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
