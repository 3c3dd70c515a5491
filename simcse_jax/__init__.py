"""SimCSE in JAX: exact global-batch contrastive training of sentence encoders, and PyTorch models out.

>>> from simcse_jax import SimCSE
>>> model = SimCSE("runs/quickstart")                                             # doctest: +SKIP
>>> model.similarity("A man is playing a flute.", "Someone plays an instrument.")  # doctest: +SKIP
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simcse_jax.config import Config
    from simcse_jax.errors import InputError
    from simcse_jax.inference.export import export
    from simcse_jax.inference.loading import load_model
    from simcse_jax.inference.simcse import SimCSE
    from simcse_jax.objectives import info_nce
    from simcse_jax.training.trainer import train

__version__ = version("simcse-jax")

# No public name may be that of a module in the root: once imported, the module would take its place.
_HOME = {
    "Config": "config",
    "InputError": "errors",
    "SimCSE": "inference.simcse",
    "export": "inference.export",
    "info_nce": "objectives",
    "load_model": "inference.loading",
    "train": "training.trainer",
}
__all__ = ["Config", "InputError", "SimCSE", "__version__", "export", "info_nce", "load_model", "train"]


def __getattr__(name: str) -> Any:
    # Public names are imported at their first use, so that `import simcse_jax` costs nothing.
    if name in _HOME:
        return getattr(import_module(f"simcse_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'simcse_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    # Names that are imported at their first use, too: Python's prompt and notebooks complete them.
    return sorted({*globals(), *__all__})
