"""TransFace: perturbed amplitudes (DPAP), weights of samples (EHSM), the tail."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lgaf.models.peers import transface
from lgaf.models.peers.transface import (
    TransFaceConfig,
    join_patches,
    mix_amplitudes,
    perturb_dominant_patches,
    sample_weights,
    split_patches,
    token_gaussian_entropies,
)

TINY = TransFaceConfig(backbone="vit_tiny", embedding_dim=16, num_dominant_patches=3, perturbation_probability=0.5)


def _images(num: int = 4, scale: float = 1.0) -> torch.Tensor:
    return (torch.rand(num, 3, 112, 112) * 2 - 1) * scale


# The body of width w (test_vit.py); gates 144 w x 144 + 144 x 144; tail 144 w x w + 2 w + w x 512 + 2 x 512. For vit_s
# the published network has w more, a mask token that is never used.
@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("vit_s", 38_009_856 + 10_637_568 + 38_012_928),
        ("vit_b", 75_820_544 + 10_637_568 + 38_012_928),
        ("vit_l", 170_353_920 + 15_945_984 + 85_330_432),
    ],
)
def test_sizes_are_the_published_ones(backbone, size):
    with torch.device("meta"):
        model = TransFaceConfig(backbone=backbone).build()
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    own = {name for name in model.state_dict() if not name.startswith("backbone.") and "num_batches" not in name}
    assert own == {"senet.0.weight", "senet.2.weight", "feature.0.weight", "feature.2.weight"} | {
        f"feature.{norm}.{name}" for norm in (1, 3) for name in ("weight", "bias", "running_mean", "running_var")
    }


class TestAmplitudes:
    @pytest.mark.parametrize("side", [9, 16])
    def test_the_mix_is_the_published_formula(self, side):
        torch.manual_seed(0)
        patch, other = torch.randn(2, 3, side, side, dtype=torch.float64)
        mixed = mix_amplitudes(patch, other, torch.tensor(0.3, dtype=torch.float64)).numpy()
        spectrum = np.fft.fft2(patch.numpy())
        amplitude = 0.3 * np.abs(np.fft.fft2(other.numpy())) + 0.7 * np.abs(spectrum)
        expected = np.real(np.fft.ifft2(amplitude * np.exp(1j * np.angle(spectrum))))
        np.testing.assert_allclose(mixed, expected, atol=1e-12)

    @pytest.mark.parametrize("side", [9, 16])
    def test_the_phase_stays(self, side):
        torch.manual_seed(0)
        patch, other = torch.randn(2, 3, side, side)
        before = torch.fft.fft2(patch)
        after = torch.fft.fft2(mix_amplitudes(patch, other, torch.tensor(0.8)))
        torch.testing.assert_close(after.sgn(), before.sgn(), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.abs(), 0.2 * before.abs() + 0.8 * torch.fft.fft2(other).abs())

    def test_nothing_of_the_other_changes_nothing(self):
        patch, other = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(mix_amplitudes(patch, other, torch.tensor(0.0)), patch)

    def test_a_flat_patch_stays_flat(self):
        mixed = mix_amplitudes(torch.full((3, 16, 16), 0.25), torch.randn(3, 16, 16), torch.tensor(0.5))
        torch.testing.assert_close(mixed, mixed[:, :1, :1].expand_as(mixed))


class TestPatches:
    def test_splitting_is_undone_by_joining(self):
        images = _images(2)
        assert torch.equal(join_patches(split_patches(images, 12), 12), images[:, :, :108, :108])
        assert torch.equal(split_patches(images, 12)[1, 2 * 12 + 5], images[1, :, 18:27, 45:54])

    @pytest.mark.parametrize("grid", [12, 7])
    def test_only_the_dominant_ones_of_the_chosen_images_change(self, grid):
        torch.manual_seed(0)
        images = _images(5)
        gates = torch.rand(2, grid**2)
        out = perturb_dominant_patches(images, torch.tensor([3, 1]), gates, 4, 1.0)
        changed = (split_patches(out, grid) != split_patches(images, grid)).flatten(2).any(dim=2)
        assert changed.any(dim=1).tolist() == [False, True, False, True, False]
        assert set(changed[3].nonzero()[:, 0].tolist()) == set(gates[0].topk(4).indices.tolist())
        assert set(changed[1].nonzero()[:, 0].tolist()) == set(gates[1].topk(4).indices.tolist())
        rest = grid * (112 // grid)
        assert torch.equal(out[:, :, rest:], images[:, :, rest:])
        assert torch.equal(out[:, :, :, rest:], images[:, :, :, rest:])
        assert out.abs().max() <= 1

    def test_amplitudes_come_from_a_patch_of_the_batch(self):
        """Each image is one patch, tiled: all that a patch can be mixed with are the two amplitudes."""
        torch.manual_seed(1)
        tiles = 0.2 * torch.randn(2, 3, 16, 16)
        out = perturb_dominant_patches(tiles.repeat(1, 1, 7, 7), torch.tensor([0]), torch.rand(1, 49), 20, 0.7)
        own, other = torch.fft.fft2(tiles).abs()
        shares = []
        for patch in split_patches(out, 7)[0]:
            spectrum = torch.fft.fft2(patch)
            torch.testing.assert_close(spectrum.sgn(), torch.fft.fft2(tiles[0]).sgn(), atol=1e-2, rtol=0)
            share = ((spectrum.abs() - own) * (other - own)).sum() / (other - own).square().sum()
            torch.testing.assert_close(spectrum.abs(), torch.lerp(own, other, share), atol=1e-4, rtol=1e-4)
            shares.append(share.item())
        assert min(shares) >= -1e-6
        assert 0.35 < max(shares) <= 0.7

    def test_the_images_themselves_are_left_alone(self):
        images = _images(2)
        before = images.clone()
        perturb_dominant_patches(images, torch.tensor([0]), torch.rand(1, 49), 4, 1.0)
        assert torch.equal(images, before)


class TestWeights:
    def test_are_the_published_formula(self):
        entropies = torch.rand(6, 144)
        weights = sample_weights(entropies, 1.5)
        for weight, entropy in zip(weights, entropies, strict=True):
            assert weight.item() == pytest.approx(1 + math.exp(-1.5 * entropy.mean().item()), rel=1e-6)

    def test_fall_with_the_entropy(self):
        tokens = torch.randn(1, 49, 32) * torch.linspace(0.1, 3, 8)[:, None, None]
        for measure in transface.ENTROPIES.values():
            weights = sample_weights(measure(tokens), 1.0)
            assert (weights.diff() < 0).all()

    def test_the_gaussian_entropy_is_that_of_a_normal_distribution(self):
        tokens = torch.randn(2, 5, 8)
        normal = torch.distributions.Normal(0.0, tokens.std(dim=2))
        torch.testing.assert_close(token_gaussian_entropies(tokens), normal.entropy())
        assert torch.isfinite(token_gaussian_entropies(torch.ones(1, 2, 8))).all()

    @pytest.mark.parametrize("entropy", ["std", "gaussian"])
    def test_of_the_network_are_those_of_its_gated_tokens(self, entropy):
        torch.manual_seed(0)
        model = dataclasses.replace(TINY, entropy=entropy, entropy_scale=2.0).build().train()
        seen = []
        model.feature.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].view(4, 49, 32)))
        out = model(_images())
        deviation = (seen[0] - seen[0].mean(dim=2, keepdim=True)).square().sum(dim=2).div(31).sqrt()
        measured = deviation if entropy == "std" else deviation.log() + 0.5 + 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(out.sample_weight_B, 1 + torch.exp(-2.0 * measured.mean(dim=1)))
        assert out.sample_weight_B.dtype == torch.float32
        assert not out.sample_weight_B.requires_grad
        assert out.auxiliary_loss is None


class TestNetwork:
    def test_perturbs_its_share_by_the_gates(self, monkeypatch):
        torch.manual_seed(0)
        model = dataclasses.replace(TINY, perturbation_probability=0.3, perturbation_strength=0.9).build().train()
        calls = []

        def spy(*arguments):
            calls.append((arguments, perturb_dominant_patches(*arguments)))
            return calls[-1][1]

        monkeypatch.setattr(transface, "perturb_dominant_patches", spy)
        seen = []
        model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        images = _images(4)
        model(images)
        (given, rows, gates, num, strength), perturbed = calls[0]
        assert torch.equal(given, images)
        assert (num, strength, gates.shape, gates.dtype) == (3, 0.9, (2, 49), torch.float32)  # ceil(0.3 x 4) rows
        assert torch.equal(seen[0], images[rows])
        assert torch.equal(seen[1], perturbed)

    def test_evaluation_neither_perturbs_nor_weighs(self, monkeypatch):
        monkeypatch.setattr(transface, "perturb_dominant_patches", None)
        model = TINY.build().eval()
        images = _images()
        with torch.no_grad():
            out, again = model(images), model(images[:2])
        torch.testing.assert_close(out.embedding_BD[:2], again.embedding_BD)
        assert out.sample_weight_B is None
        assert out.embedding_BD.shape == (4, TINY.output_dim)

    def test_both_strategies_can_be_left_out(self, monkeypatch):
        monkeypatch.setattr(transface, "perturb_dominant_patches", None)
        model = dataclasses.replace(TINY, perturbation_probability=0.0, hard_sample_mining=False).build().train()
        assert model(_images()).sample_weight_B is None

    def test_the_first_pass_moves_no_statistics_of_the_tail(self):
        model = TINY.build().train()
        model(_images())
        assert model.feature[1].num_batches_tracked.item() == 1

    def test_the_gates_do_not_tie_in_bfloat16(self):
        torch.manual_seed(0)
        model = TINY.build().train()
        gates = []
        model.senet.register_forward_hook(lambda _, __, out: gates.append(out))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(_images())
        assert gates[0].dtype == torch.float32
        assert len(gates[0][0].unique()) > 40
        assert torch.isfinite(out.embedding_BD.float()).all()

    def test_three_steps_train_every_parameter_and_a_seed_repeats_them(self):
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            model = TINY.build().train()
            centres = torch.randn(5, 16)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            losses = []
            for _ in range(3):
                out = model(_images())
                logits = F.normalize(out.embedding_BD) @ F.normalize(centres).T
                loss = (
                    F.cross_entropy(8 * logits, torch.tensor([0, 1, 2, 3]), reduction="none") * out.sample_weight_B
                ).mean()
                optimizer.zero_grad()
                loss.backward()
                assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
                optimizer.step()
                losses.append(loss.item())
            runs.append(losses)
        assert runs[0] == runs[1]
        assert np.isfinite(runs[0]).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "vit_q"),
        ("embedding_dim", 0),
        ("num_dominant_patches", 50),
        ("perturbation_probability", 1.1),
        ("perturbation_strength", -0.1),
        ("entropy", "shannon"),
        ("entropy_scale", 0.0),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"model.{field}={value!r}"):
        dataclasses.replace(TINY, **{field: value})
