"""The network: sizes, shapes, switches, and the fusion by quality."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from lgaf import LGAFConfig, create_backbone
from lgaf.config import from_dict
from lgaf.models.fusion import (
    QUALITY_MEASURES,
    IterativeAttentionalFusion,
    LocalGlobalFusion,
    PlainFusion,
    feature_norms,
    gaussian_entropies,
    shannon_entropies,
)
from lgaf.models.local_branch import LANet, MultiHeadMultiScale, head_similarity, scale_convolution
from tests.distributed import run_distributed

MICRO = LGAFConfig(backbone="micro", embedding_dim=16)


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_body_of_iresnet100_has_the_published_size():
    # 65,156,160 of insightface's iresnet100, less the 12,845,568 of its fc and the 1,024 of its last BN ("features")
    # and the 1,024 of bn2, which belong to the global branch here.
    body = create_backbone("iresnet100")
    assert _parameters(body) == 65_156_160 - 12_845_568 - 1_024 - 1_024
    with torch.no_grad():
        assert body.eval()(torch.zeros(1, 3, 112, 112)).shape == (1, 512, 7, 7)


@pytest.mark.parametrize(("name", "size"), [("iresnet18", 24_025_600), ("iresnet50", 43_590_848)])
def test_the_smaller_bodies_too(name, size):
    assert _parameters(create_backbone(name)) == size - 12_845_568 - 2_048


@pytest.mark.parametrize("backbone", ["tiny", "micro"])
@pytest.mark.parametrize("branches", [("global",), ("local",), ("global", "local")])
@pytest.mark.parametrize("quality", ["norm", "none"])
def test_every_switch_embeds_and_learns(backbone, branches, quality):
    model = LGAFConfig(backbone=backbone, embedding_dim=32, branches=branches, quality=quality).build()
    out = model(torch.randn(3, 3, 112, 112))
    assert out.embedding_BD.shape == (3, 32)
    assert out.norm_local_B.shape == out.norm_global_B.shape == out.weight_local_B.shape == (3,)
    out.embedding_BD.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_state_dict_round_trip_keeps_the_statistics():
    torch.manual_seed(0)
    model = MICRO.build()
    model(torch.randn(8, 3, 112, 112))
    copy = MICRO.build()
    copy.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(model.eval()(images).embedding_BD, copy.eval()(images).embedding_BD)
    assert copy.fusion.local_quality.std.item() != 100.0


def test_an_embedding_does_not_depend_on_its_batch():
    model = MICRO.build().double().eval()
    images = torch.randn(4, 3, 112, 112, dtype=torch.float64)
    with torch.no_grad():
        together = model(images)
        alone = model(images[:1])
    torch.testing.assert_close(together.weight_local_B[:1], alone.weight_local_B)
    torch.testing.assert_close(together.embedding_BD[:1], alone.embedding_BD)


def test_method_three_adds_the_branches():
    torch.manual_seed(0)
    model = dataclasses.replace(MICRO, quality="none").build().eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        features = model.backbone(images)
        expected = model.local_branch(features) + model.global_branch(features)
        torch.testing.assert_close(model(images).embedding_BD, expected)


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


def test_feature_maps_are_those_before_the_projections():
    torch.manual_seed(0)
    model = MICRO.build().eval()
    images = torch.randn(2, 3, 112, 112)
    maps = model.feature_maps(images)
    assert maps.global_BHW.shape == (2, 7, 7)
    assert maps.local_BbHW.shape == (2, 4, 7, 7)
    with torch.no_grad():
        features = model.backbone(images)
        head = model.local_branch.heads[2]
        seen = []
        head.project.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        model.local_branch(features)
        attended = seen[0].view(2, -1, 7, 7).abs().mean(dim=1)
    torch.testing.assert_close(maps.local_BbHW[:, 2], attended)
    with pytest.raises(ValueError, match=r"both branches.*'local'"):
        dataclasses.replace(MICRO, branches=("local",)).build().feature_maps(images)


def test_head_similarity_is_the_mean_cosine_of_where_the_maps_lie():
    here, there = torch.zeros(2, 3, 7, 7), torch.zeros(2, 3, 7, 7)
    here[:, :, 0, 0], there[:, :, 6, 6] = 2.0, -5.0
    assert head_similarity([here, there]).item() == 0.0
    assert head_similarity([here, 3 * here]).item() == pytest.approx(1.0)
    third = here + 0.4 * there  # as much of one as of the other
    assert head_similarity([here, there, third]).item() == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3, rel=1e-5)
    mixed = [torch.rand(2, 3, 7, 7, requires_grad=True) for _ in range(3)]
    head_similarity(mixed).backward()
    assert all(map_.grad.abs().sum() > 0 for map_ in mixed)


def test_every_switch_reaches_its_part():
    def built(**fields):
        return LGAFConfig(backbone="micro", embedding_dim=16, **fields).build()

    head = built(local_width=48).local_branch.heads[0]
    assert [scale[0].out_channels for scale in head.scales] == [48, 48, 48]
    assert [attention.attention[0].out_channels for attention in head.attentions] == [3, 3, 3]  # 48 / 16
    assert head.excitation.excite[0].out_features == 9  # 3 * 48 / 16
    assert len(built(scale_form="direct").local_branch.heads[0].scales[2]) == 3
    assert built(lanet_gap="channel").local_branch.heads[0].attentions[0].attention[0].in_channels == 1
    assert built(local_projection="gap").local_branch.heads[0].project.in_features == 3 * 4
    shifted = built(feature_shift=True)
    for branch, plain in ((shifted.local_branch, built().local_branch), (shifted.global_branch, built().global_branch)):
        assert branch.features.bias.requires_grad
        assert not branch.features.weight.requires_grad
        assert plain.features.bias is None
    assert built(quality_gradient=True).fusion.quality_gradient
    assert built(quality="entropy").fusion.measure is shannon_entropies
    assert built(gradient_checkpointing=True).backbone.gradient_checkpointing


def test_norms_and_variances_are_those_of_their_branch():
    torch.manual_seed(0)
    model = dataclasses.replace(MICRO, dropout=0.0).build()
    features = {}
    for name in ("local", "global"):
        branch = getattr(model, f"{name}_branch")
        branch.register_forward_hook(lambda _m, _i, output, name=name: features.update({name: output}))
    model.local_branch.features.register_forward_hook(lambda _m, _i, output: features.update(local=output))
    out = model(torch.randn(8, 3, 112, 112))
    torch.testing.assert_close(out.norm_local_B, features["local"].norm(dim=1))
    torch.testing.assert_close(out.norm_global_B, features["global"].norm(dim=1))
    for feature in features.values():  # the last BN of each branch
        torch.testing.assert_close(feature.var(dim=0, unbiased=False), torch.ones(16), rtol=0.01, atol=0.01)


def test_diversity_is_a_loss_of_training_alone():
    images = torch.randn(3, 3, 112, 112)
    losses = []
    for weight in (1.0, 2.0):
        torch.manual_seed(0)
        losses.append(dataclasses.replace(MICRO, diversity_weight=weight, dropout=0.0).build()(images).auxiliary_loss)
    torch.testing.assert_close(losses[1], 2 * losses[0])
    model = dataclasses.replace(MICRO, diversity_weight=2.0).build()
    out = model(images)
    assert 0 < out.auxiliary_loss.item() <= 2
    assert model.eval()(torch.randn(3, 3, 112, 112)).auxiliary_loss is None
    assert MICRO.build()(torch.randn(3, 3, 112, 112)).auxiliary_loss is None
    with pytest.raises(ValueError, match=r"model.diversity_weight=2.0 needs a local branch of two heads"):
        dataclasses.replace(MICRO, diversity_weight=2.0, num_heads=1)


def test_lanet_readings_of_the_pooling():
    x = torch.rand(2, 16, 7, 7) + 0.1
    shapes = {"none": (2, 1, 7, 7), "channel": (2, 1, 7, 7), "spatial": (2, 1, 1, 1)}
    for pooling, shape in shapes.items():
        seen = []
        attention = LANet(16, pooling)
        attention.attention.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))
        torch.testing.assert_close(attention(x), x * seen[0])
        assert seen[0].shape == shape


def test_local_attention_weighs_positions_alike_over_channels():
    attention = LANet(16)
    x = torch.rand(2, 16, 7, 7) + 0.1
    ratio = attention(x) / x
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio.std() > 0


@pytest.mark.parametrize(("kernel", "num_convolutions"), [(1, 1), (3, 2), (5, 3), (7, 4)])
def test_scales_have_their_equivalent_kernels(kernel, num_convolutions):
    stack = scale_convolution(4, 4, kernel).eval()
    convolutions = [m for m in stack.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == num_convolutions
    for convolution in convolutions:
        torch.nn.init.ones_(convolution.weight)
    impulse = torch.zeros(1, 4, 9, 9)
    impulse[0, :, 4, 4] = 1
    reached = (stack(impulse)[0, 0] != 0).nonzero()
    assert (reached.max(0).values - reached.min(0).values + 1).tolist() == [kernel, kernel]


def test_heads_share_the_embedding():
    branch = MultiHeadMultiScale(16, 7, 32, 4, (1, 3), 0.0)
    assert [head.project.out_features for head in branch.heads] == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("backbone", "iresnet101", "model.backbone='iresnet101'.*did you mean"),
        ("num_heads", 3, "model.num_heads=3 must divide"),
        ("scales", (2,), r"model.scales=\(2,\)"),
        ("branches", (), "model.branches"),
        ("quality", "entropi", "model.quality='entropi'"),
        ("dropout", 1.5, "model.dropout=1.5"),
        ("fusion", "sum", "model.fusion='sum'.*add, cat, iaff"),
        ("lanet_gap", "all", "model.lanet_gap='all'"),
        ("scale_form", "flat", "model.scale_form='flat'"),
        ("local_projection", "fc", "model.local_projection='fc'"),
        ("global_projection", "gap", "model.global_projection='gap'"),
    ],
)
def test_bad_fields_are_named(field, value, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(MICRO, **{field: value})


def test_config_json_round_trip():
    values = json.loads(json.dumps(dataclasses.asdict(MICRO)))
    assert from_dict(LGAFConfig, values) == MICRO
    with pytest.raises(ValueError, match=r"the key='num_head'.*did you mean 'num_heads'"):
        from_dict(LGAFConfig, {"num_head": 4})
    with pytest.raises(ValueError, match="num_heads='4' must be of type int"):
        from_dict(LGAFConfig, {"num_heads": "4"})


def test_lgaf_needs_torch_and_numpy_alone():
    code = (
        "import sys, lgaf, lgaf.step, lgaf.state, lgaf.reference; [getattr(lgaf, name) for name in lgaf.__all__];"
        "bad = {'ray', 'mlflow', 'pyarrow', 'cv2', 'PIL', 'tyro', 'rich', 'webdataset', 'boto3', 'fsspec', 'pydantic'};"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
