"""The people of the procedural faces, how a picture of one may vary, and the surface of a head.

A head is a surface over (row, turn around the vertical axis). Every row is star-shaped around that axis, so under a yaw
each image row has its hidden surface removed exactly by writing its points from the back to the front.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SIDE = 112
EXPRESSIONS = ("anger", "disgust", "contempt", "smile", "surprise", "ageing")
OCCLUSIONS = ("sunglasses", "mask", "hand", "bar")
ROWS = np.arange(SIDE, dtype=np.float32)
# Fine enough to leave no hole where the surface is steep: the side of a nose needs twice the columns of a cheek.
_TURNS = np.concatenate([np.arange(-180, -72), np.arange(-72, 72, 0.5), np.arange(72, 180)]).astype(np.float32)
_SIN, _COS = np.sin(np.radians(_TURNS)), np.cos(np.radians(_TURNS))
_BAND = 28  # rows scanned at a time: arrays small enough that malloc reuses them, without fresh pages each time
_FIRST_CELL = (np.arange(_BAND) * (SIDE + 2) + 1)[:, None]

_SKINS = np.array([(246, 212, 190), (226, 182, 152), (194, 146, 112), (146, 100, 72), (94, 64, 48)])
_HAIRS = np.array([(24, 20, 18), (48, 34, 26), (84, 56, 38), (136, 98, 60), (196, 160, 108), (150, 146, 142)])
_IRISES = np.array([(58, 36, 22), (92, 60, 34), (98, 102, 60), (84, 120, 150), (112, 128, 120)])
# What differs between people, in crop pixels: the crop is aligned, so the five landmarks themselves move little.
_RANGES = {
    "head_width": (36, 44.5), "jaw": (0.70, 0.94), "chin_y": (106, 117), "temple": (0.86, 0.98), "depth": (38, 46),
    "cheek": (-0.5, 3.5), "ridge": (0.5, 4), "chin": (0.5, 6), "eye_gap": (16.2, 19), "eye_y": (50.3, 52.9),
    "eye_width": (6.4, 9.4), "eye_height": (2.6, 4.8), "eye_slant": (-1.8, 1.6), "lid_fold": (0.8, 3.6),
    "brow_height": (8, 13), "brow_thick": (1, 4.4), "brow_slant": (-3, 2.5), "brow_arch": (0, 3.6),
    "brow_length": (15, 22), "nose_y": (69.5, 74), "nose_height": (8, 15), "nose_width": (5.4, 10.4),
    "nose_bridge": (0.25, 0.75), "mouth_y": (90.4, 94.2), "mouth_width": (12.4, 17), "upper_lip": (1.4, 4.4),
    "lower_lip": (2.2, 5.6), "mouth_curve": (-1.6, 1.6), "lip_tint": (0.15, 0.75), "ear": (3, 8),
    "hairline": (4, 20), "peak": (-2, 6), "part": (-6, 6), "blush": (-0.03, 0.1), "socket": (0, 0.2), "fold": (0, 0.6),
}  # fmt: skip
# Where hair ends, in rows below the hairline at these turns (or, past 60 degrees, absolute rows): a row per style.
HAIR_TURNS = np.array([0, 20, 40, 52, 63, 72, 80, 90, 108, 125, 180])
HAIR_ENDS = np.array([
    (0, 0, 3, 12, 40, 58, 64, 47, 60, 96, 100), (-2, -8, -7, 4, 38, 54, 58, 46, 60, 90, 96),
    (17, 17, 15, 24, 50, 66, 66, 50, 66, 104, 106), (0, 1, 6, 22, 74, 128, 128, 128, 128, 128, 128),
    (-4, 5, 15, 34, 90, 128, 128, 128, 128, 128, 128), (-30, -30, -30, -30, -30, -30, -30, -30, -30, -30, -30),
])  # fmt: skip
_LONG_HAIR, SHAVEN = (3, 4), 5
_LIMITS = {
    "yaw_degrees": (-90, 90), "expression": (0, 1), "expression_kind": (0, len(EXPRESSIONS) - 1),
    "illumination": (-1, 1), "light_angle_degrees": (-360, 360), "occlusion": (0, 1),
    "occlusion_kind": (0, len(OCCLUSIONS) - 1), "motion_blur_px": (0, SIDE), "resolution_px": (2, SIDE),
    "noise": (0, 128), "shift_x_px": (-SIDE, SIDE), "shift_y_px": (-SIDE, SIDE), "scale": (0.5, 2),
    "roll_degrees": (-180, 180),
}  # fmt: skip
Image = NDArray[np.uint8]
Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """What varies between images of one person; a positive yaw turns the nose to the right of the image."""

    yaw_degrees: float = 0.0
    expression: float = 0.0
    expression_kind: int = 0
    illumination: float = 0.0
    light_angle_degrees: float = 0.0  # clockwise from above
    occlusion: float = 0.0
    occlusion_kind: int = 0
    motion_blur_px: int = 0
    resolution_px: int = SIDE
    noise: float = 0.0
    shift_x_px: float = 0.0
    shift_y_px: float = 0.0
    scale: float = 1.0
    roll_degrees: float = 0.0

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"Factors.{name} must be in [{low}, {high}], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """One person: `shape` in the order of the sampled ranges, RGB colours, marks as (side, y, radius, contrast)."""

    shape: tuple[float, ...]
    skin: tuple[float, ...]
    hair: tuple[float, ...]
    iris: tuple[float, ...]
    hair_style: int
    beard: float
    marks: tuple[tuple[float, ...], ...]
    texture_seed: int


@lru_cache(maxsize=4096)
def sample_identity(seed: int, identity: int) -> Identity:
    """One person, a pure function of both numbers."""
    rng = np.random.default_rng([seed, identity, 0xFACE])
    low, high = np.array(list(_RANGES.values())).T
    shape = low + (high - low) * rng.beta(1.3, 1.3, len(low))

    def colour(palette: Floats, position: float, sigma: float) -> tuple[float, ...]:
        # A continuum of colours, so that many people share one and no pixel tells who it is.
        steps = np.arange(len(palette))
        channels = [np.interp(position * steps[-1], steps, palette[:, c]) for c in range(3)]
        return tuple(np.clip(channels + rng.normal(0, sigma, 3), 4, 252).tolist())

    tone = rng.beta(1.2, 1.5)
    return Identity(
        shape=tuple(shape.tolist()),
        skin=colour(_SKINS, tone, 4),
        hair=colour(_HAIRS, rng.beta(1, 1.5 + 2 * tone), 5),
        iris=colour(_IRISES, rng.beta(1, 2 + 3 * tone), 4),
        hair_style=int(rng.choice(len(HAIR_ENDS), p=[0.28, 0.1, 0.17, 0.2, 0.17, 0.08])),
        beard=max(0.0, float(rng.uniform(-1.2, 0.8))),
        marks=tuple(map(tuple, rng.uniform((-32, 22, 0.7, 0.2), (32, 106, 1.9, 0.6), (rng.choice([0, 1, 2, 12]), 4)))),
        texture_seed=int(rng.integers(2**31)),
    )


def shape_of(identity: Identity) -> dict[str, float]:
    """The sampled lengths by name."""
    return dict(zip(_RANGES, identity.shape, strict=True))


@lru_cache(maxsize=256)
def head_surface(identity: Identity) -> tuple[Floats, Floats]:
    """The surface as a product: lengths of each row [rows, terms] and bumps around it [terms - 3, turns]."""
    f = shape_of(identity)
    chin_y, jaw, nose, tip, mouth = f["chin_y"], f["jaw"], f["nose_height"], f["nose_y"], f["mouth_y"]
    knots = (-14, 4, 30, 52, 72, 90, chin_y - 8, chin_y - 2, chin_y + 1)
    widths = np.interp(ROWS, knots, (0.78, 0.93, f["temple"], 1, 0.5 + jaw / 2, jaw, 0.66 * jaw, 0.46 * jaw, 0.5))
    widths = f["head_width"] * np.convolve(np.pad(widths, 3, mode="edge"), np.full(7, 1 / 7), "valid")
    front = f["depth"] * np.interp(ROWS, (-14, 10, 40, 90, chin_y - 3, chin_y + 2), (0.78, 0.94, 1, 0.97, 0.9, 0.4))
    back = np.interp(ROWS, (0, 40, 80, 112), (52, 54, 44, 30))
    half = [  # side, y, sigma to the side, sigma above, sigma below, height
        (0, f["eye_y"] + 6, 3.6, 9, 9, nose * f["nose_bridge"]), (0, tip - 1, f["nose_width"] / 2, 9, 2.8, nose),
        (0, mouth - 2, f["mouth_width"] * 0.7, 3, 2, 2.4), (0, mouth + 3.5, f["mouth_width"] * 0.6, 2, 2.4, 2.2),
        (0, mouth + 9, 9, 2.5, 2.5, -2), (0, chin_y - 4, 8, 5, 5, f["chin"]),
        (f["nose_width"] * 0.72, tip + 2, 2.3, 4, 2.2, nose * 0.28), (f["eye_gap"], f["eye_y"], 7, 4.5, 5, -4),
        (f["eye_gap"] * 0.7, f["eye_y"] - 9, 12, 4, 4, f["ridge"]), (25, 67, 8, 9, 10, f["cheek"]),
    ]  # fmt: skip
    side, y, across, above, below, height = np.array(half + [(-row[0], *row[1:]) for row in half[6:]]).T[:, :, None]
    bumps = np.exp(-0.5 * ((_TURNS - np.degrees(np.arcsin(side / 42))) / np.degrees(across / 42)) ** 2)
    rows = height * np.exp(-0.5 * ((ROWS - y) / np.where(y > ROWS, above, below)) ** 2)
    long_hair, turned = identity.hair_style in _LONG_HAIR, np.abs(_TURNS)
    extra_bumps = np.exp(-0.5 * ((turned - 95) / 6) ** 2), 1 / (1 + np.exp((76 - turned) / 3)), np.ones_like(_TURNS)
    extra_rows = (
        np.exp(-0.5 * ((ROWS - 60) / 8) ** 2) * (0 if long_hair else f["ear"]),
        np.interp(ROWS, (70, 112), (5, 14)) * (1 if long_hair else 0.1),
        3.5 / (1 + np.exp((ROWS - f["hairline"]) / 2)) * (identity.hair_style != SHAVEN),
    )
    lengths = np.stack([widths, front, back, *rows, *extra_rows], axis=1)
    around = np.stack([*bumps, *extra_bumps])
    # Tails below float32's normal range would slow every later product several times.
    lengths, around = (np.where(np.abs(a) < 1e-6, 0, a).astype(np.float32) for a in (lengths, around))
    return lengths, around


def _turned(bumps: Floats, columns: NDArray[np.int64], yaw: float) -> tuple[Floats, Floats]:
    """What a row's lengths are multiplied by to give its sideways position and depth after the yaw."""
    sin, cos, none = _SIN[columns], _COS[columns], np.zeros(len(columns), np.float32)
    # sin ** 3: bumps near the front point forward, which leaves the aligned landmarks in place; ears point sideways.
    x = np.vstack([sin, none, none, bumps[:, columns] * sin**3])
    z = np.vstack([none, np.maximum(cos, 0), np.minimum(cos, 0), bumps[:, columns] * cos])
    turn, across = np.float32(np.sin(np.radians(yaw))), np.float32(np.cos(np.radians(yaw)))
    return x * across + z * turn, z * across - x * turn


