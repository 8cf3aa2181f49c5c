"""HPDA: attentions that differ, a pyramid that covers the map, levels fused by bilinear pooling."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from lgaf.models.local_branch import LANet, SqueezeExcitation
from lgaf.models.peers.hpda import (
    DiverseAttention,
    HierarchicalBilinearPooling,
    HPDAConfig,
    divergence_loss,
    pool_cells,
    spread_cells,
)

SMALL = HPDAConfig(growth_rate=16, layers=(1, 1, 1), local_width=16, attentions=2, bilinear_dim=32, embedding_dim=16)


def _awake(model: torch.nn.Module) -> torch.nn.Module:
    """No hidden unit of an attention starts dead, as the one or two of a small network well may."""
    for module in model.modules():
        if isinstance(module, LANet):
            torch.nn.init.ones_(module.attention[0].bias)
        if isinstance(module, SqueezeExcitation):
            torch.nn.init.ones_(module.excite[0].bias)
    return model


def _disjoint(num_attentions: int, side: int = 4) -> torch.Tensor:
    owner = torch.arange(side * side) % num_attentions
    return torch.stack([(owner == i).float() * (i + 1) for i in range(num_attentions)]).view(1, -1, side, side)


class TestDiverseLearning:
    @pytest.mark.parametrize("num_attentions", [2, 3, 5])
    @pytest.mark.parametrize("margin", [0.5, 1.0, math.sqrt(2)])
    def test_disjoint_attentions_cost_nothing_and_equal_ones_the_margin(self, num_attentions, margin):
        assert divergence_loss(_disjoint(num_attentions), margin).item() == pytest.approx(0, abs=1e-6)
        equal = torch.rand(3, 1, 4, 4).expand(3, num_attentions, 4, 4)
        assert divergence_loss(equal, margin).item() == pytest.approx(margin, abs=1e-5)

    def test_lies_between_for_others(self):
        attention = torch.rand(8, 4, 7, 7)
        assert 0 < divergence_loss(attention, 1.0) < 1
        sharper = attention**4
        assert divergence_loss(sharper, 1.0) < divergence_loss(attention, 1.0)

    def test_equals_the_loop_over_pairs(self):
        attention = torch.rand(3, 4, 5, 5)
        total, count = 0.0, 0
        for face in attention:
            for one, two in itertools.combinations(face, 2):
                total += max(0.0, 0.7 - (one / one.norm() - two / two.norm()).norm().item())
                count += 1
        assert divergence_loss(attention, 0.7).item() == pytest.approx(total / count, rel=1e-5)

    def test_strength_alone_does_not_make_attentions_differ(self):
        attention = torch.rand(2, 1, 4, 4) * torch.tensor([1.0, 0.1]).view(1, 2, 1, 1)
        assert divergence_loss(attention, 1.0).item() == pytest.approx(1, abs=1e-5)

    def test_its_gradient_separates_attentions(self):
        torch.manual_seed(0)
        logits = (torch.randn(2, 1, 4, 4) + 1e-3 * torch.randn(2, 3, 4, 4)).requires_grad_()
        before = divergence_loss(logits.sigmoid(), 1.0)
        optimizer = torch.optim.SGD([logits], lr=5.0)
        for _ in range(100):
            optimizer.zero_grad()
            divergence_loss(logits.sigmoid(), 1.0).backward()
            optimizer.step()
        assert before > 0.99
        assert divergence_loss(logits.sigmoid(), 1.0) < 0.05

    def test_its_gradient_is_finite_where_attentions_are_equal(self):
        attention = torch.full((1, 2, 3, 3), 0.5, requires_grad=True)
        divergence_loss(attention, 1.0).backward()
        assert torch.isfinite(attention.grad).all()

    def test_training_on_it_makes_a_networks_attentions_diverse(self):
        torch.manual_seed(0)
        model = SMALL.build()
        images = torch.randn(4, 3, 112, 112)
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
        torch.manual_seed(0)
        model, images = SMALL.build(), torch.randn(2, 3, 112, 112)
        loss = model(images).auxiliary_loss
        assert loss.shape == ()
        assert 0 < loss <= 1
        assert model.eval()(images).auxiliary_loss is None
        model.config = dataclasses.replace(SMALL, diversity_weight=0.25)
        torch.testing.assert_close(model.train()(images).auxiliary_loss, 0.25 * loss)


class TestPyramid:
    @pytest.mark.parametrize("cell", [1, 2, 3, 4, 5, 6])
    def test_cells_cover_the_map_and_each_position_has_one(self, cell):
        x = torch.rand(1, 1, 7, 7)
        expected = torch.empty(7, 7)
        covered = torch.zeros(7, 7)
        for top, left in itertools.product(range(0, 7, cell), repeat=2):
            window = (slice(top, top + cell), slice(left, left + cell))
            expected[window] = x[0, 0][window].mean()
            covered[window] += 1
        assert (covered == 1).all()
        spread = spread_cells(pool_cells(x, cell), cell, 7)
        torch.testing.assert_close(spread[0, 0], expected)
        assert spread.sum().item() == pytest.approx(x.sum().item(), rel=1e-5)

    def test_local_maps_are_cells_weighted_by_each_attention(self):
        scale = DiverseAttention(16, 2, 3)
        x = torch.randn(2, 16, 7, 7)
        with torch.no_grad():
            local, attention = scale(x)
        assert local.shape == (2, 3 * 16, 7, 7)
        assert attention.shape == (2, 3, 4, 4)
        assert attention.min() > 0
        assert attention.max() < 1
        for face, part in itertools.product(range(2), range(3)):
            weight = spread_cells(attention[face : face + 1, part : part + 1], 2, 7)[0]
            cells = spread_cells(pool_cells(x[face : face + 1], 2), 2, 7)[0]
            torch.testing.assert_close(local[face, 16 * part : 16 * part + 16], weight * cells)

    def test_coarse_scales_forget_detail_and_the_finest_does_not(self):
        x = torch.zeros(1, 16, 7, 7)
        moved = x.clone()
        x[..., 0, 0], moved[..., 1, 1] = 1, 1
        with torch.no_grad():
            for cell, same in ((1, False), (2, True), (4, True)):
                scale = DiverseAttention(16, cell, 2)
                assert torch.equal(scale(x)[0], scale(moved)[0]) is same

    def test_attention_maps_show_every_level_scale_and_part(self):
        model = dataclasses.replace(SMALL, attentions=3).build().eval()
        maps = model.attention_maps(torch.randn(2, 3, 112, 112))
        assert maps.shape == (2, 3, 3, 3, 7, 7)
        assert maps.min() > 0
        assert maps.max() < 1
        for scale, cell in enumerate(SMALL.pyramid):
            shown = maps[:, :, scale].flatten(1, 2)
            torch.testing.assert_close(spread_cells(pool_cells(shown, cell), cell, 7), shown)


class TestBilinearPooling:
    def test_equals_the_loop_over_pairs_channels_and_positions(self):
        pooling = HierarchicalBilinearPooling(6, 5, 4)
        maps = [torch.randn(2, 6, 3, 3) for _ in range(3)]
        with torch.no_grad():
            got = pooling.interactions(maps)
        weights = [projection.weight.detach()[:, :, 0, 0] for projection in pooling.projections]
        expected = torch.zeros(2, 3, 5)
        for face in range(2):
            for pair, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
                for channel, row, column in itertools.product(range(5), range(3), range(3)):
                    left = weights[i][channel] @ maps[i][face, :, row, column]
                    right = weights[j][channel] @ maps[j][face, :, row, column]
                    expected[face, pair, channel] += left * right
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_each_pair_counts_by_its_signed_roots_of_unit_length(self):
        pooling = HierarchicalBilinearPooling(6, 5, 4)
        maps = [torch.randn(2, 6, 3, 3) for _ in range(3)]
        with torch.no_grad():
            products = pooling.interactions(maps)
            root = products.sign() * products.abs().sqrt()
            expected = (root / root.norm(dim=2, keepdim=True)).flatten(1) @ pooling.fc.weight.T
            torch.testing.assert_close(pooling(maps), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("level", [0, 1, 2])
    def test_every_level_takes_part(self, level):
        pooling = HierarchicalBilinearPooling(6, 5, 4)
        maps = [torch.randn(1, 6, 3, 3) for _ in range(3)]
        maps[level] = torch.zeros_like(maps[level])
        with torch.no_grad():
            by_pair = pooling.interactions(maps)[0].any(dim=1)
        assert by_pair.tolist() == [level not in pair for pair in pooling.pairs]

    def test_an_empty_map_has_a_finite_gradient(self):
        maps = [torch.zeros(1, 6, 3, 3, requires_grad=True) for _ in range(3)]
        HierarchicalBilinearPooling(6, 5, 4)(maps).sum().backward()
        assert all(torch.isfinite(level.grad).all() for level in maps)


def test_the_levels_are_the_blocks_of_the_trunk():
    trunk = SMALL.build().trunk
    maps = trunk(torch.randn(1, 3, 112, 112))
    assert [tuple(level.shape[1:]) for level in maps] == [
        (width, side, side) for width, side in zip(trunk.out_channels, (28, 14, 7), strict=True)
    ]
    # Each block starts from the one before, halved, and adds to it.
    assert trunk.out_channels == [48, 24 + 16, 20 + 16]


def test_half_of_the_embedding_is_global_and_half_local():
    torch.manual_seed(0)
    model, images = SMALL.build().eval(), torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        before = model(images).embedding_BD
        model.global_fc.weight.zero_()
        no_global = model(images).embedding_BD
        model.bilinear.fc.weight.zero_()
        neither = model(images).embedding_BD
    assert before[:, :8].abs().min() > 0
    assert not no_global[:, :8].any()
    assert torch.equal(no_global[:, 8:], before[:, 8:])
    assert not neither.any()


def test_default_size():
    with torch.device("meta"):
        model = HPDAConfig().build()
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_366_503


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = _awake(SMALL.build())
    out = model(torch.randn(4, 3, 112, 112))
    ((out.embedding_BD * torch.randn(4, 16)).sum() + out.auxiliary_loss).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("growth_rate", 0, "model.growth_rate=0"),
        ("layers", (1, 1), r"model.layers=\(1, 1\)"),
        ("local_width", 0, "model.local_width=0"),
        ("pyramid", (), r"model.pyramid=\(\)"),
        ("pyramid", (1, 7), r"model.pyramid=\(1, 7\)"),
        ("pyramid", (2, 2), r"model.pyramid=\(2, 2\)"),
        ("attentions", 1, "model.attentions=1"),
        ("bilinear_dim", 0, "model.bilinear_dim=0"),
        ("diversity_margin", 0.0, "model.diversity_margin=0.0"),
        ("diversity_margin", 1.5, "model.diversity_margin=1.5"),
        ("diversity_weight", -1.0, "model.diversity_weight=-1.0"),
        ("embedding_dim", 15, "model.embedding_dim=15 must be even"),
    ],
)
def test_bad_fields_are_named(field, value, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SMALL, **{field: value})
