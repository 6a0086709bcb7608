"""EMO against the transport cost written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from awkward import CASES, TRUNK, build, plain_batch

from models.masks import Causal
from objectives.draws import draws
from training.trees import Trees


def test_emo_is_half_cross_entropy_and_half_balanced_transport_cost():
    """Value and gradient equal q^T C p with C_vw = 1 - cos(v, w), summed by hand over the whole vocabulary."""
    case = CASES["emo"]
    with jax.enable_x64(True):
        case = type(case)(case.objective, model=partial(TRUNK, dtype="float64"))
        trees = Trees.plan(build(case))
        values = jax.tree.map(np.float64, jax.device_get(jax.jit(trees.init)(jax.random.key(0))))
        # Costs that are not the embeddings any more.
        values["params"]["trunk/table"] = values["params"]["trunk/table"] + 0.3 * np.sin(
            np.arange(values["params"]["trunk/table"].size).reshape(values["params"]["trunk/table"].shape)
        )
        values = jax.tree.map(jnp.asarray, values)
        batch = {k: jnp.asarray(v) for k, v in plain_batch(rows=3).items()}
        key = draws(jax.random.key(0), 0, batch["row"], 3)

        def ours(params):
            models = trees.models(params, values["frozen"], values["buffers"])
            term = case.objective(models, batch, step=0, key=key).terms["emo"]
            return term.total / term.weight

        def by_hand(params):
            models = trees.models(params, values["frozen"], values["buffers"])
            place = {"segments": batch["segments"], "positions": batch["positions"]}
            out = models.trunk(batch["tokens"], mask=Causal(), **place)
            table = values["frozen"]["cost/table"]
            logits = models.trunk.scores(out.hidden).logits()
            size = logits.shape[-1]
            rows = table[:size]
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
            cost = 1 - rows @ rows.T
            total, count = 0.0, 0
            for b, t in np.ndindex(3, batch["tokens"].shape[1] - 1):
                segments = np.asarray(batch["segments"])
                if segments[b, t] == 0 or segments[b, t] != segments[b, t + 1]:
                    continue
                target = int(batch["tokens"][b, t + 1])
                q = jax.nn.softmax(logits[b, t])
                wrong, far = -jnp.log(q[target]), q @ cost[:, target]
                total += 0.5 * (wrong + jax.lax.stop_gradient(wrong / far) * far)
                count += 1
            return total / count

        one, two = jax.value_and_grad(ours)(values["params"]), jax.value_and_grad(by_hand)(values["params"])
        np.testing.assert_allclose(one[0], two[0], rtol=1e-10)
        for name in one[1]:
            np.testing.assert_allclose(one[1][name], two[1][name], atol=1e-10)
