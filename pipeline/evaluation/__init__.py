"""Benchmarks: embedding, scoring, reports."""
