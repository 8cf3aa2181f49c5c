"""What waits and what is an error, by the answers of real servers."""

from __future__ import annotations

import http.server
import logging
import pickle
import ssl
import threading

import pytest
import sqlalchemy.exc
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from pipeline.errors import user_error
from pipeline.storage import StorageError
from pipeline.tracking import runs
from pipeline.tracking.reachability import (
    StoreRefusedError,
    StoreUnreachableError,
    contacting,
    is_unreachable,
)


@pytest.fixture
def answering(monkeypatch):
    """The URI of a server that gives every request the same answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    servers = []

    def start(status, body="no", hang=False):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if hang:
                    release.wait(20)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, *arguments):
                pass

        release = threading.Event()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append((server, release))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, release in servers:
        release.set()
        server.shutdown()
        server.server_close()


def open_run(uri):
    with contacting(uri):
        runs.open_run(uri, "e", "r")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_answers_that_may_pass(answering, status, caplog):
    uri = answering(status)
    with pytest.raises(StoreUnreachableError, match=f"MLflow at {uri} cannot be reached"):
        open_run(uri)
    assert caplog.records == [], "urllib3 has a line for each retry"


def test_a_server_that_does_not_answer(answering):
    with pytest.raises(StoreUnreachableError, match="timeout"):
        open_run(answering(200, hang=True))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, "who are you"),
        (403, "Invalid Host header"),
        (404, "not MLflow"),
        (400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad name"}'),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "not yours"}'),
        (200, "<html>another service</html>"),
    ],
)
def test_answers_that_will_not(answering, status, body):
    uri = answering(status, body)
    with pytest.raises(StoreRefusedError, match=f"MLflow at {uri} refuses: ") as caught:
        open_run(uri)
    assert user_error(caught.value) is caught.value


@pytest.mark.parametrize("uri", ["ftp://somewhere", "http://127.0.0.1:99999"])
def test_addresses_that_lead_nowhere_at_all(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StoreRefusedError, match=r"refuses: "):
        open_run(uri)


def test_a_database_that_is_locked_may_pass_and_a_broken_one_does_not(tmp_path):
    locked = MlflowException("x", error_code=TEMPORARILY_UNAVAILABLE)
    assert is_unreachable(locked)
    assert is_unreachable(sqlalchemy.exc.OperationalError("x", None, Exception("database is locked")))
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreRefusedError, match="file is not a database"):
        open_run(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_certificate_that_is_not_trusted_stays_so():
    assert not is_unreachable(ConnectionError(ssl.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed")))
    assert is_unreachable(ConnectionResetError("by peer"))


def test_an_error_that_was_being_handled_is_not_the_stores(answering):
    uri = answering(403)
    try:
        raise ConnectionResetError("of something else")
    except ConnectionResetError:
        with pytest.raises(StoreRefusedError):
            open_run(uri)


def test_errors_of_other_kinds_pass_through():
    for error in (StorageError("s3://b: cannot read"), ValueError("experiment='e' was deleted"), KeyError("bug")):
        with pytest.raises(type(error)) as caught, contacting("http://x"):
            raise error
        assert caught.value is error


def test_lines_of_others_are_not_dropped(caplog):
    with pytest.raises(StoreUnreachableError), contacting("http://x"):
        raise ConnectionError
    logging.getLogger("urllib3.connectionpool").warning("a retry of S3")
    assert caplog.messages == ["a retry of S3"]


@pytest.mark.parametrize("kind", [StoreUnreachableError, StoreRefusedError])
def test_errors_travel_between_processes(kind):
    again = pickle.loads(pickle.dumps(kind("MLflow at x")))
    assert (type(again), str(again)) == (kind, "MLflow at x")
