"""Discrete augmentations of the positive, against dropout alone (SimCSE, table 1; STS-B dev).

Synonyms need a table of them: see docs/reproduce.md.

    simcse-jax ablate augmentations --base.data.train wiki1m_for_simcse.txt --base.evaluation.data SentEval
"""

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.unsup_bert_base import config

ablation = Ablation(
    base=config,
    output="runs/ablations/augmentations",
    variants={
        "none": {},
        "crop 10%": {"data.augment": "crop", "data.augment_share": 0.1},
        "crop 20%": {"data.augment": "crop", "data.augment_share": 0.2},
        "crop 30%": {"data.augment": "crop", "data.augment_share": 0.3},
        "word deletion 10%": {"data.augment": "delete_words", "data.augment_share": 0.1},
        "word deletion 20%": {"data.augment": "delete_words", "data.augment_share": 0.2},
        "word deletion 30%": {"data.augment": "delete_words", "data.augment_share": 0.3},
        "delete one word": {"data.augment": "delete_word"},
        "delete one word, no dropout": {"data.augment": "delete_word", "model.dropout": 0.0},
    },
    paper={
        "none": 82.5,
        "crop 10%": 77.8,
        "crop 20%": 71.4,
        "crop 30%": 63.6,
        "word deletion 10%": 75.9,
        "word deletion 20%": 72.2,
        "word deletion 30%": 68.2,
        "delete one word": 75.9,
        "delete one word, no dropout": 74.2,
    },
)
