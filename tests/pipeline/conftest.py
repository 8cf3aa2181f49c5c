"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """One real Ray cluster on this machine for all tests that ask for it: it takes seconds to start."""
    from pipeline.runtime import ray_session

    with ray_session():
        yield
