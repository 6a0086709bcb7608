"""What a configuration refuses: one line that names the place, the name, and what would be right."""

import os
import re

import pytest

from launch import config
from partitioning.errors import UserError

HEADER = "from __gin__ import dynamic_registration\nimport workshop\nimport optax\n"
ENOUGH = "workshop.Run.steps = 5\nworkshop.Run.objective = @workshop.Hide()\n"
FIRST = 6  # the line after the header and ENOUGH


def refused(load, text, *overrides, **options):
    with pytest.raises(UserError) as caught:
        load(text, *overrides, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


MISTAKES = {
    "unknown argument": ("workshop.Hide.rte = 0.1", "workshop.Hide has no argument rte; nearest: rate"),
    "unknown class": ("workshop.Hid.rate = 0.1", "workshop has no Hid; nearest: workshop.Hide"),
    "unknown reference": ("workshop.Run.model = @workshop.Trnk", "workshop has no Trnk; nearest: workshop.Trunk"),
    "unknown package": ("wrkshop.Hide.rate = 0.1", "wrkshop.Hide is unknown; nearest: workshop"),
    "not imported": ("training.Thing.rate = 0.1", "expected `import training` above it in this file"),
    "unknown module": ("import optx", "imports optx, which a configuration may not"),
    "unknown submodule": ("import partitioning.rnges", "no module partitioning.rnges; nearest: partitioning.ranges"),
    "class imported": ("from workshop import Hide", "workshop.Hide is no module: `import workshop`"),
    "a package bound": ("workshop.rate = 1", "workshop is a package: expected a class or function"),
    "a constant": ("workshop.Run.extra = @workshop.HERE", "workshop.HERE is neither a class nor a function"),
    "out of range": ("workshop.Hide.rate = 1.7", "workshop.Hide.rate = 1.7: expected a number in [0, 1] or a function"),
    "below range": ("workshop.Hide.span = 0", "expected a whole number of at least 1"),
    "wrong type": ("workshop.Run.folder = 3", "expected a string in quotes or None"),
    "bool for int": ("workshop.Hide.span = True", "workshop.Hide.span = True: expected a whole number"),
    "bool for float": ("workshop.Run.learning_rate = False", "expected a number or a function"),
    "float for int": ("workshop.Hide.span = 1.5", "expected a whole number"),
    "string for number": ("workshop.Hide.rate = '0.1'", "expected a number in [0, 1]"),
    "items": ("workshop.Hide.kept = (1, 2, True)", "workshop.Hide.kept = (1, 2, True): expected a tuple of a whole"),
    "class for object": (
        "workshop.Run.optimizer = @workshop.Optimizer",
        "expected Optimizer; @workshop.Optimizer() with () builds one",
    ),
    "other class": ("workshop.Run.optimizer = @workshop.Hide()", "expected Optimizer"),
    "object for class": (
        "workshop.Run.model = @workshop.dropped()",
        "expected a class or function that makes Trunk",
    ),
    "built too early": (
        "workshop.Run.model = @workshop.Trunk()",
        "expected a class or function that makes Trunk or None: @workshop.Trunk without ()",
    ),
    "class of another": ("workshop.Run.model = @workshop.Mixer", "expected a class or function that makes Trunk"),
    "type": ("workshop.Run.kind = @workshop.Mixer", "expected the class Objective or one derived from it"),
    "uncalled schedule": (
        "workshop.Run.learning_rate = @optax.linear_schedule",
        "expected a number or a function; @optax.linear_schedule() with () builds one",
    ),
    "unused": ("workshop.Optimizer.decay = 0.1", "workshop.Optimizer.decay is bound, but nothing builds workshop.Opt"),
    "unused scope": ("smal/workshop.Hide.rate = 0.1", "scope smal never builds it (it is built in no scope)"),
    "unused macro": ("stps = 3", "stps is a macro that nothing uses; nearest: workshop.Run.steps"),
    "undefined macro": ("workshop.Run.extra = %stps", "nothing defines %stps: expected `stps = ...`"),
    "bound twice": ("workshop.Run.steps = 6", "workshop.Run.steps is bound on line 4 already: keep one"),
    "gin's own": ("workshop.Run.extra = @s/gin.singleton()", "gin.singleton is unknown"),
    "unquoted": ("workshop.Run.folder = runs", "runs is no value: expected quotes around a string ('runs')"),
    "no value": ("workshop.Run.folder =", "expected a value after `=`"),
    "no statement": ("workshop.Run.folder", "expected a statement such as `package.Class.argument = value`"),
    "open bracket": ("workshop.Run.extra = [1,", ""),
    "open string": ("workshop.Run.extra = 'a", ""),
    "circle": ("workshop.Run.extra = @workshop.Run()", "@workshop.Run() is needed to make itself"),
    "macro circle": ("a = %b\nb = %a\nworkshop.Run.extra = %a", "is needed to make itself"),
    "built objects' own words": (
        "workshop.Run.model = @workshop.Trunk\nworkshop.Trunk.layers = 10",
        "workshop.Trunk: 10 layers are too many",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(load, tmp_path, name):
    line, words = MISTAKES[name]
    before = set(os.listdir(tmp_path))
    message = refused(load, ENOUGH + line + "\n")
    place = re.match(rf"{re.escape(str(tmp_path))}/x\.gin:(\d+): ", message)
    assert place is not None, message
    # Most stand on the mistake's first line; two-line mistakes and brackets that run to the end stand just after.
    assert FIRST <= int(place[1]) <= FIRST + 2, message
    assert words in message
    assert set(os.listdir(tmp_path)) <= before | {"x.gin"}


def test_the_first_line_of_a_mistake_is_named(load):
    assert "x.gin:6: " in refused(load, ENOUGH + "workshop.Hide.rate = 1.7\n")


def test_block_lines_are_named(load):
    assert "x.gin:8: " in refused(load, ENOUGH + "workshop.Hide:\n  span = 2\n  rate = 1.7\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workshop.Run.steps = 5", "workshop.Run.objective is required (Objective) and nothing binds it: add a line"),
        ("workshop.Run.objective = @workshop.Hide()", "such as `workshop.Run.steps = 1_000`"),
        ("workshop.Run.objective = @workshop.Hide()\nworkshop.Run.steps = %gin.REQUIRED", "x.gin:5: workshop.Run.st"),
        (ENOUGH + "workshop.Run.model = @small/workshop.Trunk", "such as `small/workshop.Trunk.layers = 1_000`"),
        (ENOUGH + "workshop.Run.objective = @workshop.Pair()", "keep one"),
    ],
)
def test_required(load, text, words):
    message = refused(load, text)
    assert "x.gin" in message
    assert words in message


def test_the_example_is_a_class_that_fits(load):
    message = refused(load, "workshop.Run.steps = 5")
    assert "`workshop.Run.objective = @workshop." in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("Hid.rate = 0.1", "Hid is unknown; nearest: workshop.Hide"),
        ("Hide.rte = 0.1", "workshop.Hide has no argument rte; nearest: rate"),
        ("Hide.rate = 1.7", "workshop.Hide.rate = 1.7: expected a number in [0, 1]"),
        ("rate = 0.1", "expected `Class.rate = ...`; nearest: workshop.Hide.rate"),
        ("Run.folder = runs", "expected quotes around a string ('runs')"),
        ("Optimizer.decay = 0.1", "nothing builds workshop.Optimizer"),
        ("Run.objective = @Hid()", "Hid is unknown; nearest: workshop.Hide"),
        ("import os", "expected one binding such as"),
        ("Run.steps = 1\nimport os", "expected one binding such as"),
        ("include 'x.gin'", "expected one binding such as"),
        ("Run.steps", "expected a statement such as"),
        ("", "expected one binding such as"),
        ("Run.extra = @workshop.os.system", "defined in posix"),
        ("Run.extra = @subprocess.run", "subprocess.run is unknown"),
    ],
)
def test_override(load, override, words):
    message = refused(load, ENOUGH, override)
    assert message.startswith("override ")
    assert words in message


