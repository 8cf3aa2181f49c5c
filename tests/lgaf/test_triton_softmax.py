"""The Triton kernel equals the formula; for the GPUs it is meant for, it compiles to tensor cores without spills.

Triton reads ``TRITON_INTERPRET`` when it is first imported, and other tests may have done so. Hence each kind of check
runs in one process of its own, which is this file as a script: all cases of the formula (interpreted, or compiled where
there is a GPU), and compilations for GPUs that need not be there.
"""

# Shape legend: n = classes of the chunk, G = global batch, D = embedding

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from lgaf.heads.triton_softmax import GROUP, TILES, Tile, _kernel, available, exponentials

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
# Dynamic shared memory of one program, KiB: what an SM of A100 and H100 gives one at most.
SHARED_KIB = {80: 163, 90: 227}
BF16, FP32 = "bfloat16", "float32"


class Case(NamedTuple):
    n: int
    G: int
    D: int
    inputs: str = FP32
    out: str | None = FP32
    scale: float = 64.0
    shift: float = 20.0

    @property
    def tolerance(self) -> float:
        """Relative, of the sums: what rounding the exponent, at most scale + shift, to float32 a few times does."""
        # Tensor cores keep fewer bits of a sum than float32 has.
        ulps = 32 if CUDA and self.inputs == BF16 else 3
        return ulps * 2.0**-24 * (self.scale + self.shift) + 1e-6

    @property
    def out_tolerance(self) -> float:
        # The interpreter cuts bits off where a GPU rounds.
        return 2 * self.tolerance + (0 if self.out == FP32 else 2.0**-8 if CUDA else 2.0**-7)


CASES = {
    "one": Case(1, 1, 12),
    "one-class": Case(1, 70, 64, out=BF16),
    "one-sample": Case(130, 1, 96, BF16),
    "few": Case(37, 5, 12, BF16, BF16),
    "blocks": Case(130, 70, 96),
    "blocks-bf16": Case(130, 70, 96, BF16, BF16),
    "groups": Case(300, 70, 64, BF16, FP32),
    "odd": Case(37, 5, 37),
    "odd-bf16": Case(130, 70, 101, BF16, BF16),
    "wide": Case(64, 64, 512, BF16, BF16),
    "no-out": Case(130, 70, 96, out=None),
    "no-out-bf16": Case(130, 70, 64, BF16, None),
    "no-shift": Case(130, 70, 12, shift=0.0),
    "no-shift-bf16": Case(37, 70, 64, BF16, BF16, shift=0.0),
    "small-scale": Case(130, 5, 64, scale=4.0, shift=0.0),
    "no-classes": Case(0, 5, 64),
    "no-samples": Case(37, 0, 64, BF16, BF16),
}
# Whole against halves, which need no reference: on a GPU these pass 2^31 elements, of the output and of the centres.
SPLITS = (
    [Case(2**23 + 38, 256, 16, BF16, BF16), Case(2**21 + 38, 16, 1024, BF16, BF16)] if CUDA else [Case(166, 40, 16)]
)


def _before_nan(rows: Tensor) -> Tensor:
    """The same rows, with NaN in memory after them, to be seen if it is read."""
    return torch.cat([rows, torch.full_like(rows[:1], torch.nan) if len(rows) else rows])[: len(rows)]


def _inputs(case: Case) -> dict[str, Any]:
    device = torch.device("cuda" if CUDA else "cpu")
    random = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.inputs)
    weight_nD = torch.randn(case.n, case.D, generator=random, device=device, dtype=dtype)
    unit_GD = F.normalize(torch.randn(case.G, case.D, generator=random, device=device)).to(dtype)
    # Cosines of 1 and -1 too: the largest exponents.
    least = min(case.n, case.G) // 2
    weight_nD[:least] = (
        unit_GD[:least] * torch.tensor([3.0, -0.5], dtype=dtype, device=device).repeat(least)[:least, None]
    )
    columns_G = torch.randint(-case.n, 2 * case.n + 1, (case.G,), generator=random, device=device)
    # Twice the same class, the last one, both neighbours of the range, and what 32 bits would wrap round to class 0.
    special = torch.tensor([0, 0, case.n - 1, -1, case.n, 2**32, -(2**32)], device=device)[: case.G]
    columns_G[: len(special)] = special
    norm_n = torch.linalg.vector_norm(weight_nD, dim=1, dtype=torch.float32).clamp_min(1e-12)
    return {
        "weight_nD": _before_nan(weight_nD),
        "unit_GD": _before_nan(unit_GD),
        "inverse_norm_n": 1 / norm_n,
        "columns_G": columns_G,
        "scale": case.scale,
        "shift": case.shift,
        # NaN where the kernel does not write.
        "out_nG": case.out and torch.full((case.n, case.G), torch.nan, device=device, dtype=getattr(torch, case.out)),
    }


