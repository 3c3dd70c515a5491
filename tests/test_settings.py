"""Settings that exclude each other are refused, by a message that names both and says what to do."""

from math import nan
from typing import Any

import pytest

from simcse_jax.ablation.settings import with_settings
from simcse_jax.config import Config, DataConfig
from simcse_jax.config.postprocess import FitSettings, FlowSettings
from simcse_jax.errors import InputError

WITHOUT_CONTRAST = {"objective.contrastive_weight": 0.0, "objective.mlm.weight": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2**32}, r"seed is 4294967296; it must be below 2\*\*32"),
        ({"data.train": ""}, "data.train is empty: give a file"),
        ({"objective.product_dtype": "bfloat16"}, "implementation is 'auto': only 'tiled' can use it"),
        (
            {
                "objective.product_dtype": "bfloat16",
                "objective.implementation": "tiled",
                "model.dtype": "float64",
            },
            "'bfloat16' but model.dtype is 'float64': leave one out",
        ),
        (
            {
                "objective.smoothing.weight": 0.1,
                "objective.smoothing.grouping": "kmeans",
                "objective.smoothing.clusters": 2000,
                "objective.smoothing.buffer_size": 1024,
            },
            "smoothing.clusters is 2000 but objective.smoothing.buffer_size is 1024: use fewer",
        ),
        (WITHOUT_CONTRAST | {"data.augment": "crop"}, "contrastive_weight is 0: leave them out"),
        (WITHOUT_CONTRAST | {"data.neighbours": 1}, "contrastive_weight is 0: leave them out"),
        (WITHOUT_CONTRAST | {"model.encoders": 2}, "contrastive_weight is 0: .* set model.encoders to 1"),
    ],
)
def test_settings_of_a_run(settings: dict[str, Any], message: str) -> None:
    config = Config(data=DataConfig(train="text.txt"))
    config.validate()
    with pytest.raises(InputError, match=message):
        with_settings(config, settings).validate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FitSettings("flow", dim=3), "dim is given but the method is flow: only whitening uses it"),
        (FitSettings("whitening", components=2), "components is given but the method is whitening"),
        (FitSettings("flow", flow=FlowSettings(steps=0)), "flow.steps is 0; it must be greater than 0"),
        (FitSettings("flow", flow=FlowSettings(learning_rate=nan)), "flow.learning_rate is nan"),
        (FitSettings("flow", flow=FlowSettings(seed=-1)), "flow.seed is -1; it must be 0 or more"),
    ],
)
def test_settings_of_a_post_processor(settings: FitSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings.validate()
