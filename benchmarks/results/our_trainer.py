"""This project's side of the comparison with PyTorch."""

from pathlib import Path
from typing import Any

from benchmarks.ours import OnJax
from simcse_jax.config import Config
from simcse_jax.runs.metrics_log import read_log
from simcse_jax.training.trainer import TrainingDiverged, train


class Trainer(OnJax):
    """`simcse-jax train`."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def run(self) -> dict[str, Any]:
        """Trains to the end."""
        try:
            results = train(self._config)
        except TrainingDiverged as error:
            return {"diverged": str(error)}
        if "stopped" in results:
            return results
        lines = read_log(Path(self._config.output) / "metrics.jsonl")
        path = [[line["step"], round(line["dev"], 3)] for line in lines if "dev" in line]
        losses = [line["loss"] for line in lines if "loss" in line]
        return {"path": path, "loss": losses[-1], "steps": results["steps"], "seconds": results["seconds"]}
