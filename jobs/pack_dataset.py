#!/usr/bin/env python
"""Pack a face data set into verified WebDataset shards with a manifest."""

from pipeline.packing_cli import pack_job

if __name__ == "__main__":
    raise SystemExit(pack_job())
