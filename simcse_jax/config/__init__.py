"""The settings of a run: the dataclasses that config files are built of."""

from simcse_jax.config.load import load_config_file
from simcse_jax.config.mining import MiningConfig
from simcse_jax.config.objective import MLMConfig, NegativesConfig, ObjectiveConfig, QueueConfig, SmoothingConfig
from simcse_jax.config.settings import (
    ENCODE_ROW,
    MIN_LENGTH,
    Backend,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LongText,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RetrievalMetric,
)

__all__ = [
    "ENCODE_ROW",
    "MIN_LENGTH",
    "Backend",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LongText",
    "MLMConfig",
    "MeshConfig",
    "MiningConfig",
    "ModelConfig",
    "NegativesConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "QueueConfig",
    "RetrievalMetric",
    "SmoothingConfig",
    "load_config_file",
]
