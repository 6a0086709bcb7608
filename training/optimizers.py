"""Optimizers: frozen dataclasses that, given the parameters' logical axes, make an optax transformation."""

import abc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax

from partitioning.errors import UserError
from training.moments import in_bfloat16
from training.paths import first_match, multipliers, nearest
from training.per_layer import Axes, layer_axes, per_layer

Rate = float | Callable[[Any], Any]
"""A learning rate: a number, or an optax schedule of the optimizer step."""


def at_step(rate: Rate, step: Any) -> jax.Array:
    """The value of a rate at an optimizer step."""
    return jnp.asarray(rate(step) if callable(rate) else rate)


def from_table(rate: Rate, table: Any) -> Any:
    """The same rate read from its values at steps 0, 1, ...; a number stays one."""
    return (lambda step: jnp.asarray(table)[step]) if callable(rate) else table[0]


def is_norm_or_bias(name: str) -> bool:
    """Whether a path names a bias, or any parameter of a normalisation."""
    modules, _, leaf = name.rpartition("/")
    return leaf in ("bias", "scale") or re.search(r"norm[^/]*(/|$)", modules.lower()) is not None


def decays_by_default(name: str, axes: Axes) -> bool:
    """Weight decay's default rule: one layer of the leaf has two axes or more, and it is neither a norm nor a bias."""
    return len(layer_axes(axes)) >= 2 and not is_norm_or_bias(name)


def by_name(
    parts: Mapping[str, tuple[Sequence[str], optax.GradientTransformation]],
) -> optax.GradientTransformationExtraArgs:
    """Hands each part its own share of a flat dict; the state is a dict with the names of the parts.

    Args:
      parts: name -> (parameter paths, transformation); together the paths are all parameters, each once.
    """
    chosen = {name: (tuple(paths), optax.with_extra_args_support(tx)) for name, (paths, tx) in parts.items() if paths}

    def share(tree: Mapping[str, Any] | None, paths: tuple[str, ...]) -> dict[str, Any] | None:
        return None if tree is None else {path: tree[path] for path in paths}

    def init(params: Any) -> dict[str, Any]:
        return {name: tx.init(share(params, paths)) for name, (paths, tx) in chosen.items()}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[dict, dict]:
        new_updates, new_state = {}, {}
        for name, (paths, tx) in chosen.items():
            part, new_state[name] = tx.update(share(updates, paths), state[name], share(params, paths), **extra)
            new_updates.update(part)
        return {path: new_updates[path] for path in updates}, new_state

    return optax.GradientTransformationExtraArgs(init, update)


@dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """Makes the optax transformation of a flat dict of parameters from their logical axes.

    Every optimizer treats each layer and each expert of a stacked leaf as the leaf it would be unstacked. A test takes
    every concrete subclass and compares the two, so a new one is covered by being written.
    """

    @abc.abstractmethod
    def __call__(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        """The transformation of gradients into parameter updates (to be added).

        Args:
          axes: logical axis names of each parameter, by its path.

        Raises:
          UserError: a rule of the optimizer names no parameter.
        """

    @abc.abstractmethod
    def rates(self, step: Any) -> dict[str, jax.Array]:
        """The learning rates at an optimizer step, by the name under which they are logged."""

    @abc.abstractmethod
    def tabled(self, tables: Mapping[str, jax.Array]) -> "Optimizer":
        """The same optimizer with its rates read from tables, so that a program which is given them holds none.

        Args:
          tables: the values of `rates` at steps 0, 1, ..., by the same names.
        """


@dataclass(frozen=True, kw_only=True)
class Descent(Optimizer):
    """An optimizer with one learning rate, decoupled weight decay, and rules by path for both.

    update = - rate(step) * scale(path) * (direction(gradient) + weight_decay * decay(path) * parameter)

    Args:
      learning_rate: a number or an optax schedule.
      weight_decay: strength of the decay, multiplied by the learning rate.
      decay: (regular expression, multiplier) pairs for the decay; the first that matches a path in full counts. Paths
        that none matches decay by the default rule: two or more axes in one layer, and neither a norm nor a bias.
      scale: (regular expression, multiplier) pairs for the learning rate (the decay included); paths that none matches
        have 1.
      moments: 'bfloat16' halves the running means' bytes, rounded at random (see `training.moments`); None keeps them
        in the parameters' type.

    Raises:
      UserError: a pattern is no regular expression or matches no parameter.
    """

    learning_rate: Rate
    weight_decay: float = 0.0
    decay: tuple[tuple[str, float], ...] = ()
    scale: tuple[tuple[str, float], ...] = ()
    moments: Literal["bfloat16"] | None = None

    @abc.abstractmethod
    def direction(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        """What the gradient becomes before decay and learning rate."""

    def __call__(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        direction = self.stored(self.direction(axes))
        return optax.chain(direction, self.decayed(axes), self.rated(axes, self.learning_rate))

    def stored(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """The transformation with its moments in the type that is asked for."""
        return tx if self.moments is None else in_bfloat16(tx)

    def rates(self, step: Any) -> dict[str, jax.Array]:
        return {"learning_rate": at_step(self.learning_rate, step)}

    def tabled(self, tables: Mapping[str, jax.Array]) -> Self:
        return replace(self, learning_rate=from_table(self.learning_rate, tables["learning_rate"]))

    def decays(self, axes: Mapping[str, Axes]) -> dict[str, float]:
        """Each parameter's share of the weight decay."""
        rules = multipliers(self.decay, axes, owner=f"{type(self).__name__}.decay")
        return {
            name: self.weight_decay * rules.get(name, float(decays_by_default(name, names)))
            for name, names in axes.items()
        }

    def decayed(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        """Adds each parameter, times its share of the weight decay."""
        strength = self.decays(axes)

        def add(updates: Any, params: Any) -> dict[str, Any]:
            return {
                name: update + strength[name] * params[name] if strength[name] else update
                for name, update in updates.items()
            }

        return optax.stateless(add)

    def rated(self, axes: Mapping[str, Axes], rate: Any) -> optax.GradientTransformation:
        """Multiplies by minus the learning rate and each parameter's scale."""
        rules = multipliers(self.scale, axes, owner=f"{type(self).__name__}.scale")

        def multiply(updates: Any, params: Any) -> dict[str, Any]:
            del params
            return {name: rules[name] * update if name in rules else update for name, update in updates.items()}

        def rated(updates: Any, params: Any) -> dict[str, Any]:
            del params
            return {name: jnp.asarray(-rate, update.dtype) * update for name, update in updates.items()}

        # A number may be one that the program is given, of another type than the updates.
        by_rate = optax.scale_by_learning_rate(rate) if callable(rate) else optax.stateless(rated)
        return optax.chain(optax.stateless(multiply), by_rate)


@dataclass(frozen=True, kw_only=True)
class AdamW(Descent):
    """Adam with decoupled weight decay.

    direction = m / (sqrt(v) + eps), with bias-corrected running means m of g (rate b1) and v of g * g (rate b2).

    Source: Decoupled Weight Decay Regularization, Loshchilov and Hutter, 2019.
    Differs: the decay is multiplied by the learning rate and not by the schedule alone, as in PyTorch and optax; leaves
      of one axis, norms and biases do not decay unless a rule says so.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def direction(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class Lamb(Descent):
    """Adam whose update in each leaf is as long as that leaf, times the learning rate.

    update = - rate * scale * |w| / |u| * u,  u = adam(gradient) + weight_decay * w, norms over one layer and one expert
    of a leaf; the ratio is 1 where either norm is 0.

    Args:
      adapt: which leaves have a ratio other than 1: 'all', or 'decayed' for those that decay, as GPT-BERT trains (Adam
        for norms and biases).

    Source: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, You et al., 2020; 'decayed' is from
      GPT or BERT: why not both?, Charpentier and Samuel, 2024.
    Differs: the norm |w| is not clipped (phi is the identity), as in optax.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    adapt: Literal["all", "decayed"] = "all"

    def direction(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)

    def __call__(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        # The trust ratio reads a norm, and of the decayed update: it stands between the decay and the rate.
        ratio = per_layer(optax.scale_by_trust_ratio(), axes)
        if self.adapt == "decayed":
            shares = self.decays(axes)
            adapted, rest = [[name for name in axes if bool(shares[name]) == decays] for decays in (True, False)]
            ratio = by_name({"adapted": (adapted, ratio), "rest": (rest, optax.identity())})
        direction = self.stored(self.direction(axes))
        return optax.chain(direction, self.decayed(axes), ratio, self.rated(axes, self.learning_rate))


@dataclass(frozen=True, kw_only=True)
class Sgd(Descent):
    """Stochastic gradient descent with momentum.

    direction = t, t <- gradient + momentum * t; with `nesterov`, gradient + momentum * t after that.

    Source: On the importance of initialization and momentum in deep learning, Sutskever et al., 2013.
    Differs: the learning rate multiplies the accumulated direction, as in PyTorch and optax.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def direction(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        return optax.trace(decay=self.momentum, nesterov=self.nesterov) if self.momentum else optax.identity()


@dataclass(frozen=True, kw_only=True)
class Groups(Optimizer):
    """A different optimizer for each group of parameters, by path: trees, layers, heads.

    Args:
      groups: regular expression -> optimizer; the first that matches a path in full takes the parameter, so a last
        `".*"` is the rest. Rules inside an optimizer see only its own parameters.

    Raises:
      UserError: a parameter that no group takes, or a group that takes none.
    """

    groups: Mapping[str, Optimizer]

    def __call__(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        patterns = list(self.groups)
        chosen = first_match(patterns, axes, owner="Groups.groups")
        left = sorted(set(axes) - set(chosen))
        if left:
            raise UserError(
                f"Groups.groups: no pattern takes {len(left)} of {len(axes)} parameters, first {left[0]!r}; patterns "
                f"are {nearest(left[0], patterns)}: add one, or '.*' as the last for the rest"
            )
        parts: dict[str, tuple[Sequence[str], optax.GradientTransformation]] = {}
        for index, pattern in enumerate(patterns):
            mine = {name: axes[name] for name, group in chosen.items() if group == index}
            parts[pattern] = (tuple(mine), self.groups[pattern](mine))
        return by_name(parts)

    def rates(self, step: Any) -> dict[str, jax.Array]:
        return {
            f"{name}/{pattern}": rate
            for pattern, optimizer in self.groups.items()
            for name, rate in optimizer.rates(step).items()
        }

    def tabled(self, tables: Mapping[str, jax.Array]) -> "Groups":
        own = lambda pattern: {
            name.removesuffix(f"/{pattern}"): table for name, table in tables.items() if name.endswith(f"/{pattern}")
        }
        return Groups(groups={pattern: optimizer.tabled(own(pattern)) for pattern, optimizer in self.groups.items()})
