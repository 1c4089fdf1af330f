"""Files ↔ tensors: opens pictures, and writes all files that hold just an image.

Between modules an image is RGB float32 (N, 3, H, W) in [0, 1]. What else a file may hold (other colour modes, profiles,
alpha, 16 bits, a camera's orientation) ends here, in `_to_rgb`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from vggfeat import files
from vggfeat.errors import ImageError, InputError, quiet
from vggfeat.files import PathLike, check_path, taken

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "ImageLike",
    "as_picture",
    "check_output",
    "fit",
    "new_image_file",
    "open_image",
    "pixels_of",
    "read_settings",
    "resize",
    "save_image",
    "to_pil",
    "to_tensor",
]

ImageLike = PathLike | Image.Image | Tensor

# by which files are known for images where there are others, too
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}

_QUALITY: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "TIFF": {"compression": "tiff_deflate"},
}
_NAME = "vggfeat"  # the key of the PNG text chunk, and the EXIF Software that says whose ImageDescription it is
_JPEG_SEGMENT = 65533  # bytes that one JPEG segment can hold

# EXIF orientation -> what brings the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The value of white in the modes that Pillow would clip to 0..255. Some of its releases hold 16-bit PNGs as "I".
_WHITE = {"I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535, "I": 65535, "F": 1}


def open_image(path: PathLike, file: IO[bytes] | None = None) -> Image.Image:
    """Read a picture as it is meant to look: upright, sRGB, 8 bit, over white; of an animation the first frame.

    Args:
        path: where it is.
        file: its content where it is not a file of its own, as in an archive; `path` then only names it in messages.

    Raises:
        ImageError: the file is missing, unreadable, empty, no image, damaged, or above Pillow's limit of pixels.
    """
    if not os.fspath(path):
        raise ImageError("expected an image file, got an empty name")
    with _opened(Path(path), file) as image:
        return _to_rgb(image)


def as_picture(image: ImageLike) -> Image.Image:
    """A file, a Pillow image in any mode, or a tensor (1, 3, H, W) or (3, H, W) in [0, 1], as 8-bit RGB.

    Raises:
        ImageError: a file that cannot be read.
        InputError: something else, a tensor that is no image, or one whose values are far outside [0, 1].
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if isinstance(image, Tensor):
        picture = to_pil(image)
        low, high = (float(value) for value in image.detach().aminmax())
        if low < -0.5 or high > 1.5:  # in 0..255 or normalised; a little beyond is what optimisers and filters leave
            raise InputError(f"expected an image in [0,1], got values from {low:.4g} to {high:.4g}; scale them first")
        return picture
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    hint = "; PIL.Image.fromarray makes one of an array of bytes" if isinstance(image, numpy.ndarray) else ""
    raise InputError(f"expected a file, a PIL image or a tensor (1,3,H,W) or (3,H,W), got {type(image).__name__}{hint}")


