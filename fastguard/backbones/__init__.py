"""Model families: the protocol, the table, and Flux.1."""

from fastguard.extras import need

need("train")

from fastguard.backbones.base import Backbone, Family, Skeleton, TextEncoder, to_pixels
from fastguard.backbones.build import FAMILIES, family_of

__all__ = ["FAMILIES", "Backbone", "Family", "Skeleton", "TextEncoder", "family_of", "to_pixels"]
