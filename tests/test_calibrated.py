"""A calibrated cache fills steps in by the weights of its profile, and computes those of its plan.

Weights, errors, costs and tokens are computed a second time, from vectors and masks themselves.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import mask, trajectory_of
from made_profiles import World, profile_of, ridge, two_experts, world

from dicache import DiCacheConfig, DiCacheSession, DiCacheWarning, Where, ops
from dicache.core.calibration import (
    Calibration,
    assumed_gains,
    computed_for,
    divided,
    expected_psnr,
    planner_of,
)
from dicache.core.extrapolation import Extrapolation
from dicache.core.gate import PlannedGate
from dicache.core.planner import Planner
from dicache.core.readback import Readback
from dicache.core.rules import resolve
from dicache.core.where import Check
from dicache.demo.profiles import shipped_profile

THRESHOLD = 0.08  # of the rules without a plan
TIMES = tuple(np.linspace(1000, 50, 20).tolist())


def session_of(profile, **fields):
    """A session, as an adapter of a model of this profile makes one."""
    return DiCacheSession(resolve(DiCacheConfig(profile=profile, **fields), THRESHOLD))


def batch_of(worlds, step, shape=(1, -1, 8)):
    """x, p, y [B, S, D] of a step of several samples."""
    return tuple(map(torch.cat, zip(*(each.tokens(step, shape) for each in worlds), strict=True)))


def follow(session, tokens, known, context="cond", parks=True, stored=None, wheres=None):
    """Drive a run and compare what every reused step returns with the formula.

    Args:
        session: Of the cache.
        tokens: x, p, y of every step.
        known: The vectors that the profile was made of.
        context: Name of the branch.
        parks: Whether x and p are handed over before the remaining blocks.
        stored: What storing does to a residual.
        wheres: Fields of `Where`, of every step.

    Returns:
        The largest deviation of a reused sample, relative to its largest value; and the mask.
    """
    entries, worst = {}, 0.0
    stored = stored or (lambda each: each)
    for index, (x, p, y) in enumerate(tokens):
        if wheres and index and wheres[index] != wheres[index - 1]:
            entries.clear()
        fields = {"num_steps": len(tokens), **(wheres[index] if wheres else {})}
        with session.step(Where(context, **fields)) as step:
            if step.needs_probe:
                step.probe(x.clone(), p.clone())
            if step.action == "reuse":
                out, computed = step.reuse(x.clone()), []
            else:
                computed = [*range(len(x))] if step.rows is None else step.rows
                given = y if step.rows is None else y[step.rows]
                if parks:
                    step.resume(x.clone(), p.clone())
                    out = step.record(given.clone())
                else:
                    out = step.record(x.clone(), p.clone(), given.clone())
        for sample in range(len(x)):
            wide = [each[sample].double() for each in (x, p, y)]
            r, q = wide[2] - wide[0], wide[1] - wide[0]
            before = entries.get(sample, [])
            if sample in computed:
                assert torch.equal(out[sample], y[sample])
                entries[sample] = [(step.index, stored(r), stored(q)), *before[:2]]
                continue
            (w1, w2, w3), _ = ridge(known, step.index, tuple(each[0] for each in before))
            (_, ra, qa), (_, rb, _), (_, rc, _) = (before + before[-1:] * 2)[:3]
            expected = wide[0] + ra + w1 * (ra - rb) + w2 * (rb - rc) + w3 * (q - qa)
            deviation = (out[sample].double() - expected).abs().max() / expected.abs().max()
            worst = max(worst, float(deviation))
    return worst, mask(session.stats.contexts[context])


# --- weights -------------------------------------------------------------------------------------

ENTRIES = [(8, (7, 6, 5)), (9, (6, 4, 1)), (9, (8, 0)), (5, (4, 2)), (3, (2,)), (9, (0,))]


@pytest.mark.parametrize(("step", "entries"), ENTRIES)
@pytest.mark.parametrize("first", [0, 7])
def test_weights_are_those_of_ridge_regression_and_the_error_is_what_they_leave(
    step, entries, first
):
    known = world(10, seed=3)
    found = Extrapolation(known.moments(first))
    weights, error = ridge(known, step, entries)
    step, entries = step + first, tuple(each + first for each in entries)
    assert np.allclose(found.weights(step, entries), weights, rtol=1e-3, atol=1e-5)
    assert found.error(step, entries) == pytest.approx(error, rel=1e-4)
    other = (0.3, -0.2, 0.9)
    a, b, c = (each - first for each in (*entries, entries[-1], entries[-1])[:3])
    r, q, t = known.r, known.q, step - first
    made = r[a] + 0.3 * (r[a] - r[b]) - 0.2 * (r[b] - r[c]) + 0.9 * (q[t] - q[a])
    true = ((r[t] - made) ** 2).mean()
    assert found.error_of(step, entries, other) == pytest.approx(true, rel=1e-6)


def test_entries_that_are_missing_have_no_weight():
    """However the moments are rounded: differences of large numbers are not zero by themselves."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        along, base = rng.normal(size=300), rng.normal(size=300)
        q = base + 10 ** rng.uniform(-1, 0) * np.arange(6)[:, None] * along
        known = World(q, q, 2 * q + 0.3 * rng.normal(size=300))
        found = Extrapolation(known.moments())
        for step, entry in ((5, 0), (5, 1), (4, 1), (3, 2), (4, 2), (5, 3), (2, 0)):
            weights, _ = ridge(known, step, (entry,))
            assert np.allclose(found.weights(step, (entry,)), weights, rtol=1e-3, atol=1e-5)
        assert abs(found.weights(4, (2, 1))[1]) < 1e-5