def to_tensor(image: Image.Image) -> Tensor:
    """The picture as float32 (1, 3, H, W) in [0, 1], contiguous; modes other than RGB are read as in `open_image`.

    Raises:
        ImageError: the picture has no pixels, or its values have no known range.
    """
    image = _to_rgb(image)
    return pixels_of(image)[None].permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels of an RGB picture, uint8 (H,W,3)."""
    return torch.from_numpy(numpy.array(image))


def to_pil(images: Tensor) -> Image.Image:
    """One image, floating (1, 3, H, W) or (3, H, W), clamped to [0, 1] and rounded to the nearest of 256 levels.

    Raises:
        InputError: another shape or dtype, no pixels, or values that are not finite.
    """
    shape = tuple(images.shape)
    if not images.is_floating_point() or shape[:-2] not in ((3,), (1, 3)) or 0 in shape:
        raise InputError(
            f"expected one RGB image, floating (1, 3, H, W) or (3, H, W), got {images.dtype} {shape}; "
            "pick one of a batch with images[i], bring integers to [0, 1] with images / 255"
        )
    values = images.detach().reshape(3, *shape[-2:]).to("cpu", torch.float32)
    if not values.isfinite().all():
        raise InputError(f"expected finite values, got NaN or infinity in an image {shape}; look at what computed it")
    levels = (values.clamp(0, 1) * 255 + 0.5).to(torch.uint8)  # the cast floors, so the half makes it round
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def fit(width: int, height: int, size: int) -> tuple[int, int]:
    """The (width, height) whose long side is `size` pixels and whose aspect is kept, to the nearest pixel, at least 1.

    Raises:
        InputError: a length below 1.
    """
    if min(width, height, size) < 1:
        raise InputError(f"expected lengths of at least 1 pixel, got {width}x{height} and size {size}")
    long = max(width, height)
    return max(1, (width * size + long // 2) // long), max(1, (height * size + long // 2) // long)


def size_for(width: int, height: int, shorter: int) -> int:
    """The long side, rounded up, that leaves the other at least `shorter` pixels where the aspect is kept."""
    return math.ceil(shorter * max(width, height) / min(width, height))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture resampled (Lanczos) to `width` x `height` pixels; the same object where it already has that size.

    Raises:
        InputError: a length below 1.
    """
    if min(width, height) < 1:
        raise InputError(f"expected a size of at least 1x1 pixels, got {width}x{height}")
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def check_output(
    path: PathLike,
    *,
    overwrite: bool = False,
    inputs: Iterable[PathLike] = (),
    formats: Collection[str] = tuple(FORMATS),
) -> Path:
    """`path`, after checking that a file can be written there: call it before any long work.

    Args:
        path: where to.
        overwrite: replace a file that is already there.
        inputs: files that are read, which are never replaced.
        formats: allowed suffixes; by default those of `save_image`.

    Raises:
        ImageError: unknown suffix, no writable folder, a folder of that name, or a file that must not be replaced.
    """
    return check_path(path, formats, overwrite=overwrite, inputs=inputs, error=ImageError)


