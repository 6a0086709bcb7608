"""One run on several hosts of this machine: `palmette train` processes that meet over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 24, 4
CONFIG = f"""
from __gin__ import dynamic_registration
import data
import models
import objectives
import partitioning
import training

training.Run.data = @data.Records()
data.Records.examples = [{{'text': 'foxes jump over dogs'}}, {{'text': 'import os, sys'}}, {{'text': 'lorem ipsum dolor'}}]
training.Run.model = @models.Trunk
models.Trunk.width = 16
models.Trunk.layers = 1
models.Trunk.mixer = @models.Attention
models.Attention.heads = 2
models.Trunk.feed_forward = @models.FeedForward
models.FeedForward.hidden = 32
training.Run.objective = @objectives.MaskedLM()
objectives.MaskedLM.select = @objectives.RandomTokens()
objectives.RandomTokens.rate = 0.3
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = 1e-2
training.Run.rules = @partitioning.fsdp()
training.Run.batch_size = 8
training.Run.length = 16
training.Run.steps = {STEPS}
training.Run.checkpoint_every = {EVERY}
training.Run.keep = 3
training.Run.log_every = 1
"""
JUDGED = f"""{CONFIG}
import evaluation

training.Run.evaluators = [@evaluation.MaskedLikelihood()]
evaluation.MaskedLikelihood.data = @data.Records()
evaluation.MaskedLikelihood.length = 16
"""


class Forked:
    """The command in a child of this process, which spares it the imports; as much of `subprocess.Popen` as is needed."""

    returncode: int | None = None

    def __init__(self, arguments: Sequence[str], said: Path):
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                from launch.cli import main

                try:
                    main(list(arguments))
                except SystemExit as end:
                    status = end.code if isinstance(end.code, int) else 1
                sys.stdout.flush()
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} runs on")
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        """As `os.kill`, where it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it."""
        self.send_signal(signal.SIGKILL)


class Several:
    """A run's hosts, each with a CPU device or more.

    Args:
      config: its file.
      out: its folder; what host I says goes to `OUT.said.I`.
      hosts: how many.
      overrides: of the config, for each host.
      patience: seconds of silence after which a host is gone.
      devices: of all hosts together.
      fork: children of this process, which has imported everything and touched no device.
      copy: another folder for every checkpoint.
    """

    def __init__(
        self,
        config: Path,
        out: Path,
        hosts: int = 2,
        *,
        overrides: Sequence[Sequence[str]] = ((), ()),
        patience: int = 4,
        devices: int = 2,
        fork: bool = False,
        copy: Path | None = None,
    ):
        self.out = out
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices // hosts)}
        self.said = [Path(f"{out}.said.{host}") for host in range(hosts)]
        meet = ["--hosts", str(hosts), "--coordinator", f"localhost:{port}", "--patience", str(patience)]
        meet += [] if copy is None else ["--copy", str(copy)]
        self.processes: list[Any] = []
        for host, said in enumerate(self.said):
            own = list(overrides[host]) if host < len(overrides) else []
            arguments = ["train", str(config), *own, "--out", str(out), *meet, "--host", str(host)]
            if fork:
                self.processes.append(Forked(arguments, said))
                continue
            command = [sys.executable, "-m", "launch.cli", *arguments]
            with said.open("w") as file:
                started = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)
                self.processes.append(started)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Until it holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.words()
            assert any(process.poll() is None for process in self.processes), self.words()
            time.sleep(0.005)

    def end(self, timeout_s: float = 120) -> list[int]:
        """Waits; each host's exit status.

        Raises:
          AssertionError: one ran on; all are killed.
        """
        deadline = time.monotonic() + timeout_s
        while (hung := [p for p in self.processes if p.poll() is None]) and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in hung:
            process.kill()
            process.wait()
        assert not hung, f"{len(hung)} hosts ran on for {timeout_s} s: {self.words()}"
        return [process.returncode for process in self.processes]

    def says(self, host: int, words: str, timeout_s: float = 20) -> bool:
        """Whether a host's output has these words; what a process beside it says comes a moment after its end."""
        deadline = time.monotonic() + timeout_s
        while words not in self.said[host].read_text():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def words(self) -> str:
        """All that was printed."""
        return "\n".join(f"host {host}: {path.read_text()}" for host, path in enumerate(self.said))


def steps(out: Path) -> list[int]:
    """The steps that have a checkpoint."""
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdecimal())
