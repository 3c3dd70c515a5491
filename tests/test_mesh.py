"""The mesh: which devices lie beside each other in it, and what does not fit."""

from typing import Any
from unittest.mock import Mock

import jax
import pytest

from simcse_jax.errors import InputError
from simcse_jax.runtime.mesh import check_batch_size, layout, make_mesh


def nodes(*sizes: int) -> list[Any]:
    """GPUs of nodes of these sizes, not in order."""
    places = [node for node, size in enumerate(sizes) for _ in range(size)]
    known = {"platform": "gpu", "device_kind": "NVIDIA H200", "process_index": 0}
    return [Mock(spec=jax.Device, id=n, slice_index=node, **known) for n, node in enumerate(places)][::-1]


def rows(mesh: Any, axis: str) -> list[set[int]]:
    """The nodes in each row along all axes but one."""
    places = list(mesh.axis_names).index(axis)
    return [{gpu.slice_index for gpu in part.flat} for part in mesh.devices.swapaxes(0, places)]


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_a_slice_is_one_row_of_dcn(fsdp: int) -> None:
    mesh = make_mesh(fsdp=fsdp, devices=nodes(4, 4, 4), dcn=3)
    assert dict(mesh.shape) == {"dcn": 3, "data": 4 // fsdp, "fsdp": fsdp}
    assert rows(mesh, "dcn") == [{0}, {1}, {2}]
    assert [gpu.id for gpu in mesh.devices.flat] == list(range(12))


def test_nodes_without_dcn_are_neighbours_in_data() -> None:
    mesh = make_mesh(fsdp=2, devices=nodes(4, 2))
    assert dict(mesh.shape) == {"dcn": 1, "data": 3, "fsdp": 2}
    assert rows(mesh, "data") == [{0}, {0}, {1}]


def test_cpus_are_cut_in_order() -> None:
    cpus = jax.devices()
    mesh = make_mesh(fsdp=2, devices=cpus, dcn=2)
    assert list(mesh.devices.flat) == cpus
    assert layout(mesh.shape) == "dcn 2 × data 2 × fsdp 2"
    assert layout(make_mesh(devices=cpus).shape) == "data 8 × fsdp 1"
    with pytest.raises(InputError, match=r"12 cannot be split over 8 devices \(dcn 2 × data 2 × fsdp 2\)"):
        check_batch_size(mesh, 12)


@pytest.mark.parametrize(
    ("sizes", "axes", "message"),
    [
        ((4, 4), {"dcn": 4}, r"mesh.dcn is 4 but the 8 devices lie in 2 slice\(s\) of 4"),
        ((8,), {"dcn": 2}, r"mesh.dcn is 2 but the 8 devices lie in 1 slice\(s\) of 8"),
        ((4, 2), {"dcn": 2}, r"mesh.dcn is 2 but the 6 devices lie in 2 slice\(s\) of 2 or 4"),
        ((4, 4), {"fsdp": 8, "dcn": 2}, "mesh dcn 2 × data -1 × fsdp 8 does not fit 8 devices"),
        ((4, 4), {"dcn": 3}, "mesh dcn 3 × data -1 × fsdp 1 does not fit 8 devices"),
        ((4, 4), {"dcn": -1}, "mesh dcn -1 × data -1 × fsdp 1 does not fit 8 devices"),
        ((4, 4), {"data": 8, "dcn": 2}, "mesh dcn 2 × data 8 × fsdp 1 does not fit 8 devices"),
    ],
)
def test_what_does_not_fit_is_refused(sizes: tuple[int, ...], axes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_mesh(devices=nodes(*sizes), **axes)


@pytest.mark.parametrize(("sizes", "fsdp"), [((4, 4), 8), ((1, 1, 1, 1), 2), ((4, 2), 3)])
def test_parameters_may_be_split_over_slices_that_count_as_one(sizes: tuple[int, ...], fsdp: int) -> None:
    mesh = make_mesh(fsdp=fsdp, devices=nodes(*sizes))
    assert dict(mesh.shape) == {"dcn": 1, "data": sum(sizes) // fsdp, "fsdp": fsdp}
    assert [d.slice_index for d in mesh.devices.flat] == sorted(d.slice_index for d in nodes(*sizes))
