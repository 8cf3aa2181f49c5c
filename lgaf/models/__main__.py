"""``python -m lgaf.models``: size, operations and time of LGAF, part by part, beside its plain backbone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lgaf.models import LGAFConfig
from lgaf.models.cost import cost_table, network_costs, network_durations


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lgaf.models", description=__doc__)
    parser.add_argument("--backbone", default="iresnet100", help="a name of BACKBONES")
    parser.add_argument("--embedding-dim", type=int, default=512, metavar="D", help="length of the embedding")
    parser.add_argument("--time-batch", type=int, default=8, metavar="N", help="images of one timed pass, at least 2")
    parser.add_argument("--no-time", action="store_true", help="count only: takes seconds and no memory")
    wanted = parser.parse_args(arguments)
    try:
        config = LGAFConfig(backbone=wanted.backbone, embedding_dim=wanted.embedding_dim)
        costs = network_costs(config)
        durations = None if wanted.no_time else network_durations(config, wanted.time_batch)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(cost_table(config, costs, durations))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
