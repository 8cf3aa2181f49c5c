"""A survey looks at some shards, evenly spread, and counts what is in them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import storage
from pipeline.data.images import decode_rgb
from pipeline.data.shards import ShardError
from pipeline.data.survey import spread, survey
from pipeline.errors import message, user_error
from tests.pipeline.data.test_verify import remade, samples
from tests.pipeline.data.writers import jpeg, label_of, packed_set

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@given(num_shards=st.integers(1, 500), wanted=st.integers(1, 600))
def test_shards_are_chosen_evenly_from_the_first_to_the_last(num_shards, wanted):
    numbers = spread(num_shards, wanted)
    assert len(numbers) == min(num_shards, wanted)
    assert numbers[0] == 0
    assert all(0 <= number < num_shards for number in numbers)
    gaps = np.diff(numbers)
    if len(numbers) > 1:
        assert numbers[-1] == num_shards - 1
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


def test_a_survey_of_all_shards_counts_every_image(tmp_path):
    manifest = packed_set(tmp_path, [4, 4, 3])
    seen: list[tuple[int, int]] = []
    found = survey(manifest, None, lambda done, total: seen.append((done, total)))
    assert found.is_whole
    assert found.shards == (0, 1, 2)
    assert found.samples_per_identity == np.bincount([label_of(i) for i in range(11)], minlength=5).tolist()
    assert found.statistics.count == 11
    assert found.statistics.total_bytes == sum(len(jpeg(i)) for i in range(11))
    assert found.statistics.sizes == {"112x112": 11}
    assert found.statistics.colours == {"colour": 11}
    grey = [decode_rgb(jpeg(i)) @ np.array([0.299, 0.587, 0.114]) for i in range(11)]
    brightness, _ = np.histogram([image.mean() for image in grey], 32, (0, 256))
    contrast, _ = np.histogram([image.std() for image in grey], 32, (0, 128))
    assert found.statistics.brightness == brightness.tolist()
    assert found.statistics.contrast == contrast.tolist()
    assert seen[-1] == (3, 3)


def test_a_survey_of_some_shards_is_about_these_alone(tmp_path):
    manifest = packed_set(tmp_path, [4, 4, 4, 4, 2])
    (tmp_path / "shard-000001.tar").unlink()  # is not read
    found = survey(manifest, 3)
    assert (found.shards, found.num_shards, found.is_whole) == ((0, 2, 4), 5, False)
    indices = [*range(4), *range(8, 12), *range(16, 18)]
    assert found.samples_per_identity == np.bincount([label_of(i) for i in indices], minlength=5).tolist()


def test_images_that_cannot_be_decoded_are_counted_and_named(tmp_path):
    content = samples(0, 5)
    content[2] = ("000000002", b"nothing", b"2")
    buffer = io.BytesIO()
    Image.fromarray(np.full((90, 80), 100, np.uint8)).save(buffer, "PNG")
    content[3] = ("000000003", buffer.getvalue(), b"3")
    found = survey(remade(tmp_path, [content]))
    assert found.num_unreadable == 1
    assert found.unreadable_examples[0][:2] == ("shard-000000.tar", "000000002")
    assert "not a readable image (7 bytes)" in found.unreadable_examples[0][2]
    assert found.statistics.count == 5
    assert found.statistics.sizes == {"112x112": 3, "80x90": 1}
    assert found.statistics.colours == {"colour": 3, "grey": 1}


def test_a_damaged_shard_ends_a_survey(tmp_path):
    manifest = packed_set(tmp_path, [4, 4])
    storage.write_bytes(manifest.shard_uri(1), b"short")
    with pytest.raises(Exception, match=r"shard-000001\.tar") as caught:
        survey(manifest)
    error = user_error(caught.value)
    assert isinstance(error, ShardError)
    assert message(error).startswith(f"{manifest.shard_uri(1)}: truncated or altered: 5 bytes")


def test_a_survey_of_no_shards_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_shards=0 must be greater than 0"):
        survey(packed_set(tmp_path, [4]), 0)
