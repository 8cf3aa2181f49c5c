"""Data sets and verification benchmarks of rendered faces, for demos and tests that carry no real face."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.data.face_renderer import EXPRESSIONS, OCCLUSIONS, SIDE, Factors, Image, render_face, sample_identity

# Goes up when the pictures of equal parameters change: what was rendered before is then rendered again.
RENDERER_VERSION = 1
SYNTHETIC_BENCHMARKS = ("synth-pose", "synth-deform", "synth-lowres")
_MOTION_BLURS = (0, 6, 12, 18)  # pixels, as in the paper
_PEOPLE_PER_PAIR = 8  # one person and seven strangers, of whom the most alike makes the different pair


def _encode(image: Image, quality: int = 95) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444", fastdct=False))


def _mild_factors(rng: np.random.Generator) -> Factors:
    """A photograph that is easy in every way: the start of all the others."""
    return Factors(
        yaw_degrees=float(np.clip(rng.normal(0, 10), -25, 25)),
        expression=float(rng.beta(1, 4)),
        expression_kind=int(rng.integers(len(EXPRESSIONS))),
        illumination=float(np.clip(rng.normal(0, 0.25), -0.6, 0.6)),
        light_angle_degrees=float(rng.uniform(-180, 180)),
        noise=float(rng.uniform(0, 4)),
        shift_x_px=float(rng.normal(0, 0.8)),
        shift_y_px=float(rng.normal(0, 0.8)),
        scale=float(np.clip(rng.normal(1, 0.015), 0.95, 1.05)),
        roll_degrees=float(rng.normal(0, 2)),
    )


def _wild_factors(rng: np.random.Generator) -> Factors:
    """Mostly moderate, sometimes hard in a way or two, like photographs found on the web."""
    factors = _mild_factors(rng)
    # Every draw is made whether it is used or not, so that one choice does not shift the others.
    hard = rng.uniform(size=6) < (0.35, 0.2, 0.2, 0.15, 0.15, 0.3)
    return replace(
        factors,
        yaw_degrees=float(rng.uniform(-80, 80)) if hard[0] else factors.yaw_degrees,
        expression=float(rng.uniform(0.4, 1)) if hard[1] else factors.expression,
        illumination=float(rng.uniform(-0.9, 0.9)) if hard[2] else factors.illumination,
        occlusion=float(rng.uniform(0.1, 0.45)) if hard[3] else 0.0,
        occlusion_kind=int(rng.integers(len(OCCLUSIONS))),
        motion_blur_px=int(rng.choice(_MOTION_BLURS[1:])) if hard[4] else 0,
        resolution_px=int(rng.integers(20, 80)) if hard[5] else SIDE,
        noise=float(rng.uniform(4, 16)) if hard[4] else factors.noise,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticFaces:
    """Images grouped by person: index i shows person i // images_per_identity; everything follows from the seed."""

    num_identities: int
    images_per_identity: int
    seed: int = 0
    first_identity: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_identities", 1), ("images_per_identity", 1), ("seed", 0), ("first_identity", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"SyntheticFaces.{name} must be at least {least}, got {getattr(self, name)}")

    def __len__(self) -> int:
        return self.num_identities * self.images_per_identity

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} images")
        return index

    def label(self, index: int) -> int:
        """The person's class, 0..num_identities - 1."""
        return self._checked(index) // self.images_per_identity

    def factors(self, index: int) -> Factors:
        """How image `index` was taken."""
        return _wild_factors(np.random.default_rng([self.seed, self.first_identity, self._checked(index), 1]))

    def image(self, index: int) -> Image:
        """RGB uint8 [112, 112, 3]."""
        person = sample_identity(self.seed, self.first_identity + self.label(index))
        return render_face(person, self.factors(index), _noise_seed(self.seed, self.first_identity, index))

    def encoded(self, index: int, quality: int = 95) -> bytes:
        """The image as JPEG."""
        return _encode(self.image(index), quality)


def _noise_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _pair_factors(name: str, rng: np.random.Generator) -> tuple[Factors, Factors]:
    first, second = _mild_factors(rng), _mild_factors(rng)
    if name == "synth-pose":
        yaw = float(rng.uniform(30, 75) * rng.choice([-1, 1]))
        return replace(first, yaw_degrees=float(rng.uniform(-8, 8))), replace(second, yaw_degrees=yaw)
    if name == "synth-deform":
        strengths = rng.uniform((0.0, 0.7), (0.4, 1.0)).tolist()
        return replace(first, expression=strengths[0]), replace(second, expression=strengths[1])

    def degraded(factors: Factors) -> Factors:
        return replace(
            factors,
            resolution_px=int(rng.integers(12, 29)),
            motion_blur_px=int(rng.choice(_MOTION_BLURS)),
            noise=float(rng.uniform(3, 14)),
        )

    return degraded(first), degraded(second)


