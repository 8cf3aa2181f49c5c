"""Backbones: published sizes, names and shapes; checkpointed, compiled and in bfloat16 they are what they are plain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lgaf.models import BACKBONES, LGAFConfig, create_backbone
from lgaf.models.backbones import Backbone
from lgaf.models.backbones.ir import IRSpec
from lgaf.models.backbones.iresnet import IResNetSpec
from lgaf.models.backbones.mobilefacenet import MobileFaceNetSpec

# Each family, small; not below 16 channels (see `BACKBONES`).
SMALL = {
    "iresnet": IResNetSpec(blocks=(1, 2, 1, 1), channels=(16, 24, 32, 48)),
    "ir": IRSpec(blocks=(1, 2, 1, 1), channels=(16, 24, 32, 48), stem_channels=16),
    "ir_bottleneck": IRSpec(blocks=(1, 1, 1, 1), channels=(64, 64, 96, 96), stem_channels=16, bottleneck=True),
    "mobilefacenet": MobileFaceNetSpec(blocks=(1, 1, 1, 1), scale=1),
    "mobilefacenet_large": MobileFaceNetSpec(blocks=(2, 1, 1, 1), scale=1),
    "vit": BACKBONES["vit_tiny"],
}


def _conv_bn(in_channels: int, channels: int, kernel: int, prelu: bool = False, groups: int = 1) -> int:
    return in_channels // groups * channels * kernel**2 + 2 * channels + prelu * channels


def _fc_tail(channels: int, affine: bool) -> int:
    return 2 * channels + channels * 49 * 512 + 512 + affine * 1024


def _residual_size(blocks: tuple[int, ...], *, form: str) -> int:
    """Parameters of a whole published network, by its layer list."""
    widths, size, before = (64, 128, 256, 512), _conv_bn(3, 64, 3, prelu=True), 64
    if form == "bottleneck":
        widths = (256, 512, 1024, 2048)
    for num, width in zip(blocks, widths, strict=True):
        for position in range(num):
            size += 2 * before
            if form == "bottleneck":
                hidden = width // 4
                size += _conv_bn(before, hidden, 1, prelu=True) + _conv_bn(hidden, hidden, 3, prelu=True)
                size += _conv_bn(hidden, width, 1)
            else:
                size += _conv_bn(before, width, 3, prelu=True) + _conv_bn(width, width, 3)
            if before != width or (form == "iresnet" and position == 0):
                size += _conv_bn(before, width, 1)
            before = width
    return size + _fc_tail(before, affine=form == "iresnet")


def _mobile_size(blocks: tuple[int, ...], scale: int) -> int:
    def depthwise(in_channels: int, channels: int, hidden: int) -> int:
        inner = _conv_bn(in_channels, hidden, 1, prelu=True) + _conv_bn(hidden, hidden, 3, prelu=True, groups=hidden)
        return inner + _conv_bn(hidden, channels, 1)

    narrow, wide = 64 * scale, 128 * scale
    size = _conv_bn(3, narrow, 3, prelu=True)
    grouped = _conv_bn(narrow, narrow, 3, prelu=True, groups=64)
    size += grouped if blocks[0] == 1 else blocks[0] * depthwise(narrow, narrow, 128)
    size += depthwise(narrow, narrow, 128) + blocks[1] * depthwise(narrow, narrow, 128)
    size += depthwise(narrow, wide, 256) + blocks[2] * depthwise(wide, wide, 256)
    size += depthwise(wide, wide, 512) + blocks[3] * depthwise(wide, wide, 256)
    size += _conv_bn(wide, 512, 1, prelu=True)
    return size + _conv_bn(512, 512, 7, groups=512) + 512 * 512 + 1024


# Name, parameters of the whole published network, of them fixed: the scale of insightface's last batch norm (of which
# its MobileFaceNet trains the scale; ours holds it fixed). The first of each group are published, and prove the count.
SIZES = [
    ("iresnet18", 24_025_600, 512),
    ("iresnet50", 43_590_848, 512),
    ("iresnet100", 65_156_160, 512),
    ("iresnet34", _residual_size((3, 4, 6, 3), form="iresnet"), 512),
    ("iresnet200", _residual_size((6, 26, 60, 6), form="iresnet"), 512),
    ("ir_18", 24_020_352, 0),
    ("ir_50", 43_585_600, 0),
    ("ir_101", 65_150_912, 0),
    ("ir_34", _residual_size((3, 4, 6, 3), form="ir"), 0),
    ("ir_152", _residual_size((3, 8, 36, 3), form="bottleneck"), 0),
    ("ir_200", _residual_size((3, 24, 36, 3), form="bottleneck"), 0),
    ("mobilefacenet", _mobile_size((1, 4, 6, 2), 2), 512),
    ("mobilefacenet_large", _mobile_size((2, 8, 12, 4), 4), 512),
]


def test_the_count_by_hand_is_the_published_one():
    assert _residual_size((3, 13, 30, 3), form="iresnet") == 65_156_160
    assert _residual_size((3, 13, 30, 3), form="ir") == 65_150_912


@pytest.mark.parametrize(("name", "size", "fixed"), SIZES)
def test_whole_networks_have_the_published_sizes(name, size, fixed):
    projection = "gdc" if name.startswith("mobile") else "fc"
    config = LGAFConfig(
        backbone=name, branches=("global",), feature_shift=not name.startswith("ir_"), global_projection=projection
    )
    with torch.device("meta"):
        model = config.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == size - fixed


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_the_map_it_says(name):
    with torch.device("meta"):
        backbone = create_backbone(name).eval()
        map_BCHW = backbone(torch.empty(2, 3, 112, 112))
    side = backbone.map_side
    assert map_BCHW.shape == (2, backbone.out_channels, side, side)
    if not name.startswith("vit"):
        assert side == 7


# Read off the published code: name, a key, its shape.
KEYS = [
    ("iresnet50", "conv1.weight", (64, 3, 3, 3)),
    ("iresnet50", "prelu.weight", (64,)),
    ("iresnet50", "layer1.0.downsample.0.weight", (64, 64, 1, 1)),
    ("iresnet50", "layer3.13.bn3.running_var", (256,)),
    ("iresnet50", "layer4.0.conv2.weight", (512, 512, 3, 3)),
    ("ir_50", "input_layer.0.weight", (64, 3, 3, 3)),
    ("ir_50", "input_layer.2.weight", (64,)),
    ("ir_50", "body.0.res_layer.5.running_mean", (64,)),
    ("ir_50", "body.3.shortcut_layer.0.weight", (128, 64, 1, 1)),
    ("ir_50", "body.3.shortcut_layer.1.bias", (128,)),
    ("ir_50", "body.23.res_layer.4.weight", (512, 512, 3, 3)),
    ("ir_152", "body.0.res_layer.1.weight", (64, 64, 1, 1)),
    ("ir_152", "body.0.res_layer.4.weight", (64, 64, 3, 3)),
    ("ir_152", "body.0.res_layer.7.weight", (256, 64, 1, 1)),
    ("ir_152", "body.0.shortcut_layer.0.weight", (256, 64, 1, 1)),
    ("ir_152", "body.49.res_layer.8.running_mean", (2048,)),
    ("mobilefacenet", "layers.0.layers.0.weight", (128, 3, 3, 3)),
    ("mobilefacenet", "layers.1.layers.0.weight", (128, 2, 3, 3)),
    ("mobilefacenet", "layers.2.layers.1.layers.0.weight", (128, 1, 3, 3)),
    ("mobilefacenet", "layers.3.layers.3.layers.2.layers.1.bias", (128,)),
    ("mobilefacenet", "layers.6.layers.0.layers.2.weight", (512,)),
    ("mobilefacenet", "conv_sep.layers.0.weight", (512, 256, 1, 1)),
    ("mobilefacenet_large", "layers.1.layers.1.layers.1.layers.0.weight", (128, 1, 3, 3)),
    ("mobilefacenet_large", "layers.7.layers.3.layers.2.layers.0.weight", (512, 256, 1, 1)),
]


@pytest.mark.parametrize(("name", "key", "shape"), KEYS)
def test_published_names(name, key, shape):
    with torch.device("meta"):
        assert create_backbone(name).state_dict()[key].shape == shape


def test_a_shortcut_of_ir_has_weights_only_where_the_channels_change():
    with torch.device("meta"):
        keys = create_backbone("ir_18").state_dict()
    assert {key.split(".")[1] for key in keys if "shortcut_layer" in key} == {"2", "4", "6"}


def _step(backbone: Backbone, *, forward: nn.Module | None = None, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Two training steps: what was learned and counted."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    for _ in range(2):
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            map_BCHW = (backbone if forward is None else forward)(images)
        map_BCHW.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    return gradients | dict(backbone.named_buffers()) | {"map": map_BCHW.detach()}


def _equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def _build(family: str, *, checkpointing: bool = False) -> Backbone:
    torch.manual_seed(0)
    backbone = SMALL[family].build().train()
    backbone.gradient_checkpointing = checkpointing
    return backbone


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", SMALL)
def test_checkpointing_changes_no_gradient_and_no_statistics(family, bf16):
    passes = {False: 0, True: 0}
    states = {}
    for checkpointing in passes:
        backbone = _build(family, checkpointing=checkpointing)
        convolutions = [module for module in backbone.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]

        def count(*_, key=checkpointing):
            passes[key] += 1

        for module in convolutions:
            module.register_forward_hook(count)
        states[checkpointing] = _step(backbone, bf16=bf16)
    assert _equal(states[True], states[False])
    assert all(value == 2 for name, value in states[True].items() if name.endswith("num_batches_tracked"))
    assert passes[True] > 1.5 * passes[False]  # it does compute them again


def test_checkpointing_leaves_frozen_batch_norms_alone():
    states = []
    for checkpointing in (False, True):
        backbone = _build("ir", checkpointing=checkpointing)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
        states.append(_step(backbone))
    assert _equal(*states)


def test_checkpointing_ends_with_training():
    backbone = _build("ir", checkpointing=True).eval()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 112, 112))
    assert _equal(dict(backbone.named_buffers()), before)


@pytest.mark.parametrize("family", ["iresnet", "ir", "mobilefacenet", "vit"])
def test_compiles_into_one_graph(family):
    torch.compiler.reset()
    plain, compiled = _step(_build(family)), _build(family)
    graph = torch.compile(compiled, fullgraph=True, backend="eager")
    torch.testing.assert_close(_step(compiled, forward=graph), plain)
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(torch.compile(compiled.eval(), fullgraph=True, backend="eager")(images), compiled(images))


def test_checkpointing_compiles_into_one_graph():
    torch.compiler.reset()
    plain, compiled = _step(_build("ir")), _build("ir", checkpointing=True)
    # It traces the backward pass, as inductor does, and needs no C++ compiler.
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_step(compiled, forward=graph), plain)


def test_checkpointing_under_the_debugging_backend_fails_aloud():
    # It would move the running statistics twice.
    torch.compiler.reset()
    backbone = _build("iresnet", checkpointing=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        _step(backbone, forward=torch.compile(backbone, fullgraph=True, backend="eager"))


@pytest.mark.parametrize("family", SMALL)
def test_learns_in_bfloat16(family):
    backbone = _build(family).to(memory_format=torch.channels_last)
    state = _step(backbone, bf16=True)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert all(state[name].dtype == torch.float32 for name, _ in backbone.named_parameters())
    torch.testing.assert_close(state["map"].float(), _step(_build(family))["map"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("projection", ["fc", "gdc"])
@pytest.mark.parametrize("learned_shift", [False, True])
def test_both_projections_take_any_map(projection, learned_shift):
    model = LGAFConfig(backbone="micro", embedding_dim=32, global_projection=projection, feature_shift=learned_shift)
    embedding_BD = model.build()(torch.rand(3, 3, 112, 112)).embedding_BD
    assert embedding_BD.shape == (3, 32)
    assert torch.isfinite(embedding_BD).all()
