"""FQA and LGF: the measures of quality, the weights of eq. 6-9, the ways to fuse, the statistics over ranks."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
import torch.distributed as dist

from lgaf import LGAFConfig
from lgaf.models.fusion import (
    QUALITY_MEASURES,
    IterativeAttentionalFusion,
    LocalGlobalFusion,
    PlainFusion,
    feature_norms,
    gaussian_entropies,
    shannon_entropies,
)
from tests.distributed import run_distributed

MICRO = LGAFConfig(backbone="micro", embedding_dim=16)


class TestFusion:
    def test_weights_follow_equations_six_and_nine(self):
        fusion = LocalGlobalFusion().eval()
        fusion.local_quality.mean.fill_(20.0), fusion.local_quality.std.fill_(2.0)
        fusion.global_quality.mean.fill_(22.0), fusion.global_quality.std.fill_(4.0)
        local, global_ = torch.zeros(1, 4), torch.zeros(1, 4)
        local[0, 0], global_[0, 0] = 23.0, 20.0
        quality_local = 0.333 * 3.0 / 2.001 + 1
        quality_global = 0.333 * -2.0 / 4.001 + 1
        _, weight = fusion(local, global_)
        assert weight.item() == pytest.approx(
            (quality_local + 1e-3) / (quality_local + quality_global + 2e-3), rel=1e-5
        )

    def test_both_at_their_worst_gives_halves(self):
        fusion = LocalGlobalFusion().eval()
        for quality in (fusion.local_quality, fusion.global_quality):
            quality.mean.fill_(20.0), quality.std.fill_(1.0)
        fused, weight = fusion(torch.zeros(2, 4), torch.zeros(2, 4))
        assert weight.tolist() == [0.5, 0.5]
        assert torch.isfinite(fused).all()

    def test_starts_at_about_a_half(self):
        _, weight = LocalGlobalFusion()(torch.randn(64, 32), torch.randn(64, 32))
        assert (weight - 0.5).abs().max() < 0.01

    def test_statistics_move_by_the_moving_average(self):
        fusion = LocalGlobalFusion()
        local = torch.randn(16, 8)
        fusion(local, torch.randn(16, 8))
        norms = local.norm(dim=1)
        assert fusion.local_quality.mean.item() == pytest.approx(0.01 * norms.mean().item() + 0.99 * 20.0, rel=1e-5)
        assert fusion.local_quality.std.item() == pytest.approx(0.01 * norms.std().item() + 0.99 * 100.0, rel=1e-5)

    def test_the_deviation_is_the_unbiased_one(self):
        fusion = LocalGlobalFusion()
        local = torch.zeros(2, 8)
        local[0, 0], local[1, 0] = 10.0, 30.0
        fusion(local, torch.randn(2, 8))
        assert fusion.local_quality.std.item() == pytest.approx(0.01 * math.sqrt(200) + 99.0, rel=1e-6)

    def test_a_batch_is_standardised_after_it_has_moved_the_statistics(self):
        fusion = LocalGlobalFusion()
        for quality in (fusion.local_quality, fusion.global_quality):
            quality.mean.fill_(0.0), quality.std.fill_(0.1)
        local, global_ = 0.1 * torch.rand(8, 4), 0.1 * torch.rand(8, 4)
        _, weight = fusion(local, global_)
        _, settled = fusion.eval()(local, global_)
        torch.testing.assert_close(weight, settled, rtol=0, atol=0)

    def test_quality_is_measured_in_float32(self):
        fusion = LocalGlobalFusion().eval()
        fusion.local_quality.mean.fill_(3.0), fusion.local_quality.std.fill_(0.5)
        local, global_ = torch.randn(16, 64).bfloat16(), torch.randn(16, 64).bfloat16()
        _, weight = fusion(local, global_)
        _, exact = fusion(local.float(), global_.float())
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact)

    def test_one_image_moves_no_deviation(self):
        fusion = LocalGlobalFusion()
        fusion(torch.randn(1, 8), torch.randn(1, 8))
        assert fusion.local_quality.std.item() == pytest.approx(100.0)

    def test_no_gradient_flows_through_the_weights(self):
        local = torch.randn(4, 8, requires_grad=True)
        _, weight = LocalGlobalFusion()(local, torch.randn(4, 8))
        assert not weight.requires_grad

    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_any_world_size_gives_the_same_weights(self, world):
        run_distributed(world, _check_global_statistics)


def _check_global_statistics(group) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(2)
    local, global_ = torch.randn(7, 8, generator=generator) * 9, torch.randn(7, 8, generator=generator) * 7
    alone = LocalGlobalFusion()
    _, expected = alone(local, global_)
    shared = LocalGlobalFusion()
    shared.local_quality.group = shared.global_quality.group = group
    own = slice(rank * 7 // world, (rank + 1) * 7 // world)
    _, weight = shared(local[own], global_[own])
    torch.testing.assert_close(weight, expected[own], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.local_quality.std, alone.local_quality.std)


class TestQualityMeasures:
    FEATURES = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3

    def test_norm(self):
        expected = [math.sqrt(sum(v * v for v in row)) for row in self.FEATURES.tolist()]
        torch.testing.assert_close(feature_norms(self.FEATURES).tolist(), expected)

    def test_shannon_entropy_of_the_softmax(self):
        expected = []
        for row in self.FEATURES.tolist():
            total = sum(math.exp(v) for v in row)
            shares = [math.exp(v) / total for v in row]
            expected.append(-sum(p * math.log(p) for p in shares))
        torch.testing.assert_close(shannon_entropies(self.FEATURES).tolist(), expected)
        torch.testing.assert_close(shannon_entropies(torch.ones(1, 16)), torch.tensor([math.log(16)]))

    def test_gaussian_entropy(self):
        expected = [
            math.log(statistics.stdev(row)) + 0.5 + 0.5 * math.log(2 * math.pi) for row in self.FEATURES.tolist()
        ]
        torch.testing.assert_close(gaussian_entropies(self.FEATURES).tolist(), expected)
        assert torch.isfinite(gaussian_entropies(torch.zeros(1, 16))).all()

    @pytest.mark.parametrize("measure", QUALITY_MEASURES)
    def test_weights_are_shares_of_the_standardised_measure(self, measure):
        fusion = LocalGlobalFusion(measure).eval()
        for quality in (fusion.local_quality, fusion.global_quality):
            quality.mean.fill_(2.0), quality.std.fill_(0.5)
        local, global_ = self.FEATURES.float(), self.FEATURES.flip(0).float() * 0.5
        _, weight = fusion(local, global_)
        z_local, z_global = (
            (0.333 * (QUALITY_MEASURES[measure](feature) - 2.0) / 0.501).clamp(-1, 1) + 1
            for feature in (local, global_)
        )
        torch.testing.assert_close(weight, (z_local + 1e-3) / (z_local + z_global + 2e-3))

    @pytest.mark.parametrize("measure", QUALITY_MEASURES)
    def test_gradient_through_the_weights_is_a_switch(self, measure):
        for wanted in (True, False):
            for local_learns in (True, False):
                local = torch.randn(4, 8, requires_grad=local_learns)
                global_ = torch.randn(4, 8, requires_grad=not local_learns)
                _, weight = LocalGlobalFusion(measure, quality_gradient=wanted)(local, global_)
                assert weight.requires_grad == wanted


class TestFusionModes:
    LOCAL, GLOBAL = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).unbind()

    def test_cat_puts_the_weighted_features_side_by_side(self):
        added, weight = LocalGlobalFusion().eval()(self.LOCAL, self.GLOBAL)
        joined, same_weight = LocalGlobalFusion(concatenate=True).eval()(self.LOCAL, self.GLOBAL)
        assert torch.equal(weight, same_weight)
        torch.testing.assert_close(
            joined, torch.cat([weight[:, None] * self.LOCAL, (1 - weight[:, None]) * self.GLOBAL], 1)
        )
        torch.testing.assert_close(joined[:, :8] + joined[:, 8:], added)
        assert LGAFConfig(fusion="cat").output_dim == 1024
        assert LGAFConfig(fusion="cat", branches=("local",)).output_dim == 512

    def test_cat_without_quality_leaves_the_features_as_they_are(self):
        joined, weight = PlainFusion(concatenate=True)(self.LOCAL, self.GLOBAL)
        assert torch.equal(joined, torch.cat([self.LOCAL, self.GLOBAL], dim=1))
        assert weight.tolist() == [0.5] * 6

    def test_iaff_runs_two_rounds_of_their_own_attention(self):
        fusion = IterativeAttentionalFusion(8).eval()
        first, second = fusion.rounds

        def attention(module, x):
            return torch.sigmoid(module.local_attention(x) + module.global_attention(x))

        weight = attention(first, self.LOCAL + self.GLOBAL)
        rough = weight * self.LOCAL + (1 - weight) * self.GLOBAL
        weight = attention(second, rough)
        fused, share = fusion(self.LOCAL, self.GLOBAL)
        torch.testing.assert_close(fused, weight * self.LOCAL + (1 - weight) * self.GLOBAL)
        torch.testing.assert_close(share, weight.mean(dim=1))
        # The second round has a global attention of its own.
        with torch.no_grad():
            before = fusion(self.LOCAL, self.GLOBAL)[0]
            torch.nn.init.ones_(second.global_attention[4].bias)
            assert not torch.allclose(before, fusion(self.LOCAL, self.GLOBAL)[0])
        hidden = [module.out_features for module in first.local_attention if isinstance(module, torch.nn.Linear)]
        assert hidden == [2, 8], "r = 4"

    def test_iaff_learns_its_own_weights(self):
        with pytest.raises(ValueError, match=r"model.fusion='iaff'.*model.quality='none'"):
            LGAFConfig(fusion="iaff")

    def test_unit_branches_keep_their_quality(self):
        plain, unit = LocalGlobalFusion().eval(), LocalGlobalFusion(unit_features=True).eval()
        for fusion in (plain, unit):
            fusion.local_quality.mean.fill_(2.0), fusion.local_quality.std.fill_(0.5)
        _, weight = plain(self.LOCAL, self.GLOBAL)
        fused, same_weight = unit(self.LOCAL, self.GLOBAL)
        assert torch.equal(weight, same_weight)
        assert weight.std() > 0.01
        unit_local, unit_global = (torch.nn.functional.normalize(f) for f in (self.LOCAL, self.GLOBAL))
        torch.testing.assert_close(fused, weight[:, None] * unit_local + (1 - weight[:, None]) * unit_global)

    def test_unit_branches_weigh_directions_alone(self):
        torch.manual_seed(0)
        model = dataclasses.replace(MICRO, unit_branches=True, quality="none").build().eval()
        with torch.no_grad():
            out = model(torch.randn(2, 3, 112, 112))
        assert (out.embedding_BD.norm(dim=1) <= 2 + 1e-5).all()
        assert (out.norm_local_B - 1).abs().min() > 1e-3, "the norms told are those of the features"
