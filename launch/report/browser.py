"""Pictures of a page's figures and tables, by a Chromium that is there and speaks its debugging protocol over two pipes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.report.parts import Figure, Section, Table
from partitioning.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 60.0
WIDTH, HEIGHT, MARGIN, SCALE = 1280, 900, 12, 2
MOVED = "import os, sys; r, w, *rest = sys.argv[1:]; os.dup2(int(r), 3); os.dup2(int(w), 4); os.execv(rest[0], rest)"
# Of a table all columns, however wide.
WHOLE = "for (const box of document.querySelectorAll('.box')) { box.style.overflow = 'visible'; box.style.width = 'max-content'; }"


def chromium() -> str:
    """The program.

    Raises:
      UserError: there is none.
    """
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise UserError(
            f"--png needs a Chromium, and none of {', '.join(NAMES)} is on PATH: install one (Debian: `apt-get install chromium`)"
        )
    return found


def write_png(program: str, page: Path, folder: Path, sections: Sequence[Section]) -> list[Path]:
    """Writes every figure and table of a page as a picture, by its name.

    Args:
      program: from `chromium`.
      page: the page's file.
      folder: made if it is not there.
      sections: of the page.

    Raises:
      UserError: the browser does not start or does not answer, or the pictures cannot be written.
    """
    parts = [part for section in sections for part in section.parts if isinstance(part, Table | Figure)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _opened(program, page) as tab:
            found = {part.name: tab.picture(part.name) for part in parts if isinstance(part, Figure)}
            tab.value(WHOLE)
            found |= {part.name: tab.screenshot(part.name) for part in parts if isinstance(part, Table)}
        for name, picture in found.items():
            (folder / f"{name}.png").write_bytes(picture)
    except OSError as error:
        raise UserError(f"{folder}: pictures cannot be written: {error.strerror}") from None
    return [folder / f"{name}.png" for name in found]


@contextmanager
def _opened(program: str, page: Path) -> Iterator[Tab]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from descriptor 3 and answers on 4; ours are moved out of their way.
        pipes = [*os.pipe(), *os.pipe()]
        reads, writes, answers, answered = (fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in pipes)
        for one in pipes:
            os.close(one)
        options = ["--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        options += [f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        start = [sys.executable, "-IS", "-c", MOVED, str(reads), str(answered), program, *options]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(start, pass_fds=(reads, answered), stdin=quiet, stdout=quiet, stderr=quiet)
        os.close(reads)
        os.close(answered)
        try:
            tab = Tab(writes, answers)
            tab.show(page)
            yield tab
        finally:
            process.kill()
            process.wait()
            os.close(writes)
            os.close(answers)


class Tab:
    """A tab of a browser.

    Args:
      writes, answers: descriptors of the two pipes.
    """

    def __init__(self, writes: int, answers: int):
        self._writes, self._answers = writes, answers
        self._count, self._left, self._session = 0, b"", ""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def show(self, page: Path) -> None:
        """Opens a page and waits until its figures are drawn."""
        self._ask("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)
        self._ask("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + PATIENCE_S
        while not self.value("document.documentElement?.dataset.ready === 'true'"):
            if time.monotonic() > until:
                raise UserError(f"{page}: its figures were not drawn in {PATIENCE_S:.0f} s")
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives, once it is there."""
        found = self._ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"the page: {found['exceptionDetails'].get('text')}: {expression}")
        return found["result"].get("value")

    def picture(self, figure: str) -> bytes:
        """A figure, with its legend."""
        return base64.b64decode(self.value(f"palmette.picture({json.dumps(figure)})").partition(",")[2])

    def screenshot(self, name: str) -> bytes:
        """An element, with a margin."""
        rectangle = "({x, y, width, height}) => ({x: x + scrollX, y: y + scrollY, width, height})"
        found = self.value(f"({rectangle})(document.getElementById({json.dumps(name)}).getBoundingClientRect())")
        clip = {"x": max(found["x"] - MARGIN, 0), "y": max(found["y"] - MARGIN, 0), "scale": SCALE}
        clip |= {"width": found["width"] + 2 * MARGIN, "height": found["height"] + 2 * MARGIN}
        shot = self._ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        try:
            os.write(self._writes, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise UserError("--png: the Chromium that was found does not start") from None
        until = time.monotonic() + PATIENCE_S
        while (answer := self._next(until)).get("id") != self._count:
            pass  # an event
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._answers], [], [], max(until - time.monotonic(), 0))
            part = os.read(self._answers, 1 << 20) if ready else b""
            if not part:
                what = "ended" if ready else f"did not answer in {PATIENCE_S:.0f} s"
                raise UserError(f"--png: the Chromium that was found {what}")
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)
