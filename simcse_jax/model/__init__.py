"""The encoder, its poolers and the SimCSE head. Only this package imports Flax."""

from simcse_jax.model.encoder import Encoder, EncoderConfig, read_encoder_config
from simcse_jax.model.layout import Layout, lay_out
from simcse_jax.model.long_attention import fused_attention
from simcse_jax.model.mlm_head import MLMHead, build_mlm_head, init_mlm_head
from simcse_jax.model.pooling import pool
from simcse_jax.model.sentence_encoder import SentenceEncoder

__all__ = [
    "Encoder",
    "EncoderConfig",
    "Layout",
    "MLMHead",
    "SentenceEncoder",
    "build_mlm_head",
    "fused_attention",
    "init_mlm_head",
    "lay_out",
    "pool",
    "read_encoder_config",
]
