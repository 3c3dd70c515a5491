"""Batching: concurrent requests share one call of the model."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Job = TypeVar("Job")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


class NotReady(Exception):
    """The service does not take requests: it compiles, a call hangs, or it is shutting down. The text says which."""


class Overloaded(Exception):
    """The queue is full."""


class TooSlow(Exception):
    """The answer did not come in time."""


class Batcher(Generic[Job, Answer]):
    """Hands jobs to one worker thread; jobs that arrive together share a call.

    While the worker is busy, jobs wait in a bounded queue, first come first served, and the next call takes as many as
    it may. Where a call fails, each of its jobs is called alone, so that one job's fault is no other's. All of its
    methods belong to one event loop; only `work` and `prepare` run in the thread.
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
          max_seconds: most seconds that a job waits for its answer. A call that takes longer hangs: no job is taken
            before it has ended.
        """
        self._work, self._size = work, size
        self._batch, self._max_queue = batch, max_queue
        self._gather, self._max_seconds = gather, max_seconds
        self._queue: dict[asyncio.Future[Answer], Job] = {}
        self._taken: dict[asyncio.Future[Answer], Job] = {}
        self._waiting = 0  # size of the queue
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None
        self._prepared = self._stopping = False
        self._began: float | None = None  # when the thread's call began
        self.calls = 0

    @property
    def busy(self) -> bool:
        """Whether the thread is in a call, which nothing can end from outside."""
        return self._began is not None

    @property
    def unready(self) -> str | None:
        """Why no job is taken; None where jobs are taken."""
        if self._stopping:
            return "the service is stopping"
        if not self._prepared:
            return "the model is being made ready: ask again in a few seconds"
        began = self._began
        if began is not None and time.monotonic() - began > self._max_seconds:
            return f"the model has been at one call for more than {self._max_seconds:g} s: ask again later"
        return None

    def start(self, prepare: Callable[[], None], on_ready: Callable[[Exception | None], None]) -> None:
        """Begins to work after `prepare`, then calls `on_ready` with None.

        `on_ready` is called with an error where `prepare` raised it, or where the work ended by it later.
        """
        self._task = asyncio.create_task(self._run(prepare, on_ready))

    async def stop(self, max_seconds: float) -> None:
        """Ends after the running call, whose jobs are answered; waiting jobs raise `NotReady`.

        Args:
          max_seconds: seconds that the running call has; after them its jobs raise `NotReady`, too, and the thread is
            left to itself.
        """
        self._stopping = True
        self._arrived.set()
        if self._task:
            await asyncio.wait([self._task], timeout=max_seconds)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def submit(self, job: Job) -> Answer:
        """The answer to a job.

        Raises:
          NotReady: see `unready`.
          Overloaded: the queue would exceed `max_queue`.
          TooSlow: no answer within `max_seconds`; a job that still waits is dropped.
          Exception: the error that `work` raised.
        """
        if why := self.unready:
            raise NotReady(why)
        size = self._size(job)
        if self._waiting + size > self._max_queue:
            raise Overloaded
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue[future] = job
        self._waiting += size
        self._arrived.set()
        try:
            async with asyncio.timeout(self._max_seconds):
                return await future
        except TimeoutError:
            raise TooSlow from None
        finally:
            if future in self._queue:  # it was given up, or its client has gone
                self._leave(future)

    def _leave(self, future: asyncio.Future[Answer]) -> None:
        self._waiting -= self._size(self._queue.pop(future))

    async def _run(self, prepare: Callable[[], None], on_ready: Callable[[Exception | None], None]) -> None:
        try:
            await self._in_thread(prepare)
            if self._stopping:
                return
            self._prepared = True
            on_ready(None)
            while True:
                await self._arrived.wait()
                if self._waiting < self._batch:
                    await asyncio.sleep(self._gather)
                if self._stopping:
                    return
                self._take()
                if self._taken:
                    await self._answer(self._taken)
        except Exception as error:  # whatever it is: the command raises it
            on_ready(error)
        finally:
            self._prepared = False
            for future in (*self._taken, *self._queue):
                if not future.done():
                    future.set_exception(NotReady("the service is stopping"))

    async def _answer(self, jobs: dict[asyncio.Future[Answer], Job]) -> None:
        """Calls `work`; where that fails for several jobs, once for each of them that is still wanted."""
        self.calls += 1
        try:
            answers = await self._in_thread(lambda: self._work(list(jobs.values())))
            if len(answers) != len(jobs):
                raise RuntimeError(f"{len(answers)} answers to {len(jobs)} jobs")
        except Exception as error:  # whatever it is: the caller of `submit` raises it
            if len(jobs) == 1:
                for future in jobs:
                    if not future.done():
                        future.set_exception(error)
                return
            for future, job in jobs.items():
                if not (future.done() or self._stopping):
                    await self._answer({future: job})
            return
        for future, answer in zip(jobs, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    async def _in_thread(self, function: Callable[[], Result]) -> Result:
        def call() -> Result:
            self._began = time.monotonic()
            try:
                return function()
            except Exception as error:
                if isinstance(error, StopIteration):  # no future takes it
                    raise RuntimeError("the call raised StopIteration") from error
                raise
            except BaseException as error:  # such as SystemExit, which would end the event loop
                raise RuntimeError(f"the call raised {type(error).__name__}") from error
            finally:
                self._began = None

        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _take(self) -> None:
        """Takes the next jobs, at most a batch together, or a single larger one."""
        self._taken = {}
        room = self._batch
        for future, job in self._queue.items():
            room -= self._size(job)
            if self._taken and room < 0:
                break
            self._taken[future] = job
        for future in self._taken:
            self._leave(future)
        if not self._queue:
            self._arrived.clear()
