"""Masked-language-model pretraining of a small BERT from random weights, to be fine-tuned with SimCSE afterwards.

The vocabulary is learnt from the same text. Each line of the text is one sequence, cut at `data.max_length`
tokens: running text works best with one paragraph per line. One pass per sequence, no contrast and no next-sentence
prediction (as RoBERTa).

    simcse-jax vocabulary text.txt.gz runs/bert_small --size 8000 --layers 4 --hidden 256
    simcse-jax train pretrain_mlm --data.train text.txt.gz
    simcse-jax export runs/pretrain_mlm runs/pretrained
    simcse-jax train unsup_bert_base --model.path runs/pretrained --data.train sentences.txt --evaluation.dev dev.tsv
"""

from simcse_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MLMConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)

config = Config(
    output="runs/pretrain_mlm",
    batch_size=128,
    max_steps=20_000,
    model=ModelConfig(path="./runs/bert_small", pooler="avg", random_init=True),
    data=DataConfig(train="text.txt.gz", max_length=128),
    objective=ObjectiveConfig(contrastive_weight=0.0, mlm=MLMConfig(weight=1.0)),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=1000, weight_decay=0.01),
    checkpoint=CheckpointConfig(every=1000),
)
