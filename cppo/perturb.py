"""The perturbation suite: views of an image that keep, or remove, what matters in it.

A perturbation is a pure function `(image, rng, *, parameters) -> image`: it takes an RGB image,
draws from `rng` alone, never writes to its input and returns a new RGB image of the same size, so
that a view has as many image tokens as its original. `perturb` is the way in for any image mode;
`PRESERVING` and `REMOVING` hold the suite by name.

Defaults are the published settings where there are any, else the docstring says "ours" (2601.00501
is CPPO, which has two published codes). Names tell units: a `share` is a fraction of the image's
side or area, `levels` run from 0 to 255; an interval `(low, high)` is drawn from uniformly. A
parameter out of range is a ValueError.
"""

import difflib
import hashlib
import inspect
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import numpy as np
import PIL.Image
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import ImageCms, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from PIL.Image import Image, Resampling, Transform

Perturbation = Callable[..., Image]
Interval = Sequence[float]

JPEG_SIDE_PIXELS = 65_488  # the format ends at 65,500; a multiple of 16 keeps its blocks whole


def perturb(image: Image, name: str, seed: int, **parameters: object) -> Image:
    """The view `name` of `image`, in RGB and of its size; it depends on the arguments alone.

    `image` may have any mode (see `to_rgb`), `seed` is an integer >= 0 (`view_seed` makes one),
    `parameters` replace defaults. ValueError where a name is unknown or a value out of range.
    """
    suite = PRESERVING | REMOVING
    if name not in suite:
        raise ValueError(
            f"there is no perturbation {name!r}{_nearest(name, suite)}: choose a preserving one "
            f"({', '.join(PRESERVING)}) or a removing one ({', '.join(REMOVING)})."
        )
    defaults = _defaults(suite[name])
    for parameter in sorted(parameters.keys() - defaults.keys()):
        allowed = ", ".join(f"{key}={value!r}" for key, value in defaults.items()) or "nothing"
        raise ValueError(
            f"{name} takes no parameter {parameter!r}{_nearest(parameter, defaults)}: "
            f"leave it out; {name} takes {allowed}."
        )
    if 0 in image.size:
        raise ValueError(f"the image is empty (size {image.size}): give one of 1x1 pixels or more.")
    rng = np.random.default_rng(_whole("seed", seed, 0, 2**64 - 1))
    return suite[name](to_rgb(image), rng, **parameters)