@pytest.mark.parametrize("name", ["r", "q", "both"])
def test_steps_that_are_all_alike_have_finite_weights_and_no_error(name):
    known = world(6)
    still = {each: getattr(known, each)[:1].repeat(6, 0) for each in "rq"}
    chosen = still if name == "both" else {name: still[name]}
    found = Extrapolation(replace(known, **chosen).moments())
    for step, entries in [(5, (4, 3, 2)), (3, (1, 0)), (2, (0,))]:
        assert np.abs(found.weights(step, entries)).max() < 30
        if name == "both":
            assert found.error(step, entries) < 1e-12 * (known.r**2).mean()


def test_vectors_of_zeros_have_zero_weights():
    zero = np.zeros((5, 30))
    found = Extrapolation(World(zero, zero, zero).moments())
    assert found.weights(4, (3, 2, 1)) == (0, 0, 0)
    assert found.error(4, (3, 2, 1)) == found.misfit(4, (3, 2), True) == 0


@pytest.mark.parametrize("relative_to_probe", [False, True])
@pytest.mark.parametrize("gamma_range", [(0.0, 2.0), (0.0, None), (1.0, 1.2)])
@pytest.mark.parametrize(("step", "entries"), [(9, (5, 4, 3)), (4, (3, 0)), (6, (2,))])
def test_the_expected_misfit_is_the_operators(step, entries, gamma_range, relative_to_probe):
    """Also where gamma is clipped: one reused step after another is far outside of the window."""
    known = world(10, seed=4)
    a, b = (*entries, entries[-1])[:2]
    x, p, _ = known.tokens(step)
    window = torch.stack([known.tokens(each)[1] - known.tokens(each)[0] for each in (b, a)])
    newest, sums = torch.ones(1, dtype=torch.int32), torch.zeros(1, 4)
    difference = window[1] - window[0]
    sums[:, 0], sums[:, 1] = difference.abs().sum(), difference.square().sum()
    low, high = gamma_range
    numbers = ops.alignment_statistics(
        x, p, window, newest, sums, low, math.inf if high is None else high, relative_to_probe, None
    )[1]
    expected = Extrapolation(known.moments()).misfit(step, entries, relative_to_probe, gamma_range)
    assert expected == pytest.approx(float(numbers[-1, 0]), rel=1e-3)


# --- plans ---------------------------------------------------------------------------------------


def cost_of(schedule, contexts, gains, entries=(), first=0):
    """What the reused steps of a mask add, as lengths."""
    total = 0.0
    for step, letter in enumerate(schedule, start=first):
        if letter == "C":
            entries = (step, *entries[:2])
        else:
            square = sum(ridge(each, step, entries)[1] for each in contexts)
            total += gains[step] * math.sqrt(square)
    return total


def schedules(length, most):
    for letters in itertools.product("CR", repeat=length):
        if letters.count("C") <= most:
            yield "".join(letters)


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_plan_is_the_best_of_all_masks(contexts, seed):
    known = [world(7, seed=10 * seed + k, noise=0.1) for k in range(contexts)]
    gains = np.random.default_rng(seed).uniform(0.3, 3, 7).tolist()
    planner = Planner([Extrapolation(each.moments()) for each in known], gains)
    costs = []
    for computed in range(2, 8):
        best = min(cost_of("CC" + rest, known, gains) for rest in schedules(5, computed - 2))
        planned = planner.schedule(computed)
        assert planner.cost(computed) == pytest.approx(best, rel=1e-3, abs=1e-9)
        assert cost_of(planned, known, gains) == pytest.approx(best, rel=1e-3, abs=1e-9)
        assert planned[:2] == "CC" and planned.count("C") <= computed
        costs.append(planner.cost(computed))
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0
    assert len({planner.schedule(k) for k in range(2, 8)}) == 6


