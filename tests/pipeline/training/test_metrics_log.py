"""``metrics.jsonl``: each step once, whatever was killed in between."""

from __future__ import annotations

import json
import resource
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.training.metrics_log import NAME, MetricsLog, StepMetrics, read_metrics


def _line(step: int, loss: float = 1.5) -> StepMetrics:
    return StepMetrics(step=step, epoch=0, loss=loss, lr=0.1, images_per_second=10.0, samples_digest=f"{step:x}")


def _write(log: MetricsLog, lines: list[StepMetrics]) -> None:
    log.write(lines)
    log.make_durable()


def _steps(run_uri: str) -> list[int]:
    return [line["step"] for line in read_metrics(run_uri)]


@pytest.fixture(params=["file", "memory"])
def run_uri(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "file" else f"memory://metrics{tmp_path.name}"


def test_lines_are_appended_and_say_everything(run_uri):
    log = MetricsLog(run_uri, 0)
    log.write([_line(0), _line(1)])
    log.write([])
    _write(log, [_line(2, loss=0.25)])
    assert _steps(run_uri) == [0, 1, 2]
    assert read_metrics(run_uri)[2] == {
        "step": 2,
        "epoch": 0,
        "loss": 0.25,
        "lr": 0.1,
        "images_per_second": 10.0,
        "samples_digest": "2",
    }
    text = storage.read_bytes(storage.join(run_uri, NAME)).decode()
    assert text.count("\n") == 3
    assert all(json.loads(line) for line in text.splitlines())


def test_no_file_has_no_lines(run_uri):
    assert read_metrics(run_uri) == []
    MetricsLog(run_uri, 0)
    assert read_metrics(run_uri) == []


@pytest.mark.parametrize("first_step", [0, 3, 5, 9])
def test_a_resumed_run_drops_the_steps_it_does_again(run_uri, first_step):
    _write(MetricsLog(run_uri, 0), [_line(step, loss=1.0) for step in range(5)])
    resumed = MetricsLog(run_uri, first_step)
    kept = list(range(min(first_step, 5)))
    assert _steps(run_uri) == kept
    _write(resumed, [_line(step, loss=2.0) for step in range(first_step, 7)])
    assert _steps(run_uri) == kept + list(range(first_step, 7))
    assert [line["loss"] for line in read_metrics(run_uri)] == [1.0] * len(kept) + [2.0] * len(range(first_step, 7))


@given(st.integers(1, 200))
def test_a_torn_last_line_is_as_if_never_written(tmp_path_factory, cut):
    run_uri = str(tmp_path_factory.mktemp("run"))
    _write(MetricsLog(run_uri, 0), [_line(step) for step in range(4)])
    path = storage.local_path(storage.join(run_uri, NAME))
    content = path.read_bytes()
    cut = min(cut, len(content))
    path.write_bytes(content[:-cut])
    whole = content[:-cut].count(b"\n")
    assert _steps(run_uri) == list(range(whole))
    _write(MetricsLog(run_uri, 4), [_line(4)])
    assert _steps(run_uri) == [*range(whole), 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_loss_that_is_not_a_number_stays_readable(run_uri):
    _write(MetricsLog(run_uri, 0), [_line(0, loss=float("nan")), _line(1, loss=float("inf"))])
    assert read_metrics(run_uri)[0]["loss"] != read_metrics(run_uri)[0]["loss"]
    assert read_metrics(run_uri)[1]["loss"] == float("inf")


def test_a_file_has_each_line_at_once_an_object_store_when_a_checkpoint_counts_on_it(run_uri):
    log = MetricsLog(run_uri, 0)
    log.write([_line(0)])
    assert _steps(run_uri) == ([] if run_uri.startswith("memory") else [0])
    log.make_durable()
    assert _steps(run_uri) == [0]


def test_a_disk_that_was_full_costs_no_line_and_leaves_no_half_one(tmp_path, caplog):
    """A limit on the size of files, which the kernel enforces as it does a full disk: half of a line gets in."""
    run_uri = str(tmp_path)
    log = MetricsLog(run_uri, 0)
    log.write([_line(0), _line(1)])
    size = (tmp_path / NAME).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 4, limits[1]))
    try:
        log.write([_line(2)])
        log.write([_line(3)])
        with pytest.raises(OSError, match="File too large"):
            log.make_durable()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert _steps(run_uri) == [0, 1]
    assert sum("its lines are kept and written later" in record.getMessage() for record in caplog.records) == 1
    log.write([_line(4)])
    assert _steps(run_uri) == [0, 1, 2, 3, 4]
