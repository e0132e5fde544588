"""A session reuses only on valid history of the same run, and holds exactly the promised memory."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from helpers import mask, small_bytes, trajectory_of
from torch.utils._python_dispatch import TorchDispatchMode

from dicache import DiCacheConfig, DiCacheSession, DiCacheWarning, Where, ops
from dicache.core import trajectory as trajectories
from dicache.core.readback import Mailbox, Readback
from dicache.core.step import Step
from dicache.core.where import Check
from dicache.profile import Identity

ALWAYS_REUSE = {"threshold": math.inf, "retention_ratio": 0.0, "compute_last_step": False}


def tensors(seed=0, shape=(2, 4, 8), dtype=torch.float32):
    """x, p, y [B, S, D] of one step."""
    generator = torch.Generator().manual_seed(seed)
    x, p, y = (torch.randn(shape, generator=generator) for _ in range(3))
    return x.to(dtype), p.to(dtype), y.to(dtype)


def run_step(session, values, context="cond", **where):
    """One step as an engine would drive it; returns (action, y)."""
    x, p, y = values
    with session.step(context, **where) as step:
        if step.needs_probe:
            step.probe(x, p)
        if step.action == "reuse":
            y = step.reuse(x)
        else:
            step.resume(x, p)
            y = step.record(y if step.rows is None else y[step.rows])
    return step.action, y


def actions(session, context="cond"):
    return mask(session.stats.contexts[context])


def owned(session):
    """The tensors that the trajectory of "cond" keeps."""
    trajectory = trajectory_of(session)
    buffers = [trajectory.store[name] for name in trajectory._names]
    return [*buffers, trajectory.newest, trajectory.entry_sums]


def drive(session, count, context="cond", **where):
    for seed in range(count):
        run_step(session, tensors(seed), context, **where)
    return actions(session, context)


# --- phases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_two_steps_of_a_new_phase_are_computed_before_one_is_reused(granularity):
    rules = {**ALWAYS_REUSE, "granularity": granularity}
    session, phases = DiCacheSession(DiCacheConfig(**rules)), ["dense"] * 4 + ["sparse"] * 6
    for seed, phase in enumerate(phases):
        run_step(session, tensors(seed, shape=(1, 4, 8)), Where("cond", computes_in=phase))
    assert actions(session) == "CRRRCCRRRR"


def test_nothing_of_the_old_phase_is_left_in_what_is_reused():
    outputs = {}
    for phases in (["dense"] * 3 + ["sparse"] * 4, ["sparse"] * 4):
        session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
        for seed, phase in enumerate(phases, start=7 - len(phases)):
            x, p, y = tensors(seed)
            with session.step(Where("cond", computes_in=phase)) as step:
                judged = step.needs_probe and seed > 4  # before, both compute
                if judged:
                    step.probe(x, p)
                y = step.reuse(x) if step.action == "reuse" else step.record(x, p, y)
            if judged:
                outputs.setdefault(seed, []).append(y)
    assert list(outputs) == [5, 6]
    assert all(torch.equal(*pair) for pair in outputs.values())


@pytest.mark.parametrize("free", [DiCacheSession.reset, lambda each: each.forget("cond")])
def test_state_may_be_freed_in_the_middle_of_a_step_that_begins_a_run(free):
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    run_step(session, tensors(0))
    with session.step("cond") as step:
        free(session)
        step.record(*tensors(1, shape=(2, 6, 8)))  # another layout: this is a new run's first step
    assert run_step(session, tensors(2, shape=(2, 6, 8)))[0] == "reuse"


# --- waits ---------------------------------------------------------------------------------------


class Log(list):
    """What a session did, in order: both (statistics and combine), combine, wait."""

    def watch(self, monkeypatch, runs_ahead, most_bytes=0):
        monkeypatch.setattr(trajectories, "runs_ahead", lambda x: runs_ahead)
        monkeypatch.setattr(trajectories, "_ONE_LAUNCH_BYTES", most_bytes)
        for thing, name, called in (
            (ops, "probe_and_combine", "both"),
            (ops, "combine_residuals", "combine"),
            (Readback, "wait", "wait"),
            (Mailbox, "wait", "wait"),
        ):
            monkeypatch.setattr(thing, name, self.logged(called, getattr(thing, name)))

    def logged(self, name, call):
        def run(*args, **kwargs):
            self.append(name)
            return call(*args, **kwargs)

        return run


@pytest.mark.parametrize("most_bytes", [0, 1 << 20])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize(
    ("error", "threshold"), [("weighted_alignment", 2.0), ("delta_y", 3.0), ("delta_minus", 0.2)]
)
def test_tokens_that_are_queued_before_the_decision_are_the_same(
    error, threshold, granularity, rows, most_bytes, monkeypatch
):
    """As on a GPU, which works on them while the host decides, and leaves it a letter."""
    alignment = "l1" if error.startswith("delta") else "least_squares"
    rules = {"retention_ratio": 0, "compute_last_step": False}
    rules["granularity"] = granularity
    config = DiCacheConfig(threshold=threshold, error=error, alignment=alignment, **rules)
    outputs, logs, schedules = [], [], []
    for runs_ahead in (False, True):
        with monkeypatch.context() as patch:
            log = Log()
            log.watch(patch, runs_ahead, most_bytes)
            session, shape = DiCacheSession(config), (rows, 6, 8)
            outputs.append([run_step(session, tensors(seed, shape))[1] for seed in range(12)])
            logs.append(log), schedules.append(actions(session))
    assert schedules[0] == schedules[1]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    probed = [action for action in schedules[0] if action != "C"]
    if rows == 1 or granularity == "batch":
        assert {"R", "c"} <= set(schedules[0])
        behind = [["wait", "combine"] if action == "R" else ["wait"] for action in probed]
        assert logs[0] == sum(behind, [])
    assert logs[1] == ["both" if most_bytes else "combine", "wait"] * 11


@pytest.mark.parametrize("most_bytes", [0, 1 << 20])
def test_a_promised_timestep_comes_with_the_letter(most_bytes, monkeypatch):
    """That of another run than was promised begins it, as where it is copied."""
    schedules = []
    for runs_ahead in (False, True):
        with monkeypatch.context() as patch:
            Log().watch(patch, runs_ahead, most_bytes)
            session, made = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE)), ""
            for seed, time in enumerate([900, 800, 700, 950, 850, 700]):
                promised = Check(torch.tensor(time), lambda value: value != 950)
                where = Where("cond", timestep=float(time), check=promised)
                made += run_step(session, tensors(seed), where)[0][0]
            schedules.append(made)
    assert schedules == ["crrcrr", "crrcrr"]


def test_what_is_asked_beside_the_letter_is_read_before_tokens_are_done(monkeypatch):
    """Copies would wait for the one launch; so it is two where something else is asked."""
    log = Log()
    log.watch(monkeypatch, runs_ahead=True, most_bytes=1 << 20)
    asked = [(torch.zeros(1), 4, lambda answer: False)]
    monkeypatch.setattr(Step, "_questions", lambda step: [*asked])
    assert drive(DiCacheSession(DiCacheConfig(**ALWAYS_REUSE)), 3) == "CRR"
    assert log == ["combine", "wait", "wait"] * 2


def test_a_launch_that_leaves_no_letter_is_an_error(monkeypatch):
    """Numbers of the step before would decide else."""
    monkeypatch.setattr(trajectories, "runs_ahead", lambda x: True)
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    assert drive(session, 2) == "CR"
    mailbox = trajectory_of(session)._mailbox
    elsewhere = torch.zeros_like(mailbox._results.mailbox)
    mailbox._results = mailbox._results._replace(mailbox=elsewhere)
    with pytest.raises(RuntimeError, match=r"left no letter"):
        run_step(session, tensors(2))
    assert run_step(session, tensors(3))[0] == "compute"  # the branch has no history now


def test_serials_begin_again_behind_the_last(monkeypatch):
    monkeypatch.setattr(trajectories, "runs_ahead", lambda x: True)
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    assert drive(session, 2) == "CR"
    mailbox = trajectory_of(session)._mailbox
    mailbox._results = mailbox._results._replace(serial=2**31 - 2)
    seen = []
    for seed in range(2, 5):
        assert run_step(session, tensors(seed))[0] == "reuse"
        seen.append(mailbox._serial.value)
    assert seen == [2**31 - 1, 1, 2]


def test_nothing_is_queued_where_the_rules_forbid_reuse(monkeypatch):
    log = Log()
    log.watch(monkeypatch, runs_ahead=True)
    rules = {"retention_ratio": 0, "compute_last_step": False}
    limited = DiCacheConfig(threshold=math.inf, max_consecutive_reuse=1, **rules)
    assert drive(DiCacheSession(DiCacheConfig(threshold=0.0, **rules)), 4) == "Cccc"
    assert drive(DiCacheSession(limited), 5) == "CRcRc"
    assert log == ["wait"] * 3 + ["combine", "wait", "wait"] * 2


# --- memory layouts ------------------------------------------------------------------------------


class Clones(TorchDispatchMode):
    """Counts copies that nobody asked for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def transposed(tensor):
    """The same values, lying in memory as [B, D, S]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize(
    ("x_layout", "p_layout", "y_layout", "copies"),
    [
        (transposed, transposed, transposed, {"C": 0, "R": 0}),
        (transposed, transposed, torch.clone, {"C": 1, "R": 0}),  # HunyuanVideo
        (transposed, torch.clone, torch.clone, {"C": 0, "R": 1}),  # its image-to-video
    ],
)
@pytest.mark.parametrize("error", ["weighted_alignment", "delta_minus"])
def test_a_models_own_memory_layout_is_kept(x_layout, p_layout, y_layout, copies, error):
    alignment = "l1" if error.startswith("delta") else "least_squares"
    config = DiCacheConfig(schedule="CCRRCR", error=error, alignment=alignment)
    plain, session = DiCacheSession(config), DiCacheSession(config)
    for seed, action in enumerate("CCRRCR"):
        x, p, y = tensors(seed)
        expected = run_step(plain, (x, p, y))
        given = x_layout(x), p_layout(p), y_layout(y)
        with Clones() as clones:
            got = run_step(session, given)
        assert got[0] == expected[0] and torch.allclose(got[1], expected[1], rtol=1e-5, atol=1e-6)
        assert clones.count == copies[action]
        if action == "R":
            assert got[1].stride() == given[1].stride()


# --- rules ---------------------------------------------------------------------------------------


def test_the_first_step_is_computed_whatever_the_rules_say():
    assert drive(DiCacheSession(DiCacheConfig(**ALWAYS_REUSE)), 4) == "CRRR"


def test_a_schedule_overrides_every_other_rule():
    config = DiCacheConfig(
        threshold=0.0, schedule="CCRRCR", retention_ratio=1.0, max_consecutive_reuse=1
    )
    assert drive(DiCacheSession(config), 6, num_inference_steps=6) == "CCRRCR"


def test_steps_beyond_the_schedule_are_computed_with_one_warning():
    session = DiCacheSession(DiCacheConfig(schedule="CR"))
    with pytest.warns(DiCacheWarning, match="schedule has 2 letters") as caught:
        assert drive(session, 5) == "CRCCC"
    assert len(caught) == 1


def test_a_schedule_that_starts_with_reuse_computes_for_lack_of_history():
    assert drive(DiCacheSession(DiCacheConfig(schedule="RRC")), 3) == "CRC"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_max_consecutive_reuse_resumes_the_next_step(limit):
    config = DiCacheConfig(**ALWAYS_REUSE, max_consecutive_reuse=limit)
    expected = "C" + ("R" * limit + "c") * 3
    assert drive(DiCacheSession(config), len(expected)) == expected


def test_the_last_step_is_computed_without_asking_the_gate():
    config = DiCacheConfig(threshold=math.inf, retention_ratio=0.0, compute_last_step=True)
    assert drive(DiCacheSession(config), 5, num_inference_steps=5) == "CRRRC"


def test_an_explicit_last_step_wins_over_counting():
    config = DiCacheConfig(threshold=math.inf, retention_ratio=0.0, compute_last_step=True)
    session = DiCacheSession(config)
    drive(session, 3, num_inference_steps=50)
    action, _ = run_step(session, tensors(9), num_inference_steps=50, is_last=True)
    assert action == "compute"


def test_reuse_at_threshold_decides_the_tie():
    for at_threshold, expected in ((False, "Cc"), (True, "CR")):
        config = DiCacheConfig.preset(
            "hunyuan-video", threshold=0.0, retention_ratio=0.0, reuse_at_threshold=at_threshold
        )
        session = DiCacheSession(config)
        for _ in range(2):
            run_step(session, tensors(0))  # the probe does not move: the error is exactly zero
        assert actions(session) == expected


def test_an_unknown_number_of_steps_computes_everything_and_warns_once():
    session = DiCacheSession(DiCacheConfig(threshold=math.inf))
    with pytest.warns(DiCacheWarning, match="num_inference_steps.*apply_dicache") as caught:
        assert drive(session, 4) == "CCCC"
    assert len(caught) == 1


def test_the_number_of_steps_may_come_from_the_configuration():
    config = DiCacheConfig(threshold=math.inf, retention_ratio=0.5, num_inference_steps=4)
    assert drive(DiCacheSession(config), 4) == "CCRC"


def test_a_session_refuses_a_threshold_that_only_a_model_could_give():
    with pytest.raises(ValueError, match="threshold is None"):
        DiCacheSession(DiCacheConfig())


def test_records_hold_what_the_gate_compared():
    config = DiCacheConfig.preset("flux", threshold=0.9, retention_ratio=0.0)
    session = DiCacheSession(config)
    x, p, y = tensors(0)
    for factor in (1.0, 1.5, 1.5 * 1.5):  # delta_y is 0.5 each time
        run_step(session, (x, p * factor, y), num_inference_steps=9)
    first, second, third = session.stats.contexts["cond"]
    assert (first.step, first.action, first.error, first.gamma) == (0, "compute", None, None)
    assert second.action == "reuse"
    assert second.error == pytest.approx(0.5)
    assert second.gamma == 1.0  # one window entry
    assert third.action == "resume"
    assert third.accumulated_error == pytest.approx(1.0)  # before the reset
    assert third.gamma is None
    assert third.sample is None


def weighted_errors(timesteps, steps, **options):
    """Errors of the default rules over those of the same rules with equally large steps."""
    errors = []
    for times in (timesteps, [None] * len(timesteps)):
        session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE), **options)
        for seed, timestep in enumerate(times):
            where = {"timestep": timestep, "num_inference_steps": steps}
            run_step(session, tensors(seed), **where)
        errors.append([record.error for record in session.stats.contexts["cond"][1:]])
    return [weighted / plain for weighted, plain in zip(*errors, strict=True)]


def test_the_default_error_counts_a_step_by_its_size():
    # N (t_prev - t) / t_first with N = 4: the steps are half, one and a half times the mean, ...
    assert weighted_errors([800.0, 700.0, 400.0, 200.0], 4) == pytest.approx([0.5, 1.5, 1.0])


@pytest.mark.parametrize(
    ("timesteps", "options"),
    [
        ([800.0, 800.0, 800.0], {}),  # two evaluations a step, or rounded to bf16
        ([100.0, 200.0, 700.0], {"ascending_timesteps": True}),  # a run that ends anywhere
    ],
)
def test_a_step_of_unknown_size_counts_once(timesteps, options):
    assert weighted_errors(timesteps, 4, **options) == pytest.approx([1.0, 1.0])


def test_other_errors_are_not_weighted():
    for timesteps in ([800.0, 100.0], [800.0, 700.0]):
        session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE, error="alignment"))
        for seed, timestep in enumerate(timesteps):
            run_step(session, tensors(seed), timestep=timestep, num_inference_steps=4)
        (x0, p0, _), (x1, p1, _) = tensors(0), tensors(1)
        q0, q1 = (p0 - x0).flatten(), (p1 - x1).flatten()
        expected = float(torch.linalg.vector_norm(q1 - q0) / torch.linalg.vector_norm(q1))
        assert session.stats.contexts["cond"][1].error == pytest.approx(expected, rel=1e-5)


def test_a_step_that_began_a_run_by_its_layout_counts_for_the_next_steps_size():
    config = DiCacheConfig(threshold=math.inf, retention_ratio=0.0, compute_last_step=False)
    changed, fresh = DiCacheSession(config), DiCacheSession(config)
    wide = {"shape": (3, 4, 8)}
    for seed in range(3):
        where = {"timestep": 10.0 - seed, "num_inference_steps": 10}
        run_step(changed, tensors(seed, **wide), **where)
    for seed in range(3, 6):
        where = {"timestep": 10.0 - seed * seed / 3, "num_inference_steps": 10}
        for session in (changed, fresh):
            run_step(session, tensors(seed), **where)
    got, wanted = (session.stats.contexts["cond"] for session in (changed, fresh))
    assert [r.action for r in got] == [r.action for r in wanted] == ["compute", "reuse", "reuse"]
    assert [r.error for r in got[1:]] == [r.error for r in wanted[1:]]


# --- history -------------------------------------------------------------------------------------


def test_contexts_have_their_own_history():
    session = DiCacheSession(DiCacheConfig(schedule="CCR"))
    runs = {"cond": [tensors(s) for s in range(3)], "uncond": [tensors(s) for s in range(7, 10)]}
    got = {}
    for index in range(3):
        for name, run in runs.items():
            got[name] = run_step(session, run[index], name)[1]
    for name, run in runs.items():
        alone = DiCacheSession(DiCacheConfig(schedule="CCR"))
        for values in run:
            expected = run_step(alone, values, name)[1]
        assert torch.equal(got[name], expected)
    assert not torch.equal(got["cond"], got["uncond"])


@pytest.mark.parametrize("how", ["exception", "silence"])
def test_a_step_left_without_an_end_makes_the_next_one_compute(how):
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    drive(session, 3)
    x, p, _ = tensors(5)
    if how == "exception":
        with pytest.raises(KeyError), session.step("cond") as step:
            step.probe(x, p)
            raise KeyError
    else:
        with session.step("cond") as step:
            step.probe(x, p)
            step.resume(x, p)  # parks in the window: its entry is gone
    assert run_step(session, tensors(6))[0] == "compute"
    action, y = run_step(session, tensors(7))
    assert action == "reuse"
    x6, _, y6 = tensors(6)
    torch.testing.assert_close(y, tensors(7)[0] + (y6 - x6))  # one entry: y = x + r_new


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (2, 5, 8)},
        {"shape": (1, 4, 8)},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
    ],
)
def test_another_layout_begins_a_new_run(change):
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    drive(session, 3)
    before = session.stats
    values = tensors(9, **change)
    assert run_step(session, values)[0] == "compute"
    assert session.stats is not before
    action, y = run_step(session, values)
    assert action == "reuse"
    assert y.dtype == values[2].dtype
    torch.testing.assert_close(y, values[2], rtol=0.02, atol=0.02)


def test_a_timestep_that_moves_back_begins_a_new_run():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    for seed, timestep in enumerate((900.0, 800.0, 800.0, 700.0)):  # equal ones do not
        run_step(session, tensors(seed), timestep=torch.tensor([timestep]))
    assert actions(session) == "CRRR"
    run_step(session, tensors(8), timestep=torch.tensor([900.0]))
    assert actions(session) == "C"


def test_ascending_timesteps_are_a_run_where_the_family_says_so():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE), ascending_timesteps=True)
    for seed, timestep in enumerate((0.1, 0.2, 0.3)):
        run_step(session, tensors(seed), timestep=timestep)
    assert actions(session) == "CRR"
    run_step(session, tensors(8), timestep=0.0)
    assert actions(session) == "C"


def test_a_new_run_drops_every_context():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    for timestep in (900.0, 800.0):
        for name in ("cond", "uncond"):
            run_step(session, tensors(1), name, timestep=timestep)
    run_step(session, tensors(2), "cond", timestep=950.0)
    run_step(session, tensors(2), "uncond", timestep=950.0)
    assert actions(session, "cond") == actions(session, "uncond") == "C"


def test_another_number_of_steps_begins_a_new_run():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    drive(session, 3, num_inference_steps=10)
    run_step(session, tensors(1), num_inference_steps=8)
    assert actions(session) == "C"


def test_more_steps_than_the_run_has_begin_a_new_run():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    drive(session, 4, num_inference_steps=3)
    assert actions(session) == "C"


@pytest.mark.parametrize("rules", [{}, {"error": "delta_y"}, {"error": "delta_minus"}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_non_finite_values_never_reach_a_reused_output(rules, value, where):
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE, **rules))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(9):
            values = tensors(seed)
            if seed == 3:
                values[where][0, 0, 0] = value
                session.forget("cond")  # so that this step is recorded
            action, y = run_step(session, values)
            assert action != "reuse" or y.isfinite().all()
    assert actions(session)[-1] == "R"  # it recovers
    assert sum(issubclass(each.category, DiCacheWarning) for each in caught) == 1


def test_a_non_finite_entry_costs_one_resumed_step():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    x, p, y = tensors(0)
    y[0, 0, 0] = math.nan
    run_step(session, (x, p, y))
    with pytest.warns(DiCacheWarning, match="computed"):
        assert drive(session, 3) == "CcRR"


def test_a_new_run_warns_again():
    session = DiCacheSession(DiCacheConfig(threshold=math.inf))
    for _ in range(2):
        with pytest.warns(DiCacheWarning, match="num_inference_steps"):
            drive(session, 2)
        session.reset()


def test_the_error_compares_with_the_step_before_even_if_that_was_not_probed():
    config = DiCacheConfig(schedule="CRCR", error="delta_minus", alignment="l1")
    session = DiCacheSession(config)
    values = [tensors(seed) for seed in range(4)]
    for each in values:
        run_step(session, each)
    change = lambda now, before: (now - before).abs().mean() / before.abs().mean()  # noqa: E731
    (x2, p2, _), (x3, p3, _) = values[2:]
    expected = abs(float(change(p3, p2)) - float(change(x3, x2)))
    assert session.stats.contexts["cond"][3].error == pytest.approx(expected, abs=1e-6)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        ({}, 4),
        ({"error": "alignment"}, 4),
        ({"error": "delta_y"}, 5),
        ({"error": "delta_y", "alignment": "l1"}, 5),
        ({"error": "delta_minus", "alignment": "l1"}, 6),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_holds_the_promised_tensors_and_no_more(rules, count, dtype):
    session = DiCacheSession(
        DiCacheConfig(threshold=0.5, retention_ratio=0.0, compute_last_step=False, **rules)
    )
    shape, batch = (2, 16, 64), 2
    for seed in range(6):
        for name in ("cond", "uncond"):
            run_step(session, tensors(seed, shape, dtype), name)
    hidden_state = math.prod(shape) * dtype.itemsize
    assert session.stats.cache_tensors == 2 * count
    assert session.stats.cache_bytes == 2 * (count * hidden_state + small_bytes(batch, count))


def test_state_is_allocated_once_and_rewritten_in_place():
    session = DiCacheSession(DiCacheConfig.preset("flux-delta-minus", threshold=1e-6))
    addresses = set()
    for seed in range(8):
        run_step(session, tensors(seed), num_inference_steps=20)
        addresses.add(tuple(tensor.data_ptr() for tensor in owned(session)))
    assert len(addresses) == 1


@pytest.mark.parametrize("rules", [{}, {"error": "delta_y"}, {"error": "delta_minus"}])
def test_held_tensors_live_in_the_cache_and_free_the_callers(rules):
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE, **rules))
    with session.step("cond") as step:
        x, p, y = tensors(0)
        expected = y - x, p - x
        step.resume(x, p)
        gone = weakref.ref(x), weakref.ref(p)
        del x, p
        assert gone[0]() is gone[1]() is None
        step.record(y)
    windows = (trajectory_of(session).store[name] for name in ("residual_window", "probe_window"))
    assert all(
        torch.equal(window[0], wanted) for window, wanted in zip(windows, expected, strict=True)
    )


def test_holding_changes_no_result():
    values = [tensors(seed) for seed in range(5)]
    results = [], []
    for holds in (False, True):
        session = DiCacheSession(DiCacheConfig(schedule="CCRCR"))
        for x, p, y in values:
            with session.step("cond") as step:
                if step.needs_probe:
                    step.probe(x, p)
                if step.action == "reuse":
                    y = step.reuse(x)
                elif holds:
                    step.resume(x, p)
                    step.record(y)
                else:
                    step.record(x, p, y)
            results[holds].append(y)
    for plain, held in zip(*results, strict=True):
        assert torch.equal(plain, held)


def test_an_output_of_another_dtype_is_recorded_and_returned_in_it():
    session = DiCacheSession(DiCacheConfig(schedule="CCR"))
    for seed in range(3):
        x, p, y = tensors(seed)
        action, result = run_step(session, (x, p, y.to(torch.bfloat16)))
    assert action == "reuse"
    assert result.dtype == torch.bfloat16


def test_reset_frees_the_state_and_keeps_the_statistics():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    drive(session, 3)
    buffer = weakref.ref(trajectory_of(session).store["residual_window"])
    stats = session.stats
    session.reset()
    assert buffer() is None
    assert session.stats is stats
    assert (stats.num_computed, stats.num_resumed, stats.num_reused) == (1, 0, 2)
    run_step(session, tensors(0))
    assert actions(session) == "C"


@pytest.mark.parametrize(
    "rules",
    [ALWAYS_REUSE, ALWAYS_REUSE | {"granularity": "sample"}, {"threshold": 0.1, "profile": "auto"}],
)
def test_the_state_goes_with_the_last_reference_to_the_session(rules):
    session = DiCacheSession(DiCacheConfig(num_inference_steps=30, **rules))
    session.identity = Identity("Model", None, 9)
    drive(session, 3)
    step = session.step("cond")
    buffer = weakref.ref(trajectory_of(session).store["residual_window"])
    gc.disable()  # nothing waits for the collector
    try:
        del session
        assert step.index == 3 and buffer() is not None  # a step that is open needs it
        del step
        assert buffer() is None
    finally:
        gc.enable()


def test_a_step_keeps_its_session_which_a_new_run_may_need():
    with DiCacheSession(DiCacheConfig(**ALWAYS_REUSE)).step("cond") as step:
        context = step._session.timeline.restart(step._visit.run, step.where).branch.state
        assert context is not step._context
        step.record(*tensors(0))


def test_state_takes_no_part_in_autograd():
    session = DiCacheSession(DiCacheConfig(schedule="CCR"))
    for seed in range(3):
        x, p, y = (tensor.requires_grad_() for tensor in tensors(seed))
        run_step(session, (x, p, y))
    assert not any(tensor.requires_grad for tensor in owned(session))


# --- misuse --------------------------------------------------------------------------------------


def test_a_step_says_what_it_expected():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    x, p, y = tensors(0)
    with session.step("cond") as step:
        with pytest.raises(RuntimeError, match="needs_probe"):
            step.probe(x, p)
        with pytest.raises(RuntimeError, match="'compute'"):
            step.reuse(x)
        step.record(x, p, y)
        with pytest.raises(RuntimeError, match="ended"):
            step.record(x, p, y)


def test_an_engine_may_compute_a_step_that_it_could_reuse():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    drive(session, 1)
    x, p, y = tensors(1)
    with session.step("cond") as step:
        assert step.probe(x, p).action == "reuse"
        step.record(x, p, y)
    assert actions(session) == "Cc"


@pytest.mark.parametrize("steps", [0, -1])
def test_zero_steps_are_refused(steps):
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    with pytest.raises(ValueError, match="num_inference_steps"):
        session.step("cond", num_inference_steps=steps)


def test_an_absent_backend_is_named_with_the_reason():
    with pytest.raises(ValueError, match="backend='cuda'.*Available: auto, reference"):
        DiCacheSession(DiCacheConfig(**ALWAYS_REUSE, backend="cuda"))


# --- what a step costs ---------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    """The operators that were called, views and allocations left out."""

    FREE = (
        "select",
        "slice",
        "expand",
        "as_strided",
        "view",
        "detach",
        "empty",
        "new_empty",
        "alias",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if name not in self.FREE:
            self.names.append(f"{namespace}::{name}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "statistics"),
    [
        ({"error": "weighted_alignment"}, "dicache::alignment_statistics_out"),
        ({"error": "alignment"}, "dicache::alignment_statistics_out"),
        ({"error": "delta_y", "alignment": "l1"}, "dicache::probe_statistics_out"),
        ({"error": "delta_y"}, "dicache::probe_statistics_out"),
        ({"error": "delta_minus", "alignment": "l1"}, "dicache::probe_statistics_out"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_skipped_step_is_two_operators(config, statistics, dtype):
    """Two launches, and one read of two numbers on the host (`tolist` dispatches nothing)."""
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE, **config))
    for seed in range(3):
        run_step(session, tensors(seed, dtype=dtype))
    x, p, _ = tensors(3, dtype=dtype)
    with session.step("cond") as step, Dispatched() as dispatched:
        assert step.probe(x, p).action == "reuse"
        step.reuse(x)
    assert dispatched.names == [statistics, "dicache::combine_residuals"]


def test_a_computed_step_is_one_operator_and_the_two_copies_that_park_x_and_p():
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE, schedule="CCC"))
    drive(session, 2)
    x, p, y = tensors(2)
    with session.step("cond") as step, Dispatched() as dispatched:
        step.resume(x, p)
        step.record(y)
    assert dispatched.names == ["aten::copy_", "aten::copy_", "dicache::record_residuals"]


@pytest.mark.parametrize("make", [lambda t: t.transpose(1, 2), lambda t: t[:, ::2]])
def test_tensors_that_are_not_contiguous_are_taken_as_they_are(make):
    """A model may hand out any layout; a batch slice needs no copy, others are copied."""
    plain, odd = (DiCacheSession(DiCacheConfig(**ALWAYS_REUSE)) for _ in range(2))
    for seed in range(4):
        values = tensors(seed, shape=(2, 8, 8))
        _, expected = run_step(plain, [make(v).contiguous() for v in values])
        action, y = run_step(odd, [make(v) for v in values])
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert action == "reuse"


def test_a_slice_of_a_longer_sequence_is_not_copied():
    """Blocks that run on [text, image] hand out image tokens with a gap between the samples."""
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    for seed in range(3):
        x, p, y = (value[:, 3:] for value in tensors(seed, shape=(2, 8, 8)))
        with session.step("cond") as step:
            if not step.needs_probe:
                step.record(x, p, y)
                continue
            with Dispatched() as dispatched:
                step.probe(x, p)
                step.reuse(x)
    assert [name for name in dispatched.names if name.startswith("aten")] == []


def test_an_unavailable_backend_is_refused_before_the_first_run():
    status = ops.backend_status()
    for name in ("cpp", "cuda", "triton"):
        if status[name] == "available":
            DiCacheSession(DiCacheConfig(threshold=0.1, backend=name))
        else:
            with pytest.raises(ValueError, match=name) as error:
                DiCacheSession(DiCacheConfig(threshold=0.1, backend=name))
            assert status[name] in str(error.value)


def test_every_backend_that_runs_here_decides_alike():
    names = [n for n, status in ops.backend_status().items() if status == "available"]
    runs = {}
    for name in ["auto", *names]:
        if name in ("cuda", "triton"):
            continue  # the tensors here are the CPU's
        config = DiCacheConfig(threshold=2.0, retention_ratio=0.0, backend=name)
        runs[name] = drive(DiCacheSession(config), 12, num_inference_steps=12)
    assert len(runs) >= 2
    assert len(set(runs.values())) == 1
    assert {"C", "c", "R"} <= set(runs["auto"])


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_device": "cpu"},
        {"cache_device": "cpu", "cache_dtype": torch.bfloat16},
        {"cache_device": "cpu", "cache_dtype": torch.float8_e4m3fn},
    ],
    ids=["on the GPU", "host", "host, bf16", "host, fp8"],
)
@pytest.mark.parametrize("error", ["weighted_alignment", "delta_y"])
def test_on_a_gpu_a_decision_is_the_only_wait_and_the_tokens_are_queued_before_it(error, how):
    alignment = "l1" if error == "delta_y" else "least_squares"
    config = DiCacheConfig(schedule="CCRRCR", error=error, alignment=alignment, **how)
    on_host, on_gpu = DiCacheSession(config), DiCacheSession(config)
    steps = [(tensors(seed), 1000.0 - seed) for seed in range(6)]
    moved = [([t.cuda() for t in values], torch.tensor([at]).cuda()) for values, at in steps]
    for (values, at), (given, timestep) in zip(steps, moved, strict=True):
        expected = run_step(on_host, values, timestep=at)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = run_step(on_gpu, given, timestep=timestep)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got[0] == expected[0]
        torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-5, atol=1e-5)


# --- where a step cannot be kept -----------------------------------------------------------------


@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("elsewhere", ["y", "p and y"])
def test_a_model_that_is_spread_over_devices_is_computed(parks, elsewhere):
    """Its last blocks, or all behind the first, are on another device; it is said once a run."""
    session, seen = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE)), []
    with pytest.warns(DiCacheWarning, match=r"several devices \(cpu, meta\)") as told:
        for seed in range(4):
            x, p, y = tensors(seed)
            y = y.to("meta")
            p = p.to("meta") if elsewhere == "p and y" else p
            with session.step("cond") as step:
                assert not step.needs_probe
                if parks:
                    step.resume(x, p)
                seen.append(step.record(y) if parks else step.record(x, p, y))
            assert seen[-1] is y
    assert len(told) == 1
    assert actions(session) == "CCCC"


def test_a_computed_step_is_not_captured(monkeypatch):
    """A graph would write into the same entry at each replay."""
    session = DiCacheSession(DiCacheConfig(**ALWAYS_REUSE))
    drive(session, 1)
    monkeypatch.setattr(trajectories, "_is_captured", lambda tensor: True)
    x, p, y = tensors(1)
    for end in (lambda step: step.resume(x, p), lambda step: step.record(x, p, y)):
        with session.step("cond") as step:
            if step.needs_probe:
                step.probe(x, p)
            with pytest.raises(RuntimeError, match="captured into a CUDA graph"):
                end(step)