def test_leading_steps_are_computed_whatever_they_cost():
    """Those that are retained, but no more than a quarter of the computed ones."""
    known = [world(24, seed=3, noise=0.1)]
    gains = [1e-6] * 8 + [1.0] * 16  # nothing is gained by computing the first ones
    extrapolations = [Extrapolation(each.moments()) for each in known]
    for retained, computed, lead in ((5, 24, 5), (5, 20, 5), (5, 12, 3), (5, 4, 2), (0, 20, 2)):
        planner = Planner(extrapolations, gains, retained)
        mask = planner.schedule(computed)
        assert planner.lead(computed) == lead
        assert mask.startswith("C" * lead) and mask.count("C") <= computed
        if computed < 20:
            assert mask[lead] == "R"
        # Gaps wider than eight steps count as eight, where they are entries of a later step.
        assert planner.cost(computed) == pytest.approx(cost_of(mask, known, gains), rel=0.05)


def test_the_expected_error_of_a_schedule_is_that_of_the_vectors_themselves():
    """Errors are added with their directions."""
    known, gains = world(12, seed=4, noise=0.1), np.linspace(3, 0.5, 12)
    planner = Planner([Extrapolation(known.moments())], gains.tolist())
    for computed in (3, 5, 8):
        total, entries = np.zeros(known.r.shape[1]), ()
        for step, letter in enumerate(planner.schedule(computed)):
            if letter == "C":
                entries = (step, *entries[:2])
                continue
            (w1, w2, w3), _ = ridge(known, step, entries)
            a, b, c = (*entries, entries[-1], entries[-1])[:3]
            r, q = known.r, known.q
            made = r[a] + w1 * (r[a] - r[b]) + w2 * (r[b] - r[c]) + w3 * (q[step] - q[a])
            total += gains[step] * (made - r[step])
        assert planner.square(computed) == pytest.approx((total**2).mean(), rel=1e-3)


@pytest.mark.parametrize("entries", [(0,), (1, 0), (2, 0), (2, 1, 0), (3, 2, 0), (4, 2, 1)])
def test_the_rest_of_a_plan_is_the_best_from_any_state(entries):
    known, gains = world(7, seed=5, noise=0.1), [1.0, 2.0, 0.5, 1.5, 1.0, 0.7, 2.0]
    planner = Planner([Extrapolation(known.moments(3))], gains)
    shifted = tuple(each + 3 for each in entries)
    for left in range(7 - entries[0]):
        rest = schedules(6 - entries[0], left)
        found = {
            each: cost_of(each, [known], gains, entries, first=entries[0] + 1) for each in rest
        }
        best = min(found, key=found.get)
        assert planner.rest(shifted, left) == pytest.approx(found[best], rel=1e-3, abs=1e-9)
        following = entries[0] + 1 + best.find("C") if "C" in best else 7
        assert planner.next_computed(shifted, left) == 3 + following


def test_gaps_wider_than_those_that_are_told_apart_are_planned_for():
    known = world(30, seed=6)
    planner = Planner([Extrapolation(known.moments())], [1.0] * 30)
    assert planner.schedule(3).count("C") == 3
    assert planner.rest((25, 13, 0), 2) < planner.rest((25, 13, 0), 1)


def test_steps_are_divided_between_two_models_as_costs_least():
    made = two_experts(world(12, seed=2, noise=0.1), 5, gains=tuple(np.linspace(4, 0.5, 12)))
    planners = {}
    for name, model in made.models.items():
        (moments,) = model.contexts.values()
        span = slice(moments.first, moments.first + moments.num_steps)
        planners[name] = Planner([Extrapolation(moments)], made.gains[span])
    found = divided(planners)
    assert [*found] == [*range(4, 13)]
    for total, shares in found.items():
        one, two = planners.values()
        sums = [
            one.cost(k) + two.cost(total - k)
            for k in range(2, total - 1)
            if k <= one.num_steps and total - k <= two.num_steps
        ]
        assert sum(shares.values()) == total
        assert sum(planners[n].cost(k) for n, k in shares.items()) == pytest.approx(min(sums))


@pytest.mark.parametrize(("num_steps", "num_blocks"), [(10, 5), (30, 20), (50, 57)])
def test_a_target_is_met_to_half_a_step(num_steps, num_blocks):
    made = profile_of({"cond": world(num_steps)}, num_blocks=num_blocks)
    fastest = num_steps * num_blocks / (2 * num_blocks + num_steps - 2)
    for speedup in np.linspace(1, 0.99 * fastest, 12):
        computed = computed_for(made, float(speedup))
        blocks = computed * num_blocks + (num_steps - computed)  # probes are a block each
        wanted = num_steps * num_blocks / speedup
        assert abs(blocks - wanted) <= (num_blocks - 1) / 2 + 1e-9
    config = DiCacheConfig(profile=made, target_speedup=2 * fastest)
    with pytest.raises(ValueError) as error:
        resolve(config)
    assert f"target_speedup is {2 * fastest}. Expected at most" in str(error.value)
    allowed = float(str(error.value).split("at most ")[1].split(":")[0])
    assert allowed <= fastest < allowed + 0.011
    assert resolve(replace(config, target_speedup=allowed)).calibration.computed == 2


