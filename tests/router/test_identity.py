"""Which images and which features are the same: everything that changes them, and nothing else."""

import pytest

from protos.vision_pb2 import (
    VIR_MODE_AUTO,
    VIR_MODE_FORCE64,
    VIR_MODE_OFF,
    VIR_SCOPE_ABSOLUTE,
    VIR_SCOPE_IMAGE,
    VIR_SCOPE_REQUEST,
    TilingOptions,
    VirOptions,
)
from router.identity import hash_features, hash_image

TILING = {"min_dynamic_patch": 1, "max_dynamic_patch": 12, "use_thumbnail": True}
AUTO = {"mode": VIR_MODE_AUTO, "scope": VIR_SCOPE_IMAGE, "relative_threshold": 0.5, "absolute_threshold": 0.25}
A, B, C = (bytes([letter]) * 32 for letter in b"abc")


def image(data=b"image", tile_size=448, scope="", **tiling):
    return hash_image(data, TilingOptions(**{**TILING, **tiling}), tile_size, scope)


def features(image_hash=A, request=(A,), **vir):
    return hash_features(image_hash, VirOptions(**{**AUTO, **vir}), request)


def test_an_image_is_its_bytes_its_tiling_and_its_tenant():
    others = [
        image(b"imagE"),
        image(tile_size=224),
        image(scope="tenant"),
        image(min_dynamic_patch=2),
        image(max_dynamic_patch=13),
        image(use_thumbnail=False),
        image(exif_orientation=True),
        image(num_frames=8),
        image(num_frames=9),
    ]
    assert image() == image()
    assert len({image(), *others}) == 1 + len(others)
    assert all(len(hash_) == 32 for hash_ in others)


def test_a_base_model_knows_no_other_features():
    assert hash_features(A, None, [A, B]) == A


def test_features_of_a_flash_model_are_never_taken_for_tiles():
    assert features() != A
    assert len(features()) == 32


@pytest.mark.parametrize("mode", [VIR_MODE_OFF, VIR_MODE_FORCE64])
def test_a_forced_mode_has_no_thresholds_and_no_scope(mode):
    others = [
        features(mode=mode, relative_threshold=0.1),
        features(mode=mode, absolute_threshold=0.1),
        features(mode=mode, scope=VIR_SCOPE_ABSOLUTE),
        features(mode=mode, scope=VIR_SCOPE_REQUEST, request=[A, B]),
    ]
    assert set(others) == {features(mode=mode)}
    assert features(mode=mode) != features()


def test_modes_differ():
    assert len({features(mode=mode) for mode in (VIR_MODE_OFF, VIR_MODE_AUTO, VIR_MODE_FORCE64)}) == 3


def test_scope_image_depends_on_both_thresholds_and_on_no_other_image():
    assert len({features(), features(relative_threshold=0.1), features(absolute_threshold=0.1)}) == 3
    assert features(request=[A, B]) == features()
    assert features(B) != features(A)


def test_scope_absolute_has_no_relative_threshold():
    absolute = {"scope": VIR_SCOPE_ABSOLUTE}
    assert features(**absolute, relative_threshold=0.1) == features(**absolute, request=[A, B])
    assert features(**absolute, absolute_threshold=0.1) != features(**absolute)
    assert features(**absolute) != features()


def test_scope_request_depends_on_which_images_there_are_and_not_on_their_order():
    def of(*request):
        return features(scope=VIR_SCOPE_REQUEST, request=request)

    assert of(A, B) == of(B, A)
    assert len({of(A, B), of(A, C), of(A, B, C), of(A, A, B), of(A, B, B)}) == 5
    assert features(scope=VIR_SCOPE_REQUEST, request=(A, B), relative_threshold=0.1) != of(A, B)
    assert features(B, scope=VIR_SCOPE_REQUEST, request=(A, B)) != of(A, B)


def test_a_threshold_of_the_client_is_that_of_the_checkpoint():
    """What JSON says in double precision, and what came over the wire in single precision."""
    known = VirOptions(relative_threshold=0.1)
    assert features(relative_threshold=0.1) == features(relative_threshold=known.relative_threshold)
