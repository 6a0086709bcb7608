"""Eight fake devices on the CPU for every test, set before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What a test compiles is not kept for the user's own runs, nor for the processes that tests start.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Tests compile much and run little: leave LLVM's optimisations out, and the fusion emitters, whose programs take LLVM
# four times as long.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)
