"""Which changes make a run fit, and which are fastest: each is compiled before it is named."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from launch.plan import Asked, gib
from partitioning.errors import UserError
from partitioning.topologies import Topology
from training.forecast import Forecast

# What is tried and what is wanted: each costs a compilation.
TRIED, WANTED = 8, 3
REMAT = ("none", "dots_no_batch", "full")


@dataclass(frozen=True)
class Change:
    """Overrides of a configuration, or another topology.

    Args:
      overrides: as on the command line.
      topology: in place of the asked one.
    """

    overrides: tuple[str, ...] = ()
    topology: Topology | None = None

    @property
    def words(self) -> str:
        """As a user would type it."""
        place = () if self.topology is None else (f"--topology {self.topology.pod.name}:{self.topology.shape}",)
        return " ".join([*(f'"{text}"' for text in self.overrides), *place]) or "as it is"

    def __add__(self, other: "Change") -> "Change":
        return Change((*self.overrides, *other.overrides), other.topology or self.topology)

    def asked(self, asked: Asked) -> Asked:
        """What was asked, changed."""
        return replace(asked, overrides=(*asked.overrides, *self.overrides), topology=self.topology or asked.topology)


def rematerialised(run: Any, policy: str) -> Change:
    """The change that lets the backward pass recompute what `policy` says."""
    # A family builds its trunk itself, unless it is handed the class that bindings reach.
    left = inspect.signature(run.model).parameters
    made = getattr(run.model, "symbol", None)
    open_ = (f"{made.name}.trunk = @models.Trunk",) if made is not None and "trunk" in left else ()
    return Change((*open_, f"models.Trunk.remat = '{policy}'"))


def in_parts(run: Any, times: int) -> Change:
    """The change that splits each step into more micro-batches."""
    return Change((f"training.Run.accumulate = {run.accumulate * times}",))


def meshes(*, sparse: bool) -> list[Change]:
    """The shipped rules, the likely ones first; `sparse` is whether there are experts to share out."""
    rule = lambda name: f"training.Run.rules = @partitioning.{name}()"
    cut = lambda over, *sizes: [
        Change((rule(f"fsdp_{over}"), f"partitioning.fsdp_{over}.{over} = {size}")) for size in sizes
    ]
    experts = cut("expert", 2, 4, 8) if sparse else []
    return [Change((rule("fsdp"),)), *experts, *cut("tensor", 2, 4, 8), Change((rule("data"),)), *cut("sequence", 2, 4)]


def changes(run: Any, topology: Topology) -> Iterator[Change]:
    """What may make a run fit, what changes least first."""
    fsdp, full = meshes(sparse=False)[0], rematerialised(run, "full")
    if not any("fsdp" in places for places in run.placed().parameters.values()):
        yield fsdp
    yield rematerialised(run, "dots_no_batch")
    yield full
    yield in_parts(run, 4)
    yield full + in_parts(run, 4)
    yield full + in_parts(run, 16)
    for larger in topology.larger:
        yield Change(topology=larger)
        yield full + Change(topology=larger)


def tried(asked: Asked, change: Change) -> Forecast | None:
    """The stage that needs most memory after a change; None where the change is no choice for this configuration."""
    try:
        return max(change.asked(asked).forecasts(), key=lambda one: (not one.fits, one.used))
    except UserError:
        return None


def advice(asked: Asked, say: Callable[[Any], None]) -> list[tuple[Change, Forecast]]:
    """Changes that fit, each compiled.

    Args:
      asked: what did not fit.
      say: prints what is being tried.
    """
    run = asked.plan().run
    fitting: list[tuple[Change, Forecast]] = []
    compiled = 0
    for change in changes(run, asked.topology):
        one = tried(asked, change)
        if one is None:
            continue
        compiled += 1
        say(f"tried {change.words}: {gib(one.used)}, {'fits' if one.fits else 'does not fit'}")
        if one.fits:
            fitting.append((change, one))
        if compiled == TRIED or len(fitting) == WANTED:
            break
    return fitting


def search(asked: Asked, *, most: int, say: Callable[[Any], None]) -> list[tuple[Change, Forecast]]:
    """Ranks meshes, remat policies and micro-batches by the least time of a step.

    Args:
      asked: the configuration and where.
      most: how many are compiled.
      say: prints what is being tried.

    Returns:
      Those that fit, fastest first.

    Raises:
      UserError: none fits.
    """
    plan = asked.plan()
    run = plan.run
    sparse = any("expert" in names for names in plan.trees.axes.values())
    parts = [in_parts(run, times) for times in (1, 2, 4)]
    axes = (meshes(sparse=sparse), [rematerialised(run, policy) for policy in REMAT], parts)
    # The likely ones first, whichever of the three they change.
    order = sorted(product(*(range(len(axis)) for axis in axes)), key=lambda at: (sum(at), at))
    found: list[tuple[Change, Forecast]] = []
    compiled = 0
    for at in order:
        change = axes[0][at[0]] + axes[1][at[1]] + axes[2][at[2]]
        one = tried(asked, change)
        if one is None:
            continue
        compiled += 1
        if one.roofline is None:
            say(f"{change.words}: does not fit, {gib(one.used)}")
        else:
            found.append((change, one))
            say(f"{change.words}: {one.roofline.step:.4g} s, {one.roofline.binds} binds, {gib(one.used)}")
        if compiled == most:
            break
    if not found:
        raise UserError(f"{asked.topology}: none of {compiled} meshes, remat policies and micro-batches fits")
    return sorted(found, key=lambda pair: pair[1].roofline.step if pair[1].roofline else 0.0)
