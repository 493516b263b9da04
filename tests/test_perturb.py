"""Laws of the perturbation suite. Pixels are (height, width, 3) in levels of 0 to 255."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cppo.perturb import PRESERVING, REMOVING, contact_sheet, perturb, to_rgb, view_seed

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
NAMES = [*PRESERVING, *REMOVING]
ALIKE_IN_EVERY_DRAW = {"gaussian_blur", "blackout", "heavy_blur"}
MODES = (
    *("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"),
    *("LAB", "I", "F", "I;16", "I;16B", "I;16L"),
)
SIZES = [(1, 1), (1, 9), (9, 1), (3, 2), (33, 20)]


def pixels(image: Image.Image) -> NDArray[np.float64]:
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.float64)


def plain(level: int, width: int = 100, height: int = 100) -> Image.Image:
    return Image.new("RGB", (width, height), (level, level, level))


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image of `mode` with arbitrary content in every channel."""
    rng = np.random.default_rng([width, height])
    if mode.startswith("I;16"):
        raw = rng.integers(0, 65536, (height, width), dtype=np.uint16)
        order = ">u2" if mode == "I;16B" else "<u2"
        return Image.frombytes(mode, (width, height), raw.astype(order).tobytes())
    if mode == "I":
        return Image.fromarray(rng.integers(-(2**31), 2**31, (height, width), dtype=np.int32))
    if mode == "F":
        return Image.fromarray(rng.normal(0, 1e5, (height, width)).astype(np.float32))
    if mode == "P":
        image = noise(width, height).quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
        return image
    bands = len(Image.new(mode, (1, 1)).getbands())
    count = width * height * bands if mode != "1" else (width + 7) // 8 * height
    return Image.frombytes(mode, (width, height), rng.bytes(count))


def gradient(side: int = 256) -> Image.Image:
    """Red tells the column, green the row: a pixel says where it came from."""
    row, column = np.mgrid[:side, :side]
    return Image.fromarray(np.stack([column, row, 0 * row], axis=-1).astype(np.uint8))


