"""One page a family of methods: what each does, its formula, arguments, source, and the configs that use it."""

import ast
import dataclasses
import fnmatch
import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docs.generator.configs import anchor
from docs.generator.markdown import cell, plain
from launch.methods import PACKAGES, methods

WORDS = ("Args", "Arguments", "Returns", "Raises", "Errors", "Source", "Differs")


@dataclasses.dataclass(frozen=True)
class Family:
    """A page.

    Args:
      page: its name.
      title: its heading.
      words: a sentence or two about all of it.
      files: patterns over the files that define its methods. The first page that has one takes the method.
    """

    page: str
    title: str
    words: str
    files: tuple[str, ...]


# In this order; the last pattern of a package takes what is left of it.
FAMILIES = (
    Family(
        "selections",
        "Selections, replacements, penalties",
        "What a masked objective is put together of: a selection says which tokens are hidden, a replacement what is "
        "seen instead, a penalty what a prediction is charged.",
        ("objectives/select*.py", "objectives/replace.py", "objectives/token_loss.py", "objectives/fragment.py"),
    ),
    Family(
        "controllers",
        "Controllers and rewards",
        "A controller reads a run's statistics and sets the mixture; a reward is computed on the host.",
        ("objectives/controller.py", "objectives/mixing.py", "objectives/rewards.py"),
    ),
    Family(
        "contracts",
        "What objectives are made of",
        "The classes that an objective of your own uses; [concepts](../concepts.md) says how they fit together.",
        ("objectives/base.py", "objectives/draws.py"),
    ),
    Family("objectives", "Objectives", "What is learned: bound to `training.Run.objective`.", ("objectives/*",)),
    Family(
        "families",
        "Families of models",
        "Functions that put a trunk together as published: bound to `training.Run.model`.",
        ("models/families/*", "models/trunk.py", "models/encoder_decoder.py", "models/block.py", "models/stack.py"),
    ),
    Family(
        "linear_attention",
        "Linear attention",
        "Mixers with a state of fixed size: bound to `models.Trunk.mixer`. They take causal masks only.",
        ("models/linear_attention/*", "models/short_convolution.py"),
    ),
    Family(
        "experts",
        "Experts and routers",
        "A feed-forward layer of experts, bound to `models.Trunk.feed_forward`, and what sends tokens to them.",
        ("models/mixture/*",),
    ),
    Family(
        "masks",
        "Masks",
        "Who may see whom; the objective chooses one, and `&` and `|` combine them. [Back ends](../masks.md) are another page.",
        ("models/masks.py",),
    ),
    Family(
        "norms",
        "Norms and feed-forward layers",
        "Bound to `models.Trunk.norm` and `models.Trunk.feed_forward`.",
        ("models/norms.py", "models/power_norm.py", "models/feed_forward.py"),
    ),
    Family(
        "positions",
        "Positions",
        "How a model knows where a token stands.",
        ("models/positions.py", "models/relative.py", "models/rope*.py", "models/rotary.py", "models/alibi.py"),
    ),
    Family("heads", "Heads", "From states to scores: bound to `models.Trunk.head`.", ("models/heads.py",)),
    Family(
        "decoding",
        "Decoding",
        "How a text is gone on with; [generation](../generation.md) has the command.",
        ("models/decoding/*",),
    ),
    Family(
        "surgery",
        "Surgery",
        "Trained trees in, trees out.",
        ("models/surgery/*",),
    ),
    Family(
        "attention",
        "Attention and other parts",
        "Softmax mixers, bound to `models.Trunk.mixer`, and the parts of a model that stand on no other page.",
        ("models/*",),
    ),
    Family(
        "schedules",
        "Schedules",
        "A number of the step; optax's own stand wherever these do.",
        ("training/schedules.py", "training/ramp.py"),
    ),
    Family(
        "runs",
        "Runs",
        "A run, its stages, and what watches over it.",
        ("training/run.py", "training/guard.py", "training/ema.py", "training/tensorboard.py",
         "training/weights_and_biases.py", "training/averaging.py"),
    ),
    Family("optimizers", "Optimizers", "Rules for gradients: bound to `training.Run.optimizer`.", ("training/*",)),
    Family(
        "evaluators",
        "Evaluators and statistics",
        "How a run is judged, bound to `training.Run.evaluators`, and how runs are compared.",
        ("evaluation/*",),
    ),
    Family(
        "tokenizers",
        "Tokenizers",
        "From text to ids: bound to `data.Cached.tokenizer`.",
        ("data/*token*.py",),
    ),
    Family("sources", "Sources, tasks and batches", "What a run reads; [data](../data.md) says how.", ("data/*",)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method on a page."""

    name: str
    file: str
    value: Any
    family: Family

    @property
    def place(self) -> str:
        """Page and anchor."""
        return f"methods/{self.family.page}.md#{self.name.replace('.', '-').lower()}"


def entries(root: Path) -> list[Entry]:
    """What the packages export and what `palmette methods` lists, each on the first page that takes its file."""
    listed = {method.name for method in methods(root)}
    found: dict[str, Entry] = {}
    for package in PACKAGES:
        # Modules of the package are among its names, and may have the name of a function of theirs.
        exported = {k: v for k, v in vars(importlib.import_module(package)).items() if not inspect.ismodule(v)}
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            for name in _public(path):
                whole = f"{package}.{name}"
                if whole in found or (name not in exported and whole not in listed):
                    continue
                value = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
                # Two files may have a name of their own that is the same: the one that is exported, or has a source, is meant.
                meant = exported[name] is value if name in exported else "\nSource:" in inspect.cleandoc(value.__doc__)
                if not meant:
                    continue
                found[whole] = Entry(whole, file, value, _family(file))
    return list(found.values())


def method_pages(found: Sequence[Entry]) -> dict[str, str]:
    """All pages of methods, and one that lists them."""
    uses = _uses(Path(__file__).resolve().parents[2] / "configs")
    pages = {}
    index = ["# Methods", "", "`palmette methods` lists those that come from a paper."]
    for family in FAMILIES:
        own = sorted((e for e in found if e.family is family), key=lambda e: e.name.lower())
        lines = [f"# {family.title}", "", family.words]
        index += ["", f"## [{family.title}]({family.page}.md)", "", "| | |", "|---|---|"]
        for entry in own:
            lines += _entry(entry, uses)
            index.append(
                f"| [`{entry.name}`]({entry.place.removeprefix('methods/')}) | {cell(_paragraphs(entry)[0])} |"
            )
        pages[f"methods/{family.page}.md"] = "\n".join(lines) + "\n"
    return {"methods/index.md": "\n".join(index) + "\n"} | pages


def _public(path: Path) -> list[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_") and ast.get_docstring(n)]


def _family(file: str) -> Family:
    return next(family for family in FAMILIES if any(fnmatch.fnmatch(file, pattern) for pattern in family.files))


def _paragraphs(entry: Entry) -> list[str]:
    return inspect.cleandoc(entry.value.__doc__).split("\n\n")


def _entry(entry: Entry, uses: dict[str, list[str]]) -> list[str]:
    head = f"## {entry.name.split('.')[1]} {{ #{entry.place.split('#')[1]} }}"
    lines = ["", head, "", "```python", _call(entry), "```"]
    for paragraph in _paragraphs(entry):
        lines += ["", *_section(paragraph)]
    if used := uses.get(entry.name):
        links = ", ".join(
            f"[{path.removeprefix('configs/').removesuffix('.gin')}](../configs.md#{anchor(path)})" for path in used
        )
        lines += ["", f"Configs: {links}"]
    return [*lines, "", f"Code: `{entry.file}`"]


def _section(paragraph: str) -> list[str]:
    """A paragraph of a docstring: a titled part, a formula as code, or prose. Source and Differs may share one."""
    if re.match(rf"({'|'.join(WORDS)}):", paragraph):
        lines: list[str] = []
        for part in re.split(rf"\n(?=(?:{'|'.join(WORDS)}):)", paragraph):
            title, _, text = part.partition(":")
            lines += [*([""] if lines else []), *_titled(title, text)]
        return lines
    if paragraph.startswith((" ", "|")) or re.search(r" = |<-| ~ ", re.sub(r"`[^`]*`", "", paragraph)):
        return ["``` { .text .formula }", *paragraph.splitlines(), "```"]
    return [plain(paragraph)]


def _titled(title: str, text: str) -> list[str]:
    if title not in ("Args", "Arguments", "Raises") or ": " not in text:
        return [f"**{title}:** {plain(' '.join(text.split()))}"]
    items = re.split(r"\n(?=\S)", inspect.cleandoc(text.lstrip("\n")))
    rows = [item.partition(": ") for item in items]
    head = "raises" if title == "Raises" else "argument"
    return [f"| {head} | what |", "|---|---|", *(f"| `{name}` | {cell(words)} |" for name, _, words in rows)]


def _call(entry: Entry) -> str:
    """The call with its arguments and defaults; a base class or protocol shows its name alone."""
    # The signature of an NNX class is its metaclass's.
    call = entry.value.__init__ if isinstance(entry.value, type) else entry.value
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self" and p.kind not in variadic]
    factories = {
        field.name: f"{field.default_factory.__name__}()"
        for field in (dataclasses.fields(entry.value) if dataclasses.is_dataclass(entry.value) else ())
        if field.default_factory is not dataclasses.MISSING and isinstance(field.default_factory, type)
    }
    shown = [
        p.name if p.default is p.empty else f"{p.name}={factories.get(p.name, _value(p.default))}" for p in parameters
    ]
    line = f"{entry.name}({', '.join(shown)})"
    return line if len(line) <= 80 else f"{entry.name}(\n" + "".join(f"    {argument},\n" for argument in shown) + ")"


def _value(default: Any) -> str:
    text = repr(default)
    return getattr(default, "__name__", "...") if "<" in text else text


def _uses(configs: Path) -> dict[str, list[str]]:
    """The configs that name a method, by its name."""
    found: dict[str, list[str]] = {}
    for path in sorted(configs.rglob("*.gin")):
        text = re.sub(r"^\s*#.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name in sorted(set(re.findall(rf"\b((?:{'|'.join(PACKAGES)})\.\w+)", text))):
            found.setdefault(name, []).append(path.relative_to(configs.parent).as_posix())
    return found
