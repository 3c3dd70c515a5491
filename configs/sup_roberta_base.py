"""Supervised SimCSE from RoBERTa-base, as published: NLI triplets, contradictions as hard negatives.

Settings: SimCSE, appendix A.

    simcse-jax train sup_roberta_base --data.train nli_for_simcse.csv --evaluation.data SentEval/data/downstream
"""

from simcse_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig

config = Config(
    output="runs/sup_roberta_base",
    batch_size=512,
    epochs=3,
    model=ModelConfig(path="roberta-base", pooler="cls"),
    data=DataConfig(train="nli_for_simcse.csv", columns=("sent0", "sent1", "hard_neg"), max_length=32),
    optimizer=OptimizerConfig(learning_rate=5e-5),
    evaluation=EvaluationConfig(dev="STSBenchmark", every=125),
)
