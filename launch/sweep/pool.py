"""Worker processes that share a sweep's runs, each pinned to its part of the machine."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.sweep.folder import keep_result, run_folder
from launch.sweep.loading import Asked
from launch.sweep.queue import Queue, Run
from partitioning.errors import UserError

GRACE_S = 120.0
"""How long a worker that is asked to stop may take to end its step and save."""
Told = Callable[[Run, Mapping[str, Any]], None]


class DiedError(Exception):
    """A worker ended before it answered."""


class Worker:
    """A process of `launch.sweep.worker`.

    Args:
      asked, out: what it works on.
      cores: that it is pinned to.
      gpu: the only one that it sees; None for all.
      log: takes what is printed between runs.
    """

    def __init__(self, asked: Asked, out: Path, *, cores: Sequence[int], gpu: str | None, log: Path):
        command = [sys.executable, "-m", "launch.sweep.worker", asked.text(), str(out), ",".join(map(str, cores))]
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(max(1, len(cores)))}
        environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with log.open("a") as file:
            # A session of its own: Ctrl-C reaches the sweep, which asks its workers to save.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def ask(self, **job: Any) -> dict[str, Any]:
        """Its answer to a job.

        Raises:
          DiedError: it ended first.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            code = self.process.wait()
            how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with status {code}"
            raise DiedError(f"its process ended {how}")
        return json.loads(line)

    def stop(self) -> None:
        """Asks it to save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self, patience: float = GRACE_S) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Pool:
    """Workers, and the threads that hand them their runs.

    Args:
      asked, out: the sweep's.
      workers: how many.
    """

    def __init__(self, asked: Asked, out: Path, workers: int):
        self.out, self.stopping, self._lock = out, False, threading.Lock()
        shares, gpus = cores(workers), visible_gpus()
        self._make = lambda i: Worker(
            asked, out, cores=shares[i],
            gpu=gpus[i % len(gpus)] if len(gpus) > 1 else None,
            log=out / f"worker_{i}.log",
        )  # fmt: skip
        self.workers = [self._make(i) for i in range(workers)]

    def plan(self, queue: Queue, arms: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Has every arm planned, each by the worker that will run it.

        Raises:
          UserError: an arm was refused.
        """
        parts, found = queue.share(arms, len(self.workers)), {}

        def share(i: int) -> None:
            for arm in parts[i]:
                try:
                    found[arm] = self.workers[i].ask(do="plan", arm=arm)
                except DiedError as error:
                    found[arm] = {"refused": f"arm {arm}: {error} while it was planned: see {self.out}/worker_{i}.log"}
                if "refused" in found[arm]:
                    return

        self._threads(share)
        for arm in arms:
            if "refused" in found.get(arm, {}):
                raise UserError(found[arm]["refused"])
        return found

    def run(self, queue: Queue, told: Told) -> None:
        """Runs all that waits.

        Args:
          queue: of runs.
          told: takes every run's end.
        """

        def drive(i: int) -> None:
            while not self.stopping:
                with self._lock:
                    taken = queue.take(i)
                if taken is None:
                    return
                try:
                    answer = self.workers[i].ask(do="run", arm=taken[0], seed=taken[1])
                except DiedError as error:
                    if self.stopping:
                        return
                    self.workers[i].close()
                    self.workers[i] = self._make(i)
                    path = run_folder(self.out, *taken)
                    answer = {"result": keep_result(path, "failed", error=f"{error}: see log.txt beside this file")}
                if answer.get("stopped"):
                    self.stop()
                    return
                if "refused" in answer:
                    answer = {"result": keep_result(run_folder(self.out, *taken), "failed", error=answer["refused"])}
                with self._lock:
                    told(taken, answer["result"])

        self._threads(drive)

    def _threads(self, each: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=each, args=(i,), daemon=True) for i in range(len(self.workers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                # A wait without an end would not hear of signals.
                thread.join(0.2)

    def stop(self) -> None:
        """Asks every run to save and end; nothing new begins."""
        self.stopping = True
        for worker in self.workers:
            worker.stop()

    def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.stop()
        self.close()


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores(workers: int) -> list[list[int]]:
    """Each worker's cores: an even part, or one that it shares where there are fewer cores than workers."""
    own = available_cores()
    if workers > len(own):
        return [[own[i % len(own)]] for i in range(workers)]
    ends = [i * len(own) // workers for i in range(workers + 1)]
    return [own[a:b] for a, b in itertools.pairwise(ends)]


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that a process here would see, without asking jax, which would take them."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] in ("cpu", "tpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu not in ("", "-1")]
    found = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return sorted(match[1] for match in found if match)


def on_tpus() -> bool:
    """Whether this machine has TPU chips, which one process at a time may use."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return False
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def workers_by_default(runs: int) -> int:
    """One a GPU, one for all TPU chips, else one a core; never more than runs."""
    if on_tpus():
        return 1
    gpus = visible_gpus()
    return max(1, min(runs, len(gpus) if gpus else len(available_cores())))
