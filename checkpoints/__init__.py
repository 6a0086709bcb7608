"""Checkpoints, and the folders that runs write to."""

import os

# Paths in buckets are read by gcsfs: etils would take TensorFlow where it happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "false")
