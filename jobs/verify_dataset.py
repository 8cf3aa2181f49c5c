#!/usr/bin/env python
"""Check a packed data set: every shard, every image; exits 1 if anything is wrong."""

from pipeline.data_cli import verify_job

if __name__ == "__main__":
    raise SystemExit(verify_job())
