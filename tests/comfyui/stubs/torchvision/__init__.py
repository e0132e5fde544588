"""As much of torchvision as ComfyUI wants to import; builds of the real one follow torch's."""

import importlib.machinery
import sys
import types

for _name in ("transforms", "io", "ops", "utils"):
    _module = types.ModuleType(f"{__name__}.{_name}")
    _module.__spec__ = importlib.machinery.ModuleSpec(_module.__name__, None)
    globals()[_name] = sys.modules[_module.__name__] = _module
