"""The names that sentence-transformers and the original SimCSE give to settings of `SimCSE` and its `encode`."""

import inspect
from collections.abc import Callable
from typing import Any

from simcse_jax.errors import InputError, did_you_mean

_SAME = {
    "show_progress_bar": "progress",
    "normalize_embeddings": "normalize",
    "normalize_to_unit": "normalize",
}
"""Names with the same meaning here."""

_FIXED: dict[str, tuple[Any, str]] = {
    "convert_to_numpy": (True, "the result is one array; list(vectors) has its rows"),
    "convert_to_tensor": (False, "make a tensor with torch.from_numpy(vectors), or take output='jax'"),
    "return_numpy": (True, "make a tensor with torch.from_numpy(vectors), or take output='jax'"),
    "output_value": ("sentence_embedding", "token vectors are not given; export the model for transformers"),
    "precision": ("float32", "vectors are float32; change them afterwards, e.g. vectors.astype(np.float16)"),
    "device": (None, "JAX's devices are used; the environment variable JAX_PLATFORMS=cpu chooses them"),
    "pool": (None, "all devices of JAX are used without a pool"),
    "chunk_size": (None, "all devices of JAX are used without a pool"),
    "keepdim": (False, "give a list of one sentence for an array of one row"),
    "truncate_dim": (None, "give it to encode, e.g. encode(sentences, truncate_dim=256)"),
    "prompts": (None, "give a text to encode, e.g. encode(sentences, prompt='query: ')"),
    "default_prompt_name": (None, "give it to encode, e.g. encode(sentences, prompt_name='query')"),
    "revision": (None, "download that revision, e.g. with huggingface-hub, and give its folder"),
    "cache_folder": (None, "the environment variable HF_HOME names the cache of the hub"),
    "token": (None, "the environment variable HF_TOKEN holds it"),
    "local_files_only": (False, "the environment variable HF_HUB_OFFLINE=1 says so"),
    "trust_remote_code": (False, "no code of a model's folder is run"),
}
"""Names of which one value has a meaning here, that value, and what to do instead of another."""


def translated(given: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Settings under their names here.

    Args:
      given: settings by names that the function does not have.
      function: the function.

    Raises:
      InputError: an unknown name, or a setting that has no meaning here; the message says what to use instead.
    """
    kinds = inspect.signature(function).parameters.items()
    own = [name for name, p in kinds if p.kind is not p.VAR_KEYWORD and name not in ("self", "sentences", "model")]
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if _SAME.get(name) in own:
            # None stands for the default there, as a progress bar by the level of a log.
            settings |= {} if value is None else {_SAME[name]: value}
        elif name in _FIXED:
            allowed, advice = _FIXED[name]
            if value is not None and value != allowed:
                raise InputError(f"{name}={value!r} is not possible: {advice}")
        else:
            raise InputError(f"there is no setting {name}: {did_you_mean(name, own)}there are {', '.join(own)}")
    return settings
