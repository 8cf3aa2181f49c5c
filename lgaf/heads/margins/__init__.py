"""Margins by name: adding one is one file here and one line below."""

from typing import Any, Final

from lgaf.config import from_dict, require_choice
from lgaf.heads.margins.adaface import AdaFace
from lgaf.heads.margins.arcface import ArcFace
from lgaf.heads.margins.base import Margin
from lgaf.heads.margins.combined import Combined
from lgaf.heads.margins.cosface import CosFace
from lgaf.heads.margins.curricularface import CurricularFace
from lgaf.heads.margins.magface import MagFace
from lgaf.heads.margins.mv_softmax import MVSoftmax
from lgaf.heads.margins.uniface import UniFace

MARGINS: Final[dict[str, type[Margin]]] = {
    "arcface": ArcFace,
    "cosface": CosFace,
    "combined": Combined,
    "adaface": AdaFace,
    "magface": MagFace,
    "mv_softmax": MVSoftmax,
    "curricularface": CurricularFace,
    "uniface": UniFace,
}

__all__ = ["MARGINS", "Margin", "create_margin"]


def create_margin(name: str, **overrides: Any) -> Margin:
    """Make a margin of `MARGINS`, with some of its fields set.

    Raises:
        ValueError: An unknown name or field (the nearest valid one is given), or a field's value of the wrong type or
            out of range.
    """
    require_choice("margin", name, MARGINS)
    return from_dict(MARGINS[name], overrides, "head")
