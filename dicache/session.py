"""A cache session: drives gate and trajectory for every context of a run, one step at a time.

Any denoising loop can drive it; it knows no model and no diffusers. It guarantees that a step is
reused only on valid history of the same run and layout: a new run, a new shape, dtype or device,
an abandoned step, a missing or non-finite value all lead to a computed step.

    session = DiCacheSession(DiCacheConfig(threshold=0.1))
    for t in timesteps:
        with session.step("cond", timestep=t, num_inference_steps=len(timesteps)) as step:
            p = probe_blocks(x)
            if step.needs_probe:
                step.probe(x, p)
            if step.action == "reuse":
                y = step.reuse(x)
            else:
                y = remaining_blocks(p)
                step.record(x, p, y)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .config import DiCacheConfig
from .gate import Gate
from .ops import resolve_backend
from .packed import make_trajectory
from .readback import Readback, as_number, one_number
from .stats import RunStats, StepRecord
from .trajectory import Trajectory


class DiCacheWarning(UserWarning):
    """The cache computed where it would rather have decided; the message says why."""


@dataclass(frozen=True)
class Decision:
    """What the gate decided on one probed step, for the whole batch or for one sample.

    Attributes:
        action: `"reuse"` or `"resume"` (`"compute"` if the probe showed that a new run began). With
            a decision a sample, `"reuse"` if all samples reuse.
        error: The step's error; `None` for `"compute"`, and where every sample has its own.
        accumulated_error: What was compared with the threshold; `None` likewise.
        gamma: The weight that `reuse` will use; `None` likewise.
        samples: With `granularity="sample"`, the decision for every sample.
    """

    action: str
    error: float | None = None
    accumulated_error: float | None = None
    gamma: float | None = None
    samples: tuple[Decision, ...] = ()

    @property
    def reuses_any(self) -> bool:
        """Whether some sample reuses."""
        return self.action == "reuse" or any(each.action == "reuse" for each in self.samples)


_COMPUTE = Decision("compute")


class _Context:
    """Gates, trajectory and position of one context (`"cond"`, `"uncond"`, ...) in one run."""

    def __init__(self, config: DiCacheConfig) -> None:
        self.gates = [Gate(config)]  # one for the whole batch, or one a sample
        self.trajectory: Trajectory | None = None
        self.next_step = 0
        self.timestep: float | None = None  # of the last step
        self.phase: str | None = None  # that the entries were computed in
        self.to_compute = 0  # steps of a new phase that are computed before one is reused
        self.has_history = False  # whether the last step was ended by reuse or record


class DiCacheSession:
    """State and statistics of one model's cache over its contexts and runs.

    Args:
        config: The rules; `threshold` must be a number unless `schedule` is given.
        ascending_timesteps: Whether timesteps rise during a run. A timestep that moves the other
            way starts a new run.

    Raises:
        ValueError: No threshold is given, or the backend is not there.

    Attributes:
        stats: `RunStats` of the current or last run. It outlives the state.
        num_inference_steps: Number N of steps of that run; `None` where nobody said it.
    """

    def __init__(self, config: DiCacheConfig, *, ascending_timesteps: bool = False) -> None:
        Gate(config)  # a threshold of None or an absent backend is refused here, not
        resolve_backend(config.backend)  # in the middle of the first run
        self.config = config
        self.stats = RunStats()
        self.ascending_timesteps = ascending_timesteps
        self._direction = 1.0 if ascending_timesteps else -1.0
        self._contexts: dict[str, _Context] = {}
        self.num_inference_steps: int | None = None
        self._timestep: float | None = None
        self._first_timestep: float | None = None
        self._warned: set[str] = set()
        self._running = False

    def step(
        self,
        context: str,
        *,
        timestep: Tensor | float | None = None,
        num_inference_steps: int | None = None,
        is_last: bool | None = None,
    ) -> Step:
        """Open the next step of `context`, as a context manager.

        Args:
            context: Name of the branch; every branch has its own history and schedule.
            timestep: The step's timestep. One that moves against the run's direction starts a new
                run; equal timesteps do not. A tensor is read on the host.
            num_inference_steps: Number N of steps of the run; `None` takes the configuration's.
                Another N than before starts a new run.
            is_last: Whether this is the run's last step; `None` counts the context's steps.

        Raises:
            ValueError: `num_inference_steps` is smaller than 1.
        """
        self.observe(timestep, num_inference_steps)
        return self.open_step(context, is_last)

    def open_step(self, context: str, is_last: bool | None = None) -> Step:
        """The next step of `context`, of which `observe` has seen the timestep already."""
        steps = self.num_inference_steps
        known = self._contexts.get(context)
        if known is not None and steps is not None and known.next_step >= steps:
            self._begin_run(steps)
            known = None
        state = self._begin_context(context) if known is None else known
        if is_last is None:
            is_last = steps is not None and state.next_step == steps - 1
        return Step(self, context, state, is_last)

    def observe(
        self,
        timestep: Tensor | float | None = None,
        num_inference_steps: int | None = None,
        first_timestep: float | None = None,
    ) -> None:
        """Begin a new run if these values of the coming step say that one began.

        `step` does this by itself. A caller that names contexts by what it saw in a run calls it
        before naming: `stats.contexts` is empty then, and only then, if a run begins.
        `first_timestep` is that of the run's first step, where another model took it.

        Raises:
            ValueError: `num_inference_steps` is smaller than 1.
        """
        value = as_number(timestep) if isinstance(timestep, Tensor) else timestep
        steps = num_inference_steps or self.config.num_inference_steps
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}. Expected an integer >= 1."
            )
        begins = not self._running or self._is_new_run(value, steps)
        self._timestep = value
        if begins:
            self._begin_run(steps)
            self._first_timestep = value if first_timestep is None else first_timestep

    def runs_on(self, timestep: float | None) -> bool:
        """Whether a step with this timestep would go on with the run that is known."""
        return self._running and not self._is_new_run(timestep, self.num_inference_steps)

    def forget(self, context: str) -> None:
        """Free the state of one context; its next step computes."""
        self._contexts.pop(context, None)

    def reset(self) -> None:
        """Free all state now. Statistics stay until the first step of the next run."""
        self._contexts.clear()
        self._running = False

    def warn(self, cause: str, message: str) -> None:
        """Warn with `DiCacheWarning`, once per run and cause."""
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(message, DiCacheWarning, stacklevel=2)

    def _begin_run(self, num_inference_steps: int | None) -> None:
        self._contexts.clear()
        self.stats = RunStats()
        self.num_inference_steps = num_inference_steps
        self._first_timestep = self._timestep
        self._warned.clear()
        self._running = True

    def _is_new_run(self, timestep: float | None, steps: int | None) -> bool:
        if steps != self.num_inference_steps:
            return True
        contexts = self._contexts.values()
        is_over = steps is not None and contexts and all(c.next_step >= steps for c in contexts)
        if timestep is None or self._timestep is None:
            return bool(is_over)
        if is_over and timestep != self._timestep:  # equal: the last step of another branch
            return True
        # Only a move against the direction counts: contexts share a timestep, and bf16 timesteps
        # and two-evaluation schedulers repeat it.
        return (timestep - self._timestep) * self._direction < 0

    def _step_size(self, state: _Context) -> float:
        """N (t_prev - t) / t_first: the step's size relative to the run's mean; 1 if unknown.

        A run leads from t_first to 0. One with rising timesteps does not say where it ends, and
        equal timesteps (rounded, or two evaluations a step) say nothing about the size.
        """
        previous, state.timestep = state.timestep, self._timestep
        now, first, steps = self._timestep, self._first_timestep, self.num_inference_steps
        if previous is None or now is None or not first or not steps or self._direction > 0:
            return 1.0
        size = steps * (previous - now) / first
        return size if size > 0 else 1.0

    def _restart(self, context: str, phase: str | None) -> _Context:
        """Begin a new run in the middle of a step, which becomes the new run's first."""
        self._begin_run(self.num_inference_steps)
        state = self._begin_context(context)
        state.timestep, state.phase = self._timestep, phase
        return state

    def _begin_context(self, context: str) -> _Context:
        state = self._contexts[context] = _Context(self.config)
        self.stats.contexts.setdefault(context, [])  # kept where only the state was forgotten
        return state

    def _update_peaks(self) -> None:
        held = [state.trajectory for state in self._contexts.values() if state.trajectory]
        tensors = sum(trajectory.num_tensors for trajectory in held)
        num_bytes = sum(trajectory.num_bytes for trajectory in held)
        self.stats.cache_tensors = max(self.stats.cache_tensors, tensors)
        self.stats.cache_bytes = max(self.stats.cache_bytes, num_bytes)