def save_image(
    image: Image.Image | Tensor,
    path: PathLike,
    *,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a picture, whole or not at all, at the best quality of the format that the suffix of `path` names.

    Args:
        image: a Pillow image, or a tensor as `to_pil` takes it.
        path: where to; see `check_output`.
        settings: stored in the file as JSON, for `read_settings`: a PNG text chunk, in other formats EXIF.
        overwrite: replace a file that is already there. Without it, not even one that appears meanwhile is replaced.

    Raises:
        InputError: the tensor is not one finite image, or the settings are not JSON.
        ImageError: the file cannot be written, or a JPEG cannot hold the settings.
    """
    path = check_output(path, overwrite=overwrite)
    image = to_pil(image) if isinstance(image, Tensor) else _to_rgb(image)
    kind = FORMATS[path.suffix.lower()]
    options = _QUALITY[kind] | _metadata(kind, settings)
    with new_image_file(path, overwrite=overwrite) as file:
        image.save(file, kind, **options)
    return path


@contextmanager
def new_image_file(path: Path, *, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A file to write to, which appears whole or not at all; `check_output` has checked the name.

    Raises:
        ImageError: it cannot be written, or the name is taken by now and must not be.
    """
    try:
        with files.new_file(path, overwrite=overwrite) as file:
            yield file
    except FileExistsError as error:
        raise ImageError(taken(path)) from error
    except (OSError, ValueError) as error:  # Pillow says ValueError for a picture too large for the format
        reason = getattr(error, "strerror", None) or error  # an OSError's own text names the temporary file
        raise ImageError(f"cannot write {path}: {reason}; check the free space, or try another format") from error


def read_settings(path: PathLike) -> dict[str, Any] | None:
    """The settings that `save_image` stored in a file; None where there are none.

    Raises:
        ImageError: as `open_image`.
    """
    with _opened(Path(path)) as image:
        if image.format == "PNG":
            text = image.info.get(_NAME)
        else:
            exif = image.getexif()
            text = exif.get(ExifTags.Base.ImageDescription) if exif.get(ExifTags.Base.Software) == _NAME else None
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None  # a text of someone else's
    return settings if isinstance(settings, dict) else None


@contextmanager
def _opened(path: Path, file: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """Pillow's image of a file; what fails in opening or using it, except memory, becomes a one-line ImageError."""
    try:
        # Pillow warns of odd metadata and of sizes at half its own limit: nothing that a caller could act on.
        with quiet(), Image.open(file or path) as image:
            yield image
    except MemoryError:  # the file is as good as before
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, EOFError, struct.error, zlib.error, …
        raise ImageError(f"{path}: {_diagnosis(error, path)}") from error


def _diagnosis(error: Exception, path: Path) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "expected an image file, found nothing of that name; check the path"
    if os.path.isdir(path):
        return "expected an image file, got a folder; name a file in it"
    if isinstance(error, OSError) and error.errno:
        return f"expected a readable file, got {error.strerror!r}; check its name and permissions"
    if isinstance(error, Image.DecompressionBombError):
        return f"expected a smaller image ({error}); scale it down first"
    if isinstance(error, UnidentifiedImageError):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
                return "expected an image, such as PNG or JPEG, got HEIC; convert it to JPEG"
        what = "an empty file" if path.is_file() and not path.stat().st_size else "something else"
        return f"expected an image, such as PNG or JPEG, got {what}; check the file"
    return f"expected a whole image, got a damaged one ({type(error).__name__}: {error}); fetch it again"


def _to_rgb(image: Image.Image) -> Image.Image:
    """A copy that is upright, sRGB, 8 bit, over white, and carries no metadata that could be applied a second time."""
    if 0 in image.size:
        raise ImageError(f"expected at least 1x1 pixels, got {image.width}x{image.height}")
    image.load()  # a TIFF is turned upright by Pillow here, and only then forgets its orientation
    turn, profile = _TURNS.get(_orientation(image)), image.info.get("icc_profile")
    if image.mode == "La":  # premultiplied, which Pillow converts to nothing else
        image = image.convert("LA")
    if image.mode in _WHITE:
        image = _to_8_bit(image)
    rgba = image.convert("RGBA") if image.has_transparency_data else None
    if image.mode in ("1", "L", "LA"):
        image = image.convert("L")  # a grey profile applies to grey pixels
    elif image.mode != "CMYK":
        image = (rgba or image).convert("RGB")
    image = _to_srgb(image, profile)
    if rgba is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), rgba.getchannel("A"))
    image.info = {}
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata fails in many ways, and must not cost the picture
        return 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (0..65535) or floating (0..1), scaled to "L"; its transparent value becomes white."""
    if image.mode == "I" and image.format not in (None, "PNG", "PPM"):
        raise ImageError("32-bit integers have no known white; save it as 8 or 16 bit")
    white = _WHITE[image.mode]
    pixels = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32)
    low, high = (float(value) for value in pixels.aminmax())
    if not (low >= 0 and high <= white):  # so written, it catches NaN too
        raise ImageError(f"expected {image.mode} pixels in 0..{white}, got {low:g}..{high:g}; save it as 8 or 16 bit")
    levels = (pixels / white * 255 + 0.5).to(torch.uint8)
    if "transparency" in image.info:
        levels[pixels == image.info["transparency"]] = 255
    return Image.fromarray(levels.view(image.height, image.width).numpy())


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """`image` as RGB, by its ICC profile if that is whole and of the image's kind, else by Pillow's plain formulas."""
    if profile:
        try:
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            assert converted is not None  # None is for inPlace=True
            return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for: a picture is not to be lost for that."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _metadata(kind: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    """The options of Pillow's save() that put `settings` into a file."""
    if settings is None:
        return {}
    try:
        # pure ASCII, which is all that EXIF allows: "ü" is written \u00fc
        text = json.dumps(_finite(settings), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"expected settings that JSON can hold, got {settings!r:.200}: {error}") from error
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(_NAME, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription], exif[ExifTags.Base.Software] = text, _NAME
    if kind == "JPEG" and (length := len(exif.tobytes())) > _JPEG_SEGMENT:
        raise ImageError(f"expected settings of at most {_JPEG_SEGMENT} bytes in a JPEG, got {length}; save a .png")
    return {"exif": exif}