def _lookalike(seed: int, person: int) -> int:
    """The stranger nearest in colouring and hair style; else those alone would tell most different pairs apart."""
    own = sample_identity(seed, person)

    def unlike(other: int) -> float:
        stranger = sample_identity(seed, other)
        colours = np.abs(np.subtract(own.skin + own.hair, stranger.skin + stranger.hair)).sum()
        return float(colours) + 120 * (own.hair_style != stranger.hair_style)

    return min(range(person + 1, person + _PEOPLE_PER_PAIR), key=unlike)


def benchmark_pairs(
    name: str, num_pairs: int, seed: int, first_identity: int = 1_000_000
) -> tuple[list[bytes], NDArray[np.bool_]]:
    """A verification benchmark: 2 * num_pairs JPEGs (pair i: images 2i and 2i + 1), and which pairs are one person.

    Same and different alternate, so that every fold of the ten-fold protocol, which cuts the file order, has both.
    Every pair shows people of its own, numbered from `first_identity`, above any training identity.
    """
    if name not in SYNTHETIC_BENCHMARKS:
        raise ValueError(f"name must be one of {', '.join(SYNTHETIC_BENCHMARKS)}, got {name!r}")
    if num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
    images, is_same = [], np.arange(num_pairs) % 2 == 0
    for pair, same in enumerate(is_same):
        rng = np.random.default_rng([seed, SYNTHETIC_BENCHMARKS.index(name), pair, 2])
        own = first_identity + _PEOPLE_PER_PAIR * pair
        for person, factors in zip(
            (own, own if same else _lookalike(seed, own)), _pair_factors(name, rng), strict=True
        ):
            images.append(_encode(render_face(sample_identity(seed, person), factors, int(rng.integers(2**62)))))
    return images, is_same


def _labelled(images: Sequence[Image], captions: Sequence[str]) -> Image:
    """One row of the sheet: images side by side, each under a caption."""
    row = np.full((SIDE + 13, SIDE * len(images), 3), 255, np.uint8)
    for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row[13:, column * SIDE : (column + 1) * SIDE] = image
        place = (column * SIDE + 2, 10)
        cv2.putText(row, caption, place, cv2.FONT_HERSHEY_SIMPLEX, 0.34, (0, 0, 0), 1, cv2.LINE_AA)
    return row


def contact_sheet(seed: int = 0) -> Image:
    """RGB uint8: rows of people, then a row per factor swept over its range, then photographs in the wild."""
    columns = 10
    people = [sample_identity(seed, identity) for identity in range(4 * columns)]
    rows = [
        _labelled(
            [render_face(people[i], Factors(), i) for i in range(s, s + columns)],
            [f"id {s + i}" for i in range(columns)],
        )
        for s in (0, columns)
    ]
    span = np.linspace(0, 1, columns)
    sweeps = [[(f"yaw {y:.0f}", Factors(yaw_degrees=y)) for y in np.linspace(-90, 90, columns).tolist()]] * 2
    sweeps += [
        [(f"{name} {s:.1f}", Factors(expression=s, expression_kind=kind)) for s in span.tolist()]
        for kind, name in enumerate(EXPRESSIONS)
    ]
    light = np.linspace(-1, 1, columns).tolist()
    sweeps.append([(f"light {v:.1f}", Factors(illumination=v)) for v in light])
    sweeps.append(
        [(f"light +.7 @{a:.0f}", Factors(illumination=0.7, light_angle_degrees=a)) for a in range(0, 360, 36)]
    )
    sweeps += [
        [(f"{name} {s:.2f}", Factors(occlusion=s, occlusion_kind=kind)) for s in (0.75 * span).tolist()]
        for kind, name in enumerate(OCCLUSIONS)
    ]
    blurs, sizes = (0, 2, 4, 6, 8, 10, 12, 14, 16, 18), (112, 80, 64, 56, 48, 40, 32, 24, 16, 10)
    sweeps.append([(f"motion {px} px", Factors(motion_blur_px=px)) for px in blurs])
    sweeps.append([(f"{px} px", Factors(resolution_px=px)) for px in sizes])
    sweeps.append([(f"noise {s:.0f}", Factors(noise=s)) for s in (40 * span).tolist()])
    for person, sweep in zip(people[3:], sweeps, strict=False):
        rows.append(_labelled([render_face(person, factors) for _, factors in sweep], [text for text, _ in sweep]))
    wild = SyntheticFaces(num_identities=6, images_per_identity=columns, seed=seed)
    for label in range(wild.num_identities):
        of_person = range(label * columns, (label + 1) * columns)
        rows.append(_labelled([wild.image(i) for i in of_person], [f"wild id {label}"] * columns))
    return np.vstack(rows)


def main(arguments: Sequence[str]) -> int:
    """Writes the contact sheet to the path given."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m pipeline.data.synthetic OUT.png\n")
        return 2
    path = Path(arguments[0])
    encoded, png = cv2.imencode(".png", cv2.cvtColor(contact_sheet(), cv2.COLOR_RGB2BGR))
    if not encoded:
        raise RuntimeError(f"{path}: OpenCV could not encode the contact sheet")
    path.write_bytes(png.tobytes())
    sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
