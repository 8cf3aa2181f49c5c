"""Steps that are not finite: noted with their samples, and what a policy makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.training.divergence import (
    FOLDER,
    DivergedError,
    DivergenceConfig,
    RollbackError,
    decide,
    note_step,
    noted_steps,
    passed_over,
)


def _data(place: str) -> Manifest:
    shards = tuple(ShardInfo(name=f"shard-{n}.tar", num_samples=10, num_bytes=1, sha256="0") for n in range(3))
    return Manifest(uri=place, shards=shards, num_classes=2, image_side=112, seed=0, source={}, identities=("a", "b"))


def test_a_note_says_where_each_sample_lies(tmp_path):
    place = str(tmp_path)
    note_step(place, _data("file:///data"), 7, np.array([0, 9, 10, 29]), {"loss": "nan", "epoch": 1})
    note = storage.read_json(storage.join(place, FOLDER, "step_00000007.json"))
    assert (note["step"], note["loss"], note["epoch"]) == (7, "nan", 1)
    assert [(sample["shard"].rsplit("/", 1)[1], sample["row"]) for sample in note["samples"]] == [
        ("shard-0.tar", 0),
        ("shard-0.tar", 9),
        ("shard-1.tar", 0),
        ("shard-2.tar", 9),
    ]
    assert [sample["index"] for sample in note["samples"]] == [0, 9, 10, 29]


def test_noted_steps_and_the_one_before_each_are_passed_over(tmp_path):
    place = str(tmp_path)
    assert noted_steps(place) == []
    assert passed_over(place) == set()
    for step in (0, 12, 100_000_000):
        note_step(place, _data("file:///data"), step, np.array([1]), {})
    assert noted_steps(place) == [0, 12, 100_000_000]
    assert passed_over(place) == {0, 11, 12, 99_999_999, 100_000_000}


def test_each_policy(tmp_path):
    place = str(tmp_path)
    note_step(place, _data("file:///data"), 3, np.array([1]), {})
    with pytest.raises(DivergedError, match=r"loss is nan: the run diverged; lower.*non_finite/step_00000003\.json"):
        decide(DivergenceConfig(), place, 3, "step 3: the loss is nan")
    with pytest.raises(RollbackError):
        decide(DivergenceConfig(policy="rollback", budget=1), place, 3, "x")
    decide(DivergenceConfig(policy="skip", budget=1), place, 3, "x")
    note_step(place, _data("file:///data"), 5, np.array([1]), {})
    for policy in ("skip", "rollback"):
        with pytest.raises(DivergedError, match=r"more than divergence\.budget=1 steps were not finite"):
            decide(DivergenceConfig(policy=policy, budget=1), place, 5, "x")


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"policy": "roll"}, r"divergence\.policy='roll'.*rollback"), ({"budget": -1}, r"divergence\.budget=-1")],
)
def test_bad_values_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        DivergenceConfig(**fields)
