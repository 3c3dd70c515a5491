"""Other contrastive losses and widths on the unsupervised task (docs/objectives.md).

simcse-jax ablate losses --base.data.train wiki1m_for_simcse.txt --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.unsup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/losses",
    variants={
        "info_nce": {},
        "symmetric": {"objective.loss": "symmetric"},
        "decoupled": {"objective.loss": "decoupled"},
        "sigmoid": {"objective.loss": "sigmoid"},
        "focal": {"objective.loss": "focal"},
        "off_dropout": {"objective.loss": "off_dropout"},
        "matryoshka": {"objective.widths": (64, 128, 256, 768)},
    },
)
