"""What `python -m build` makes: an sdist with the tests, a wheel without, and both install and import elsewhere."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import hf_gnp


ROOT = Path(__file__).parents[2]
SMOKE = "tests/step/test_formula.py"


def run(*command: str, cwd: Path, **environment: str) -> str:
    # Nothing of the checkout on the path: what is imported is what was built.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with both. Not isolated: an isolated build downloads setuptools."""
    pytest.importorskip("build", reason="a part of the dev extra")
    folder = tmp_path_factory.mktemp("dist")
    # setuptools writes into the source tree: a copy of what git would see.
    source = tmp_path_factory.mktemp("source")
    names = ["hf_gnp", "tests", "examples", "configs", "README.md", "LICENSE", "pyproject.toml", "MANIFEST.in"]
    names += ["CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt"]
    run("cp", "-r", *(str(ROOT / name) for name in names), str(source), cwd=ROOT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source), cwd=folder)
    return folder


def test_version_is_in_one_place(built):
    assert {path.name for path in built.iterdir()} == {
        f"hf_gnp-{hf_gnp.__version__}-py3-none-any.whl",
        f"hf_gnp-{hf_gnp.__version__}.tar.gz",
    }
    assert f'"{hf_gnp.__version__}"' not in (ROOT / "pyproject.toml").read_text()


def test_wheel_has_the_package_alone(built):
    [wheel] = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hf_gnp", f"hf_gnp-{hf_gnp.__version__}.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_gnp").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "hf_gnp/py.typed" in names


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_and_imports(built, tmp_path, kind):
    """Into an environment that has the dependencies, through a .pth file: to install torch anew takes minutes."""
    [archive] = built.glob(kind)
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    [own] = [path for path in sys.path if path.endswith("site-packages")][:1]
    (site / "dependencies.pth").write_text(f"{own}\n")
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed", str(archive)]
    run(*install, cwd=tmp_path, PYTHONPATH=own)  # a new environment's setuptools may be too old to build
    printed = run(python, "-c", "import hf_gnp; print(hf_gnp.__file__, hf_gnp.__version__)", cwd=tmp_path)
    assert printed.split() == [str(site / "hf_gnp" / "__init__.py"), hf_gnp.__version__]
    if kind == "*.tar.gz":
        with tarfile.open(archive) as sdist:
            sdist.extractall(tmp_path, filter="data")
        [source] = tmp_path.glob("hf_gnp-*")
        run("mv", str(source / "hf_gnp"), str(tmp_path / "away"), cwd=tmp_path)  # the installed one is tested
        assert " passed" in run(python, "-m", "pytest", "-q", SMOKE, cwd=source)
