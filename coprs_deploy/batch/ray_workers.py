"""Workers on a Ray cluster: actors that hold policy and graphs.

Actors of Ray Core, not Ray Data: its checkpoints know which rows were written, but not to which
file, so that a run could not go on with the part files of another engine. Here the calling process
writes the same part files as a local run does, and Ray does what it is good at: it places the
actors, starts them again elsewhere when their process or node ends, and repeats their tasks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from coprs_deploy.batch.rows import InputRow, OutputRow
from coprs_deploy.batch.workers import WorkerSettings
from coprs_deploy.closing import Closeable
from coprs_deploy.errors import CoPRSError
from coprs_deploy.runtime.ray_cluster import RayOptions, connect, replica_resources

TASKS_PER_ACTOR = 2
"""Tasks that an actor has at once, so that it does not wait for the next one."""

MAX_TASK_RETRIES = 3
"""How often a task is repeated whose actor ended; its rows may be the reason."""

POLL_S = 0.2


class BatchActor:
    """A loaded bundle in a process of Ray."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._error = ""
        try:
            self._batch = settings.open()
        except (CoPRSError, ValueError) as error:  # ValueError: an option of the runtime
            self._error = str(error)

    def load_error(self) -> str:
        """Return why the bundle cannot be loaded; empty if it is."""
        return self._error

    def segment(self, rows: list[InputRow]) -> list[OutputRow]:
        """Segment rows."""
        return self._batch(rows)


@dataclass
class _Task:
    rows: list[InputRow]
    future: Future[list[OutputRow]]


@dataclass
class _Actor:
    handle: Any
    loading: Any
    num_tasks: int = 0
    is_loaded: bool = field(default=False)


class RayWorkers(Closeable):
    """Actors that segment lists of rows; a ``Workers`` of a cluster.

    Args:
        settings: what each of them loads; the bundle must be at the same path on every node.
        options: number of actors, and the cluster.

    Attributes:
        num_workers: number of actors at most.

    Raises:
        CoPRSError: the bundle cannot be loaded, or there is no cluster.
        MissingDependencyError: Ray is not installed.
    """

    def __init__(self, settings: WorkerSettings, options: RayOptions) -> None:
        self._ray = connect(options.address)
        self._options = options
        self.num_workers = options.max_replicas
        resources = replica_resources(settings.runtime)
        if settings.runtime.is_on_cpu:
            runtime = replace(settings.runtime, num_threads=int(resources["num_cpus"]))
            settings = replace(settings, runtime=runtime, num_ahead=0)
        self._settings = settings
        self._actor_class = self._ray.remote(
            max_restarts=-1, max_task_retries=MAX_TASK_RETRIES, **resources
        )(BatchActor)
        self._actors: list[_Actor] = []
        self._queue: deque[_Task] = deque()
        self._running: dict[Any, tuple[_Actor, _Task]] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        for _ in range(options.min_replicas):
            self._start_actor()
        try:
            self._check_loaded(self._actors[0])
        except BaseException:
            self._kill_all()
            raise
        self._thread = threading.Thread(target=self._run, name="ray-workers", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[InputRow]) -> Future[list[OutputRow]]:
        """Segment rows when an actor is free.

        The future raises CoPRSError if the actor ended again and again.
        """
        task = _Task(list(rows), Future())
        with self._changed:
            self._queue.append(task)
            self._changed.notify()
        return task.future

    def close(self) -> None:
        """End the actors; tasks that are not done are cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        for task in (*self._queue, *(task for _, task in self._running.values())):
            task.future.cancel()
        self._kill_all()

    def _run(self) -> None:
        """Hand out tasks and take their results until closed."""
        while True:
            with self._changed:
                while not self._is_closed and not self._queue and not self._running:
                    self._changed.wait()
                if self._is_closed:
                    return
            try:
                self._start_more()
                self._note_loaded()
                self._hand_out()
                self._take_results()
            except Exception as error:  # of Ray: no task would ever be done
                self._fail_all(error)

    def _start_actor(self) -> None:
        handle = self._actor_class.remote(self._settings)
        self._actors.append(_Actor(handle, handle.load_error.remote()))

    def _start_more(self) -> None:
        """Start an actor for each task that no other takes; Ray starts it where there is room."""
        room = TASKS_PER_ACTOR * len(self._actors) - len(self._running)
        missing = min(len(self._queue) - room, self._options.max_replicas - len(self._actors))
        for _ in range(missing):
            self._start_actor()

    def _note_loaded(self) -> None:
        loading = {actor.loading: actor for actor in self._actors if not actor.is_loaded}
        if not loading:
            return
        timeout = 0 if self._running else POLL_S
        done, _ = self._ray.wait(list(loading), num_returns=len(loading), timeout=timeout)
        for each in done:
            self._check_loaded(loading[each])

    def _check_loaded(self, actor: _Actor) -> None:
        try:
            if error := self._ray.get(actor.loading):
                raise CoPRSError(error)
        except self._ray.exceptions.RayError as error:
            raise CoPRSError(f"an actor of Ray cannot be started: {error}") from error
        actor.is_loaded = True

    def _hand_out(self) -> None:
        """Give tasks to the actors with the fewest, as many as each may have."""
        loaded = [actor for actor in self._actors if actor.is_loaded]
        while self._queue and loaded:
            actor = min(loaded, key=lambda each: each.num_tasks)
            if actor.num_tasks >= TASKS_PER_ACTOR:
                return
            task = self._queue.popleft()
            self._running[actor.handle.segment.remote(task.rows)] = (actor, task)
            actor.num_tasks += 1

    def _take_results(self) -> None:
        if not self._running:
            return
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
        for each in done:
            actor, task = self._running.pop(each)
            actor.num_tasks -= 1
            try:
                task.future.set_result(self._ray.get(each))
            except self._ray.exceptions.RayError as error:
                first, last = task.rows[0].row, task.rows[-1].row
                task.future.set_exception(
                    CoPRSError(
                        f"an actor of Ray ended {MAX_TASK_RETRIES + 1} times with the rows {first} "
                        f"to {last} ({error}); finished parts are kept: pass --resume to go on"
                    )
                )

    def _fail_all(self, error: Exception) -> None:
        failed = [*self._queue, *(task for _, task in self._running.values())]
        self._queue.clear()
        self._running.clear()
        for task in failed:
            task.future.set_exception(error)

    def _kill_all(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
