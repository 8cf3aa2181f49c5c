"""TransFace: a ViT with amplitude perturbation of its dominant patches and entropy-guided weights of its samples.

Dan, Liu, Xie, Deng, Xie, Xie, Sun, "TransFace: Calibrating Transformer Training for Face Recognition from a
Data-Centric Perspective", ICCV 2023 (reference [35] of the LGAF paper), from its abstract and its published code
(DanJun6737/TransFace; modelscope/facechain, face_module/TransFace). Where the code and the paper part, the code is the
default: it is whole, and it is the authors'.

From the published code:
    Tail: gates of the N tokens from all of them (N C -> N -> N, ReLU between, sigmoid), each token times its gate, then
        N C -> C -> D with a batch norm after each layer.
    DPAP: the 7 patches of the largest gates, in a fifth of the images; each patch's Fourier amplitude becomes
        l A' + (1 - l) A, l ~ U(0, 1), A' that of a random patch of a random image of this rank's batch; its phase
        stays; pixels are clipped to their range. The gates come from a first pass in training mode without gradients.
    EHSM: weight of a sample = 1 + exp(-gamma mean_n H_n), no gradient through it, gamma 1. The code's H_n is the
        deviation of a gated token's components. It calls it an entropy: the paper's, that of a normal distribution,
        log(std) + 1/2 + 1/2 log(2 pi), stands in a comment beside it (`EntropyMeasure`).
    Sizes: TransFace-S, -B and -L are ViT-S, -B and -L of 9-pixel patches, embeddings of 512.

Choices here:
    How many images of a batch are perturbed is fixed, ceil(probability B); which ones is random. So shapes do not
    depend on chance, and the first pass sees those images alone; the code draws for each image and scores them all.
    The random patches come from the batch as it was; the code's may have been perturbed a moment before.
    Pixels are not rounded to bytes. A frequency of amplitude 0 has no phase to keep and stays 0.
    The deviation has the floor `EPSILON` in the logarithm: a token of equal components does not get an infinite weight.
    Any backbone of the registry serves; its patches are the image's cells of the map. A convolutional one moves the
        statistics of its batch norms in the first pass too.

Not established: the repositories disagree on the share of perturbed images (facechain: 0.2; the other one perturbs
all), and the paper's own numbers could not be read. Their masks of tokens are `ViTSpec.mask_ratio`.
"""

# Shape legend: B = batch on this rank, P = perturbed images, N = tokens, C = their width, D = embedding, K = dominant
# patches of an image, H, W = sides of the image, g = patches per side, h, w = sides of a patch, S = its frequencies

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.models.backbones import BACKBONES, create_backbone
from lgaf.models.network import FaceEmbedding, FaceNetwork, global_embedding

EntropyMeasure = Literal["std", "gaussian"]

EPSILON: Final = 1e-3
BATCH_NORM_EPSILON: Final = 2e-5
INITIAL_STD: Final = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class TransFaceConfig:
    """TransFace-B by default; backbone vit_s makes it TransFace-S, vit_l TransFace-L."""

    backbone: str = "vit_b"
    """A name of `BACKBONES`."""
    embedding_dim: int = 512
    """Length D of the embedding."""
    num_dominant_patches: int = 7
    """K, the patches of an image whose amplitude is perturbed (DPAP)."""
    perturbation_probability: float = 0.2
    """Share of a batch's images that are perturbed in training; 0 leaves DPAP out."""
    perturbation_strength: float = 1.0
    """Upper end of the share that the other patch's amplitude has in the mix."""
    hard_sample_mining: bool = True
    """Weigh the samples' losses (EHSM)."""
    entropy: EntropyMeasure = "std"
    """What EHSM takes for a token's entropy: "std" (the published code) or "gaussian" (the paper)."""
    entropy_scale: float = 1.0
    """Gamma of the samples' weights."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the backbone's blocks in training and compute the rest again: less memory, more time."""

    def __post_init__(self) -> None:
        """Check every field; ``ValueError`` names the field, its value and what is valid."""
        require_choice("model.backbone", self.backbone, BACKBONES)
        require_positive("model.embedding_dim", self.embedding_dim)
        # 7 x 7 is the smallest map of a backbone here.
        require_in_range("model.num_dominant_patches", self.num_dominant_patches, 1, 49)
        require_in_range("model.perturbation_probability", self.perturbation_probability, 0.0, 1.0)
        require_in_range("model.perturbation_strength", self.perturbation_strength, 0.0, 1.0)
        require_choice("model.entropy", self.entropy, ENTROPIES)
        require_positive("model.entropy_scale", self.entropy_scale)

    @property
    def output_dim(self) -> int:
        """Length of the embedding that the head and the protocols see."""
        return self.embedding_dim

    def build(self) -> TransFace:
        """Make the network with fresh weights (from torch's global generator)."""
        return TransFace(self)


