"""Exponentials of scaled cosines and their sums over a chunk of classes, in one Triton kernel.

The forward of a class-sharded softmax writes its [classes, batch] logits, reads them to take the exponentials and reads
these to add them up; here all of it happens while a tile of the matrix product is still in registers. The two products
of the backward pass are left to cuBLAS: they read the stored exponentials, and their [tile, D] accumulators would not
fit into registers beside a recomputed tile.
"""

# Shape legend: n = classes of the chunk, G = global batch, D = embedding, K = a slice of D, P = blocks of classes;
#               within the kernel n and G are those of one tile

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch built without it, as on a machine without a GPU: `available` says so
    triton = tl = None

# Blocks of classes that run side by side over all of the batch, so that the L2 cache serves most reads of both sides.
GROUP: Final = 8
LOG2_E: Final = math.log2(math.e)


class Tile(NamedTuple):
    """One way to launch the kernel: classes, samples and slice of D a program takes at once, warps, pipeline stages."""

    n: int
    G: int
    K: int
    warps: int
    stages: int


# What the tuner tries, by the arithmetic of the product. All fit an A100's shared memory and none spills a register.
# 256 x 128 reads least from the L2 cache, which bounds the product on Hopper; two tiles of 128 x 128 with 4 warps fit
# on one multiprocessor, where the product of one hides the exponentials of the other.
TILES: Final[dict[str, tuple[Tile, ...]]] = {
    "bf16": (
        Tile(256, 128, 64, 8, 3),
        Tile(256, 128, 64, 8, 4),
        Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 4),
    ),
    "tf32": (Tile(256, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 4)),
    "ieee": (Tile(128, 128, 16, 8, 3), Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3)),
    # Small, so that the tests' small chunks have many of them.
    "interpreted": (Tile(32, 32, 16, 4, 1),),
}


def available(device: torch.device) -> bool:
    """Whether the kernel can run on ``device``: an NVIDIA GPU from Ampere on, with Triton installed."""
    if triton is None or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def exponentials(
    weight_nD: Tensor,
    unit_GD: Tensor,
    inverse_norm_n: Tensor,
    columns_G: Tensor,
    scale: float,
    shift: float,
    out_nG: Tensor | None,
) -> Tensor:
    """Sums [G] over the classes of ``exp(scale * cosine - shift)``, own classes left out, in float32.

    The shift takes the place of a running maximum: cosines bound the logits to +-scale. Like calls of a process give
    the same bits; two processes may have chosen different tiles, so add a product up in another order.

    Args:
        weight_nD: Class centres as they are, not normalised; bfloat16 or float32, the products' type.
        unit_GD: Unit embeddings in the same type.
        inverse_norm_n: 1 / norm of each centre, float32.
        columns_G: Row of each sample's own class in this chunk, int64; any number outside [0, n): not in this chunk.
        scale: From cosines to logits.
        shift: Taken off the logits; large enough that no exponential overflows.
        out_nG: Filled with ``exp(scale * cosine - shift) * inverse_norm``, 0 at own classes (the gradient of the sums
            by the products, up to ``scale``); bfloat16 or float32. None: not stored.

    Raises:
        ValueError: Types, shapes or devices that do not match, or a tensor that is not contiguous.
    """
    _check(weight_nD, unit_GD, inverse_norm_n, columns_G, out_nG)
    (n, dim), batch = weight_nD.shape, len(unit_GD)
    if triton.knobs.runtime.interpret:
        # The interpreter would multiply the bits of bfloat16 as integers; in float32 the products are the same.
        arithmetic, weight_nD, unit_GD = "interpreted", weight_nD.float(), unit_GD.float()
    elif weight_nD.dtype == torch.bfloat16:
        arithmetic = "bf16"
    else:
        # Follows `allow_tf32` too, which itself raises where this newer switch was used.
        arithmetic = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    least_n = min(tile.n for tile in TILES[arithmetic])
    partial_PG = torch.empty(triton.cdiv(n, least_n), batch, dtype=torch.float32, device=weight_nD.device)
    if partial_PG.numel() == 0:
        return partial_PG.sum(dim=0)
    kernel = _tuned(arithmetic)
    # Triton launches on the current device, which need not be that of the tensors (-1, a CPU's: stay).
    with torch.cuda.device(weight_nD.get_device()):
        kernel[lambda tile: (triton.cdiv(n, tile["BLOCK_n"]) * triton.cdiv(batch, tile["BLOCK_G"]),)](
            weight_nD, unit_GD, inverse_norm_n, columns_G, out_nG, partial_PG,
            n, batch, scale * LOG2_E, -shift * LOG2_E,
            D=dim, PRECISION="tf32" if arithmetic == "tf32" else "ieee", GROUP=GROUP,
            enable_fp_fusion=True,  # the default so far; Triton 3.9 warns where it is left open
        )  # fmt: skip
    # A larger block than the least fills fewer rows; the rest holds what other tiles left there while being tried.
    return partial_PG[: triton.cdiv(n, kernel.best_config.kwargs["BLOCK_n"])].sum(dim=0)


