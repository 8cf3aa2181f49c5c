#!/usr/bin/env python
"""Train, evaluate and register a small LGAF, end to end: the embedded default needs no data and no server.

With ``--data`` and ``--benchmarks`` the same job takes real ones (an InsightFace RecordIO folder, ``.bin`` sets).
"""

from pipeline.cli import train_job
from pipeline.presets import demo

if __name__ == "__main__":
    raise SystemExit(train_job(demo()))
