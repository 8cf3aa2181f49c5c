"""The network: sizes, shapes, switches, and the fusion by quality."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

from lgaf import LGAFConfig, create_backbone
from lgaf.config import from_dict
from lgaf.models.fusion import (
    shannon_entropies,
)
from lgaf.models.local_branch import LANet, MultiHeadMultiScale, head_similarity, scale_convolution

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
