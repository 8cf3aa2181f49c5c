"""Which failures end a run for good, and that the next attempt forgets them."""

from __future__ import annotations

import pytest

from pipeline import storage
from pipeline.data.manifest import ManifestError
from pipeline.data.pack import PackError
from pipeline.data.recordio import RecordIOError
from pipeline.data.shards import ShardError
from pipeline.errors import user_error
from pipeline.training.failure import FatalTrainingError, clear_fatal, fatal_message, raise_fatal, record_fatal


def _wrapped(cause: BaseException) -> RuntimeError:
    try:
        raise RuntimeError("a worker of Ray Data failed") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("kind", [ManifestError, PackError, RecordIOError, ShardError])
@pytest.mark.parametrize("wrap", [_wrapped, lambda error: error], ids=["wrapped", "plain"])
def test_bad_data_is_noted_and_raised_with_its_own_words(tmp_path, kind, wrap):
    run_uri = str(tmp_path)
    record_fatal(run_uri, wrap(kind("shard-000003.tar: sha256 differs")))
    assert fatal_message(run_uri) == "shard-000003.tar: sha256 differs"
    with pytest.raises(FatalTrainingError, match=r"^shard-000003\.tar: sha256 differs$") as caught:
        raise_fatal(run_uri)
    assert user_error(caught.value) is caught.value


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("gloo: connection reset by peer"),
        OSError("disk full"),
        storage.StorageError("s3://bucket/shard: timeout"),  # a network that comes back is worth a restart
        ValueError("of some library"),
        _wrapped(TimeoutError("no heartbeat")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_anything_else_is_worth_a_restart(tmp_path, error):
    record_fatal(str(tmp_path), error)
    assert fatal_message(str(tmp_path)) is None
    raise_fatal(str(tmp_path))
    assert storage.list_files(str(tmp_path)) == []


def test_a_new_attempt_forgets_the_note(tmp_path):
    run_uri = str(tmp_path)
    clear_fatal(run_uri)  # nothing there is fine
    record_fatal(run_uri, ShardError("bad"))
    clear_fatal(run_uri)
    assert fatal_message(run_uri) is None
    raise_fatal(run_uri)
