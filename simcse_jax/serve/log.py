"""The service's log, which clients cannot fill."""

import logging
import time
from copy import deepcopy
from typing import Any

from uvicorn.config import LOGGING_CONFIG

_PERIOD = 60.0


class Sparing(logging.Filter):
    """Lets one record of each kind pass per minute; the next says how many were left out."""

    def __init__(self) -> None:
        """Nothing has passed yet."""
        super().__init__()
        self._passed: dict[tuple[Any, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record passes. Its kind is the line that made it, and the type of its error."""
        kind = record.pathname, record.lineno, record.exc_info and record.exc_info[0]
        now = time.monotonic()
        since, left_out = self._passed.get(kind, (now - _PERIOD, 0))
        if now - since < _PERIOD:
            self._passed[kind] = since, left_out + 1
            return False
        self._passed[kind] = now, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out:,} more like the one before were left out)"
        return True


def config() -> dict[str, Any]:
    """uvicorn's configuration of the log, with what asyncio says, all of it sparing."""
    made: dict[str, Any] = deepcopy(LOGGING_CONFIG)
    made["filters"] = {"sparing": {"()": Sparing}}
    made["handlers"]["default"]["filters"] = ["sparing"]
    made["loggers"]["asyncio"] = {"handlers": ["default"], "level": "WARNING", "propagate": False}
    return made