@pytest.mark.parametrize(
    ("times", "gains"),
    [
        ((8.0, 6.0, 4.0, 1.0), (0.2, 0.4, 0.6, 3 * 1.5 * 0.9)),
        (None, (0.2, 0.4, 0.6, 3 * 0.8)),
        ((1.0, 2.0, 3.0, 4.0), (0.2, 0.4, 0.6, 3 * 0.8)),  # they do not say where they end
    ],
)
def test_an_error_is_taken_to_go_the_farther_the_later_the_step(times, gains):
    made = replace(profile_of({"cond": world(4)}), timesteps=times, gains=None)
    assert assumed_gains(made) == pytest.approx(gains)


@pytest.mark.parametrize("name", ["flux", "hunyuan-video", "wan"])
def test_plans_of_trained_models_hardly_need_measured_gains(name):
    """By the expected error, of which the gains are a part."""
    measured = shipped_profile(name)
    config = DiCacheConfig(profile=measured)
    (model,) = measured.models
    judge = planner_of(measured, model, config)
    other = planner_of(replace(measured, gains=None), model, config)
    for speedup in (1.5, 2, 2.5, 3):
        computed = computed_for(measured, speedup)
        squares = [
            sum(each.square(planner.schedule(computed), judge._gains) for each in judge._contexts)
            for planner in (judge, other)
        ]
        assert expected_psnr(measured, squares[1]) > expected_psnr(measured, squares[0]) - 1


def test_a_target_psnr_is_the_cheapest_plan_that_is_expected_to_meet_it():
    made = profile_of({"cond": world(12, noise=0.1)}, gains=(1.0,) * 12, peak=4.0)
    planner = Planner([Extrapolation(world(12, noise=0.1).moments())], [1.0] * 12)
    expected = {k: expected_psnr(made, planner.square(k)) for k in range(2, 13)}
    for target in (0.0, 20.0, 25.0, 30.0, 99.0, math.inf):
        computed = Calibration(
            made, "transformer", DiCacheConfig(profile=made, target_psnr=target)
        ).computed
        assert expected[computed] >= target
        assert all(expected[fewer] < target for fewer in range(2, computed))
    assert expected[4] == pytest.approx(10 * math.log10(16 / planner.square(4)))
    for missing in ({"gains": None}, {"peak": None}):
        with pytest.raises(ValueError, match="target_psnr is 30 and this profile has no measured"):
            resolve(DiCacheConfig(profile=replace(made, **missing), target_psnr=30))


@pytest.mark.parametrize("error", ["weighted_alignment", "alignment"])
@pytest.mark.parametrize("threshold", [0.04, 0.1, 0.5])
def test_without_a_target_a_plan_costs_what_the_rules_without_it_do(error, threshold):
    known = world(20)
    made = profile_of({"cond": known}, timesteps=TIMES)
    rules = {"error": error, "retention_ratio": 0.2}
    plain = DiCacheSession(resolve(DiCacheConfig(**rules), threshold))
    for step in range(20):
        x, p, y = known.tokens(step)
        where = Where("cond", num_steps=20, timestep=TIMES[step], first_timestep=TIMES[0])
        with plain.step(where) as each:
            if each.needs_probe:
                each.probe(x, p)
            each.reuse(x) if each.action == "reuse" else each.record(x, p, y)
    planned = resolve(DiCacheConfig(profile=made, **rules), threshold).calibration
    assert planned.computed == 20 - plain.stats.num_reused < 20


def test_a_profile_needs_some_rule_or_target():
    with pytest.raises(ValueError, match="neither threshold, target_speedup nor target_psnr"):
        resolve(DiCacheConfig(profile=profile_of({"cond": world(6)})))


# --- tokens --------------------------------------------------------------------------------------

MASKS = ["CRRRRRRRRRRR", "CCRRRRRRRRRR", "CCCRRCRCCRRR", "CRCRCRRRCCCR"]


@pytest.mark.parametrize("schedule", MASKS)
@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reused_tokens_follow_from_one_two_three_and_more_entries(schedule, parks, backend):
    known = world(12)
    session = session_of(profile_of({"cond": known}), schedule=schedule, backend=backend)
    tokens = [batch_of([world(12, seed=1), world(12, seed=2)], step) for step in range(12)]
    worst, done = follow(session, tokens, known, parks=parks)
    assert worst < 1e-5 and done.upper() == schedule
    records = session.stats.contexts["cond"]
    used = [each for each in records if each.action == "reuse"]
    assert all(each.gamma is None and len(each.weights) == 3 for each in used)
    assert all(each.weights is None for each in records if each.action != "reuse")