def view_seed(seed: int, item: str, view: str, step: int) -> int:
    """A seed in [0, 2**63) for one view of one item at one step; the same in every process.

    `seed` is the run's, `item` tells images apart, `view` the views of one image.
    """
    key = json.dumps([int(seed), item, view, int(step)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def to_rgb(image: Image) -> Image:
    """`image` in RGB, transparent parts laid on white; an opaque RGB image is returned as it is.

    16-bit levels are divided by 257: 65535 becomes 255. Modes I and F do not say where white lies:
    values within 0 to 255 are levels (F within 0 to 1: fractions of white), within 0 to 65535 they
    are 16-bit levels, all others are stretched from least to greatest; NaN is black. EXIF
    orientation is left to whoever loads the file.
    """
    if image.mode.startswith(("I", "F")):
        return PIL.Image.fromarray(_as_levels(image)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.has_transparency_data:
        layer = image.convert("LA") if image.mode == "La" else image  # La converts to nothing else
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, layer.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _as_levels(image: Image) -> NDArray[np.uint8]:
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    least, greatest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    black, white = 0.0, 255.0
    if image.mode.startswith("I;16"):
        white = 65535.0
    elif least < 0 or greatest > 65535:
        black, white = least, greatest
    elif greatest > 255:
        white = 65535.0
    elif image.mode == "F" and greatest <= 1:
        white = 1.0
    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    return np.round((values - black) * 255 / ((white - black) or 1)).astype(np.uint8)


# Preserving: what matters is still there.


def colour_jitter(
    image: Image,
    rng: Generator,
    *,
    brightness: Interval = (0.2, 1.3),
    contrast: Interval = (0.2, 1.8),
    saturation: Interval = (0.2, 1.8),
) -> Image:
    """Brightness, contrast and saturation times a factor each (1 keeps them), in random order.

    Settings and order: 2601.00501, both codes.
    """
    changes = [
        (ImageEnhance.Brightness, _draw(rng, "brightness", brightness, 0, 100)),
        (ImageEnhance.Contrast, _draw(rng, "contrast", contrast, 0, 100)),
        (ImageEnhance.Color, _draw(rng, "saturation", saturation, 0, 100)),
    ]
    for index in rng.permutation(len(changes)):
        enhance, factor = changes[index]
        image = enhance(image).enhance(factor)
    return image


def perspective(
    image: Image,
    rng: Generator,
    *,
    distortion: float = 0.2,
    probability: float = 0.5,
    fill: str = "border",
) -> Image:
    """Each corner moves inwards by up to `distortion` of half of each side: nothing is lost.

    With chance 1 - `probability` the image stays as it is. `distortion` is at most 0.5: far beyond,
    corners fold over. What the image no longer covers is "border", the median of its outermost
    pixels (a page stays white, no false edge appears), or "black", as published.
    Settings: 2601.00501, both codes.
    """
    reach = _within("distortion", distortion, 0, 0.5) / 2
    applies = rng.random() < _within("probability", probability, 0, 1)
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=np.float64)
    moved = np.abs(corners - rng.uniform(0, reach, (4, 2)))  # from 0 up, from 1 down
    rows = []
    for (x, y), (u, v) in zip(moved * image.size, corners * image.size, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    map_back = np.linalg.solve(np.array(rows), (corners * image.size).reshape(-1))
    view = _warp(image, Transform.PERSPECTIVE, map_back, fill)
    return view if applies else image.copy()


def rotation(image: Image, rng: Generator, *, degrees: float = 10.0, fill: str = "border") -> Image:
    """Turned about the centre by an angle within +-`degrees`; corners leave the frame.

    `fill` as in `perspective`. Setting: 2601.00501, both codes, which take the nearest pixel;
    bilinear as here, thin lines and small print stay whole.
    """
    return affine(
        image, rng, degrees=degrees, shear_degrees=0, shift_share=0, scale=(1, 1), fill=fill
    )


def affine(
    image: Image,
    rng: Generator,
    *,
    degrees: float = 5.0,
    shear_degrees: float = 5.0,
    shift_share: float = 0.05,
    scale: Interval = (0.9, 1.0),
    fill: str = "border",
) -> Image:
    """Turned, sheared along x, scaled and shifted, each by a draw within its limits.

    By default the scale only shrinks, which makes the room that the shift needs. `fill` as in
    `perspective`. 2601.00501 says "mild geometric transforms" without values: these are ours.
    """
    turn = math.radians(_within("degrees", degrees, 0, 180) * rng.uniform(-1, 1))
    slant = math.radians(_within("shear_degrees", shear_degrees, 0, 45) * rng.uniform(-1, 1))
    shift = _within("shift_share", shift_share, 0, 1) * rng.uniform(-1, 1, 2) * image.size
    shape = np.array([[1, math.tan(slant)], [0, 1]]) * _draw(rng, "scale", scale, 0.1, 10)
    cosine, sine = math.cos(turn), math.sin(turn)
    back = np.linalg.inv(np.array([[cosine, -sine], [sine, cosine]]) @ shape)
    centre = np.array(image.size) / 2
    map_back = np.column_stack([back, centre - back @ (centre + shift)]).reshape(-1)
    return _warp(image, Transform.AFFINE, map_back, fill)


def gaussian_noise(image: Image, rng: Generator, *, sigma_levels: float = 12.0) -> Image:
    """Normal noise of standard deviation `sigma_levels` on every value, then clipped.

    2601.00501 names Gaussian noise as preserving, without a strength: the value is ours.
    """
    sigma = _within("sigma_levels", sigma_levels, 0, 255)
    return _from_levels(np.asarray(image) + np.float32(sigma) * _standard_normal(image, rng))


def gaussian_blur(
    image: Image, rng: Generator, *, kernel_pixels: int = 3, sigma_pixels: float = 1.0
) -> Image:
    """A Gaussian cut off at `kernel_pixels` (odd); the same in every draw.

    Setting: 2601.00501, asynchronous code. Beyond the rim its pixels repeat, where that code reads
    black and so darkens the rim.
    """
    if _whole("kernel_pixels", kernel_pixels, 1, 99) % 2 == 0:
        raise ValueError(f"kernel_pixels must be odd, not {kernel_pixels}: add or take away one.")
    reach = kernel_pixels // 2
    sigma = _within("sigma_pixels", sigma_pixels, 0.01, 100)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    levels = np.pad(np.asarray(image), [(reach, reach), (reach, reach), (0, 0)], mode="edge")
    taps = list(enumerate(weights / weights.sum()))
    height, width = image.height, image.width
    in_columns = np.sum([weight * levels[i : i + height] for i, weight in taps], axis=0)
    return _from_levels(
        np.sum([weight * in_columns[:, i : i + width] for i, weight in taps], axis=0)
    )


def jpeg(image: Image, rng: Generator, *, quality: Interval = (40, 80)) -> Image:
    """Written as JPEG and read back, at a quality of 1 to 95 rounded from the draw. Values ours."""
    drawn = round(_draw(rng, "quality", quality, 1, 95))
    view = PIL.Image.new("RGB", image.size)
    for top in range(0, image.height, JPEG_SIDE_PIXELS):
        for left in range(0, image.width, JPEG_SIDE_PIXELS):
            right = min(left + JPEG_SIDE_PIXELS, image.width)
            bottom = min(top + JPEG_SIDE_PIXELS, image.height)
            file = io.BytesIO()
            image.crop((left, top, right, bottom)).save(file, "JPEG", quality=drawn)
            view.paste(PIL.Image.open(file), (left, top))
    return view


# Removing: what matters is gone.


def patch_mask(
    image: Image, rng: Generator, *, ratio: float = 0.8, patch_pixels: int = 14, fill: str = "black"
) -> Image:
    """`ratio` of the patches of a grid, which starts at the top left, covered.

    `fill` is "black", "mean" (the image's mean colour) or "noise" (uniform). The count is exact:
    `ratio` of the patches to the nearest whole number, at least one where ratio > 0. PAPO and VPPO
    draw each patch by itself; the expected share is the same, but then it varies from image to
    image (by 5 % at 8x8 patches) and a small image can come out whole. Ratio 0.8: 2601.00501; PAPO
    (2507.06448) has 0.6, VPPO (2510.09285) 0.5, both black at 14 pixels.
    """
    ratio = _within("ratio", ratio, 0, 1)
    side = _whole("patch_pixels", patch_pixels, 1, 1_000_000)
    columns, rows = (math.ceil(length / side) for length in image.size)
    covered = max(int(ratio * rows * columns + 0.5), int(ratio > 0))
    grid = rng.permutation(np.arange(rows * columns) < covered).reshape(rows, columns)
    patch_of = np.ix_(np.arange(image.height) // side, np.arange(image.width) // side)
    return _cover(image, grid[patch_of], fill, rng)


def occlusion(
    image: Image, rng: Generator, *, count: int = 50, side_share: Interval = (0.05, 0.15)
) -> Image:
    """`count` rectangles of uniform noise, which may overlap: about 39 % of the image is covered.

    Each side is drawn as a share of the image's, one pixel at least.
    Settings: 2601.00501, both codes.
    """
    covered = np.zeros((image.height, image.width), dtype=np.bool_)
    for _ in range(_whole("count", count, 1, 100_000)):
        shares = [_draw(rng, "side_share", side_share, 0, 1) for _ in range(2)]
        covered[_window(image, rng, shares)] = True
    return _cover(image, covered, "noise", rng)


def zoom_crop(image: Image, rng: Generator, *, side_share: Interval = (0.6, 0.7)) -> Image:
    """A window anywhere, with one drawn share of both sides, resized back bilinearly.

    Settings: 2601.00501, both codes.
    """
    share = _draw(rng, "side_share", side_share, 0, 1)
    window = PIL.Image.fromarray(np.asarray(image)[_window(image, rng, (share, share))])
    return window.resize(image.size, Resampling.BILINEAR)


def crop_out(
    image: Image, rng: Generator, *, area_share: float = 0.3, fill: str = "black"
) -> Image:
    """A window with `area_share` of the area, in the image's proportions, cut out and covered.

    `fill` as in `patch_mask`. 2601.00501 names "30 % cropping" while its codes zoom. We read it as
    30 % of the picture taken away and the rest left in place; the other reading, a part of the
    picture blown up, is `zoom_crop`. At 0.3 the window always holds the
    centre of all but tiny images.
    """
    side_share = math.sqrt(_within("area_share", area_share, 0, 1))
    covered = np.zeros((image.height, image.width), dtype=np.bool_)
    if side_share > 0:
        covered[_window(image, rng, (side_share, side_share))] = True
    return _cover(image, covered, fill, rng)


def blackout(image: Image, rng: Generator) -> Image:
    """All black: what a model sees that cannot see. The same in every draw."""
    return PIL.Image.new("RGB", image.size)


def heavy_blur(image: Image, rng: Generator, *, sigma_share: float = 0.06) -> Image:
    """A Gaussian blur, its sigma a share of the longer side; the same in every draw.

    Only large areas of colour remain. VPPO (2510.09285) tries a blur; the value is ours.
    """
    sigma_pixels = _within("sigma_share", sigma_share, 0, 1) * max(image.size)
    return image.filter(ImageFilter.GaussianBlur(sigma_pixels))


def heavy_noise(image: Image, rng: Generator, *, signal_power: float = 0.005) -> Image:
    """sqrt(a) x + sqrt(1 - a) e: a = `signal_power`, x levels scaled to -1 .. 1, e standard normal.

    VPPO (2510.09285) tries noise as removing view. The value is ours: noise that is only added and
    clipped leaves print legible even at a standard deviation of 190 levels.
    """
    power = np.float32(_within("signal_power", signal_power, 0, 1))
    signal = np.sqrt(power) * (np.asarray(image) / np.float32(127.5) - 1)
    return _from_levels((signal + np.sqrt(1 - power) * _standard_normal(image, rng) + 1) * 127.5)


def diffusion_noise(
    image: Image, rng: Generator, *, step: int = 500, schedule: str = "sigmoid"
) -> Image:
    """sqrt(a) x + sqrt(1 - a) e after `step` (0 to 999): x levels in 0 .. 1, e standard normal.

    a is the product of 1 - beta over steps 0 to `step` of 1000. "sigmoid": beta is 1e-5 +
    (5e-3 - 1e-5) sigmoid(z), z evenly from -6 to 6; step 500 leaves a = 0.74. "linear": beta is
    evenly from 1e-4 to 0.02 (DDPM, 2006.11239); step 500 leaves a = 0.08. Step 500, "sigmoid" and
    levels in 0 .. 1 (so that the image darkens) are those of NoisyRollout's code (2504.13055);
    DVRP (2601.06801) names diffusion noise without a schedule that we know of.
    """
    last = _whole("step", step, 0, 999)
    if _one_of("schedule", schedule, ("sigmoid", "linear")) == "sigmoid":
        betas = 1e-5 + (5e-3 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 1000)))
    else:
        betas = np.linspace(1e-4, 0.02, 1000)
    power = np.prod(1 - betas[: last + 1])
    signal = np.float32(np.sqrt(power)) * np.asarray(image)
    return _from_levels(
        signal + np.float32(255 * np.sqrt(1 - power)) * _standard_normal(image, rng)
    )


PRESERVING: dict[str, Perturbation] = {
    "colour_jitter": colour_jitter,
    "perspective": perspective,
    "rotation": rotation,
    "affine": affine,
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": gaussian_blur,
    "jpeg": jpeg,
}
REMOVING: dict[str, Perturbation] = {
    "patch_mask": patch_mask,
    "occlusion": occlusion,
    "zoom_crop": zoom_crop,
    "crop_out": crop_out,
    "blackout": blackout,
    "heavy_blur": heavy_blur,
    "heavy_noise": heavy_noise,
    "diffusion_noise": diffusion_noise,
}


# What the functions share.


def _warp(image: Image, method: Transform, map_back: NDArray[np.floating], fill: str) -> Image:
    """`map_back` holds Pillow's coefficients from a view's coordinates to the image's."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(border, axis=0).astype(int).tolist()
    if _one_of("fill", fill, ("border", "black")) == "black":
        colour = [0, 0, 0]
    return image.transform(
        image.size, method, map_back.tolist(), Resampling.BILINEAR, fillcolor=tuple(colour)
    )


def _cover(image: Image, covered: NDArray[np.bool_], fill: str, rng: Generator) -> Image:
    view = np.array(image)
    colour = view.mean((0, 1)).round() if fill == "mean" else np.zeros(3)
    if _one_of("fill", fill, ("black", "mean", "noise")) == "noise":
        view[covered] = rng.integers(0, 256, (int(covered.sum()), 3), dtype=np.uint8)
    else:
        view[covered] = colour
    return PIL.Image.fromarray(view)


def _window(image: Image, rng: Generator, side_shares: Iterable[float]) -> tuple[slice, slice]:
    """Rows and columns of a window at a uniform place, with shares of (width, height)."""
    spans = []
    for side, share in zip(image.size, side_shares, strict=True):
        length = max(1, int(share * side))
        start = int(rng.integers(side - length, endpoint=True))
        spans.append(slice(start, start + length))
    return spans[1], spans[0]


def _standard_normal(image: Image, rng: Generator) -> NDArray[np.float32]:
    return rng.standard_normal((image.height, image.width, 3), dtype=np.float32)


def _from_levels(levels: NDArray[np.floating]) -> Image:
    return PIL.Image.fromarray((levels + 0.5).clip(0, 255).astype(np.uint8))


def _draw(rng: Generator, name: str, interval: object, low: float, high: float) -> float:
    if isinstance(interval, Sequence) and not isinstance(interval, str) and len(interval) == 2:
        start, end = (_within(name, bound, low, high) for bound in interval)
        if start <= end:
            return float(rng.uniform(start, end))
    raise ValueError(
        f"{name} must be an interval (low, high) within {low:g} to {high:g}, not {interval!r}."
    )


def _within(name: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, Real) or not low <= float(value) <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.")
    return float(value)


def _whole(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}.")
    return int(value)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
    return value


def _defaults(function: Perturbation) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def contact_sheet(image: Image, seed: int = 0, *, draws: int = 3, tile_pixels: int = 224) -> Image:
    """The original on top, below it the preserving and, to their right, the removing views.

    A row is one perturbation at its defaults in `draws` (1 or more) draws; one that is the same in
    every draw shows a single tile. A tile holds the whole image within `tile_pixels` (32 or more).
    """
    draws = _whole("draws", draws, 1, 100)
    tile = _whole("tile_pixels", tile_pixels, 32, 4096)
    image = to_rgb(image)
    width, height = (max(1, round(side * tile / max(image.size))) for side in image.size)
    gap, margin, label = 8, 24, 46
    section = draws * tile + (draws - 1) * gap  # width of either section
    first_row = 2 * (label + margin) + height
    row = label + height + gap
    rows = max(len(PRESERVING), len(REMOVING))
    size = (2 * section + 3 * margin, first_row + rows * row + margin)
    sheet = PIL.Image.new("RGB", size, (240, 241, 244))
    pen = ImageDraw.Draw(sheet)

    def write(text: str, left: int, top: int, pixels: int, colour: str) -> None:
        font = ImageFont.load_default(size=pixels)
        while len(text) > 4 and font.getlength(text) > section:
            text = text[:-4].rstrip() + "..."
        pen.text((left, top), text, colour, font)

    def show(name: str, note: str, views: list[Image], left: int, top: int) -> None:
        write(name, left, top, 18, "black")
        write(note, left, top + 22, 13, "dimgrey")
        for view in views:
            pen.rectangle((left - 1, top + label - 1, left + width, top + label + height), "grey")
            sheet.paste(view.resize((width, height), Resampling.LANCZOS), (left, top + label))
            left += tile + gap

    show("original", f"{image.width} x {image.height} pixels", [image], margin, margin)
    for title, colour, suite, left in (
        ("Preserving: what matters is still there", "seagreen", PRESERVING, margin),
        ("Removing: what matters is gone", "firebrick", REMOVING, section + 2 * margin),
    ):
        write(title, left, first_row - label, 22, colour)
        pen.rectangle((left, first_row - 14, left + section - 1, first_row - 12), colour)
        for index, (name, function) in enumerate(suite.items()):
            seeds = (view_seed(seed, "contact sheet", name, step) for step in range(draws))
            views = [perturb(image, name, drawn) for drawn in seeds]
            notes = [
                f"{key} {' to '.join(map(str, value)) if isinstance(value, tuple) else value}"
                for key, value in _defaults(function).items()
            ]
            if draws > 1 and all(view == views[0] for view in views):
                notes, views = [*notes, "the same in every draw"], views[:1]
            show(name, ", ".join(notes), views, left, first_row + index * row)
    return sheet
