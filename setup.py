"""Copies the top-level data folders into the wheel as `ditcompress/_data`; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    def run(self) -> None:
        super().run()
        for name in ("recipes", "calib_data"):
            target = Path(self.build_lib, "ditcompress", "_data", name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(__file__).with_name(name), target)


setup(cmdclass={"build_py": BuildWithData})
