"""Margins by name: adding one is one file here and one line below."""

from typing import Any, Final

from lgaf.config import require_choice
from lgaf.heads.margins.arcface import ArcFace
from lgaf.heads.margins.base import Margin
from lgaf.heads.margins.cosface import CosFace

MARGINS: Final[dict[str, type[ArcFace] | type[CosFace]]] = {
    "arcface": ArcFace,
    "cosface": CosFace,
}

__all__ = ["MARGINS", "Margin", "create_margin"]


def create_margin(name: str, **overrides: Any) -> Margin:
    """Make a margin of `MARGINS`, with some of its fields set.

    Raises:
        ValueError: An unknown name, or a field's value out of range.
    """
    require_choice("margin", name, MARGINS)
    return MARGINS[name](**overrides)
