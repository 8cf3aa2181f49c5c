"""URL: one embedding of sub-embeddings, each with a confidence, decorrelated by the variations that were put in.

Shi, Yu, Sohn, Chandraker, Jain, "Towards Universal Representation Learning for Deep Face Recognition", CVPR 2020
(reference [39] of the LGAF paper). No code of its authors was found. The abstract, what a survey and a later paper
(EQFace) say of it, and a stranger's unfinished sketch of its losses (MatyushinMA/uni_rep_deep_faces) could be read; the
paper itself could not.

FROM THE PAPER, as those sources give it:
    The embedding f is cut into K = 16 sub-embeddings of unit length, the class centres w likewise; a second layer on
        the same map gives a confidence s_k > 0 (1 / variance) for each. Identification is a softmax over the logits
        1/K sum_k s_k <w_k, f_k>, less a margin for the own class.
    L_reg = 1/K sum_k s_k^2 keeps the confidences small.
    T variations are put into the training images, so their labels u_t are known. Each owns a random half V_t of the
        sub-embeddings, no two the same. One discriminator reads all variations off f with all else set to 0.
        L_cls = -sum_t log p(u_t | V_t f): a half must tell its own variation.
        L_adv = -sum_t sum_{t' != t} 1/2 (log p(u_t' = 0 | V_t f) + log p(u_t' = 1 | V_t f)): and hide the others.
        L_D = -sum_t sum_t' log p(u_t' | V_t f) trains the discriminator, and it alone.
    Total: L_idt + l_reg L_reg + l_cls L_cls + l_adv L_adv.
FROM MEMORY of the paper, not checked: s = exp(.); l_reg 0.001, l_cls 2, l_adv 2; low resolution as a Gaussian blur of
    3 to 11 pixels; occlusion as black blocks of a 7 x 7 grid; each with probability 0.3, independently.

CHOICES:
    The head here sees one embedding, normalises it and has its own scale and margin. It gets e = [s_1 f_1, ...,
        s_K f_K]. For a centre of K parts of equal length, cos(e, w) = (1/K sum_k s_k <w_k, f_k>) / rms(s): the paper's
        logit up to the image's own factor rms(s), its temperature, which a head of fixed scale cannot have. What is
        left is how much the sub-embeddings count among each other. |e| = sqrt(K) rms(s) is there for heads that use
        norms. The heads do not hold the parts of a centre to equal lengths: they learn them.
    Two faces then match by sum_k s_k s'_k <f_k, f'_k> / (|s| |s'|), in place of the paper's likelihood of a pair with
        variances of a network trained for them afterwards.
    The body and its batch norms are IResNet's as insightface ends it. log s passes a batch norm whose scale starts at
        `INITIAL_SPREAD`, so all s start near 1: without it, one step of SGD on a layer of 25,088 inputs moves log s by
        tens. It is held within +-`LOG_CONFIDENCE_BOUND`. The discriminator is one linear layer on the unit
        sub-embeddings, trained in the same step by the same optimizer.
    Sizes and deviations of the blur (OpenCV's rule), the number of black blocks (1 to `max_occluded_blocks`), occlusion
        before blur: the paper's are not known.
LEFT OUT: the paper's pose augmentation needs a 3D model of the face; its further variations (gender, age, smile) need
    other labelled data.
"""

# Shape legend: B = batch on this rank, C = channels of the map, H, W = sides of the image, D = embedding, K =
# sub-embeddings, d = D / K, T = variations, N = taps or pixels of one axis

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.models.backbones import BACKBONES, create_backbone
from lgaf.models.feature_norm import feature_norm
from lgaf.models.network import FaceEmbedding, FaceNetwork, global_embedding

VARIATIONS: Final = ("blur", "occlusion")
BLUR_SIZES: Final = (3, 5, 7, 9, 11)
BLOCKS_PER_SIDE: Final = 7
BLACK: Final = -1.0
LOG_CONFIDENCE_BOUND: Final = 10.0
INITIAL_SPREAD: Final = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class URLConfig:
    """URL on the backbone of the paper; the module's docstring says which numbers are the paper's."""

    backbone: str = "iresnet100"
    """A name of `BACKBONES`."""
    embedding_dim: int = 512
    """Length D of the embedding."""
    num_sub_embeddings: int = 16
    """K; even, divides embedding_dim into parts of at least 2."""
    dropout: float = 0.4
    """Before the projection to the embedding."""
    augmentation_probability: float = 0.3
    """Share of the images that get each variation in training, independently."""
    max_occluded_blocks: int = 24
    """An occluded image has 1 to this many of its 49 blocks black."""
    confidence_regularization: float = 0.001
    """Weight of L_reg."""
    classification_weight: float = 2.0
    """Weight of L_cls."""
    adversarial_weight: float = 2.0
    """Weight of L_adv."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the backbone's blocks in training and compute the rest again: less memory, more time."""

    def __post_init__(self) -> None:
        """Check every field; ``ValueError`` names the field, its value and what is valid."""
        require_choice("model.backbone", self.backbone, BACKBONES)
        require_positive("model.embedding_dim", self.embedding_dim)
        require_in_range("model.dropout", self.dropout, 0.0, 0.99)
        require_in_range("model.augmentation_probability", self.augmentation_probability, 0.0, 1.0)
        require_in_range("model.max_occluded_blocks", self.max_occluded_blocks, 1, BLOCKS_PER_SIDE**2 - 1)
        for name in ("confidence_regularization", "classification_weight", "adversarial_weight"):
            require_in_range(f"model.{name}", getattr(self, name), 0.0, 1e6)
        # Two sub-embeddings have two halves, as many as there are variations.
        if self.num_sub_embeddings < 2 or self.num_sub_embeddings % 2:
            raise ValueError(f"model.num_sub_embeddings={self.num_sub_embeddings!r} must be even and at least 2")
        # A single component of unit length is a sign, from which nothing is learned.
        if self.embedding_dim % self.num_sub_embeddings or self.embedding_dim < 2 * self.num_sub_embeddings:
            raise ValueError(
                f"model.num_sub_embeddings={self.num_sub_embeddings} must divide "
                f"model.embedding_dim={self.embedding_dim} into parts of at least 2"
            )

    @property
    def output_dim(self) -> int:
        """Length of the embedding that the head and the protocols see."""
        return self.embedding_dim

    def build(self) -> URL:
        """Make the network with fresh weights (from torch's global generator)."""
        return URL(self)


