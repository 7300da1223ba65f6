"""What pyproject.toml cannot say: the CPU kernels are compiled where there is a compiler, and left out where not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "kernels"))

import compile_cpu  # noqa: E402 - stands in a folder that is no package here


class BuildNative(Command):
    """Compile the libraries into the package; in place for an editable install."""

    description = "compile the native kernels for the CPU"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        """Nothing can be set."""
        self.build_lib: str | None = None
        self.made: list[Path] = []

    def finalize_options(self) -> None:
        """Next to the modules."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    @property
    def folder(self) -> Path:
        """Where the libraries go."""
        return (ROOT if self.editable_mode else Path(str(self.build_lib))) / "kvq_calib" / "_native"

    def run(self) -> None:
        """Compile, or say in a line why not."""
        self.made, problems = compile_cpu.compile_all(self.folder)
        for line in problems:
            print(f"kvq-calib: {line}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        """None that a source distribution does not hold already, as data of the package."""
        return []

    def get_outputs(self) -> list[str]:
        """The libraries that were made."""
        return [str(Path(str(self.build_lib)) / "kvq_calib" / "_native" / file.name) for file in self.made]

    def get_output_mapping(self) -> dict[str, str]:
        """Those that were made in place."""
        if not self.editable_mode:
            return {}
        return dict(zip(self.get_outputs(), (str(file.relative_to(ROOT)) for file in self.made), strict=True))


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python, for the libraries know nothing of Python; without them for any."""

    def run(self) -> None:
        """Compile first, for the wheel's kind depends on what comes of it."""
        self.run_command("build_native")
        if self.get_finalized_command("build_native").made:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """The platform's tag alone."""
        if self.root_is_pure:
            return super().get_tag()
        return "py3", "none", super().get_tag()[2]


build.sub_commands = [*build.sub_commands, ("build_native", None)]
setup(cmdclass={"build_native": BuildNative, "bdist_wheel": PlatformWheel})
