"""ViT backbones: sizes, attention, stochastic depth, masked tokens, the map."""

from __future__ import annotations

import math

import pytest
import torch

from lgaf import create_backbone
from lgaf.models.backbones.vit import Attention, DropPath, ViTSpec

TINY = ViTSpec(width=32, depth=2, num_heads=4, patch_side=16, mask_ratio=0.1)


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _images(num: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(num, 3, 112, 112, dtype=dtype) * 2 - 1


# A block of width w: two norms 4 w, qkv 3 w^2, proj w^2 + w, fc1 4 w^2 + 4 w, fc2 4 w^2 + w: 12 w^2 + 10 w in all.
# Around them: 9 x 9 x 3 x w weights and w shifts of the patches, 144 w positions, 2 w of the last norm: 390 w, and w of
# the mask token in vit_b and vit_l.
@pytest.mark.parametrize(
    ("name", "width", "size"),
    [
        ("vit_t", 256, 12 * 788_992 + 99_840),
        ("vit_s", 512, 12 * 3_150_848 + 199_680),
        ("vit_b", 512, 24 * 3_150_848 + 200_192),
        ("vit_l", 768, 24 * 7_085_568 + 300_288),
    ],
)
def test_sizes_are_insightfaces(name, width, size):
    with torch.device("meta"):
        body = create_backbone(name)
        assert body(torch.empty(2, 3, 112, 112)).shape == (2, width, 12, 12)
    assert _parameters(body) == size
    assert (body.out_channels, body.map_side) == (width, 12)


def test_names_are_insightfaces():
    names = {"pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    for block in range(2):
        names |= {f"blocks.{block}.attn.qkv.weight"}
        for layer in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names |= {f"blocks.{block}.{layer}.weight", f"blocks.{block}.{layer}.bias"}
    assert set(create_backbone("vit_tiny").state_dict()) == names


def _softmax_attention(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """One head at a time, in float64, by the formula."""
    width, depth = x.shape[2], x.shape[2] // attention.num_heads
    weight = attention.qkv.weight.double()
    out = torch.zeros_like(x, dtype=torch.float64)
    for head in range(attention.num_heads):
        rows = slice(head * depth, (head + 1) * depth)
        q, k, v = (x.double() @ weight[part * width : (part + 1) * width][rows].T for part in range(3))
        scores = torch.exp(q @ k.mT / math.sqrt(depth))
        out[:, :, rows] = (scores / scores.sum(dim=2, keepdim=True)) @ v
    return out @ attention.proj.weight.double().T + attention.proj.bias.double()


def test_attention_is_the_formula():
    torch.manual_seed(0)
    attention = Attention(24, 3).double()
    x = torch.randn(2, 10, 24, dtype=torch.float64)
    torch.testing.assert_close(attention(x), _softmax_attention(attention, x))


def test_attention_stands_large_scores_in_bfloat16():
    torch.manual_seed(0)
    attention = Attention(64, 2)
    torch.nn.init.normal_(attention.qkv.weight, std=0.25)
    projected = []
    attention.qkv.register_forward_hook(lambda _, __, out: projected.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(3 * torch.randn(2, 49, 64))
    assert projected[0].dtype == torch.bfloat16
    q, k, v = (part.unflatten(2, (2, 32)).transpose(1, 2) for part in projected[0].double().chunk(3, dim=2))
    scores = q @ k.mT / math.sqrt(32)
    assert scores.max() > 89  # its exponential is beyond float32
    exact = (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2) @ attention.proj.weight.double().T
    exact = exact + attention.proj.bias.double()
    assert (out.double() - exact).square().mean().sqrt() < 2**-7 * exact.square().mean().sqrt()


class TestDropPath:
    def test_drops_whole_samples_and_keeps_the_expectation(self):
        torch.manual_seed(0)
        drop = DropPath(0.25).train()
        out = drop(torch.ones(20_000, 2, 3))
        assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
        assert ((out == 0).all(dim=(1, 2)) | (out > 0).all(dim=(1, 2))).all()
        # Five standard errors of the mean of 20,000 samples.
        assert out.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(0.25 / 0.75 / 20_000))

    def test_is_off_in_evaluation(self):
        x = torch.randn(8, 2, 3)
        assert DropPath(0.9).eval()(x) is x

    def test_rises_linearly_over_the_blocks(self):
        body = ViTSpec(width=8, depth=5, num_heads=1, patch_side=16, drop_path=0.2).build()
        assert [block.drop_path.probability for block in body.blocks] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


class TestMaskedTokens:
    def test_training_leaves_their_share_to_the_mask_token(self):
        torch.manual_seed(0)
        body = TINY.build().train()
        seen = []
        body.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        tokens = body(_images(4)).flatten(2).transpose(1, 2)
        assert seen == [(4, 44, 32)]  # int(49 x 0.9)
        is_mask = (tokens == body.mask_token).all(dim=2)
        assert is_mask.sum(dim=1).tolist() == [5] * 4
        assert not (is_mask == is_mask[:1]).all()

    def test_the_others_keep_their_places(self):
        torch.manual_seed(0)
        body = ViTSpec(width=16, depth=0, num_heads=1, patch_side=16, mask_ratio=0.5).build()
        images = _images()
        masked = body.train()(images).flatten(2).transpose(1, 2)
        whole = body.eval()(images).flatten(2).transpose(1, 2)
        kept = (masked != body.mask_token).any(dim=2)
        assert kept.sum(dim=1).tolist() == [24, 24]
        torch.testing.assert_close(masked[kept], whole[kept])

    def test_evaluation_sees_all(self):
        body = TINY.build().eval()
        images = _images()
        with torch.no_grad():
            assert torch.equal(body(images), body(images))
            assert not (body(images).flatten(2).transpose(1, 2) == body.mask_token).all(dim=2).any()


def test_the_map_is_laid_out_as_the_image():
    body = ViTSpec(width=16, depth=0, num_heads=1).build().eval()
    images = _images(1)
    other = images.clone()
    other[:, :, 2 * 9 + 4, 5 * 9 + 1] += 0.5  # row 2, column 5
    other[:, :, 108:, :] = 0.0  # no patch is there
    with torch.no_grad():
        moved = (body(images) != body(other)).any(dim=1)[0]
    assert moved.nonzero().tolist() == [[2, 5]]


def test_the_map_needs_no_copy():
    body = TINY.build().eval()
    with torch.no_grad():
        assert body(_images()).is_contiguous(memory_format=torch.channels_last)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        body = create_backbone("vit_tiny", gradient_checkpointing=checkpointing).train()
        images = _images(4)
        body.blocks[1].drop_path.probability = 0.5
        body(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in body.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_gradients_reach_every_parameter_and_a_seed_fixes_all():
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        body = create_backbone("vit_tiny").train()
        (body(_images(4)) * torch.randn(4, 32, 7, 7)).sum().backward()
        runs.append([parameter.grad for parameter in body.parameters()])
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in runs[-1])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
