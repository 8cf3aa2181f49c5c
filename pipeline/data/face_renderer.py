"""Draws one procedural face: the embedded demo's stand-in for real face crops.

The skin is a texture of the unrolled head; places on it are (side, y) in pixels of the frontal crop, side 0 being the
midline. The scanned surface says which texel each pixel shows, and its depth says how light falls on it.
"""

import math
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.face_model import (
    EXPRESSIONS,
    HAIR_ENDS,
    HAIR_TURNS,
    OCCLUSIONS,
    ROWS,
    SHAVEN,
    SIDE,
    Factors,
    Floats,
    Identity,
    Image,
    head_surface,
    landmarks,
    sample_identity,
    scan,
    shape_of,
)  # fmt: skip

__all__ = [
    "EXPRESSIONS", "OCCLUSIONS", "SIDE", "Factors", "Identity", "Image", "landmarks", "render_face", "sample_identity"
]  # fmt: skip

_NOISE_BANK = 2**19
_RING, _LID, _BROW, _LIP = (np.linspace(*span) for span in ((0, 2 * np.pi, 16), (-1, 1, 13), (0, 1, 8), (-1, 1, 17)))
_TEX_H, _TEX_W = 2 * SIDE, 540  # about two texels per output pixel, both ways, where a face is seen flat
# Action units at full strength, a row per expression: pixels of motion, or (the last three) depth of wrinkles.
_MIXES = np.array([  # inner brow, outer brow, lid, mouth open, mouth wide, corner, skew, nose, cheek fold, forehead
    (5, -1, -0.4, 0.5, -2.5, 2.5, 0, 0.3, 0.4, 0), (3.5, 2, -0.55, 4, -1, 2, 0, 1, 1, 0),
    (1, 1.5, -0.35, 0, 1, -1, 4.5, 0, 0.6, 0), (0, 0.5, -0.35, 6, 4, -5, 0, 0.2, 1, 0),
    (-5, -5, 0.55, 12, -3, 1.5, 0, 0, 0, 1), (2, 3.5, -0.4, 0, 1, 3, 0, 0.2, 1, 0.9),
])  # fmt: skip
Colour = Floats | tuple[float, ...]


def _texels(turn: Floats, y: Floats) -> NDArray[np.int32]:
    points: NDArray[np.int32] = np.rint(np.stack([(turn + 180) * 24, y * 32 + 8], axis=-1)).astype(np.int32)
    return points  # in sixteenths of a texel, cv2's fixed point


class _Painter:
    """Collects shapes given in (side, y), then draws them in order on an unrolled head."""

    def __init__(self) -> None:
        self.shapes: list[tuple[Floats, Floats, Any, int]] = []

    def __call__(self, side: Floats, y: Floats, colour: Colour, line: int = 0) -> None:
        self.shapes.append((side, y, colour, line))

    def draw(self, texture: Image, widths: Floats) -> None:
        # One conversion for all the points: numpy's cost per call is most of the cost of a small shape.
        side, y = np.concatenate([shape[0] for shape in self.shapes]), np.concatenate([s[1] for s in self.shapes])
        ends = np.cumsum([len(shape[0]) for shape in self.shapes]).tolist()
        points = _texels(np.degrees(np.arcsin(np.clip(side / np.interp(y, ROWS, widths), -0.999, 0.999))), y)
        for start, end, (_, _, colour, line) in zip([0, *ends], ends, self.shapes, strict=False):
            if line:
                cv2.polylines(texture, [points[start:end]], False, colour, line, cv2.LINE_AA, 4)
            else:
                cv2.fillPoly(texture, [points[start:end]], colour, cv2.LINE_AA, 4)


def _uint8(image: NDArray[Any]) -> Image:
    return image if image.dtype == np.uint8 else np.clip(image, 0, 255).astype(np.uint8)


def _soft(values: Floats) -> Floats:
    steps: Floats = 1 / (1 + np.exp(-np.clip(values, -30, 30)))
    return steps


