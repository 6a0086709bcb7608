"""What a configuration builds: values, scopes, references, overrides, and the operative text that builds it again."""

import dataclasses

import gin
import jax.numpy as jnp
import pytest
from flax import nnx

from launch import config
from partitioning.errors import UserError

ENOUGH = "workshop.Run.steps = 5\nworkshop.Run.objective = @workshop.Hide()\n"

FULL = """
LAYERS = 3
workshop.Run:
    steps = 1_000
    objective = @workshop.Pair()
    model = @workshop.Trunk
    generator = @small/workshop.Trunk
    learning_rate = @optax.linear_schedule()
    extra = {'a': [1, (2, -3.5), None], 'b': @workshop.dropped()}
workshop.Pair.parts = {'near': @workshop.Hide(), 'far': @far/workshop.Hide()}
workshop.Hide.rate = 0.25
far/workshop.Hide.rate = @far/optax.linear_schedule()
far/workshop.Hide.span = 3
optax.linear_schedule.init_value = 1
optax.linear_schedule.end_value = 0.5
optax.linear_schedule.transition_steps = 10
far/optax.linear_schedule.end_value = 0.0
workshop.Trunk.layers = %LAYERS
small/workshop.Trunk.layers = 1
workshop.Trunk.mixer = @workshop.Mixer
workshop.Mixer.width = 16
small/workshop.Mixer.width = 4
"""


def build(made):
    return made(rngs=nnx.Rngs(0))


def test_full(load, workshop):
    run = load(FULL).value
    assert run.steps == 1_000
    assert run.optimizer == workshop.Optimizer(decay=0.5)
    assert run.extra == {"a": [1, (2, -3.5), None], "b": (0.5, "drop")}
    near, far = run.objective.parts["near"], run.objective.parts["far"]
    assert near == workshop.Hide(rate=0.25)
    assert (far.span, float(far.rate(10)), float(run.learning_rate(10))) == (3, 0.0, 0.5)
    model, generator = build(run.model), build(run.generator)
    assert [m.width for m in model.mixers] == [16, 16, 16]
    assert [m.width for m in generator.mixers] == [4]
    assert build(run.model).layers == 3
    assert run.model(layers=2, rngs=nnx.Rngs(0)).layers == 2  # a caller's own argument wins


def test_operative_rebuilds(load):
    first = load(FULL)
    again = load(first.operative, header="")
    assert again.operative == first.operative
    assert all(b.consumed for b in again.bindings)
    ours, theirs = first.value, again.value
    assert ours.model == theirs.model
    assert ours.generator == theirs.generator
    assert ours.model != ours.generator
    assert build(ours.generator).mixers[0].width == build(theirs.generator).mixers[0].width
    schedules = {"learning_rate": None, "objective": None}
    assert dataclasses.replace(ours, **schedules) == dataclasses.replace(theirs, **schedules)
    assert ours.objective.parts["near"] == theirs.objective.parts["near"]
    for step in (0, 3, 10):
        for a, b in ((ours, theirs), (ours.objective.parts["far"], theirs.objective.parts["far"])):
            schedule = "rate" if hasattr(a, "rate") else "learning_rate"
            assert getattr(a, schedule)(step) == getattr(b, schedule)(step)


def test_operative_spells_out_defaults(load):
    text = load(ENOUGH, "Hide.span = 2").operative
    assert "workshop.Hide.rate = 0.15" in text
    assert "workshop.Hide.span = 2" in text
    assert "workshop.Run.folder = None" in text
    assert "Optimizer" not in text  # a default object has no gin form; the class keeps it


@pytest.mark.parametrize("which", ["file", "operative"])
def test_gin_itself_builds_the_same(load, tmp_path, which):
    """The rules are gin's: gin reads the file, and the operative text, and builds the same."""
    resolved = load(FULL)
    if which == "operative":
        (tmp_path / "x.gin").write_text(resolved.operative)
    gin.clear_config()
    gin.parse_config_file(str(tmp_path / "x.gin"))
    theirs = gin.get_configurable("workshop.Run")()
    ours = resolved.value
    assert (theirs.steps, theirs.extra) == (ours.steps, ours.extra)
    assert theirs.objective.parts["near"] == ours.objective.parts["near"]
    assert theirs.objective.parts["far"].rate(5) == ours.objective.parts["far"].rate(5)
    for name in ("model", "generator"):
        a, b = build(getattr(theirs, name)), build(getattr(ours, name))
        assert [m.width for m in a.mixers] == [m.width for m in b.mixers]
    gin.clear_config()


def test_a_reference_remembers_the_scope_it_was_written_in(load):
    """Here scopes are lexical where gin's are not: a constructor that is kept and called later still hears them."""
    text = ENOUGH + "workshop.Run.model = @small/workshop.Keeper()\nworkshop.Keeper.make = @workshop.Trunk\n"
    resolved = load(text + "small/workshop.Trunk.layers = 2\n")
    assert build(resolved.value.model).layers == 2
    assert load(resolved.operative, header="").value == resolved.value