def test_the_window_of_three_is_kept_only_where_a_profile_is_used():
    tokens = world(12).tokens(0)
    sizes = []
    for name in ("cond", "other"):
        session = session_of(profile_of({"cond": world(12)}), schedule="CR" * 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DiCacheWarning)
            with session.step(Where(name, num_steps=12)) as step:
                step.record(*tokens)
        sizes.append((session.stats.cache_tensors, session.stats.cache_bytes))
    (five, large), (four, small) = sizes
    assert (five, four) == (5, 4) and large - small == tokens[0].numel() * 4


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"cache_dtype": torch.bfloat16}, 1e-5),
        ({"cache_dtype": torch.float8_e4m3fn}, 0.2),
        ({"cache_device": "cpu"}, 1e-5),
        ({"cache_dtype": torch.bfloat16, "cache_device": "cpu"}, 1e-5),
    ],
)
@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("veto", [1e9, None])
def test_packed_entries_are_turned_as_others_are(fields, tolerance, parks, veto):
    """Also where no statistics are taken first."""
    known = world(12)
    session = session_of(profile_of({"cond": known}), target_speedup=2, veto=veto, **fields)
    tokens = [world(12, seed=1).tokens(step) for step in range(12)]
    rounds = fields.get("cache_dtype") == torch.bfloat16
    stored = (lambda each: each.float().bfloat16().double()) if rounds else None
    worst, done = follow(session, tokens, known, parks=parks, stored=stored)
    assert worst < tolerance and done.count("R") >= 5


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_tokens_in_another_order_of_memory(granularity):
    known = world(12)
    session = session_of(profile_of({"cond": known}), schedule=MASKS[2], granularity=granularity)
    tokens = [
        tuple(
            each.transpose(1, 2).contiguous().transpose(1, 2)
            for each in batch_of([world(12, seed=1), world(12, seed=2)], step)
        )
        for step in range(12)
    ]
    worst, done = follow(session, tokens, known)
    assert worst < 1e-5 and done.count("R") > 0


@pytest.mark.parametrize("parks", [True, False])
def test_a_last_block_that_returns_another_dtype(parks):
    known = world(12)
    session = session_of(profile_of({"cond": known}), schedule=MASKS[2])
    tokens = [world(12, seed=1).tokens(step) for step in range(12)]
    tokens = [(x.bfloat16(), p, y) for x, p, y in tokens]
    worst, _ = follow(session, tokens, known, parks=parks)
    assert worst < 1e-5
    assert session.stats.contexts["cond"][-1].action == "reuse"


def test_what_fp16_cannot_hold_is_its_largest_number():
    known = world(6)
    session = session_of(profile_of({"cond": known}), schedule="CCRRRR")
    for step in range(6):
        x, p, y = (each.half() for each in known.tokens(step))
        y = y + (20000 * step if step < 2 else 0)
        with session.step(Where("cond", num_steps=6)) as each:
            if each.needs_probe:
                x = x + 60000
                each.probe(x, p + 60000)
                assert (each.reuse(x) == torch.finfo(torch.float16).max).any()
            else:
                each.record(x, p, y)


@pytest.mark.parametrize("ended_by", ["close", "discard", "exception after resume", "state"])
def test_entries_begin_anew_after_a_step_that_left_none(ended_by):
    known = world(12)
    session = session_of(profile_of({"cond": known}), schedule="CCCRCRRRRRRR")
    tokens = [world(12, seed=1).tokens(step) for step in range(12)]
    for step in range(4):
        run(session, tokens[step])
    x, p, _ = tokens[4]
    if ended_by == "state":
        wheres = [{"computes_in": "other"}] * 8
        computed = {4, 5}
        begin = 4
    else:
        wheres, computed, begin = None, {5}, 5
        try:
            with session.step(Where("cond", num_steps=12)) as step:
                if ended_by == "discard":
                    step.discard()
                if ended_by.startswith("exception"):
                    step.resume(x, p)
                    raise KeyError
        except KeyError:
            pass
    entries = []
    for index in range(begin, 12):
        action, out = run(session, tokens[index], **(wheres[0] if wheres else {}))
        x, p, y = (each.double() for each in tokens[index])
        if index in computed:
            assert action == "compute"
            entries = [(index, y - x, p - x), *entries[:2]]
            continue
        assert action == "reuse"
        (w1, w2, w3), _ = ridge(known, index, tuple(each[0] for each in entries))
        (_, ra, qa), (_, rb, _), (_, rc, _) = (entries + entries[-1:] * 2)[:3]
        expected = x + ra + w1 * (ra - rb) + w2 * (rb - rc) + w3 * (p - x - qa)
        assert (out - expected).abs().max() < 1e-4 * expected.abs().max()


def run(session, values, context="cond", **where):
    """One step of twelve; its action and tokens."""
    x, p, y = values
    with session.step(Where(context, **{"num_steps": 12, **where})) as step:
        if step.needs_probe:
            step.probe(x, p)
        out = step.reuse(x) if step.action == "reuse" else step.record(x, p, y)
    return step.action, out


# --- what a plan does in a run -------------------------------------------------------------------


