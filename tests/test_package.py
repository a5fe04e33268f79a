"""The installed package: what a wheel contains, what it imports, and what it declares."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.export_tiny import export_tiny
from tests.processes import ROOT
from tests.sample_with_core import TRAINING

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules that a distribution provides under another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "python_multipart": "python-multipart",
}
# All that the package imports somewhere, except the extras of its own name.
REQUIREMENTS = [
    text
    for group in (
        PROJECT["dependencies"],
        *(PROJECT["optional-dependencies"][name] for name in ("train", "serve", "hub")),
    )
    for text in group
    if not text.startswith("sisma-jax")
]


def run(*command: str | os.PathLike, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    done = run(*pip, "--wheel-dir", folder, ROOT)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("sisma_jax-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Python of a new environment with the wheel. It finds JAX and the like in the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin/python"
    done = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    )
    assert done.returncode == 0, done.stderr
    (site_packages,) = folder.glob("lib/*/site-packages")
    (here,) = {path for path in map(Path, sys.path) if (path / "jax").is_dir()}
    (site_packages / "tests_environment.pth").write_text(f"{here}\n")
    return python


def test_a_wheel_contains_one_top_level_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sisma_jax"}
    files = [*(ROOT / "kernels").rglob("*.py"), ROOT / "kernels/README.md"]
    expected = {str(path.relative_to(ROOT)) for path in files}
    assert {name.removeprefix("sisma_jax/") for name in names if name.startswith("sisma_jax/kernels/")} == expected
    data = ("py.typed", "data/class_sets/celebamask_hq.json", "evaluation/report.html", "evaluation/report.css")
    data += ("planning/scan_bundles.json", "weights/demo.safetensors", "weights/README.md")
    assert {f"sisma_jax/{file}" for file in data} < set(names)


def test_an_installed_package_samples_from_another_folder_without_the_libraries_of_training(installed, tmp_path):
    export_tiny(tmp_path / "faces.safetensors")
    program = ROOT / "tests/sample_with_core.py"
    done = run(installed, "-I", program, "faces.safetensors", cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "sampled (2, 16, 16, 3)" in done.stdout
    assert run(installed, "-c", "import sisma_jax; print(sisma_jax.__file__)", cwd=tmp_path).stdout.startswith(
        str(installed.parents[1])
    )


def test_the_command_of_an_installed_package_runs_or_says_what_it_needs(installed, tmp_path):
    command = installed.with_name("sisma-jax")
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: sisma-jax" in done.stdout
    program = f"import sys; sys.modules.update(dict.fromkeys({TRAINING})); import sisma_jax.__main__ as m; m.main()"
    done = run(installed, "-c", program, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(
        r"Error: the command line needs the package \w+: pip install 'sisma-jax\[train\]'.*\n", done.stderr
    )


def test_a_run_cannot_be_loaded_without_orbax(installed, tmp_path):
    program = (
        "import sys; sys.modules['orbax'] = None\n"
        "from pathlib import Path\n"
        "import sisma_jax, sisma_jax.runs.folder as folder\n"
        "from sisma_jax.config import Config, MeshConfig\n"
        "from sisma_jax.parallel import sharding\n"
        "try: folder.RunFolder(Path('runs/x'), Config()).restore_ema(sharding.make_mesh(MeshConfig()))\n"
        "except sisma_jax.InputError as error: print(error)"
    )
    done = run(installed, "-c", program, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "reading checkpoints needs the package orbax" in done.stdout


def test_a_clone_without_links_finds_the_kernels(tmp_path):
    shutil.copytree(ROOT / "sisma_jax", tmp_path / "sisma_jax", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    (tmp_path / "sisma_jax/kernels").write_text("../kernels")
    program = "import sisma_jax.kernels; print(sisma_jax.kernels.__file__)"
    done = run(sys.executable, "-c", program, cwd=tmp_path, env=os.environ)
    assert Path(done.stdout.strip()) == tmp_path / "kernels/__init__.py", done.stderr


def test_sampling_imports_without_what_windows_lacks():
    program = "import sys; sys.modules['fcntl'] = None; import sisma_jax.pipeline, sisma_jax.runs.folder"
    assert run(sys.executable, "-c", program, cwd=ROOT).returncode == 0


def _imports(folder: Path) -> Iterator[str]:
    """Top-level names that the modules of a folder import when they run, not only for the type checker."""
    for file in folder.rglob("*.py"):
        nodes: list[ast.AST] = [ast.parse(file.read_text())]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield str(node.module).split(".")[0]
            nodes.extend(ast.iter_child_nodes(node))


def _declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_package_that_is_imported_is_declared_and_every_declared_one_is_imported():
    declared = _declared(REQUIREMENTS)
    imported = {
        DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
        for folder in ("sisma_jax", "kernels")
        for name in _imports(ROOT / folder)
        if name not in sys.stdlib_module_names and name != "sisma_jax"
    }
    assert imported == declared


def test_versions_of_the_tests_are_within_the_declared_bounds():
    packaging = pytest.importorskip("packaging.requirements")
    for text in REQUIREMENTS:
        requirement = packaging.Requirement(text)
        version = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(version), f"{text}: {version} is installed"