def test_ambiguous_override(load, workshop, tmp_path, monkeypatch):
    (tmp_path / "annex.py").write_text("class Hide:\n    def __init__(self, rate: float = 0.0): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = ENOUGH + "import annex\nworkshop.Run.extra = @annex.Hide()\n"
    message = refused(load, text, "Hide.rate = 0.1", allow_import=("workshop", "annex"))
    assert "Hide may mean annex.Hide and workshop.Hide: expected one of them in full" in message
    resolved = load(text, "annex.Hide.rate = 0.1", allow_import=("workshop", "annex"))
    assert "annex.Hide.rate = 0.1" in resolved.operative


def test_the_same_override_twice(load):
    assert "keep one" in refused(load, ENOUGH, "Hide.rate = 0.1", "workshop.Hide.rate = 0.2")


def test_mistyped_scope_names_the_nearest(load):
    text = ENOUGH + "workshop.Run.model = @generator/workshop.Trunk\nworkshop.Trunk.layers = 1\n"
    message = refused(load, text + "genrator/workshop.Trunk.layers = 2\n")
    assert "x.gin:8: genrator/workshop.Trunk.layers is bound, but scope genrator never builds it" in message
    assert "nearest: generator" in message


def test_bound_but_always_given_or_narrowed(load):
    text = ENOUGH + "workshop.Run.model = @a/workshop.Trunk\na/workshop.Trunk.layers = 1\n"
    assert "always sets this argument itself" in refused(load, text + "workshop.Trunk.rngs = 1\n")
    assert "a narrower scope always takes its place" in refused(load, text + "workshop.Trunk.layers = 2\n")


def test_referenced_class_that_is_never_called(load):
    text = ENOUGH + "workshop.Run.extra = @workshop.Trunk\nworkshop.Trunk.layers = 2\n"
    assert "workshop.Trunk.layers is bound, but nothing builds workshop.Trunk" in refused(load, text)


# Files that would run what they may not. Every one is refused before anything is called.

ATTACKS = {
    "import": "import os\nworkshop.Run.extra = @os.system",
    "aliased import": "import os as optax2\nworkshop.Run.extra = @optax2.system",
    "from import": "from os import path\nworkshop.Run.extra = @path.abspath",
    "module of ours": "workshop.Run.extra = @workshop.os.system",
    "bound only": "workshop.os.system.command = 'touch stolen'",
    "submodule of ours": "import partitioning.ranges\nworkshop.Run.extra = @partitioning.ranges.functools.cache",
    "macro": "import partitioning.ranges\nx = @partitioning.ranges.typing.get_type_hints\nworkshop.Run.extra = %x",
    "in a list": "workshop.Run.extra = [1, {'a': @workshop.os.system}]",
    "block": "workshop.os.system:\n  command = 'touch stolen'",
    "library": "workshop.Run.extra = @workshop.nnx.jit",
    "jax": "import jax\nworkshop.Run.extra = @jax.jit",
    "jax.numpy": "import jax.numpy as jnp\nworkshop.Run.extra = @jnp.load",
    "private": "workshop.Run.extra = @workshop.Hide.__init__.__globals__",
    "private function": "workshop.Run.extra = @workshop._own",
    "subclasses": "workshop.Run.extra = @workshop.Hide.__subclasses__()",
    "builtins": "workshop.Run.extra = @workshop.__builtins__",
    "gin": "import gin\nworkshop.Run.extra = @gin.parse_config",
    "command": "import launch.cli\nworkshop.Run.extra = @launch.cli.main",
    "near name": "import optax_evil",
}


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_attack(load, tmp_path, monkeypatch, name, included):
    monkeypatch.chdir(tmp_path)
    called = []
    monkeypatch.setattr(os, "system", called.append)
    text = ENOUGH + ATTACKS[name] + "\n"
    if included:
        (tmp_path / "part.gin").write_text(HEADER + text)
        text = "include 'part.gin'\n"
    message = refused(load, text)
    assert f"{'part' if included else 'x'}.gin:" in message
    assert re.search("may not|is private|neither a class", message), message
    assert not called
    assert not (tmp_path / "stolen").exists()


def test_nothing_is_imported_before_every_file_is_judged(load, tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "import loud\ninclude 'part.gin'\n"
    (tmp_path / "part.gin").write_text(HEADER + "import os\n")
    assert "imports os" in refused(load, text, allow_import=("workshop", "loud"))


def test_allow_import_lets_in_what_it_names(load):
    text = ENOUGH + "import math\nworkshop.Run.extra = @math.sqrt\n"
    assert "pass --allow-import math" in refused(load, text)
    assert load(text, allow_import=("workshop", "math")).value.extra(4) == 2


def test_files(load, workshop, tmp_path):
    def message(path):
        with pytest.raises(UserError) as caught:
            config.load([str(path)], top="workshop.Run", allow_import=["workshop"])
        return str(caught.value)

    (tmp_path / "quickstart.gin").write_text("")
    assert message(tmp_path / "quikstart.gin") == (
        f"{tmp_path / 'quikstart.gin'}: no such file; nearest: {tmp_path / 'quickstart.gin'}"
    )
    assert "is a folder" in message(tmp_path)
    (tmp_path / "latin.gin").write_bytes("# é".encode("latin-1"))
    assert "latin.gin: is not UTF-8" in message(tmp_path / "latin.gin")
    (tmp_path / "a.gin").write_text(HEADER + "include 'b.gin'\n")
    (tmp_path / "b.gin").write_text(HEADER + "include 'a.gin'\n")
    assert "b.gin: includes a.gin, which includes it in turn" in message(tmp_path / "a.gin")
    (tmp_path / "c.gin").write_text(HEADER + "include 'missing.gin'\n")
    assert "c.gin:4: includes missing.gin: no such file" in message(tmp_path / "c.gin")
    (tmp_path / "d.gin").write_text("import workshop\n")
    assert "d.gin:1: expected `from __gin__ import dynamic_registration`" in message(tmp_path / "d.gin")
    (tmp_path / "e.gin").write_text("x = " + "[" * 3000 + "]" * 3000)
    assert "e.gin:1: " in message(tmp_path / "e.gin")


def test_a_missing_library_is_named(load, tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = refused(load, "import needy\n", allow_import=("workshop", "needy"))
    assert "x.gin:4: importing needy needs no_such_library, which is not installed" in message