def _check(
    weight_nD: Tensor, unit_GD: Tensor, inverse_norm_n: Tensor, columns_G: Tensor, out_nG: Tensor | None
) -> None:
    if weight_nD.ndim != 2 or unit_GD.ndim != 2:
        raise ValueError(f"weight {list(weight_nD.shape)} and unit {list(unit_GD.shape)} must have two dimensions each")
    n, batch = len(weight_nD), len(unit_GD)
    floats = (torch.bfloat16, torch.float32)
    wanted: list[tuple[str, Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("weight", weight_nD, (n, weight_nD.shape[1]), floats),
        ("unit", unit_GD, (batch, weight_nD.shape[1]), (weight_nD.dtype,)),
        ("inverse_norm", inverse_norm_n, (n,), (torch.float32,)),
        ("columns", columns_G, (batch,), (torch.int64,)),
    ]
    if out_nG is not None:
        wanted.append(("out", out_nG, (n, batch), floats))
    for name, tensor, shape, dtypes in wanted:
        if tensor.shape != shape:
            raise ValueError(f"{name} of shape {list(tensor.shape)} should be {list(shape)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
        if tensor.device != weight_nD.device:
            raise ValueError(f"{name} is on {tensor.device}, weight on {weight_nD.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} with strides {list(tensor.stride())} is not contiguous")


@cache
def _tuned(arithmetic: str) -> Any:
    """The kernel with its tuner, which chooses once per D and dtypes (a missing ``out`` counts as one), not per n."""
    configs = [
        triton.Config({"BLOCK_n": n, "BLOCK_G": G, "BLOCK_K": K}, num_warps=warps, num_stages=stages)
        for n, G, K, warps, stages in TILES[arithmetic]
    ]
    # The last chunk of classes is of another size: its divisibility must not compile the kernel anew.
    return triton.autotune(configs, key=["D", "PRECISION"])(triton.jit(_kernel, do_not_specialize=["n"]))


def _kernel(
    weight_nD: tl.tensor,
    unit_GD: tl.tensor,
    inverse_norm_n: tl.tensor,
    columns_G: tl.tensor,
    out_nG: tl.tensor,
    partial_PG: tl.tensor,
    n: tl.tensor,
    G: tl.tensor,
    slope: tl.tensor,
    bias: tl.tensor,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_n: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile: powers of 2 of ``slope * inverse_norm * product + bias``, stored, and added up over its classes."""
    blocks_n, blocks_G = tl.cdiv(n, BLOCK_n), tl.cdiv(G, BLOCK_G)
    program = tl.program_id(0)
    block_n, block_G = tl.swizzle2d(program // blocks_G, program % blocks_G, blocks_n, blocks_G, GROUP)
    # Whole matrices pass 2^31 elements, so a tile's start is of 64 bits; offsets in it are of 32 and save registers.
    start_n, start_G = (block_n * BLOCK_n).to(tl.int64), (block_G * BLOCK_G).to(tl.int64)
    left_n, left_G = n - block_n * BLOCK_n, G - block_G * BLOCK_G
    n_n, g_G, k_K = tl.arange(0, BLOCK_n), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)

    # Beyond the end the last row is read again, which needs no mask in the loop.
    weight_nD += start_n * D
    unit_GD += start_G * D
    offset_nK = tl.minimum(n_n, left_n - 1)[:, None] * D + k_K[None, :]
    offset_KG = tl.minimum(g_G, left_G - 1)[None, :] * D + k_K[:, None]
    product_nG = tl.zeros((BLOCK_n, BLOCK_G), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            w_nK = tl.load(weight_nD + k + offset_nK)
            x_KG = tl.load(unit_GD + k + offset_KG)
        else:
            w_nK = tl.load(weight_nD + k + offset_nK, mask=(k_K < D - k)[None, :], other=0.0)
            x_KG = tl.load(unit_GD + k + offset_KG, mask=(k_K < D - k)[:, None], other=0.0)
        product_nG = tl.dot(w_nK, x_KG, product_nG, input_precision=PRECISION)

    # Rows beyond the end become exp2(-inf) = 0 here, at the cost of one number a row.
    inverse_n = tl.load(inverse_norm_n + start_n + n_n, mask=n_n < left_n, other=0.0)
    bias_n = tl.where(n_n < left_n, bias, float("-inf"))
    exponential_nG = tl.exp2(tl.fma(product_nG, (slope * inverse_n)[:, None], bias_n[:, None]))
    own_G = tl.load(columns_G + start_G + g_G, mask=g_G < left_G, other=-1) - start_n
    # In 32 bits the tile is compared faster; what lies outside it is made -1 first, lest it wrap round into it.
    own_G = tl.where((own_G >= 0) & (own_G < BLOCK_n), own_G, -1).to(tl.int32)
    exponential_nG = tl.where(n_n[:, None] == own_G[None, :], 0.0, exponential_nG)
    tl.store(partial_PG + block_n.to(tl.int64) * G + start_G + g_G, tl.sum(exponential_nG, axis=0), mask=g_G < left_G)
    if out_nG is not None:
        stored_nG = (exponential_nG * inverse_n[:, None]).to(out_nG.dtype.element_ty)
        pointer_nG = out_nG + start_n * G + start_G + (n_n[:, None] * G + g_G[None, :])
        tl.store(pointer_nG, stored_nG, mask=(n_n < left_n)[:, None] & (g_G < left_G)[None, :])
