"""DiCache as a cache backend of vLLM-Omni; the only module here that imports it."""

from __future__ import annotations

import logging
from typing import Any

from vllm_omni.diffusion.cache.base import CacheBackend

from . import attach
from .settings import config_of, keys_of

_log = logging.getLogger(__name__)


class DiCacheBackend(CacheBackend):
    """What vLLM-Omni calls: `enable` once, `refresh` before every request or batch of requests.

    Args:
        config: `cache_config` as vLLM-Omni made it, or the keys: `preset` and fields of
            `DiCacheConfig`.

    Raises:
        ValueError: A key or its value is unknown.

    Attributes:
        rules: What the keys say.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.rules = config_of(keys_of(config), "cache_config of cache_backend='dicache'")

    def enable(self, pipeline: Any) -> None:
        """Put the cache on the pipeline's transformers.

        Raises:
            ValueError: None of them is supported, one is cached already, or several GPUs share it.
        """
        attach.apply(pipeline, self.rules)
        self.enabled = True
        _log.info("DiCache is on %s: %s", type(pipeline).__name__, self.rules)

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """A new request, or batch of requests, of so many steps (0: unknown)."""
        if not self.enabled:
            self.enable(pipeline)
        for name, cached in attach.HOLDERS.cached(pipeline).items() if verbose else ():
            done = cached.session.stats
            steps = done.num_computed + done.num_resumed + done.num_reused
            if steps:
                _log.info(
                    "DiCache reused %d of %d steps of %s since the last request began.",
                    done.num_reused,
                    steps,
                    name,
                )
        attach.ensure(pipeline, self.rules)
        attach.begin(pipeline, pipeline, num_inference_steps or None)

    def disable(self, pipeline: Any) -> None:
        """Take the cache off again."""
        if self.enabled:
            attach.remove(pipeline)
            self.enabled = False
