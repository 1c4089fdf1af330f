"""Pictures that tests make themselves: a smooth scene, and small labelled ones for the training path."""

import io
import pickle
import tarfile
import zipfile

import numpy
import torch
from PIL import Image
from torch.nn import functional as F

COLORS = {"ant": (220, 40, 40), "bee": (40, 200, 60), "cow": (50, 60, 220)}


def scene(width, height, seed=0, cells=5):
    """A smooth colourful picture, (1,3,height,width) in [0.1,0.9], on 256 levels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, cells, cells, generator=generator)
    image = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True) * 0.8 + 0.1
    return (image * 255).round() / 255


def picture(kind, number, width=32, height=32):
    """A plain colour of the class with noise, another for each number."""
    noise = numpy.random.default_rng(number).normal(0, 25, (height, width, 3))
    return Image.fromarray((numpy.array(COLORS[kind]) + noise).clip(0, 255).astype("uint8"))


def encoded(image, form="PNG"):
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def tree(count=8, offset=0, **size):
    """Content by path, `<class>/<number>.png`."""
    return {
        f"{kind}/{i}.png": encoded(picture(kind, 100 * c + i + offset, **size))
        for c, kind in enumerate(COLORS)
        for i in range(count)
    }


def folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def cifar_arrays(count, classes, seed):
    rng = numpy.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=numpy.uint8), rng.integers(0, classes, count).tolist()


def cifar(path, classes=10, version="python", per_file=6):
    """CIFAR in its published layout, with few images; returns the arrays (pixels, labels) of training and test set."""
    path.mkdir(parents=True, exist_ok=True)
    ten = classes == 10
    trains = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    parts, names = [], [f"name{i}" for i in range(classes)]
    for i, name in enumerate([*trains, "test_batch" if ten else "test"]):
        pixels, labels = cifar_arrays(per_file, classes, i)
        parts.append((pixels, labels))
        if version == "python":
            batch = {b"data": pixels, b"labels" if ten else b"fine_labels": labels, b"filenames": [b"a.png"] * per_file}
            (path / name).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            heads = [bytes([label] if ten else [label % 20, label]) for label in labels]
            content = b"".join(head + row.tobytes() for head, row in zip(heads, pixels, strict=True))
            (path / f"{name}.bin").write_bytes(content)
    if version == "python":
        meta = {b"label_names" if ten else b"fine_label_names": [name.encode() for name in names]}
        (path / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    else:
        (path / ("batches.meta.txt" if ten else "fine_label_names.txt")).write_text("\n".join(names) + "\n")
    joined = [
        (numpy.concatenate([p for p, _ in some]), [y for _, ys in some for y in ys])
        for some in (parts[:-1], parts[-1:])
    ]
    return joined, names


def archived(path, source):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source, source.name)
    return path
