"""The CPU end of the stream: encoded images to augmented pixels."""

# Shape legend: N = images of a block, H, W = sides of the images

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.data.augment import AUGMENTATIONS
from pipeline.data.images import decode_into
from pipeline.data.quarantine import BadImage, Quarantine
from pipeline.data.shards import Shard, ShardError
from pipeline.data.stream_plan import StreamPlan


class Decoder:
    """Turns encoded images into augmented pixels; lives in an actor.

    An image that cannot be decoded is reported to the quarantine, and the next readable one of its shard file takes its
    place, so that batches keep their size and do not depend on who reads them.

    Args:
        plan: The run's `StreamPlan`.
        quarantine: Where bad images go; without one, the first is an error.
    """

    def __init__(self, plan: StreamPlan, quarantine: Quarantine | None = None) -> None:
        self._source, self._seed, self._offsets = plan.shard_source(), plan.seed, plan.data.offsets
        self._side, self._resize = plan.data.image_side, plan.config.wrong_size == "resize"
        self._augment = AUGMENTATIONS[plan.config.augmentation]
        self._quarantine = quarantine

    def __call__(self, batch: pa.Table) -> dict[str, np.ndarray]:
        """Columns ``image`` uint8 [N, H, W, 3], ``label`` and ``index`` int64 [N]."""
        shard_N, row_N = batch["shard"].to_numpy(), batch["row"].to_numpy().copy()
        label_N = batch["label"].to_numpy().copy()
        images_NHWC = np.empty((len(batch), self._side, self._side, 3), np.uint8)
        for place, encoded in enumerate(encoded_images(batch["image"])):
            try:
                decode_into(encoded, images_NHWC[place], resize=self._resize)
            except ValueError as error:
                row_N[place], label_N[place] = self._replace(
                    int(shard_N[place]), int(row_N[place]), images_NHWC[place], error
                )
        index_N = self._offsets[shard_N] + row_N
        return {
            "image": self._augment(images_NHWC, index_N, self._seed, batch["lap"].to_numpy()),
            "label": label_N,
            "index": index_N,
        }

    def _replace(self, number: int, row: int, pixels_HWC: np.ndarray, error: ValueError) -> tuple[int, int]:
        """Put the next readable image of the shard into ``pixels_HWC``; gives its row and label."""
        shard = self._source.read(number)
        self._report(shard, number, row, error)
        for step in range(1, len(shard.images)):
            other = (row + step) % len(shard.images)
            try:
                decode_into(shard.images[other], pixels_HWC, resize=self._resize)
            except ValueError as bad:
                self._report(shard, number, other, bad)
            else:
                return other, int(shard.labels[other])
        raise ShardError(f"{self._source.uri(number)}: none of its {len(shard.images)} images can be decoded")

    def _report(self, shard: Shard, number: int, row: int, error: ValueError) -> None:
        uri, key = self._source.uri(number), shard.keys[row]
        if self._quarantine is None:
            raise ShardError(f"{uri}: {key}: {error}") from error
        index = int(self._offsets[number]) + row
        self._quarantine.report(BadImage(shard=uri, key=key, index=index, reason=str(error)))


def encoded_images(column: pa.ChunkedArray) -> Iterator[memoryview]:
    """The values of a large_binary column without a copy."""
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        edges = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        pixels = memoryview(data).cast("B")  # Arrow's own view counts signed bytes
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            yield pixels[start:stop]
