"""Package layout: the top-level folders kernels/ and recipes/ are installed as fastguard.kernels and fastguard.recipes.

The rest is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastguard", "fastguard.*"]), "fastguard.kernels", "fastguard.recipes"],
    package_dir={"fastguard": "fastguard", "fastguard.kernels": "kernels", "fastguard.recipes": "recipes"},
)
