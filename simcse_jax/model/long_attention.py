"""Attention without dropout over long rows: by the fused kernel of the accelerator, where it has one that works, and by
blocks of queries elsewhere. Memory is linear in the rows' length, but for the mask of cuDNN's packed rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

from simcse_jax.errors import is_out_of_memory, reason, warn
from simcse_jax.model.attention import attend
from simcse_jax.model.layout import Layout, lay_out

SHORT = 128
"""Most tokens of a block of queries, and of a row that needs no blocks."""

Attention = Callable[[Array, Array, Array, Layout], Array]
"""softmax(Q Kᵀ / √d) V of queries, keys and values [B, h, L, d], where a token attends to those of its own sentence.
What comes out at padding is finite and has no meaning."""


def allowed_keys(sentence: Int[Array, "#B Q"], layout: Layout) -> Bool[Array, "B 1 _ L"]:
    """Whether queries, which belong to the given sentences of their rows, meet the keys of a layout.

    In rows of one sentence, padding attends to the sentence too, which keeps the mask small.
    """
    own = sentence[:, :, None] if layout.packed else jnp.zeros((1, 1, 1), jnp.int32)
    return (own == layout.sentence[:, None, :])[:, None]


def attend_in_blocks(
    query: Float[Array, "B h L d"], key: Float[Array, "B h L d"], value: Float[Array, "B h L d"], layout: Layout
) -> Float[Array, "B h L d"]:
    """The `Attention` of every device: up to 128 queries at a time, with all their weights, as `attend` has them."""
    length = query.shape[2]
    blocks = -(-length // SHORT)
    size = -(-length // blocks)

    def split(x: Array, axis: int) -> Array:
        whole = jnp.pad(x, [(0, (blocks * size - length) * (i == axis)) for i in range(x.ndim)])
        return jnp.moveaxis(whole.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    def attend_block(block: tuple[Array, Array]) -> Array:
        queries, sentence = block
        return attend(queries, key, value, allowed_keys(sentence, layout), None, 0.0)

    contexts = jnp.moveaxis(jax.lax.map(attend_block, (split(query, 2), split(layout.sentence, 1))), 0, 2)
    return contexts.reshape(*query.shape[:2], blocks * size, query.shape[3])[:, :, :length]


def fused_attention(mesh: Mesh) -> Attention:
    """The fastest `Attention` that is right on some devices.

    On GPUs this is cuDNN's kernel, which takes bfloat16 and float16; on TPUs it is JAX's flash attention. Before either
    is used for rows of a length, it computes two of them. One that the device refuses, or that does not agree there
    with `attend_in_blocks`, is not used, and a line says so. Nor is any in a job of several processes, which might
    decide differently.

    Args:
      mesh: the devices. Rows are split over all of its axes.
    """
    kernel = _KERNELS.get(mesh.devices.flat[0].platform)
    return partial(_attend, kernel, mesh) if kernel and jax.process_count() == 1 else attend_in_blocks


Kernel = Callable[[bool, Array, Array, Array, Array], Array]
"""An `Attention` of one device, which gets whether rows are packed, and of the layout the sentences of the tokens."""


def _attend(kernel: Kernel, mesh: Mesh, query: Array, key: Array, value: Array, layout: Layout) -> Array:
    what = (kernel, mesh.local_devices[0], *query.shape[1:], layout.packed, query.dtype.name)
    if what not in _FOUND:
        problem = _problem(*what)
        if problem:
            warn(f"attention over {query.shape[2]} tokens goes without the kernel of {what[1].device_kind}: {problem}")
        if not is_out_of_memory(problem):  # which says nothing of the kernel
            _FOUND[what] = not problem
    return (partial(_by_row, kernel, mesh) if _FOUND.get(what) else attend_in_blocks)(query, key, value, layout)


def _by_row(kernel: Kernel, mesh: Mesh, query: Array, key: Array, value: Array, layout: Layout) -> Array:
    rows = PartitionSpec(mesh.axis_names)
    each = jax.shard_map(partial(kernel, layout.packed), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return each(query, key, value, layout.sentence)


def _cudnn(packed: bool, query: Array, key: Array, value: Array, sentence: Array) -> Array:
    mask = (sentence[:, :, None] == sentence[:, None, :])[:, None] if packed else None
    # Lengths, unlike a mask, take no memory. A row without tokens would have nothing to attend to.
    lengths = None if packed else jnp.maximum(jnp.sum(sentence == 0, axis=1, dtype=jnp.int32), 1)
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    context = jax.nn.dot_product_attention(
        query, key, value, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return context.swapaxes(1, 2)


def _flash(packed: bool, query: Array, key: Array, value: Array, sentence: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    length = query.shape[2]
    over = -length % 128  # the kernel's own block
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, over), (0, 0))) for x in (query, key, value))
    ids = jnp.pad(sentence, ((0, 0), (0, over)), constant_values=-1)
    context: Array = flash_attention(
        query, key, value, segment_ids=SegmentIds(ids, ids), sm_scale=query.shape[3] ** -0.5
    )
    return context[:, :, :length]


_KERNELS: dict[str, Kernel] = {"gpu": _cudnn, "tpu": _flash}


_FOUND: dict[Any, bool] = {}
"""Whether a kernel works, by what `_problem` is asked."""


def _problem(kernel: Kernel, device: jax.Device, heads: int, length: int, size: int, packed: bool, dtype: str) -> str:
    """What speaks against a kernel on a device, for rows of a length: its refusal, or another result than that of
    `attend_in_blocks`. Empty where nothing does."""
    batch = np.random.default_rng(0).standard_normal((3, 2, heads, length, size)).astype(dtype)
    place = jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=SingleDeviceSharding(device))
    lengths = [[length // 3, length // 2, 1], [length, 0, 0]] if packed else [[length - 8], [3]]

    def difference(batch: Array) -> Array:
        query, key, value = batch
        layout = lay_out(jnp.array(lengths), length)
        return kernel(packed, query, key, value, layout.sentence) - attend_in_blocks(query, key, value, layout)

    try:
        # Compiled on its own: what is called here by name would become part of the program that asks.
        found = np.asarray(jax.jit(difference).lower(place).compile()(batch), np.float32)
    except Exception as error:  # of JAX, XLA and the kernel's library, which have types of their own
        return reason(error)
    tokens = np.arange(length) < np.sum(lengths, axis=1)[:, None]
    off = float(np.abs(found).max(axis=(1, 3))[tokens].max())
    # 16 bits of averages of N(0, 1), as TPUs multiply float32 too; a mask that is lost moves them by 1.
    return "" if off < 0.05 else f"its result is off by {off:.2g}"
