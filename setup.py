"""What pyproject.toml cannot say: the package layout, and where the project stands on the web.

The top-level folders kernels/ and recipes/ are installed as fastguard.kernels and fastguard.recipes.

PyPI shows README.md without the files beside it, so its links have to be absolute. GitHub's actions say in their
environment where the repository is, and which tag is built. A build elsewhere leaves the links as they are.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

LINK = re.compile(r"\]\((?!\w+:|#)([^)]+)\)")
"""to a file of the repository"""


def description(readme: str, repository: str | None, tag: str) -> str:
    """The text of README.md with absolute links, if the address of the repository is known."""
    if repository is None:
        return readme

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
        return f"]({repository}/{kind}/{tag}/{link[1]})"

    return LINK.sub(absolute, readme)


def addresses(repository: str | None, tag: str) -> dict[str, str]:
    """The project's pages, if the address of the repository is known."""
    if repository is None:
        return {}
    return {
        "Repository": repository,
        "Documentation": f"{repository}/blob/{tag}/docs/index.md",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


if __name__ == "__main__":
    known = "GITHUB_REPOSITORY" in os.environ
    where = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}" if known else None
    built = os.environ.get("GITHUB_REF_NAME", "main")
    setup(
        packages=[*find_packages(include=["fastguard", "fastguard.*"]), "fastguard.kernels", "fastguard.recipes"],
        package_dir={"fastguard": "fastguard", "fastguard.kernels": "kernels", "fastguard.recipes": "recipes"},
        long_description=description(Path("README.md").read_text(encoding="utf-8"), where, built),
        long_description_content_type="text/markdown",
        project_urls=addresses(where, built),
    )
