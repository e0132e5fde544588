"""`calibrate`: a few runs of the user's own model make a profile, by which the cache knows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .adapters import apply_dicache, remove_dicache, sessions_of
from .config import DiCacheConfig
from .core.calibration import assumed_gains, expected_psnr, expected_square, planned, planner_of
from .core.extrapolation import Extrapolation
from .core.recorder import Recorder
from .core.session import DiCacheSession
from .profile import ModelProfile, Moments, Profile

_STIFFNESS = 2.0  # of the gains' assumed shape: as many measurements hold it as bend it

Run = Callable[[int], Tensor]
Recorded = Mapping[str, Mapping[str, Moments]]  # of one sample, by model and context


def calibrate(
    model: Any,
    run: Run,
    samples: int = 2,
    *,
    gains: int = 16,
    elements: int = 65536,
    probe_depth: int = 1,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Learn from un-cached runs how a model's steps follow from each other.

    It takes `samples` runs that record and `gains` more, in each of which one step is filled in, to
    see what that changes at the end. All of them take the time of un-cached ones.

    Args:
        model: Whatever `apply_dicache` takes. It has no cache yet, and has none afterwards.
        run: `run(i)` is one whole generation of sample i as its final latents or pictures, floating
            point, the same for the same i. A sample may be a batch. Ranks that share a model all
            call this function, `run` returns the whole on each, and they get one profile.
        samples: Number of samples, >= 1: prompts and seeds like those that the profile is for.
        gains: Number of runs that measure how far an error goes, at steps spread over the run; 0
            assumes it (`core.calibration.assumed_gains`), and `target_psnr` cannot be had.
        elements: Elements of a sample's hidden states of which moments are taken, at most. They
            take 8 bytes an element, step and context of host memory.
        probe_depth: As in `DiCacheConfig`.
        about: What the profile should say of itself to people: guidance, scheduler, prompts.
        progress: Called with the number of runs that are over, and of all.

    Returns:
        The profile, for `DiCacheConfig(profile=...)`.

    Raises:
        ValueError: The model is not supported or has a cache, `run` does not drive it, or steps are
            missing.
        TypeError: `run` returns no floating-point tensor.
    """
    if samples < 1 or gains < 0:
        raise ValueError(f"samples is {samples} and gains {gains}. Expected >= 1 and >= 0.")
    done, total = 0, samples + gains

    def run_one(index: int) -> Tensor:
        nonlocal done
        output = _checked(run(index), index)
        done += 1
        if progress is not None:
            progress(done, total)
        return output

    profile, outputs, recorded, share = _observe(model, run_one, samples, elements, probe_depth)
    profile = replace(profile, about={"torch": torch.__version__, **(about or {})})
    measured: dict[int, float] = {}
    steps = _spread(profile, gains)
    total = samples + len(steps)  # a short run has few
    for number, step in enumerate(steps):
        index = number % samples
        change = _change(model, run_one, profile, step, index, outputs[index])
        error = _error(profile, step, recorded[index])
        if change > 0 and error > 0:
            measured[step] = change / error
    return share(replace(profile, gains=_for_all_steps(measured, profile))) if gains else profile


@dataclass(frozen=True)
class Expectation:
    """What a profile says of a plan.

    Attributes:
        computed: Number of computed steps of a run.
        speedup: Block work of the un-cached run over that of the planned one, probes included.
        psnr: In dB, of what the run returns; `None` where the profile has no measured gains.
        masks: The steps of every model, by its name, where no probe objects.
    """

    computed: int
    speedup: float
    psnr: float | None
    masks: dict[str, str]


def expect(
    profile: Profile, config: DiCacheConfig, default_threshold: float | None = None
) -> Expectation:
    """What the plan that a configuration makes of a profile computes, and expects.

    Args:
        profile: Of a model or pipeline.
        config: With a target.
        default_threshold: Without a target, the threshold whose cost is met.

    Raises:
        ValueError: The target cannot be had from this profile.
    """
    planners = {name: planner_of(profile, name, config) for name in profile.models}
    shares = planned(profile, planners, config, default_threshold)
    computed, psnr = sum(shares.values()), None
    if profile.gains is not None and profile.peak is not None:
        psnr = expected_psnr(profile, expected_square(planners, shares))
    masks = {name: planner.schedule(shares[name]) for name, planner in planners.items()}
    return Expectation(computed, profile.block_speedup(computed), psnr, masks)


