"""The last layer of every branch: batch norm of the feature."""

from __future__ import annotations

from torch import nn


def feature_norm(dim: int, learned_shift: bool) -> nn.BatchNorm1d:
    """BN that gives each of the ``dim`` dimensions unit variance.

    So the norms of the branches are of one scale, which the quality measure of the fusion needs.

    Args:
        dim: D of the feature.
        learned_shift: False: no parameters (AdaFace's form). True: the scale is a parameter fixed at 1 and the shift
            is learned (insightface's form).
    """
    norm = nn.BatchNorm1d(dim, affine=learned_shift)
    if learned_shift:
        norm.weight.requires_grad_(False)
    return norm