class Step:
    """One step of one context, from `DiCacheSession.step`; end it with `reuse` or `record`.

    Leaving it without either, by an exception or on purpose, makes the context's next step
    compute.

    Attributes:
        name: The context's.
        index: The step's place in its context's run, from 0.
        action: `"compute"`, until `probe` decides on `"resume"` or `"reuse"`.
        needs_probe: Whether to ask `probe`; `False` on a step that is computed anyway.
        rows: Where samples disagree, those whose remaining blocks have to run; else `None`.
        pairs_branches: Set it where a batch is [unconditional, conditional] samples, for
            `cfg="shared"`: sample b then decides for sample b + B / 2, too.
    """

    def __init__(self, session: DiCacheSession, name: str, state: _Context, is_last: bool) -> None:
        self._session = session
        self.name = name
        self._state = state
        self.index = state.next_step
        self._decision = _COMPUTE
        self._gamma: Tensor | None = None  # [B]
        self._queued: Tensor | None = None  # the reused tokens, where `probe` began with them
        self._done = False
        self._promise: tuple[Tensor, Callable[[float], bool]] | None = None
        self._size = session._step_size(state)
        self._by_sample = session.config.granularity == "sample"
        # A schedule is each context's own.
        self._shares_decisions = session.config.cfg == "shared" and not session.config.schedule
        self.rows: list[int] | None = None
        self.pairs_branches = False
        self.needs_probe = self._is_judged(is_last) and state.has_history
        if state.trajectory is not None and not state.has_history:
            state.trajectory.drop_entries()
        elif self.needs_probe and session.config.packs and state.trajectory is not None:
            state.trajectory.fetch()
        state.has_history = False  # until this step is done

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the step; what `with` does at its end."""
        if not self._done:
            self._done = True
            for gate in self._state.gates:
                gate.finish(reused=False)
            self._state.next_step += 1

    @property
    def is_done(self) -> bool:
        """Whether it was ended by `reuse`, `record` or `close`."""
        return self._done

    @property
    def action(self) -> str:
        return self._decision.action

    def enter_phase(self, phase: str | None) -> None:
        """Say what the blocks compute in, where that changes in the middle of a run.

        Residuals of two phases (full and sparse attention, say) do not make one trajectory. So in
        a new phase the context's trajectory begins anew, and two steps are computed before one is
        reused. Call it before `probe`, in every step.
        """
        state = self._state
        if phase != state.phase:
            state.phase = phase
            if state.trajectory is not None:
                state.trajectory.drop_entries()
                state.to_compute = 2
        if state.to_compute:
            self.needs_probe = False

    def promise(self, timestep: Tensor, keeps: Callable[[float], bool]) -> None:
        """Let `probe` read this timestep too, in its one wait; it tells what step this really is.

        Where `keeps` denies the value, the step is of another run than the session was told, and
        instead of being reused it is computed, as the first of a new run.
        """
        self._promise = (one_number(timestep), keeps)

    def probe(self, x: Tensor, p: Tensor) -> Decision:
        """Judge the step by its probe; waits for the device once.

        On a GPU the reused tokens are queued before the wait, so that it works on them while the
        host decides; where the answer is to compute they are thrown away.

        Args:
            x: [B, ...] tokens before block 0.
            p: [B, ...] tokens after the first `probe_depth` blocks.

        Returns:
            The decision. Tensors of another shape, dtype or device than before begin a new run:
            the action is then `"compute"`.

        Raises:
            RuntimeError: `needs_probe` is False, or the step was probed or ended already.
        """
        if not self.needs_probe or self._done or self._decision is not _COMPUTE:
            raise RuntimeError("This step takes no probe. Ask `step.needs_probe`, and probe once.")
        trajectory = self._matching_trajectory(x, p)
        if not self.needs_probe:  # the layout was new: this is now the first step of a run
            return self._decision
        result = trajectory.statistics(x, p)  # [B + 1, 2]
        readback = Readback(result) if self._promise is None else Readback(result, self._promise[0])
        self._gamma = self._gamma_of_samples(result)
        if trajectory.runs_ahead and any(gate.may_reuse() for gate in self._state.gates):
            self._queued = trajectory.combine(x, self._gamma)
        numbers, *timestep = readback.wait()
        decision = self._judge_samples(numbers) if self._by_sample else self._judge(*numbers[-1])
        reuses_any = decision.reuses_any
        if reuses_any and self._promise is not None and not self._promise[1](timestep[0]):
            self._state = self._session._restart(self.name, self._state.phase)
            decision, self.needs_probe, reuses_any = _COMPUTE, False, False
        self._decision = decision
        if not reuses_any:
            self._queued = None
        elif decision.action != "reuse":  # samples disagree
            self.rows = [r for r, each in enumerate(decision.samples) if each.action != "reuse"]
            if self._queued is None:
                self._queued = trajectory.combine(x, self._gamma)
        return decision

    def _gamma_of_samples(self, result: Tensor) -> Tensor:
        """gamma [B] out of a result [B + 1, 2]: each sample's own, or the whole batch's for all."""
        batch, start = result.shape[0] - 1, result.storage_offset()
        if self._by_sample:
            return result.as_strided((batch,), (2,), start + 1)
        return result.as_strided((batch,), (0,), start + 2 * batch + 1)

    def _judge(
        self, error: float, gamma: float, row: int = 0, leader_reuses: bool | None = None
    ) -> Decision:
        """The decision of one gate."""
        gate = self._state.gates[row]
        if self._session.config.error == "weighted_alignment":
            error *= self._size
        if leader_reuses is None and self._shares_decisions and len(self._session._contexts) > 1:
            leader_reuses = self._leader_reuses(row)
        action = gate.decide(error, gamma, leader_reuses)
        if not (math.isfinite(error) and math.isfinite(gamma)):
            self._drop_entries(row, error, gamma)
        return Decision(action, error, gate.accumulated_error, gamma)

    def _judge_samples(self, numbers: list[list[float]]) -> Decision:
        """A decision for every sample, from its (error, gamma); the last pair is the batch's."""
        errors = [error for error, _ in numbers[:-1]]
        half = len(errors) // 2
        shares = self.pairs_branches and self._shares_decisions and 2 * half == len(errors)
        judged: list[Decision] = []
        for row, (error, gamma) in enumerate(numbers[:-1]):
            if not shares:
                judged.append(self._judge(error, gamma, row))
            elif row < half:  # decides by the mean of what is finite, for itself and its partner
                pair = [each for each in (error, errors[row + half]) if math.isfinite(each)]
                shared = sum(pair) / len(pair) if math.isfinite(error) else error
                judged.append(self._judge(shared, gamma, row))
            else:
                leads = judged[row - half].action == "reuse"
                judged.append(self._judge(error, gamma, row, leads))
        reuses_all = all(decision.action == "reuse" for decision in judged)
        return Decision("reuse" if reuses_all else "resume", samples=tuple(judged))

    def _leader_reuses(self, row: int) -> bool | None:
        """Whether the branch that is called first reused this step; `None` if it is this one."""
        leader, state = next(iter(self._session._contexts.values())), self._state
        timestep = self._session._timestep
        if timestep is None:  # then branches that are not called in every step fall out of pace
            did_this_step = leader.next_step == state.next_step + 1
        else:
            did_this_step = leader.timestep == timestep
        if leader is state or not did_this_step:
            return None
        return len(leader.gates) == len(state.gates) and leader.gates[row].consecutive_reuse > 0

    def _drop_entries(self, row: int, error: float, gamma: float) -> None:
        """A window with NaN or infinity in it is of no use; the step will be computed."""
        trajectory = self._state.trajectory
        assert trajectory is not None  # a probe was asked
        (trajectory.samples[row] if self._by_sample else trajectory).drop_entries()
        sample = f", sample {row}" if self._by_sample else ""
        self._session.warn(
            "non-finite",
            f"Step {self._state.next_step} of context {self.name!r}{sample}: the error is {error} "
            f"and gamma {gamma}, so the step is computed. NaN or infinity in the model's hidden "
            f"states is the usual cause.",
        )

    @torch.no_grad()
    def hold(self, x: Tensor, p: Tensor) -> tuple[Any, Any]:
        """Copy x and p into the cache's own buffers until `record`; give it what this returns.

        Between probe and record a computed step needs both, but nothing else does. A caller that
        keeps the returned values instead of its own costs no memory beyond the cache's.

        Raises:
            RuntimeError: The step ended already, or it needs a probe and was not probed: what is
                held lies where the trajectory's older entry was.
        """
        if self._done or (self.needs_probe and self.action == "compute"):
            raise RuntimeError(
                "Only a step that is going to be computed is held, after `probe` if it needs one."
            )
        self._resume()
        trajectory = self._matching_trajectory(x, p)
        trajectory.release()
        if not self._by_sample:
            return trajectory.hold(x, p)
        rows = self.rows or range(len(trajectory.samples))
        held = {r: trajectory.samples[r].hold(x[r : r + 1], p[r : r + 1]) for r in rows}
        return {r: held[r][0] for r in rows}, {r: held[r][1] for r in rows}

    def reuse(self, x: Tensor) -> Tensor:
        """End the step without its remaining blocks: y = x + r_old + gamma (r_new - r_old).

        Raises:
            RuntimeError: The decision is not `"reuse"`, or the step ended already.
        """
        if self._decision.action != "reuse" or self._done:
            raise RuntimeError(
                f"A step can be reused once, after `probe` decided so. Its action is "
                f"{self.action!r}. Run the blocks and call `record`."
            )
        trajectory = self._state.trajectory
        assert trajectory is not None and self._gamma is not None  # probe saw both
        y = trajectory.combine(x, self._gamma) if self._queued is None else self._queued
        self._queued = None
        trajectory.end_step()
        self._finish()
        return y

    @torch.no_grad()
    def record(self, x: Any, p: Any, y: Tensor) -> Tensor:
        """End a computed step: its residuals become the newest entry of the trajectory.

        Args:
            x, p: As for `probe`, or what `hold` returned.
            y: [B, ...] tokens after the last block; where samples disagree, those of `rows` alone.

        Returns:
            [B, ...] tokens of all samples, those that were reused filled in.

        Raises:
            RuntimeError: The step ended already.
            ValueError: y has another number of samples than `rows`.
        """
        if self._done:
            raise RuntimeError("This step ended already. Open the next one with `session.step`.")
        self._resume()
        if self._by_sample:
            y = self._record_samples(x, p, y)
        else:
            self._matching_trajectory(x, p).record(x, p, y)
        self._finish()
        self._state.to_compute = max(self._state.to_compute - 1, 0)
        self._session._update_peaks()
        return y

    def _resume(self) -> None:
        """The step is computed, also where it might have been reused."""
        if self.action == "reuse":
            self._queued = None
            resumed = [
                Decision("resume", each.error, each.accumulated_error)
                for each in (self._decision, *self._decision.samples)
            ]
            self._decision = replace(resumed[0], samples=tuple(resumed[1:]))

    def _record_samples(self, x: Any, p: Any, y: Tensor) -> Tensor:
        """Record the samples that were computed, one by one: each is a batch of one."""
        if isinstance(x, Tensor):
            self._matching_trajectory(x, p)
            x, p = x.split(1), p.split(1)
        trajectory = self._state.trajectory
        assert trajectory is not None  # hold or the line above made it
        rows = self.rows or range(len(trajectory.samples))
        if y.shape[0] != len(rows):
            raise ValueError(
                f"y has {y.shape[0]} samples. Expected {len(rows)}, those of step.rows in its "
                f"order (None: all)."
            )
        trajectory.fit(y.dtype)
        for row, tokens in zip(rows, y.split(1), strict=True):
            trajectory.samples[row].record(x[row], p[row], tokens)
        trajectory.end_step()
        if self.rows is None:
            return y
        assert self._queued is not None  # probe filled the others in
        filled, self._queued = self._queued, None
        for row, tokens in zip(rows, y, strict=True):
            filled[row] = tokens
        return filled

    def _finish(self) -> None:
        state, decision, self._done = self._state, self._decision, True
        records = self._session.stats.contexts[self.name]
        for row, gate in enumerate(state.gates):
            each = decision.samples[row] if decision.samples else decision
            gamma = each.gamma if each.action == "reuse" else None
            entry = (each.action, each.error, each.accumulated_error, gamma)
            sample = row if self._by_sample else None
            records.append(StepRecord(state.next_step, *entry, sample))
            gate.finish(reused=each.action == "reuse")
        state.next_step += 1
        state.has_history = True

    def _is_judged(self, is_last: bool) -> bool:
        session = self._session
        config, steps, index = session.config, session.num_inference_steps, self._state.next_step
        if config.schedule is not None and index >= len(config.schedule):
            session.warn(
                "schedule",
                f"schedule has {len(config.schedule)} letters and the run more steps. Those behind "
                f"its end are computed; give schedule one letter a step.",
            )
        if steps is None and config.needs_num_inference_steps:
            session.warn(
                "num_inference_steps",
                "The number of steps is unknown and the rules need it, so every step is computed. "
                "Set DiCacheConfig(num_inference_steps=...), or use apply_dicache(pipe) instead of "
                "applying it to the transformer.",
            )
        return self._state.gates[0].wants_probe(index, steps, is_last)

    def _matching_trajectory(self, x: Tensor, p: Tensor) -> Trajectory:
        """The context's trajectory for tensors like these, in a new run if they changed."""
        trajectory = self._state.trajectory
        if trajectory is not None and not trajectory.matches(x, p):
            self._state = self._session._restart(self.name, self._state.phase)
            self._decision, self.needs_probe, trajectory = _COMPUTE, False, None
            self.rows = self._queued = None
        if trajectory is None:
            config = self._session.config
            trajectory = make_trajectory(config, x, p)
            if self._by_sample:
                trajectory.split()
                self._state.gates = [Gate(config) for _ in trajectory.samples]
            self._state.trajectory = trajectory  # now that it is whole
        return trajectory
