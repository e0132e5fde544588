"""The entry point for SGLang's diffusion server: hooks on its denoising stage.

SGLang has no configuration for foreign caches, so an environment variable has it:
`DICACHE_SGLANG='{"threshold": 0.05}'`, `'{}'` for the defaults. Without it nothing is hooked. An
error in it is raised where SGLang logs what plug-ins did wrong, and serves on without them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ...config import DiCacheConfig
from . import attach
from .settings import config_of

VARIABLE = "DICACHE_SGLANG"
_PLUGINS = "sglang.multimodal_gen.runtime.platforms.plugins"
_STAGE = "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising.DenoisingStage"
ENABLE, RESET = f"{_STAGE}._maybe_enable_cache_dit", f"{_STAGE}._reset_dit_cache_states"

_log = logging.getLogger(__name__)


def register() -> None:
    """Hook the denoising stage, if the environment asks for it.

    Raises:
        ValueError: The variable holds no JSON object, or one with unknown keys or values.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        _log.debug("DiCache: %s is not set, so nothing is cached.", VARIABLE)
        return
    hooks = Hooks(_config_from(text))
    try:
        plugins = import_module(_PLUGINS)
        around, after = plugins.HookType.AROUND, plugins.HookType.AFTER
        hook = plugins.plugin_hook
    except (ImportError, AttributeError) as error:
        _log.warning(
            "DiCache is not on, because this SGLang is not as expected: SGLang 0.5.23 has "
            "plugin_hook(target, type) and HookType.AROUND, AFTER in %s. %s: %s",
            _PLUGINS,
            type(error).__name__,
            error,
        )
        return
    hook(ENABLE, around)(hooks.around_enable)
    hook(RESET, after)(hooks.after_reset)


class Hooks:
    """What SGLang calls when a batch comes to a denoising stage.

    Args:
        config: The rules.
    """

    def __init__(self, config: DiCacheConfig) -> None:
        self._config = config
        self._told: set[str] = set()

    def around_enable(
        self, original: Callable[..., Any], stage: Any, num_inference_steps: Any, batch: Any
    ) -> Any:
        """Put the cache on the stage's transformers, or take it off, where another one comes.

        Raises:
            ValueError: Several GPUs share a transformer.
        """
        done = original(stage, num_inference_steps, batch)
        reason = _why_not(stage, batch)
        if reason is not None:
            self._tell(f"DiCache stays out of requests like this one: {reason}")
            if attach.HOLDERS.cached(stage):
                attach.remove(stage)
        elif attach.models_of(stage):
            attach.ensure(stage, self._config)
        else:
            self._tell(attach.unsupported(stage))
        return done

    def after_reset(self, done: Any, stage: Any, batch: Any) -> None:
        """The batch's steps begin."""
        attach.begin(stage, batch, getattr(batch, "num_inference_steps", None))

    def _tell(self, message: str) -> None:
        """Log a thing once."""
        if message not in self._told:
            self._told.add(message)
            _log.warning(message)


def _why_not(stage: Any, batch: Any) -> str | None:
    """What stands in the cache's way; two caches do not stack."""
    if getattr(stage, "_cache_dit_enabled", False):
        return "they use Cache-DiT (enable_cache_dit, SGLANG_CACHE_DIT_ENABLED)."
    for name in ("enable_teacache", "enable_spectrum"):
        if getattr(batch, name, False):
            return f"they use another cache ({name})."
    if getattr(getattr(stage, "server_args", None), "enable_breakable_cuda_graph", False):
        return "a decision cannot be taken inside of a CUDA graph (enable_breakable_cuda_graph)."
    return None


def _config_from(text: str) -> DiCacheConfig:
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{VARIABLE} is {text!r}, which is no JSON ({error}).") from error
    if not isinstance(given, dict):
        raise ValueError(
            f'{VARIABLE} is {text!r}. Expected a JSON object, {{"threshold": 0.05}} say, or {{}}.'
        )
    return config_of(given, VARIABLE)
