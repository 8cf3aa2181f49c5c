import pytest

from pipeline.tracking import runs
from pipeline.tracking.outbox import RunAddress
from pipeline.tracking.store import client
from tests.mlflow_server import Gate, MlflowServer


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


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    """One real server, which nobody stops."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def gate(mlflow_server, monkeypatch):
    """A way to that server that can be shut; it is open."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # with our default of 2 each attempt takes 5 s
    gate = Gate(mlflow_server.port)
    gate.open()
    yield gate
    gate.shut()


@pytest.fixture
def address(gate, tmp_path, request):
    """Of a run that is not made yet, by way of the gate."""
    return RunAddress(
        run_uri=str(tmp_path / "run"),
        tracking_uri=gate.uri,
        experiment=request.node.name,
        run_name="r",
        tags={"preset": "demo"},
    )
