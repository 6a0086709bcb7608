"""Families against `transformers` itself: logits, gradients, in and out again bit for bit; and the committed logits."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import nnx
from hub_cases import GOLDEN, HERE, PULL, TARGETS, S, imported, logits
from make_hub_golden import CASES, made, run, saved

from models.hub.folder import FAMILIES, export
from models.relative import log_buckets, t5_buckets
from models.stack import unstack

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=CASES)
def theirs(request, tmp_path_factory):
    """A case's name, the model, and its folder, in several shards."""
    model = made(request.param)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder, max_shard_size="40KB")
    return request.param, model, folder


def test_the_committed_logits_are_theirs(theirs):
    import torch

    name, model, _ = theirs
    with np.load(GOLDEN) as file, torch.no_grad():
        np.testing.assert_allclose(run(model).numpy()[HERE], file[f"{name}/logits"][HERE], rtol=1e-4, atol=1e-4)
        assert json.loads(str(file[f"{name}/config"]))["model_type"] == model.config.model_type


def test_logits_and_gradients(theirs):
    """Logits within 1e-4 of the largest, the gradient of every tensor within 1e-3 of its size."""
    import torch

    _, model, folder = theirs
    trunk, _ = imported(folder)
    model.zero_grad()
    out = run(model)
    (out * torch.tensor(PULL)).sum().backward()
    gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in model.named_parameters()}
    expected = saved(model, gradients)
    graph, state = nnx.split(trunk)

    def loss(state):
        found = logits(nnx.merge(graph, state))
        return (found * PULL).sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    size = np.abs(out.detach().numpy()[HERE]).max()
    np.testing.assert_allclose(found[HERE], out.detach().numpy()[HERE], rtol=0, atol=1e-4 * max(1, size))
    flat = unstack({"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradient)})
    layout = FAMILIES[trunk.family.name][1]
    compared, most = set(), max(np.abs(value).max() for value in expected.values())
    buffers = dict(model.named_buffers())
    for tensor in layout.tensors(trunk.family, flat[layout.table].shape[0]):
        if tensor.name in buffers:
            continue
        ours = tensor.go(*(np.asarray(flat[leaf]) for leaf in tensor.leaves))
        # A key's bias moves all scores of a query alike: its gradient is rounding, on both sides.
        atol = 1e-3 * np.abs(expected[tensor.name]).max() + 1e-6 * most
        np.testing.assert_allclose(ours, expected[tensor.name], rtol=0, atol=atol, err_msg=tensor.name)
        compared.add(tensor.name)
    rest = {name for name in expected if name not in compared and name not in buffers and not layout.spare(name)}
    assert rest == set()


def test_in_and_out_is_bitwise(theirs, tmp_path):
    """Every tensor that `transformers` wrote; it loads what we wrote, and gives the same logits."""
    import torch

    _, model, folder = theirs
    trunk, found = imported(folder)
    export(tmp_path / "out", trunk, found)
    again = type(model).from_pretrained(tmp_path / "out").eval()
    kept, layout = again.state_dict(), FAMILIES[trunk.family.name][1]
    parameters = dict(model.named_parameters())
    for name, value in model.state_dict().items():
        # Buffers that a layout need not have are constants of the config.
        if name not in parameters and layout.spare(name):
            continue
        torch.testing.assert_close(kept[name], value, rtol=0, atol=0, msg=name)
    tokens = torch.arange(7, 7 + S)[None]
    with torch.no_grad():
        targets = {"decoder_input_ids": torch.tensor(TARGETS[:1])} if model.config.is_encoder_decoder else {}
        theirs = model.eval()(tokens, **targets).logits
        atol = 1e-5 * max(1, theirs.abs().max().item())
        torch.testing.assert_close(again.eval()(tokens, **targets).logits, theirs, rtol=0, atol=atol)
    _, same = imported(tmp_path / "out")
    assert found.keys() == same.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(same[name], value)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (32, 256), (8, 16), (16, 50)])
def test_buckets_are_those_of_t5(buckets, longest, two_sided):
    """Of every distance, the farthest on either side among them."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-longest, longest + 1)
    theirs = T5Attention._relative_position_bucket(distance, two_sided, buckets, longest).numpy()
    np.testing.assert_array_equal(t5_buckets(buckets, longest, two_sided=two_sided), theirs)


@pytest.mark.parametrize(("buckets", "longest"), [(256, 512), (32, 512), (6, 16)])
def test_buckets_are_those_of_deberta(buckets, longest):
    import torch
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = torch.arange(1 - longest, longest)
    theirs = make_log_bucket_position(distance, buckets, longest).numpy()
    np.testing.assert_array_equal(log_buckets(buckets, longest)[1:-1], theirs)
