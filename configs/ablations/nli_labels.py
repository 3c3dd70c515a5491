"""Pairs of one label as positives, from labelled pairs like those of SNLI and MultiNLI (after SimCSE, table 4).

The columns are sentence1, sentence2 and gold_label; the files may be .jsonl, as SNLI and MultiNLI are published.

    simcse-jax ablate nli_labels --base.data.train snli_1.0_train.jsonl --base.evaluation.data SentEval
"""

from dataclasses import replace

from simcse_jax.ablation.settings import Ablation
from simcse_jax.configs.sup_bert_base import config

ablation = Ablation(
    base=replace(config, data=replace(config.data, columns=("sentence1", "sentence2"))),
    output="runs/ablations/nli_labels",
    variants={
        "entailment": {"data.where": {"gold_label": "entailment"}},
        "neutral": {"data.where": {"gold_label": "neutral"}},
        "contradiction": {"data.where": {"gold_label": "contradiction"}},
        "all": {},
    },
)
