"""The wheel: complete, and usable from anywhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kvq_calib
from kvq_calib.artifact.artifact import KVArtifact

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_ships_recipes_and_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, suffixes in (("configs", {".yaml"}), ("kernels/cuda", {".cu", ".cuh"})):
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
