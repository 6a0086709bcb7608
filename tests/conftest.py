"""Eight fake devices on the CPU for every test, set before jax starts."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What a test compiles is not kept for the user's own runs, nor for the processes that tests start.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Tests compile much and run little: leave LLVM's optimisations out, and up to jax 0.11, which knows the flag, the fusion
# emitters, whose programs take LLVM four times as long.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jax") < "0.12":
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)
