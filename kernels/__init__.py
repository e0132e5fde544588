"""Triton bodies of the operators in `dicache.ops`, one operator per file. None is written yet.

Import it as `dicache.kernels`: the folder enters the package through the symlink `dicache/kernels`,
and no top-level `kernels` is ever installed, because that name belongs to another project. Nothing
imports this package before a Triton backend is chosen, so `import dicache` works without Triton.
"""
