"""IS-CSE from RoBERTa-base, as published: unsupervised SimCSE and instance smoothing with a constant weight of 0.1.

Settings: IS-CSE (arXiv 2305.07424), section 4 and appendix; buffer 1,024, 16 neighbours, β 2.

    simcse-jax train iscse_roberta_base --data.train wiki1m_for_simcse.txt --evaluation.data SentEval/data/downstream
"""

from simcse_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SmoothingConfig,
)

config = Config(
    output="runs/iscse_roberta_base",
    batch_size=512,
    epochs=1,
    model=ModelConfig(path="roberta-base", pooler="cls", mlp_only_train=True),
    data=DataConfig(train="wiki1m_for_simcse.txt", max_length=32),
    objective=ObjectiveConfig(smoothing=SmoothingConfig(weight=0.1)),
    optimizer=OptimizerConfig(learning_rate=1e-5),
    evaluation=EvaluationConfig(dev="STSBenchmark", every=125),
)
