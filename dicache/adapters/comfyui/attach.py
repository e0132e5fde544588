"""The cache on a ComfyUI model: two wrappers on a clone of its patcher.

One is around a sampling run: it begins the run's state and frees it, whatever happens. The other
is around every call of the model, and puts the blocks' patches into a copy of the call's options.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ...config import AUTO, PRESETS, DiCacheConfig
from ...core.rules import Rules, resolve
from ...driver.families import unwrapped
from ...error_rules import ERROR_RULES
from ...stats import RunStats
from .locate import adds_noise
from .run import LOG, Run
from .table import Block, find_model
from .target import Lesson, Target

DEFAULT = "default"  # what the node calls this project's own rules
RULES = (DEFAULT, *PRESETS)
KEY = "dicache"
# What ComfyUI calls these places (`comfy.patcher_extension.WrappersMP`). A call is caught around
# the diffusion model's own, not inside of it: not every model asks for wrappers there, and whole
# models may be compiled there.
OUTER_SAMPLE, APPLY_MODEL = "outer_sample", "apply_model"
_OTHER_CACHES = ("easycache",)  # what ComfyUI's own caches leave in the options; LazyCache, too


def config_for(rules: str, threshold: float, target_speedup: float = 0.0) -> DiCacheConfig:
    """The configuration that the node's widgets stand for.

    Args:
        rules: This project's own or published ones.
        threshold: 0 is the model's own.
        target_speedup: 0 is none.

    Raises:
        ValueError: A value is none of these. ComfyUI does not hold it against the node's list, nor
            against its limits where another node gives it.
    """
    if rules not in RULES:
        raise ValueError(f"rules is {rules!r}. Expected one of {', '.join(RULES)}.")
    config = DiCacheConfig()
    if rules != DEFAULT:
        config = DiCacheConfig.preset(rules)  # type: ignore[arg-type]
    if target_speedup == 0:
        return config if threshold == 0 else replace(config, threshold=threshold)
    if rules != DEFAULT or threshold != 0 or not target_speedup >= 1:
        raise ValueError(
            f"target_speedup is {target_speedup}, rules {rules!r} and threshold {threshold}. "
            f"Expected a target of 0 (none), or one >= 1 with the rules {DEFAULT!r} and a "
            f"threshold of 0."
        )
    return replace(config, profile=AUTO, target_speedup=target_speedup)


def apply(model: Any, config: DiCacheConfig, start: float = 0.0, end: float = 1.0) -> Any:
    """A clone of a ComfyUI model whose sampling runs are cached; the model itself is unchanged.

    Args:
        model: A `ModelPatcher`.
        config: The rules.
        start, end: Shares of the sampling run, 0 to 1, between which steps may be reused.

    Raises:
        ValueError: The model is none that can be cached, the rules do not fit it, or another cache
            is on it.
    """
    row = find_model(model.model.diffusion_model)
    if config.granularity != "batch":
        raise ValueError(
            f"granularity is {config.granularity!r}. Expected 'batch': in ComfyUI a batch takes "
            f"its decisions as one."
        )
    if config.profile == AUTO and config.target_speedup is None:
        raise ValueError(
            "profile is 'auto' and there is no target_speedup. Expected both or none in ComfyUI."
        )
    _check_window(start, end)
    _refuse_others(model.model_options)
    blocks = _blocks(model.model, config.probe_depth)
    threshold, target = row.threshold_for(ERROR_RULES[config.error]), None
    if config.profile == AUTO:
        target = Target(config, threshold, model, len(blocks))
    rules = resolve(config, threshold) if target is None else target.plain
    cache = Cache(rules, start, end, target)
    clone = model.clone()
    for place, wrapper in ((OUTER_SAMPLE, cache.sample), (APPLY_MODEL, cache.call)):
        clone.remove_wrappers_with_key(place, KEY)  # a second node takes the place of the first
        clone.add_wrapper_with_key(place, KEY, wrapper)
    return clone


class Cache:
    """What the wrappers of one node share: the run that is under way, if there is one.

    Attributes:
        last: Statistics of the last run that ended by itself: one, or more where its sampler went
            back to an earlier step.
    """

    def __init__(
        self, rules: Rules, start: float = 0.0, end: float = 1.0, target: Target | None = None
    ) -> None:
        self._rules, self._start, self._end, self._target = rules, start, end, target
        self._run: Run | None = None
        self._told: set[str] = set()
        self.last: list[RunStats] = []

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a sampling run; args are noise, latent image, sampler, sigmas and more."""
        outer = self._run
        run = self._run = self._begin(executor.class_obj, args[0], args[2], args[3])
        try:
            result = executor(*args, **kwargs)
            if run is not None:
                LOG.info(run.report())
                run.learn()
                self.last = run.stats
            return result
        finally:
            self._run = outer
            if run is not None:
                run.end()

    def call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a call of the model; args are x, t, c_concat, c_crossattn, control, options."""
        run = self._run
        options = _argument("transformer_options", 5, args, kwargs)
        if run is None or run.is_off or executor.class_obj is not run.model or options is None:
            return executor(*args, **kwargs)
        call = run.call(options, _argument("control", 4, args, kwargs))
        replaced = dict(options.get("patches_replace") or {})
        others = replaced.get("dit") or {}
        replaced["dit"] = {**others, **call.patches(others)}
        patched = _with_options({**options, "patches_replace": replaced}, args, kwargs)
        try:
            result = executor(*patched[0], **patched[1])
        finally:
            call.close()
            run.count(call)
        if call.is_reused:  # nobody asked for what the last block returns
            run.is_off = True
            LOG.warning(_LOST)
            return executor(*args, **kwargs)
        return result

    def _begin(self, guider: Any, noise: Any, sampler: Any, sigmas: Any) -> Run | None:
        patcher = guider.model_patcher
        try:
            _refuse_others(guider.model_options)
            blocks = _blocks(patcher.model, self._rules.config.probe_depth)
        except ValueError as error:
            LOG.warning("DiCache computes every step of this run. %s", error)
            return None
        sampling = patcher.get_model_object("model_sampling")
        most = math.inf if self._start <= 0 else float(sampling.percent_to_sigma(self._start))
        least = 0.0 if self._end >= 1 else float(sampling.percent_to_sigma(self._end))
        window, steps, lesson = (most, least), tuple(sigmas.tolist()), None
        if self._target is not None and not adds_noise(sampler):  # such steps are all computed
            function = getattr(sampler, "sampler_function", sampler)
            name = getattr(function, "__name__", type(function).__name__)
            lesson = Lesson(self._target, len(steps) - 1, (steps, name, tuple(noise.shape[1:])))
        return Run(self._rules, patcher.model, blocks, steps, window, sampler, self._told, lesson)


def _blocks(model: Any, depth: int) -> list[Block]:
    """The blocks of ComfyUI's model, more than form the probe."""
    diffusion_model = unwrapped(model.diffusion_model)
    blocks = find_model(diffusion_model).blocks(diffusion_model)
    if depth >= len(blocks):
        raise ValueError(
            f"probe_depth is {depth} and {type(diffusion_model).__name__} has {len(blocks)} "
            f"blocks. Expected less than these."
        )
    return blocks


def _argument(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A dictionary that a call was given by place or by name, or `None`."""
    value = args[place] if len(args) > place else kwargs.get(name)
    return value if isinstance(value, dict) else None


def _with_options(
    options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with other options."""
    if len(args) > 5:
        return (*args[:5], options, *args[6:]), kwargs
    return args, {**kwargs, "transformer_options": options}


def _check_window(start: float, end: float) -> None:
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"start_percent is {start} and end_percent {end}. Expected 0 <= start <= end <= 1."
        )


def _refuse_others(model_options: dict[str, Any]) -> None:
    options = model_options.get("transformer_options", {})
    for name in _OTHER_CACHES:
        if name in options:
            raise ValueError(
                f"Another cache is on the model ({name}). Two caches do not stack: take one off."
            )


_LOST = (
    "DiCache: another node's patch took the place of the last block's while the model ran, so that "
    "a reused step was not ended. It is computed, and so is the rest of this run."
)