@contextmanager
def _cached(model: Any, config: DiCacheConfig) -> Iterator[dict[str, DiCacheSession]]:
    """The model with a cache, and its sessions."""
    apply_dicache(model, config)
    try:
        yield sessions_of(model)
    finally:
        remove_dicache(model)


def _checked(output: Any, index: int) -> Tensor:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"run({index}) returned {kind}. Expected a floating-point tensor: the final latents or "
            f"pictures, a pipeline's output_type='latent' or 'pt'."
        )
    return output.detach().to("cpu", torch.float32)


def _observe(
    model: Any, run: Run, samples: int, elements: int, probe_depth: int
) -> tuple[Profile, list[Tensor], list[Recorded], Callable[[Profile], Profile]]:
    """Un-cached runs: the profile without gains, what the runs returned, and each one's moments.

    And what makes the first rank's profile that of all who share the model.
    """
    outputs: list[Tensor] = []
    recorded: list[Recorded] = []
    config = DiCacheConfig(  # computes every step, however many there are
        threshold=0.0, retention_ratio=0.0, compute_last_step=False, probe_depth=probe_depth
    )
    with _cached(model, config) as sessions:
        recorders = {name: Recorder(elements) for name in sessions}
        for index in range(samples):
            for name, session in sessions.items():
                recorders[name].clear()
                session.recorder = recorders[name]
                session.reset()
            output = run(index)
            if not output.isfinite().all():
                raise ValueError(f"run({index}) returned NaN or infinity without a cache.")
            outputs.append(output)
            ranks = {name: session.ranks for name, session in sessions.items()}
            found = {name: each.moments(ranks[name]) for name, each in recorders.items()}
            recorded.append({name: contexts for name, contexts in found.items() if contexts})
        identities = {name: session.identity for name, session in sessions.items()}
    _check_alike(recorded)
    _check_length(recorded)
    timesteps: dict[int, float | None] = {}
    models = {}
    for name in recorded[0]:
        identity = identities[name]
        assert identity is not None  # every adapter's model has one
        contexts = {key: _mean([each[name][key] for each in recorded]) for key in recorded[0][name]}
        models[name] = ModelProfile(identity, probe_depth, contexts)
        timesteps |= recorders[name].timesteps
    if sorted(timesteps) != [*range(len(timesteps))]:
        raise ValueError(
            f"The steps {sorted(timesteps)} were seen. Expected all steps of a run from its first "
            f"one on: a model that takes over is calibrated with the one before it, by their "
            f"pipeline."
        )
    known = [timesteps[step] for step in sorted(timesteps)]
    profile = Profile(
        models,
        num_steps=len(known),
        timesteps=tuple(float(t) for t in known if t is not None) if None not in known else None,
        peak=_range(outputs) or None,
        samples=sum(_batch(each) for each in outputs),
        elements=max(each.taken for each in recorders.values()),
    )
    name = next(iter(models))
    share = partial(ranks[name].take_first, device=recorders[name].device)
    return share(profile), outputs, recorded, share


def _check_alike(recorded: list[Recorded]) -> None:
    """See that the runs called the same models and contexts, in as many steps."""
    kinds = [
        {(n, c, m.first, m.num_steps) for n, each in run.items() for c, m in each.items()}
        for run in recorded
    ]
    if not kinds[0]:
        raise ValueError("No step of the model was seen. Expected `run` to call it.")
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"The runs differ in their contexts or steps: (model, context, first step, steps) are "
            f"{[sorted(kind) for kind in kinds]}. Expected runs of one kind."
        )


def _check_length(recorded: list[Recorded]) -> None:
    """See that there is a step that could be reused: the first two of a model never are."""
    contexts = [moments for each in recorded[0].values() for moments in each.values()]
    most = max(moments.num_steps for moments in contexts)
    if most < 3:
        raise ValueError(
            f"A run has {most} steps of a model. Expected three or more steps: two are computed "
            f"first."
        )


