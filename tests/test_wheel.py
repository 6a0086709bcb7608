"""The built wheel is the whole program: its files alone, away from the sources, train a shipped config."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the wheel installed in it, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-compile", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    return folder / "site"


def run(site, *command):
    """Runs a command that finds the wheel's packages before this checkout's, from a folder that has neither."""
    environment = os.environ | {"PYTHONPATH": str(site), "PALMETTE_CACHE": str(site.parent / "cache")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=site.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_it_holds_the_packages_the_configs_and_nothing_else(site):
    """Every file of ours that is tracked, and neither tests nor docs."""
    (wheel,) = site.parent.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ours = {
        str(path.relative_to(ROOT))
        for package in packages["only-include"]
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".cc", ".gin", ".toml", ".html", ".css", ".js", ".LICENSE", ".ipynb"}
        or path.name == "Dockerfile"
    }
    assert held == ours
    assert "configs/parts/small.gin" in held


def test_it_prepares_and_trains_a_shipped_config(site):
    """`palmette` as installed, its modules from the wheel, the config by its name though there is no such file here."""
    found = run(site, "-c", "import launch, training; print(launch.__file__, training.__file__)").split()
    assert all(Path(path).is_relative_to(site) for path in found)
    palmette = str(site / "bin" / "palmette")
    small = [
        "models.Trunk.width = 32",
        "training.Run.steps = 2",
        "training.Run.batch_size = 8",
        "training.Run.length = 32",
    ]
    run(site, palmette, "prepare", "configs/causal_lm.gin")
    assert "step 2/2" in run(site, palmette, "train", "configs/causal_lm.gin", *small, "--out", "run")
    assert (site.parent / "run" / "checkpoints" / "2").is_dir()
