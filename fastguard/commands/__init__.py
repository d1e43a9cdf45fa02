"""What each command of `fastguard` does: a file a command, with its options as a dataclass that is called to run it.

These files are imported at every start, so what takes seconds to import is imported where it is used.
"""

from __future__ import annotations

from fastguard.extras import need

need("train")

from typing import Annotated

import tyro

from fastguard.config import Recipe

RecipeFields = Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
"""The recipe of a command, whose fields are options without a prefix: --section.field VALUE."""
OptionalRecipeFields = Annotated[Recipe | None, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
