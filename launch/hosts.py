"""Several hosts as one run: they meet, begin with one configuration, and none waits for one that is gone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from partitioning.errors import UserError
from partitioning.key_values import key_values

BEAT_S = 1.0
MEET_S = 300
JAX_S = 30
"""How much later than this module jax itself gives a host up, and ends the process without a name."""
STATUS = 3
"""The exit status of a host that stopped because another one did."""
_KEYS = "palmette/"


@dataclass(frozen=True)
class Meeting:
    """How a host finds the others.

    Args:
      hosts: how many there are.
      host: which one this is, from 0.
      coordinator: `address:port` of host 0, as all of them reach it.
      cluster: ask the environment for these three instead (a TPU pod, Slurm, Open MPI, Kubernetes).
      patience_s: seconds of silence after which a host counts as gone.

    Raises:
      UserError: one of the three without the others, or values that cannot be.
    """

    hosts: int | None = None
    host: int | None = None
    coordinator: str | None = None
    cluster: bool = False
    patience_s: float = 30.0

    def __post_init__(self) -> None:
        given = {"--hosts": self.hosts, "--host": self.host, "--coordinator": self.coordinator}
        lacking = [name for name, value in given.items() if value is None]
        if self.cluster and len(lacking) < len(given):
            raise UserError("--cluster asks the environment: leave --hosts, --host and --coordinator out")
        if 0 < len(lacking) < len(given):
            raise UserError(
                f"{' and '.join(lacking)} missing: --hosts N --host I --coordinator ADDRESS:PORT go together"
            )
        if self.hosts is not None and self.host is not None and not 0 <= self.host < self.hosts:
            raise UserError(f"--host {self.host}: expected 0 to {self.hosts - 1}, as there are --hosts {self.hosts}")
        if self.coordinator is not None and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise UserError(f"--coordinator {self.coordinator}: expected ADDRESS:PORT of host 0, such as 10.0.0.1:8476")

    @property
    def alone(self) -> bool:
        """Whether there is nobody to meet."""
        return not self.cluster and self.hosts in (None, 1)


@contextmanager
def met(meeting: Meeting) -> Iterator[Hosts | None]:
    """Joins the other hosts for the block, which may be told of their end at any moment.

    Whatever ends the block on this host ends the others too, with one line that names it; whatever ends another ends this
    process with status 3. An error in the block ends the process here: the interpreter's own end would wait for hosts
    that will not come.

    Yields:
      The hosts; None for a run on one.

    Raises:
      UserError: the others did not come in time, or the environment knows of none.
    """
    if meeting.alone:
        yield None
        return
    hosts = Hosts(meeting)
    try:
        yield hosts
    except UserError as error:
        hosts.leave(2, f"palmette: {error}", str(error))
    except KeyboardInterrupt:
        hosts.leave(130, "", "was interrupted")
    except BaseException as error:
        # Most likely a collective whose other side has died: who that was is known in a while, and ends the process.
        time.sleep(meeting.patience_s + 5 * BEAT_S)
        hosts.leave(1, traceback.format_exc().strip(), f"{type(error).__name__}: {str(error)[:300]}")
    hosts.finish()


class Silence:
    """For how many seconds other hosts' beats have stood still, in rounds of this host.

    A round counts two beats at most: a host that did not run itself, on a machine that stood still, knows nothing of others.
    """

    def __init__(self) -> None:
        self._at: float | None = None
        self._length = 0.0
        self._heard: dict[int, tuple[str, float]] = {}

    def round(self, now: float) -> None:
        """Another look at all beats, at this time in seconds."""
        self._length = 0.0 if self._at is None else min(now - self._at, 2 * BEAT_S)
        self._at = now

    def of(self, host: int, beat: str) -> float:
        """Of one host, whose beat is this now."""
        before, seconds = self._heard.get(host, (None, 0.0))
        self._heard[host] = beat, 0.0 if beat != before else seconds + self._length
        return self._heard[host][1]


class Hosts:
    """This host among the others.

    Each keeps a beat in the store of keys that jax's coordinator, a thread of host 0, has for all. A thread reads the
    others': a beat that stands still, or a word of leave, ends this process. jax's own heartbeats stay behind it for a
    host whose Python is stuck.
    """

    def __init__(self, meeting: Meeting):
        import jax
        from jax._src.distributed import global_state

        # The run agrees on its stop itself (`training.interrupt`): Orbax asks jax's service too, of steps long past.
        jax.config.update("jax_enable_preemption_service", False)
        self.patience_s = meeting.patience_s
        try:
            jax.distributed.initialize(
                meeting.coordinator,
                meeting.hosts,
                meeting.host,
                cluster_detection_method=None if meeting.cluster else "deactivate",
                initialization_timeout=MEET_S,
                heartbeat_timeout_seconds=int(meeting.patience_s + JAX_S),
                shutdown_timeout_seconds=int(meeting.patience_s + JAX_S),
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the hosts could not meet: {str(error).splitlines()[0]}") from error
        self._client: Any = key_values()
        self.index, self.count = global_state.process_id, global_state.num_processes
        self._names: dict[int, str] = {}
        self._ending, self._over = threading.Lock(), threading.Event()
        self._client.key_value_set(f"{_KEYS}name/{self.index}", f"host {self.index} ({socket.gethostname()})")
        for other in range(self.count):
            self._names[other] = self._client.blocking_key_value_get(f"{_KEYS}name/{other}", MEET_S * 1000)
        self._lifeline = self._other_process(str(global_state.coordinator_address)) if self.index else None
        self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)
        self._thread.start()

    def _other_process(self, address: str) -> Any:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("lifeline.py")), address, self._names[0]]
        # A session of its own: Ctrl-C at the terminal is for the host, which then says `done`.
        return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)

    def begin_alike(self, config: str) -> None:
        """Returns once every host has begun with host 0's configuration.

        Raises:
          UserError: this host's differs; the first differences are shown.
        """
        from checkpoints.barrier import barrier

        key = f"{_KEYS}config"
        if not self.index:
            self._client.key_value_set(key, config)
        theirs = self._client.blocking_key_value_get(key, MEET_S * 1000)
        if theirs != config:
            raise UserError(
                f"{self._names[self.index]} was started with another configuration than {self._names[0]}: "
                f"{difference(theirs, config)}"
            )
        barrier("configuration", timeout_s=MEET_S)

    def _watch(self) -> None:
        beat, silence = 0, Silence()
        while not self._over.wait(BEAT_S):
            beat += 1
            try:
                self._client.key_value_set(f"{_KEYS}beat/{self.index}", str(beat), allow_overwrite=True)
                table = dict(self._client.key_value_dir_get(_KEYS))
            except Exception:
                # Host 0 does not answer: jax ends this process, and the lifeline says why.
                continue
            silence.round(time.monotonic())
            for other in set(range(self.count)) - {self.index}:
                if (words := table.get(f"{_KEYS}stopped/{other}")) is not None:
                    self.leave(STATUS, f"palmette: {self._names[other]} stopped: {words}", None)
                if silence.of(other, table.get(f"{_KEYS}beat/{other}", "")) > self.patience_s:
                    self.leave(
                        STATUS,
                        f"palmette: {self._names[other]} is gone, silent for {self.patience_s:g} s: start all hosts "
                        "again, the run goes on from its newest checkpoint",
                        None,
                    )

    def leave(self, status: int, line: str, told: str | None) -> NoReturn:
        """Ends this process at once.

        Args:
          status: to exit with.
          line: to print.
          told: what the others are told; None where they know.
        """
        self._ending.acquire()
        # The output may be a file on the very disk that is full, and host 0 may be gone: this process ends all the same.
        with suppress(Exception):
            sys.stderr.write(" ".join(line.split()) + "\n" if status in (2, STATUS) else line + "\n")
            sys.stderr.flush()
        with suppress(Exception):
            if told is not None:
                self._client.key_value_set(f"{_KEYS}stopped/{self.index}", " ".join(told.split()))
        if not self.index:
            # The store ends with this process, and the others are to read in it first.
            time.sleep(3 * BEAT_S)
        self._say_done()
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(status)

    def finish(self) -> None:
        """Waits for the others' end and parts from them.

        Raises:
          TimeoutError: they do not come.
        """
        import jax

        from checkpoints.barrier import barrier

        barrier("end", timeout_s=2 * MEET_S)
        self._over.set()
        self._thread.join()
        jax.distributed.shutdown()
        self._say_done()

    def _say_done(self) -> None:
        if self._lifeline is not None:
            with suppress(OSError):
                self._lifeline.communicate("done")


def difference(there: str, here: str) -> str:
    """The first bindings in which two configurations differ."""
    one, two = _bindings(there), _bindings(here)
    unlike = [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
    shown = [f"{name} = {one.get(name, 'nothing')} there, {two.get(name, 'nothing')} here" for name in unlike]
    return "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")


def _bindings(text: str) -> dict[str, str]:
    joined = text.replace("\\\n", "")
    found = re.findall(r"^([^\s#=][^=\n]*?) = (.*(?:\n[ \t]+.*)*)", joined, flags=re.MULTILINE)
    return {name: " ".join(value.split()) for name, value in found}
