"""URL: sub-embeddings and their confidences, decorrelation, the variations put into training images."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lgaf.models.peers import url
from lgaf.models.peers.url import (
    BLACK,
    URLConfig,
    VariationDecorrelation,
    augment,
    blur,
    blur_matrices,
    distinct_halves,
    occlude,
)

TINY = URLConfig(backbone="tiny", embedding_dim=24, num_sub_embeddings=4)


def _images(num: int = 4) -> torch.Tensor:
    return torch.rand(num, 3, 112, 112) * 1.9 - 0.9  # none is black


def _trained_a_little(config: URLConfig = TINY) -> url.URL:
    """A network whose confidences differ."""
    torch.manual_seed(0)
    model = config.build()
    torch.nn.init.constant_(model.confidence_norm.weight, 0.7)
    torch.nn.init.normal_(model.confidence_norm.bias, std=0.2)
    model.train()(_images(8))
    return model.eval()


def test_size_is_iresnet100_with_confidences_and_a_discriminator():
    # iresnet100 less the 512 + 512 of its last norm; 25,088 x 16 + 2 x 16 of the confidences; 512 x 2 + 2 that tell.
    with torch.device("meta"):
        model = URLConfig().build()
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == 65_156_160 - 1_024 + 401_440 + 1_026


class TestConfidences:
    def test_start_near_one(self):
        torch.manual_seed(0)
        model = TINY.build().train()
        with torch.no_grad():
            _, confidence = model.sub_embeddings(_images(32))
        assert confidence.log().std().item() == pytest.approx(0.1, rel=0.05)
        assert confidence.log().mean().item() == pytest.approx(0.0, abs=1e-3)

    def test_are_positive_and_finite(self):
        model = _trained_a_little()
        torch.nn.init.constant_(model.confidence_norm.weight, 1000.0)
        with torch.no_grad():
            _, confidence = model.sub_embeddings(_images(32))
        assert (confidence > 0).all()
        assert confidence.log().min().item() == pytest.approx(-10.0)
        assert confidence.log().max().item() == pytest.approx(10.0)

    def test_scale_unit_sub_embeddings(self):
        model = _trained_a_little()
        images = _images()
        with torch.no_grad():
            unit, confidence = model.sub_embeddings(images)
            embedding = model(images).embedding_BD
            map_ = model.bn2(model.backbone(images))
            feature = model.features(model.fc(map_.flatten(1))).view(4, 4, 6)
            logs = model.confidence_norm(map_.flatten(1) @ model.confidence.weight.T)
        assert confidence.std() > 0.1
        torch.testing.assert_close(confidence, torch.exp(logs))
        for k in range(4):
            part = feature[:, k] / feature[:, k].square().sum(dim=1, keepdim=True).sqrt()
            torch.testing.assert_close(unit[:, k], part)
            torch.testing.assert_close(embedding[:, 6 * k : 6 * k + 6], torch.exp(logs[:, k : k + 1]) * part)

    def test_weigh_the_logits_as_in_the_paper(self):
        """For centres of equal parts the head's cosine times rms(s) is 1/K sum_k s_k <w_k, f_k>."""
        model = _trained_a_little()
        centre = F.normalize(torch.randn(4, 6), dim=1)
        with torch.no_grad():
            images = _images()
            unit, confidence = model.sub_embeddings(images)
            out = model(images)
        logit = (confidence * (unit * centre).sum(dim=2)).mean(dim=1)
        cosine = F.cosine_similarity(out.embedding_BD, centre.flatten()[None])
        rms = confidence.square().mean(dim=1).sqrt()
        torch.testing.assert_close(cosine * rms, logit)
        torch.testing.assert_close(out.norm_global_B, rms * math.sqrt(4))


