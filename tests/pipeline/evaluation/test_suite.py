"""What of the suite is pure: the plan, the order, the score. Ray itself is proven end to end elsewhere."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgaf.evaluation.verification import verification_accuracy
from pipeline.data.benchmarks import VerificationSet
from pipeline.evaluation.embed import ImageEmbeddings
from pipeline.evaluation.report import outcomes
from pipeline.evaluation.suite import in_file_order, plan_chunks, score_benchmark


def embedded(count: int, seed: int = 0) -> ImageEmbeddings:
    rng = np.random.default_rng(seed)
    shapes = [(count, 4), (count,), (count,), (count,), (count,)]
    return ImageEmbeddings(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def verification_set(num_pairs: int, num_folds: int = 10) -> VerificationSet:
    return VerificationSet(
        name="lfw",
        images=[b"x"] * (2 * num_pairs),
        is_same=np.arange(num_pairs) % 2 == 0,
        fingerprint="f",
        num_folds=num_folds,
    )


@given(st.integers(1, 200), st.integers(1, 60), st.randoms(use_true_random=False))
def test_chunks_come_back_in_file_order_whichever_ends_first(num_images, chunk_size, random):
    whole = embedded(num_images)
    chunks = plan_chunks(num_images, chunk_size)
    assert [index for start, stop in chunks for index in range(start, stop)] == list(range(num_images))
    assert all(0 < stop - start <= chunk_size for start, stop in chunks)
    random.shuffle(chunks)
    parts = {start: tuple(field[start:stop] for field in whole) for start, stop in chunks}
    for found, expected in zip(in_file_order(parts), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


@given(st.integers(2, 20), st.data())
def test_a_missing_chunk_is_an_error(num_chunks, data):
    parts = {start: tuple(embedded(3)) for start in range(0, 3 * num_chunks, 3)}
    del parts[3 * data.draw(st.integers(0, num_chunks - 2))]
    with pytest.raises(ValueError, match="should start at image"):
        in_file_order(parts)


def test_a_bad_chunk_size_is_named():
    with pytest.raises(ValueError, match="chunk_size=0"):
        plan_chunks(10, 0)


def test_scores_are_those_of_the_protocol():
    benchmark, embeddings = verification_set(63, num_folds=5), embedded(126)
    result, (far, tar) = score_benchmark(benchmark, embeddings)
    scores = verification_accuracy(embeddings.embeddings, benchmark.is_same, 5)
    assert (result.name, result.num_pairs, result.num_folds, result.fingerprint) == ("lfw", 63, 5, "f")
    assert (result.accuracy, result.accuracy_std) == (scores.accuracy, scores.std)
    assert result.val_at_far_1e3 == scores.val_at_far_1e3
    assert result.tar_at_far == {f"1e-{n}": scores.tar_at_far[float(f"1e-{n}")] for n in (1, 2, 3, 4)}
    assert outcomes(result).tolist() == scores.correct.tolist()
    assert result.xnorm == pytest.approx(float(embeddings.norms.mean()))
    assert len(far) == len(tar) > 2


def test_a_diverged_model_names_the_benchmark():
    embeddings = embedded(20)
    embeddings.embeddings[3] = np.nan
    with pytest.raises(ValueError, match=r"lfw: embeddings row 3 .*NaN"):
        score_benchmark(verification_set(10), embeddings)


def test_ray_must_be_initialised_by_the_caller():
    # In a process of its own: other tests of this one may have started Ray.
    code = "from pipeline.evaluation.suite import evaluate_benchmarks; evaluate_benchmarks('no/model', 'no/benchmarks')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "RuntimeError: Ray is not initialised" in done.stderr