def _formula(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sums and stored exponentials in float64."""
    columns_G, inverse_norm_n = inputs["columns_G"], inputs["inverse_norm_n"].double()
    cosine_nG = inverse_norm_n[:, None] * (inputs["weight_nD"].double() @ inputs["unit_GD"].double().T)
    own_nG = torch.arange(len(cosine_nG), device=columns_G.device)[:, None] == columns_G[None, :]
    exponential_nG = (inputs["scale"] * cosine_nG - inputs["shift"]).exp().masked_fill(own_nG, 0.0)
    return exponential_nG.sum(dim=0), exponential_nG * inverse_norm_n[:, None]


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Worst relative difference; 0 must be 0, and NaN counts as infinite."""
    off = (found.double() - wanted).abs() / wanted.abs().clamp_min(1e-300)
    return float(off.nan_to_num(nan=torch.inf).max()) if off.numel() else 0.0


def _against_formula(case: Case) -> dict[str, Any]:
    inputs = _inputs(case)
    sums_G = exponentials(**inputs)
    wanted_G, wanted_nG = _formula(inputs)
    out_nG = inputs["out_nG"]
    return {
        "sums": _relative(sums_G, wanted_G),
        "out": 0.0 if out_nG is None else _relative(out_nG, wanted_nG),
        "repeats": torch.equal(sums_G, exponentials(**inputs)),
        "shape": [*sums_G.shape, str(sums_G.dtype)],
    }


def _against_halves(case: Case) -> dict[str, Any]:
    inputs = _inputs(case)
    sums_G, out_nG = exponentials(**inputs), inputs["out_nG"]
    halves_G, out = torch.zeros_like(sums_G), 0.0
    for rows in (slice(0, case.n // 2), slice(case.n // 2, case.n)):
        part = {name: inputs[name][rows] for name in ("weight_nD", "inverse_norm_n")}
        part |= {"columns_G": inputs["columns_G"] - rows.start, "out_nG": torch.full_like(out_nG[rows], torch.nan)}
        halves_G += exponentials(**inputs | part)
        pairs = zip(part["out_nG"].split(2**20), out_nG[rows].split(2**20), strict=True)
        out = max(out, *(_relative(half, whole.double()) for half, whole in pairs))
    return {"sums": _relative(sums_G, halves_G.double()), "out": out}


def _compiled(capability: int, arithmetic: str, tile: Tile, out: str | None) -> dict[str, Any]:
    """What a tile needs on a GPU of this compute capability, D = 512, as its assembler says."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    operand = "*bf16" if arithmetic == "bf16" else "*fp32"
    constants = {"D": 512, "PRECISION": "ieee" if arithmetic == "ieee" else "tf32", "GROUP": GROUP}
    constants |= {"BLOCK_n": tile.n, "BLOCK_G": tile.G, "BLOCK_K": tile.K} | ({} if out else {"out_nG": None})
    types = {"weight_nD": operand, "unit_GD": operand, "inverse_norm_n": "*fp32", "columns_G": "*i64", "out_nG": out}
    types |= {"partial_PG": "*fp32", "n": "i32", "G": "i32", "slope": "fp32", "bias": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    kernel = triton.jit(_kernel, do_not_specialize=["n"])
    aligned = [i for i, name in enumerate(kernel.arg_names) if name == "G" or types[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    instruction = {80: "mma.sync", 90: "wgmma.mma_async"}[capability]
    products = binary.asm["ptx"].count(instruction)
    return {"tile": tile, "out": out, **found, "KiB": binary.metadata.shared / 1024, "tensor_cores": products}


def _run(*arguments: str, **environment: str) -> Any:
    """The answer of this file as a script."""
    command = [sys.executable, "-m", "tests.lgaf.test_triton_softmax", *arguments]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _main(kind: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    if kind == "formula":
        answer: Any = {name: _against_formula(case) for name, case in CASES.items()}
    elif kind == "halves":
        answer = [_against_halves(case) for case in SPLITS]
    else:
        capability, arithmetic, number = arguments
        tiles = TILES[arithmetic] if number == "all" else TILES[arithmetic][: int(number)]
        outs = ("*bf16", None) if arithmetic == "bf16" else ("*fp32", None)
        answer = [_compiled(int(capability), arithmetic, tile, out) for tile in tiles for out in outs]
    print(json.dumps(answer))


@pytest.fixture(scope="module")
def differences() -> Any:
    return _run("formula", **({} if CUDA else {"TRITON_INTERPRET": "1"}))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(differences, name):
    case, found = CASES[name], differences[name]
    assert found["shape"] == [case.G, "torch.float32"]
    assert found["sums"] <= case.tolerance
    assert found["out"] <= case.out_tolerance
    assert found["repeats"]


def test_a_chunk_is_its_two_halves():
    for case, found in zip(SPLITS, _run("halves", **({} if CUDA else {"TRITON_INTERPRET": "1"})), strict=True):
        assert found["sums"] <= case.tolerance
        assert found["out"] <= case.out_tolerance


def _assert_fits(compiled: list[dict[str, Any]], capability: int, tensor_cores: bool) -> None:
    for one in compiled:
        assert one["STACK"] == one["LOCAL"] == 0, f"spills: {one}"
        assert one["KiB"] <= SHARED_KIB[capability], one
        assert (one["tensor_cores"] > 0) == tensor_cores, one


def test_compiles_for_hopper():
    _assert_fits(_run("compile", "90", "bf16", "1"), 90, tensor_cores=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("arithmetic", ["bf16", "tf32", "ieee"])
def test_every_tile_compiles(arithmetic, capability):
    _assert_fits(_run("compile", str(capability), arithmetic, "all"), capability, tensor_cores=arithmetic != "ieee")


def _small(**changes: Any) -> dict[str, Any]:
    return _inputs(Case(6, 4, 8)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_nD": torch.zeros(6)}, "two dimensions"),
        ({"weight_nD": torch.zeros(6, 8, dtype=torch.float16)}, "weight is torch.float16"),
        ({"unit_GD": torch.zeros(4, 8, dtype=torch.bfloat16)}, "unit is torch.bfloat16"),
        ({"unit_GD": torch.zeros(4, 9)}, r"unit of shape \[4, 9\] should be \[4, 8\]"),
        ({"unit_GD": torch.zeros(8, 4).T}, "unit with strides"),
        ({"inverse_norm_n": torch.zeros(5)}, "inverse_norm of shape"),
        ({"inverse_norm_n": torch.zeros(6, dtype=torch.float64)}, "inverse_norm is torch.float64"),
        ({"columns_G": torch.zeros(4, dtype=torch.int32)}, "columns is torch.int32"),
        ({"columns_G": torch.zeros(4, dtype=torch.int64, device="meta")}, "columns is on meta"),
        ({"out_nG": torch.zeros(6, 5)}, "out of shape"),
        ({"out_nG": torch.zeros(4, 6).T}, "out with strides"),
        ({"out_nG": torch.zeros(6, 4, dtype=torch.float16)}, "out is torch.float16"),
    ],
)
def test_what_does_not_match_is_refused(monkeypatch, changes, message):
    monkeypatch.setattr(sys.modules[__name__], "CUDA", False)
    with pytest.raises(ValueError, match=message):
        exponentials(**_small(**changes))


def test_only_a_gpu_can_run_it():
    assert not available(torch.device("cpu"))


if __name__ == "__main__":
    _main(*sys.argv[1:])
