import pytest

from pipeline.tracking import runs
from pipeline.tracking.store import client


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The URI of one real sqlite store: making its tables takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = runs.default_tracking_uri(str(tmp_path_factory.mktemp("mlflow")))
    client(uri).search_experiments()
    return uri


@pytest.fixture
def run(store, request):
    return runs.open_run(store, "tests", request.node.name)
