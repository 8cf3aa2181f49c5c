"""The report survives JSON, its metric names survive MLflow, and its figures are pictures."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.evaluation.report import (
    BenchmarkResult,
    EvalReport,
    loss_figure,
    outcomes,
    pack_outcomes,
    roc_figure,
)

MLFLOW_NAME = re.compile(r"^[A-Za-z0-9_\-. :/]+$")
CORRECT = np.arange(13) % 3 == 0


def result(name: str = "lfw", accuracy: float = 0.9) -> BenchmarkResult:
    return BenchmarkResult(
        name=name,
        num_pairs=13,
        num_folds=10,
        accuracy=accuracy,
        accuracy_std=0.01,
        val_at_far_1e3=0.5,
        tar_at_far={"1e-1": 0.9, "1e-2": 0.8, "1e-3": 0.7, "1e-4": 0.6},
        area_under_curve=0.95,
        fingerprint="ab" * 32,
        correct=pack_outcomes(CORRECT),
        xnorm=22.6,
    )


REPORT = EvalReport(model_fingerprint="cd" * 32, benchmarks=(result(), result("cfp_fp", 0.8)))


def test_json_round_trip():
    text = REPORT.to_json()
    again = EvalReport.from_json(text)
    assert again == REPORT
    assert again.to_json() == text
    assert outcomes(again.benchmarks[1]).tolist() == CORRECT.tolist()


def test_a_report_without_benchmark_fields_is_named():
    values = json.loads(REPORT.to_json())
    del values["benchmarks"][1]["xnorm"]
    with pytest.raises(ValueError, match=r"report\.benchmarks\[1\]: missing xnorm"):
        EvalReport.from_json(json.dumps(values))
    with pytest.raises(ValueError, match=r"JSON compliant"):
        replace(REPORT, benchmarks=(replace(result(), xnorm=float("nan")),)).to_json()


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_outcomes_round_trip(correct):
    packed = replace(result(), num_pairs=len(correct), correct=pack_outcomes(correct))
    assert outcomes(packed).tolist() == correct


def test_outcomes_of_another_number_of_pairs_are_an_error():
    with pytest.raises(ValueError, match="lfw: correct holds 2 bytes, which is not 600 pairs"):
        outcomes(replace(result(), num_pairs=600))


def test_metrics_have_names_that_mlflow_allows():
    metrics = EvalReport(
        model_fingerprint="x", benchmarks=(result(), result("cfp_fp", 0.8), result("our cams@night (1)é"))
    ).metrics()
    assert metrics["eval/lfw/accuracy"] == 0.9
    assert metrics["eval/lfw/tar_at_far_1e-4"] == 0.6
    assert metrics["eval/cfp_fp/val_at_far_1e-3"] == 0.5
    assert metrics["eval/our_cams_night__1__/xnorm"] == 22.6
    assert all(MLFLOW_NAME.match(name) for name in metrics)
    assert all(type(value) is float for value in metrics.values())
    assert len(metrics) == 1 + 3 * 9


def test_mean_accuracy():
    assert REPORT.mean_accuracy == pytest.approx(0.85)
    assert REPORT.metrics()["eval/mean_accuracy"] == REPORT.mean_accuracy


def png_size(figure) -> tuple[int, int]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    return Image.open(buffer).size


def test_roc_figure_renders():
    far = np.array([0, 0, 1e-4, 1e-2, 1.0])
    figure = roc_figure({"lfw": (far, np.array([0, 0.5, 0.7, 0.9, 1.0])), "cfp_fp": (far, far)})
    assert min(png_size(figure)) > 400
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lfw", "cfp_fp"]
    png_size(roc_figure({}))


def test_loss_figure_renders_and_smooths():
    steps = np.arange(1000)
    loss = np.exp(-steps / 300) + np.where(steps % 2 == 0, 0.2, -0.2)
    figure = loss_figure(steps, loss, np.full(1000, 0.1))
    assert min(png_size(figure)) > 400
    raw, smooth = (line.get_ydata() for line in figure.axes[0].lines)
    assert np.abs(np.diff(smooth)).max() < 0.1 * np.abs(np.diff(raw)).max()
    assert np.allclose(smooth[20:-20], np.exp(-steps / 300)[20:-20], atol=0.02)
    assert figure.axes[1].get_ylabel() == "learning rate"


@pytest.mark.parametrize("loss", [[], [1.0], [np.nan, 1.0, np.inf, 2.0]])
def test_loss_figure_of_short_or_diverged_runs_renders(loss):
    png_size(loss_figure(range(len(loss)), loss, [0.1] * len(loss)))


def test_loss_figure_names_unequal_lengths():
    with pytest.raises(ValueError, match=r"steps \(3,\), loss \(2,\)"):
        loss_figure([1, 2, 3], [1.0, 2.0], [0.1, 0.1, 0.1])


def test_figures_leave_pyplot_alone():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    roc_figure({})
    assert plt.get_fignums() == before
