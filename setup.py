"""Package layout: the top-level folder kernels/ is installed as fastguard.kernels. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastguard", "fastguard.*"]), "fastguard.kernels"],
    package_dir={"fastguard": "fastguard", "fastguard.kernels": "kernels"},
)
