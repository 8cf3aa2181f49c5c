"""The rivals of the data benchmark: each a function from the set to an iterator of (images, labels).

Those of their users' usual form decode with PIL, augment as AdaFace does and give float32 [B, 3, H, W] in -1..1; the
``fast`` ones are given our own means, simplejpeg and our augmentation, and give uint8 [B, H, W, 3]: what is left is the
loader. Each has two workers. Imports are inside: each runs in a fresh process, MosaicML's in another environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.benchmarks.data_set import DataSet

BATCH, WORKERS = 128, 2
Batches = Iterator[tuple[Any, Any]]
SHUFFLE_BUFFER = 1000
RAY_BLOCK_ROWS = 256
STATE = "streaming_state.json"


def decode_and_augment(images: list[bytes], index: np.ndarray) -> np.ndarray:
    """Our own decoder and augmentation, for the ``fast`` rivals: uint8 [n, H, W, 3]."""
    from pipeline.data.augment import AUGMENTATIONS
    from pipeline.data.images import decode_into

    pixels = np.empty((len(images), 112, 112, 3), np.uint8)
    for place, image in enumerate(images):
        decode_into(image, pixels[place], resize=False)
    return AUGMENTATIONS["adaface"](pixels, index, 0, np.zeros(len(images), np.int64))


def adaface(data: DataSet) -> Batches:
    """AdaFace's data set in torch's DataLoader, as its ``data.py`` has it."""
    from torch.utils.data import DataLoader

    from tests.benchmarks.data_adaface import AdaFaceDataset

    dataset = AdaFaceDataset(data.jpegs(), data.labels)
    return iter(DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, shuffle=True))


def adaface_torchvision(data: DataSet) -> Batches:
    """The same with torchvision's own functions (in MosaicML's environment, which has it)."""
    from torch.utils.data import DataLoader

    from tests.benchmarks.data_torchvision import TorchvisionDataset

    dataset = TorchvisionDataset(data.jpegs(), data.labels)
    return iter(DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, shuffle=True))


def webdataset_pil(data: DataSet) -> Batches:
    """webdataset as its documentation has it: shards shuffled, a buffer of samples, batches made in the workers."""
    import webdataset
    from torch.utils.data import DataLoader

    from tests.benchmarks.data_adaface import Augmenter, to_normalised

    augment = Augmenter()
    paths = data.shard_paths()
    dataset = (
        webdataset.WebDataset(paths, shardshuffle=len(paths))
        .shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(lambda image: to_normalised(augment(image)), int)
        .batched(BATCH)
    )
    return iter(DataLoader(dataset, batch_size=None, num_workers=WORKERS))


def webdataset_fast(data: DataSet) -> Batches:
    """webdataset with undecoded samples up to the batch, then our decoder and augmentation on the whole of it."""
    import torch
    import webdataset
    from torch.utils.data import DataLoader

    def finish(batch: tuple[list[str], list[bytes], list[bytes]]) -> tuple[torch.Tensor, torch.Tensor]:
        keys, images, labels = batch
        pixels = decode_and_augment(images, np.array(keys, np.int64))
        return torch.from_numpy(pixels), torch.from_numpy(np.array(labels, np.int64))

    paths = data.shard_paths()
    dataset = (
        webdataset.WebDataset(paths, shardshuffle=len(paths))
        .shuffle(SHUFFLE_BUFFER)
        .to_tuple("__key__", "jpg", "cls")
        .batched(BATCH, collation_fn=lambda samples: tuple(map(list, zip(*samples, strict=True))))
        .map(finish)
    )
    return iter(DataLoader(dataset, batch_size=None, num_workers=WORKERS))


def _ray_pil(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from tests.benchmarks.data_adaface import Augmenter, load_and_augment

    augment = Augmenter()
    pixels = np.stack([load_and_augment(image, augment).numpy() for image in batch["jpg"]])
    return {"image": pixels, "label": batch["cls"].astype(np.int64)}


def _ray_fast(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pixels = decode_and_augment(batch["jpg"].tolist(), batch["__key__"].astype(np.int64))
    return {"image": pixels, "label": batch["cls"].astype(np.int64)}


def _read_webdataset(data: DataSet, finish: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Batches:
    import ray.data

    dataset = ray.data.read_webdataset(data.shard_paths(), decoder=None, shuffle="files")
    dataset = dataset.map_batches(finish, batch_size=RAY_BLOCK_ROWS, batch_format="numpy")
    for batch in dataset.iter_batches(batch_size=BATCH, batch_format="numpy"):
        yield batch["image"], batch["label"]


def ray_pil(data: DataSet) -> Batches:
    """``ray.data.read_webdataset`` and ``map_batches``; the local Ray is set up as ours is (its workers stay)."""
    return _read_webdataset(data, _ray_pil)


def ray_fast(data: DataSet) -> Batches:
    """The same with our decoder and augmentation."""
    return _read_webdataset(data, _ray_fast)


def _streaming_loader(data: DataSet, fast: bool) -> Any:
    from tests.benchmarks.data_torchvision import declare_operators

    declare_operators()
    import torch
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    from tests.benchmarks.data_adaface import Augmenter, load_and_augment

    class Pil(StreamingDataset):
        augment = Augmenter()

        def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(at)
            return load_and_augment(sample["image"], self.augment), sample["label"]

    class Encoded(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[bytes, int, int]:
            sample = super().__getitem__(at)
            return sample["image"], sample["label"], at

    def collate(samples: list[tuple[bytes, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels, index = zip(*samples, strict=True)
        return torch.from_numpy(decode_and_augment(list(images), np.array(index))), torch.tensor(labels)

    clean_stale_shared_memory()
    dataset = (Encoded if fast else Pil)(local=str(data.mds), shuffle=True, batch_size=BATCH)
    return StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, **({"collate_fn": collate} if fast else {})
    )


def _streaming(data: DataSet, fast: bool) -> Batches:
    loader = _streaming_loader(data, fast)
    half = len(data.labels) // BATCH // 2
    for number, batch in enumerate(loader, start=1):
        yield batch
        if number == half:
            (data.folder / STATE).write_text(json.dumps(loader.state_dict()))


def streaming_pil(data: DataSet) -> Batches:
    """MosaicML Streaming from MDS shards on the local disk; leaves its state in mid-epoch for the next two."""
    return _streaming(data, fast=False)


def streaming_fast(data: DataSet) -> Batches:
    """The same with our decoder and augmentation (in the collate function)."""
    return _streaming(data, fast=True)


def _streaming_resumed(data: DataSet, fast: bool) -> Batches:
    path = data.folder / STATE
    if not path.exists():
        raise FileNotFoundError(f"{path}: the state of a run of streaming-pil or streaming-fast; run one of them first")
    loader = _streaming_loader(data, fast)
    loader.load_state_dict(json.loads(path.read_text()))
    yield from loader


def streaming_pil_resumed(data: DataSet) -> Batches:
    """From the middle of an epoch on."""
    return _streaming_resumed(data, fast=False)


def streaming_fast_resumed(data: DataSet) -> Batches:
    """From the middle of an epoch on."""
    return _streaming_resumed(data, fast=True)
