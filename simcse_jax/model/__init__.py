"""The encoder, its poolers and the SimCSE head. Flax is imported here only."""

from simcse_jax.model.encoder import Encoder, EncoderConfig, read_encoder_config
from simcse_jax.model.layout import Layout, lay_out
from simcse_jax.model.mlm_head import MLMHead, build_mlm_head, init_mlm_head
from simcse_jax.model.pooling import POOLERS, PoolerName, check_pooler, pool
from simcse_jax.model.sentence_encoder import SentenceEncoder

__all__ = [
    "POOLERS",
    "Encoder",
    "EncoderConfig",
    "Layout",
    "MLMHead",
    "PoolerName",
    "SentenceEncoder",
    "build_mlm_head",
    "check_pooler",
    "init_mlm_head",
    "lay_out",
    "pool",
    "read_encoder_config",
]
