"""Evaluation of an exported model on every benchmark of a folder, spread over Ray tasks.

Images travel as encoded chunks, come back as embeddings, and are put in file order before they are scored: which pair
is in which fold depends on that order alone, never on which task ended first.
"""

# Shape legend: P = pairs, 2P = images, N = images of one chunk, D = embedding

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import ray
import torch
from numpy.typing import ArrayLike
from torch import nn

from lgaf.evaluation.verification import verification_accuracy
from pipeline.data.benchmarks import VerificationSet, decode_images, find_verification_sets, read_verification_bin
from pipeline.evaluation.embed import ImageEmbeddings, embed_with_norms
from pipeline.evaluation.report import FAR_NAMES, BenchmarkResult, Curve, EvalReport, pack_outcomes
from pipeline.model_store import load_model, read_model_info

# Enough work to hide a task's start, and 50 chunks in a usual benchmark (12,000 images) to spread evenly.
CHUNK_SIZE: Final = 256

Progress = Callable[[int, int], None]


def evaluate_benchmarks(
    model_uri: str,
    benchmarks_uri: str,
    *,
    chunk_size: int = CHUNK_SIZE,
    batch_size: int = 64,
    num_gpus_per_task: float = 0.0,
    on_progress: Progress | None = None,
) -> tuple[EvalReport, dict[str, Curve]]:
    """Embed (with the flip test) and score every verification set of a folder; all are read before one is embedded.

    Args:
        model_uri: Folder of an exported model, readable from every node.
        benchmarks_uri: Folder of ``.bin`` files, or one such file; read by the caller's process alone.
        chunk_size: Images of one Ray task (one CPU each).
        batch_size: Images of one forward pass.
        num_gpus_per_task: Share of a GPU that a task asks for; 0 runs on the CPU.
        on_progress: Called with (images done, images in total) after every chunk.

    Returns:
        The report, and by benchmark the ROC curve: FAR and TAR over all pairs.

    Raises:
        RuntimeError: Ray is not initialised in this process.
        ValueError: No benchmark, a broken file or image, NaN embeddings; named (from a task, by Ray's subclass of it).
        StorageError: The model or the benchmarks cannot be read.
    """
    if not ray.is_initialized():
        raise RuntimeError("Ray is not initialised: call ray.init() before evaluate_benchmarks")
    fingerprint = str(read_model_info(model_uri)["sha256"])
    sets = [read_verification_bin(uri) for uri in find_verification_sets(benchmarks_uri)]
    task = ray.remote(num_cpus=1, num_gpus=num_gpus_per_task)(_embed_chunk)
    submit = functools.partial(task.remote, model_uri, fingerprint, batch_size)
    tell = _counter(on_progress, sum(len(benchmark.images) for benchmark in sets))
    results, curves = [], {}
    for benchmark in sets:
        embedded = _embed_set(submit, benchmark, chunk_size, tell)
        result, curves[benchmark.name] = score_benchmark(benchmark, embedded)
        results.append(result)
    return EvalReport(model_fingerprint=fingerprint, benchmarks=tuple(results)), curves


def score_benchmark(benchmark: VerificationSet, embedded: ImageEmbeddings) -> tuple[BenchmarkResult, Curve]:
    """Score the embeddings of one benchmark's images, in file order; give the result and the ROC curve.

    Raises:
        ValueError: The embeddings cannot be scored (see `verification_accuracy`); the benchmark is named.
    """
    try:
        scores = verification_accuracy(embedded.embeddings, benchmark.is_same, benchmark.num_folds)
    except ValueError as error:
        raise ValueError(f"{benchmark.name}: {error}") from error
    result = BenchmarkResult(
        name=benchmark.name,
        num_pairs=len(benchmark.is_same),
        num_folds=scores.num_folds,
        accuracy=scores.accuracy,
        accuracy_std=scores.std,
        val_at_far_1e3=scores.val_at_far_1e3,
        tar_at_far={FAR_NAMES[far]: tar for far, tar in scores.tar_at_far.items()},
        area_under_curve=scores.area_under_curve,
        fingerprint=benchmark.fingerprint,
        correct=pack_outcomes(scores.correct),
        xnorm=float(np.mean(embedded.norms, dtype=np.float64)),
    )
    return result, (scores.far, scores.tar)


def plan_chunks(num_images: int, chunk_size: int) -> list[tuple[int, int]]:
    """Split images into contiguous chunks (start, stop) that cover all of them once, in order.

    Raises:
        ValueError: ``chunk_size < 1``.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    return [(start, min(start + chunk_size, num_images)) for start in range(0, num_images, chunk_size)]


def in_file_order(parts: Mapping[int, Sequence[ArrayLike]]) -> ImageEmbeddings:
    """Join the embeddings of chunks, given by the index of their first image in any order, in the order of the images.

    Raises:
        ValueError: A chunk is missing, or two overlap: images would be scored in the wrong pairs.
    """
    expected = 0
    for start in sorted(parts):
        if start != expected:
            raise ValueError(f"the chunk at image {start} should start at image {expected}")
        expected += len(np.asarray(parts[start][0]))
    fields = zip(*(parts[start] for start in sorted(parts)), strict=True)
    return ImageEmbeddings(*(np.concatenate([np.asarray(part) for part in field]) for field in fields))


def _counter(on_progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def tell(num_images: int) -> None:
        nonlocal done
        done += num_images
        if on_progress is not None:
            on_progress(done, total)

    return tell


def _embed_set(
    submit: Callable[..., Any], benchmark: VerificationSet, chunk_size: int, tell: Callable[[int], None]
) -> ImageEmbeddings:
    """Embed all chunks of one set, telling of each; a failure cancels those that wait and is raised."""
    pending = {
        submit(benchmark.images[start:stop], benchmark.name, start): start
        for start, stop in plan_chunks(len(benchmark.images), chunk_size)
    }
    parts: dict[int, tuple[Any, ...]] = {}
    try:
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            part = ray.get(ready[0])
            parts[pending.pop(ready[0])] = part
            tell(len(part[0]))
    finally:
        for reference in pending:
            ray.cancel(reference)
    return in_file_order(parts)


def _embed_chunk(
    model_uri: str, fingerprint: str, batch_size: int, images: list[bytes], name: str, first_index: int
) -> tuple[Any, ...]:
    """Embed encoded images inside a Ray task; a plain tuple of `ImageEmbeddings`'s fields."""
    # One CPU is asked for, so one is used: more threads would fight with the neighbouring tasks.
    torch.set_num_threads(1)
    pixels = decode_images(images, name=name, first_index=first_index)
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    return tuple(embed_with_norms(_worker_model(model_uri, fingerprint, device), pixels, batch_size=batch_size))


# One model a worker process, kept between tasks; the fingerprint keeps a re-exported model from being mistaken for it.
@functools.lru_cache(maxsize=1)
def _worker_model(model_uri: str, fingerprint: str, device: str) -> nn.Module:
    found = read_model_info(model_uri)["sha256"]
    if found != fingerprint:
        raise RuntimeError(f"{model_uri}: was replaced during its evaluation: sha256 was {fingerprint}, now is {found}")
    return load_model(model_uri).to(device)
