"""Counts every classifier of torchvision once more, into vggfeat/assets/torchvision.json.

python -m tests.counted
"""

from __future__ import annotations

import json
from dataclasses import asdict

from torchvision import models

from vggfeat.analysis import comparison
from vggfeat.arch import parse
from vggfeat.errors import InputError


def names() -> list[str]:
    """Of the classifiers that are no VGG."""
    found = []
    for name in models.list_models(module=models):
        try:
            parse(name)
        except InputError:
            found.append(name)
    return found


if __name__ == "__main__":
    nets = [asdict(comparison._uncounted(name, 1000, None)[1]()) for name in names()]
    comparison.COUNTED.write_text("[\n" + ",\n".join(map(json.dumps, nets)) + "\n]\n")
    print(f"{len(nets)} networks, {comparison.COUNTED.stat().st_size} bytes")
