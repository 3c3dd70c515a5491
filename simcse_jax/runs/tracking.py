"""TensorBoard and Weights & Biases. Both follow metrics.jsonl, which stays the record of a run."""

import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from simcse_jax.errors import InputError, reason
from simcse_jax.storage.files import write_json
from simcse_jax.storage.records import read_record

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_PATIENCE = 60.0  # seconds that the end of a run waits for a tracker

Line = dict[str, Any]
"""A line of metrics.jsonl: `step` and figures, None for those that are not finite."""


class Tracker(Protocol):
    """A second destination for the lines of metrics.jsonl."""

    def log(self, line: Line) -> None:
        """Takes a line."""

    def close(self) -> None:
        """Writes what is left."""


def check_tracking(names: Iterable[str]) -> None:
    """Raises `InputError` for a tracker whose package is not installed, or that has no account."""
    for name in names:
        if find_spec(_PACKAGES[name]) is None:
            raise InputError(
                f"tracking names {name}, which needs the Python package {_PACKAGES[name]}: "
                'pip install "simcse-jax[tracking]", or leave it out'
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online" and not _logged_in():
        raise InputError(
            "tracking names wandb but has no key for it: run `wandb login`, or set WANDB_API_KEY, or "
            "WANDB_MODE=offline to write files that `wandb sync` sends later"
        )


def _logged_in() -> bool:
    """Whether wandb knows an account, without asking for one or for the network."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


class TensorBoard:
    """TensorBoard's event files in a folder, one tag per figure."""

    def __init__(self, folder: Path, config: dict[str, Any], history: Iterable[Line]) -> None:
        """Starts the files, or writes them again from the log of a run that continues.

        So no step occurs twice, and the files are complete even if the run was not tracked at first.
        """
        from tensorboardX import SummaryWriter

        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")
        for line in history:
            self.log(line)

    def log(self, line: Line) -> None:
        """Writes one scalar per figure, as `dev/...` or `train/...`."""
        for name, value in line.items():
            if name != "step" and value is not None:
                group = "dev" if name.startswith("dev") else "train"
                self._writer.add_scalar(f"{group}/{name}", value, line["step"])

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, online or offline as WANDB_MODE says, in the project WANDB_PROJECT or `simcse_jax`."""

    def __init__(self, folder: Path, config: dict[str, Any], history: Iterable[Line]) -> None:
        """Starts a run, or continues the one whose id is in the run folder, after the last step that it received."""
        import wandb

        self._file = folder / "wandb.json"
        about = _stored(self._file) or {"id": secrets.token_hex(4), "step": -1}
        self._id, self._given, self._step = about["id"], about["step"], about["step"]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "simcse_jax"),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=self._id,
            resume="allow",
            dir=folder,
            config=config,
            # The terminal belongs to the progress line.
            settings=wandb.Settings(console="off", silent=True),
        )
        self._remember()
        for line in history:
            self.log(line)

    def log(self, line: Line) -> None:
        """Records the line's figures under its step, except for steps that were recorded before."""
        if line["step"] <= self._given:
            return
        if line["step"] > self._step:
            # A step may have several lines, so only the steps before it are complete.
            self._remember()
            self._step = line["step"]
        figures = {name: value for name, value in line.items() if name != "step" and value is not None}
        self._run.log(figures, step=line["step"])

    def close(self) -> None:
        """Sends what is left."""
        self._remember()
        self._run.finish()

    def _remember(self) -> None:
        write_json(self._file, {"id": self._id, "step": self._step})


def _stored(file: Path) -> dict[str, Any] | None:
    """What `WandB` noted of its run; None where there is nothing, or nothing that can be read."""
    try:
        about = dict(read_record(file))
    except (OSError, ValueError, TypeError):
        return None
    return about if isinstance(about.get("id"), str) and type(about.get("step")) is int else None


class Follower:
    """A tracker in a thread of its own: training neither waits for it nor ends with it."""

    def __init__(self, name: str, start: Callable[[], Tracker], echo: Callable[[str], None]) -> None:
        """Starts the thread, and in it the tracker.

        Args:
          name: the tracker's name, for messages.
          start: makes the tracker.
          echo: reports once that the tracker failed.
        """
        self._name, self._start, self._echo = name, start, echo
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def log(self, line: Line) -> None:
        """Hands a line over."""
        if self._thread.is_alive():
            self._lines.put(line)

    def close(self, patience: float = _PATIENCE) -> None:
        """Waits until all lines are written, but no longer than `patience` seconds."""
        self._lines.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._echo(f"tracking  {self._name} has not ended after {patience:.0f} s, and the run ends without it")

    def _follow(self) -> None:
        try:
            tracker = self._start()
            while (line := self._lines.get()) is not None:
                tracker.log(line)
            tracker.close()
        except Exception as error:  # networks, quotas, full disks: whatever a tracker's package raises
            self._echo(f"tracking  {self._name} failed ({reason(error)}) and ends; metrics.jsonl continues")


def follow(
    names: Iterable[str], folder: Path, config: dict[str, Any], history: list[Line], echo: Callable[[str], None]
) -> list[Follower]:
    """Starts the trackers of a run.

    Args:
      names: any of `tensorboard` and `wandb`.
      folder: the run folder.
      config: the run's config as JSON values, for the trackers to record.
      history: lines of the run's log so far.
      echo: reports failures.
    """
    starts: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", config, history),
        "wandb": lambda: WandB(folder, config, history),
    }
    return [Follower(name, starts[name], echo) for name in dict.fromkeys(names)]