@lru_cache(maxsize=128)
def _bare_texture(identity: Identity) -> Image:
    """Skin, beard, marks, ears and hair: all that no expression moves."""
    f, rng = shape_of(identity), np.random.default_rng(identity.texture_seed)
    y = np.arange(0, SIDE, 2, dtype=np.float32)[:, None]
    turn = np.abs(np.arange(-180, 180, 4, dtype=np.float32))[None]
    eyes = np.exp(-(((turn - 24) / 13) ** 2) - ((y - f["eye_y"] - 1) / 8) ** 2)
    cheeks = np.exp(-(((turn - 36) / 15) ** 2) - ((y - 76) / 11) ** 2)
    mottle = 0.03 * cv2.resize(rng.standard_normal((16, 30), np.float32), (90, 56), interpolation=cv2.INTER_CUBIC)
    shade = (1 + mottle - f["socket"] * eyes) * (1 - 0.35 * _soft(y - f["chin_y"]))
    skin = shade[..., None] * np.array(identity.skin, np.float32)
    skin += (f["blush"] * cheeks)[..., None] * np.array((200, -150, -100), np.float32)
    if identity.beard:
        lip = _soft(2 * (y - f["mouth_y"] + 10)) * _soft((21 - turn) / 2) * _soft(f["mouth_y"] - 2 - y)
        jaw = np.maximum(_soft((y - 97) / 1.5), _soft((turn - 50) / 3) * _soft((y - 66) / 3)) * _soft((78 - turn) / 4)
        beard = identity.beard * np.maximum(jaw, lip)[..., None]
        skin += beard * (0.9 * np.array(identity.hair, np.float32) - skin)
    texture = _uint8(cv2.resize(_uint8(skin), (_TEX_W, _TEX_H), interpolation=cv2.INTER_LINEAR))
    for side, height, radius, contrast in identity.marks:
        angle = np.linspace(0, 2 * np.pi, 9)
        spot = _texels(np.degrees(np.arcsin(side / 42)) + radius * np.cos(angle), height + radius * 0.7 * np.sin(angle))
        cv2.fillPoly(texture, [spot], tuple(np.multiply(identity.skin, 1 - contrast).tolist()), cv2.LINE_AA, 4)
    for middle in (-95, 95):
        bow = np.linspace(0.6, 5.7, 12)
        ear = _texels(middle + 7 * np.sin(bow) * np.sign(middle), 59 - f["ear"] * 1.4 * np.cos(bow))
        cv2.polylines(texture, [ear], False, tuple(np.multiply(identity.skin, 0.66).tolist()), 2, cv2.LINE_AA, 4)
    if identity.hair_style != SHAVEN:
        _comb(texture, identity, rng)
    return texture


def _comb(texture: Image, identity: Identity, rng: np.random.Generator) -> None:
    f, hair = shape_of(identity), np.array(identity.hair)
    around = np.arange(-180.0, 183, 3)
    front = f["hairline"] + f["peak"] * np.exp(-((around / 10) ** 2)) + f["part"] * np.sin(np.radians(around))
    ends = np.interp(np.abs(around), HAIR_TURNS, HAIR_ENDS[identity.hair_style])
    ends += _soft((58 - np.abs(around)) / 3) * front + rng.normal(0, 0.8, len(around))
    outline = _texels(np.array([*around, 180, -180]), np.array([*ends, -9, -9]))
    cv2.fillPoly(texture, [outline], identity.hair, cv2.LINE_8, 4)
    for tint in (0.7 * hair, 1.2 * hair + 12):
        root = rng.uniform(-180, 180, 45)
        tip_y = np.interp(root, around, ends) + rng.uniform(-4, 1.5, 45)
        top = tip_y - rng.uniform(8, 60, 45)
        strands = _texels(np.stack([root + rng.normal(0, 4, 45), root], 1), np.stack([top, tip_y], 1))
        cv2.polylines(texture, list(strands), False, tuple(tint.tolist()), 1, cv2.LINE_8, 4)


