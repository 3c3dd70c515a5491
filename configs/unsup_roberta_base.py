"""Unsupervised SimCSE from RoBERTa-base, as published: two dropout masks are the only augmentation.

Settings: SimCSE, appendix A.

    simcse-jax train unsup_roberta_base --data.train wiki1m_for_simcse.txt --evaluation.data SentEval/data/downstream
"""

from simcse_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig

config = Config(
    output="runs/unsup_roberta_base",
    batch_size=512,
    epochs=1,
    model=ModelConfig(path="roberta-base", pooler="cls", mlp_only_train=True),
    data=DataConfig(train="wiki1m_for_simcse.txt", max_length=32),
    optimizer=OptimizerConfig(learning_rate=1e-5),
    evaluation=EvaluationConfig(dev="STSBenchmark", every=125),
)
