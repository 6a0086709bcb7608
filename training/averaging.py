"""The mean of the parameters of several checkpoints of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.folder import checkpoints_in
from checkpoints.store import Checkpoints
from partitioning import UserError

AVERAGED = ("params/", "average/")


def averaged(run: Path, steps: Sequence[int], out: Path) -> str:
    """Writes a run's folder whose one checkpoint has the mean of the parameters of several.

    parameter = 1/n sum_i parameter(step_i)

    taken in float64; so is that of a running mean, which evaluation prefers. All else is the last step's: the statistics
    that buffers hold are of its parameters, not of the mean's.

    Args:
      run: the run's folder.
      steps: whose checkpoints, ascending.
      out: the folder to write, with the run's config where it has one.

    Returns:
      A line about what was written.

    Raises:
      UserError: `out` is there already; a checkpoint is broken, or of another model than the last.

    Source: Averaging Weights Leads to Wider Optima and Better Generalization, Izmailov et al., 2018.
    Differs: no statistics are measured anew; trunks of this house have no batch normalisation.
    """
    if out.exists():
        raise UserError(f"{out}: is there already: expected a new folder")
    store = Checkpoints(checkpoints_in(run))
    abstract = store.shapes(steps[-1])
    names = [name for name, leaf in abstract.items() if _floats(name, leaf)]
    arrays, metadata = store.restore(abstract, steps[-1])
    sums = {name: np.asarray(arrays[name], np.float64) for name in names}
    for step in steps[:-1]:
        part, _ = store.restore_part({name: abstract[name] for name in names}, step)
        sums = {name: sums[name] + np.asarray(part[name], np.float64) for name in names}
    means = {name: jnp.asarray(sums[name] / len(steps), abstract[name].dtype) for name in names}
    metadata = {key: value for key, value in metadata.items() if key != "figures"}
    with Checkpoints(checkpoints_in(out)) as written:
        written.save(steps[-1], arrays | means, metadata | {"averaged": list(steps)})
    for tree, reference in metadata.get("frozen", {}).items():
        written.save_frozen(tree, store.load_frozen(reference, store.frozen_leaves(reference)))
    if (run / "config.gin").is_file():
        (out / "config.gin").write_bytes((run / "config.gin").read_bytes())
    return f"{out}: the mean of {len(names)} arrays over steps {', '.join(map(str, steps))}"


def _floats(name: str, leaf: Any) -> bool:
    return name.startswith(AVERAGED) and jax.dtypes.issubdtype(leaf.dtype, np.floating)
