#!/usr/bin/env python
"""Train, evaluate and register LGAF on MS1MV2 with the paper's recipe.

``--data`` names the packed shards (or an InsightFace RecordIO folder), ``--benchmarks`` the ``.bin`` sets.
"""

from pipeline.cli import train_job
from pipeline.presets import ms1mv2_r100_arcface

if __name__ == "__main__":
    raise SystemExit(train_job(ms1mv2_r100_arcface()))
