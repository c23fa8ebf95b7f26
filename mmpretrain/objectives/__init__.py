"""The objectives of recipes, by kind."""

from mmpretrain.objectives.base import Context, Objective, ObjectiveConfig
from mmpretrain.objectives.clip import CLIP
from mmpretrain.objectives.dino import DINO
from mmpretrain.objectives.mae import MAE
from mmpretrain.objectives.masked_text import MaskedText
from mmpretrain.objectives.siglip import SigLIP
from mmpretrain.objectives.simclr import SimCLR
from mmpretrain.objectives.simmim import SimMIM
from mmpretrain.plugins import Kinds

_KNOWN: dict[str, type[Objective]] = {
    "clip": CLIP,
    "siglip": SigLIP,
    "simclr": SimCLR,
    "simmim": SimMIM,
    "mae": MAE,
    "dino": DINO,
    "masked_text": MaskedText,
}
OBJECTIVES = Kinds(_KNOWN, "mmpretrain.objectives", "objective")

__all__ = ["OBJECTIVES", "Context", "Objective", "ObjectiveConfig"]