def _paint_face(paint: _Painter, identity: Identity, factors: Factors, gaze: float) -> None:
    f, skin = shape_of(identity), np.array(identity.skin)
    units = (factors.expression * _MIXES[factors.expression_kind]).tolist()
    inner, outer, lid, opened, wide, corner, skew, nose, fold, forehead = units
    fold, whole, curve = min(1.0, f["fold"] + 0.7 * fold), _RING, np.array([0, 0.3, 0.7, 1])
    eye_y, wing, tip = f["eye_y"], f["nose_width"], f["nose_y"] - 1.5 * nose
    for hand in (-1, 1):
        _paint_eye(paint, identity, hand, gaze, (inner, outer, lid))
        paint(hand * wing * 0.48 + wing * 0.26 * np.cos(whole), tip + 3.6 + 1.3 * np.sin(whole), skin * 0.35)
        paint(hand * (wing + np.array([-0.6, 0.7, 0.4, -1.2])), tip + np.array([-2.5, 0.5, 3, 4.6]), skin * 0.66, 2)
        crease = hand * (wing + 1.5 + (f["mouth_width"] + wide + 4 - wing) * curve)
        paint(crease, tip - 1 + (f["mouth_y"] - 4 - tip) * curve**1.2, skin * (1 - 0.4 * fold), 2)
        if inner > 0.5:  # a lowered brow folds the skin between the brows
            paint(hand * np.array([2.5, 2.0, 2.6]), eye_y + np.array([-12, -8, -5]), skin * (1 - 0.1 * inner), 2)
        for level in range(3 if nose > 0.05 else 0):
            paint(
                hand * np.array([0, 3, 6]), eye_y + 4 + 3 * level - np.array([0, 0.5, 2]), skin * (1 - 0.35 * nose), 1
            )
    hair_end = f["hairline"] + max(0.0, f["peak"]) + HAIR_ENDS[identity.hair_style, 0] + 4
    for y in np.arange(eye_y - 17, hair_end, -5) if forehead > 0.05 else ():
        across = np.linspace(-1, 1, 9)
        paint(across * 17, y - 2 * (1 - across**2), skin * (1 - 0.3 * forehead), 2)
    _paint_mouth(paint, identity, (opened, wide, corner, skew))


def _paint_eye(paint: _Painter, identity: Identity, hand: int, gaze: float, moved: tuple[float, ...]) -> None:
    f, skin, (inner, outer, lid) = shape_of(identity), np.array(identity.skin), moved
    s, whole, brow = _LID, _RING, _BROW
    eye_x, eye_y, height = hand * f["eye_gap"], f["eye_y"], f["eye_height"]
    line = eye_y - f["eye_slant"] * s / 2
    upper = line - height * (1 + lid) * (1 - s**2) ** 0.8
    lower = line + 0.55 * height * (1 + lid / 3) * (1 - s**2)
    across = hand * s * f["eye_width"]
    paint(eye_x + np.append(across, across[::-1]), np.append(upper, lower[::-1]), 150 + 0.35 * skin)
    for radius, colour in ((3.5, identity.iris), (1.6, (14.0, 10.0, 10.0))):
        x, y = gaze + radius * np.cos(whole), eye_y - 0.15 * height + radius * np.sin(whole)
        at = hand * x / f["eye_width"]
        paint(eye_x + x, np.clip(y, np.interp(at, s, upper), np.interp(at, s, lower)), colour)
    paint(eye_x + across, upper, skin * 0.2, 2)
    paint(eye_x + across, lower + 0.3, skin * 0.68, 1)
    paint(eye_x + across[1:], upper[1:] - f["lid_fold"] * (1 + lid / 2), skin * 0.7, 1)
    brow_x = hand * (f["eye_gap"] + f["brow_length"] * (brow - 0.52))
    middle = eye_y - f["brow_height"] - f["brow_arch"] * 4 * brow * (1 - brow) + f["brow_slant"] * (brow - 0.5)
    middle += inner * (1 - brow) + outer * brow
    thick = f["brow_thick"] * (1 - 0.6 * brow) / 2
    hair = 0.75 * np.array(identity.hair) + 0.15 * skin
    paint(np.append(brow_x, brow_x[::-1]), np.append(middle - thick, (middle + thick)[::-1]), hair)


