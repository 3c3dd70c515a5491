"""Long rows without dropout: attention equal to its equation on every path, by kernels that are right, in linear
memory."""

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from simcse_jax.inference.simcse import SimCSE
from simcse_jax.model import EncoderConfig, SentenceEncoder, fused_attention, lay_out, long_attention
from simcse_jax.model.attention import attend
from simcse_jax.model.build import init_params
from simcse_jax.model.long_attention import Attention, Kernel, allowed_keys, attend_in_blocks
from simcse_jax.runtime.mesh import make_mesh, replicated
from simcse_jax.xla.topology import devices_of, parse_topology

HEADS, SIZE = 2, 8
LAYOUTS = [(129, [[129], [1]]), (300, [[257], [40]]), (300, [[100, 120, 1], [299, 0, 0]]), (256, [[128, 128], [0, 0]])]
"""Tokens of a row, and lengths of its sentences."""


def equation(query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: list[list[int]]) -> np.ndarray:
    """softmax(Q Kᵀ / √d) V, sentence by sentence, in float64; 0 at padding."""
    result = np.zeros(query.shape)
    for row, sentences in enumerate(lengths):
        for start, end in zip(np.cumsum([0, *sentences]), np.cumsum(sentences), strict=False):
            q, k, v = (x[row, :, start:end].astype(np.float64) for x in (query, key, value))
            scores = np.exp(q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5)
            result[row, :, start:end] = scores / scores.sum(axis=2, keepdims=True) @ v
    return result


def check(attention: Attention, length: int, lengths: list[list[int]]) -> None:
    batch = np.random.default_rng(length).standard_normal((3, len(lengths), HEADS, length, SIZE)).astype(np.float32)
    found = np.asarray(jax.jit(attention)(*batch, lay_out(jnp.array(lengths), length)))
    assert np.isfinite(found).all()
    tokens = np.arange(length) < np.sum(lengths, axis=1)[:, None]
    difference = np.abs(found - equation(*batch, lengths)).max(axis=(1, 3))
    assert difference[tokens].max() < 2e-6


@pytest.mark.parametrize(("length", "lengths"), LAYOUTS)
def test_blocks_of_queries_equal_the_equation(length: int, lengths: list[list[int]]) -> None:
    check(attend_in_blocks, length, lengths)


def whole(query: Any, key: Any, value: Any, layout: Any) -> Any:
    return attend(query, key, value, allowed_keys(layout.sentence, layout), None, 0.0)


@pytest.mark.parametrize("slots", [1, 3])
def test_an_encoder_of_long_rows(slots: int) -> None:
    """Its vectors are those that all weights at once give."""
    config = EncoderConfig("bert", 30, 16, 1, 2, 24, 320, 2)
    model = SentenceEncoder(config, pooler="avg")
    params = init_params(model, 0)
    lengths = jnp.array([[300], [7]] if slots == 1 else [[100, 150, 50], [7, 0, 0]])
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 30, (2, 300)))
    found, expected = (
        np.asarray(jax.jit(model.clone(attention=how).apply)({"params": params}, ids, lengths))
        for how in (attend_in_blocks, whole)
    )
    np.testing.assert_allclose(found[lengths > 0], expected[lengths > 0], atol=2e-6)


def memory(attention: Attention, length: int, slots: int, mesh: Mesh | None = None, dtype: Any = np.float32) -> int:
    """Bytes of the compiled program beside its arguments."""

    def attend_row(batch: jax.Array, lengths: jax.Array) -> jax.Array:
        query, key, value = batch
        return attention(query, key, value, lay_out(lengths, length))

    place = replicated(mesh) if mesh else None
    batch = jax.ShapeDtypeStruct((3, 1, HEADS, length, 64), dtype, sharding=place)
    lengths = jax.ShapeDtypeStruct((1, slots), jnp.int32, sharding=place)
    program = jax.jit(attend_row).lower(batch, lengths).compile()
    return int(program.memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize("slots", [1, 4])
def test_memory_is_linear_in_the_length(slots: int) -> None:
    """Four times the tokens: 16 times the weights of attention."""
    assert memory(attend_in_blocks, 4096, slots) < 4.2 * memory(attend_in_blocks, 1024, slots)
    assert memory(whole, 4096, slots) > 8 * memory(whole, 1024, slots)


def ignoring_masks(kernel: Kernel) -> Kernel:
    return lambda packed, *batch: kernel(packed, *batch[:3], jnp.zeros_like(batch[3]))


def refused(packed: bool, *batch: Any) -> Any:
    raise NotImplementedError("a device of another kind")


def on_cpu(packed: bool, query: Any, key: Any, value: Any, sentence: Any) -> Any:
    allowed = sentence[:, :, None] == sentence[:, None, :]
    return attend(query, key, value, allowed[:, None], None, 0.0)


@pytest.mark.parametrize(
    ("kernel", "works"),
    [(on_cpu, True), (ignoring_masks(on_cpu), False), (refused, False)],
    ids=["right", "wrong", "refused"],
)
def test_a_kernel_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, works: bool) -> None:
    """One that is wrong, or that the device refuses, is not used: the vectors are right."""
    rows: set[int] = set()

    def watched(packed: bool, *batch: Any) -> Any:
        rows.add(batch[0].shape[0])
        return kernel(packed, *batch)

    monkeypatch.setitem(long_attention._KERNELS, "cpu", watched)
    for length, lengths in LAYOUTS[1:3]:
        check(fused_attention(make_mesh()), length, lengths * 16)
    assert rows == ({2, 4} if works else {2})  # a device has 4 of the 32


