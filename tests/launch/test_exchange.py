"""A run's trunk out to another layout, and in again as the beginning of another run."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from awkward import CASES
from running import Toy, devices, tiny

from launch import config
from launch.exchange import exported, imported
from models import bert, llama
from partitioning import UserError, fsdp_tensor

MODELS = {
    "bert": partial(bert, width=16, layers=3, heads=2, hidden=16, longest=16),
    "llama": partial(llama, width=16, layers=3, heads=4, kv_heads=2, hidden=16, tied=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again(name, tmp_path):
    """The second run, on another mesh, begins with the weights of the first, whose data and objective it has not."""
    model = MODELS[name]
    first = tiny("mlm" if name == "bert" else "clm", model=model, steps=2)
    with devices(1):
        first.train(tmp_path / "run")
        (said,) = exported(first, tmp_path / "run", tmp_path / "hf")
        trained, _ = first.restore(tmp_path / "run")
    assert f"a {name} of" in said
    lines = imported(tmp_path / "hf", tmp_path / "part.gin")
    assert "arrays used" in lines[0]
    assert not any(line.startswith("left") for line in lines)
    # The part is a config that resolves: sizes by name, and where the weights are.
    text = (tmp_path / "part.gin").read_text()
    assert f"training.Run.model = @models.{name}\n" in text
    assert f"models.{name}.layers = 3\n" in text
    assert f"training.Run.init_from = '{tmp_path / 'hf'}'\n" in text
    case = CASES["mlm" if name == "bert" else "clm"]
    second = tiny(
        model=model,
        data=Toy(case.batch),
        objective=case.objective,
        init_from=str(tmp_path / "hf"),
        rules=fsdp_tensor(2),
    )
    state = second.plan().init()
    ours = {f"trunk/{path}": leaf for path, leaf in _flat(trained).items()}
    assert ours.keys() == state.params.keys()
    for path, value in ours.items():
        got, cut = np.asarray(state.params[path]), slice(None)
        if path.endswith("table") and "positions" not in path:
            cut = slice(37)  # rows past the vocabulary stand for no token
        np.testing.assert_array_equal(got[cut], np.asarray(value)[cut], err_msg=path)


def _flat(trunk):
    from flax import nnx

    from models.variables import flatten

    return flatten(trunk, nnx.Param)


def test_a_part_resolves(tmp_path):
    """With data, objective and optimizer beside it, as a file among the files of a run."""
    first = tiny("clm", model=MODELS["llama"], steps=2)
    with devices(1):
        first.train(tmp_path / "run")
        exported(first, tmp_path / "run", tmp_path / "hf")
    imported(tmp_path / "hf", tmp_path / "part.gin")
    rest = tmp_path / "rest.gin"
    rest.write_text(
        "from __gin__ import dynamic_registration\nimport data\nimport objectives\nimport training\n"
        "training.Run.data = @data.Records()\ndata.Records.examples = [{'text': 'a'}]\n"
        "training.Run.objective = @objectives.CausalLM()\ntraining.Run.steps = 1\n"
        "training.Run.optimizer = @training.AdamW()\ntraining.AdamW.learning_rate = 0.1\n"
    )
    run = config.load([str(tmp_path / "part.gin"), str(rest)]).value
    assert run.init_from == str(tmp_path / "hf")
    # The text's tokenizer knows bytes, the model 37 tokens: said before anything is trained.
    with pytest.raises(UserError, match="has 37 tokens, the data's tokenizer"):
        run.plan().init()


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "part.gin").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        imported(tmp_path, tmp_path / "part.gin")
    assert (tmp_path / "part.gin").read_text() == "mine"
