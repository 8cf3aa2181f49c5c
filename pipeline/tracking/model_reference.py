"""Names of models in the registry, as MLflow writes them: ``models:/NAME@ALIAS`` and ``models:/NAME/VERSION``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

SCHEME: Final = "models:/"
_FORM: Final = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>[1-9][0-9]*))")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReference:
    """One version of a registered model, by its number or by an alias, which may move.

    Attributes:
        name: The registered model.
        alias: Empty where the version is given.
        version: From 1; 0 where the alias is given.
    """

    name: str
    alias: str = ""
    version: int = 0

    @classmethod
    def parse(cls, text: str, field: str) -> ModelReference:
        """Read a reference.

        Raises:
            ValueError: It is of another form; ``field`` and both forms are named.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{field}={text!r} must be {SCHEME}NAME@ALIAS or {SCHEME}NAME/VERSION (a number from 1)")
        return cls(name=found["name"], alias=found["alias"] or "", version=int(found["version"] or 0))
