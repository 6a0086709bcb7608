"""Eight fake devices on the CPU for every test, set before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: leave LLVM's optimisations out, and the fusion emitters, whose programs take LLVM
# four times as long.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
