"""``python -m pipeline.data.augment``: the pictures, tables and speeds of the recipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.augment.describe import operations_table, recipes_table, speed_table, write_pictures

_USAGE = "usage: python -m pipeline.data.augment pictures FOLDER | tables | speed\n"


def main(arguments: Sequence[str]) -> int:
    """Writes the pictures, or prints the tables or the speeds measured here."""
    if len(arguments) == 2 and arguments[0] == "pictures":
        for path in write_pictures(Path(arguments[1])):
            sys.stdout.write(f"wrote {path}\n")
    elif list(arguments) == ["tables"]:
        sys.stdout.write(f"{recipes_table()}\n\n{operations_table()}\n")
    elif list(arguments) == ["speed"]:
        sys.stdout.write(f"{speed_table()}\n")
    else:
        sys.stderr.write(_USAGE)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
