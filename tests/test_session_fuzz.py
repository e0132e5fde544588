"""A session under any order of calls does what a plain model of it does, or raises and stays whole.

The model is written from the formulas, in fp64 and with Python lists, and shares no code with the
package.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fuzzing import draws
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from dicache import DiCacheConfig, DiCacheSession

SHAPE = (2, 3, 4)
NUM_STEPS = 6
CONFIGS = {
    "default": DiCacheConfig(threshold=0.6, retention_ratio=0.0, compute_last_step=False),
    "retains": DiCacheConfig(threshold=2.0, retention_ratio=0.34),
    "limited": DiCacheConfig(threshold=math.inf, max_consecutive_reuse=1, retention_ratio=0.0),
    "independent": DiCacheConfig(threshold=0.6, retention_ratio=0.0, cfg="independent"),
    "published": DiCacheConfig.preset("wan2.1", threshold=1.5, retention_ratio=0.0),
    "schedule": DiCacheConfig(schedule="CRCRRC"),
}


class PlainContext:
    """What one branch remembers, by the book."""

    def __init__(self) -> None:
        self.window: list[tuple[Tensor, Tensor]] = []  # (r, q), the newest last
        self.previous_probe: Tensor | None = None
        self.accumulated = 0.0
        self.in_a_row = 0
        self.index = 0
        self.has_history = False


class PlainSession:
    """DiCache for steps that are told everything, one context at a time."""

    def __init__(self, config: DiCacheConfig) -> None:
        self.config = config
        self.contexts: dict[str, PlainContext] = {}

    def open(self, name: str) -> PlainContext:
        known = self.contexts.get(name)
        every = list(self.contexts.values())
        ended = bool(every) and all(context.index >= NUM_STEPS for context in every)
        if ended or (known is not None and known.index >= NUM_STEPS):
            self.contexts.clear()  # the run is over: a new one begins
        return self.contexts.setdefault(name, PlainContext())

    def asks(self, context: PlainContext) -> bool:
        config, index = self.config, context.index
        if not context.has_history:
            return False
        if config.schedule is not None:
            return config.schedule[index] == "R"
        if config.compute_last_step and index == NUM_STEPS - 1:
            return False
        retained = config.retention_ratio * NUM_STEPS
        nearest = config.retention_rounding == "nearest"
        return index >= math.floor(retained + 0.5 if nearest else retained)

    def judge(self, context: PlainContext, x: Tensor, p: Tensor) -> tuple[float, float]:
        """Error and gamma of the whole batch."""
        q = p - x
        (_, old), (_, new) = (
            (context.window * 2)[-2:] if len(context.window) < 2 else context.window
        )
        a, d = q - old, new - old
        low, high = self.config.gamma_range
        bound = math.inf if high is None else high
        if self.config.error == "delta_y":
            previous = context.previous_probe
            assert previous is not None
            error = float((p - previous).abs().sum() / previous.abs().sum())
            below = float(d.abs().sum())
            gamma = float(a.abs().sum()) / below if below else 1.0
            return error, min(max(gamma, low), bound)
        below = float((d * d).sum())
        gamma = float((a * d).sum()) / below if below else 1.0
        gamma = min(max(gamma, low), bound)
        return float((a - gamma * d).norm() / p.norm()), gamma

    def decides_to_reuse(self, context: PlainContext, error: float) -> bool:
        config = self.config
        context.accumulated += error
        if config.schedule is not None:  # each branch's own, also with shared decisions
            return True
        limit = config.max_consecutive_reuse
        if limit is not None and context.in_a_row >= limit:
            return False
        leader = next(iter(self.contexts.values()))
        leads = leader is context or leader.index != context.index + 1
        if config.cfg == "shared" and not leads:
            return leader.in_a_row > 0
        assert config.threshold is not None
        return context.accumulated < config.threshold

    def end(self, context: PlainContext, p: Tensor | None, reused: bool, done: bool) -> None:
        context.previous_probe = p
        context.in_a_row = context.in_a_row + 1 if reused else 0
        if not reused:
            context.accumulated = 0.0
        context.index += 1
        context.has_history = done
        if not done:
            context.window.clear()


class SessionMachine(RuleBasedStateMachine):
    """Random steps of two branches, ended in every way, with wrong calls in between."""

    @initialize(name=st.sampled_from(sorted(CONFIGS)))
    def begin(self, name: str) -> None:
        self.session = DiCacheSession(CONFIGS[name])
        self.plain = PlainSession(CONFIGS[name])
        self.step: Any = None
        self.ended: Any = None  # a step that is over
        self.seed = 0

    @precondition(lambda self: self.step is None)
    @rule(name=st.sampled_from(["cond", "uncond"]), size=st.sampled_from([0.02, 0.3, 2.0]))
    def open_step(self, name: str, size: float) -> None:
        self.seed += 1
        self.context = self.plain.open(name)
        generator = torch.Generator().manual_seed(self.seed)
        base = torch.Generator().manual_seed(0)
        self.x, self.p, self.y = (
            torch.randn(SHAPE, generator=base, dtype=torch.float64)
            + size * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
            for _ in range(3)
        )
        self.step = self.session.step(name, num_inference_steps=NUM_STEPS)
        self.held = False
        self.probed = False
        self.reuses = False
        asks = self.plain.asks(self.context)
        # An abandoned step leaves no history, and the window that it leaves is dropped.
        assert self.step.needs_probe == asks
        self.context.has_history = False

    @precondition(lambda self: self.step is None)
    @rule(
        names=st.lists(st.sampled_from(["cond", "uncond"]), min_size=1, max_size=8),
        size=st.sampled_from([0.02, 0.3, 2.0]),
        holds=st.booleans(),
    )
    def run_whole_steps(self, names: list[str], size: float, holds: bool) -> None:
        """What most steps are; single calls seldom get as far as a decision."""
        for name in names:
            self.open_step(name, size)
            if self.step.needs_probe:
                self.probe()
            if self.reuses:
                self.reuse()
                continue
            if holds:
                self.resume()
            self.record()

    @precondition(lambda self: self.step is not None and self.step.needs_probe and not self.probed)
    @rule()
    def probe(self) -> None:
        decision = self.step.probe(self.x, self.p)
        error, gamma = self.plain.judge(self.context, self.x, self.p)
        self.reuses = self.plain.decides_to_reuse(self.context, error)
        self.gamma, self.probed = gamma, True
        assert decision.error == pytest.approx(error, rel=1e-9, abs=1e-12)
        assert decision.gamma == pytest.approx(gamma, rel=1e-9, abs=1e-12)
        assert decision.accumulated_error == pytest.approx(self.context.accumulated, rel=1e-9)
        assert decision.action == ("reuse" if self.reuses else "resume")

    @precondition(lambda self: self.step is not None and self.reuses)
    @rule()
    def reuse(self) -> None:
        got = self.step.reuse(self.x)
        window = self.context.window
        (old, _), (new, _) = window if len(window) == 2 else window * 2
        assert torch.allclose(got, self.x + old + self.gamma * (new - old), rtol=1e-9, atol=1e-9)
        self.finish(reused=True, done=True)

    def computes(self) -> bool:
        """Whether it is settled that the open step is computed."""
        return self.step is not None and (self.probed or not self.step.needs_probe)

    @precondition(lambda self: self.computes() and not self.held)
    @rule()
    def resume(self) -> None:
        self.step.resume(self.x, self.p)
        self.held = True
        self.reuses = False  # computed after all

    @precondition(lambda self: self.step is not None)
    @rule()
    def record(self) -> None:
        """Also where the step might be reused, or was not probed though it might be."""
        given = (self.y,) if self.held else (self.x, self.p, self.y)
        assert torch.equal(self.step.record(*given), self.y)
        self.context.window.append((self.y - self.x, self.p - self.x))
        del self.context.window[:-2]
        self.finish(reused=False, done=True)

    @precondition(lambda self: self.step is not None)
    @rule()
    def abandon(self) -> None:
        self.step.close()
        self.finish(reused=False, done=False)

    @precondition(lambda self: self.step is None)
    @rule()
    def reset(self) -> None:
        self.session.reset()
        self.plain.contexts.clear()

    @precondition(lambda self: self.step is None)
    @rule(name=st.sampled_from(["cond", "uncond"]))
    def forget(self, name: str) -> None:
        self.session.forget(name)
        self.plain.contexts.pop(name, None)

    # --- wrong calls: an error, and nothing changes ---

    @precondition(lambda self: self.step is not None and not self.reuses)
    @rule()
    def reuse_undecided(self) -> None:
        with pytest.raises(RuntimeError, match="probe"):
            self.step.reuse(self.x)

    @precondition(lambda self: self.step is not None and (self.probed or not self.step.needs_probe))
    @rule()
    def probe_unasked(self) -> None:
        with pytest.raises(RuntimeError, match="needs_probe"):
            self.step.probe(self.x, self.p)

    @precondition(lambda self: self.step is not None and not self.computes())
    @rule()
    def resume_what_may_be_reused(self) -> None:
        with pytest.raises(RuntimeError, match="going to be computed"):
            self.step.resume(self.x, self.p)

    @precondition(lambda self: self.step is not None and not self.held)
    @rule()
    def record_without_inputs(self) -> None:
        with pytest.raises(RuntimeError, match="after resume"):
            self.step.record(self.y)

    @precondition(lambda self: self.step is not None and self.held)
    @rule()
    def resume_twice(self) -> None:
        with pytest.raises(RuntimeError, match="once"):
            self.step.resume(self.x, self.p)

    @precondition(lambda self: self.ended is not None)
    @rule()
    def use_an_ended_step(self) -> None:
        with pytest.raises(RuntimeError):
            self.ended.record(torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE))
        with pytest.raises(RuntimeError):
            self.ended.reuse(torch.zeros(SHAPE))
        with pytest.raises(RuntimeError):
            self.ended.probe(torch.zeros(SHAPE), torch.zeros(SHAPE))
        with pytest.raises(RuntimeError):
            self.ended.resume(torch.zeros(SHAPE), torch.zeros(SHAPE))
        self.ended.close()

    @rule(number=st.sampled_from([0, -3]))
    def open_with_a_wrong_number_of_steps(self, number: int) -> None:
        with pytest.raises(ValueError, match="num_inference_steps"):
            self.session.step("cond", num_inference_steps=number)

    @invariant()
    def holds_the_promised_tensors(self) -> None:
        session = getattr(self, "session", None)
        if session is not None:
            each = 5 if session.config.error == "delta_y" else 4
            assert session.stats.cache_tensors <= each * 2

    def finish(self, reused: bool, done: bool) -> None:
        self.plain.end(self.context, self.p, reused, done)
        self.ended, self.step = self.step, None
        self.reuses = False


TestSession = SessionMachine.TestCase
TestSession.settings = draws(60, stateful_step_count=40)
