"""What sample screening gives: the 299-identity pack with 20% of labels flipped and 10% of images destroyed.

``python -m tests.benchmarks.screening --seeds 3`` trains the demo's network (tiny LGAF, CosFace, AdaFace augmentation)
in memory with and without `SampleScreening`, and prints LFW accuracy (folds 1-5) and how well the weights tell clean
from damaged samples. Accuracy on the untouched pack is printed beside them.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lgaf.evaluation.verification import verification_accuracy
from lgaf.heads.screening import SampleScreening
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.step import TrainStep
from pipeline.data.augment import adaface
from pipeline.data.benchmarks import decode_images, read_verification_bin
from pipeline.data.images import decode_rgb
from pipeline.data.recordio import RecordIOReader, image_keys
from pipeline.evaluation.embed import embed_with_norms
from pipeline.presets import demo

CLEAN, FLIPPED, DESTROYED = 0, 1, 2
FLIP_SHARE, DESTROY_SHARE = 0.2, 0.1
PACK = Path(os.environ.get("LGAF_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "faces_celeb299"


@dataclass
class Arguments:
    """Settings of the comparison."""

    seeds: int = 3
    """Seeds (of weights, order and damage) to train each arm with."""
    first_seed: int = 0
    """The first of them."""
    epochs: int = 18
    """Passes over the pack."""
    arms: tuple[str, ...] = ("clean", "off", "on", "oracle")
    """What to train: clean (untouched pack), off (damaged), on (damaged, with screening), oracle (damaged, and who is
    damaged is known: those samples left out, and as many steps fewer)."""
    threads: int = 2
    """Threads of torch."""
    record: str = ""
    """Folder for cosines, norms, weights of every step (.npz), for a closer look."""


@dataclass(frozen=True, kw_only=True)
class Recorded(SampleScreening):
    """Screening that remembers what it saw."""

    seen: list[np.ndarray] = field(default_factory=list, compare=False)

    def weights(self, state, cosine_G, norm_G):
        """As `SampleScreening.weights`."""
        weight_G = super().weights(state, cosine_G, norm_G)
        self.seen.append(torch.stack([cosine_G, norm_G, weight_G]).numpy())
        return weight_G


def destroy(image: np.ndarray, kind: int, rng: np.random.Generator) -> np.ndarray:
    """An image in which nobody can be recognised: noise, 4x4 pixels, or one eighth of the face left."""
    if kind == 0:
        return rng.integers(0, 256, image.shape, dtype=np.uint8)
    if kind == 1:
        return cv2.resize(cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA), (112, 112))
    left = np.zeros_like(image)
    top = int(rng.integers(0, 112 - 14))
    left[top : top + 14] = image[top : top + 14]
    return left


def damage(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Copies of images and labels with both kinds of damage, and which sample has which."""
    rng = np.random.default_rng(1000 + seed)
    images, labels, kinds = images.copy(), labels.copy(), np.full(len(labels), CLEAN)
    order = rng.permutation(len(labels))
    flipped = order[: round(FLIP_SHARE * len(labels))]
    destroyed = order[len(flipped) : len(flipped) + round(DESTROY_SHARE * len(labels))]
    labels[flipped] = (labels[flipped] + rng.integers(1, labels.max() + 1, len(flipped))) % (labels.max() + 1)
    for count, index in enumerate(destroyed):
        images[index] = destroy(images[index], count % 3, rng)
    kinds[flipped], kinds[destroyed] = FLIPPED, DESTROYED
    return images, labels, kinds


def train(images, labels, epochs: int, seed: int, screening: SampleScreening | None, progress: Progress, name: str):
    """The demo's recipe on data in memory; gives the network and the sample indices of every step."""
    recipe = demo()
    torch.manual_seed(seed)
    model = recipe.model.build()
    head = ShardedMarginHead(
        int(labels.max()) + 1, recipe.model.output_dim, recipe.head.create(), seed=seed, screening=screening
    )
    steps_per_epoch = len(labels) // recipe.batch_size
    step = TrainStep(
        model, head, recipe.optimizer, recipe.schedule, steps_per_epoch * epochs, None, recipe.precision, seed
    )
    rng, batches = np.random.default_rng(seed), []
    bar = progress.add_task(name, total=steps_per_epoch * epochs)
    for epoch in range(epochs):
        order = rng.permutation(len(labels))
        for number in range(steps_per_epoch):
            index = order[number * recipe.batch_size : (number + 1) * recipe.batch_size]
            batch = adaface(images[index], index, seed, np.full(len(index), epoch))
            result = step(torch.from_numpy(np.ascontiguousarray(batch)), torch.from_numpy(labels[index]))
            batches.append(index)
            progress.update(bar, advance=1, description=f"{name}  loss {float(result.loss):.2f}")
    return model, np.stack(batches)


