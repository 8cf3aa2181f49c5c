"""The user's own mistakes are found under all that Ray and Ray Train wrap around them."""

from __future__ import annotations

import pickle
import traceback

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from pipeline.data.manifest import ManifestError
from pipeline.data.shards import ShardError
from pipeline.errors import causes, message, user_error
from pipeline.storage import StorageError
from pipeline.training.failure import FatalTrainingError


def _raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


def _task_error(cause: BaseException) -> BaseException:
    """What `ray.get` raises of a task that failed: Ray's own class, made from the cause's class, full of tracebacks."""
    _raised(cause)
    text = "".join(traceback.format_exception(cause))
    return RayTaskError("read_shard", text, cause, proctitle="ray::read", pid=1, ip="127.0.0.1").as_instanceof_cause()


def test_chained_causes_outermost_first():
    inner, middle = KeyError("inner"), _raised(OSError("middle"))
    middle.__cause__ = inner
    outer = _raised(RuntimeError("outer"), middle)
    assert list(causes(outer)) == [outer, middle, inner]


def _fail_while_handling(error: Exception, replaces: bool) -> None:
    try:
        raise error
    except type(error):
        if replaces:
            raise RuntimeError("a bug") from None
        raise RuntimeError("clean-up failed")  # noqa: B904 - that it has no "from" is the case here


def test_errors_raised_while_another_was_handled():
    with pytest.raises(RuntimeError) as caught:
        _fail_while_handling(ShardError("shard-1.tar: is short"), replaces=False)
    assert str(user_error(caught.value)) == "shard-1.tar: is short"


def test_an_error_that_replaces_another_on_purpose_is_not_it():
    # `raise ... from None` says that what was handled does not matter: the bug must keep its traceback.
    with pytest.raises(RuntimeError) as caught:
        _fail_while_handling(ValueError("not an int"), replaces=True)
    assert user_error(caught.value) is None


def test_objects_with_a_cause_and_worker_failures():
    data = ShardError("shard-2.tar: sha256 differs")
    group = WorkerGroupError("2 workers failed", {0: RuntimeError("gloo"), 1: _task_error(data)})
    found = list(causes(_raised(RuntimeError("fit failed"), group)))
    assert group in found
    assert data in found
    assert user_error(_raised(RuntimeError("fit failed"), group)) is data


def test_a_loop_of_causes_ends():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    first.cause = first
    assert list(causes(first)) == [first, second]


@pytest.mark.parametrize(
    "data",
    [ShardError("shard-3.tar: bad"), ManifestError("manifest.json: bad"), StorageError("s3://x: does not exist")],
    ids=lambda error: type(error).__name__,
)
def test_the_data_error_wins_over_what_wraps_it(data):
    wrapped = _raised(ValueError("Ray Data: the operator failed"), _task_error(data))
    assert user_error(wrapped) is data
    assert message(user_error(wrapped)) == str(data)


def test_a_wrong_value_is_the_users_when_nothing_is_more_specific():
    error = ValueError("batch_size=127 must be a multiple of stream.num_streams=4")
    assert user_error(_raised(RuntimeError("stage failed"), error)) is error
    assert user_error(FatalTrainingError("x")) is not None


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("bug"), ZeroDivisionError(), MemoryError()])
def test_bugs_and_the_machine_are_not_the_users(error):
    assert user_error(_raised(RuntimeError("outer"), error)) is None
    assert user_error(error) is None


def test_messages_have_no_traceback():
    data = ShardError("shard-4.tar: sha256 is a, the manifest says b")
    wrapped = _task_error(data)
    assert "Traceback" in str(wrapped) or "ray::" in str(wrapped)
    assert message(wrapped) == "shard-4.tar: sha256 is a, the manifest says b"
    assert message(RuntimeError("  plain \n")) == "plain"
    assert message(ZeroDivisionError()) == "ZeroDivisionError"


def test_a_wrapped_error_that_crossed_a_process_is_still_found():
    cause = ShardError("shard-5.tar: is short")
    error = RayTaskError("read_shard", "Traceback ...", cause, proctitle="ray::read", pid=1, ip="127.0.0.1")
    received = pickle.loads(pickle.dumps(error)).as_instanceof_cause()
    assert message(user_error(received)) == "shard-5.tar: is short"
