"""The input pipeline: tokenising, batches from the token cache, and the time that a training loop waits for them."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.compare import compare
from benchmarks.report import Row, Table
from benchmarks.step import Step
from benchmarks.timing import spread
from benchmarks.work import QUICK, SEED, bert_folder, data_root, token_table, training_text
from benchmarks.worker import Contender, Worker
from simcse_jax.data.order import EpochOrder


@dataclass(frozen=True)
class Input:
    """Text to batches, on Wikipedia or, without SIMCSE_DATA, on made-up sentences."""

    step: Step = field(default_factory=Step)
    """Training loop whose waits for its input are measured."""
    sentences: int = 100_000
    steps: int = 8
    """Number of steps of that loop."""
    rounds: int = 5
    copies: int = 0
    """Bring this many copies of all the text to batches instead, once, and name the memory that each stage takes."""
    hosts: int = 1
    """With copies: processes, joined over loopback, that do so together."""

    def quick(self) -> "Input":
        """The same part at the size of a rehearsal."""
        return replace(self, step=self.step.quick(), sentences=2000, steps=4, rounds=2)

    def run(self, folder: Path) -> list[Table]:
        """Measures; for the argument and errors see `Step.run`."""
        kind = "wiki" if "SIMCSE_DATA" in os.environ else "padded"
        if self.copies:
            return [self._scale(bert_folder(QUICK, folder), folder)]
        model = bert_folder(self.step.size, folder)
        text = training_text(kind, self.sentences, self.step.length, folder)  # type: ignore[arg-type]
        return [self._tokenising(model, text), self._batches(model, text, folder / "cache"), self._waits(folder)]

    def _tokenising(self, model: Path, text: Path) -> Table:
        arguments = {"model": str(model), "text": str(text), "length": self.step.length}
        contenders = {
            "ours, cache written": Contender("ours_input:Tokens", arguments),
            "tokenizers alone": Contender("peers_input:Tokens", arguments),
        }
        rows, figures, _ = compare(contenders, self.rounds, tolerance=0)
        note = f"The same {figures['tokens']:,.0f} tokens; ours also hashes the text and writes them to disk."
        title = f"Tokenising {self.sentences:,} sentences, cut to {self.step.length} tokens"
        return Table(title, [replace(row, items=self.sentences) for row in rows], notes=[note])

    def _batches(self, model: Path, text: Path, cache: Path) -> Table:
        table = token_table(model, text, self.step.length, cache)
        batch_size = self.step.batch_size
        order = EpochOrder(len(table), batch_size, SEED)
        shuffled = np.concatenate([order.examples(step) for step in range(order.steps_per_epoch)]).tolist()
        lists = [table.ids[a:b].tolist() for a, b in zip(table.offsets[:-1], table.offsets[1:], strict=True)]
        shared = {"model": str(model), "batch_size": batch_size}
        ours = {"text": str(text), "length": self.step.length, "cache": str(cache)}
        contenders = {
            "ours, from the cache": Contender("ours_input:Batches", shared | ours),
            "DataLoader, from memory": Contender(
                "peers_input:Batches", shared | {"sentences": lists, "order": shuffled}
            ),
        }
        rows, _, _ = compare(contenders, self.rounds, tolerance=0)
        note = "The same tokens in the same order, on the host, by one thread. The loader's sentences are tokenised."
        title = f"Batches of {batch_size} from {len(table):,} tokenised sentences"
        return Table(title, [replace(row, items=len(table)) for row in rows], notes=[note])

    def _scale(self, model: Path, folder: Path) -> Table:
        if "SIMCSE_DATA" in os.environ:
            text = data_root() / "wiki" / "wiki_en_1m.txt.gz"
        else:
            text = training_text("padded", self.sentences, self.step.length, folder)
        (folder / "copies").mkdir()
        for copy in range(self.copies):
            (folder / "copies" / f"{copy:03}-{text.name}").symlink_to(text)
        places = {"model": str(model), "text": str(folder / "copies"), "cache": str(folder / "cache")}
        arguments = places | {"length": self.step.length, "batch_size": self.step.batch_size}
        stages = {
            "the text hashed": "hash",
            "read, not tokenised": "read",
            "tokenised into the cache": "tokenise",
            "the cache found again and compared with its manifest": "tokenise",
            "the order of an epoch": "order",
            "its batches": "batches",
            "a run of 4 steps of a small model": "train",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            job = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{1}".format(*free.getsockname())}
        job |= {"JAX_NUM_PROCESSES": str(self.hosts), "JAX_NUM_CPU_DEVICES": "1"}
        own = [job | {"JAX_PROCESS_ID": str(host)} if self.hosts > 1 else {} for host in range(self.hosts)]

        def start(host: int) -> Worker:
            return stack.enter_context(Worker(f"host {host}", Contender("ours_input:Scale", arguments, own[host])))

        rows = []
        with ExitStack() as stack, ThreadPoolExecutor(self.hosts) as threads:
            workers = list(threads.map(start, range(self.hosts)))
            processor = [workers[0].call("processor")]
            for name, stage in stages.items():
                seconds = list(threads.map(lambda worker, stage=stage: worker.timed(stage), workers))
                peak = max(worker.call("peak") for worker in workers)
                rows.append(Row(name, [max(seconds)], peak=peak))
                processor.append(workers[0].call("processor"))
            sentences = workers[0].call("sentences")
        size = sum(path.stat().st_size for path in (folder / "cache").rglob("*.bin"))
        note = f"The cache has {size / 1e6:,.0f} MB. Memory is the most that a host has held up to that stage."
        taken = zip(rows, np.diff(processor, axis=0) / sentences * 1e6, strict=True)
        each = ", ".join(f"{own:.2f} and {every:.2f} ({row.name})" for row, (own, every) in taken)
        of_threads = f"Microseconds of a processor per sentence, of the first host's own thread and of all: {each}."
        title = f"{sentences:,} sentences from text to batches of {self.step.batch_size}, {self.hosts} host(s)"
        return Table(title, [replace(row, items=sentences) for row in rows], notes=[note, of_threads])

    def _waits(self, folder: Path) -> Table:
        work = self.step.work(folder)
        with Worker("loop", work.ours()) as worker:
            worker.call("run")
            measured = [worker.call("waits", self.steps) for _ in range(self.rounds)]
            peak = worker.call("peak")
        shares = [100 * waited / total for waited, total in measured]
        row = Row(f"ours, {self.steps} steps", [total for _, total in measured], peak=peak)
        row = replace(row, items=work.sentences * self.steps)
        note = f"Of this the loop waits {spread(shares, 3)} % for its batches, which a thread loads ahead of time."
        return Table("Training loop with its input", [row], notes=[note], figures={"share of waiting, %": shares})