def token_deviations(tokens_BNC: Tensor) -> Tensor:
    """Standard deviation [B, N] of each token's components: the measure of the published code."""
    return tokens_BNC.std(dim=2)


def token_gaussian_entropies(tokens_BNC: Tensor) -> Tensor:
    """Entropy in nats [B, N] of a normal distribution with each token's deviation: the measure of the paper."""
    return token_deviations(tokens_BNC).clamp_min(EPSILON).log() + 0.5 * (1 + math.log(2 * math.pi))


ENTROPIES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "std": token_deviations,
    "gaussian": token_gaussian_entropies,
}


def sample_weights(entropies_BN: Tensor, scale: float) -> Tensor:
    """EHSM: 1 + exp(-scale x mean entropy of the tokens) [B]: more for samples whose tokens say little."""
    return 1 + torch.exp(-scale * entropies_BN.mean(dim=1))


def mix_amplitudes(patches_hw: Tensor, others_hw: Tensor, share_11: Tensor) -> Tensor:
    """The patches with the amplitudes (1 - share) A + share A' in place of their own, and their own phases.

    Args:
        patches_hw: [..., h, w], real, not of reduced precision.
        others_hw: Of the same shape; gives A'.
        share_11: Broadcasts to it; in [0, 1].
    """
    spectrum_S = torch.fft.rfft2(patches_hw)
    amplitude_S = torch.lerp(spectrum_S.abs(), torch.fft.rfft2(others_hw).abs(), share_11)
    mixed_hw: Tensor = torch.fft.irfft2(spectrum_S.sgn() * amplitude_S, s=patches_hw.shape[-2:])
    return mixed_hw


def split_patches(images_BCHW: Tensor, grid: int) -> Tensor:
    """The grid x grid patches [B, N, 3, h, w] that start at the upper left corner, row by row."""
    num_images, channels, height, _ = images_BCHW.shape
    side = height // grid
    seen_BCHW = images_BCHW[:, :, : grid * side, : grid * side]
    split_BCghgw = seen_BCHW.reshape(num_images, channels, grid, side, grid, side)
    return split_BCghgw.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def join_patches(patches_BNChw: Tensor, grid: int) -> Tensor:
    """Undo `split_patches`; what lay outside the patches is not there."""
    num_images, _, channels, side, _ = patches_BNChw.shape
    split_BggChw = patches_BNChw.reshape(num_images, grid, grid, channels, side, side)
    return split_BggChw.permute(0, 3, 1, 4, 2, 5).reshape(num_images, channels, grid * side, grid * side)


