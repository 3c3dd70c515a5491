"""Plans as a table."""

from typing import Any

from simcse_jax.plan.plan import Plan
from simcse_jax.runtime.mesh import layout
from simcse_jax.xla.collectives import Collective

_HEAD = (
    *("topology", "devices", "batch", "chunk", "InfoNCE", "memory", "of GB", "fits", "kernels", "moved GB"),
    *("GFLOP", "sent MB"),
    *("compute", "memory", "communic.", "step ms", "pairs/s"),
)


def format_plans(plans: list[Plan]) -> str:
    """One table of all plans, and the collectives of each."""
    rows = [_HEAD, *map(_row, plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows]
    lines.append(
        "Figures of one device and one step. Times in ms at the hardware's limit: a lower bound, not measured."
    )
    for p in plans:
        mesh = layout({"dcn": p.dcn, "data": p.data, "fsdp": p.fsdp})
        lines.append(f"\n{p.topology}, batch {p.batch_size:,}, mesh {mesh}: collectives per step")
        sums = [f"{name} {t.bytes / 1e6:,.3f} MB in {t.seconds * 1e3:,.2f} ms" for name, t in p.networks.items()]
        lines += [f"  a device sends by {', by '.join(sums)} or more"] * bool(sums)
        lines += _collective_lines(p) or ["  none" if p.memory else "  not known: the step does not fit"]
    return "\n".join(lines)


def _row(p: Plan) -> tuple[str, ...]:
    def number(value: float | int | None, scale: float, digits: int) -> str:
        return "?" if value is None else f"{value / scale:,.{digits}f}"

    launched = p.work.kernels if p.work else None
    moved = p.work.bytes if p.work else None
    limits = [p.seconds.get(name) for name in ("compute", "memory", "communication")]
    return (
        *(p.topology, f"{p.devices:,}", f"{p.batch_size:,}", f"{p.micro_batch:,}", "tiled" if p.tiled else "dense"),
        *(number(p.memory_needed, 1e9, 2), number(p.memory_limit, 1e9, 2)),
        {True: "yes", False: "NO", None: "?"}[p.fits],
        *(number(launched, 1.0, 0), number(moved, 1e9, 1)),
        *(number(sum(p.flops.values()), 1e9, 1), number(p.sent if p.memory else None, 1e6, 1)),
        *(number(value, 1e-3, 2) for value in (*limits, p.step_seconds)),
        number(p.pairs_per_second, 1.0, 0),
    )


def _collective_lines(p: Plan) -> list[str]:
    """The collectives, largest first: one line per kind, group size and number of runs."""
    together: dict[tuple[Any, ...], list[Collective]] = {}
    for c in p.collectives:
        used = (name for name, sent in zip(p.networks, c.by_network(p.devices // p.slices), strict=False) if sent)
        by = f" by {' and '.join(used)}" if p.slices > 1 and p.networks else ""
        together.setdefault((c.kind, len(c.group), c.count, c.overlapped, by), []).append(c)
    lines = []
    for (kind, group, count, overlapped, by), members in sorted(
        together.items(), key=lambda item: -sum(c.bytes * (c.count or 1) for c in item[1])
    ):
        times = "? times" if count is None else f"{count * len(members)} ×"
        mean = sum(c.bytes for c in members) / len(members) / 1e6
        sent = sum(c.sent for c in members) * (count or 1) / 1e6
        lines.append(
            f"  {kind:<18} over {group:>4}: {times:>7} {mean:,.3f} MB on average, a device sends {sent:,.3f} MB{by}"
            f"{', while it computes' if overlapped else ''}"
        )
    return lines