def whole(session, tokens, context="cond", **where):
    """A whole run; its mask."""
    for values in tokens:
        run(session, values, context, **{"num_steps": len(tokens), **where})
    return mask(session.stats.contexts[context])


def gates_of(session, name="cond"):
    (branch,) = (each for each in session.timeline.run.branches if each.name == name)
    return branch.state.gates


def hard(values, seed=0, size=1.0):
    """The same step, with a probe that nothing has told of."""
    x, p, y = values
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return x, p + size * noise * p.abs().mean(), y


KNOWN = world(20, noise=0.05)
TOKENS = [KNOWN.tokens(step) for step in range(20)]


@pytest.mark.parametrize("speedup", [1, 1.5, 2, 3, 5, 6.5])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("veto", [3, None])
def test_a_run_follows_its_plan(speedup, granularity, veto):
    made = profile_of({"cond": KNOWN}, gains=tuple(np.linspace(3, 1, 20)))
    session = session_of(made, target_speedup=speedup, granularity=granularity, veto=veto)
    computed = computed_for(made, speedup)
    retained = DiCacheConfig().retained_steps(20)
    plan = Planner([Extrapolation(KNOWN.moments())], made.gains, retained).schedule(computed)
    for _ in range(2):  # and so does the next run
        assert whole(session, TOKENS) == plan and plan.count("C") == computed
    assert session.stats.num_vetoes == 0


def test_a_plan_reuses_no_more_steps_in_a_row_than_is_allowed():
    made = profile_of({"cond": KNOWN})
    free, limited = (
        whole(session_of(made, target_speedup=4, max_consecutive_reuse=limit), TOKENS)
        for limit in (None, 3)
    )
    assert "RRRR" in free and "RRRR" not in limited and "RRR" in limited


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_step_that_the_probe_finds_hard_is_computed_and_the_rest_keeps_the_budget(granularity):
    made = profile_of({"cond": KNOWN})
    session = session_of(made, target_speedup=2, granularity=granularity, veto=5.0)
    tokens = [batch_of([KNOWN, KNOWN], step) for step in range(20)]
    planned = whole(session, tokens)[:: 2 if granularity == "sample" else 1]
    step = planned.index("RR", 5)
    values = [each[1:] for each in tokens[step]]
    x, p, y = (torch.cat([a[:1], b]) for a, b in zip(tokens[step], hard(values), strict=True))
    tokens[step] = (x, p, y)
    session.reset()
    worst, done = follow(session, tokens, KNOWN)
    assert worst < 1e-5  # weights are those of each sample's own entries
    if granularity == "sample":
        easy, done = done[::2], done[1::2]
        assert easy.upper() == planned
    assert done[: step + 1] == planned[:step] + "c"
    assert done.upper().count("C") == planned.count("C")
    assert session.stats.num_vetoes == 1


def test_a_veto_late_in_the_run_that_leaves_too_few_steps_is_not_paid_for():
    made = profile_of({"cond": KNOWN}, gains=(1e-6,) * 12 + (1.0,) * 8)
    session = session_of(made, target_speedup=1.9, veto=1.2)
    assert whole(session, TOKENS) == "CC" + 10 * "R" + 8 * "C"
    tokens = [*TOKENS[:5], hard(TOKENS[5], size=30), *TOKENS[6:]]
    done = whole(session, tokens)
    assert done[:6] == "CCRRRc" and done[12:] == 8 * "C"


def test_vetoes_at_every_step_compute_every_step():
    session = session_of(profile_of({"cond": KNOWN}), target_speedup=2, veto=2.0)
    done = whole(session, [hard(each, seed) for seed, each in enumerate(TOKENS)])
    assert "R" not in done


def test_a_veto_is_told_from_what_is_expected_of_clipped_weights():
    """Far behind a window of neighbours gamma is clipped: that alone is no reason to object."""
    made = profile_of({"cond": KNOWN})
    for speedup in (3, 5, 8):
        session = session_of(made, target_speedup=speedup, veto=1.05)
        assert "c" not in whole(session, TOKENS)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("where", ["x", "p"])
def test_nan_is_computed_and_forgotten(where, granularity):
    session = session_of(profile_of({"cond": KNOWN}), target_speedup=2, granularity=granularity)
    planned = whole(session, TOKENS)
    step = planned.index("R", 5)
    x, p, y = (each.clone() for each in TOKENS[step])
    (x if where == "x" else p)[0, 0] = math.nan
    session.reset()
    for index, values in enumerate(TOKENS):
        with (
            pytest.warns(DiCacheWarning, match="NaN")
            if index == step
            else warnings.catch_warnings()
        ):
            action, out = run(session, (x, p, y) if index == step else values, num_steps=20)
        assert out.isfinite().all() and (index != step or action == "resume")
    assert mask(session.stats.contexts["cond"])[step + 4 :].count("R") > 2


