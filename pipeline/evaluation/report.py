"""What an evaluation leaves behind: a JSON report, flat metrics for the tracker, and figures."""

# Shape legend: P = pairs, K = points of a ROC curve, S = steps

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from lgaf.config import from_dict

# Keys of `BenchmarkResult.tar_at_far`; "1e-4" and not "0.0001", as papers write it.
FAR_NAMES: Final = {1e-1: "1e-1", 1e-2: "1e-2", 1e-3: "1e-3", 1e-4: "1e-4"}
# The lowest FAR on the figure's log axis; a smaller one is drawn at the border.
_LOWEST_FAR: Final = 1e-5

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult:
    """Scores of one model on one benchmark; rates are fractions in [0, 1]. See `VerificationResult` for definitions.

    Attributes:
        name: Benchmark.
        num_pairs: P.
        num_folds: Folds of the protocol.
        accuracy: Mean over held-out folds.
        accuracy_std: Population standard deviation over the folds.
        val_at_far_1e3: insightface's VAL@FAR=1e-3.
        tar_at_far: TAR over all pairs, by FAR: keys "1e-1", "1e-2", "1e-3", "1e-4".
        area_under_curve: Area under the ROC.
        fingerprint: SHA-256 of the benchmark's file: results are comparable only where it is the same.
        correct: Which pairs were right, base64 of ``np.packbits``; `outcomes` unpacks it.
        xnorm: Mean norm of the un-normalised embeddings, over both passes of the flip test.
    """

    name: str
    num_pairs: int
    num_folds: int
    accuracy: float
    accuracy_std: float
    val_at_far_1e3: float
    tar_at_far: dict[str, float]
    area_under_curve: float
    fingerprint: str
    correct: str
    xnorm: float


def pack_outcomes(correct_P: ArrayLike) -> str:
    """Pack bool [P] for `BenchmarkResult.correct`."""
    return base64.b64encode(np.packbits(np.asarray(correct_P, dtype=np.bool_)).tobytes()).decode("ascii")


def outcomes(result: BenchmarkResult) -> NDArray[np.bool_]:
    """Whether each pair was right, bool [P] in file order: what paired tests between two models need.

    Raises:
        ValueError: The packed outcomes do not hold ``num_pairs`` pairs.
    """
    packed = np.frombuffer(base64.b64decode(result.correct), dtype=np.uint8)
    if len(packed) != (result.num_pairs + 7) // 8:
        raise ValueError(f"{result.name}: correct holds {len(packed)} bytes, which is not {result.num_pairs} pairs")
    return np.unpackbits(packed, count=result.num_pairs).astype(np.bool_)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """One model on several benchmarks.

    Attributes:
        model_fingerprint: Of the evaluated model, see `pipeline.model_store`.
        benchmarks: In the order of their file names.
    """

    model_fingerprint: str
    benchmarks: tuple[BenchmarkResult, ...]

    @property
    def mean_accuracy(self) -> float:
        """Unweighted mean of the benchmarks' accuracies, as papers print it."""
        return float(np.mean([result.accuracy for result in self.benchmarks]))

    def metrics(self) -> dict[str, float]:
        """Flat metrics, ``eval/<benchmark>/<metric>``; names hold only what MLflow allows (no ``@``)."""
        values = {"eval/mean_accuracy": self.mean_accuracy}
        for result in self.benchmarks:
            prefix = "eval/" + re.sub(r"[^\w.-]", "_", result.name, flags=re.ASCII)
            values[f"{prefix}/accuracy"] = result.accuracy
            values[f"{prefix}/accuracy_std"] = result.accuracy_std
            values[f"{prefix}/val_at_far_1e-3"] = result.val_at_far_1e3
            values[f"{prefix}/area_under_curve"] = result.area_under_curve
            values[f"{prefix}/xnorm"] = result.xnorm
            values |= {f"{prefix}/tar_at_far_{far}": tar for far, tar in result.tar_at_far.items()}
        return values

    def to_json(self) -> str:
        """JSON text; `from_json` gives an equal report."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> EvalReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is not JSON, or a field is unknown, missing or of the wrong kind; the field is named.
        """
        return from_dict(cls, json.loads(text), "report")


def roc_figure(curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Draw TAR over FAR (log axis).

    Args:
        curves: By name, FAR and TAR [K] as fractions, FAR ascending.
    """
    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, (far, tar) in curves.items():
        # A ROC is a staircase: between two points, TAR stays what it was at the lower FAR.
        axes.step(np.maximum(np.asarray(far, dtype=np.float64), _LOWEST_FAR), np.asarray(tar), where="post", label=name)
    axes.set_xscale("log")
    axes.set_xlim(_LOWEST_FAR, 1.0)
    axes.set_ylim(0.0, 1.01)
    axes.set_xlabel("false accept rate (FAR)", fontsize=12)
    axes.set_ylabel("true accept rate (TAR)", fontsize=12)
    axes.set_title("Face verification: ROC over all pairs", fontsize=14)
    axes.grid(visible=True, which="both", alpha=0.3)
    if curves:
        axes.legend(loc="lower right", fontsize=10)
    return figure


def loss_figure(steps: ArrayLike, loss: ArrayLike, lr: ArrayLike) -> Figure:
    """Draw the training loss, raw and smoothed, and the learning rate on a second axis.

    Args:
        steps: Optimizer steps [S].
        loss: Loss at each of them [S].
        lr: Learning rate at each of them [S].

    Raises:
        ValueError: The three are not of one length.
    """
    x_S, loss_S, lr_S = (np.asarray(values, dtype=np.float64) for values in (steps, loss, lr))
    if not x_S.shape == loss_S.shape == lr_S.shape or x_S.ndim != 1:
        raise ValueError(f"steps {x_S.shape}, loss {loss_S.shape} and lr {lr_S.shape} must be of one length [S]")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    rates = axes.twinx()
    lines = [
        *axes.plot(x_S, loss_S, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss"),
        *axes.plot(x_S, _smoothed(loss_S), color="tab:blue", linewidth=2.0, label="loss, smoothed"),
        *rates.plot(x_S, lr_S, color="tab:orange", linestyle="--", linewidth=1.2, label="learning rate"),
    ]
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel("loss", fontsize=12)
    rates.set_ylabel("learning rate", fontsize=12)
    rates.set_ylim(bottom=0.0)
    axes.set_title("Training loss and learning rate", fontsize=14)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right", fontsize=10)
    return figure


def _smoothed(values_S: Floats) -> Floats:
    """Centred mean over a fiftieth of the run; at the ends, over what there is. NaN and infinity are left out."""
    half = max(len(values_S) // 100, 1)
    finite = np.isfinite(values_S)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values_S, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    index = np.arange(len(values_S))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values_S))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)
