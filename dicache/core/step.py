"""`Step`: one step of one branch, from its first block to the reuse or the record that ends it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from torch import Tensor

from ..stats import MOST_RECORDS, StepRecord
from .context import Context
from .judge import COMPUTE, Decision, follow_plan, judge, judge_samples
from .ranks import Ranks
from .readback import Readback, one_number
from .run import UNTOLD, Run, Visit
from .sample import sample_of
from .trajectory import Inputs, Trajectory
from .where import Where

if TYPE_CHECKING:
    from .session import DiCacheSession

# Calls of one step are told apart by their place in it. A call is another's where its tokens are so
# much nearer to those, and anybody's where it moved about as far as the calls lie from each other.
_NEARER = 0.9
_AS_FAR = (0.5, 2.0)

# What the answers may show beside the error and gamma.
_ANOTHER_ORDER, _ANOTHER_STATE, _NEW_NOISE, _ANOTHER_RUN = 1, 2, 4, 8

Question: TypeAlias = tuple[Tensor, int, Callable[[Any], bool]]  # and whether an answer shows it


class Step:
    """One step of one branch, from `DiCacheSession.step`; end it with `reuse` or `record`.

    Its life: `probe` if `needs_probe`, then either `reuse`, or `resume` and `record`, or `discard`.
    Leaving it without an end, by an exception or on purpose, makes the branch's next step compute.

    A probe may show that the step is of a new run. It then is a new step in everything, the first
    one of that run.

    Attributes:
        where: What was said of it.
        name: The branch's, as the statistics call it.
        index: The step's place among its branch's, from 0.
        place: Its place in the whole run, which other models may have begun.
        stats: Of its run.
        needs_probe: Whether to ask `probe`; `False` on a step that is computed anyway.
        is_done: Whether it was ended by `reuse`, `record`, `discard` or `close`.
        rows: Where samples disagree, those whose remaining blocks have to run; else `None`.
    """

    __slots__ = (
        "_context",
        "_decision",
        "_gamma",
        "_inputs",
        "_queued",
        "_rules",
        "_session",
        "_tokens",
        "_visit",
        "_weights",
        "index",
        "is_done",
        "name",
        "needs_probe",
        "place",
        "rows",
        "stats",
        "where",
    )

    def __init__(self, session: DiCacheSession, where: Where) -> None:
        self._session, self.where = session, where
        self._open(session.timeline.visit(where))

    def _open(self, visit: Visit[Context]) -> None:
        """Be the step that this is; the only place that gives a step its attributes."""
        branch, self._visit, self.index = visit.branch, visit, visit.index
        self.place = visit.index + visit.run.begins_at
        self.stats = stats = visit.run.stats
        if branch is None:
            self._context, self.name = Context(self._session.rules, Ranks()), UNTOLD
        else:
            self._context, self.name = branch.state, branch.name
        if self.name not in stats.contexts:
            stats.contexts[self.name] = []
        self.rows: list[int] | None = None
        self._decision = COMPUTE
        self._gamma: Tensor | None = None  # [B]
        self._weights: list[tuple[float, ...]] | None = None  # calibrated ones, a row a gate
        self._queued: Tensor | None = None  # the reused tokens
        self._inputs: Inputs | None = None  # x and p of a step that was resumed
        self._tokens: Tensor | None = None  # a sample of x, where it tells whose step it is
        self.is_done = False
        context = self._context
        self._rules = context.rules
        if not (visit.is_settled and context.has_history):
            context.drop_entries()
        if visit.has_paused:
            context.on_its_own = 2
            if context.leave_profile():
                visit.run.warn("profile", PAUSED.format(self.name))
        if context.computes_in != self.where.computes_in:
            context.change_state(self.where.computes_in)
        self._note_surroundings()
        self.needs_probe = self._is_judged()
        context.has_history = False  # until this step is done
        if self._rules.packs and self.needs_probe and context.trajectory is not None:
            context.trajectory.expect_probe()

    def _note_surroundings(self) -> None:
        """What tokens meet behind the probe in this step."""
        where, context = self.where, self._context
        if where.behind or context.added.is_watching:
            context.added.note(where.behind)
        if isinstance(where.prompt, Tensor):
            context.prompt.note(where.prompt)

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
        if not self.is_done:
            self.is_done = True
            for gate in self._context.gates:
                gate.finish(self.place, reused=False)

    def release(self) -> None:
        """Free what the branch keeps, after the run's last step: nobody reuses it any more.

        Its place among the calls of the step and what its gates decided stay known.
        """
        self._context.release()

    def discard(self) -> None:
        """End a computed step of which nothing can be kept: gradients are recorded, say.

        It counts in the statistics, and the branch's next step computes, too.

        Raises:
            RuntimeError: The step ended already.
        """
        if self.is_done:
            raise RuntimeError("This step ended already. Open the next one with `session.step`.")
        self._be_computed()
        self._finish(is_kept=False)

    @property
    def is_last(self) -> bool:
        """Whether it is the run's last one, as far as anybody knows."""
        return self._visit.is_last

    @property
    def action(self) -> str:
        """`"compute"`, until `probe` decides on `"resume"` or `"reuse"`."""
        return self._decision.action

    def probe(self, x: Tensor, p: Tensor) -> Decision:
        """Judge the step by its probe; waits for the device once.

        On a GPU the reused tokens are queued before the wait, so that it works on them while the
        host decides; where the answer is to compute they are thrown away.

        Args:
            x: [B, ...] tokens before block 0.
            p: [B, ...] tokens after the first `probe_depth` blocks.

        Returns:
            The decision. Tensors of another shape, dtype or device than before begin a new run:
            the action is then `"compute"`. So it is where gradients are recorded.

        Raises:
            RuntimeError: `needs_probe` is False, or the step was probed or ended already.
        """
        if not self.needs_probe or self.is_done or self._decision is not COMPUTE:
            raise RuntimeError("This step takes no probe. Ask `step.needs_probe`, and probe once.")
        trajectory = self._trajectory_for(x, p)
        if not self.needs_probe:  # the layout was new: this is now the first step of a run
            return self._decision
        if torch.is_grad_enabled() and (x.requires_grad or p.requires_grad):
            self._visit.run.warn("gradients", GRADIENTS)
            self.needs_probe = False
            return self._decision
        self._note_tokens(x)
        self._weights = self._context.weights(self.place)
        asked = self._questions()
        found, answers = self._measure(trajectory, x, p, asked)
        shown = 0
        for (_, what, shows), answer in zip(asked, answers, strict=True):
            if shows(answer):
                shown |= what
        time = answers[-1] if asked and asked[-1][1] == _ANOTHER_RUN else math.nan
        if self._context.ranks.are_several and (found or self._may_see_apart()):
            shown, time, found = self._agree(trajectory, shown, time, found)
        self._decision = self._judge(found)
        if shown:
            self._act_on(shown, time)
        decision = self._decision
        if not decision.reuses_any:
            self._queued = None
        elif self._queued is None:
            self._queued = self._fill_in(trajectory, x, p)
        if decision.reuses_any and decision.action != "reuse":  # samples disagree
            self.rows = [k for k, each in enumerate(decision.samples) if each.action != "reuse"]
        return decision

    def reuse(self, x: Tensor) -> Tensor:
        """End the step without its remaining blocks: y = x + r^, which `probe` made.

        r^ = r_old + gamma (r_new - r_old), or by calibrated weights (`core.extrapolation`).

        Raises:
            RuntimeError: The decision is not `"reuse"`, or the step ended already.
        """
        if self._decision.action != "reuse" or self.is_done:
            raise RuntimeError(
                f"A step can be reused once, after `probe` decided so. Its action is "
                f"{self.action!r}. Run the blocks and call `record`."
            )
        trajectory, y = self._context.trajectory, self._queued
        assert trajectory is not None and y is not None  # made by probe
        self._queued = None
        trajectory.end_step()
        self._finish(self._visit.is_kept)
        return y

    def resume(self, x: Tensor, p: Tensor) -> None:
        """The step is computed: keep x and p until `record`, in the cache's own buffers.

        Between probe and record a computed step needs both, but nothing else does. A caller that
        lets go of its own costs no memory beyond the cache's.

        Raises:
            RuntimeError: The step ended or was resumed already, or it needs a probe and was not
                probed: what is kept lies where the trajectory's older entry was.
        """
        is_open = not self.is_done and self._inputs is None
        if not is_open or (self.needs_probe and self._decision is COMPUTE):
            raise RuntimeError(
                "Only a step that is going to be computed is resumed, once, after `probe` if it "
                "needs one."
            )
        self._be_computed()
        if self._visit.is_kept:
            trajectory = self._trajectory_for(x, p)
            self._see_whose_it_is(x)
            self._inputs = trajectory.park(x, p, self.rows)

    @overload
    def record(self, y: Tensor, /) -> Tensor: ...

    @overload
    def record(self, x: Tensor, p: Tensor, y: Tensor) -> Tensor: ...

    def record(self, x: Tensor, p: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """End a computed step: its residuals become the newest entry of the trajectory.

        `record(y)` ends a step that was resumed; `record(x, p, y)` does both at once.

        Args:
            x: As for `probe`, or y if it is given alone.
            p: As for `probe`.
            y: [B, ...] tokens after the last block; where samples disagree, those of `rows` alone.

        Returns:
            [B, ...] tokens of all samples, those that were reused filled in.

        Raises:
            RuntimeError: The step ended already, or `record(y)` follows no `resume`.
            ValueError: y has another number of samples than `rows`.
        """
        if self.is_done:
            raise RuntimeError("This step ended already. Open the next one with `session.step`.")
        tokens, is_kept = x if y is None else y, self._visit.is_kept
        if is_kept:
            given = None if p is None or y is None else (x, p)
            trajectory, inputs = self._inputs_of(given)
            self._check_outputs(inputs, tokens)
            is_kept = self._are_together(inputs, tokens)
        if is_kept:
            self._note_for_profile(inputs, tokens)
            trajectory.record(inputs, tokens, self.rows)
            self._context.record(tokens)
            if not trajectory.is_counted:
                _count_memory(self._visit.run)
        self._inputs = None
        self._finish(is_kept)
        return self._filled_in(tokens)

    # --- the decision ---

    def _measure(
        self, trajectory: Trajectory, x: Tensor, p: Tensor, asked: list[Question]
    ) -> tuple[list[list[float]] | None, list[Any]]:
        """(error, gamma) of every sample and of the batch, and what was asked beside them.

        Queues the reused tokens before it waits, where work may run ahead of the host.
        """
        context = self._context
        copied = [each for each, _, _ in asked]
        is_queued = trajectory.runs_ahead and any(gate.may_reuse() for gate in context.gates)
        letter, promise = None, None
        if not context.is_blind:
            promise = _promise_in(asked, x.device) if trajectory.writes_letters else None
            if promise is not None:
                copied.pop()
            fills_in = is_queued and self._weights is None and not copied
            numbers, self._gamma, self._queued, letter = trajectory.measure(x, p, promise, fills_in)
            if letter is None:
                copied.insert(0, numbers)
        is_early = self._queued is not None
        readback = Readback(*copied) if copied else None
        if is_queued and self._queued is None:
            self._queued = self._fill_in(trajectory, x, p)
        answers = [] if readback is None else readback.wait()
        if letter is not None:
            found, told = letter.wait(is_early)
            return found, answers if promise is None else [*answers, told]
        return None if context.is_blind else answers.pop(0), answers

    def _questions(self) -> list[Question]:
        """What is read along with the probe's numbers, in one wait. The check comes last."""
        context, check = self._context, self.where.check
        asked: list[Question] = []
        if context.is_blind and check is not None:  # its answer need not be waited for
            context.promise(check)
            check = None
        if self._visit.siblings is not None:
            asked.append((self._distances(), _ANOTHER_ORDER, _are_of_another_call))
        if context.added.is_watching and (added := context.added.ask()) is not None:
            asked.append((added, _ANOTHER_STATE, self._shows_other_additions))
        if context.prompt.has_moved and (prompt := context.prompt.ask()) is not None:
            asked.append((prompt, _ANOTHER_STATE, context.prompt.has_changed))
        if context.moves.are_due:
            asked.append((context.moves.ask(), _NEW_NOISE, context.moves.are_noise))
        if check is not None:
            holds = check.holds
            asked.append((one_number(check.value), _ANOTHER_RUN, lambda value: not holds(value)))
        return asked

    def _may_see_apart(self) -> bool:
        """Whether ranks, each with its own tokens, may answer the questions differently.

        All ranks have the same prompt. Whether one is asked about may differ: that is a matter of
        where it lies in memory.
        """
        return self._visit.siblings is not None or self._context.added.is_watching

    def _shows_other_additions(self, numbers: list[Any]) -> bool:
        # A schedule says itself which steps are alike.
        only_ends = self._rules.schedule is not None
        return self._context.added.has_changed(numbers, only_ends)

    def _agree(
        self,
        trajectory: Trajectory,
        shown: int,
        time: float,
        found: list[list[float]] | None,
    ) -> tuple[int, float, list[list[float]] | None]:
        """What the first rank saw: all others do what it does, whatever they saw themselves."""
        rows = found or []
        mine = [float(shown), time, *(number for row in rows for number in row)]
        first, time, *numbers = self._context.ranks.agree(mine, trajectory.newest.device)
        agreed = [numbers[k : k + 2] for k in range(0, len(numbers), 2)]
        if agreed != rows:  # no total is promised to have the same last bit everywhere
            self._gamma, self._queued = trajectory.gamma_from(agreed), None
        return int(first), time, agreed if found else None

    def _act_on(self, shown: int, time: float) -> None:
        """Take the consequences of what was shown, in the end that this is another run's step."""
        run, context = self._visit.run, self._context
        is_resumed = bool(shown & (_ANOTHER_ORDER | _ANOTHER_STATE))
        if shown & _ANOTHER_ORDER:
            run.warn("order", _OTHER_ORDER)
            context.drop_entries()
        if shown & _ANOTHER_STATE:
            context.begin_anew()
        if shown & _NEW_NOISE:
            run.is_noisy = True
            is_resumed |= self._is_too_noisy()
        if is_resumed:
            self._decision = self._decision.resumed()
        if shown & _ANOTHER_RUN:
            self.where = self.where.without_place(time)
            self._begin_run()

    def _note_tokens(self, x: Tensor) -> None:
        """Take a sample of x, once a step, where it tells something."""
        siblings, moves = self._visit.siblings, self._context.moves
        if self._tokens is not None or (siblings is None and not moves.are_wanted):
            return
        shows_noise = siblings is None and self.where.is_noisy is None
        shows_noise = shows_noise and not self._context.is_blind  # which waits for nothing
        if siblings is not None or shows_noise:
            self._tokens = sample_of(x)
        if self._tokens is not None and shows_noise:
            moves.note(self._tokens)

    def _distances(self) -> Tensor:
        """How far x is from that of the step before, of this branch and of its siblings.

        A step's calls of one prompt are told apart by their order. Where that changes, tokens are
        nearer to those of another call than to those of the one in the same place.
        """
        branch, siblings, moment = self._visit.branch, self._visit.siblings, self.where.moment
        tokens = self._tokens
        assert branch is not None and siblings is not None and tokens is not None  # asked first
        own = self._context.tokens_before(moment)
        if own is None or own[1].shape != tokens.shape:
            return tokens.new_zeros(2, 1)
        others = [each.state.tokens_before(moment) for each in siblings if each is not branch]
        known = [own[1]]
        for other in others:
            if other is not None and other[0] == own[0] and other[1].shape == tokens.shape:
                known.append(other[1])
        origins = torch.stack([tokens, own[1]])
        return torch.linalg.vector_norm(torch.stack(known) - origins[:, None], dim=-1)

    def _fill_in(self, trajectory: Trajectory, x: Tensor, p: Tensor) -> Tensor:
        """The tokens of a reused step."""
        if self._weights is not None:
            return trajectory.extrapolate(x, p, self._weights)
        assert self._gamma is not None  # measured
        return trajectory.combine(x, self._gamma)

    def _judge(self, numbers: list[list[float]] | None) -> Decision:
        """What the gates say to (error, gamma) of every sample and, in the last row, the batch.

        Without numbers the plan says it.
        """
        rules, context, visit = self._rules, self._context, self._visit
        if numbers is None:
            return follow_plan(context.gates, self.place, rules.by_sample)
        branch, leader = visit.branch, None
        may_follow = rules.shares_decisions and not context.on_its_own
        if may_follow and branch is not None and len(self.stats.contexts) > 1:
            leader = visit.run.branches.leader_of(branch, self.where)
        if rules.by_sample:
            follows, leaders = None, None
            if leader is not None and len(leader.state.gates) == len(context.gates):
                follows = [gate.consecutive_reuse > 0 for gate in leader.state.gates]
            if rules.shares_decisions:
                leaders = self.where.leaders
            decision = judge_samples(
                context.gates, self.place, numbers[:-1], visit.size, leaders, follows
            )
        else:
            follow = None if leader is None else leader.state.gates[0].consecutive_reuse > 0
            error, gamma = numbers[-1]
            decision = judge(context.gates[0], self.place, error, gamma, visit.size, follow)
            if decision.action == "reuse" or math.isfinite(error) and math.isfinite(gamma):
                return decision
        self._drop_spoiled_entries(decision)
        return decision

    def _drop_spoiled_entries(self, decision: Decision) -> None:
        """A window with NaN or infinity in it is of no use; the step is computed."""
        by_sample = bool(decision.samples)
        for sample, each in enumerate(decision.samples or (decision,)):
            error, gamma = each.error, each.gamma
            if error is None or gamma is None or math.isfinite(error) and math.isfinite(gamma):
                continue
            self._context.drop_entries(sample if by_sample else None)
            which = f", sample {sample}" if by_sample else ""
            self._visit.run.warn(
                "non-finite",
                f"Step {self.index} of context {self.name!r}{which}: the error is {error} and "
                f"gamma {gamma}, so the step is computed. NaN or infinity in the model's hidden "
                f"states is the usual cause.",
            )

    def _is_judged(self) -> bool:
        rules, visit, context = self._rules, self._visit, self._context
        run, steps = visit.run, visit.run.num_steps
        if rules.schedule is not None and self.place >= len(rules.schedule):
            run.warn("schedule", _SHORT_SCHEDULE.format(len(rules.schedule)))
        elif rules.schedule is not None and steps is not None and len(rules.schedule) > steps:
            run.warn("schedule", _LONG_SCHEDULE.format(len(rules.schedule), steps))
        if steps is None and rules.needs_num_steps:
            run.warn("num_inference_steps", _UNKNOWN_LENGTH)
        if not (visit.is_settled and context.has_history) or context.to_compute:
            return False
        if context.recorder is not None:  # un-cached runs are what it is for
            return False
        if context.has_gradients and torch.is_grad_enabled():
            run.warn("gradients", GRADIENTS)
            return False
        if (self.where.is_noisy or run.is_noisy) and self._is_too_noisy():
            return False
        follows = False
        if rules.counts_calls and visit.branch is not None:
            follows = run.branches.leader_of(visit.branch, self.where) is not None
        if context.owes_a_promise():
            context.begin_anew()
            return False
        return any(
            gate.wants_probe(self.place, steps, visit.is_last, follows, self.index)
            for gate in context.gates
        )

    def _is_too_noisy(self) -> bool:
        """Whether noise in every step forbids a reuse: the default rules say so."""
        is_default = self._rules.is_default
        self._visit.run.warn("noise", _NOISE if is_default else _NOISE_ALL_THE_SAME)
        return is_default

    # --- the end ---

    def _see_whose_it_is(self, x: Tensor) -> None:
        """Of several calls of a step that were told apart by their order; waits for the device."""
        was_asked = self._tokens is not None
        self._note_tokens(x)
        if self._visit.siblings and not was_asked:
            is_other = _are_of_another_call(Readback(self._distances()).wait()[0])
            shown = self._context.ranks.agree([_ANOTHER_ORDER if is_other else 0], x.device)
            self._act_on(int(shown[0]), math.nan)

    def _be_computed(self) -> None:
        """The step is computed, also where it might have been reused."""
        if self.action == "reuse":
            self._queued = None
            self._visit.run.is_overruled = True
            self._decision = self._decision.resumed()

    def _inputs_of(self, given: tuple[Tensor, Tensor] | None) -> tuple[Trajectory, Inputs]:
        if given is not None:
            self._be_computed()
            trajectory = self._trajectory_for(*given)
            self._see_whose_it_is(given[0])
            return trajectory, trajectory.split(*given, self.rows)
        trajectory = self._context.trajectory  # type: ignore[assignment]
        if self._inputs is None or trajectory is None:
            raise RuntimeError("record(y) ends a step after resume(x, p). Or call record(x, p, y).")
        return trajectory, self._inputs

    def _check_outputs(self, inputs: Inputs, y: Tensor) -> None:
        if self._rules.by_sample and y.shape[0] != len(inputs):
            raise ValueError(
                f"y has {y.shape[0]} samples. Expected {len(inputs)}, those of step.rows in its "
                f"order (None: all)."
            )

    def _are_together(self, inputs: Inputs, y: Tensor) -> bool:
        """Whether the step's tokens are on one device: a model may be spread over several."""
        found = {each.device for pair in inputs for each in pair} | {y.device}
        if len(found) > 1:
            names = ", ".join(sorted(map(str, found)))
            self._visit.run.warn("devices", _SEVERAL_DEVICES.format(names))
        return len(found) == 1

    def _filled_in(self, y: Tensor) -> Tensor:
        if self.rows is None:
            return y
        assert self._queued is not None  # probe filled the others in
        filled, self._queued = self._queued, None
        for row, tokens in zip(self.rows, y, strict=True):
            filled[row] = tokens
        return filled

    def _note_for_profile(self, inputs: Inputs, y: Tensor) -> None:
        recorder = self._context.recorder
        if recorder is not None and self.rows is None:
            x, p = (torch.cat(each) for each in zip(*inputs, strict=True))
            recorder.note(self.name, self.place, self.where.timestep, x, p, y)

    def _finish(self, is_kept: bool) -> None:
        decision, self.is_done = self._decision, True
        by_sample, records = self._rules.by_sample, self.stats.contexts[self.name]
        for sample, gate in enumerate(self._context.gates):
            each = decision.samples[sample] if decision.samples else decision
            reused, weights = each.action == "reuse", None
            if reused and self._weights is not None:
                weights = self._weights[sample]
            gamma = each.gamma if reused and weights is None else None
            numbers = (each.action, each.error, each.accumulated_error, gamma)
            which = sample if by_sample else None
            records.append(StepRecord(self.index, *numbers, which, weights))
            self.stats.num_vetoes += gate.finish(self.place, reused)
        if len(records) >= MOST_RECORDS:
            del records[: MOST_RECORDS // 2]
        if self._tokens is not None:
            self._context.note_tokens(self.where.moment, self._tokens)
        self._context.has_history = is_kept
        if self._visit.is_last and self._rules.is_hopeful:
            self._session.timeline.tell_of_few_steps(self._visit.run)

    # --- the trajectory ---

    def _trajectory_for(self, x: Tensor, p: Tensor) -> Trajectory:
        """The branch's trajectory for tensors like these, in a new run if they changed."""
        known = self._context.trajectory
        if known is not None and known.matches(x, p):
            return known
        if known is not None:
            self._begin_run()
        return self._context.make_trajectory(x, p)

    def _begin_run(self) -> None:
        """This turned out to be a new run's first step: begin it, and be that step."""
        self._open(self._session.timeline.restart(self._visit.run, self.where))


def _promise_in(asked: list[Question], device: torch.device) -> Tensor | None:
    """The number that tells another run, if a launch on this device can read it."""
    if not asked or asked[-1][1] != _ANOTHER_RUN:
        return None
    promise = asked[-1][0]
    return promise if promise.device == device and promise.element_size() <= 8 else None


def _are_of_another_call(distances: list[list[float]]) -> bool:
    """Whether tokens are those of another call of the step, by the answer to `_distances`."""
    (own, *to_others), (_, *apart) = distances
    least, most = _AS_FAR
    return any(
        to_other < _NEARER * own or least * between < own < most * between
        for to_other, between in zip(to_others, apart, strict=True)
    )


def _count_memory(run: Run[Context]) -> None:
    """Note how much the branches of a run hold now."""
    held = [each.state.trajectory for each in run.branches if each.state.trajectory is not None]
    tensors = sum(trajectory.num_tensors for trajectory in held)
    num_bytes = sum(trajectory.num_bytes for trajectory in held)
    run.stats.cache_tensors = max(run.stats.cache_tensors, tensors)
    run.stats.cache_bytes = max(run.stats.cache_bytes, num_bytes)


GRADIENTS = (
    "Gradients are recorded, and the cache has none to give, so steps are computed without it. "
    "Call the model inside torch.no_grad() or torch.inference_mode()."
)
PAUSED = (
    "The branch {!r} of guidance is not called in every step of the run, and the profile counts "
    "its steps from the run's first one, so the rules without a profile decide there. Guide in all "
    "steps, or give a threshold."
)
_SHORT_SCHEDULE = (
    "schedule has {} letters and the run more steps. Those behind its end are computed; give "
    "schedule one letter a step."
)
_LONG_SCHEDULE = (
    "schedule has {} letters and the run {} steps. Those behind its end are not used, and the mask "
    "may have been made for a longer run; give schedule one letter a step."
)
_UNKNOWN_LENGTH = (
    "The number of steps is unknown and the rules need it, so every step is computed. Set "
    "DiCacheConfig(num_inference_steps=...), or use apply_dicache(pipe) instead of applying it to "
    "the transformer."
)
_OTHER_ORDER = (
    "The transformer is called several times a step with one prompt, and in another order than in "
    "the step before, or by a scheduler that evaluates twice a step: such calls are computed. Call "
    "it for the parts of a picture always in the same order, or wrap each part's calls in a "
    "`cache_context` of its own name. A cache that is applied to the pipeline knows its scheduler."
)
_SEVERAL_DEVICES = (
    "The tokens before and behind the blocks are on several devices ({}), and the cache works on "
    "one, so every step is computed. Put all blocks of the model on one device."
)
_NOISE = (
    "The scheduler, or whoever calls the transformer, adds new noise in every step, so that none "
    "is like the one before, and every step is computed. A scheduler without it can be cached; a "
    "threshold of your own caches this one, too."
)
_NOISE_ALL_THE_SAME = (
    "The scheduler, or whoever calls the transformer, adds new noise in every step, so that none "
    "is like the one before: what is reused costs more quality than usual. DiCacheConfig() "
    "computes every step there."
)
