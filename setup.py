"""The part of the build that pyproject.toml cannot express: the CPU kernels are compiled if there is a compiler."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "kernels"))

import compile_cpu  # noqa: E402 - the folder is not a package here


class BuildNative(Command):
    """Compile the libraries into the package, or in place for an editable install."""

    description = "compile the native kernels for the CPU"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        """There are no options."""
        self.build_lib: str | None = None
        self.made: list[Path] = []

    def finalize_options(self) -> None:
        """Place the libraries beside the modules."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    @property
    def folder(self) -> Path:
        """The folder for the libraries."""
        return (ROOT if self.editable_mode else Path(str(self.build_lib))) / "kvq_calib" / "_native"

    def run(self) -> None:
        """Compile, or print one line that says why not."""
        self.made, problems = compile_cpu.compile_all(self.folder)
        for line in problems:
            print(f"kvq-calib: {line}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        """No files, because a source distribution has them already, as package data."""
        return []

    def get_outputs(self) -> list[str]:
        """The compiled libraries."""
        return [str(Path(str(self.build_lib)) / "kvq_calib" / "_native" / file.name) for file in self.made]

    def get_output_mapping(self) -> dict[str, str]:
        """The libraries that were compiled in place."""
        if not self.editable_mode:
            return {}
        return dict(zip(self.get_outputs(), (str(file.relative_to(ROOT)) for file in self.made), strict=True))


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python, because the libraries do not use Python; without libraries for any."""

    def run(self) -> None:
        """Compile first, because the wheel's tags depend on whether there are libraries."""
        self.run_command("build_native")
        if self.get_finalized_command("build_native").made:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """The tag for every Python on this platform."""
        if self.root_is_pure:
            return super().get_tag()
        return "py3", "none", super().get_tag()[2]


build.sub_commands = [*build.sub_commands, ("build_native", None)]
setup(cmdclass={"build_native": BuildNative, "bdist_wheel": PlatformWheel})
