"""What several commands take."""

import os
from pathlib import Path


def senteval_folder() -> str:
    """The folder in SentEval's layout that `SIMCSE_DATA` names; empty where that is unset."""
    root = os.environ.get("SIMCSE_DATA")
    return str(Path(root) / "senteval") if root else ""