def origin_of(view: Image.Image, margin: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrix and offset from a view of `gradient` back to it, fitted `margin` away from the rim."""
    inner = pixels(view)[margin:-margin, margin:-margin]
    row, column = np.mgrid[margin : view.height - margin, margin : view.width - margin]
    here = np.stack([column.ravel(), row.ravel(), np.ones(row.size)], axis=1)
    fit, *_ = np.linalg.lstsq(here, inner[..., :2].reshape(-1, 2), rcond=None)
    return fit[:2].T, fit[2]


def digests() -> dict[str, str]:
    """One digest a view: of what a process makes of fixed arguments."""
    image = noise(45, 31, "RGBA")
    views = {name: perturb(image, name, view_seed(5, "item", name, 2)) for name in NAMES}
    return {name: hashlib.sha256(view.tobytes()).hexdigest() for name, view in views.items()}


# Determinism.


def test_a_view_is_the_same_in_another_process_that_imports_only_numpy_and_pillow() -> None:
    program = (
        "import json, sys; sys.path.insert(0, 'tests'); import cppo.perturb;"
        "foreign = [m for m in sys.modules if m.split('.')[0] in ('torch', 'scipy', 'transformers')"
        " or m.startswith('cppo.') and m != 'cppo.perturb'];"
        "import test_perturb; print(json.dumps([foreign, test_perturb.digests()]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    foreign, theirs = json.loads(answer.stdout)
    assert foreign == []
    assert theirs == digests()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes_and_other_seeds_others(name: str) -> None:
    image = noise(40, 30)
    certain = {"probability": 1} if name == "perspective" else {}
    views = [perturb(image, name, seed, **certain).tobytes() for seed in range(8)]
    assert views == [perturb(image, name, seed, **certain).tobytes() for seed in range(8)]
    different = len(set(views))
    assert different == 1 if name in ALIKE_IN_EVERY_DRAW else different >= 7  # JPEG: 41 qualities


@pytest.mark.parametrize("name", NAMES)
def test_perturb_is_the_function_of_that_name_with_a_generator_of_that_seed(name: str) -> None:
    image = noise(40, 30)
    direct = (PRESERVING | REMOVING)[name](image, np.random.default_rng(3))
    assert direct.tobytes() == perturb(image, name, 3).tobytes()


def test_a_view_seed_depends_on_run_item_view_and_step_and_never_changes() -> None:
    assert view_seed(7, "geometry/12", "removed", 3) == 961075157896738498
    neighbours = [
        *((7, "geometry/12", "removed", 3), (8, "geometry/12", "removed", 3)),
        *((7, "geometry/13", "removed", 3), (7, "geometry/12", "preserved", 3)),
        *((7, "geometry/12", "removed", 4), (7, 'geometry/12", "removed', "", 3)),
        *((7, "geometry/12removed", "", 3), (73, "geometry/12", "removed", 0)),
    ]
    assert len({view_seed(*neighbour) for neighbour in neighbours}) == len(neighbours)
    seeds = [view_seed(0, str(item), "removed", 0) for item in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert np.mean([seed % 2 for seed in seeds]) == pytest.approx(0.5, abs=0.06)


# Any image.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_mode_and_size_gives_rgb_of_that_size_and_leaves_the_input_alone(
    name: str, mode: str
) -> None:
    for size in SIZES:
        image = noise(*size, mode)
        before = image.tobytes(), image.mode, dict(image.info)
        view = perturb(image, name, 1)
        assert (view.mode, view.size) == ("RGB", size)
        assert view.tobytes() == perturb(to_rgb(image), name, 1).tobytes()
        view.paste((1, 2, 3), (0, 0, *size))
        assert (image.tobytes(), image.mode, image.info) == before


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    mode=st.sampled_from(MODES),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    seed=st.integers(0, 2**63 - 1),
)
def test_no_size_mode_or_seed_is_too_odd(
    name: str, mode: str, width: int, height: int, seed: int
) -> None:
    view = perturb(noise(width, height, mode), name, seed)
    assert (view.mode, view.size) == ("RGB", (width, height))


def test_an_opaque_rgb_image_is_its_own_rgb() -> None:
    image = noise(5, 4)
    assert to_rgb(image) is image


def single(mode: str, value: object, dtype: str = "float32") -> tuple[int, ...]:
    """What a pixel of one-channel `mode` becomes, beside the ends that `value` holds."""
    values = np.array([value], dtype=dtype)
    image = Image.frombytes(mode, (values.shape[1], 1), values.tobytes())
    result = pixels(to_rgb(image))[0]
    assert (result == result[:, :1]).all()  # grey
    return tuple(int(level) for level in result[:, 0])


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I;16L", "<u2")])
def test_sixteen_bit_levels_are_divided_by_257(mode: str, dtype: str) -> None:
    assert single(mode, [0, 128, 129, 257, 25700, 32768, 65535], dtype) == (
        *(0, 0, 1, 1, 100, 128, 255),
    )


def test_levels_of_modes_without_a_scale_are_read_by_their_range() -> None:
    assert single("I", [0, 100, 255], "int32") == (0, 100, 255)
    assert single("I", [0, 25700, 65535], "int32") == (0, 100, 255)
    assert single("I", [-300, 0, 300], "int32") == (0, 128, 255)
    assert single("I", [0, 100_000], "int32") == (0, 255)
    assert single("F", [0.0, 0.5, 1.0]) == (0, 128, 255)
    assert single("F", [0.0, 100.4, 255.0]) == (0, 100, 255)
    assert single("F", [0.0, 25700.0]) == (0, 100)
    assert single("F", [-1.0, 0.0, 1.0]) == (0, 128, 255)
    assert single("F", [math.nan, -math.inf, 255.0, math.inf]) == (0, 0, 255, 255)
    assert single("F", [math.nan]) == (0,)
    assert single("F", [-7.0, -7.0]) == (0, 0)


def test_transparent_parts_lie_on_white() -> None:
    def colour(image: Image.Image) -> tuple[int, ...]:
        return to_rgb(image).getpixel((0, 0))  # type: ignore[return-value]

    assert colour(Image.new("RGBA", (1, 1), (200, 0, 0, 0))) == (255, 255, 255)
    assert colour(Image.new("RGBA", (1, 1), (200, 0, 0, 255))) == (200, 0, 0)
    assert colour(Image.new("RGBA", (1, 1), (0, 0, 0, 51))) == (204, 204, 204)
    assert colour(Image.new("LA", (1, 1), (0, 51))) == (204, 204, 204)
    assert colour(Image.new("La", (1, 1), (0, 51))) == (204, 204, 204)
    assert colour(Image.new("RGBa", (1, 1), (0, 0, 0, 51))) == (204, 204, 204)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert pixels(to_rgb(palette)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    palette.info["transparency"] = bytes([255, 0])
    assert pixels(to_rgb(palette)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    keyed = Image.new("RGB", (1, 1), (1, 2, 3))
    keyed.info["transparency"] = (1, 2, 3)
    assert colour(keyed) == (255, 255, 255)


def test_colour_spaces_are_converted() -> None:
    assert pixels(to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))).tolist() == [[[255, 0, 0]]]
    assert pixels(to_rgb(Image.new("1", (1, 1), 1))).tolist() == [[[255, 255, 255]]]
    assert pixels(to_rgb(Image.new("HSV", (1, 1), (0, 255, 255)))).tolist() == [[[255, 0, 0]]]
    lab_grey = pixels(to_rgb(Image.new("LAB", (1, 1), (128, 128, 128))))
    assert np.ptp(lab_grey) <= 2
    assert lab_grey.mean() == pytest.approx(119, abs=3)  # L* = 50 is sRGB 119


# Preserving.


def test_colour_factors_of_one_change_nothing_and_others_do_what_they_say() -> None:
    image = noise(20, 20)
    still = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1)}
    assert perturb(image, "colour_jitter", 0, **still).tobytes() == image.tobytes()
    half = pixels(perturb(image, "colour_jitter", 0, **{**still, "brightness": (0.5, 0.5)}))
    np.testing.assert_allclose(half, pixels(image) / 2, atol=1)
    flat = pixels(perturb(image, "colour_jitter", 0, **{**still, "contrast": (0, 0)}))
    assert np.ptp(flat) == 0
    assert flat[0, 0, 0] == pytest.approx(np.asarray(image.convert("L")).mean(), abs=1)
    grey = pixels(perturb(image, "colour_jitter", 0, **{**still, "saturation": (0, 0)}))
    np.testing.assert_array_equal(grey[..., 0], np.asarray(image.convert("L")))
    assert (grey == grey[..., :1]).all()


def test_colour_changes_come_in_every_order() -> None:
    fixed = {"brightness": (1.3, 1.3), "contrast": (0.5, 0.5), "saturation": (1.8, 1.8)}
    views = {perturb(noise(20, 20), "colour_jitter", s, **fixed).tobytes() for s in range(60)}
    assert len(views) == 6


def test_default_brightness_spans_the_published_range() -> None:
    still = {"contrast": (1, 1), "saturation": (1, 1)}
    levels = [
        pixels(perturb(plain(100, 4, 4), "colour_jitter", seed, **still)).mean()
        for seed in range(300)
    ]
    assert 20 <= min(levels) < 24
    assert 126 < max(levels) <= 130


def test_rotation_turns_about_the_centre_within_its_bounds() -> None:
    angles = []
    for seed in range(60):
        back, offset = origin_of(perturb(gradient(), "rotation", seed), margin=60)
        np.testing.assert_allclose(back.T @ back, np.eye(2), atol=0.01)  # no scale, no shear
        np.testing.assert_allclose(back @ [127.5, 127.5] + offset, 127.5, atol=0.6)
        angles.append(math.degrees(math.atan2(back[1, 0], back[0, 0])))
    assert -10.2 <= min(angles) < -8
    assert 8 < max(angles) <= 10.2


def test_affine_stays_within_its_bounds() -> None:
    found = []
    for seed in range(60):
        back, offset = origin_of(perturb(gradient(), "affine", seed), margin=70)
        forward = np.linalg.inv(back)
        scale = math.hypot(*forward[:, 0])
        turn = math.degrees(math.atan2(forward[1, 0], forward[0, 0]))
        assert np.linalg.det(forward) == pytest.approx(scale**2, abs=0.01)
        slant = math.degrees(math.atan(forward[:, 0] @ forward[:, 1] / scale**2))
        shift = (forward @ (127.5 - offset) - 127.5) / 256
        found.append((scale, turn, slant, *shift))
    least, greatest = np.min(found, axis=0), np.max(found, axis=0)
    assert (least >= [0.895, -5.1, -5.1, -0.053, -0.053]).all()
    assert (greatest <= [1.005, 5.1, 5.1, 0.053, 0.053]).all()
    assert (least < [0.92, -4, -4, -0.04, -0.04]).all()
    assert (greatest > [0.98, 4, 4, 0.04, 0.04]).all()


def test_no_change_asked_is_no_change() -> None:
    image = noise(31, 20)
    still: list[tuple[str, dict[str, object]]] = [
        ("rotation", {"degrees": 0}),
        ("perspective", {"distortion": 0, "probability": 1}),
        ("perspective", {"probability": 0}),
        ("affine", {"degrees": 0, "shear_degrees": 0, "shift_share": 0, "scale": (1, 1)}),
        ("gaussian_noise", {"sigma_levels": 0}),
        ("gaussian_blur", {"kernel_pixels": 1}),
        ("patch_mask", {"ratio": 0}),
        ("zoom_crop", {"side_share": (1, 1)}),
        ("crop_out", {"area_share": 0}),
        ("heavy_blur", {"sigma_share": 0}),
        ("heavy_noise", {"signal_power": 1}),
    ]
    for name, parameters in still:
        assert perturb(image, name, 4, **parameters).tobytes() == image.tobytes(), name


def test_perspective_moves_corners_inwards_by_at_most_a_tenth_and_loses_nothing() -> None:
    image = gradient()
    blue = Image.merge("RGB", (*image.split()[:2], Image.new("L", image.size, 255)))
    least_inside = []
    for seed in range(40):
        view = pixels(perturb(blue, "perspective", seed, probability=1, fill="black"))
        inside = view[..., 2] == 255
        assert inside[27:-27, 27:-27].all()
        for red, green in [(0, 0), (255, 0), (0, 255), (255, 255)]:
            off = abs(view[..., 0] - red) + abs(view[..., 1] - green)
            row, column = np.unravel_index(np.where(inside, off, 999).argmin(), inside.shape)
            assert off[row, column] <= 6  # the corner is still in the picture, near where it was
            assert abs(column - red) <= 27
            assert abs(row - green) <= 27
        least_inside.append(inside.mean())
    assert 0.62 < min(least_inside) < 0.85  # 0.64 where every corner moves all the way


def test_perspective_leaves_half_of_the_images_alone() -> None:
    image = noise(16, 16)
    alone = [perturb(image, "perspective", s).tobytes() == image.tobytes() for s in range(400)]
    assert np.mean(alone) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("name", ["rotation", "perspective", "affine"])
def test_uncovered_parts_take_the_border_colour_or_black(name: str) -> None:
    certain = {"probability": 1} if name == "perspective" else {}
    image = Image.new("RGB", (60, 60), (250, 240, 230))
    image.paste((250, 0, 0), (10, 10, 50, 50))
    blackest = []
    for seed in range(8):
        view = pixels(perturb(image, name, seed, **certain))
        assert view[..., 0].min() == 250  # nothing but page and square, however it was moved
        assert view[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [[250, 240, 230]] * 4
        blackest.append(pixels(perturb(image, name, seed, fill="black", **certain)).max(-1).min())
    assert min(blackest) == 0


def test_gaussian_noise_has_the_deviation_asked_for_and_no_bias() -> None:
    for sigma in (12.0, 30.0):
        added = pixels(perturb(plain(128), "gaussian_noise", 0, sigma_levels=sigma)) - 128
        assert added.std() == pytest.approx(sigma, rel=0.02)
        assert added.mean() == pytest.approx(0, abs=sigma / 50)
        assert np.corrcoef(added[..., 0].ravel(), added[..., 1].ravel())[0, 1] < 0.05
    default = pixels(perturb(plain(128), "gaussian_noise", 0)) - 128
    assert default.std() == pytest.approx(12, rel=0.02)


def test_gaussian_blur_is_the_published_kernel() -> None:
    image = plain(0, 7, 9)
    image.putpixel((3, 4), (255, 255, 255))
    side = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    weights = np.array([side, 1 - 2 * side, side])
    view = pixels(perturb(image, "gaussian_blur", 0))
    np.testing.assert_allclose(view[3:6, 2:5, 0], 255 * np.outer(weights, weights), atol=0.5)
    assert view.sum() == pytest.approx(3 * 255, abs=14)
    assert pixels(perturb(plain(77, 3, 2), "gaussian_blur", 0)).tolist() == [[[77] * 3] * 3] * 2


def test_jpeg_is_the_file_at_the_quality_drawn() -> None:
    image = noise(40, 25)

    def saved(quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).tobytes()

    assert perturb(image, "jpeg", 0, quality=(30, 30)).tobytes() == saved(30)
    by_bytes = {saved(quality): quality for quality in range(1, 96)}
    drawn = {by_bytes[perturb(image, "jpeg", seed).tobytes()] for seed in range(200)}
    assert 40 <= min(drawn) <= 42
    assert 78 <= max(drawn) <= 80


def test_jpeg_takes_images_beyond_the_limit_of_the_format() -> None:
    image = Image.fromarray(
        np.tile(np.arange(70_000)[:, None, None] // 300, (1, 2, 3)).astype("u1")
    )
    np.testing.assert_allclose(pixels(perturb(image, "jpeg", 0)), pixels(image), atol=3)


# Removing.


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0, 1),
    patch=st.integers(1, 20),
    columns=st.integers(1, 12),
    rows=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_the_share_of_masked_patches_is_what_was_asked(
    ratio: float, patch: int, columns: int, rows: int, seed: int
) -> None:
    image = plain(255, columns * patch, rows * patch)
    view = pixels(perturb(image, "patch_mask", seed, ratio=ratio, patch_pixels=patch))
    patches = view.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
    patches = patches.reshape(rows * columns, -1)
    assert np.isin(patches, (0, 255)).all()
    assert (patches == patches[:, :1]).all()  # whole patches only
    masked = int((patches[:, 0] == 0).sum())
    assert abs(masked - ratio * rows * columns) <= 0.5 + 1e-9 or (masked == 1 and ratio > 0)
    assert masked >= (ratio > 0)


def test_the_default_mask_is_four_fifths_of_patches_of_fourteen_pixels() -> None:
    view = pixels(perturb(plain(255, 140, 140), "patch_mask", 0))
    grid = view[::14, ::14, 0]
    assert (grid == 0).sum() == 80
    np.testing.assert_array_equal(view, np.kron(grid, np.ones((14, 14)))[..., None].repeat(3, -1))


def test_every_patch_is_masked_as_often_as_any_other() -> None:
    often = np.mean(
        [pixels(perturb(plain(255, 56, 56), "patch_mask", s))[::14, ::14, 0] for s in range(500)], 0
    )
    assert 1 - often / 255 == pytest.approx(0.8125 * np.ones((4, 4)), abs=0.08)  # 13 of 16


@pytest.mark.parametrize(("name", "share"), [("patch_mask", "ratio"), ("crop_out", "area_share")])
def test_covered_parts_take_the_fill_and_the_rest_stays(name: str, share: str) -> None:
    image = noise(56, 42)
    black = pixels(perturb(image, name, 2, **{share: 0.5}))
    covered = (black == 0).all(-1)
    assert 0.4 < covered.mean() < 0.6
    for fill in ("black", "mean", "noise"):
        view = pixels(perturb(image, name, 2, **{share: 0.5}, fill=fill))
        np.testing.assert_array_equal(view[~covered], pixels(image)[~covered])
        if fill == "mean":
            mean = pixels(image).mean((0, 1)).round()
            assert (view[covered] == mean).all()
        if fill == "noise":
            assert view[covered].mean() == pytest.approx(127.5, abs=5)
            assert view[covered].std() == pytest.approx(256 / math.sqrt(12), abs=4)
            assert (view[covered] != pixels(image)[covered]).mean() > 0.98


def test_occlusion_covers_about_thirty_nine_percent_with_noise() -> None:
    shares, values = [], []
    for seed in range(30):
        view = pixels(perturb(plain(255, 512, 512), "occlusion", seed))
        covered = (view != 255).any(-1)
        shares.append(covered.mean())
        values.append(view[covered].mean())
    assert np.mean(shares) == pytest.approx(0.39, abs=0.015)
    assert np.std(shares) > 0.005
    assert np.mean(values) == pytest.approx(127.5, abs=1)


def test_occluding_rectangles_have_the_sides_asked_for_and_lie_anywhere_inside() -> None:
    sides, places = [], []
    for seed in range(300):
        view = pixels(perturb(plain(255, 300, 200), "occlusion", seed, count=1))
        rows, columns = np.nonzero((view != 255).any(-1))
        sides.append((np.ptp(columns) + 1, np.ptp(rows) + 1))
        places.append((columns.min(), rows.min(), 299 - columns.max(), 199 - rows.max()))
        assert (view != 255).any(-1).sum() == pytest.approx(np.prod(sides[-1]), rel=0.01)
    assert (np.min(sides, 0) >= [14, 9]).all()
    assert (np.max(sides, 0) <= [45, 30]).all()
    assert (np.min(sides, 0) <= [17, 12]).all()
    assert (np.max(sides, 0) >= [43, 28]).all()
    assert (np.min(places, 0) <= 4).all()  # reaches every side


def test_zoom_crop_shows_one_window_of_the_published_size_anywhere() -> None:
    shares, starts = [], []
    for seed in range(80):
        view = pixels(perturb(gradient(), "zoom_crop", seed))
        across, down = view[0, :, 0], view[:, 0, 1]
        assert (view[..., 0] == across).all()  # upright
        assert (view[..., 1] == down[:, None]).all()
        assert np.ptp(across) == np.ptp(down)  # one share for both sides
        slope = np.polyfit(np.arange(256), across, 1)[0]
        shares.append((np.ptp(across) + 1) / 256)
        assert slope == pytest.approx(shares[-1], abs=0.01)
        starts.append((across[0] / (256 - 256 * shares[-1]), down[0] / (256 - 256 * shares[-1])))
    edge = plain(0, 40, 40)
    edge.paste((255, 255, 255), (20, 0, 40, 40))
    between = pixels(perturb(edge, "zoom_crop", 0))
    assert ((between > 20) & (between < 235)).any()  # bilinear
    assert 0.595 <= min(shares) < 0.61
    assert 0.69 < max(shares) <= 0.7
    assert (np.min(starts, 0) < 0.05).all()
    assert (np.max(starts, 0) > 0.95).all()


def test_crop_out_removes_one_window_with_thirty_percent_around_the_centre() -> None:
    lefts = []
    for seed in range(30):
        covered = (pixels(perturb(plain(255, 200, 100), "crop_out", seed)) == 0).all(-1)
        rows, columns = np.nonzero(covered)
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        assert covered.sum() == width * height  # one rectangle
        assert covered.mean() == pytest.approx(0.3, abs=0.01)
        assert width == pytest.approx(2 * height, abs=2)
        assert covered[50, 100]
        lefts.append(columns.min())
    assert np.ptp(lefts) > 50
    assert pixels(perturb(plain(255), "crop_out", 0, area_share=1)).max() == 0


def test_blackout_is_black() -> None:
    assert pixels(perturb(noise(20, 10), "blackout", 0)).max() == 0


def test_heavy_blur_spreads_an_edge_by_its_sigma() -> None:
    image = plain(0, 400, 100)
    image.paste((255, 255, 255), (200, 0, 400, 100))
    view = pixels(perturb(image, "heavy_blur", 0))[50, :, 0] / 255
    assert view[200 - 24] == pytest.approx(0.159, abs=0.02)  # 24 px: one sigma, 6 % of 400
    assert view[199 + 24] == pytest.approx(0.841, abs=0.02)


def test_heavy_noise_mixes_signal_and_noise_by_power() -> None:
    for level, scaled in ((0, -1.0), (128, 0.004), (255, 1.0)):
        view = pixels(perturb(plain(level), "heavy_noise", 0, signal_power=0.36)) / 127.5 - 1
        # Clipping moves no quantile that lies within: the median, and half a deviation off it.
        assert np.median(view) == pytest.approx(0.6 * scaled, abs=0.02)
        inwards = 0.3085 if scaled > 0 else 0.6915
        assert np.quantile(view, inwards) == pytest.approx(
            0.6 * scaled - np.sign(scaled) * 0.5 * 0.8, abs=0.02
        )
    black, white = (pixels(perturb(plain(x), "heavy_noise", 0)).mean() for x in (0, 255))
    assert 5 < white - black < 20  # of 255, under noise of more than 80


@pytest.mark.parametrize(
    ("schedule", "step", "power"),  # the product of 1 - beta from step 0 on
    [
        ("sigmoid", 0, 0.99998),
        ("sigmoid", 250, 0.97839),
        ("sigmoid", 500, 0.74480),
        ("sigmoid", 999, 0.08125),
        ("linear", 0, 0.9999),
        ("linear", 500, 0.07780),
    ],
)
def test_diffusion_noise_darkens_the_signal_and_adds_noise_as_its_schedule_says(
    schedule: str, step: int, power: float
) -> None:
    given = {"schedule": schedule, "step": step}
    for level in (40, 128, 255):
        view = pixels(perturb(plain(level), "diffusion_noise", 0, **given))
        # Clipping moves no quantile that lies within: the median, and half a deviation off it.
        middle, half = math.sqrt(power) * level, math.sqrt(1 - power) * 255 / 2
        if half < middle < 250:
            assert np.median(view) == pytest.approx(middle, abs=3)
            assert np.quantile(view, 0.3085) == pytest.approx(middle - half, abs=3)
    assert pixels(perturb(plain(0), "diffusion_noise", 0, **given)).mean() < 128


# What a person, or a model, still finds.


def drawn_figures() -> list[Image.Image]:
    image = Image.new("RGB", (224, 224), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=22)
    pen.polygon([(40, 175), (175, 185), (126, 45)], "lightblue", "navy", 3)
    pen.ellipse((140, 20, 205, 85), "palegreen", "green", 3)
    for text, place in {"A": (18, 170), "12 cm": (80, 190), "x+7": (152, 40)}.items():
        pen.text(place, text, "black", font)
    return [image]


def real_figures() -> list[Image.Image]:
    path = SHARED_DATA / "puzzlevqa-mini" / "data" / "test-00000-of-00001.parquet"
    if not path.exists():
        pytest.skip(f"no real images: {path} is absent")
    from pyarrow import parquet

    rows = parquet.read_table(path, columns=["images"]).slice(0, 60).to_pylist()
    encoded = [rows[index]["images"][0]["bytes"] for index in (3, 40)]
    return [to_rgb(Image.open(io.BytesIO(data))).resize((224, 224)) for data in encoded]


PATCH, REACH = 16, 24  # pixels


def grey(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.convert("L"), dtype=np.float64)


def richest_corners(image: Image.Image, wanted: int = 8) -> list[tuple[int, int]]:
    """Top left corners of the patches with the most contrast."""
    levels, step = grey(image), PATCH // 2
    corners = [
        (top, left)
        for top in range(0, image.height - PATCH, step)
        for left in range(0, image.width - PATCH, step)
    ]
    return sorted(corners, key=lambda c: -levels[c[0] : c[0] + PATCH, c[1] : c[1] + PATCH].std())[
        :wanted
    ]


def correlate(field: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    spectrum = np.fft.rfft2(field) * np.fft.rfft2(kernel, field.shape).conj()
    whole = np.fft.irfft2(spectrum, field.shape)
    return whole[: field.shape[0] - PATCH + 1, : field.shape[1] - PATCH + 1]


def likeness(image: Image.Image, view: Image.Image, top: int, left: int) -> float:
    """The best correlation, near its place in `view`, of one patch of `image`."""
    sought = grey(image.crop((left, top, left + PATCH, top + PATCH)))
    sought = (sought - sought.mean()) / sought.std() / sought.size
    rows = slice(max(0, top - REACH), top + PATCH + REACH)
    nearby = grey(view)[rows, max(0, left - REACH) : left + PATCH + REACH]
    average = np.full((PATCH, PATCH), PATCH**-2.0)
    variance = correlate(nearby**2, average) - correlate(nearby, average) ** 2
    deviation = np.sqrt(np.maximum(variance, 4))  # flat windows (below 2 levels) match nothing
    return float((correlate(nearby, sought) / deviation).max())


@pytest.mark.parametrize("figures", [drawn_figures, real_figures])
def test_preserving_views_keep_what_removing_views_lose(
    figures: Callable[[], list[Image.Image]],
) -> None:
    rich = [(image, richest_corners(image)) for image in figures()]

    def share_lost(name: str) -> float:
        found = []
        for seed in range(1 if name in ALIKE_IN_EVERY_DRAW else 12):
            for image, corners in rich:
                view = perturb(image, name, seed)
                found += [likeness(image, view, *corner) for corner in corners]
        return float(np.mean(np.array(found) < 0.75))

    lost = {name: share_lost(name) for name in NAMES}
    assert max(lost[name] for name in PRESERVING) <= 0.1, lost
    assert min(lost[name] for name in REMOVING) >= 0.2, lost
    assert min(lost[name] for name in ("blackout", "heavy_noise")) >= 0.95, lost


# Errors.


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("rotate", {}, "no perturbation 'rotate' .did you mean 'rotation'.*patch_mask"),
        ("rotation", {"degree": 3}, "no parameter 'degree' .did you mean 'degrees'.*degrees=10.0"),
        ("blackout", {"share": 1}, "no parameter 'share'.*takes nothing"),
        ("rotation", {"degrees": -1}, "degrees must be a number from 0 to 180, not -1"),
        ("rotation", {"degrees": "10"}, "degrees must be a number from 0 to 180, not '10'"),
        ("rotation", {"fill": "white"}, "fill must be one of border, black, not 'white'"),
        ("perspective", {"distortion": 0.6}, "distortion must be a number from 0 to 0.5"),
        ("perspective", {"probability": 2}, "probability must be a number from 0 to 1"),
        ("affine", {"scale": (0, 1)}, "scale must be a number from 0.1 to 10, not 0"),
        ("affine", {"shear_degrees": 46}, "shear_degrees must be a number from 0 to 45"),
        ("affine", {"shift_share": 1.5}, "shift_share must be a number from 0 to 1"),
        ("colour_jitter", {"contrast": (1, 0)}, r"contrast must be an interval .low, high."),
        ("colour_jitter", {"contrast": 1}, r"contrast must be an interval .low, high.*not 1"),
        ("colour_jitter", {"contrast": "12"}, r"contrast must be an interval .low, high"),
        ("colour_jitter", {"brightness": (-1, 1)}, "brightness must be a number from 0 to 100"),
        ("gaussian_noise", {"sigma_levels": math.nan}, "sigma_levels must be a number.*not nan"),
        ("gaussian_blur", {"kernel_pixels": 4}, "kernel_pixels must be odd, not 4"),
        ("gaussian_blur", {"kernel_pixels": 3.0}, "kernel_pixels must be a whole number"),
        ("gaussian_blur", {"sigma_pixels": 0}, "sigma_pixels must be a number from 0.01 to 100"),
        ("jpeg", {"quality": (0, 50)}, "quality must be a number from 1 to 95, not 0"),
        ("patch_mask", {"ratio": 1.1}, "ratio must be a number from 0 to 1, not 1.1"),
        ("patch_mask", {"patch_pixels": 0}, "patch_pixels must be a whole number from 1"),
        ("patch_mask", {"fill": "white"}, "fill must be one of black, mean, noise, not 'white'"),
        ("occlusion", {"count": 0}, "count must be a whole number from 1"),
        ("occlusion", {"side_share": (0.5, 1.5)}, "side_share must be a number from 0 to 1"),
        ("zoom_crop", {"side_share": (0.7, 0.6)}, "side_share must be an interval"),
        ("crop_out", {"area_share": -0.1}, "area_share must be a number from 0 to 1"),
        ("heavy_blur", {"sigma_share": 2}, "sigma_share must be a number from 0 to 1"),
        ("heavy_noise", {"signal_power": -1}, "signal_power must be a number from 0 to 1"),
        ("diffusion_noise", {"step": 1000}, "step must be a whole number from 0 to 999, not 1000"),
        ("diffusion_noise", {"step": 0.5}, "step must be a whole number from 0 to 999"),
        ("diffusion_noise", {"schedule": "cosine"}, "schedule must be one of sigmoid, linear"),
    ],
)
def test_an_unknown_name_or_a_value_out_of_range_is_refused_with_what_is_allowed(
    name: str, parameters: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        perturb(plain(0, 4, 4), name, 0, **parameters)


@pytest.mark.parametrize("seed", [-1, 1.0, "1", None])
def test_a_seed_that_is_no_integer_from_zero_up_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0"):
        perturb(plain(0, 4, 4), "rotation", seed)


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"empty .size \(0, 5\)"):
        perturb(Image.new("RGB", (0, 5)), "blackout", 0)


def test_intervals_may_be_lists_as_a_config_file_gives_them() -> None:
    image = noise(20, 20)
    as_list = perturb(image, "zoom_crop", 3, side_share=[0.2, 0.3])
    assert as_list.tobytes() == perturb(image, "zoom_crop", 3, side_share=(0.2, 0.3)).tobytes()


# The contact sheet.


def contains(sheet: Image.Image, view: Image.Image) -> bool:
    wide, tile = np.asarray(sheet), np.asarray(view)
    height, width = tile.shape[:2]
    for row, column in np.argwhere((wide == tile[0, 0]).all(-1)):
        here = wide[row : row + height, column : column + width]
        if here.shape == tile.shape and (here == tile).all():
            return True
    return False


def test_the_contact_sheet_shows_the_original_and_every_perturbation_in_every_draw() -> None:
    image = noise(48, 40)
    sheet = contact_sheet(image, seed=9, draws=2, tile_pixels=48)
    assert contains(sheet, image)
    for name in NAMES:
        for draw in range(2):
            view = perturb(image, name, view_seed(9, "contact sheet", name, draw))
            assert contains(sheet, view), (name, draw)
    assert sheet.tobytes() == contact_sheet(image, seed=9, draws=2, tile_pixels=48).tobytes()
    assert sheet.tobytes() != contact_sheet(image, seed=8, draws=2, tile_pixels=48).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (20, 30)])
@pytest.mark.parametrize("mode", ["P", "I;16", "RGB"])
def test_any_image_has_a_contact_sheet(size: tuple[int, int], mode: str) -> None:
    sheet = contact_sheet(noise(*size, mode), draws=1, tile_pixels=64)
    assert sheet.mode == "RGB"
    assert sheet.width == 2 * 64 + 3 * 24