def area_under_curve(score: np.ndarray, is_good: np.ndarray) -> float:
    """Chance that a good sample scores above a bad one."""
    ranks = np.argsort(np.argsort(score, kind="stable"), kind="stable")
    good, bad = is_good.sum(), (~is_good).sum()
    return float((ranks[is_good].sum() - good * (good - 1) / 2) / (good * bad))


def main() -> None:
    """Train, evaluate, print."""
    arguments = tyro.cli(Arguments)
    console = Console()
    if not PACK.is_dir():
        sys.exit(f"{PACK} is not there: this comparison needs the real faces of ../shared/data")
    torch.set_num_threads(arguments.threads)
    reader = RecordIOReader(str(PACK / "train.rec"))
    records = [reader[key] for key in image_keys(reader)]
    images = np.stack([decode_rgb(record.payload) for record in records])
    labels = np.array([int(record.labels[0]) for record in records])
    lfw = read_verification_bin(str(PACK / "lfw_folds1to5.bin"))
    lfw_images = decode_images(lfw.images)
    rows = []
    with Progress(console=console) as progress:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            damaged_images, damaged_labels, kinds = damage(images, labels, seed)
            for arm in arguments.arms:
                data = (images, labels) if arm == "clean" else (damaged_images, damaged_labels)
                if arm == "oracle":
                    data = (damaged_images[kinds == CLEAN], damaged_labels[kinds == CLEAN])
                # strength = 0 gives every sample full weight: no screening, but its eyes are open.
                screening = Recorded(strength=0.9 if arm == "on" else 0.0)
                began = time.perf_counter()
                model, index = train(*data, arguments.epochs, seed, screening, progress, f"{arm} {seed}")
                minutes = (time.perf_counter() - began) / 60
                embedded = embed_with_norms(model.eval(), lfw_images)
                result = verification_accuracy(embedded.embeddings, lfw.is_same, num_folds=5)
                seen = np.stack(screening.seen, axis=1)
                if arguments.record:
                    Path(arguments.record).mkdir(parents=True, exist_ok=True)
                    np.savez(Path(arguments.record) / f"{arm}_{seed}.npz", index=index, seen=seen, kinds=kinds)
                row = {"arm": arm, "seed": seed, "accuracy": result.accuracy, "minutes": minutes}
                if arm in ("off", "on"):
                    last = slice(-len(labels) // 128, None)
                    kind, (cosine, _, weight) = kinds[index[last]].ravel(), (part[last].ravel() for part in seen)
                    row |= {"auc": area_under_curve(cosine, kind == CLEAN)}
                    row |= {name: weight[kind == k].mean() for name, k in (("w0", 0), ("w1", 1), ("w2", 2))}
                rows.append(row)
                console.print(row)
    print_table(console, rows)


def print_table(console: Console, rows: list[dict]) -> None:
    """Means over the seeds."""
    table = Table(title="LFW folds 1-5, tiny LGAF on 299 identities", title_justify="left")
    for column in ("arm", "accuracy", "seeds", "AUC of the target cosine", "weight clean / flipped / destroyed"):
        table.add_column(column)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        accuracy = np.array([row["accuracy"] for row in own])
        spread = accuracy.std(ddof=1) if len(accuracy) > 1 else float("nan")
        means = {key: np.mean([row[key] for row in own]) for key in ("auc", "w0", "w1", "w2") if key in own[0]}
        table.add_row(
            arm,
            f"{accuracy.mean():.4f} ± {spread:.4f}",
            str(len(own)),
            f"{means['auc']:.3f}" if means else "",
            " / ".join(f"{means[key]:.2f}" for key in ("w0", "w1", "w2")) if means else "",
        )
    console.print(table)


if __name__ == "__main__":
    main()
