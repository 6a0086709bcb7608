"""Routers and their side terms beside those of `transformers`, on random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hub_cases import HERE, TOKENS, WHERE, imported
from make_hub_golden import made

from models import Causal, Experts, SigmoidRouter

pytestmark = pytest.mark.long


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "olmoe, renormalised"])
def test_the_balance_term_is_theirs(name, scope, tmp_path):
    """By tokens as in `transformers`, by choices a k-th of it; theirs counts all layers as one, ours takes each by itself."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = made(name)
    model.save_pretrained(tmp_path)
    mask = torch.tensor(HERE.astype(np.int64))
    with torch.no_grad():
        out = model(torch.tensor(TOKENS), attention_mask=mask, output_router_logits=True)
    assert len(out.router_logits) == model.config.num_hidden_layers == 3
    size = {"num_experts": out.router_logits[0].shape[-1], "top_k": model.config.num_experts_per_tok}
    apart = np.mean([load_balancing_loss_func((x,), attention_mask=mask, **size) for x in out.router_logits])
    z = np.mean([(torch.logsumexp(x, -1)[mask.reshape(-1) > 0] ** 2).mean() for x in out.router_logits])
    for over, divided in (("tokens", 1), ("choices", size["top_k"])):
        trunk, _ = imported(tmp_path)
        for _, node in nnx.iter_graph(trunk):
            if isinstance(node, Experts):
                node.balance_over, node.balance_scope = over, scope
        sides = trunk(TOKENS, mask=Causal(), **WHERE).aux
        found = {side: value for path, value in sides.items() for side in [path.rsplit("/", 1)[1]]}
        total, fixed = by_layer(found["balance"])
        term = total if fixed is None else (total * fixed).sum(-1)
        np.testing.assert_allclose(term.mean(), apart / divided, rtol=1e-5)
        np.testing.assert_allclose((found["z"].total / found["z"].weight).mean(), z, rtol=1e-5)
        if scope == "batch":
            # All layers as one: sums first, then the product.
            whole = total.mean(0) * fixed.mean(0)
            np.testing.assert_allclose(whole.sum(), out.aux_loss / divided, rtol=1e-5)


def by_layer(side):
    """Total and fixed sums of each layer over its weight."""
    over = lambda x: np.asarray(x) / np.asarray(side.weight).reshape(-1, *(1,) * (x.ndim - 1))
    return over(side.total), None if side.fixed is None else over(side.fixed)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3)])
def test_sigmoid_routing_is_deepseeks(groups, normalised):
    """Weights by expert and the gradient of the router's matrix; a bias that changes the choice."""
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    draw = np.random.default_rng(0)
    width, experts, scale = 12, 16, 2.5
    x, kernel = (draw.standard_normal(s).astype(np.float32) for s in ((2, 9, width), (width, experts)))
    pull, bias = (draw.standard_normal(s).astype(np.float32) for s in ((2, 9, experts), (experts,)))
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=width, n_routed_experts=experts, num_experts_per_tok=4, n_group=groups[0], topk_group=groups[1],
            norm_topk_prob=normalised, routed_scaling_factor=scale,
        )
    )  # fmt: skip
    theirs.weight.data = torch.tensor(kernel.T.copy())
    theirs.e_score_correction_bias.data = torch.tensor(bias)
    _, weights, chosen = theirs(torch.tensor(x))
    spread = torch.zeros(18, experts).scatter(1, chosen, weights).reshape(pull.shape)
    (spread * torch.tensor(pull)).sum().backward()
    options = {"groups": groups[0], "top_groups": groups[1], "renormalise": normalised, "scale": scale}
    ours = SigmoidRouter(width, experts=experts, top_k=4, rngs=nnx.Rngs(0), **options)
    ours.bias.set_value(jnp.asarray(bias))

    ours.kernel.set_value(jnp.asarray(kernel))
    graph, state = nnx.split(ours)

    def loss(state):
        found = nnx.merge(graph, state)(jnp.asarray(x), jnp.ones((2, 9), bool))
        spread = (jax.nn.one_hot(found.chosen, experts) * found.weights[..., None]).sum(-2)
        return (spread * pull).sum(), spread

    gradient, found = jax.grad(loss, has_aux=True)(state)
    np.testing.assert_allclose(found, spread.detach().numpy(), atol=1e-5)
    expected = theirs.weight.grad.numpy().T
    np.testing.assert_allclose(gradient["kernel"].get_value(), expected, atol=1e-4 * np.abs(expected).max())
