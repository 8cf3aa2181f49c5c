#!/usr/bin/env python
"""Train, evaluate and register LGAF on WebFace4M with the paper's recipe.

``--data`` names the packed shards (or an InsightFace RecordIO folder), ``--benchmarks`` the ``.bin`` sets.
"""

from pipeline.cli import train_job
from pipeline.presets import webface4m_r100_arcface

if __name__ == "__main__":
    raise SystemExit(train_job(webface4m_r100_arcface()))
