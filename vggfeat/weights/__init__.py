"""Weight sets: where they come from, how they are found, and how a network gets them.

Whatever the source, weights leave this package with torchvision's keys, float32 values, a first convolution that takes
RGB, and the mean and standard deviation for normalising images in [0,1]. Nothing that could run code is ever
unpickled here.

`sets.py` finds and loads them: by `fetch.py` what is published, by `files.py` any file, by `random.py` what is drawn;
`state_dicts.py` knows their keys, and of which network they are.
"""

from vggfeat.weights.fetch import recorded, verify
from vggfeat.weights.sets import (
    BUNDLED,
    DEFAULT,
    IMAGENET,
    SETS,
    Convention,
    Published,
    Weights,
    WeightsLike,
    find,
    folders,
    load,
    load_weights,
    published_files,
    resolved,
    run_metadata,
)

__all__ = [
    "BUNDLED",
    "DEFAULT",
    "IMAGENET",
    "SETS",
    "Convention",
    "Published",
    "Weights",
    "WeightsLike",
    "find",
    "folders",
    "load",
    "load_weights",
    "published_files",
    "recorded",
    "resolved",
    "run_metadata",
    "verify",
]
