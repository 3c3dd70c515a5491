"""The kind of positive, and one encoder or two (SimCSE, table 2; STS-B dev).

Next sentences need running text: one sentence per line, a blank line between documents.

    simcse-jax ablate objectives --base.data.train wiki1m_for_simcse.txt --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.unsup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/objectives",
    variants={
        "same sentence": {},
        "next sentence": {"data.neighbours": 1},
        "next 3 sentences": {"data.neighbours": 3},
        "delete one word": {"data.augment": "delete_word"},
        "same sentence, two encoders": {"model.encoders": 2},
        "next sentence, two encoders": {"data.neighbours": 1, "model.encoders": 2},
        "next 3 sentences, two encoders": {"data.neighbours": 3, "model.encoders": 2},
        "delete one word, two encoders": {"data.augment": "delete_word", "model.encoders": 2},
    },
    paper={
        "same sentence": 82.5,
        "next sentence": 67.1,
        "next 3 sentences": 67.4,
        "delete one word": 75.9,
        "same sentence, two encoders": 80.7,
    },
)
