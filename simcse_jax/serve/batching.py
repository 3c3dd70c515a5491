"""Batching: concurrent requests share one call of the model."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Job = TypeVar("Job")
Answer = TypeVar("Answer")


class NotReady(Exception):
    """The service is still compiling programs, or is shutting down."""


class Overloaded(Exception):
    """The queue is full."""


class TooSlow(Exception):
    """The answer did not come in time."""


class Batcher(Generic[Job, Answer]):
    """Hands jobs to one worker thread; jobs that arrive together share a call.

    While the worker is busy, jobs wait in a bounded queue, first come first served, and the next call takes as many as
    it may. All of its methods belong to one event loop; only `work` and `prepare` run in the thread.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Job]], Sequence[Answer]],
        size: Callable[[Job], int],
        batch: int,
        max_queue: int,
        gather: float,
        max_seconds: float,
    ) -> None:
        """Prepares; nothing runs before `start`.

        Args:
          work: answers several jobs, in their order.
          size: size of a job, counted in a batch and in the queue.
          batch: most jobs, by size, in a call of `work`; a single job may exceed it.
          max_queue: most jobs, by size, that may wait.
          gather: seconds that an idle worker waits for more jobs.
          max_seconds: most seconds that a job waits for its answer.
        """
        self._work, self._size = work, size
        self._batch, self._max_queue = batch, max_queue
        self._gather, self._max_seconds = gather, max_seconds
        self._queue: deque[tuple[Job, asyncio.Future[Answer]]] = deque()
        self._waiting = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.ready = False
        self.calls = 0

    def start(self, prepare: Callable[[], None], on_ready: Callable[[Exception | None], None]) -> None:
        """Begins to work after `prepare`, then calls `on_ready`: with None, or with the error that `prepare` raised."""
        self._task = asyncio.create_task(self._run(prepare, on_ready))

    async def stop(self) -> None:
        """Ends after the running call, whose jobs are answered; waiting jobs raise `NotReady`."""
        self.ready, self._stopping = False, True
        self._arrived.set()
        if self._task:
            await asyncio.gather(self._task, return_exceptions=True)
        for _, future in self._queue:
            if not future.done():
                future.set_exception(NotReady())
        self._queue.clear()
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, job: Job) -> Answer:
        """The answer to a job.

        Raises:
          NotReady: before `prepare` has ended, or after `stop`.
          Overloaded: the queue would exceed `max_queue`.
          TooSlow: no answer within `max_seconds`; a job that still waits is dropped.
          Exception: the error that `work` raised.
        """
        if not self.ready:
            raise NotReady
        size = self._size(job)
        if self._waiting + size > self._max_queue:
            raise Overloaded
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append((job, future))
        self._waiting += size
        self._arrived.set()
        try:
            async with asyncio.timeout(self._max_seconds):
                return await future
        except TimeoutError:
            raise TooSlow from None

    async def _run(self, prepare: Callable[[], None], on_ready: Callable[[Exception | None], None]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, prepare)
        except Exception as error:  # whatever it is: the command raises it
            on_ready(error)
            return
        if self._stopping:
            return
        self.ready = True
        on_ready(None)
        while True:
            await self._arrived.wait()
            if self._waiting < self._batch:
                await asyncio.sleep(self._gather)
            if self._stopping:
                return
            taken = self._take()
            if not taken:
                continue
            jobs = [job for job, _ in taken]
            self.calls += 1
            try:
                answers = await loop.run_in_executor(self._thread, self._work, jobs)
            except Exception as error:  # whatever it is: the callers of `submit` raise it
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), answer in zip(taken, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)

    def _take(self) -> list[tuple[Job, asyncio.Future[Answer]]]:
        """The next jobs, at most a batch together, or a single larger one; drops jobs that were given up."""
        taken: list[tuple[Job, asyncio.Future[Answer]]] = []
        room = self._batch
        while self._queue:
            job, future = self._queue[0]
            size = self._size(job)
            if taken and size > room and not future.done():
                break
            self._queue.popleft()
            self._waiting -= size
            if not future.done():
                taken.append((job, future))
                room -= size
        if not self._queue:
            self._arrived.clear()
        return taken
