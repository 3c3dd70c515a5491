"""`simcse-jax serve` beside clients that mean it harm: the latency of others, memory, files, log and end."""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.compare import Disagreement
from benchmarks.report import Row, Table
from benchmarks.serve import memory, quantile, query, search, service

_VALID = 4  # clients that search one after the other
_PAUSE = 0.05  # seconds between two searches of a client


@dataclass(frozen=True)
class Hostile:
    """Searches on loopback, alone and beside clients that mean the service harm, in turn."""

    minutes: float = 10.0
    """Minutes of load, half of it hostile."""
    seconds: float = 30.0
    """Seconds of each turn."""
    vectors: int = 20_000
    """Vectors of the index, of the model's width."""

    def quick(self) -> "Hostile":
        """The same part at the size of a rehearsal."""
        return replace(self, minutes=0.4, seconds=12.0, vectors=500)

    def run(self, folder: Path) -> list[Table]:
        """Measures.

        Raises:
          Disagreement: a search was not answered, or a hostile request got an answer that is not meant for it.
        """
        from simcse_jax.data.demo import minilm_folder

        model, index, log = minilm_folder(), folder / "index", folder / "log"
        code = "import sys; from benchmarks.serve import write_index; write_index(*sys.argv[1:])"
        subprocess.run([sys.executable, "-c", code, str(model), str(index), str(self.vectors)], check=True)
        got: dict[str, Counter[str]] = {}
        alone, beside, resident, longest = [], [], [], 0
        with service(str(model), str(index), log=log) as (process, host, port, _):
            asyncio.run(_searches(host, port, 2.0, 0))
            files = _files(process)
            for turn in range(max(1, round(self.minutes * 30 / self.seconds))):
                alone.append(asyncio.run(_searches(host, port, self.seconds, 2 * turn)))
                found, latencies = _under_attack(host, port, self.seconds, 2 * turn + 1)
                beside.append(latencies)
                longest = max(longest, found["longest"])
                for name, statuses in found["got"].items():
                    got.setdefault(name, Counter()).update(statuses)
                resident.append(memory(process, "VmRSS"))
            left = _files(process)
            # The end comes in the middle of it all.
            command = [sys.executable, "-m", "benchmarks.hostile_clients", str(port), "4"]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL):
                time.sleep(2)
                begun = time.perf_counter()
                process.terminate()
                process.wait(60)
                ending = time.perf_counter() - begun
        lines = len(log.read_text().splitlines())
        rows, notes = [], []
        figures: dict[str, Any] = {
            "got": {name: dict(statuses) for name, statuses in got.items()},
            "resident": resident,
            "files": [files, left],
            "lines": lines,
        }
        figures |= {"ending": ending, "longest": longest}
        medians: list[float] = []
        for name, turns in (("searches alone", alone), ("beside hostile clients", beside)):
            halves = [quantile(sorted(turn), 0.5) for turn in turns]
            everything = sorted(latency for turn in turns for latency in turn)
            ratios = [half / first for half, first in zip(halves, medians, strict=True)] if medians else []
            medians = medians or halves
            rows.append(Row(name, halves, ratios, items=1))
            figures[name] = {p: quantile(everything, p / 100) for p in (50, 99, 100)}
            said = ", ".join(f"p{p} {1000 * seconds:.0f} ms" for p, seconds in figures[name].items())
            notes.append(f"{name}: {len(everything):,} searches, all answered; {said}.")
        requests = sum(sum(statuses.values()) for statuses in got.values())
        half = (
            statistics.median(resident[: max(1, len(resident) // 2)]),
            statistics.median(resident[len(resident) // 2 :]),
        )
        notes += [
            f"{requests:,} hostile requests and connections; {longest / 2**20:.1f} MiB of an endless body at most.",
            f"Memory after the first turn {resident[0] / 1e6:.0f} MB, after the last {resident[-1] / 1e6:.0f} MB "
            f"(median of the first half {half[0] / 1e6:.0f} MB, of the second {half[1] / 1e6:.0f} MB).",
            f"Open files: {files} before, {left} after. Lines in the log: {lines}. "
            f"Ended {ending:.1f} s after SIGTERM, in the middle of hostile load.",
            "; ".join(f"{name}: {_said(statuses)}" for name, statuses in got.items()) + ".",
        ]
        title = f"Search through HTTP, {_VALID} clients, {self.vectors:,} vectors, all-MiniLM-L6-v2"
        return [Table(title, rows, "searches", notes, figures)]


def _said(statuses: Counter[str]) -> str:
    return ", ".join(f"{number:,} × {status if status != '0' else 'closed'}" for status, number in statuses.items())


def _under_attack(host: str, port: int, seconds: float, turn: int) -> tuple[dict[str, Any], list[float]]:
    """What the hostile clients got, and the latencies of searches beside them."""
    command = [sys.executable, "-m", "benchmarks.hostile_clients", str(port), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attack:
        latencies = asyncio.run(_searches(host, port, seconds, turn))
        said, _ = attack.communicate(timeout=60 + seconds)
    if attack.returncode:
        raise Disagreement(f"the hostile clients ended with status {attack.returncode}")
    found: dict[str, Any] = json.loads(said)
    if found["unexpected"]:
        raise Disagreement(f"hostile requests got other answers than are meant for them: {found['unexpected']}")
    return found, latencies


async def _searches(host: str, port: int, seconds: float, turn: int) -> list[float]:
    """Latencies of a few clients, each of which searches, waits for the answer, pauses, and searches again."""
    end, latencies = time.perf_counter() + seconds, list[float]()

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            latencies.append(await search(host, port, query(turn * 100_000 + len(latencies) * _VALID + number)))
            await asyncio.sleep(_PAUSE)

    await asyncio.gather(*map(client, range(_VALID)))
    return latencies


def _files(process: subprocess.Popen[str]) -> int:
    """Number of open files of a process, once its connections have gone."""
    time.sleep(1)
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
