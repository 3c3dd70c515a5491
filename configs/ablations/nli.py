"""Which NLI sentences are positives (after SimCSE, table 4).

The columns are those of nli_for_simcse.csv: premise, entailed hypothesis, contradictory hypothesis.

    simcse-jax ablate nli --base.data.train nli_for_simcse.csv --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.sup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/nli",
    variants={
        "entailment, hard negatives": {},
        "entailment": {"data.columns": ("sent0", "sent1")},
        "contradiction": {"data.columns": ("sent0", "hard_neg")},
        "entailment, unsupervised": {"data.columns": ("sent0",), "model.mlp_only_train": True},
    },
)
