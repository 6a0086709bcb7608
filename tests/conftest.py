"""Eight fake devices on the CPU for every test, set before jax starts."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What tests compile is kept for the session, so that a run that goes on does not compile again, and not for the user's
# own runs. Workers, and the processes that tests start, inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Tests compile much and run little: leave LLVM's optimisations out, and up to jax 0.11, which knows the flag, the fusion
# emitters, whose programs take LLVM four times as long.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jax") < "0.12":
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# Eight devices on few cores may keep each other waiting for longer than the 40 s after which XLA ends the process.
FLAGS.append("--xla_cpu_collective_call_terminate_timeout_seconds=600")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)
