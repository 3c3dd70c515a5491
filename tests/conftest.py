"""Eight CPU devices for every test, checked array shapes, the models that tests share, and a limit to a test's time.

Every test belongs to one of three tiers. A test without a mark belongs to the fast tier; the marks `full` and `release`
put a test into the tier of that name. CONTRIBUTING.md says when each tier runs.
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Tests compile the same small programs over and over, also in processes of their own.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling takes most of the time of these tests. With these options it takes a fifth to a third of it, and tiny models
# run no slower. `XLA_FLAGS= pytest` compiles as users do; the release tier runs so.
os.environ.setdefault(
    "XLA_FLAGS",
    # jaxlib ends at an option that it does not know, as those since 0.11 do not know the second.
    "--xla_backend_optimization_level=0 "
    + "--xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
# Compilers for TPUs and GPUs may be installed; JAX would look for devices of theirs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _pytest.runner import runtestprotocol
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotations of array shapes and types are checked at every call.
install_import_hook("simcse_jax", "beartype.beartype")

from simcse_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig  # noqa: E402
from simcse_jax.data.demo import minilm_folder  # noqa: E402
from simcse_jax.errors import InputError  # noqa: E402
from simcse_jax.model import SentenceEncoder, read_encoder_config  # noqa: E402
from simcse_jax.model.build import init_params  # noqa: E402
from simcse_jax.pretrained.weights import to_tensors  # noqa: E402

LIBC = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
if LIBC:
    # Arrays from a megabyte on go back to the system when they are freed, and threads share two heaps: else a process
    # keeps twice the memory that it uses.
    LIBC.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    LIBC.mallopt(-8, 2)  # M_ARENA_MAX

FAST_SECONDS = float(os.environ.get("SIMCSE_TEST_SECONDS", "10"))
"""The seconds that a test of the fast tier may take; 0 for any number."""
SECONDS = pytest.StashKey[float]()
"""The seconds that the last call of a test took."""


def tier(item: pytest.Item) -> str:
    """The tier of a test: `fast`, `full` or `release`."""
    return next((name for name in ("release", "full") if item.get_closest_marker(name)), "fast")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Runs a fast test again where it took longer than the limit, and fails it where it takes longer twice."""
    result = yield
    if item.stash.get(SECONDS, 0.0) > FAST_SECONDS > 0 and tier(item) == "fast":
        first = item.stash[SECONDS]
        item._initrequest()  # type: ignore[attr-defined]
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        report = next(r for r in reports if r.when == "call" or r.failed)
        if report.failed:
            item.ihook.pytest_runtest_logreport(report=report)
        elif item.stash[SECONDS] > FAST_SECONDS:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {first:.1f} s, and {item.stash[SECONDS]:.1f} s when it ran again. A test of the "
                f"fast tier may take {FAST_SECONDS:g} s: make it quicker, or mark it `full`. "
                "On a slow or busy machine, set SIMCSE_TEST_SECONDS to more seconds, or to 0 for no limit."
            )
            item.ihook.pytest_runtest_logreport(report=report)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Notes how long the call of a test that passes takes, without its fixtures."""
    begin = time.perf_counter()
    result = yield
    item.stash[SECONDS] = time.perf_counter() - begin
    return result


def _drop_programs() -> None:
    """Drops what was compiled, and gives free memory back."""
    jax.clear_caches()
    gc.collect()
    if LIBC:
        LIBC.malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def _no_programs_of_other_files() -> Iterator[None]:
    """Drops what a file compiled: else a test process grows to many gigabytes."""
    yield
    _drop_programs()


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Drops what was compiled after a test that leaves the process large."""
    yield
    with contextlib.suppress(OSError):  # not on Linux
        if int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 1.5e9:
            _drop_programs()


SENTENCES = [
    "A man is playing a flute.",
    "Someone plays an instrument.",
    "The stock market fell by three per cent on Monday.",
    "Two dogs run across a wet field while their owner shouts at them to come back before the storm arrives.",
    "Nothing.",
    "It isn't clear whether the committee, which met twice, will decide before March.",
    "Naïve café façades — 東京 🙂",
]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden figures."""
    if "SIMCSE_GOLDEN" not in os.environ:
        pytest.skip("SIMCSE_GOLDEN is not set: no golden figures here")
    return Path(os.environ["SIMCSE_GOLDEN"])


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text and tasks."""
    if "SIMCSE_DATA" not in os.environ:
        pytest.skip("SIMCSE_DATA is not set: no real data here")
    return Path(os.environ["SIMCSE_DATA"])


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    try:
        return minilm_folder()
    except InputError as error:
        pytest.skip(str(error))


