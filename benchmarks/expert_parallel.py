"""What tokens that travel to their experts send, beside the least: read from programs compiled for chips that are not here.

    python -m benchmarks expert_parallel

`palmette plan` compiles the training step of a pod's config; needs the extra `tpu`, and no TPU. The least is a state for each
choice there and back, in bfloat16, and its gradient the other way: 4 k D numbers a token and layer, on one chip. Counted is
every all-to-all along `expert`; the lines of 128 that each choice's weight and its gradient take on a TPU are in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
# Where, layers, width and experts of a token.
CONFIGS = {"olmoe_1b_7b": ("v5p:4x4x4", 16, 2048, 8), "mixtral_8x7b": ("v5p:4x4x8", 32, 4096, 2)}


def planned(name: str, topology: str) -> dict[str, Any]:
    """A config's plan, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = ["plan", f"configs/pods/{name}.gin", "--topology", topology, "--json", str(out)]
        subprocess.run(
            [sys.executable, "-c", "from launch.cli import main; main()", *command],
            env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        (found,) = json.loads(out.read_text())
    return dict(found)


def bytes_sent(plan: dict[str, Any], layers: int, width: int, top_k: int) -> tuple[float, float]:
    """Bytes that a chip sends along `expert` in a step, and the least that it could."""
    sent = sum(one["bytes"] for one in plan["sent"] if one["kind"].endswith("all-to-all") and one["axes"] == "expert")
    tokens = plan["rows"] * plan["length"] / (plan["mesh"].get("fsdp", 1) * plan["mesh"]["expert"])
    return sent, 4 * 2 * tokens * top_k * width * layers


def main() -> None:
    """Plans and writes the section."""
    rows = []
    gib = lambda count: f"{count / 2**30:,.1f} GiB"
    for name, (topology, *sizes) in CONFIGS.items():
        plan = planned(name, topology)
        sent, least = bytes_sent(plan, *sizes)
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
        times = [f"{plan['roofline'][what]:.3g} s" for what in ("ici", "step")]
        rows.append(
            (name, f"{topology}: {mesh}", gib(sent), gib(least), f"{sent / least:.3f}", *times, gib(plan["used"]))
        )
    heads = ("config", "mesh", "sent", "least", "ratio", "all collectives", "step at least", "memory")
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            "Bytes and memory are one chip's, and times those of even choices.",
            "",
            results.table(heads, rows),
            "",
            "Target: at most 1.2 of the least. Tokens stay where they came for the backward pass: `models.Trunk.remat = 'arrived'`.",
        ]
    )
    results.write("expert_parallel", "Experts on several devices", body)


if __name__ == "__main__":
    main()
