"""The objectives by name: a plain table. A new one is a file beside this one, and its import and row here.

The classes are imported at once, since torch.compile cannot trace an import.
"""

from __future__ import annotations

from typing import Any

from fastguard.loss.objectives.awm import Awm
from fastguard.loss.objectives.base import Objective, Scope, Terms
from fastguard.loss.objectives.cispo import Cispo
from fastguard.loss.objectives.copg import Copg
from fastguard.loss.objectives.dgpo import Dgpo
from fastguard.loss.objectives.diffusion_nft import DiffusionNft
from fastguard.loss.objectives.dpo import Dpo
from fastguard.loss.objectives.dppo import Dppo
from fastguard.loss.objectives.dro import Dro
from fastguard.loss.objectives.flow_dppo import FlowDppo
from fastguard.loss.objectives.flow_grpo import FlowGrpo
from fastguard.loss.objectives.fr_ppo import FrPpo
from fastguard.loss.objectives.given import Given
from fastguard.loss.objectives.gmpo import Gmpo
from fastguard.loss.objectives.grpo_guard import GrpoGuard
from fastguard.loss.objectives.hinge import Hinge
from fastguard.loss.objectives.matching import MatchingObjective, Noised
from fastguard.loss.objectives.op_grpo import OpGrpo
from fastguard.loss.objectives.power_mean import PowerMean
from fastguard.loss.objectives.ppo_rpe import PpoRpe
from fastguard.loss.objectives.rpg import Rpg
from fastguard.loss.objectives.sapo import Sapo
from fastguard.loss.objectives.shifted import Shifted
from fastguard.loss.objectives.spo import Spo
from fastguard.loss.objectives.surrogate import Surrogate
from fastguard.loss.objectives.tic_grpo import TicGrpo
from fastguard.options import check_options, options_of

OBJECTIVES: dict[str, type[Objective]] = {
    "grpo_guard": GrpoGuard,
    "flow_grpo": FlowGrpo,
    "flow_dppo": FlowDppo,
    "dppo": Dppo,
    "copg": Copg,
    "hinge": Hinge,
    "ppo_rpe": PpoRpe,
    "fr_ppo": FrPpo,
    "surrogate": Surrogate,
    "power_mean": PowerMean,
    "cispo": Cispo,
    "sapo": Sapo,
    "spo": Spo,
    "dro": Dro,
    "tic_grpo": TicGrpo,
    "gmpo": Gmpo,
    "rpg": Rpg,
    "op_grpo": OpGrpo,
    "diffusion_nft": DiffusionNft,
    "awm": Awm,
    "dgpo": Dgpo,
    "dpo": Dpo,
}
DEFAULT_OBJECTIVE = "grpo_guard"
DEFAULT_MATCHING = "diffusion_nft"
OPTIONS = options_of(OBJECTIVES)
"""The names of each objective's own options."""

__all__ = [
    "DEFAULT_MATCHING",
    "DEFAULT_OBJECTIVE",
    "OBJECTIVES",
    "OPTIONS",
    "Given",
    "MatchingObjective",
    "Noised",
    "Objective",
    "Scope",
    "Shifted",
    "Terms",
    "build_objective",
]


def build_objective(name: str, **options: Any) -> Objective:
    """Make an objective from its name and its own options, which its class documents.

    Args:
        name: a name of `OBJECTIVES`.
        options: the options of that objective; others have their defaults.

    Raises:
        ValueError: the name, an option or a value is unknown; the message lists the known ones.
        TypeError: an option has another type.
    """
    check_options("objective", OPTIONS, name, options)
    return OBJECTIVES[name](**options)
