"""Weight of the masked language model beside the contrast (SimCSE, appendix; STS-B dev).

simcse-jax ablate mlm --base.data.train nli_for_simcse.csv --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.sup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/mlm",
    variants={
        "none": {},
        "0.01": {"objective.mlm.weight": 0.01},
        "0.1": {"objective.mlm.weight": 0.1},
        "1": {"objective.mlm.weight": 1.0},
    },
    paper={"none": 86.2, "0.01": 85.7, "0.1": 85.7, "1": 85.1},
)
