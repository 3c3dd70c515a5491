"""IS-CSE from BERT-large, as published: unsupervised SimCSE and instance smoothing.

The weight of smoothing rises from 0.005 to 0.05 in the first half of the steps.

Settings: IS-CSE (arXiv 2305.07424), section 4 and appendix; buffer 1,024, 16 neighbours, β 2.

    simcse-jax train iscse_bert_large --data.train wiki1m_for_simcse.txt --evaluation.data SentEval/data/downstream
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
    output="runs/iscse_bert_large",
    batch_size=64,
    epochs=1,
    model=ModelConfig(path="bert-large-uncased", pooler="cls", mlp_only_train=True),
    data=DataConfig(train="wiki1m_for_simcse.txt", max_length=32),
    objective=ObjectiveConfig(smoothing=SmoothingConfig(weight=0.05, schedule="cosine", start_weight=0.005)),
    optimizer=OptimizerConfig(learning_rate=1e-5),
    evaluation=EvaluationConfig(dev="STSBenchmark", every=125),
)
