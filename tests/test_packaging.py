"""One name lands in site-packages, and everything that belongs to it does."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import modmoe

SHARED_FOLDERS = {"cli": "modmoe.cli", "recipes": "modmoe.recipes"}


def packages_in(repository: Path) -> dict[str, Path]:
    """Return every package that the tree holds, by the name it is installed under."""
    found = {name: repository / folder for folder, name in SHARED_FOLDERS.items()}
    for file in sorted((repository / "modmoe").rglob("__init__.py")):
        found[".".join(file.parent.relative_to(repository).parts)] = file.parent
    return found


def test_the_list_of_packages_is_the_tree(repository: Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"] == sorted(packages_in(repository))
    assert settings["package-dir"] == {"modmoe": "modmoe", "modmoe.cli": "cli", "modmoe.recipes": "recipes"}


def test_every_folder_with_python_files_is_a_package(repository: Path) -> None:
    packages = set(packages_in(repository).values())
    folders = {file.parent for top in ("modmoe", "cli", "recipes") for file in (repository / top).rglob("*.py")}
    assert folders - packages == set()


def test_versions_agree(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert project["version"] == modmoe.__version__
    assert f"## {modmoe.__version__}" in (repository / "CHANGELOG.md").read_text()


def test_constraints_are_within_the_bounds(repository: Path) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (repository / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [item for extra in project["optional-dependencies"].values() for item in extra]
    for requirement in map(Requirement, wanted):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


@pytest.mark.parametrize("folder", SHARED_FOLDERS)
def test_a_bare_import_is_refused(folder: str, repository: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(repository)!r}); import {folder}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ImportError: this package is modmoe.{folder}" in done.stderr
    done = subprocess.run([sys.executable, "-c", f"import modmoe.{folder}"], cwd="/", check=False)
    assert done.returncode == 0


@pytest.fixture(scope="module")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Return the files of an sdist, below its top folder, and those of the wheel built from it."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return source, set(archive.namelist())


def test_wheel_and_sdist_hold_everything(built: tuple[set[str], set[str]], repository: Path) -> None:
    source, wheel = built
    for name, folder in packages_in(repository).items():
        inside = "/".join(name.split("."))
        kept = [file for file in folder.iterdir() if file.suffix in (".py", ".yaml")]
        assert {f"{inside}/{file.name}" for file in kept} - wheel == set()
        assert {str(file.relative_to(repository)) for file in kept} - source == set()
    model = [file.name for file in (repository / "modmoe" / "demo" / "model").glob("*") if file.is_file()]
    assert {f"modmoe/demo/model/{name}" for name in model} - wheel == set()
    assert {f"modmoe/demo/model/{name}" for name in model} - source == set()
    assert "modmoe/py.typed" in wheel
    assert {"LICENSE", "README.md", "pyproject.toml"} <= source


def test_the_wheel_holds_nothing_else(built: tuple[set[str], set[str]]) -> None:
    _, wheel = built
    assert {name.split("/")[0] for name in wheel} == {"modmoe", f"modmoe-{modmoe.__version__}.dist-info"}
    assert not [name for name in wheel if "__pycache__" in name or name.endswith((".pyc", ".partial"))]


def test_the_wheel_installs_one_command(built: tuple[set[str], set[str]], repository: Path) -> None:
    scripts = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"modmoe": "modmoe.cli.main:main"}
    _, wheel = built
    assert f"modmoe-{modmoe.__version__}.dist-info/entry_points.txt" in wheel