class TestDecorrelation:
    def test_halves_are_different_halves(self):
        torch.manual_seed(0)
        drawn = [distinct_halves(2, 2) for _ in range(10)] + [distinct_halves(6, 4), distinct_halves(2, 16)]
        for halves in drawn:
            assert (halves.sum(dim=1) == halves.shape[1] // 2).all()
            assert len(halves.unique(dim=0)) == len(halves)
        assert not torch.equal(distinct_halves(2, 16), distinct_halves(2, 16))

    def test_losses_by_hand(self):
        """Two sub-embeddings of one component; half 0 is the first, half 1 the second."""
        decorrelation = VariationDecorrelation(2, 1)
        decorrelation.halves_TK.copy_(torch.eye(2))
        with torch.no_grad():
            decorrelation.discriminator.weight.copy_(torch.tensor([[2.0, 1.0], [-1.0, 3.0]]))
            decorrelation.discriminator.bias.copy_(torch.tensor([0.5, 0.0]))
        losses = decorrelation(torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[True, False]]))
        # Half 0 is read as (1, 0): logits 2.5 and -1. Half 1 as (0, -1): logits -0.5 and -3.
        yes, no = (lambda z: math.log1p(math.exp(-z))), (lambda z: math.log1p(math.exp(z)))
        assert losses.classification.item() == pytest.approx(yes(2.5) + no(-3.0), rel=1e-5)
        assert losses.adversarial.item() == pytest.approx(
            0.5 * (yes(-1.0) + no(-1.0)) + 0.5 * (yes(-0.5) + no(-0.5)), rel=1e-5
        )
        assert losses.discriminator.item() == pytest.approx(yes(2.5) + no(-1.0) + yes(-0.5) + no(-3.0), rel=1e-5)

    def test_are_means_over_the_batch(self):
        torch.manual_seed(0)
        decorrelation = VariationDecorrelation(4, 3)
        unit, present = F.normalize(torch.randn(5, 4, 3), dim=2), torch.rand(5, 2) < 0.5
        whole = torch.stack(decorrelation(unit, present))
        rows = [torch.stack(decorrelation(unit[i : i + 1], present[i : i + 1])) for i in range(5)]
        torch.testing.assert_close(whole, torch.stack(rows).mean(dim=0))

    def test_the_discriminator_learns_from_its_own_loss_alone(self):
        decorrelation = VariationDecorrelation(4, 3)
        unit = F.normalize(torch.randn(5, 4, 3), dim=2).requires_grad_()
        losses = decorrelation(unit, torch.rand(5, 2) < 0.5)
        (losses.classification + losses.adversarial).backward(retain_graph=True)
        assert decorrelation.discriminator.weight.grad is None
        embedding_gradient = unit.grad.clone()
        assert embedding_gradient.abs().sum() > 0
        losses.discriminator.backward()
        assert decorrelation.discriminator.weight.grad.abs().sum() > 0
        assert torch.equal(unit.grad, embedding_gradient)

    def test_hiding_is_best_when_the_discriminator_cannot_tell(self):
        decorrelation = VariationDecorrelation(4, 3)
        torch.nn.init.zeros_(decorrelation.discriminator.weight)
        torch.nn.init.zeros_(decorrelation.discriminator.bias)
        losses = decorrelation(torch.randn(5, 4, 3), torch.ones(5, 2, dtype=torch.bool))
        assert losses.adversarial.item() == pytest.approx(2 * math.log(2), rel=1e-6)


