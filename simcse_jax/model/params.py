"""The type of a parameter tree."""

from typing import Any

Params = dict[str, Any]
