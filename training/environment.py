"""What a run ran on, kept in its folder: one record a start."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

FILE = "environment.json"
PACKAGES = ("palmette", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """Versions, devices, and the host's processor, cores and memory in bytes."""
    first = jax.devices()[0]
    devices = {"platform": first.platform, "kind": first.device_kind}
    devices |= {"count": jax.device_count(), "hosts": jax.process_count()}
    host = {"system": platform.platform(), "processor": _processor(), "cores": _cores(), "memory": _memory()}
    return {"python": platform.python_version(), "packages": _versions(), "devices": devices, "host": host}


def keep_environment(out: Path, step: int) -> None:
    """Adds a start of the run to `environment.json`, on the first host.

    Args:
      out: the run's folder.
      step: steps done at the start.
    """
    if jax.process_index():
        return
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    records = [*environments(out), {"step": step, "started": started} | environment()]
    out.mkdir(parents=True, exist_ok=True)
    aside = out / f".{FILE}.{os.getpid()}"
    aside.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    aside.replace(out / FILE)


def environments(out: Path) -> list[dict[str, Any]]:
    """The starts of a run, in order; none where its folder has no record of them."""
    path = out / FILE
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", facts.read_text()) if facts.exists() else None
    return model[1].strip() if model else platform.machine()


def _cores() -> int:
    # Those that this process may use, where the system can say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
