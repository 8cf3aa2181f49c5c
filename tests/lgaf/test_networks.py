"""One suite for every registered network and backbone: shapes, gradients, bf16, state dicts, graphs, training."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lgaf.config import from_dict
from lgaf.heads.margins import MARGINS, create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import BACKBONES, NETWORKS, LGAFConfig, create_backbone
from lgaf.models.network import FaceEmbedding
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.step import TrainStep

# Every network at a size for a CPU; LGAF once for each row of Tables 1-4 and each reading of the text.
CASES = {
    "lgaf": {"backbone": "micro", "embedding_dim": 32},
    "ls_cnn": {"growth_rate": 16, "layers": (1, 1, 1), "embedding_dim": 32},
    "hpda": {"growth_rate": 16, "layers": (1, 1, 1), "local_width": 16, "bilinear_dim": 32, "embedding_dim": 32},
    "cqa_face": {"backbone": "micro", "embedding_dim": 32},
    "transface": {"backbone": "vit_tiny", "embedding_dim": 32},
    "url": {"backbone": "micro", "embedding_dim": 32},
}
SWITCHES = {
    "method I": {"branches": ("local",)},
    "method II": {"branches": ("global",)},
    "method III": {"quality": "none"},
    "b = 2": {"num_heads": 2},
    "b = 8": {"num_heads": 8},
    "b = 16": {"num_heads": 16},
    "entropy": {"quality": "entropy"},
    "gaussian entropy": {"quality": "gaussian_entropy"},
    "cat": {"fusion": "cat"},
    "cat without quality": {"fusion": "cat", "quality": "none"},
    "iaff": {"fusion": "iaff", "quality": "none"},
    "direct kernels": {"scale_form": "direct", "scales": (1, 3, 5, 7)},
    "averaged heads": {"local_projection": "gap", "local_width": 8},
    "lanet over channels": {"lanet_gap": "channel"},
    "lanet as printed": {"lanet_gap": "spatial"},
    "gradient through the weights": {"quality_gradient": True},
    "unit branches": {"unit_branches": True},
    "diverse heads": {"diversity_weight": 1.0},
    "shifted features": {"feature_shift": True},
    "depthwise projection": {"global_projection": "gdc"},
    "checkpointed": {"gradient_checkpointing": True},
    "on a ViT": {"backbone": "vit_tiny"},
}
CONFIGS = [
    *(pytest.param(NETWORKS[name](**fields), id=name) for name, fields in CASES.items()),
    *(pytest.param(LGAFConfig(**CASES["lgaf"] | fields), id=f"lgaf, {name}") for name, fields in SWITCHES.items()),
]
# Tracing takes seconds: the rest are for `make test-all`.
TRACED = {*CASES, "lgaf, entropy", "lgaf, iaff", "lgaf, lanet as printed", "lgaf, diverse heads"}
GRAPH_CONFIGS = [
    case if case.id in TRACED else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
    for case in CONFIGS
    if case.id != "lgaf, checkpointed"  # test_backbones has it: the backend "eager" cannot
]
IMAGES = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def _build(config):
    torch.manual_seed(0)
    return config.build()


def test_every_network_is_tested():
    assert CASES.keys() == NETWORKS.keys()


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_and_gradients(config):
    model = _build(config)
    out = model(IMAGES)
    assert isinstance(out, FaceEmbedding)
    assert out.embedding_BD.shape == (4, config.output_dim)
    assert out.norm_local_B.shape == out.norm_global_B.shape == out.weight_local_B.shape == (4,)
    assert ((out.weight_local_B >= 0) & (out.weight_local_B <= 1)).all()
    total = out.embedding_BD.square().sum() + (0 if out.auxiliary_loss is None else out.auxiliary_loss)
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("config", CONFIGS)
def test_evaluation_is_alone_with_each_image(config):
    model = _build(config)
    with torch.no_grad():
        model(IMAGES)
        model.eval()
        together, alone = model(IMAGES), model(IMAGES[:1])
    assert together.sample_weight_B is None
    assert together.auxiliary_loss is None
    torch.testing.assert_close(together.embedding_BD[:1], alone.embedding_BD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_bfloat16(config):
    model = _build(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(IMAGES)
    total = out.embedding_BD.float().square().sum() + (0 if out.auxiliary_loss is None else out.auxiliary_loss)
    total.backward()
    assert torch.isfinite(out.embedding_BD).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.eval()(IMAGES).embedding_BD.float()
    with torch.no_grad():
        exact = model(IMAGES).embedding_BD
    assert torch.nn.functional.cosine_similarity(rounded, exact).min() > 0.98


@pytest.mark.parametrize("config", CONFIGS)
def test_state_dict_and_config_round_trip(config):
    model = _build(config)
    with torch.no_grad():
        model(IMAGES)
    read = from_dict(type(config), json.loads(json.dumps(dataclasses.asdict(config))))
    assert read == config
    copy = read.build()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES).embedding_BD, copy.eval()(IMAGES).embedding_BD)


@pytest.mark.parametrize("config", GRAPH_CONFIGS)
@pytest.mark.parametrize(
    "training", [pytest.param(True, id="training"), pytest.param(False, id="evaluation", marks=pytest.mark.slow)]
)
def test_one_graph_without_breaks(config, training):
    torch._dynamo.reset()
    model = _build(config).train(training)
    graph = torch.compile(_build(config).train(training), backend="eager", fullgraph=True)
    torch.manual_seed(1)
    expected = model(IMAGES)
    torch.manual_seed(1)
    out = graph(IMAGES)
    torch.testing.assert_close(out.embedding_BD, expected.embedding_BD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_trains_through_the_step(config):
    model = _build(config)
    head = ShardedMarginHead(5, config.output_dim, create_margin("cosface", margin=0.1, scale=16.0))
    step = TrainStep(model, head, OptimizerConfig(learning_rate=0.05), Schedule(milestones=(0.9,)), 8)
    images = ((IMAGES.permute(0, 2, 3, 1) + 1) * 127).to(torch.uint8)
    losses = [step(images, torch.arange(4)).loss.item() for _ in range(8)]
    assert all(loss == loss and loss < 100 for loss in losses)
    assert min(losses[-2:]) < losses[0]


@pytest.mark.parametrize("margin", MARGINS)
def test_every_margin_trains_the_network(margin):
    torch.manual_seed(0)
    head = ShardedMarginHead(5, 32, create_margin(margin))
    step = TrainStep(_build(LGAFConfig(**CASES["lgaf"], dropout=0.0)), head, OptimizerConfig(), Schedule(), 10)
    images = ((IMAGES.permute(0, 2, 3, 1) + 1) * 127).to(torch.uint8)
    losses = [step(images, torch.arange(4)).loss.item() for _ in range(10)]
    assert min(losses[-2:]) < 0.8 * losses[0], losses


# Seconds and gigabytes a step on a CPU: their real runs are for `make test-all`.
LARGE = {"iresnet100", "iresnet200", "ir_101", "ir_152", "ir_200", "vit_s", "vit_b", "vit_l", "mobilefacenet_large"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in BACKBONES]
)
def test_backbone_maps_and_learns(name):
    torch.manual_seed(0)
    backbone = create_backbone(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = backbone(IMAGES[:2])
    side = backbone.map_side
    assert out.shape == (2, backbone.out_channels, side, side)
    out.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in backbone.parameters())
    copy = create_backbone(name)
    copy.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        assert torch.equal(backbone.eval()(IMAGES[:1]), copy.eval()(IMAGES[:1]))


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_shapes_without_weights(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
        out = backbone(torch.empty(2, 3, 112, 112))
    assert out.shape == (2, backbone.out_channels, backbone.map_side, backbone.map_side)
    if not name.startswith(("vit", "tiny", "micro", "ir_152", "ir_200")):
        assert out.shape == (2, 512, 7, 7), "C(x) of the paper"
