"""Hard negatives that were mined, beside random ones, the contradictions of NLI, and none (STS-B dev).

First mine, for each premise from all hypotheses: the nearest by some model, and random ones.

    simcse-jax data mine MODEL nli_for_simcse.csv runs/mined/nearest.jsonl --columns sent0 sent1
    simcse-jax data mine MODEL nli_for_simcse.csv runs/mined/random.jsonl --columns sent0 sent1 --choose random \
      --last-rank 1000000
    simcse-jax ablate mined --base.data.train nli_for_simcse.csv --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.sup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/mined",
    variants={
        "mined": {"data.train": "runs/mined/nearest.jsonl", "data.columns": ()},
        "random": {"data.train": "runs/mined/random.jsonl", "data.columns": ()},
        "contradictions": {},
        "none": {"data.columns": ("sent0", "sent1")},
    },
)