@torch.no_grad()
def perturb_dominant_patches(
    images_BCHW: Tensor, rows_P: Tensor, gates_PN: Tensor, num: int, strength: float
) -> Tensor:
    """DPAP: a copy of the images in which the dominant patches of some have mixed amplitudes.

    Random numbers are drawn from torch's global generator.

    Args:
        images_BCHW: [B, 3, H, W] in [-1, 1], a square.
        rows_P: Which images to perturb.
        gates_PN: Scores of their patches.
        num: K, how many of the highest scores are perturbed.
        strength: Upper end of the other amplitude's share.
    """
    num_perturbed, num_patches = gates_PN.shape
    drawn = (num_perturbed, num)
    grid, device = math.isqrt(num_patches), images_BCHW.device
    # Fourier transforms exist in single and double precision only.
    images_BCHW = images_BCHW.to(torch.promote_types(images_BCHW.dtype, torch.float32), copy=True)
    patches_BNChw = split_patches(images_BCHW, grid)
    chosen = (rows_P[:, None], gates_PN.topk(num, dim=1).indices)
    others = (
        torch.randint(images_BCHW.shape[0], drawn, device=device),
        torch.randint(num_patches, drawn, device=device),
    )
    share_PK111 = strength * torch.rand(*drawn, 1, 1, 1, device=device, dtype=images_BCHW.dtype)
    mixed_PKChw = mix_amplitudes(patches_BNChw[chosen], patches_BNChw[others], share_PK111).clamp(-1.0, 1.0)
    joined_BCHW = join_patches(patches_BNChw.index_put(chosen, mixed_PKChw), grid)
    images_BCHW[:, :, : joined_BCHW.shape[2], : joined_BCHW.shape[3]] = joined_BCHW
    return images_BCHW


class TransFace(FaceNetwork):
    """The TransFace network; `TransFaceConfig.build` makes it. Parameter names are the published ones."""

    def __init__(self, config: TransFaceConfig) -> None:
        super().__init__()
        self.config = config
        self.entropy = ENTROPIES[config.entropy]
        self.backbone = create_backbone(config.backbone, gradient_checkpointing=config.gradient_checkpointing)
        width, num_tokens = self.backbone.out_channels, self.backbone.map_side**2
        self.senet = nn.Sequential(
            nn.Linear(width * num_tokens, num_tokens, bias=False),
            nn.ReLU(),
            nn.Linear(num_tokens, num_tokens, bias=False),
            nn.Sigmoid(),
        )
        self.feature = nn.Sequential(
            nn.Linear(width * num_tokens, width, bias=False),
            nn.BatchNorm1d(width, eps=BATCH_NORM_EPSILON),
            nn.Linear(width, config.embedding_dim, bias=False),
            nn.BatchNorm1d(config.embedding_dim, eps=BATCH_NORM_EPSILON),
        )
        for module in (*self.senet, *self.feature):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)

    def forward(self, images_BCHW: Tensor) -> FaceEmbedding:
        """Embed RGB images [B, 3, 112, 112] in [-1, 1]; in training some are perturbed and all have weights."""
        if self.training and self.config.perturbation_probability > 0:
            images_BCHW = self._perturbed(images_BCHW)
        tokens_BNC, gates_BN = self._tokens(images_BCHW)
        gated_BNC = tokens_BNC * gates_BN[:, :, None]
        embedding_BD = self.feature(gated_BNC.flatten(1))
        if not (self.training and self.config.hard_sample_mining):
            return global_embedding(embedding_BD)
        entropies_BN = self.entropy(gated_BNC.detach().float())
        return global_embedding(embedding_BD, sample_weights(entropies_BN, self.config.entropy_scale))

    def _tokens(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BNC = self.backbone(images_BCHW).flatten(2).transpose(1, 2)
        # In bfloat16 the gates would tie, and the ties choose the dominant patches.
        with torch.autocast(tokens_BNC.device.type, enabled=False):
            gates_BN = self.senet(tokens_BNC.flatten(1).to(self.senet[0].weight.dtype))
        return tokens_BNC, gates_BN

    @torch.no_grad()
    def _perturbed(self, images_BCHW: Tensor) -> Tensor:
        num_images = images_BCHW.shape[0]
        num_perturbed = math.ceil(self.config.perturbation_probability * num_images)
        rows_P = torch.randperm(num_images, device=images_BCHW.device)[:num_perturbed]
        _, gates_PN = self._tokens(images_BCHW[rows_P])
        return perturb_dominant_patches(
            images_BCHW, rows_P, gates_PN, self.config.num_dominant_patches, self.config.perturbation_strength
        )
