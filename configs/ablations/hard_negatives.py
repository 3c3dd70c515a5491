"""Hard negatives: their weight, training without them, and training with nothing but a pair's own (SimCSE, appendix;
STS-B dev).

simcse-jax ablate hard_negatives --base.data.train nli_for_simcse.csv --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.sup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/hard_negatives",
    variants={
        "0.5": {"objective.hard_negative_log_weight": -0.693147},
        "1": {},
        "2": {"objective.hard_negative_log_weight": 0.693147},
        "without": {"data.columns": ("sent0", "sent1")},
        "no in-batch negatives": {"objective.loss": "own_negative"},
    },
    paper={
        "0.5": 86.1,
        "1": 86.2,
        "2": 86.2,
        "without": 84.9,
    },
)
