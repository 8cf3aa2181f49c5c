"""The job graph: what is done is not done again, what changed is, and a killed graph goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from pipeline import storage
from pipeline.evaluation.report import BenchmarkResult, EvalReport
from pipeline.graph import Stage, run_graph
from pipeline.stages import Benchmarks, Registration
from pipeline.tracking.promotion import BenchmarkDifference, PromotionDecision
from pipeline.training.trainer import TrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    value: int
    note: str = ""


class Graph:
    """a -> b -> d, c -> d: sums, with a record of what ran."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.told: list[tuple[str, bool]] = []
        self.inputs = {"a": 1, "b": 10, "c": 100, "d": 1000}
        self.invalid: set[str] = set()
        self.broken: set[str] = set()

    def _stage(self, name: str, *needs: str) -> Stage:
        def run(needed) -> Number:
            assert set(needed) == set(needs)
            if name in self.broken:
                raise RuntimeError(f"{name} was killed")
            self.ran.append(name)
            return Number(value=self.inputs[name] + sum(artefact.value for artefact in needed.values()))

        return Stage(
            name=name,
            artefact=Number,
            inputs={"addend": self.inputs[name]},
            needs=needs,
            run=run,
            is_valid=lambda artefact: name not in self.invalid,
        )

    def run(self) -> dict[str, int]:
        self.ran, self.told = [], []
        stages = [self._stage("a"), self._stage("b", "a"), self._stage("c"), self._stage("d", "b", "c")]
        artefacts = run_graph(stages, self.folder, lambda name, done: self.told.append((name, done)))
        return {name: artefact.value for name, artefact in artefacts.items()}


@pytest.fixture(params=["file", "memory"])
def graph(request, tmp_path) -> Graph:
    return Graph(str(tmp_path / "stages") if request.param == "file" else f"memory://graph{tmp_path.name}")


def test_runs_in_order_and_once(graph):
    assert graph.run() == {"a": 1, "b": 11, "c": 100, "d": 1111}
    assert graph.ran == ["a", "b", "c", "d"]
    assert graph.told == [(name, False) for name in "abcd"]
    assert graph.run() == {"a": 1, "b": 11, "c": 100, "d": 1111}
    assert graph.ran == []
    assert graph.told == [(name, True) for name in "abcd"]


@pytest.mark.parametrize(("changed", "again"), [("a", "abd"), ("b", "bd"), ("c", "cd"), ("d", "d")])
def test_changed_inputs_run_the_stage_and_all_that_depend_on_it(graph, changed, again):
    graph.run()
    graph.inputs[changed] += 5
    assert graph.run()["d"] == 1116
    assert "".join(graph.ran) == again
    graph.run()
    assert graph.ran == []


def test_an_equal_artefact_of_a_changed_stage_stops_there(graph):
    # b's artefact is the same again (a rises by what b falls), so d has nothing new to do.
    graph.run()
    graph.inputs["a"] += 5
    graph.inputs["b"] -= 5
    graph.run()
    assert graph.ran == ["a", "b"]


@pytest.mark.parametrize("lost", "abcd")
def test_a_result_that_no_longer_stands_is_made_again(graph, lost):
    before = graph.run()
    graph.invalid = {lost}
    assert graph.run() == before
    assert graph.ran == [lost]


@pytest.mark.parametrize(("killed", "before", "after"), [("a", "", "abcd"), ("b", "a", "bcd"), ("d", "abc", "d")])
def test_a_killed_graph_goes_on_where_it_stopped(graph, killed, before, after):
    graph.broken = {killed}
    with pytest.raises(RuntimeError, match=f"{killed} was killed"):
        graph.run()
    assert "".join(graph.ran) == before
    graph.broken = set()
    assert graph.run()["d"] == 1111
    assert "".join(graph.ran) == after