def landmarks(identity: Identity, yaw_degrees: float = 0.0) -> tuple[Floats, float]:
    """[5, 2] eyes, nose tip, mouth corners (ArcFace order) before alignment jitter, and the x of the head's axis."""
    f, (lengths, bumps) = shape_of(identity), head_surface(identity)
    side = np.array([-f["eye_gap"], f["eye_gap"], 0, -f["mouth_width"], f["mouth_width"]])
    y = np.array([f["eye_y"], f["eye_y"], f["nose_y"], f["mouth_y"], f["mouth_y"]])
    of_row = lengths[np.rint(y).astype(int)]
    turn = np.degrees(np.arcsin(np.clip(side / of_row[:, 0], -1, 1)))
    x_of, _ = _turned(bumps, np.searchsorted(_TURNS, turn), yaw_degrees)
    x = np.einsum("kt,tk->k", of_row, x_of)
    # A five-point alignment centres the landmarks; in profile they all lie well in front of the head's axis.
    axis = SIDE / 2 - 0.9 * float(x.mean())
    return np.stack([x + axis, y], axis=1), axis


def scan(identity: Identity, yaw: float) -> tuple[Floats, Floats, Floats]:
    """For each pixel: the turn seen there, its depth, and (0 or 1) whether the head is seen there at all."""
    lengths, bumps = head_surface(identity)
    facing = (_TURNS + np.float32(yaw) + 180) % 360 - 180
    columns = np.argsort(facing, kind="stable")
    columns = columns[np.abs(facing[columns]) < 104]  # past the silhouette: ears and hair stand out from the skull
    facing, (x_of, z_of), axis = facing[columns], _turned(bumps, columns, yaw), landmarks(identity, yaw)[1]
    count, middle, index = len(columns), int(np.searchsorted(facing, 0)), np.arange(len(columns), dtype=np.int16)
    seen = np.empty((3, SIDE, SIDE), np.float32)
    for top in range(0, SIDE, _BAND):
        x, z = lengths[top : top + _BAND] @ x_of + np.float32(axis), lengths[top : top + _BAND] @ z_of
        # On one row and at one x, the point that faces the viewer more is the nearer one, and the last write wins:
        # each side of the head is written from its silhouette inwards.
        nearest = np.full(_BAND * (SIDE + 2), -1, np.int16)
        for inwards in (slice(0, middle), slice(None, middle - 1, -1)):
            cells = np.rint(x[:, inwards])
            cells = np.clip(cells, -1, SIDE, out=cells).astype(np.intp) + _FIRST_CELL
            nearest[cells.ravel()] = np.tile(index[inwards], _BAND)
        nearest = nearest.reshape(_BAND, SIDE + 2)[:, 1:-1]
        left = np.clip(nearest, 0, count - 2).astype(np.intp)
        at = left + np.arange(0, _BAND * count, count)[:, None]
        x_left, z_left, facing_left = x.take(at), z.take(at), facing.take(left)
        step = x.take(at + 1) - x_left
        part = np.clip((ROWS - x_left) / np.where(np.abs(step) < 0.05, np.float32(0.05), step), -1, 1)
        here = seen[:, top : top + _BAND]
        here[2] = nearest >= 0
        here[1] = (z_left + part * (z.take(at + 1) - z_left)) * here[2]
        here[0] = facing_left + part * (facing.take(left + 1) - facing_left) - np.float32(yaw)
    return (seen[0] + 180) % 360 - 180, seen[1], seen[2]