def test_a_context_that_changes_behind_the_probe_has_two_steps_computed():
    session = session_of(profile_of({"cond": KNOWN}), target_speedup=2)
    planned = whole(session, TOKENS)
    step = planned.index("R", 8)
    wheres = [{"computes_in": index >= step} for index in range(20)]
    session.reset()
    worst, done = follow(session, TOKENS, KNOWN, wheres=wheres)
    assert worst < 1e-5
    assert done[:step] == planned[:step] and done[step : step + 2] == "CC"
    assert done.count("C") == planned.count("C")


def plain_mask(tokens, context="cond", times=TIMES, **rules):
    """What the rules without a profile do."""
    plain = DiCacheSession(DiCacheConfig(threshold=THRESHOLD, **rules))
    return timed(plain, tokens, context, times)


def timed(session, tokens, context="cond", times=TIMES, **where):
    for values, time in zip(tokens, times, strict=True):
        run(session, values, context, num_steps=len(tokens), timestep=time, **where)
    return mask(session.stats.contexts[context])


def test_a_branch_that_the_profile_does_not_know_is_decided_by_the_rules_without_it():
    session = session_of(profile_of({"cond": KNOWN}), target_speedup=2)
    with pytest.warns(DiCacheWarning, match="does not know the branch 'other'") as told:
        done = timed(session, TOKENS, "other")
    assert len(told) == 1 and done == plain_mask(TOKENS, "other") and "R" in done
    assert all(each.weights is None for each in session.stats.contexts["other"])


def test_another_number_of_steps_is_decided_by_the_rules_without_the_profile():
    session = session_of(profile_of({"cond": KNOWN}), target_speedup=2)
    for steps, message in ((10, "runs of 20 steps and this one has 10"),):
        tokens, times = TOKENS[::2], TIMES[::2]
        with pytest.warns(DiCacheWarning, match=message) as told:
            done = timed(session, tokens, times=times)
        assert len(told) == 1 and len(tokens) == steps
        assert done == plain_mask(tokens, times=times)


def test_a_run_of_which_nobody_says_how_long_it_is_needs_to_be_told():
    session = session_of(profile_of({"cond": KNOWN}), target_speedup=2)
    with pytest.warns(DiCacheWarning, match="num_inference_steps=") as told:
        for values in TOKENS:
            run(session, values, num_steps=None)
    assert len(told) == 2  # the rules without a profile want to know it, too
    told = session_of(profile_of({"cond": KNOWN}), target_speedup=2, num_inference_steps=20)
    for values in TOKENS:
        run(told, values, num_steps=None)
    assert told.stats.num_reused == 11


@pytest.mark.parametrize("part", [slice(None, None, 2), slice(8, None)], ids=["half", "img2img"])
def test_a_run_of_other_timesteps_follows_what_is_interpolated(part):
    smooth = world(20, noise=0)
    made = profile_of({"cond": smooth}, timesteps=TIMES)
    session = session_of(made, target_speedup=2)
    steps = [*range(20)][part]
    times = TIMES[part]
    assert "c" not in whole(session, [smooth.tokens(step) for step in range(20)], timesteps=TIMES)
    for _ in range(2):
        with pytest.warns(DiCacheWarning, match="what it says is interpolated") as told:
            done = whole(session, [smooth.tokens(step) for step in steps], timesteps=times)
        assert len(told) == 1
    gains = made.resampled(times).gains
    moments = smooth.moments()
    index = torch.tensor(steps)
    own = replace(
        moments,
        **{name: getattr(moments, name)[index][:, index] for name in ("rr", "qq", "rq")},
        pp=moments.pp[index],
    )
    planner = Planner([Extrapolation(own)], gains)
    assert done == planner.schedule(computed_for(made.resampled(times), 2))
    nearly = tuple(time + 2 for time in TIMES)  # as rounding makes them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole(session, TOKENS, timesteps=nearly)


def test_a_target_that_so_few_steps_cannot_meet_stops_no_run():
    smooth = world(20, noise=0)
    made = profile_of({"cond": smooth}, timesteps=TIMES, num_blocks=9)
    session = session_of(made, target_speedup=4.9)
    with pytest.warns(DiCacheWarning, match="the rules without a profile decide"):
        whole(session, [smooth.tokens(step) for step in range(0, 20, 4)], timesteps=TIMES[::4])


def test_profiles_for_other_timesteps_are_not_kept_without_end():
    made = profile_of({"cond": world(20, noise=0)}, timesteps=TIMES)
    known = session_of(made, threshold=0.1).rules.calibration
    runs = [tuple(time * (0.7 + 0.01 * k) for time in TIMES) for k in range(20)]
    found = [known.for_run(20, times) for times in runs]
    assert all(each is not None and each is not known for each in found)
    assert known.for_run(20, runs[-1]) is found[-1]
    assert len(known._fitting) <= 16


