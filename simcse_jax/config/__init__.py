"""The settings of a run: the dataclasses that config files are built of."""

from simcse_jax.config.load import load_config_file
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
    MLMConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RetrievalMetric,
    SmoothingConfig,
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
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RetrievalMetric",
    "SmoothingConfig",
    "load_config_file",
]
