"""Instance smoothing: aggregation, grouping, neighbours, buffer, temperature (IS-CSE, section 5).

simcse-jax ablate smoothing --base.data.train wiki1m_for_simcse.txt --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.iscse_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/smoothing",
    variants={
        "as published": {},
        "mean": {"objective.smoothing.aggregation": "mean"},
        "k-means": {"objective.smoothing.grouping": "kmeans"},
        "4 neighbours": {"objective.smoothing.neighbours": 4},
        "8 neighbours": {"objective.smoothing.neighbours": 8},
        "32 neighbours": {"objective.smoothing.neighbours": 32},
        "buffer 256": {"objective.smoothing.buffer_size": 256},
        "buffer 512": {"objective.smoothing.buffer_size": 512},
        "buffer 2048": {"objective.smoothing.buffer_size": 2048},
        "beta 0.5": {"objective.smoothing.temperature": 0.5},
        "beta 1.0": {"objective.smoothing.temperature": 1.0},
        "beta 4.0": {"objective.smoothing.temperature": 4.0},
        "weight 0.005": {"objective.smoothing.weight": 0.005},
        "weight 0.05": {"objective.smoothing.weight": 0.05},
        "weight 0.5": {"objective.smoothing.weight": 0.5},
    },
)
