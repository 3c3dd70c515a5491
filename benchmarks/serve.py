"""`simcse-jax serve` under load: many searches at once over a large index, and one after the other."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.compare import Disagreement
from benchmarks.report import Row, Table

_WORDS = (
    *("man", "woman", "dog", "market", "river", "city", "music", "storm", "doctor", "train", "garden", "law"),
    *("plays", "follows", "builds", "sees", "leaves", "wins", "opens", "an old", "a new", "the first", "every", "no"),
)


@dataclass(frozen=True)
class Serve:
    """Searches on loopback through HTTP, one connection each; vectors are random, queries are encoded."""

    vectors: int = 1_000_000
    """Vectors of the index, of the model's width."""
    requests: int = 1000
    """Number of searches at once, all of different queries."""
    alone: int = 100
    """Number of searches one after the other."""
    rounds: int = 3
    max_seconds: float = 30.0
    """Time limit of the service: a slower search ends the run. Raise it where other work is going on."""

    def quick(self) -> "Serve":
        """The same part at the size of a rehearsal."""
        return replace(self, vectors=2000, requests=40, alone=5, rounds=1)

    def run(self, folder: Path) -> list[Table]:
        """Measures.

        Raises:
          Disagreement: a search was not answered.
        """
        from simcse_jax.data.demo import minilm_folder
        from simcse_jax.runtime.open_files import allow_open_files

        model, index = minilm_folder(), folder / "index"
        # In a process of its own, which frees its memory before the service needs it.
        code = "import sys; from benchmarks.serve import write_index; write_index(*sys.argv[1:])"
        subprocess.run([sys.executable, "-c", code, str(model), str(index), str(self.vectors)], check=True)
        allow_open_files()
        with service(str(model), str(index), "--max-seconds", str(self.max_seconds)) as (process, host, port, start):
            before = memory(process, "VmRSS")
            single = [asyncio.run(search(host, port, query(n))) for n in range(self.alone)]
            rounds = []
            for number in range(self.rounds):
                begun = time.perf_counter()
                latencies = asyncio.run(_at_once(host, port, self.requests, (number + 1) * self.requests))
                rounds.append((time.perf_counter() - begun, sorted(latencies)))
            peak = memory(process, "VmHWM")
        together = f"{self.requests:,} at once"
        notes = [f"Ready {start:.1f} s after the start; {before / 1e9:.2f} GB then. Seconds until an answer:"]
        figures: dict[str, Any] = {"start": start, "memory_before": before}
        for name, times in (("one at a time", [sorted(single)]), (together, [latencies for _, latencies in rounds])):
            quantiles = {p: [quantile(t, p / 100) for t in times] for p in (50, 99, 100)}
            said = ", ".join(f"p{p} {' / '.join(f'{q:.3f}' for q in qs)}" for p, qs in quantiles.items())
            notes.append(f"{name}: {said}.")
            figures[name] = quantiles
        rows = [
            Row(together, [seconds for seconds, _ in rounds], items=self.requests, peak=peak),
            Row("one at a time", single, items=1),
        ]
        title = f"Search through HTTP: {self.vectors:,} vectors, all-MiniLM-L6-v2, top 10"
        return [Table(title, rows, "searches", notes, figures)]


def write_index(model: str, folder: str, vectors: str) -> None:
    """Saves an index of random unit vectors. The first and last are the model's, so that the service accepts it."""
    import numpy as np

    from simcse_jax import SimCSE
    from simcse_jax.inference.index import Index

    sentences = ["a", *(f"sentence {number}" for number in range(1, int(vectors)))]
    checked = [0, -1]  # the shortest and the longest
    known = np.asarray(SimCSE(model).encode([sentences[number] for number in checked]))
    drawn = np.random.default_rng(0).standard_normal((len(sentences), known.shape[1]), np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    drawn[checked] = known
    Index(sentences, drawn).save(folder)


def query(number: int) -> str:
    """A made-up sentence of six words, different for each number."""
    return " ".join(_WORDS[number // len(_WORDS) ** place % len(_WORDS)] for place in range(6))


@contextmanager
def service(
    model: str, index: str, *options: str, log: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], str, int, float]]:
    """Runs the command in a process of its own: gives the process, host, port, and the seconds until it was ready.

    Its stderr goes to `log`, where that is given.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "simcse_jax", "serve", model, index, "--port", "0", *options]
    with (
        log.open("w") if log else nullcontext() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            address = next((line.split()[1] for line in process.stdout if line.startswith("ready: ")), None)
            if address is None:
                raise Disagreement(f"the service ended with status {process.wait()} before it was ready")
            host, port = address.removeprefix("http://").split(":")
            yield process, host, int(port), time.perf_counter() - start
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    if process.returncode:
        raise Disagreement(f"the service ended with status {process.returncode}")


async def _at_once(host: str, port: int, requests: int, first: int) -> list[float]:
    return await asyncio.gather(*(search(host, port, query(first + number)) for number in range(requests)))


async def search(host: str, port: int, text: str) -> float:
    """Seconds until the answer. Plain sockets, because client libraries take longer for a request than the service."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps({"query": text, "top_k": 10})
    head = f"POST /api/search HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    answer = await reader.read()
    taken = time.perf_counter() - start
    writer.close()
    status, _, content = answer.partition(b"\r\n\r\n")
    if b" 200 " not in status.splitlines()[0] or len(json.loads(content)["results"][0]["hits"]) != 10:
        raise Disagreement(f"a search was not answered: {answer[:300]!r}")
    return taken


def quantile(ordered: list[float], share: float) -> float:
    """The least value that a share of all values does not exceed."""
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)]


def memory(process: subprocess.Popen[str], field: str) -> int:
    """Bytes in a field of Linux's account of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