def test_a_kernel_is_tried_again_where_memory_was_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for every length, as one may be refused and another not."""
    short = [True]

    def kernel(packed: bool, *batch: Any) -> Any:
        if short:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if batch[0].shape[2] % 100:
            raise NotImplementedError("a length that the kernel lacks")
        return on_cpu(packed, *batch)

    monkeypatch.setitem(long_attention._KERNELS, "cpu", kernel)
    mesh = make_mesh(devices=jax.devices()[:1])
    check(fused_attention(mesh), *LAYOUTS[1])
    short.clear()
    for length, lengths in LAYOUTS[:2]:
        check(fused_attention(mesh), length, lengths)
    assert {what[3]: found for what, found in long_attention._FOUND.items() if what[0] is kernel} == {
        129: False,
        300: True,
    }


@pytest.mark.full
def test_encoding_uses_the_kernel(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of more than 128 tokens alone."""
    shutil.copytree(tiny_bert, tmp_path / "long")
    about = json.loads((tiny_bert / "config.json").read_text()) | {"max_position_embeddings": 200}
    (tmp_path / "long" / "config.json").write_text(json.dumps(about))
    tensors = load_file(tiny_bert / "model.safetensors")
    name = next(name for name in tensors if "position_embeddings" in name)
    tensors[name] = np.resize(tensors[name], (200, tensors[name].shape[1]))
    save_file(tensors, tmp_path / "long" / "model.safetensors")
    texts = ["a b c " * 60, "a b c " * 10]
    expected = SimCSE(tmp_path / "long", pooler="avg").encode(texts)
    lengths: set[int] = set()

    def watched(packed: bool, *batch: Any) -> Any:
        lengths.add(batch[0].shape[2])
        return on_cpu(packed, *batch)

    monkeypatch.setitem(long_attention._KERNELS, "cpu", watched)
    np.testing.assert_allclose(SimCSE(tmp_path / "long", pooler="avg").encode(texts), expected, atol=1e-6)
    assert lengths == {192}


def test_lengths_and_masks_for_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's own computation in the place of the kernel, which needs a GPU."""

    def computed(*args: Any, implementation: str, **masks: Any) -> Any:
        assert implementation == "cudnn"
        assert masks["key_value_seq_lengths" if packed else "mask"] is None
        return dot_product_attention(*args, **masks, implementation="xla")

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", computed)
    for length, lengths in LAYOUTS:
        packed = len(lengths[0]) > 1
        check(partial(long_attention._by_row, long_attention._cudnn, make_mesh()), length, lengths * 4)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash_attention_of_tpus(dtype: str) -> None:
    """The kernel, interpreted."""
    with force_tpu_interpret_mode():
        device = jax.devices()[0]
        for length, packed in ((200, False), (320, True)):
            what = device, HEADS, length, SIZE, packed, dtype
            assert long_attention._problem(long_attention._flash, *what) == ""
            assert "off by" in long_attention._problem(ignoring_masks(long_attention._flash), *what)
        if dtype == "float32":
            mesh = make_mesh(devices=[device])
            for length, lengths in LAYOUTS:
                check(partial(long_attention._by_row, long_attention._flash, mesh), length, lengths)


@pytest.mark.release
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(("topology", "package"), [("v5e:1x1", "libtpu"), ("h100:1", "jax_cuda13_plugin")])
def test_kernels_compile(topology: str, package: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For devices that are not here; in linear memory, but for the mask of cuDNN's packed rows."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package}, which compiles for {topology}, is not installed")
    # JAX asks the GPU and its library, which are not here, whether they have the kernel.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", lambda _: True)
    mesh = make_mesh(devices=devices_of(parse_topology(topology)))
    kernel = long_attention._KERNELS[mesh.devices.flat[0].platform]
    attention = partial(long_attention._by_row, kernel, mesh)
    short, long = (memory(attention, length, slots, mesh, jnp.bfloat16) for length in (1024, 4096))
    assert long <= (4.5 if slots == 1 or package == "libtpu" else 17) * short < HEADS * 4096**2
