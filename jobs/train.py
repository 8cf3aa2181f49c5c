#!/usr/bin/env python
"""Train, evaluate and register any named run: the paper's, its ablations, the compared heads and networks.

The first argument is the run's name (``--help`` lists them), the others are those of every training job.
"""

from pipeline.cli import named_train_job

if __name__ == "__main__":
    raise SystemExit(named_train_job())
