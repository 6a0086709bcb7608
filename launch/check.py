"""Whether a value fits an annotation, and in words what would."""

import collections.abc
import inspect
import types
import typing
from typing import Annotated, Any

import typeguard

from partitioning.ranges import Range, number, violated

_UNIONS = (typing.Union, types.UnionType)
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.abc.Sequence, collections.abc.Mapping)


def expected(value: Any, annotation: Any) -> str | None:
    """None where `value` fits `annotation`, else what was expected, in words.

    Stricter than isinstance in that True is no number, items of containers are checked, and a built object does not
    pass for the constructor of one; laxer in that a whole number passes for a float.
    """
    annotation = getattr(annotation, "__value__", annotation)  # `type X = ...`
    origin = typing.get_origin(annotation)
    if annotation in (Any, inspect.Parameter.empty, object):
        return None
    if origin is Annotated:
        fits = expected(value, annotation.__origin__) is None and violated(value, annotation) is None
        return None if fits else describe(annotation)
    if origin in _UNIONS:
        if any(expected(value, member) is None for member in typing.get_args(annotation)):
            return None
        return describe(annotation)
    if annotation is None or annotation is type(None):
        return None if value is None else "None"
    if annotation in (int, float):
        fits = number(value) and (annotation is float or isinstance(value, int))
        return None if fits else describe(annotation)
    if origin is collections.abc.Callable or annotation in (collections.abc.Callable, typing.Callable):
        return _callable(value, annotation)
    if origin is type or annotation is type:
        made = getattr(value, "symbol", None)
        target = made.target if made is not None else value
        bound = (typing.get_args(annotation) or (object,))[0]
        fits = inspect.isclass(target) and (not inspect.isclass(bound) or issubclass(target, bound))
        return None if fits else describe(annotation)
    if origin in _CONTAINERS:
        return _container(value, annotation, origin)
    return _typeguard(value, annotation)


def _callable(value: Any, annotation: Any) -> str | None:
    if not callable(value):
        return describe(annotation)
    returned = (typing.get_args(annotation) or (None,))[-1]
    returned = returned if inspect.isclass(returned) else None
    symbol = getattr(value, "symbol", None)
    if symbol is not None and returned is not None and inspect.isclass(symbol.target):
        if not _subclass(symbol.target, returned):
            return describe(annotation)
    # Modules are callable, so a built one would pass for its own constructor.
    elif (
        symbol is None
        and returned not in (None, object)
        and not inspect.isclass(value)
        and _isinstance(value, returned)
    ):
        return f"{describe(annotation)}, not a built one: @{type(value).__name__} without ()"
    return _typeguard(value, annotation)


def _subclass(cls: type, base: type) -> bool:
    try:
        return issubclass(cls, base)
    except TypeError:  # a protocol with data members
        return True


def _isinstance(value: Any, cls: Any) -> bool:
    try:
        return isinstance(value, cls)
    except TypeError:
        return False


def _container(value: Any, annotation: Any, origin: Any) -> str | None:
    items = typing.get_args(annotation)
    if not isinstance(value, origin) or isinstance(value, str):
        return describe(annotation)
    if isinstance(value, collections.abc.Mapping):
        fits = all(expected(k, items[0]) is None and expected(v, items[1]) is None for k, v in value.items())
    elif origin is tuple and not (len(items) == 2 and items[1] is Ellipsis):
        fits = len(value) == len(items) and all(expected(v, a) is None for v, a in zip(value, items, strict=True))
    else:
        fits = all(expected(v, items[0]) is None for v in value)
    return None if fits else describe(annotation)


def _typeguard(value: Any, annotation: Any) -> str | None:
    try:
        typeguard.check_type(
            value,
            annotation,
            forward_ref_policy=typeguard.ForwardRefPolicy.IGNORE,
            collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
        )
    except typeguard.TypeCheckError:
        return describe(annotation)
    return None


def makes(annotation: Any) -> list[type]:
    """The classes that a value of `annotation` may be a constructor of."""
    annotation = getattr(annotation, "__value__", annotation)
    origin, items = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated or origin in _UNIONS:
        return [cls for member in items for cls in makes(member)]
    # Any is a class from Python 3.11 on, and promises nothing.
    if origin is collections.abc.Callable and items and inspect.isclass(items[-1]) and items[-1] is not Any:
        return [items[-1]]
    return list(items) if origin is type and inspect.isclass(items[0]) else []


def _union(members: tuple) -> str:
    # A library's "array, scalar or number" is, in a file, a number.
    arrays = {m for m in members if str(getattr(m, "__module__", "")).split(".")[0] in ("jax", "jaxlib", "numpy")}
    if arrays and float in members:
        members = tuple(m for m in members if m not in arrays and m not in (bool, int, complex))
    return " or ".join(dict.fromkeys(describe(member) for member in members))


def describe(annotation: Any) -> str:
    """An annotation in words: `a number in [0, 1] or a function of (step)`."""
    annotation = getattr(annotation, "__value__", annotation)
    origin, items = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        ranges = [str(mark) for mark in annotation.__metadata__ if isinstance(mark, Range)]
        return " ".join([describe(annotation.__origin__), *ranges])
    if origin in _UNIONS:
        return _union(items)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, items))}"
    words = {int: "a whole number", float: "a number", str: "a string in quotes", bool: "True or False"}
    if annotation in (None, type(None)):
        return "None"
    if origin is collections.abc.Callable:
        made = items[-1] if items else None
        name = getattr(made, "__name__", None)
        return f"a class or function that makes {name}" if name not in (None, "Any", "Array") else "a function"
    if origin in (collections.abc.Mapping, dict) and items:
        return f"a dictionary of {describe(items[0])} to {describe(items[1])}"
    if origin is tuple and items and items[-1] is not Ellipsis:
        return f"a tuple ({', '.join(describe(a) for a in items)})"
    if origin in _CONTAINERS and items:
        return f"a {origin.__name__.lower()} of {describe(items[0])}"
    if origin is type and items:
        return f"the class {getattr(items[0], '__name__', items[0])} or one derived from it"
    if inspect.isclass(annotation):
        return words.get(annotation, annotation.__name__)
    return str(annotation).replace("typing.", "")
