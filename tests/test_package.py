"""The wheel: complete, and usable from anywhere."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from native_factory import compile_cpu

import kvq_calib
from kvq_calib.artifact.artifact import KVArtifact

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of the repository, and nothing that was built beside them."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def build_wheel(source, folder, **environment):
    """The wheel, and what its build said."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    environment = {**os.environ, **environment}
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file, built.stdout + built.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("built"))[0]


def test_the_wheel_ships_recipes_and_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, suffixes in (
        ("configs", {".yaml"}),
        ("kernels/cuda", {".cu", ".cuh"}),
        ("kernels/cpu", {".cpp", ".h"}),
    ):
        expected = {
            f"kvq_calib/_{folder}/{f.name}" for f in (ROOT / folder).iterdir() if f.suffix in suffixes
        }
        assert expected
        assert expected <= names
    assert "kvq_calib/py.typed" in names
    sources = {
        f"kvq_calib/{file.relative_to(ROOT / 'kvq_calib').as_posix()}"
        for file in (ROOT / "kvq_calib").rglob("*.py")
    }
    assert sources <= names
    assert {"kvq_calib/evaluate/report/report.css", "kvq_calib/evaluate/report/report.html.jinja"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_the_wheel_is_of_this_platform_and_its_libraries_are_found(wheel, tmp_path):
    if compile_cpu.find_compiler() is None or platform.machine().lower() not in compile_cpu.TARGETS:
        pytest.skip("no C++ compiler, or no native kernels for this machine")
    _, _, python, abi, where = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert where != "any"
    assert platform.machine().lower().replace("-", "_") in where
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (about,) = tmp_path.glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false" in about.read_text(encoding="utf-8")
    built = {file.name for file in (tmp_path / "kvq_calib" / "_native").iterdir()}
    assert built == {compile_cpu.library_name(isa) for isa in compile_cpu.TARGETS[platform.machine().lower()]}
    code = (
        "import sys; from kvq_calib.native.loader import FOLDER, library;"
        "assert str(FOLDER).startswith(sys.argv[1]), FOLDER; print(library().isa)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert compile_cpu.library_name(ran.stdout.strip()) in built


def check_wheels(folder):
    command = [sys.executable, str(ROOT / "kernels" / "check_wheel.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_wheels_are_checked_before_they_are_shared(wheel, tmp_path):
    if wheel.name.endswith("-any.whl"):
        pytest.skip("no native kernels for this machine")
    checked = check_wheels(wheel.parent)
    assert (checked.returncode, checked.stdout) == (0, f"{wheel.name}: good\n"), checked.stderr
    missing = sorted(name for name in zipfile.ZipFile(wheel).namelist() if "/_native/" in name)[0]
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(tmp_path / wheel.name, "w") as part:
        for name in whole.namelist():
            if name != missing:
                part.writestr(name, whole.read(name))
    checked = check_wheels(tmp_path)
    assert (checked.returncode, checked.stdout) == (1, f"{wheel.name}: {missing} is missing\n")
    (tmp_path / wheel.name).rename(tmp_path / "kvq_calib-0.1.0-py3-none-any.whl")
    assert "its tags are not" in check_wheels(tmp_path).stdout
    assert check_wheels(tmp_path / "none").stdout.endswith("no wheels\n")


def test_without_a_compiler_the_wheel_is_for_any_platform_and_says_so_once(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    wheel, said = build_wheel(copy, tmp_path / "built", CXX=str(tmp_path / "no-compiler"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/_native/" in name]
    assert said.count("torch computes instead") == 1


def test_an_editable_install_builds_in_place(source, tmp_path):
    if compile_cpu.find_compiler() is None or platform.machine().lower() not in compile_cpu.TARGETS:
        pytest.skip("no C++ compiler, or no native kernels for this machine")
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--target", str(tmp_path / "site"), "-e", str(copy)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    built = {file.name for file in (copy / "kvq_calib" / "_native").iterdir()}
    assert built == {compile_cpu.library_name(isa) for isa in compile_cpu.TARGETS[platform.machine().lower()]}


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import kvq_calib, sys; from kvq_calib.schema.recipe import calibration_config, recipe_names;"
        "assert kvq_calib.__file__.startswith(sys.argv[1]), kvq_calib.__file__;"
        "[calibration_config(name) for name in recipe_names()]; print(len(recipe_names()));"
        "from kvq_calib.files import shipped_folder; print(*(shipped_folder('kernels') / 'cuda').glob('*.cu'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    count, kernels = ran.stdout.splitlines()
    assert int(count) == len(list((ROOT / "configs").glob("*.yaml")))
    assert len(kernels.split()) == len(list((ROOT / "kernels" / "cuda").glob("*.cu")))


def test_importing_the_package_imports_no_torch():
    code = "import sys, kvq_calib, kvq_calib.cli.main; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_names_of_the_package():
    assert kvq_calib.KVArtifact is KVArtifact
    assert kvq_calib.KVQCache.__name__ == "KVQCache"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kvq_calib.Nothing