def _paint_mouth(paint: _Painter, identity: Identity, moved: tuple[float, ...]) -> None:
    f, skin, (opened, wide, corner, skew) = (
        shape_of(identity),
        np.array(identity.skin),
        moved,
    )
    s, round_ = _LIP, 1 - _LIP**2
    x, rest = (
        s * (f["mouth_width"] + wide),
        f["mouth_y"] + (corner - skew * np.clip(s, 0, 1)) * s**2 + f["mouth_curve"] * round_,
    )
    top, bottom = rest - 0.35 * opened * round_**0.7, rest + 0.65 * opened * round_**0.7
    bow = top - f["upper_lip"] * round_**0.6 * (1 - 0.45 * np.exp(-((s / 0.16) ** 2)))
    low = bottom + f["lower_lip"] * round_**0.7
    lip = skin + f["lip_tint"] * (np.array((168, 62, 66)) * (0.45 + skin.mean() / 400) - skin)
    paint(np.append(x, x[::-1]), np.append(bow, top[::-1]), lip * 0.85)
    paint(np.append(x, x[::-1]), np.append(bottom, low[::-1]), lip)
    if opened > 0.5:
        paint(np.append(x, x[::-1]), np.append(top, bottom[::-1]), (48, 18, 18))
        teeth = np.minimum(top + 3.2 * round_, bottom)
        paint(np.append(x, x[::-1]), np.append(top, teeth[::-1]), (222, 214, 200))
    paint(x, top, skin * 0.35, 2)
    paint(x[4:-4], low[4:-4] + 0.8, skin * 0.72, 1)


def _cover(paint: _Painter, factors: Factors, where: Floats, colour: Floats) -> None:
    """Paints what hides a share of the face (about 76 x 100 px); it grows from one place, so more hides more."""
    share, angle = factors.occlusion, np.linspace(0, 2 * np.pi, 40)
    kind = OCCLUSIONS[factors.occlusion_kind]
    if kind == "sunglasses":
        for hand in (-1, 1):
            x = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.5 * (13 + 26 * share)
            y = np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.6 * 66 * share
            paint(hand * 18 + x, 53 + y, colour * 0.25)
        paint(np.array([-44, 0, 44]), np.array([49, 48, 49]), colour * 0.2, 4)
    elif kind == "mask":
        x = np.linspace(-42, 42, 20)
        top = 112 - 102 * share + 5 * (x / 42) ** 2
        paint(np.append(x, x[::-1]), np.append(top, np.full(20, 140)), 70 + 0.6 * colour)
    elif kind == "bar":
        half = 41 * share
        paint(where[0] * 24 * (1 - share) + half * np.array([-1, 1, 1, -1]), np.array([-20, -20, 140, 140]), colour)
    else:
        size, skin = np.sqrt(share), np.array((205, 160, 132)) * (0.55 + 0.6 * colour.mean() / 255)
        x, y = where[0] * 22 * (1 - share), 62 + where[1] * 30 * (1 - share)
        paint(x + 36 * size * np.cos(angle), y + 42 * size * np.sin(angle), skin)
        for finger in np.linspace(-0.75, 0.75, 4):
            at = np.array([x + 36 * size * finger, x + 44 * size * finger])
            paint(at, np.array([y, y - 62 * size]), skin * 0.93, max(1, int(26 * size)))
            paint(at + 7 * size, np.array([y, y - 50 * size]), skin * 0.6, 1)