def occlude(images_BCHW: Tensor, max_blocks: int) -> Tensor:
    """The images with 1 to ``max_blocks`` random blocks of a 7 x 7 grid black."""
    num_images, _, height, width = images_BCHW.shape
    num_blocks = BLOCKS_PER_SIDE**2
    rank_BN = torch.rand(num_images, num_blocks, device=images_BCHW.device).argsort(dim=1)
    black_BN = rank_BN < torch.randint(1, max_blocks + 1, (num_images, 1), device=images_BCHW.device)
    black_B1HW = (
        black_BN.view(num_images, 1, BLOCKS_PER_SIDE, BLOCKS_PER_SIDE)
        .repeat_interleave(height // BLOCKS_PER_SIDE, dim=2)
        .repeat_interleave(width // BLOCKS_PER_SIDE, dim=3)
    )
    return images_BCHW.masked_fill(black_B1HW, BLACK)


def blur_matrices(sizes_B: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Gaussian blurs of one axis [B, N, N]: row i holds the weights of the pixels that make up pixel i.

    The deviation follows from the size of the kernel by OpenCV's rule. Outside the image there is nothing: the weights
    of what is inside sum to 1.
    """
    position_N = torch.arange(side, device=sizes_B.device, dtype=dtype)
    distance_NN = (position_N[:, None] - position_N).abs()
    radius_B11 = ((sizes_B.to(dtype) - 1) / 2)[:, None, None]
    deviation_B11 = 0.3 * (radius_B11 - 1) + 0.8
    weight_BNN = torch.exp(-0.5 * (distance_NN / deviation_B11).square()) * (distance_NN <= radius_B11)
    return weight_BNN / weight_BNN.sum(dim=2, keepdim=True)


def blur(images_BCHW: Tensor) -> Tensor:
    """The images, each blurred by a random kernel of `BLUR_SIZES`."""
    chosen_B = torch.randint(len(BLUR_SIZES), (images_BCHW.shape[0],), device=images_BCHW.device)
    sizes_B = BLUR_SIZES[0] + (BLUR_SIZES[1] - BLUR_SIZES[0]) * chosen_B
    # Two products with small matrices: one kernel per image would be a convolution of 3 B groups. Not in bfloat16,
    # which is coarser than a byte.
    with torch.autocast(images_BCHW.device.type, enabled=False):
        rows_B1HH = blur_matrices(sizes_B, images_BCHW.shape[2], images_BCHW.dtype)[:, None]
        columns_B1WW = blur_matrices(sizes_B, images_BCHW.shape[3], images_BCHW.dtype)[:, None]
        return rows_B1HH @ images_BCHW @ columns_B1WW.mT


@torch.no_grad()
def augment(images_BCHW: Tensor, present_BT: Tensor, max_blocks: int) -> Tensor:
    """The images with the variations that ``present_BT`` (bool, in the order of `VARIATIONS`) says; others untouched.

    Random numbers are drawn from torch's global generator.
    """
    blurred_B111, occluded_B111 = present_BT[:, :, None, None, None].unbind(1)
    images_BCHW = torch.where(occluded_B111, occlude(images_BCHW, max_blocks), images_BCHW)
    return torch.where(blurred_B111, blur(images_BCHW), images_BCHW)


def distinct_halves(num_variations: int, num_sub_embeddings: int) -> Tensor:
    """V [T, K]: for each variation 1 at a random half of the sub-embeddings and 0 elsewhere; no two rows the same."""
    assert num_variations <= math.comb(num_sub_embeddings, num_sub_embeddings // 2)
    while True:
        rank_TK = torch.rand(num_variations, num_sub_embeddings, device="cpu").argsort(dim=1)
        halves_TK = (rank_TK < num_sub_embeddings // 2).float()
        if len({tuple(half) for half in halves_TK.tolist()}) == num_variations:
            return halves_TK


class DecorrelationLosses(NamedTuple):
    """Scalars, means over the batch: L_cls, L_adv, and L_D of the discriminator."""

    classification: Tensor
    adversarial: Tensor
    discriminator: Tensor


class VariationDecorrelation(nn.Module):
    """The discriminator and the losses that make each half of the sub-embeddings know one variation only."""

    halves_TK: Tensor

    def __init__(self, num_sub_embeddings: int, sub_dim: int) -> None:
        super().__init__()
        self.discriminator = nn.Linear(num_sub_embeddings * sub_dim, len(VARIATIONS))
        self.register_buffer("halves_TK", distinct_halves(len(VARIATIONS), num_sub_embeddings))

    def forward(self, unit_BKd: Tensor, present_BT: Tensor) -> DecorrelationLosses:
        """Losses of the unit sub-embeddings, and of the discriminator on them, given the variations put in."""
        masked_BTD = (unit_BKd[:, None] * self.halves_TK[:, :, None]).flatten(2)
        weight_TD, bias_T = self.discriminator.weight, self.discriminator.bias
        # Of the last two axes, the first is the half that was read, the second the variation asked for.
        logit_BTT = F.linear(masked_BTD, weight_TD.detach(), bias_T.detach())
        target_BT = present_BT.to(logit_BTT.dtype)
        own_BT = logit_BTT.diagonal(dim1=1, dim2=2)
        classification = F.binary_cross_entropy_with_logits(own_BT, target_BT, reduction="none").sum(dim=1).mean()
        # -log p(0) - log p(1) = softplus(z) + softplus(-z)
        even_BTT = 0.5 * (F.softplus(logit_BTT) + F.softplus(-logit_BTT))
        adversarial = (even_BTT.sum(dim=(1, 2)) - even_BTT.diagonal(dim1=1, dim2=2).sum(dim=1)).mean()
        answer_BTT = F.linear(masked_BTD.detach(), weight_TD, bias_T)
        told_BTT = target_BT[:, None].expand_as(answer_BTT)
        discriminator = (
            F.binary_cross_entropy_with_logits(answer_BTT, told_BTT, reduction="none").sum(dim=(1, 2)).mean()
        )
        return DecorrelationLosses(classification, adversarial, discriminator)


class URL(FaceNetwork):
    """The URL network; `URLConfig.build` makes it."""

    def __init__(self, config: URLConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config.backbone, gradient_checkpointing=config.gradient_checkpointing)
        channels, num_sub = self.backbone.out_channels, config.num_sub_embeddings
        map_size = channels * self.backbone.map_side**2
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(map_size, config.embedding_dim)
        self.features = feature_norm(config.embedding_dim, learned_shift=False)
        self.confidence = nn.Linear(map_size, num_sub, bias=False)
        self.confidence_norm = nn.BatchNorm1d(num_sub)
        self.decorrelation = VariationDecorrelation(num_sub, config.embedding_dim // num_sub)
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out")
        nn.init.zeros_(self.fc.bias)
        nn.init.constant_(self.confidence_norm.weight, INITIAL_SPREAD)

    def forward(self, images_BCHW: Tensor) -> FaceEmbedding:
        """Embed RGB images [B, 3, 112, 112] in [-1, 1]; in training some of them get variations first."""
        if not self.training:
            unit_BKd, confidence_BK = self.sub_embeddings(images_BCHW)
            return global_embedding((confidence_BK[:, :, None] * unit_BKd).flatten(1))
        drawn_BT = torch.rand(images_BCHW.shape[0], len(VARIATIONS), device=images_BCHW.device)
        present_BT = drawn_BT < self.config.augmentation_probability
        images_BCHW = augment(images_BCHW, present_BT, self.config.max_occluded_blocks)
        unit_BKd, confidence_BK = self.sub_embeddings(images_BCHW)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            losses = self.decorrelation(unit_BKd, present_BT)
        auxiliary_loss = (
            self.config.confidence_regularization * confidence_BK.square().mean()
            + self.config.classification_weight * losses.classification
            + self.config.adversarial_weight * losses.adversarial
            + losses.discriminator
        )
        return global_embedding((confidence_BK[:, :, None] * unit_BKd).flatten(1), auxiliary_loss=auxiliary_loss)

    def sub_embeddings(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The K sub-embeddings of unit length [B, K, d] and their confidences [B, K], not in reduced precision."""
        map_BCHW = self.bn2(self.backbone(images_BCHW))
        feature_BD = self.features(self.fc(self.dropout(map_BCHW).flatten(1)))
        log_confidence_BK = self.confidence_norm(self.confidence(map_BCHW.flatten(1)))
        precise = torch.promote_types(log_confidence_BK.dtype, torch.float32)
        bounded_BK = log_confidence_BK.to(precise).clamp(-LOG_CONFIDENCE_BOUND, LOG_CONFIDENCE_BOUND)
        sub_BKd = feature_BD.to(precise).unflatten(1, (self.config.num_sub_embeddings, -1))
        return F.normalize(sub_BKd, dim=2), bounded_BK.exp()
