#!/usr/bin/env python
"""Write a packed data set as an InsightFace pack (RecordIO)."""

from pipeline.packing_cli import export_job

if __name__ == "__main__":
    raise SystemExit(export_job())