class TestVariations:
    def test_only_the_told_images_change_and_in_the_told_way(self):
        torch.manual_seed(0)
        images = _images(4)
        present = torch.tensor([[False, False], [True, False], [False, True], [True, True]])  # blur, occlusion
        out = augment(images, present, 24)
        assert torch.equal(out[0], images[0])
        assert (out[1] != images[1]).float().mean() > 0.99
        assert not (out[1] == BLACK).any()
        black = (out[2] == BLACK).all(dim=0)
        assert torch.equal(out[2][:, ~black], images[2][:, ~black])
        assert black.any()
        assert out[3].max() <= 1
        assert out[3].min() >= BLACK - 1e-6
        assert (out[3] < -0.99).any()  # the black blocks, blurred

    def test_black_blocks_are_whole_and_as_many_as_allowed(self):
        torch.manual_seed(0)
        black = (occlude(_images(64), 5) == BLACK).all(dim=1)
        blocks = black.view(64, 7, 16, 7, 16).float().mean(dim=(2, 4))
        assert set(blocks.unique().tolist()) == {0.0, 1.0}
        counts = blocks.sum(dim=(1, 2))
        assert set(counts.tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
        assert (blocks.sum(dim=0) > 0).float().mean() > 0.9

    @pytest.mark.parametrize("size", url.BLUR_SIZES)
    def test_blur_is_a_gaussian_kernel(self, size):
        taps = np.arange(size) - (size - 1) / 2
        kernel = np.exp(-(taps**2) / (2 * (0.3 * ((size - 1) * 0.5 - 1) + 0.8) ** 2))
        kernel /= kernel.sum()
        matrix = blur_matrices(torch.tensor([size]), 112, torch.float64)[0].numpy()
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
        line = np.random.default_rng(0).standard_normal(112)
        margin = size // 2
        np.testing.assert_allclose((matrix @ line)[margin:-margin], np.convolve(line, kernel, mode="valid"))

    def test_blur_works_on_both_axes_and_keeps_a_flat_image(self):
        torch.manual_seed(0)
        impulse = torch.zeros(32, 3, 112, 112)
        impulse[:, :, 50, 60] = 1.0
        blurred = blur(impulse)
        torch.testing.assert_close(blurred.sum(dim=(2, 3)), torch.ones(32, 3))
        torch.testing.assert_close(blurred[:, :, 50, 61], blurred[:, :, 51, 60])
        widths = (blurred[:, 0, 50] > 0).sum(dim=1)
        assert set(widths.tolist()) == set(url.BLUR_SIZES)
        torch.testing.assert_close(blur(torch.full((2, 3, 112, 112), 0.3)), torch.full((2, 3, 112, 112), 0.3))

    def test_blur_keeps_its_precision_under_autocast(self):
        images = _images(2)
        torch.manual_seed(0)
        expected = blur(images)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(blur(images), expected)


class TestNetwork:
    @pytest.mark.parametrize(("probability", "changed"), [(0.0, 0), (1.0, 4)])
    def test_training_puts_the_variations_in_and_tells_the_discriminator(self, probability, changed):
        torch.manual_seed(0)
        model = dataclasses.replace(TINY, augmentation_probability=probability).build().train()
        seen, told = [], []
        model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.decorrelation.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
        images = _images()
        model(images)
        assert (seen[0] != images).flatten(1).any(dim=1).sum() == changed
        assert told[0].tolist() == [[bool(changed)] * 2] * 4

    def test_the_auxiliary_loss_is_the_weighted_sum(self, monkeypatch):
        torch.manual_seed(0)
        weights = {"confidence_regularization": 0.5, "classification_weight": 3.0, "adversarial_weight": 7.0}
        model = dataclasses.replace(TINY, **weights).build().train()
        parts = []
        model.decorrelation.register_forward_hook(lambda _, __, losses: parts.append(losses))
        confidences = []
        plain = model.sub_embeddings
        monkeypatch.setattr(
            model, "sub_embeddings", lambda images: confidences.append(plain(images)) or confidences[-1]
        )
        out = model(_images())
        regularization = sum((s**2).sum() / 4 for s in confidences[0][1]) / 4
        classification, adversarial, discriminator = parts[0]
        expected = 0.5 * regularization + 3 * classification + 7 * adversarial + discriminator
        torch.testing.assert_close(out.auxiliary_loss, expected)

    def test_evaluation_leaves_the_images_and_has_no_loss(self, monkeypatch):
        model = _trained_a_little()
        monkeypatch.setattr(url, "augment", None)
        images = _images()
        with torch.no_grad():
            out, alone = model(images), model(images[:1])
        assert out.auxiliary_loss is None
        assert out.embedding_BD.shape == (4, TINY.output_dim)
        torch.testing.assert_close(out.embedding_BD[:1], alone.embedding_BD, rtol=1e-4, atol=1e-5)

    def test_the_halves_are_saved(self):
        model, copy = TINY.build(), TINY.build()
        copy.load_state_dict(model.state_dict())
        assert torch.equal(copy.decorrelation.halves_TK, model.decorrelation.halves_TK)

    def test_three_steps_train_every_parameter_and_a_seed_repeats_them(self):
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            model = TINY.build().train()
            centres = torch.randn(5, 24)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            losses = []
            for _ in range(3):
                out = model(_images())
                logits = F.normalize(out.embedding_BD) @ F.normalize(centres).T
                loss = F.cross_entropy(8 * logits, torch.tensor([0, 1, 2, 3])) + out.auxiliary_loss
                optimizer.zero_grad()
                loss.backward()
                assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
                optimizer.step()
                losses.append(loss.item())
            runs.append(losses)
        assert runs[0] == runs[1]
        assert np.isfinite(runs[0]).all()

    def test_bfloat16_keeps_confidences_and_losses_precise(self):
        torch.manual_seed(0)
        model = TINY.build().train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(_images())
            _, confidence = model.sub_embeddings(_images())
        assert (out.auxiliary_loss.dtype, confidence.dtype) == (torch.float32, torch.float32)
        assert torch.isfinite(out.auxiliary_loss)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "iresnet101"),
        ("embedding_dim", 0),
        ("num_sub_embeddings", 3),
        ("num_sub_embeddings", 10),
        ("num_sub_embeddings", 24),
        ("dropout", 1.0),
        ("augmentation_probability", 1.1),
        ("max_occluded_blocks", 49),
        ("confidence_regularization", -1.0),
        ("classification_weight", -1.0),
        ("adversarial_weight", -1.0),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"model.{field}={value!r}"):
        dataclasses.replace(TINY, **{field: value})
