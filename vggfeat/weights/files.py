"""Weight files: `.pth`, `.safetensors` and Keras' `.h5`, read as tensors. Nothing is unpickled that could run code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggfeat.arch import Arch
from vggfeat.devices import lacks_memory
from vggfeat.errors import RunError, WeightsError, WeightsUnavailableError, first_line, optional, quiet


def read(path: Path, *, mapped: bool = False) -> Mapping[str, Any]:
    """The tensors of a `.pth`, `.safetensors` or Keras `.h5` file, by its own keys.

    Args:
        path: the file.
        mapped: leave values in the file until they are used: layers that nobody asks for are never read. For files that
            nobody writes again: tensors would change with them, or end the process.

    Raises:
        WeightsError: a file that is truncated, of another kind, or a pickle that would run code.
        DependencyError: a `.h5` file without h5py.
        RunError: there is not enough memory.
    """
    if is_keras(path):
        return _read_keras(path)
    if path.suffix.lower() == ".keras":
        raise WeightsError(f"{path} is a Keras archive: save the weights alone, model.save_weights('vgg.weights.h5')")
    magic = _magic(path)
    if magic[8:] == b"{" or path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            with torch.device("cpu"):  # safetensors before 0.6 creates them on the default one
                values = load_file(path)
            return values if mapped else {key: value.clone() for key, value in values.items()}
        except (SafetensorError, OSError, ValueError) as error:
            hint = "; it seems to be torch's: name it .pth" if magic.startswith(b"PK") else ""
            raise WeightsError(f"{path} is damaged or no safetensors file: {error}{hint}") from error
    try:
        with quiet():  # about a pickle's protocol
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if magic.startswith((b"\x80", b"PK")):  # a pickle, or torch's zip around one
            raise WeightsError(
                f"{path} was not loaded: it holds more than tensors, and unpickling that could run code; "
                "save the state dict alone: torch.save(net.state_dict(), path)"
            ) from error
        raise WeightsError(f"{path} is damaged or no torch file: it starts with {magic[:8]!r}") from error
    except Exception as error:  # flipped bits make zip and pickle readers raise errors of any kind
        if lacks_memory(error):
            raise RunError(f"cannot read {path}: there is not enough memory") from error
        why = f"its reader failed with {type(error).__name__}" if isinstance(error, LookupError) else first_line(error)
        raise WeightsError(f"{path} is damaged or no torch file: {why}") from error
    if not isinstance(raw, Mapping):
        raise WeightsError(f"{path} holds a {type(raw).__name__}, expected a state dict")
    return raw


def _magic(path: Path) -> bytes:
    """The first bytes, which tell HDF5, a zip and safetensors (a length, then JSON) apart."""
    try:
        with path.open("rb") as file:
            return file.read(9)
    except OSError as error:
        raise WeightsUnavailableError(f"{path} cannot be read: {error.strerror}") from error


def is_keras(path: Path) -> bool:
    """Whether a file is one of Keras', which means HDF5, by its suffix or first bytes."""
    return path.suffix.lower() in (".h5", ".hdf5") or _magic(path)[:8] == b"\x89HDF\r\n\x1a\n"


def _read_keras(path: Path) -> dict[str, Tensor]:
    """Keras' VGG files: block1_conv1 … block5_conv4, fc1, fc2, predictions; kernels as (H,W,in,out), HWC flattening."""
    h5py = optional("h5py", f"{path.name} is a Keras file, which needs h5py: pip install 'vggfeat[h5]'")
    arrays: dict[str, dict[int, Tensor]] = {}

    def visit(name: str, item: Any) -> None:
        match = re.search(r"(?:^|/)(block\d_conv\d|fc[12]|predictions)(?:/|$)", name)
        if match and "optimizer" not in name and isinstance(item, h5py.Dataset):
            layer = arrays.setdefault(match[1], {})
            if item.ndim in layer:
                raise WeightsError(f"{path} holds more than one network: {match[1]} is there twice")
            layer[item.ndim] = torch.from_numpy(item[()]).to(torch.float32)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged or no HDF5 file: {first_line(error)}") from error
    config = "E" if "block3_conv4" in arrays else "D"
    state = {}
    for layer in Arch(config).convs:
        kernels = arrays.get(f"block{layer.name[4]}_conv{layer.name[6]}", {})
        if 4 in kernels and 1 in kernels:
            state[f"features.{layer.index}.weight"] = kernels[4].permute(3, 2, 0, 1).contiguous()
            state[f"features.{layer.index}.bias"] = kernels[1]
    for name, index in (("fc1", 0), ("fc2", 3), ("predictions", 6)):
        if {1, 2} <= arrays.get(name, {}).keys():
            weight = arrays[name][2]  # (in, out)
            if name == "fc1":  # Keras flattens (7,7,C), torch (C,7,7)
                if weight.shape[0] % 49:
                    break  # another classifier on the same convolutions
                weight = weight.reshape(7, 7, -1, weight.shape[1]).permute(2, 0, 1, 3).flatten(0, 2)
            state[f"classifier.{index}.weight"] = weight.T.contiguous()
            state[f"classifier.{index}.bias"] = arrays[name][1]
    if not state:
        raise WeightsError(f"{path} is not a Keras VGG: expected layers named block1_conv1 …")
    return state
