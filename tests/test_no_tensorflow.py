"""Plain text is prepared, trained on and decoded where TensorFlow, seqio and torch are not installed."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "seqio", "torch"):
    sys.modules[name] = None  # importing it raises, looking for it finds nothing
from functools import partial
import jax, jax.numpy as jnp
import data, models, objectives, training
from models.decoding.sampling import sample
from flax import nnx
folder = sys.argv[1]
text = folder + "/text.txt"
open(text, "w").write("a short text that is read again and again\\n" * 50)
source = data.Cached(task=text, folder=folder + "/cache")
source.prepare()
model = partial(models.Trunk, width=16, layers=2, mixer=partial(models.Attention, heads=2))
run = training.Run(model=model, data=source, objective=objectives.CausalLM(), steps=2, batch_size=8, length=16,
                   optimizer=training.AdamW(learning_rate=1e-3))
print(run.train(folder + "/run"))
trunk, tokenizer = run.restore(folder + "/run")
tokens = jnp.asarray(tokenizer.encode("a sh"))[None]
drawn = sample(trunk, tokens, jnp.ones_like(tokens), length=3, keys=jax.random.split(jax.random.key(0), 1))
assert drawn.tokens.shape == (1, 7)
assert not any(sys.modules.get(name) for name in ("tensorflow", "seqio", "torch"))
"""


def test_training_needs_no_tensorflow(tmp_path):
    """A process in which importing them fails prepares, trains, restores and samples."""
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss" in done.stdout
