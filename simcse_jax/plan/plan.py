"""A run on devices that are not here: its train step compiled for them, and a roofline of the hardware's limits."""

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from simcse_jax.config import Config
from simcse_jax.data.batch import Packing
from simcse_jax.data.columns import MOST
from simcse_jax.errors import InputError, reason
from simcse_jax.model import EncoderConfig, read_encoder_config
from simcse_jax.model.build import build_model
from simcse_jax.objectives import check_objective
from simcse_jax.objectives.mlm import Vocabulary
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.pooling import Pooling, settled
from simcse_jax.runtime.compilation_cache import without_cache
from simcse_jax.runtime.mesh import check_batch_size, make_mesh
from simcse_jax.training.compiled_step import Memory, fit_step
from simcse_jax.training.loss import uses_tiles
from simcse_jax.training.spec import StepSpec
from simcse_jax.xla.collectives import Collective, collectives
from simcse_jax.xla.hlo import parse
from simcse_jax.xla.topology import Topology, devices_of, parse_topology
from simcse_jax.xla.work import Work, work

_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
_ROBERTA = {
    **{"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    **{"pad_token_id": 1, "layer_norm_eps": 1e-5},
}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
PUBLISHED = {
    "bert-base-uncased": _BERT | _BASE,
    "bert-large-uncased": _BERT | _LARGE,
    "roberta-base": _ROBERTA | _BASE,
    "roberta-large": _ROBERTA | _LARGE,
}
"""Sizes of the encoders of the published runs, from their config.json files: a plan asks no hub."""


@dataclass(frozen=True)
class Traffic:
    """What one device sends over one network in a step."""

    bytes: float
    """A loop of unknown length counts once."""
    seconds: float
    """The least time that takes."""


@dataclass(frozen=True)
class Plan:
    """The cost of one step of a run on one topology.

    The times are a roofline: the least that the step takes if the hardware works at its peak all the time and the three
    below overlap completely. No step is faster. The times are computed, not measured.

    - compute: FLOPs of matrix products over the peak for their arithmetic; all else counts as free.
    - memory: state and batch read once and written once; activations are left out.
    - communication: the bytes that a device sends in all collectives (`Collective.by_network`), inside its slice or
      node over all its links (a permute: over one), and between slices or nodes over its share of the network; the
      slower of the two. Latency counts as nothing.
    """

    topology: str
    devices: int
    data: int
    fsdp: int
    batch_size: int
    columns: int
    """Sentences per example, as in the training text."""
    micro_batch: int
    """Examples that each device encodes at a time."""
    tiled: bool
    """Whether InfoNCE is tiled, or holds all its logits at once."""
    compile_seconds: float
    memory: Memory | None
    """None if the compiler gave up because the step does not fit."""
    memory_needed: int | None
    """Bytes on one device; None if the compiler gave up without a figure."""
    memory_limit: int | None
    """Bytes that one device has for a program; None on CPUs, which share their memory."""
    flops: dict[str, float]
    """Matrix-product FLOPs of one device, by arithmetic."""
    work: Work | None
    """The kernels that one device launches, the bytes that it moves and its FLOPs, as compiled; None if the step does
    not fit, or if the length of a loop is not known."""
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]
    """`compute`, `memory` and `communication`; empty if no peak is known or the step does not fit."""
    dcn: int = 1
    slices: int = 1
    """TPU slices or nodes of GPUs."""
    networks: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    """By network: ICI and DCN of TPUs; NVLink or PCIe of GPUs, and InfiniBand or Ethernet. Empty as `seconds`."""

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into the memory of a device; None if the size of that memory is not known."""
        if self.memory is None:
            return False
        return None if self.memory_limit is None else self.memory.total <= self.memory_limit

    @property
    def step_seconds(self) -> float | None:
        """The longest of the three times: a lower bound."""
        return max(self.seconds.values()) if self.seconds else None

    @property
    def pairs_per_second(self) -> float | None:
        """Examples per second at that bound, over all devices."""
        return self.batch_size / self.step_seconds if self.step_seconds else None

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one step; a loop of unknown length counts once."""
        return math.fsum(c.sent * (c.count or 1) for c in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        figures = dataclasses.asdict(self)
        for collective, values in zip(self.collectives, figures["collectives"], strict=True):
            del values["pairs"]
            by = collective.by_network(self.devices // self.slices)
            values |= {"group": len(collective.group), "sent": collective.sent}
            values["networks"] = dict(zip(self.networks, by, strict=False))
        derived = ("fits", "step_seconds", "pairs_per_second", "sent")
        figures |= {name: getattr(self, name) for name in derived}
        result: dict[str, Any] = json.loads(json.dumps(figures))
        return result


def check_plan(config: Config, topology: str, columns: int | None = None) -> tuple[Topology, int, Mesh, EncoderConfig]:
    """Checks a plan before anything is compiled. For arguments and errors see `plan`.

    Returns:
      The topology, sentences per example, the mesh, and the encoder's sizes.
    """
    config.validate()
    target = parse_topology(topology)
    columns = _columns(config) if columns is None else columns
    if not 1 <= columns <= MOST:
        raise InputError(
            f"columns is {columns}; an example has 1 (a sentence), 2 (a pair) or up to {MOST} (with hard negatives)"
        )
    if config.model.dtype == "float64" and target.chip:
        raise InputError(f"model.dtype is float64, for which {target.name} has no peak: use float32 or bfloat16")
    # CPUs are not in slices: the run cuts them.
    slices = target.slices if target.chip else None
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices_of(target), config.mesh.dcn, slices)
    check_batch_size(mesh, config.batch_size)
    encoder = _encoder_config(config.model.path)
    if config.data.max_length > encoder.max_length:
        raise InputError(
            f"data.max_length is {config.data.max_length} but {config.model.path} has positions for "
            f"{encoder.max_length} tokens: use at most that"
        )
    check_objective(config.objective, encoder.hidden_size)
    return target, columns, mesh, encoder


def plan(config: Config, topology: str, columns: int | None = None) -> Plan:
    """Compiles the train step of a run for a topology and reads its cost off the program. Nothing runs.

    Args:
      config: the run. Neither its training text nor its weights are read, and no hub is asked.
      topology: see `parse_topology`.
      columns: sentences per example, 1 to 10; by default the number of `data.columns`, or 1 for plain text.

    Raises:
      InputError: an unknown topology, a compiler that is not installed, or a run that does not fit the mesh or model.
    """
    target, columns, mesh, encoder = check_plan(config, topology, columns)
    limit = target.chip.memory if target.chip else None
    packing = None
    if length := config.data.packed_length:
        # The plan does not read the text: it takes every sentence to have the most tokens.
        slots = length // config.data.max_length
        packing = Packing(length, slots, -(-config.batch_size // (mesh.size * slots)))
    # The cost of a step does not depend on ids.
    vocabulary = Vocabulary(mask=0, special=(0,), size=encoder.vocab_size)
    model = build_model(encoder, settled(config.model, partial(_own_pooling, config.model.path)))
    guide = config.objective.negatives.guide
    spec = StepSpec(
        *(config, model, mesh, columns, max(config.max_steps, 1), vocabulary, packing),
        text_columns=columns,
        guide_width=_encoder_config(guide, "objective.negatives.guide").hidden_size if guide else 0,
    )
    options = dict(target.chip.options) if target.chip else {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as dump:
        if target.chip and target.chip.sparse_cores:
            options |= {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            step = fit_step(
                spec,
                limit,
                compiler_options=options or None,
                # JAX's cache can store a program for a device that is not here, but not load it.
                context=without_cache if target.chip else contextlib.nullcontext,
            )
        except jax.errors.JaxRuntimeError as error:
            raise InputError(f"the compiler of {target.name} refuses the step: {reason(error)}") from error
        seconds = time.monotonic() - started
        program = parse(text_of(step.executable, Path(dump))) if step.executable else None
    if step.flops is None:
        raise InputError(f"the loss {config.objective.loss} has a loop of unknown length: its FLOPs cannot be counted")
    flops = {kind: count / mesh.size for kind, count in step.flops.items()}
    found = tuple(collectives(program)) if program else ()
    networks = traffic(target, found) if step.memory else {}
    return Plan(
        topology=target.name,
        devices=mesh.size,
        data=mesh.shape["data"],
        fsdp=mesh.shape["fsdp"],
        batch_size=config.batch_size,
        columns=columns,
        micro_batch=step.micro_batch,
        tiled=uses_tiles(config, mesh, columns),
        compile_seconds=seconds,
        memory=step.memory,
        memory_needed=step.needed,
        memory_limit=limit,
        flops=flops,
        work=work(program) if program else None,
        collectives=found,
        seconds=roofline(target, step.memory, flops, networks) if step.memory else {},
        dcn=mesh.shape["dcn"],
        slices=target.slices,
        networks=networks,
    )


def text_of(executable: jax.stages.Compiled, dump: Path) -> str:
    """The text of a program. What calls SparseCores JAX 0.10 cannot read, but its compiler has written it to `dump`."""
    try:
        return executable.as_text() or ""
    except jax.errors.JaxRuntimeError:
        written = sorted(dump.glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_mtime_ns)
        if not written:
            raise
        return written[-1].read_text()


def _columns(config: Config) -> int:
    if config.data.columns:
        return len(config.data.columns)
    if config.data.train.lower().removesuffix(".gz").endswith(".txt"):
        return 2 if config.data.neighbours or config.data.augment != "none" else 1
    raise InputError(
        f"data.columns is empty and {config.data.train} is not read here: say with --columns whether an example is a "
        "sentence (1), a pair (2) or has hard negatives (3 or more)"
    )


def _encoder_config(path: str, name: str = "model.path") -> EncoderConfig:
    if path in PUBLISHED:
        return read_encoder_config(PUBLISHED[path])
    if Path(path).expanduser().is_dir():
        return read_checkpoint(path).config
    raise InputError(f"{name} '{path}' is not a folder: give one that holds a config.json, or {', '.join(PUBLISHED)}")


def _own_pooling(path: str) -> Pooling | None:
    return None if path in PUBLISHED else read_checkpoint(path).pooling


def traffic(target: Topology, found: tuple[Collective, ...]) -> dict[str, Traffic]:
    """What a device sends in one run of a program, by network. See `Plan`."""
    chip = target.chip
    if chip is None:
        return {}
    sent = [(c, [n * (c.count or 1) for n in c.by_network(target.node)]) for c in found]
    inside = sum(n * (chip.links if c.kind == "collective-permute" else 1) for c, (n, _) in sent)
    totals = [math.fsum(n[i] for _, n in sent) for i in range(2)]
    known = {chip.networks[0]: Traffic(totals[0], inside / chip.interconnect)}
    return known | ({chip.networks[1]: Traffic(totals[1], totals[1] / chip.network)} if target.slices > 1 else {})


def roofline(
    target: Topology, memory: Memory, flops: dict[str, float], networks: dict[str, Traffic]
) -> dict[str, float]:
    """See `Plan`."""
    chip = target.chip
    if chip is None:
        return {}
    return {
        "compute": math.fsum(count / chip.flops[kind] for kind, count in flops.items()),
        "memory": (memory.arguments + memory.outputs) / chip.bandwidth,
        "communication": max(used.seconds for used in networks.values()),
    }