def _mean(moments: list[Moments]) -> Moments:
    total = moments[0]
    for more in moments[1:]:
        total = total + more
    return total / len(moments)


def _range(outputs: list[Tensor]) -> float:
    """What a PSNR of such outputs is relative to: 1 for pictures in [0, 1], else their range."""
    low = min(float(each.min()) for each in outputs)
    high = max(float(each.max()) for each in outputs)
    return 1.0 if low >= 0 and 0.5 < high <= 1 else high - low


def _batch(output: Tensor) -> int:
    return output.shape[0] if output.dim() > 3 else 1


def _spread(profile: Profile, count: int) -> list[int]:
    """The last step and others spread over the run, each behind at least two of the same model."""
    firsts = {next(iter(each.contexts.values())).first for each in profile.models.values()}
    usable = [s for s in range(profile.num_steps) if not {s, s - 1} & firsts]
    if not count or not usable:
        return []
    *inner, last = usable
    places = torch.linspace(len(inner) - 1, 0, min(count - 1, len(inner))).round().int().tolist()
    return [last, *(inner[place] for place in places)]


def _entries(step: int, moments: Moments) -> tuple[int, ...]:
    """The last three steps of the same model."""
    return tuple(range(step - 1, max(step - 4, moments.first - 1), -1))


def _change(
    model: Any, run: Run, profile: Profile, step: int, index: int, expected: Tensor
) -> float:
    """The rms change of what a run returns where this step is filled in."""
    mask = "C" * step + "R" + "C" * (profile.num_steps - step - 1)
    probe_depth = next(iter(profile.models.values())).probe_depth
    config = DiCacheConfig(
        profile=profile,
        schedule=mask,
        probe_depth=probe_depth,
        num_inference_steps=profile.num_steps,
    )
    with _cached(model, config):
        change = (run(index) - expected).square().mean(dtype=torch.float64).sqrt()
    return float(change) if change.isfinite() else 0.0


def _error(profile: Profile, step: int, recorded: Recorded) -> float:
    """The rms error of r at that step, in all contexts: the run was un-cached up to there."""
    square = 0.0
    for name, contexts in recorded.items():
        for context, moments in contexts.items():
            if moments.first < step < moments.first + moments.num_steps:
                entries = _entries(step, moments)
                mean = Extrapolation(profile.models[name].contexts[context])
                weights = mean.weights(step, entries)
                square += Extrapolation(moments).error_of(step, entries, weights)
    return math.sqrt(square)


def _for_all_steps(measured: Mapping[int, float], profile: Profile) -> tuple[float, ...]:
    """Gains of all steps: the assumed ones, bent by a parabola towards what was measured.

    Least squares of the logarithms, with a penalty on the bend: how far an error goes differs by a
    factor of ten between single samples, and a few of them must not make a shape of their own.
    An error in the last step meets no further one, so that step has its own.
    """
    if not measured:
        raise ValueError(
            "Filling in a step changed nothing at the end of any run. Expected `run` to return "
            "what the model generates, not rounded to whole numbers."
        )
    last = profile.num_steps - 1
    assumed = torch.tensor(assumed_gains(profile), dtype=torch.float64)
    inner = {step: gain for step, gain in measured.items() if step != last} or dict(measured)
    steps = torch.tensor(sorted(inner))
    found = torch.tensor([inner[int(step)] for step in steps], dtype=torch.float64)
    places = torch.linspace(-1, 1, profile.num_steps, dtype=torch.float64)
    powers = places[:, None] ** torch.arange(3)
    penalty = torch.diag(torch.tensor([0.0, _STIFFNESS, _STIFFNESS], dtype=torch.float64).sqrt())
    matrix = torch.cat([powers[steps], penalty])
    right = torch.cat([(found / assumed[steps]).log(), torch.zeros(3, dtype=torch.float64)])
    bend = torch.linalg.lstsq(matrix, right[:, None]).solution.flatten()
    gains = (assumed * (powers @ bend).exp()).tolist()
    gains[last] = measured.get(last, gains[last])
    return tuple(gains)
