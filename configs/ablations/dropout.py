"""Dropout probability, and the same noise for both passes (SimCSE, table 3; STS-B dev, one seed).

simcse-jax ablate dropout --base.data.train wiki1m_for_simcse.txt --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.unsup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/dropout",
    variants={
        "0.0": {"model.dropout": 0.0},
        "0.01": {"model.dropout": 0.01},
        "0.05": {"model.dropout": 0.05},
        "0.1": {"model.dropout": 0.1},
        "0.15": {"model.dropout": 0.15},
        "0.2": {"model.dropout": 0.2},
        "0.5": {"model.dropout": 0.5},
        "fixed 0.1": {"model.dropout": 0.1, "objective.noise": "shared"},
    },
    paper={
        "0.0": 71.1,
        "0.01": 72.6,
        "0.05": 81.1,
        "0.1": 82.5,
        "0.15": 81.4,
        "0.2": 80.5,
        "0.5": 71.0,
        "fixed 0.1": 43.6,
    },
)