@pytest.mark.parametrize("late", [True, False])
def test_a_branch_that_is_not_called_in_every_step_is_decided_by_the_rules_without_it(late):
    """Its steps are not the run's, which the profile counts."""
    made = profile_of({"cond": KNOWN, "uncond": KNOWN})
    session = session_of(made, target_speedup=2, cfg="independent")
    paused = range(6) if late else range(4, 9)
    with pytest.warns(DiCacheWarning, match="branch 'uncond' of guidance is not called in every"):
        for step, (values, time) in enumerate(zip(TOKENS, TIMES, strict=True)):
            for context in ("cond", "uncond"):
                if context == "cond" or step not in paused:
                    run(session, values, context, num_steps=20, timestep=time)
    assert mask(session.stats.contexts["cond"]) == whole(session_of(made, target_speedup=2), TOKENS)
    (gate,) = gates_of(session, "uncond")
    assert not isinstance(gate, PlannedGate)
    after = session.stats.contexts["uncond"][0 if late else 4 :]
    assert all(each.weights is None for each in after)


@pytest.mark.parametrize("cfg", ["shared", "independent"])
def test_two_branches_follow_one_plan(cfg):
    other = world(20, noise=0.05, seed=3)
    made = profile_of({"cond": KNOWN, "uncond": other})
    session = session_of(made, target_speedup=2.5, cfg=cfg, veto=5.0)
    both = [Extrapolation(each.moments()) for each in (KNOWN, other)]
    plan = Planner(both, made.gains).schedule(computed_for(made, 2.5))
    step = plan.index("R", 6)
    for changes in (False, True):
        for index in range(20):
            values = hard(TOKENS[index]) if changes and index == step else TOKENS[index]
            for context, tokens in (("cond", values), ("uncond", other.tokens(index))):
                run(session, tokens, context, num_steps=20, timestep=TIMES[index])
        done = [mask(session.stats.contexts[name]) for name in ("cond", "uncond")]
        if not changes:
            assert done == [plan, plan]
    assert done[0][step] == "c"
    assert done[1][step] == ("c" if cfg == "shared" else "R")
    assert done[0].upper().count("C") == plan.count("C")
    if cfg == "shared":
        assert done[0] == done[1]


def test_a_context_on_its_own_is_filled_in_by_its_own_weights():
    other = world(20, noise=0.05, seed=3)
    session = session_of(profile_of({"cond": KNOWN, "uncond": other}), schedule="CC" + "CRR" * 6)
    tokens = [other.tokens(step) for step in range(20)]
    worst, _ = follow(session, tokens, other, context="uncond")
    assert worst < 1e-5


@pytest.mark.parametrize(("veto", "waits"), [(None, 0), (3.0, 11)])
def test_a_plan_without_veto_waits_for_nothing(veto, waits, monkeypatch):
    session = session_of(profile_of({"cond": KNOWN}), target_speedup=2, veto=veto)
    counted, wait = [], Readback.wait
    monkeypatch.setattr(Readback, "wait", lambda each: counted.append(each) or wait(each))
    assert whole(session, TOKENS).count("R") == 11
    # A wait for nothing is none: there has to be something that it reads.
    assert sum(bool(each._copies) for each in counted) == waits


def test_without_veto_a_check_is_looked_at_one_step_later(monkeypatch):
    session = session_of(profile_of({"cond": KNOWN}), target_speedup=2, veto=None)
    planned = whole(session, TOKENS)
    step = next(k for k in range(6, 20) if planned[k : k + 2] == "RR")
    session.reset()
    asked = []

    def holds(value):
        asked.append(value)
        return value != step

    for index, values in enumerate(TOKENS):
        before = len(asked)
        run(session, values, num_steps=20, check=Check(torch.tensor(float(index)), holds))
        if index > 0 and planned[index - 1] == "R" and index <= step + 1:
            assert asked[before:] == [index - 1]
    done = mask(session.stats.contexts["cond"])
    assert done[: step + 3] == planned[: step + 1] + "CC"


def test_no_plan_is_made_where_a_threshold_or_a_schedule_decides():
    made = profile_of({"cond": KNOWN})
    for fields in ({"threshold": 0.1}, {"schedule": "CR" * 10}):
        session = session_of(made, **fields)
        assert session.rules.calibration.computed is None
        whole(session, TOKENS)
        assert not isinstance(gates_of(session)[0], PlannedGate)
        used = [each for each in session.stats.contexts["cond"] if each.action == "reuse"]
        assert used and all(each.weights is not None for each in used)


def test_a_calibrated_run_needs_nothing_of_the_default_device():
    session = None
    for device in ("meta", None):
        torch.set_default_device(device)
        try:
            session = session or session_of(
                profile_of({"cond": KNOWN}, timesteps=TIMES), target_speedup=2
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DiCacheWarning)
                assert "R" in whole(session, TOKENS[::2], timesteps=TIMES[::2])
        finally:
            torch.set_default_device(None)
    assert trajectory_of(session).num_tensors == 5
