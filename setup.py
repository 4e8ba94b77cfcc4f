"""The one build step that pyproject.toml cannot state: the wheel carries configs/ as clframe/_configs.

Everything else is declared in pyproject.toml. Mapping the folder with ``package-dir`` instead would turn an
editable install into an import hook, which type checkers cannot follow; this keeps it a plain path entry,
with the YAML files of the checkout read live (``clframe.config.paths.shipped_configs``).
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE = "configs"
TARGET = "clframe/_configs"


class BuildWithConfigs(build_py):
    """Copy the YAML files of ``configs/`` beside the modules; an editable build copies nothing."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self._configs().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        """What the source distribution must hold for this step to work from it."""
        return [*super().get_source_files(), *self._configs()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        copied = [] if self.editable_mode else list(self._configs().values())
        return [*super().get_outputs(include_bytecode), *copied]

    def _configs(self) -> dict[str, str]:
        found = sorted(Path(SOURCE).rglob("*.yaml"))
        return {
            path.as_posix(): str(Path(self.build_lib, TARGET, path.relative_to(SOURCE)))
            for path in found
            if path.is_file()
        }


setup(cmdclass={"build_py": BuildWithConfigs})