def test_a_scope_replaces_the_one_it_stands_in(load):
    text = ENOUGH + "workshop.Run.model = @outer/workshop.Trunk\nworkshop.Trunk.layers = 1\n"
    text += "workshop.Trunk.mixer = @inner/workshop.Mixer\ninner/workshop.Mixer.width = 3\n"
    assert build(load(text).value.model).mixers[0].width == 3
    with pytest.raises(UserError, match="scope outer never builds it"):
        load(text + "outer/workshop.Mixer.width = 4\n")


def test_two_configurations_do_not_disturb_each_other(load):
    first = load(FULL).value
    load(FULL, "Mixer.width = 2", "LAYERS = 1", "small/Mixer.width = 2")
    assert [m.width for m in build(first.model).mixers] == [16, 16, 16]


def test_overrides(load, workshop):
    run = load(
        FULL,
        "Run.steps = 7",
        "workshop.Mixer.width = 2",
        "small/Trunk.layers=2",
        "Run.optimizer = @Optimizer()",
        "Optimizer.decay = 1",
    ).value
    assert run.steps == 7
    assert run.optimizer == workshop.Optimizer(decay=1)
    assert build(run.model).mixers[0].width == 2
    assert len(build(run.generator).mixers) == 2


def test_macro_override(load):
    assert build(load(FULL, "LAYERS = 2").value.model).layers == 2


def test_formats_of_jax_numpy(load):
    text = ENOUGH + "workshop.Run.extra = @jnp.bfloat16\nworkshop.Run.learning_rate = 1"
    resolved = load("import jax.numpy as jnp\n" + text)
    assert resolved.value.extra is jnp.bfloat16
    assert resolved.value.learning_rate == 1
    assert load(resolved.operative, header="").value == resolved.value


def test_a_number_in_a_range_or_a_schedule(load):
    assert load(ENOUGH + "workshop.Hide.rate = 1").value.objective.rate == 1
    schedule = ENOUGH + "workshop.Hide.rate = @optax.constant_schedule()\noptax.constant_schedule.value = 0.3"
    assert load(schedule).value.objective.rate(3) == 0.3


def test_includes_and_many_files(load, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "base.gin").write_text(
        "from __gin__ import dynamic_registration\nimport workshop as w\n" + ENOUGH.replace("workshop.", "w.")
    )
    run = load("include 'parts/base.gin'\nworkshop.Run.steps = 6\n")
    assert run.value.steps == 6
    assert [b.where for b in run.bindings if b.name == "workshop.Run.steps"] == [f"{tmp_path / 'x.gin'}:5"]
    second = tmp_path / "y.gin"
    second.write_text("from __gin__ import dynamic_registration\nfrom workshop import nothing\n")
    with pytest.raises(UserError, match=r"workshop\.nothing"):
        config.load([str(tmp_path / "x.gin"), str(second)], top="workshop.Run", allow_import=["workshop"])


def test_a_part_built_by_default_hears_its_bindings(load, workshop):
    text = "workshop.Run.steps = 5\nworkshop.Run.objective = @workshop.Parted()\n"
    resolved = load(text, "workshop.Hide.rate = 0.4")
    assert resolved.value.objective == workshop.Parted(part=workshop.Hide(rate=0.4))
    assert "workshop.Parted.part = @workshop.Hide()" in resolved.operative
    assert load(resolved.operative, header="").value == resolved.value
    assert load(text).value.objective == workshop.Parted()
    assert "workshop.Hide.rate" in {p.name for p in load(text).available}


def test_listing(load, tmp_path):
    resolved = load(ENOUGH, "Hide.rate = 0.4")
    shown = {b.name: (b.value, b.where, b.consumed) for b in resolved.bindings}
    assert shown["workshop.Hide.rate"] == ("0.4", "override 'Hide.rate = 0.4'", True)
    assert shown["workshop.Run.objective"][:2] == ("@workshop.Hide()", f"{tmp_path / 'x.gin'}:5")
    available = {p.name: (p.kind, p.default) for p in resolved.available}
    assert available["workshop.Run.steps"] == ("a whole number of at least 1", "required")
    assert available["workshop.Hide.rate"] == ("a number in [0, 1] or a function", "0.15")
    assert not any("Trunk" in name for name in available)
    schedule = "workshop.Run.learning_rate = @optax.constant_schedule()\noptax.constant_schedule.value = 0.3\n"
    kinds = {p.name: p.kind for p in load(ENOUGH + schedule).available}
    assert kinds["optax.constant_schedule.value"] == "a number"


def test_what_a_caller_gives_is_not_offered(load):
    available = {p.name for p in load(FULL).available}
    assert "workshop.Trunk.layers" in available
    assert "workshop.Trunk.rngs" not in available