def _stage(name: str, *needs: str, run: Callable = lambda needed: Number(value=0)) -> Stage:
    return Stage(name=name, artefact=Number, inputs={}, needs=needs, run=run)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([_stage("b", "a"), _stage("a")], r"stage 'b' needs \('a',\)"),
        ([_stage("a", "a")], r"stage 'a' needs"),
        ([_stage("a"), _stage("a")], r"stage 'a'"),
        ([_stage("a"), _stage("b", "a", "zzz")], r"zzz.*there are \['a'\]"),
    ],
)
def test_a_wrong_order_is_an_error(tmp_path, stages, text):
    with pytest.raises(ValueError, match=text):
        run_graph(stages, str(tmp_path))


def test_a_wrong_order_is_found_before_anything_runs(tmp_path):
    ran = []

    def run(needed) -> Number:
        ran.append("a")
        return Number(value=1)

    with pytest.raises(ValueError, match="stage 'b'"):
        run_graph([_stage("a", run=run), _stage("b", "missing")], str(tmp_path))
    assert ran == [], "hours of training may lie between the start and this error"


def _benchmark(name: str) -> BenchmarkResult:
    return BenchmarkResult(
        name=name,
        num_pairs=8,
        num_folds=2,
        accuracy=0.1 + 0.2,
        accuracy_std=1e-17,
        val_at_far_1e3=1 / 3,
        tar_at_far={"1e-1": 0.5, "1e-4": 0.0},
        area_under_curve=0.75,
        fingerprint="ab" * 32,
        correct="/w==",
        xnorm=22.5,
    )


def _difference(name: str, champion: float | None) -> BenchmarkDifference:
    return BenchmarkDifference(
        name=name, fingerprint="cd", num_pairs=8, candidate_accuracy=0.9, champion_accuracy=champion
    )


ARTEFACTS = [
    Benchmarks(uri="file:///b", sets=("lfw", "größer"), sha256=("a1", "b2")),
    Benchmarks(uri="file:///b", sets=(), sha256=()),
    TrainedModel(model_uri="s3://m", fingerprint="f", num_steps=10, final_loss=2.0, images_per_second=1e9),
    EvalReport(model_fingerprint="f", benchmarks=(_benchmark("lfw"), _benchmark("cplfw"))),
    Registration(
        model_name="lgaf",
        version=3,
        champion_version=0,
        decision=PromotionDecision(
            promote=False,
            reasons=("Worse.", "Twice."),
            p_value=0.03125,
            differences=(_difference("lfw", 0.5), _difference("new", None)),
        ),
    ),
]


@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda artefact: type(artefact).__name__)
def test_artefacts_come_back_as_they_were(tmp_path, artefact):
    def graph(run) -> list[Stage]:
        made = Stage(name="made", artefact=type(artefact), inputs={}, needs=(), run=run)
        used = Stage(name="used", artefact=Number, inputs={}, needs=("made",), run=lambda _: Number(value=1))
        return [made, used]

    def never(needed) -> None:
        raise AssertionError("ran again")

    run_graph(graph(lambda needed: artefact), str(tmp_path))
    told = []
    again = run_graph(graph(never), str(tmp_path), lambda name, done: told.append((name, done)))
    assert again["made"] == artefact
    assert type(again["made"]) is type(artefact)
    # What depends on it sees the same fingerprint whether the artefact was made or read.
    assert told == [("made", True), ("used", True)]


def test_results_that_are_not_json_are_an_error_that_names_the_file(tmp_path):
    stage = _stage("a", run=lambda needed: Number(value=1))
    run_graph([stage], str(tmp_path))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(storage.StorageError, match=r"a\.json: is not valid JSON"):
        run_graph([stage], str(tmp_path))


def test_input_order_does_not_matter_and_the_name_does(tmp_path):
    ran = []

    def run(needed) -> Number:
        ran.append(1)
        return Number(value=1)

    first = replace(_stage("a", run=run), inputs={"x": 1, "y": (1, 2)})
    run_graph([first], str(tmp_path))
    run_graph([replace(first, inputs={"y": [1, 2], "x": 1})], str(tmp_path))
    assert len(ran) == 1
    run_graph([replace(first, name="b")], str(tmp_path))
    assert len(ran) == 2
