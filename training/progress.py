"""What a person watching a run sees: a live bar on a terminal, plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any


def clock_time(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Pace:
    """Steps and tokens per second over the last moments of a run.

    Args:
      window_s: how far back the rates look, in seconds.
      now: the clock, in seconds.
    """

    def __init__(self, *, window_s: float = 30.0, now: Callable[[], float] = time.monotonic):
        self._window_s, self._now = window_s, now
        self._seen: deque[tuple[float, int, int]] = deque()

    def add(self, step: int, tokens: int) -> None:
        """Notes that `step` steps and `tokens` tokens are done by now."""
        now = self._now()
        self._seen.append((now, step, tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._window_s:
            self._seen.popleft()

    def _rate(self, field: int) -> float | None:
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        return (self._seen[-1][field] - self._seen[0][field]) / (self._seen[-1][0] - self._seen[0][0])

    @property
    def steps_per_s(self) -> float | None:
        """Steps per second, once two moments are known."""
        return self._rate(1)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second, once two moments are known."""
        return self._rate(2)


class Progress:
    """Shows how far a run is: loss, tokens per second, MFU, time left, next checkpoint.

    Args:
      steps: of the whole run.
      done: steps done before this start.
      checkpoint_every: steps between checkpoints; None where there are none.
      step_mfu: seconds of a step -> MFU between 0 and 1; None does not show it.
      interval_s: seconds between plain lines; the first and the last step always have one.
      console: rich's console; None is the standard output's.
      now: the clock, in seconds.
    """

    def __init__(
        self,
        steps: int,
        *,
        done: int = 0,
        checkpoint_every: int | None = None,
        step_mfu: Callable[[float], float] | None = None,
        interval_s: float = 10.0,
        console: Any = None,
        now: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console

        self._steps, self._every, self._step_mfu, self._interval_s = steps, checkpoint_every, step_mfu, interval_s
        self._console = Console() if console is None else console
        self._now, self._last, self._first = now, -float("inf"), True
        self.pace = Pace(now=now)
        self.pace.add(done, 0)
        self._tokens = 0
        self._bar: Any = None
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[line]}"))
            self._bar = Bar(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("train", total=steps, completed=done, line="compiling")
            self._bar.start()

    def update(self, step: int, *, loss: float, tokens: int, words: str = "") -> None:
        """Shows the state after a step.

        Args:
          step: steps done, this one included.
          loss: of this step, or the last one known.
          tokens: tokens since the last update.
          words: what else is to be said of the step.
        """
        self._tokens += tokens
        self.pace.add(step, self._tokens)
        line = self.line(step, loss, words)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line)
        elif self._first or step >= self._steps or self._now() - self._last >= self._interval_s:
            self.say(f"step {step}/{self._steps}  {line}")
            self._last = self._now()
        if self._first:
            # The first step's time is its compilation: rates start after it.
            self._first = False
            self.pace = Pace(now=self._now)
            self.pace.add(step, self._tokens)

    def line(self, step: int, loss: float, more: str = "") -> str:
        """The words beside the bar."""
        words = [f"loss {loss:.4f}", *([more] if more else [])]
        rate, tokens = self.pace.steps_per_s, self.pace.tokens_per_s
        if rate and tokens is not None and not self._first:
            words.append(f"{tokens:,.0f} tokens/s")
            if self._step_mfu is not None:
                words.append(f"MFU {100 * self._step_mfu(1 / rate):.1f}%")
            words.append(f"{clock_time((self._steps - step) / rate)} left")
        if self._every is not None and step < self._steps:
            words.append(f"checkpoint at {min(self._steps, (step // self._every + 1) * self._every)}")
        return "  ".join(words)

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def measure(self, step_mfu: Callable[[float], float]) -> None:
        """From now on shows MFU by this function of a step's seconds: every stage has its own FLOPs."""
        self._step_mfu = step_mfu

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
