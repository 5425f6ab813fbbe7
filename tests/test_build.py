"""What is built and shipped: packages, versions, portable code, and CUDA sources where nvcc is."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import worldenv
from worldenv import _C

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def test_versions_agree():
    assert worldenv.__version__ == PROJECT["project"]["version"] == metadata.version("worldenv")


def test_every_subpackage_is_listed():
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "worldenv").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders} | {"worldenv.kernels"}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


def test_no_dependency_reaches_torchvision():
    extras = PROJECT["project"]["optional-dependencies"]
    listed = " ".join(chain(PROJECT["project"]["dependencies"], *extras.values()))
    assert not re.search(r"torchvision|timm|lpips|hf-libero", listed)


APART = {"hf-libero", "metaworld"}  # installed without what they declare
FOR_OTHERS = {"tensorboard"}  # torch.utils.tensorboard
FOR_OTHERS |= {"bddl", "easydict", "cloudpickle", "pyyaml", "tqdm", "termcolor", "future"}  # LIBERO
FOR_OTHERS |= {"imageio"}  # Meta-World, by gymnasium


def test_what_is_imported_is_named_and_what_is_named_is_imported():
    nodes = [
        node
        for folder in ("worldenv", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"worldenv"}
    packages = metadata.packages_distributions()
    imported = {packages.get(top, [top])[0].lower().replace("_", "-") for top in tops}
    extras = PROJECT["project"]["optional-dependencies"]
    listed = chain(PROJECT["project"]["dependencies"], *(extras[k] for k in extras if k != "dev"))
    named = {re.match(r"[\w-]+", one)[0].replace("_", "-") for one in listed}
    assert imported - named == APART
    assert named - imported == FOR_OTHERS


def test_importing_worldenv_is_cheap():
    """Nor does a process that simulates load torch: each would take seconds and 200 MB."""
    code = "import sys, worldenv, worldenv.envs.server, worldenv.envs.libero.worker"
    code += "; print('torch' in sys.modules)"
    python = Path(sysconfig.get_path("scripts")) / "python"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_extension_runs_on_any_cpu_of_its_family():
    """No global -march: run-time dispatch must choose, or a wheel crashes on an older machine."""
    flags = re.findall(r'"(-m[^"]*)"', (ROOT / "setup.py").read_text())
    assert flags == []
    assert _C.build_info()["architecture"] in ("x86_64", "aarch64", "other")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(not CUDA_SOURCES, reason="csrc/cuda holds no .cu file")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_compile(source: Path, tmp_path: Path):
    """With nvcc alone, for Hopper: neither a GPU nor a CUDA build of torch is needed."""
    includes = [f"-I{path}" for path in [*include_paths(), str(ROOT / "csrc")]]
    command = ["nvcc", "-c", str(source), "-o", str(tmp_path / "out.o"), "-std=c++20", "-O1"]
    command += ["-gencode=arch=compute_90,code=sm_90", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    # A CPU torch lacks the header that a CUDA build generates.
    command += ["-DWORLDENV_CUDA", "-DUSE_CUDA"]
    command += [] if torch.version.cuda else ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    run = subprocess.run([*command, *includes], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
