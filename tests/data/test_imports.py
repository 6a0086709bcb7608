"""`import data` is light, and plain text is prepared and read where TensorFlow is not installed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tensorflow", "seqio", "tensorflow_datasets", "torch", "jax", "flax"}:
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
import data
heavy = {"jax", "tensorstore", "sentencepiece", "tensorflow"} & set(sys.modules)
assert not heavy, heavy
cached = data.Cached(task=sys.argv[1], folder=sys.argv[2], tokenizer=data.SentencePiece(vocabulary=300))
cached.prepare()
print(cached.open().batch(0, batch_size=2, length=16, seed=0)["tokens"].shape)
"""


def test_no_heavy_import_and_no_tensorflow(tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("".join(f"line {i} of a small text about nothing, {i * i}\n" for i in range(300)))
    command = [sys.executable, "-c", SCRIPT, str(text), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 16)"
