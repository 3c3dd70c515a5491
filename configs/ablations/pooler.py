"""Pooler and head (SimCSE, table 6; STS-B dev).

simcse-jax ablate pooler --base.data.train wiki1m_for_simcse.txt --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.unsup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/pooler",
    variants={
        "head always": {"model.mlp_only_train": False},
        "head in training only": {},
        "no head": {"model.pooler": "cls_before_pooler", "model.mlp_only_train": False},
        "first-last average": {"model.pooler": "avg_first_last", "model.mlp_only_train": False},
    },
    paper={
        "head always": 81.7,
        "head in training only": 82.5,
        "no head": 80.9,
        "first-last average": 81.2,
    },
)
