"""Temperature of the supervised objective (SimCSE, appendix; STS-B dev).

simcse-jax ablate temperature --base.data.train nli_for_simcse.csv --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.sup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/temperature",
    variants={
        "0.001": {"objective.temperature": 0.001},
        "0.01": {"objective.temperature": 0.01},
        "0.05": {"objective.temperature": 0.05},
        "0.1": {"objective.temperature": 0.1},
        "1.0": {"objective.temperature": 1.0},
    },
    paper={
        "0.001": 84.9,
        "0.01": 85.4,
        "0.05": 86.2,
        "0.1": 82.0,
        "1.0": 64.0,
    },
)
