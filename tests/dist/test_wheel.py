# SPDX-License-Identifier: Apache-2.0
"""`pip wheel .` in an isolated environment, on a machine with a compiler and on one without."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_COMPILER = re.compile(r"(.*-)?(g\+\+|gcc|c\+\+|cc|c89|c99|clang|clang\+\+)(-[\d.]+)?")
_RUNS = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") == "_frozen_importlib_external"
                 or "_frozen_importlib" in repr(finder)]  # without the finder of this checkout
sys.path.insert(0, sys.argv[1])
import qgnn_dist
from qgnn_dist import kernels
print(qgnn_dist.__file__.startswith(sys.argv[1]), kernels.isa())
"""


def _built(folder: Path, path: str, **environment: str) -> tuple[Path, str]:
    """Folder of the wheel's files, and what pip said."""
    source = folder / "source"
    source.mkdir()
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    clean = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX")}
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder / "wheel"), "."],
                          cwd=source, capture_output=True, text=True, timeout=500, check=False,
                          env={**clean, "PATH": path, **environment})
    said = done.stdout + done.stderr
    wheels = list((folder / "wheel").glob("*.whl"))
    if wheels:
        zipfile.ZipFile(wheels[0]).extractall(folder / "files")
    return folder / "files", said


def _without_compilers(folder: Path, keep: str = "") -> str:
    """A PATH of links to every command but compilers, of which one may stay."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for command in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / command.name
            if (command.name == keep or not _COMPILER.fullmatch(command.name)) and not os.path.lexists(link):
                link.symlink_to(command)
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize("compiler", [True, False])
def test_a_wheel_with_and_without_a_compiler(tmp_path: Path, compiler: bool) -> None:
    files, said = _built(tmp_path, os.environ["PATH"] if compiler else _without_compilers(tmp_path / "bin"))
    assert list(files.glob("qgnn_dist/py.typed")), said[-2000:]
    assert not list(files.glob("qgnn_dist/**/*.cpp"))
    assert bool(list(files.glob("qgnn_dist/kernels/_kernels*.so"))) is compiler
    assert ("no C++20 compiler was found: the package will run on NumPy" in " ".join(said.split())) is not compiler
    done = subprocess.run([sys.executable, "-c", _RUNS, str(files)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, check=True)
    there, level = done.stdout.split()
    assert there == "True"
    assert (level != "reference") is compiler
    assert ("Install a C++20 compiler" in done.stderr) is not compiler


@pytest.mark.long
def test_the_usual_compiler_is_not_the_only_one_that_is_looked_for(tmp_path: Path) -> None:
    """Python's own compiler is missing, which the builder names all the same; c++ is there."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and c++ on the PATH")
    path = _without_compilers(tmp_path / "bin", keep="c++")
    done = subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={sys.executable}"],
                          capture_output=True, text=True, timeout=100, check=False,
                          env={**os.environ, "PATH": path, "CXX": str(sysconfig.get_config_var("CXX"))})
    assert "The CXX compiler identification is" in done.stdout, done.stdout + done.stderr


@pytest.mark.long
def test_a_compiler_that_only_a_user_names_has_to_be_there(tmp_path: Path) -> None:
    files, said = _built(tmp_path, _without_compilers(tmp_path / "bin"), CXX="icpx-2099")
    assert not files.exists()
    assert "CXX=icpx-2099 is no C++ compiler that works here; name one, or unset it" in " ".join(said.split())
