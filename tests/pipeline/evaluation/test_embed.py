"""The flip test against hand computation, with a network that fits on a line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lgaf.models import FaceEmbedding
from pipeline.evaluation.embed import embed_images, embed_with_norms


class Corners(nn.Module):
    """Embedding = the red and green values of the top left pixel; BN and dropout would show a wrong mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.batches: list[torch.Tensor] = []

    def forward(self, images_BCHW):
        self.batches.append(images_BCHW.detach().clone())
        corner_BD = self.norm(self.drop(images_BCHW[:, :2, 0, 0])) * self.scale
        first_B = corner_BD[:, 0]
        return FaceEmbedding(corner_BD, first_B + 10, first_B + 20, first_B / 4 + 0.5)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)


def by_hand(images: np.ndarray, column: int) -> np.ndarray:
    values = ((images[:, 0, column, :2].astype(np.float32) / 255) - 0.5) / 0.5
    return values / np.sqrt(np.float32(1 + 1e-5))  # BatchNorm at its initial statistics


def test_the_flip_test_sums_unnormalised_embeddings():
    images = pixels(7)
    left, right = by_hand(images, 0), by_hand(images, -1)
    found = embed_with_norms(Corners(), images, batch_size=3)
    np.testing.assert_allclose(found.embeddings, left + right, rtol=1e-6, atol=1e-6)
    mean = (left[:, 0] + right[:, 0]) / 2
    np.testing.assert_allclose(found.norms_local, mean + 10, rtol=1e-6)
    np.testing.assert_allclose(found.norms_global, mean + 20, rtol=1e-6)
    np.testing.assert_allclose(found.weight_local, mean / 4 + 0.5, rtol=1e-5)
    norms = (np.linalg.norm(left, axis=1) + np.linalg.norm(right, axis=1)) / 2
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    assert [values.dtype for values in found] == [np.float32] * 5


def test_without_the_flip_test_there_is_one_pass():
    images, model = pixels(3), Corners()
    embeddings, norms_local, norms_global, weight_local = embed_images(model, images, flip=False)
    np.testing.assert_allclose(embeddings, by_hand(images, 0), rtol=1e-6, atol=1e-6)
    assert norms_local.shape == norms_global.shape == weight_local.shape == (3,)
    assert len(model.batches) == 1


def test_preprocessing_is_insightfaces():
    images, model = pixels(2), Corners()
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    embed_images(model, images)
    plain, mirrored = model.batches
    assert plain.shape == (2, 3, 4, 5)
    assert (plain[0, 0, 0, 0], plain[0, 0, 0, 1]) == (-1.0, 1.0)
    expected = ((torch.from_numpy(images).permute(0, 3, 1, 2) / 255) - 0.5) / 0.5
    assert torch.equal(plain, expected)
    assert torch.equal(mirrored, expected.flip(3))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_do_not_change_the_result(batch_size):
    images = pixels(11)
    for one, other in zip(
        embed_with_norms(Corners(), images, batch_size=batch_size),
        embed_with_norms(Corners(), images, batch_size=11),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_every_submodules_mode_is_put_back_and_nothing_is_trained():
    model = Corners().train()
    model.norm.eval()  # a frozen BatchNorm
    statistics = model.norm.running_mean.clone()
    embed_images(model, pixels(4))
    assert (model.training, model.drop.training, model.norm.training) == (True, True, False)
    assert torch.equal(model.norm.running_mean, statistics)
    assert not any(batch.requires_grad for batch in model.batches)


def test_the_mode_is_put_back_after_a_failure():
    class Broken(Corners):
        def forward(self, images_BCHW):
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        embed_images(model, pixels(1))
    assert model.training
    assert model.drop.training


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pixels(2).astype(np.float32), "images are float32"),
        (pixels(2).transpose(0, 3, 1, 2), r"uint8 \[2, 3, 4, 5\]"),
        (pixels(2)[0], r"uint8 \[4, 5, 3\]"),
        (pixels(2)[:0], "N >= 1"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        embed_images(Corners(), images)


def test_a_bad_batch_size_is_named():
    with pytest.raises(ValueError, match="batch_size=0"):
        embed_images(Corners(), pixels(1), batch_size=0)
