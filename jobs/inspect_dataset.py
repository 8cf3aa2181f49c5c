#!/usr/bin/env python
"""Show what is in a packed data set, in tables and pictures."""

from pipeline.data_cli import inspect_job

if __name__ == "__main__":
    raise SystemExit(inspect_job())