def _light(factors: Factors, depth: Floats, tint: Floats) -> Floats:
    """Per pixel and channel: ambient light, one directional source and the colour of both."""
    smooth = cv2.blur(depth, (3, 3))
    down, right = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=0.125), cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=0.125)
    amount, angle = abs(factors.illumination), math.radians(factors.light_angle_degrees)
    slope = 0.35 + 0.9 * amount
    aside, above, ahead = (v / (1 + slope**2) ** 0.5 for v in (slope * math.sin(angle), slope * math.cos(angle), 1.0))
    lambert = (ahead - right * aside + down * above) / np.sqrt(1 + right**2 + down**2)
    direct = 0.5 + 0.3 * amount
    gain = 1 + factors.illumination * (0.75 if factors.illumination < 0 else 0.6)
    shade = gain * (1.08 - direct + direct * np.maximum(lambert, 0))
    lit: Floats = shade[..., None].astype(np.float32) * tint
    return lit


@lru_cache(maxsize=1)
def _noise_bank() -> Floats:
    # Drawing 37 632 normals would take longer than drawing the face; a random window of a fixed bank is as good.
    return np.random.default_rng(0xBA4C).standard_normal(_NOISE_BANK, np.float32)


def _through_camera(image: Image, factors: Factors, rng: np.random.Generator) -> Image:
    if (factors.shift_x_px, factors.shift_y_px, factors.roll_degrees, factors.scale) != (0, 0, 0, 1):
        move = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), -factors.roll_degrees, factors.scale)
        move[:, 2] += np.array((factors.shift_x_px, factors.shift_y_px))
        image = _uint8(cv2.warpAffine(image, move, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT))
    image = _uint8(cv2.GaussianBlur(image, (3, 3), 0.5))  # the softness of a lens; it also smooths the silhouette
    if factors.motion_blur_px > 1:
        image = _uint8(cv2.blur(image, (factors.motion_blur_px, 1)))
    if factors.resolution_px < SIDE:
        small = cv2.resize(image, (factors.resolution_px,) * 2, interpolation=cv2.INTER_AREA)
        image = _uint8(cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR))
    if factors.noise > 0:
        start = int(rng.integers(_NOISE_BANK - image.size))
        noise = _noise_bank()[start : start + image.size].reshape(image.shape)
        image = _uint8(np.rint(image + np.float32(factors.noise) * noise))
    return image


def render_face(identity: Identity, factors: Factors, noise_seed: int = 0) -> Image:
    """RGB uint8 [112, 112, 3]; `noise_seed` draws the background, the tint of the light, the gaze and the noise."""
    rng = np.random.default_rng([noise_seed, 0x5EED])
    gaze, where = rng.uniform(-1.2, 1.2), rng.uniform(-1, 1, 2)
    tint = rng.normal(1, 0.03, 3) + np.array((1, 0, -1)) * rng.normal(0, 0.07)
    cover = rng.uniform(20, 235, 3)
    room = rng.uniform(20, 220, (6, 6, 1)) + rng.normal(0, 18, (6, 6, 3))
    paint, texture = _Painter(), _bare_texture(identity).copy()
    _paint_face(paint, identity, factors, gaze)
    if factors.occlusion > 0:
        _cover(paint, factors, where, cover)
    paint.draw(texture, head_surface(identity)[0][:, 0])
    turn, depth, seen = scan(identity, factors.yaw_degrees)
    rows = np.broadcast_to(2 * ROWS[:, None] + np.float32(0.5), turn.shape)
    face = cv2.remap(texture, (turn + 180) * 1.5, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    lit = face * _light(factors, depth, (tint / tint.mean()).astype(np.float32))
    background = _uint8(room * (1 + 0.5 * factors.illumination))
    image = _uint8(cv2.resize(background, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR))
    cv2.copyTo(_uint8(lit), _uint8(seen), image)
    return _through_camera(image, factors, rng)
