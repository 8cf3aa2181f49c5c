"""CQA-Face: parts that differ, and an embedding of the good ones."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from lgaf.models.local_branch import LANet
from lgaf.models.peers.cqa_face import (
    CQAFaceConfig,
    QualityAwareNetwork,
    contrastive_attention_loss,
    fuse_parts,
    pool_parts,
)

SMALL = CQAFaceConfig(backbone="tiny", embedding_dim=16, num_parts=3)


class TestContrastiveAttentionLearning:
    @pytest.mark.parametrize("num_parts", [2, 3, 5])
    def test_parts_apart_cost_nothing_and_the_same_part_costs_one(self, num_parts):
        owner = torch.arange(16) % num_parts
        apart = torch.stack([(owner == part).float() * (part + 1) for part in range(num_parts)]).view(1, -1, 4, 4)
        assert contrastive_attention_loss(apart).item() == pytest.approx(0, abs=1e-6)
        same = torch.rand(3, 1, 4, 4).expand(3, num_parts, 4, 4)
        assert contrastive_attention_loss(same).item() == pytest.approx(1, abs=1e-5)

    def test_equals_the_loop_over_pairs(self):
        attention = torch.rand(3, 4, 5, 5)
        distances = [
            (one / one.norm() - two / two.norm()).norm().item()
            for face in attention
            for one, two in itertools.combinations(face, 2)
        ]
        expected = 1 - sum(distances) / len(distances) / math.sqrt(2)
        assert contrastive_attention_loss(attention).item() == pytest.approx(expected, rel=1e-5)

    def test_its_gradient_separates_parts(self):
        torch.manual_seed(0)
        logits = (torch.randn(2, 1, 4, 4) + 1e-3 * torch.randn(2, 3, 4, 4)).requires_grad_()
        before = contrastive_attention_loss(logits.sigmoid())
        optimizer = torch.optim.SGD([logits], lr=5.0)
        for _ in range(200):
            optimizer.zero_grad()
            contrastive_attention_loss(logits.sigmoid()).backward()
            optimizer.step()
        assert before > 0.99
        assert contrastive_attention_loss(logits.sigmoid()) < 0.2

    def test_its_gradient_is_finite_where_parts_are_equal(self):
        attention = torch.full((1, 2, 3, 3), 0.5, requires_grad=True)
        contrastive_attention_loss(attention).backward()
        assert torch.isfinite(attention.grad).all()

    def test_training_on_it_makes_a_networks_parts_differ(self):
        torch.manual_seed(0)
        model, images = SMALL.build(), torch.randn(4, 3, 112, 112)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(images).auxiliary_loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_is_a_loss_of_training_alone_and_has_its_weight(self):
        model, images = dataclasses.replace(SMALL, dropout=0.0).build(), torch.randn(2, 3, 112, 112)
        loss = model(images).auxiliary_loss
        assert loss.shape == ()
        assert 0 < loss < 1
        assert model.eval()(images).auxiliary_loss is None
        model.config = dataclasses.replace(SMALL, contrast_weight=0.25)
        torch.testing.assert_close(model.train()(images).auxiliary_loss, 0.25 * loss)


class TestParts:
    def test_a_part_is_the_mean_weighted_by_its_attention(self):
        features, attention = torch.randn(2, 5, 3, 3), torch.rand(2, 4, 3, 3)
        expected = torch.zeros(2, 4, 5)
        for face, part in itertools.product(range(2), range(4)):
            weight = attention[face, part] / attention[face, part].sum()
            for row, column in itertools.product(range(3), repeat=2):
                expected[face, part] += weight[row, column] * features[face, :, row, column]
        torch.testing.assert_close(pool_parts(features, attention), expected)

    def test_what_a_part_does_not_attend_to_does_not_reach_it(self):
        features, attention = torch.randn(1, 5, 4, 4), torch.zeros(1, 2, 4, 4)
        attention[0, 0, :2], attention[0, 1, 2:] = 0.7, 0.2  # upper and lower face
        occluded = features.clone()
        occluded[:, :, 2:] = 100.0
        before, after = pool_parts(features, attention), pool_parts(occluded, attention)
        assert torch.equal(before[:, 0], after[:, 0])
        torch.testing.assert_close(after[:, 1], torch.full((1, 5), 100.0))

    def test_every_part_has_an_attention_of_its_own(self):
        torch.manual_seed(0)
        parts = SMALL.build().eval().face_parts(torch.randn(2, 3, 112, 112))
        assert parts.attention_BPHW.shape == (2, 3, 7, 7)
        assert parts.attention_BPHW.min() > 0
        assert parts.attention_BPHW.max() < 1
        for one, two in itertools.combinations(parts.attention_BPHW.unbind(dim=1), 2):
            assert not torch.equal(one, two)


class TestQualityAwareNetwork:
    def test_qualities_are_shares(self):
        quality = QualityAwareNetwork(4, 8)(5 * torch.randn(6, 4, 8))
        assert quality.shape == (6, 4)
        assert quality.min() > 0
        torch.testing.assert_close(quality.sum(dim=1), torch.ones(6))

    def test_a_part_is_judged_in_view_of_the_others(self):
        torch.manual_seed(0)
        network = QualityAwareNetwork(3, 16)
        parts = torch.randn(4, 3, 16)
        changed = parts.clone()
        changed[:, 1] = torch.randn(4, 16)
        with torch.no_grad():
            before, after = network.score(parts.flatten(1)), network.score(changed.flatten(1))
        # Its own score, not only its share of the sum.
        assert ((before - after)[:, 0].abs() > 1e-3).all()

    def test_a_part_without_quality_does_not_count(self):
        parts, quality = torch.randn(2, 3, 8), torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
        noisy = parts.clone()
        noisy[:, 2] = 1e6
        fused = fuse_parts(noisy, quality)
        torch.testing.assert_close(fused[0], parts[0, 1])
        torch.testing.assert_close(fused[1], (parts[1, 0] + parts[1, 1]) / 2)

    def test_learns_to_suppress_noisy_parts(self):
        # Each part shows the same identity; one of them, at random, shows noise instead. Only the identity of the
        # fused parts is learned, as in the network.
        torch.manual_seed(0)
        network, centres = QualityAwareNetwork(3, 16), F.normalize(torch.randn(4, 16))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)

        def batch(size):
            label, noisy = torch.randint(0, 4, (size,)), torch.randint(0, 3, (size,))
            parts = centres[label][:, None] + 0.05 * torch.randn(size, 3, 16)
            parts[torch.arange(size), noisy] = torch.randn(size, 16)
            return parts, label, noisy

        for _ in range(1000):
            parts, label, _ = batch(64)
            loss = F.cross_entropy(16 * fuse_parts(parts, network(parts)) @ centres.T, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        parts, _, noisy = batch(500)
        with torch.no_grad():
            share = network(parts)[torch.arange(500), noisy]
        assert share.mean() < 0.15  # a third if it had learned nothing


def test_the_embedding_is_the_parts_by_quality():
    model, images = SMALL.build().eval(), torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        features = model.bn(model.backbone(images))
        attention, quality = model.face_parts(images)
        fused = torch.zeros(2, 16)
        for part in range(3):
            torch.testing.assert_close(model.attentions[part](features), features * attention[:, part : part + 1])
            pooled = pool_parts(features, attention[:, part : part + 1])[:, 0]
            fused += quality[:, part : part + 1] * model.projections[part](pooled)
        torch.testing.assert_close(model(images).embedding_BD, model.features(fused))


def test_default_size():
    with torch.device("meta"):
        model = CQAFaceConfig().build()
    assert sum(parameter.numel() for parameter in model.parameters()) == 53_688_776


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = SMALL.build()
    for module in model.modules():
        if isinstance(module, LANet):
            torch.nn.init.ones_(module.attention[0].bias)  # no hidden unit starts dead
    torch.nn.init.ones_(model.quality.score[0].bias)
    out = model(torch.randn(4, 3, 112, 112))
    ((out.embedding_BD * torch.randn(4, 16)).sum() + out.auxiliary_loss).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("backbone", "iresnet101", "model.backbone='iresnet101'.*did you mean"),
        ("embedding_dim", 0, "model.embedding_dim=0"),
        ("num_parts", 1, "model.num_parts=1"),
        ("contrast_weight", -0.5, "model.contrast_weight=-0.5"),
        ("dropout", 1.0, "model.dropout=1.0"),
    ],
)
def test_bad_fields_are_named(field, value, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SMALL, **{field: value})
