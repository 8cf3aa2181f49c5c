"""The folder of what MLflow is to be told: durable, in order, on any storage; and which run it is for."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.tracking import outbox
from pipeline.tracking.outbox import Outbox, RunAddress

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    return str(tmp_path) if request.param == "file" else f"memory://{uuid.uuid4().hex}"


def test_events_come_back_in_order_and_leave(place):
    box = Outbox(storage.join(place, "box"))
    assert box.waiting() == []
    names = [box.add("json", {"name": str(i), "value": {"π": [i, None, 0.5]}}) for i in range(12)]
    assert box.waiting() == names, "the twelfth comes after the second"
    assert Outbox(storage.join(place, "box")).waiting() == names
    third = box.read(names[2])
    assert third.content == {"name": "2", "value": {"π": [2, None, 0.5]}}
    assert (third.kind, third.time_ms) == ("json", outbox.time_ms_of(names[2]))
    box.remove(names[2])
    box.remove(names[2])  # sent twice, removed twice
    assert box.read(names[2]) is None
    assert box.waiting() == [*names[:2], *names[3:]]


def test_what_another_process_adds_comes_after_whatever_its_clock_says(tmp_path, monkeypatch):
    mine, theirs = Outbox(str(tmp_path)), Outbox(str(tmp_path))
    first = mine.add("json", {})
    monkeypatch.setattr(outbox.time, "time_ns", lambda: 5)
    second = theirs.add("json", {})
    third = mine.add("json", {})
    assert mine.waiting() == [first, second, third]
    assert outbox.time_ms_of(second) == 0


def test_many_at_once_lose_nothing(tmp_path):
    def add(writer):
        box = Outbox(str(tmp_path))
        for i in range(25):
            box.add("json", {"writer": writer, "i": i})

    threads = [threading.Thread(target=add, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    box = Outbox(str(tmp_path))
    found = [box.read(name).content for name in box.waiting()]
    for writer in range(4):
        assert [event["i"] for event in found if event["writer"] == writer] == list(range(25)), "each in its own order"


def test_files_that_are_no_events_are_left_alone(tmp_path):
    box = Outbox(str(tmp_path))
    name = box.add("json", {})
    (tmp_path / f".{name}.abc.partial").write_text("{")  # of a write that was killed
    (tmp_path / "notes.json").write_text("{}")
    assert box.waiting() == [name]
    with pytest.raises(ValueError, match=r"name='notes\.json' is not that of an event"):
        outbox.kind_of("notes.json")


def test_a_run_is_known_by_its_store_and_by_how_often_it_was_made_anew(place):
    address = RunAddress(run_uri=place, tracking_uri="http://a", experiment="e", run_name="r")
    before = address.identity()
    assert address.run_id() is None
    address.note("1")
    assert address.run_id() == "1"
    assert address.identity() == before, "a stage's fingerprint does not change when the id comes"
    address.note("1")
    assert address.identity() == before
    address.note("2")  # the first was deleted in the UI
    assert address.identity() != before
    other = RunAddress(run_uri=place, tracking_uri="http://b", experiment="e", run_name="r")
    assert other.run_id() is None, "an id of another store"
    assert other.identity() not in (before, address.identity())
    known = storage.read_json(storage.join(place, "mlflow.json"))
    assert (known["tracking_uri"], known["run_id"]) == ("http://a", "2")


def test_what_workers_load_does_not_load_mlflow():
    code = (
        "import json, sys; import pipeline.tracking.metric_sink, pipeline.tracking.outbox;"
        "print(json.dumps([name for name in ('mlflow', 'ray', 'torch') if name in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(found.stdout) == []
