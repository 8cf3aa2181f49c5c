"""LS-CNN: several scales in a layer, all layers concatenated, attention over positions and over channels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lgaf.models.local_branch import LANet, SqueezeExcitation
from lgaf.models.peers.ls_cnn import DenseBlock, LSCNNConfig, MultiScaleLayer, Transition

SMALL = LSCNNConfig(growth_rate=16, layers=(1, 2, 1), embedding_dim=16)


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _awake(model: torch.nn.Module) -> torch.nn.Module:
    """No hidden unit of an attention starts dead, as the two or three of a small network well may."""
    for module in model.modules():
        if isinstance(module, LANet):
            torch.nn.init.ones_(module.attention[0].bias)
        if isinstance(module, SqueezeExcitation):
            torch.nn.init.ones_(module.excite[0].bias)
    return model


def _reach(branch: torch.nn.Module) -> list[int]:
    """Sides of the region of the output that one input position reaches."""
    for parameter in branch.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    impulse = torch.zeros(2, 4, 11, 11)
    impulse[1, :, 5, 5] = 1
    out = branch.eval()(impulse).detach()
    reached = (out[1, 0] != out[0, 0]).nonzero()
    return (reached.max(0).values - reached.min(0).values + 1).tolist()


def test_one_layer_sees_three_scales():
    layer = MultiScaleLayer(4, 4)
    assert [_reach(branch) for branch in (layer.one, layer.three, layer.five)] == [[1, 1], [3, 3], [5, 5]]


def test_a_block_keeps_the_maps_of_all_its_layers():
    block = DenseBlock(8, 4, 3, "dfa").eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        out = block(x)
        first = block.layers[0](x)
    assert out.shape == (2, 8 + 3 * 4, 6, 6)
    assert torch.equal(out[:, :8], x)
    assert torch.equal(out[:, 8:12], first)
    assert [layer[1].one[0].in_channels for layer in block.layers] == [8, 12, 16]


@pytest.mark.parametrize("side", [28, 14])
def test_a_transition_halves(side):
    assert Transition(9, 5, "dfa")(torch.randn(2, 9, side, side)).shape == (2, 5, side // 2, side // 2)


def test_dual_face_attention_weighs_positions_then_channels():
    torch.manual_seed(0)
    attention = DenseBlock(32, 4, 1, "dfa").layers[0][0]
    assert [type(module) for module in attention] == [LANet, SqueezeExcitation]
    x = torch.rand(2, 32, 5, 5) + 0.1
    with torch.no_grad():
        weight = attention(x) / x
        spatial = attention[0].attention(x)
    torch.testing.assert_close(weight / spatial, (weight / spatial)[:, :, :1, :1].expand_as(weight))
    channel = attention[1](attention[0](x))[:, :, 0, 0] / attention[0](x)[:, :, 0, 0]
    torch.testing.assert_close(weight[:, :, 0, 0] / spatial[:, :, 0, 0], channel)
    assert spatial.std() > 0


@pytest.mark.parametrize(
    ("attention", "spatial", "channel"), [("dfa", 6, 6), ("spatial", 6, 0), ("channel", 0, 6), ("none", 0, 0)]
)
def test_the_attentions_can_be_taken_away(attention, spatial, channel):
    model = dataclasses.replace(SMALL, attention=attention).build()
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(LANet), kinds.count(SqueezeExcitation)) == (spatial, channel)
    assert model(torch.randn(2, 3, 112, 112)).embedding_BD.shape == (2, 16)


def test_attention_maps_follow_the_layers():
    model = SMALL.build().eval()
    images = torch.randn(2, 3, 112, 112)
    before = model(images).embedding_BD
    maps = model.attention_maps(images)
    # A block at 28, a transition of its map, two layers and a transition at 14, a layer at 7.
    assert [tuple(m.shape) for m in maps] == [(2, s, s) for s in (28, 28, 14, 14, 14, 7)]
    assert all(m.min() > 0 and m.max() < 1 for m in maps)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(images).embedding_BD, before)
    with pytest.raises(ValueError, match=r"model\.attention='channel' has no spatial attention"):
        dataclasses.replace(SMALL, attention="channel").build().attention_maps(images)


def test_the_embedding_averages_the_last_map():
    model = SMALL.build().eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        last = model.trunk(model.stem(images))
        assert last.shape[2:] == (7, 7)
        expected = model.features(model.norm(last).flatten(2).mean(dim=2) @ model.fc.weight.T)
        torch.testing.assert_close(model(images).embedding_BD, expected)


def test_default_size():
    with torch.device("meta"):
        model = LSCNNConfig().build()
    excitations = [module for module in model.trunk.modules() if isinstance(module, SqueezeExcitation)]
    biases = sum(linear.bias.numel() for module in excitations for linear in (module.excite[0], module.excite[2]))
    # The trunk of the public re-implementation, whose excitations have no biases.
    assert _parameters(model.trunk) - biases == _published_trunk()
    assert _parameters(model) == 4_634_131


def _published_trunk(growth: int = 48, layers: tuple[int, ...] = (3, 3, 5)) -> int:
    def convolution(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + 2 * outputs  # and its batch norm

    def attention(width):
        hidden = width // 16
        return (width + 1) * hidden + hidden + 1 + 2 * width * hidden

    total, width = 0, 2 * growth
    for i, num_layers in enumerate(layers):
        if i > 0:
            half = (width + 1) // 2
            total += attention(width) + 3 * convolution(width, half, 1) + 3 * convolution(half, half, 3)
            total += convolution(3 * half, half, 1)
            width = half
        for _ in range(num_layers):
            total += attention(width) + convolution(width, growth, 1) + 2 * convolution(width, 4 * growth, 1)
            total += 2 * convolution(4 * growth, growth, 3) + convolution(growth, growth, 3)
            total += convolution(3 * growth, growth, 1)
            width += growth
    return total


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = _awake(SMALL.build())
    out = model(torch.randn(4, 3, 112, 112))
    assert out.auxiliary_loss is None
    assert out.sample_weight_B is None
    (out.embedding_BD * torch.randn(4, 16)).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("growth_rate", 0, "model.growth_rate=0"),
        ("embedding_dim", -1, "model.embedding_dim=-1"),
        ("layers", (3, 3), r"model.layers=\(3, 3\)"),
        ("layers", (3, 0, 5), r"model.layers=\(3, 0, 5\)"),
        ("attention", "spacial", "model.attention='spacial'.*did you mean 'spatial'"),
    ],
)
def test_bad_fields_are_named(field, value, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SMALL, **{field: value})
