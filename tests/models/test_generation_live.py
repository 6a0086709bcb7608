"""Generation against `transformers.generate` on the same weights, token for token."""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hub_cases import imported
from make_hub_golden import made

from models.decoding import Beam, Greedy, Prompts, Stop, decoder_of, generate, unrolled

pytestmark = pytest.mark.long

LENGTH, END = 10, 2
SIZES = (9, 4, 1)
TOKENS = np.random.default_rng(2).integers(7, 83, (3, 9))
DRAWN = {
    "greedy": (Greedy(), {}),
    "beam": (Beam(beams=3), {"num_beams": 3, "length_penalty": 1.0, "early_stopping": "never"}),
    "likeliest beam": (Beam(beams=4, penalty=0.0), {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"}),
}


SEARCHED = ["llama, grouped", "llama, yarn", "mistral", "qwen3", "qwen3 next", "qwen3 next, dense", "t5", "t5, gated"]


# Their search leaves the states of MiniMax's linear layers with the beams that they were computed for.
@pytest.mark.parametrize(("name", "how"), [*product(SEARCHED, DRAWN), ("minimax", "greedy")])
def test_theirs(name, how, tmp_path):
    """Ours in one padded batch, theirs a prompt at a time; the end token ends a row."""
    import torch

    model = made(name).eval()
    with torch.no_grad():
        # So that rows end here and there.
        model.get_output_embeddings().weight[END] *= 3
    model.save_pretrained(tmp_path)
    strategy, options = DRAWN[how]
    graph, state = nnx.split(unrolled(imported(tmp_path)[0]))
    here = np.arange(9) < np.array(SIZES)[:, None]
    given = Prompts(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(here, jnp.int32))
    stop = Stop(length=LENGTH, ends=(END,), pad=1)
    keys = jax.random.split(jax.random.key(0), 3)
    run = jax.jit(lambda state: generate(decoder_of(nnx.merge(graph, state)), given, strategy, stop, keys))
    found = jax.device_get(run(state))
    for row, size in enumerate(SIZES):
        ids = torch.tensor(TOKENS[row : row + 1, :size])
        how_long = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 1, "eos_token_id": END}
        with torch.no_grad():
            theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **how_long, **options)
        theirs = theirs[0, 1 if model.config.is_encoder_decoder else size :].numpy()
        np.testing.assert_array_equal(found.tokens[row, found.drawn[row]], theirs)