TINY: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
TINY_BERT = TINY | {
    "model_type": "bert",
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
}
TINY_ROBERTA = TINY | {
    "model_type": "roberta",
    "max_position_embeddings": 42,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A model folder with random weights and a small WordPiece tokenizer, without torch."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    encoder_config = read_encoder_config(config)
    params = jax.jit(lambda: init_params(SentenceEncoder(encoder_config), seed))()
    # Biases and scales are not left at 0 and 1, where an exchange of two would not show.
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), params)
    save_file(to_tensors(params, encoder_config), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """WordPiece over single characters: every ASCII text has tokens, most of them several."""
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.txt").write_text("\n".join(words[: TINY["vocab_size"]]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 40})
    )


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer BERT of width 32 with a tokenizer."""
    return write_model(tmp_path_factory.mktemp("tiny") / "bert", TINY_BERT)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 distinct sentences: a number that no batch size divides."""
    rng = np.random.default_rng(0)
    words = np.array(["man", "woman", "dog", "cat", "runs", "eats", "sees", "red", "house", "river", "never", "two"])
    lines = dict.fromkeys(" ".join(rng.choice(words, rng.integers(3, 9))) for _ in range(400))
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(list(lines)[:203]) + "\n")
    return path


@pytest.fixture
def small_run(tiny_bert: Path, text_file: Path, tmp_path: Path) -> Config:
    """A run of 8 steps on made-up text, scored on made-up pairs."""
    dev = tmp_path / "dev.tsv"
    pairs = ["a man runs\ta woman runs\t3", "the dog eats\ta dog eats\t5", "red house\tnever two\t0", "cat\tdog\t2"]
    dev.write_text("sentence1\tsentence2\tscore\n" + "\n".join(pairs) + "\n")
    return Config(
        output=str(tmp_path / "run"),
        batch_size=16,
        max_steps=8,
        log_every=2,
        model=ModelConfig(path=str(tiny_bert), mlp_only_train=True),
        data=DataConfig(train=str(text_file), max_length=12, cache=str(tmp_path / "cache")),
        evaluation=EvaluationConfig(dev=str(dev), every=4),
    )


def write_tfds(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A folder of TFDS with tiny_nli/plain:1.0.0, prepared by its own writer, without TensorFlow."""
    import tensorflow_datasets as tfds

    class TinyNli(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc]
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain")]  # noqa: RUF012 (as TFDS declares it)

        def _info(self) -> Any:
            text, names = tfds.features.Text(), ["entailment", "neutral", "contradiction"]
            features = {"premise": text, "hypothesis": text, "label": tfds.features.ClassLabel(names=names)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            yield from enumerate(rows)

    TinyNli(data_dir=folder, file_format="array_record", config="plain").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return folder


@pytest.fixture(scope="session")
def tfds_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of TFDS data sets: five pairs of premise and hypothesis, the last without a label."""
    labels = [("p0 é", 0), ("p0 é", 1), ("p0 é", 2), ("p1 é", 0), ("p1 é", -1)]
    rows = [{"premise": premise, "hypothesis": f"h{n}", "label": label} for n, (premise, label) in enumerate(labels)]
    return write_tfds(tmp_path_factory.mktemp("tfds"), rows)


@pytest.fixture
def tfds_folder(tfds_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where TFDS data are looked for."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_root))
    return tfds_root


def relative_error(actual: Any, expected: Any) -> float:
    """‖actual − expected‖ / ‖expected‖ over all values."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def tree_error(actual: Any, expected: Any) -> float:
    """The same over all leaves of two trees."""
    flat = [np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (actual, expected)]
    return relative_error(*flat)


def without_key_biases(params: Any) -> Any:
    """Softmax ignores a key bias: its gradient is rounding noise, which Adam scales up to whole steps."""
    return {str(path): x for path, x in jax.tree.leaves_with_path(params) if "'key'" not in str(path) or x.ndim > 1}


@contextlib.contextmanager
def first_devices(number: int) -> Iterator[None]:
    """Leaves so many devices to be found, for which a step compiles sooner than for eight."""
    first = jax.devices()[:number]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "devices", lambda *_: first)
        yield


@pytest.fixture
def two_devices() -> Iterator[None]:
    """Two devices in place of eight."""
    with first_devices(2):
        yield


def full(*values: Any) -> Any:
    """A row of parameters for the full tier."""
    return pytest.param(*values, marks=pytest.mark.full)


def release(*values: Any) -> Any:
    """A row of parameters for the release tier."""
    return pytest.param(*values, marks=pytest.mark.release)


def mask_of(lengths: Any, length: int) -> Any:
    """Attention mask of sentences padded on the right."""
    return jnp.asarray(np.arange(length) < np.asarray(lengths)[..., None])
