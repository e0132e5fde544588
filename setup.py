"""Build script: everything declarative is in pyproject.toml.

Nothing is compiled yet. The extension modules `dicache._C` (CPU) and `dicache._C_cuda` will be
built here from csrc/.
"""

from setuptools import setup

setup()
