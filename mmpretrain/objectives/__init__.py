"""Every objective a recipe can name."""

from mmpretrain.objectives.base import Context, Objective, ObjectiveConfig
from mmpretrain.objectives.clip import CLIP
from mmpretrain.objectives.masked_text import MaskedText
from mmpretrain.objectives.siglip import SigLIP
from mmpretrain.objectives.simclr import SimCLR
from mmpretrain.objectives.simmim import SimMIM

OBJECTIVES: dict[str, type[Objective]] = {
    "clip": CLIP,
    "siglip": SigLIP,
    "simclr": SimCLR,
    "simmim": SimMIM,
    "masked_text": MaskedText,
}

__all__ = ["OBJECTIVES", "Context", "Objective", "ObjectiveConfig"]
