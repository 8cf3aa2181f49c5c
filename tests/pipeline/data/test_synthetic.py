"""The stand-in faces: deterministic, aligned, and every factor does what its name says."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.face_renderer import EXPRESSIONS, OCCLUSIONS, Factors, landmarks, render_face, sample_identity
from pipeline.data.synthetic import SYNTHETIC_BENCHMARKS, SyntheticFaces, benchmark_pairs, contact_sheet

ARCFACE = np.array([(38.3, 51.7), (73.5, 51.5), (56.0, 71.7), (41.5, 92.4), (70.7, 92.2)])
PEOPLE = [sample_identity(3, i) for i in range(16)]

any_factors = st.builds(
    Factors,
    yaw_degrees=st.floats(-90, 90),
    expression=st.floats(0, 1),
    expression_kind=st.integers(0, len(EXPRESSIONS) - 1),
    illumination=st.floats(-1, 1),
    light_angle_degrees=st.floats(-180, 180),
    occlusion=st.floats(0, 1),
    occlusion_kind=st.integers(0, len(OCCLUSIONS) - 1),
    motion_blur_px=st.integers(0, 24),
    resolution_px=st.integers(4, 112),
    noise=st.floats(0, 40),
    shift_x_px=st.floats(-5, 5),
    scale=st.floats(0.9, 1.1),
    roll_degrees=st.floats(-20, 20),
)


def shots(factors: Factors, people=PEOPLE) -> np.ndarray:
    return np.stack([render_face(person, factors) for person in people]).astype(np.float64)


def assert_increasing(values) -> None:
    assert (np.diff(values) > 0).all(), values


@settings(max_examples=40, deadline=None)
@given(identity=st.integers(0, 2**31), factors=any_factors, noise_seed=st.integers(0, 2**62))
def test_any_face_is_a_full_image_and_always_the_same(identity, factors, noise_seed):
    person = sample_identity(0, identity)
    image = render_face(person, factors, noise_seed)
    assert image.shape == (112, 112, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, render_face(person, factors, noise_seed))


def test_a_face_does_not_depend_on_the_process_or_on_what_was_drawn_before():
    code = (
        "import hashlib;from pipeline.data.synthetic import SyntheticFaces as S;"
        "d=S(num_identities=4,images_per_identity=3,seed=5);import sys;"
        "sys.stdout.write(hashlib.sha256(b''.join(d.image(i).tobytes() for i in reversed(range(12)))).hexdigest());"
        "assert 'torch' not in sys.modules"
    )
    data = SyntheticFaces(num_identities=4, images_per_identity=3, seed=5)
    here = hashlib.sha256(b"".join([data.image(i).tobytes() for i in range(12)][::-1])).hexdigest()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == here


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("yaw_degrees", 120), ("yaw_degrees", float("nan")), ("expression", 2), ("expression", -0.1),
        ("expression_kind", len(EXPRESSIONS)), ("illumination", 1.5), ("occlusion", 1.01), ("occlusion_kind", -1),
        ("motion_blur_px", -1), ("resolution_px", 0), ("resolution_px", 113), ("noise", -1.0), ("scale", 0.0),
    ],
)  # fmt: skip
def test_a_factor_out_of_range_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        Factors(**{field: value})


def test_frontal_landmarks_follow_the_arcface_template():
    places = np.stack([landmarks(person)[0] for person in PEOPLE])
    assert np.abs(places.mean(0) - ARCFACE).max() < 1.0
    assert np.abs(places - ARCFACE).max() < 4.5


def test_the_drawing_has_its_eyes_nostrils_and_mouth_where_the_landmarks_say():
    grey = shots(Factors(), people=[sample_identity(9, i) for i in range(60)]).mean(axis=(0, 3))
    for x, y in ARCFACE[:2]:
        window = grey[35:70, int(x) - 12 : int(x) + 13]
        # Irises are the darkest thing between brow and cheek, on average over people.
        row, column = np.unravel_index(np.argmin(window[11:23]), window[11:23].shape)
        assert abs(row + 46 - y) < 3
        assert abs(column + int(x) - 12 - x) < 3
    lips = grey[82:102, 44:69].mean(1)
    assert abs(82 + int(np.argmin(lips)) - 92.3) < 3


def test_the_face_fills_the_middle_and_the_background_the_corners():
    # Only the background changes much with the noise seed.
    spread = np.stack(
        [
            np.std([render_face(p, Factors(), seed).astype(float) for seed in range(6)], axis=0).max(axis=2)
            for p in PEOPLE
        ]
    ).mean(axis=0)
    assert spread[20:105, 36:76].max() < 40
    assert spread[96:, :6].mean() > 1.5 * spread[20:105, 36:76].mean()
    assert spread[96:, -6:].mean() > 1.5 * spread[20:105, 36:76].mean()


@settings(max_examples=25, deadline=None)
@given(identity=st.integers(0, 10_000))
def test_a_yaw_brings_one_pair_of_features_together_and_the_opposite_yaw_the_other(identity):
    person = sample_identity(0, identity)
    width = {yaw: np.diff(landmarks(person, yaw)[0][:2, 0])[0] for yaw in (-75, -40, 0, 40, 75)}
    assert width[0] > width[40] > width[75]
    assert width[0] > width[-40] > width[-75]
    nose = [landmarks(person, yaw)[0][2, 0] for yaw in (-90, -60, -30, 0, 30, 60, 90)]
    assert_increasing(nose)  # a positive yaw turns the nose to the right


def test_a_growing_yaw_leaves_less_of_the_picture_alike():
    front = shots(Factors())
    away = [np.abs(shots(Factors(yaw_degrees=yaw)) - front).mean() for yaw in (5, 15, 30, 50, 75)]
    assert_increasing(away)


def test_the_far_eye_disappears_and_the_near_one_stays():
    def iris_area(yaw: float, eye: int) -> float:
        total = 0
        for person in PEOPLE:  # what changes with the colour of the iris is iris
            colours = ((0.0, 0.0, 0.0), (0.0, 250.0, 250.0))
            black, blue = (render_face(replace(person, iris=c), Factors(yaw_degrees=yaw)).astype(int) for c in colours)
            counts, changed = (np.abs(black - blue).max(axis=2) > 15).sum(axis=0), np.arange(112)
            x = landmarks(person, yaw)[0][:2, 0]
            total += counts[np.abs(changed - x[eye]) < np.abs(changed - x[1 - eye])].sum()
        return total / len(PEOPLE)

    for turn, far in ((1, 1), (-1, 0)):
        assert_increasing([iris_area(turn * yaw, far) for yaw in (60, 45, 25, 0)])
        assert iris_area(turn * 75, far) < 0.1 * iris_area(0, far)
        assert iris_area(turn * 50, 1 - far) > 1.5 * iris_area(turn * 50, far)
        assert iris_area(turn * 90, 1 - far) > 2


def test_a_profile_has_a_protruding_nose():
    for person in PEOPLE[:8]:
        # The background is what differs between pictures of one head.
        pictures = np.stack([render_face(person, Factors(yaw_degrees=90), seed) for seed in range(8)])
        head = pictures.astype(float).std(axis=0).max(axis=2) < 30
        tip = round(landmarks(person, 90)[0][2, 1])
        tip_edge, lip_edge = (int(np.argmin(head[row, 56:])) for row in (tip - 1, tip + 9))
        assert tip_edge > lip_edge + 2


@pytest.mark.parametrize("kind", range(len(EXPRESSIONS)))
def test_a_stronger_expression_moves_more_pixels(kind):
    rest = shots(Factors())
    moved = [np.abs(shots(Factors(expression=s, expression_kind=kind)) - rest).mean() for s in (0.2, 0.5, 0.8, 1.0)]
    assert moved[0] > 0
    assert_increasing(moved)


@pytest.mark.parametrize("angle", [0.0, 90.0, 200.0])
def test_more_illumination_is_a_brighter_picture(angle):
    levels = (-1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0)
    assert_increasing([shots(Factors(illumination=v, light_angle_degrees=angle)).mean() for v in levels])


def test_the_light_comes_from_its_angle():
    right, left = (shots(Factors(illumination=0.5, light_angle_degrees=a))[:, 60:90] for a in (90.0, -90.0))
    assert right[:, :, 62:85].mean() > left[:, :, 62:85].mean() + 8
    assert left[:, :, 27:50].mean() > right[:, :, 27:50].mean() + 8


@pytest.mark.parametrize("kind", range(len(OCCLUSIONS)))
def test_more_occlusion_covers_a_larger_area(kind):
    clear = shots(Factors())
    shares = (0.1, 0.25, 0.4, 0.6, 0.8)
    area = []
    for share in shares:
        covered = np.abs(shots(Factors(occlusion=share, occlusion_kind=kind)) - clear).max(axis=3) > 6
        area.append(covered[:, 10:110, 18:94].mean())
    assert_increasing(area)
    assert all(0.4 * share < part < 2.2 * share for part, share in zip(area, shares, strict=True)), area


def test_a_longer_motion_blur_leaves_less_horizontal_detail_and_spares_the_vertical():
    across = [np.abs(np.diff(shots(Factors(motion_blur_px=px)), axis=2)).mean() for px in (18, 12, 6, 0)]
    assert_increasing(across)
    sharp, blurred = (np.abs(np.diff(shots(Factors(motion_blur_px=px)), axis=1)).mean() for px in (0, 12))
    assert blurred / sharp > 1.25 * across[1] / across[3]


def test_a_lower_resolution_has_less_fine_detail():
    def fine(side: int) -> float:
        images = shots(Factors(resolution_px=side)).astype(np.uint8)
        return float(np.mean([np.abs(cv2.Laplacian(image, cv2.CV_32F)).mean() for image in images]))

    assert_increasing([fine(side) for side in (8, 16, 28, 56, 84, 112)])


def test_noise_has_the_stated_sigma():
    for sigma in (3.0, 10.0):
        added = shots(Factors(noise=sigma)) - shots(Factors())
        middle = added[:, 40:80, 40:72]  # away from black and white, where noise is cut off
        assert middle.std() == pytest.approx(sigma, rel=0.15)


def test_one_person_in_two_moderate_shots_is_nearer_than_two_people():
    data = SyntheticFaces(num_identities=60, images_per_identity=2)
    gentle = [replace(data.factors(i), yaw_degrees=5.0 * (i % 2), occlusion=0.0, illumination=0.0) for i in range(120)]
    faces = np.stack(
        [render_face(sample_identity(0, i // 2), f, 0)[15:110, 20:92].astype(np.float64) for i, f in enumerate(gentle)]
    )
    same = np.abs(faces[::2] - faces[1::2]).mean(axis=(1, 2, 3))
    other = np.abs(faces[::2] - np.roll(faces[1::2], 1, axis=0)).mean(axis=(1, 2, 3))
    assert other.mean() > 1.3 * same.mean()
    assert (other > same).mean() > 0.75


def test_no_one_colour_tells_people_apart():
    # Skin and hair come from continua shared by everybody: many pairs of people are closer than one person's light.
    skins = np.array([sample_identity(0, i).skin for i in range(200)])
    gaps = np.abs(skins[:, None] - skins[None]).max(axis=2) + 1e9 * np.eye(200)
    assert np.median(gaps.min(axis=1)) < 8


@settings(max_examples=30, deadline=None)
@given(people=st.integers(1, 50), shots_each=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_a_data_set_is_grouped_by_person_and_follows_from_its_seed(people, shots_each, seed, data):
    faces = SyntheticFaces(num_identities=people, images_per_identity=shots_each, seed=seed)
    index = data.draw(st.integers(0, len(faces) - 1))
    assert len(faces) == people * shots_each
    assert faces.label(index) == index // shots_each
    again = SyntheticFaces(num_identities=people, images_per_identity=shots_each, seed=seed)
    assert faces.factors(index) == again.factors(index)
    assert faces.encoded(index) == again.encoded(index)
    for outside in (-1, len(faces)):
        for method in (faces.label, faces.factors, faces.image):
            with pytest.raises(IndexError, match=str(outside)):
                method(outside)


def test_training_photographs_are_mostly_moderate_and_sometimes_hard():
    data = SyntheticFaces(num_identities=100, images_per_identity=10)
    taken = [data.factors(i) for i in range(len(data))]
    assert len(set(taken)) == len(taken)
    yaw = np.abs([f.yaw_degrees for f in taken])
    assert 0.5 < (yaw < 20).mean() < 0.85
    assert (yaw > 45).mean() > 0.08
    for name, clean in (("occlusion", 0.0), ("motion_blur_px", 0), ("resolution_px", 112)):
        assert 0.05 < np.mean([getattr(f, name) != clean for f in taken]) < 0.45


def test_a_jpeg_is_the_image_within_compression():
    data = SyntheticFaces(num_identities=3, images_per_identity=2)
    for index in range(len(data)):
        decoded = simplejpeg.decode_jpeg(data.encoded(index), "RGB").astype(int)
        assert np.abs(decoded - data.image(index)).mean() < 4
    assert len(data.encoded(0, quality=40)) < len(data.encoded(0))


@pytest.mark.parametrize(("field", "value"), [("num_identities", 0), ("images_per_identity", 0), ("seed", -1)])
def test_a_data_set_of_nothing_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        SyntheticFaces(**{"num_identities": 2, "images_per_identity": 2, field: value})


@pytest.mark.parametrize("name", SYNTHETIC_BENCHMARKS)
def test_every_tenth_of_a_benchmark_has_both_kinds_and_every_image_decodes(name):
    images, is_same = benchmark_pairs(name, 40, seed=1)
    assert len(images) == 80
    assert is_same.dtype == np.bool_
    assert is_same.sum() == 20
    assert all(fold.sum() == 2 for fold in np.split(is_same, 10))
    assert {simplejpeg.decode_jpeg(image, "RGB").shape for image in images} == {(112, 112, 3)}
    assert len(set(images)) == len(images)
    again, _ = benchmark_pairs(name, 40, seed=1)
    assert images == again
    assert images != benchmark_pairs(name, 40, seed=2)[0]


def test_an_unknown_benchmark_or_no_pair_is_refused_with_what_is_possible():
    with pytest.raises(ValueError, match=r"synth-pose, synth-deform, synth-lowres.*'lfw'"):
        benchmark_pairs("lfw", 10, 0)
    with pytest.raises(ValueError, match=r"num_pairs.*0"):
        benchmark_pairs("synth-pose", 0, 0)


def test_the_contact_sheet_is_written_by_the_module(tmp_path):
    sheet = contact_sheet()
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 1120
    out = tmp_path / "sheet.png"
    subprocess.run([sys.executable, "-m", "pipeline.data.synthetic", str(out)], check=True, capture_output=True)
    assert np.array_equal(cv2.cvtColor(cv2.imread(str(out)), cv2.COLOR_BGR2RGB), sheet)
    assert subprocess.run([sys.executable, "-m", "pipeline.data.synthetic"], capture_output=True).returncode == 2
