"""A profile comes back from its file as it was, and is of nothing but the model that it is of."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_profiles import profile_of, two_experts, world

from dicache import DiCacheConfig, Profile
from dicache.profile import Identity, ModelProfile

TEN = world(10)


def changed(**changes):
    """What `to_dict` gives as JSON has it, with other values at some places ("a/b/c")."""
    data = json.loads(json.dumps(profile_of({"cond": TEN}).to_dict()))
    for path, value in changes.items():
        *names, last = path.split("/")
        place = data
        for name in names:
            place = place[name]
        place[last] = value
    return data


# --- the file ------------------------------------------------------------------------------------


def test_a_profile_comes_back_from_its_file(tmp_path):
    made = profile_of(
        {"cond": TEN, "uncond": world(10, seed=1)},
        timesteps=tuple(np.linspace(1000, 50, 10)),
        gains=tuple(np.linspace(3, 1, 10)),
        peak=2.5,
        samples=16,
        elements=240,
        about={"scheduler": "Euler"},
    )
    made.save(tmp_path / "a.json")
    read = Profile.load(tmp_path / "a.json")
    for name in ("num_steps", "timesteps", "gains", "peak", "samples", "elements", "about"):
        assert getattr(read, name) == getattr(made, name), name
    (mine,), (its,) = made.models.values(), read.models.values()
    assert (mine.identity, mine.probe_depth) == (its.identity, its.probe_depth)
    assert [*its.contexts] == ["cond", "uncond"]
    for context, moments in mine.contexts.items():
        for name in ("rr", "qq", "rq", "pp"):
            known, found = getattr(moments, name), getattr(its.contexts[context], name)
            assert (known - found).abs().max() <= 5e-10 * known.abs().max()
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    read.save(tmp_path / "b.json")  # what has ten digits keeps them all
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_file_that_is_there_stays_whole_when_a_new_one_cannot_be_written(tmp_path):
    target = tmp_path / "a.json"
    profile_of({"cond": TEN}).save(target)
    before = target.read_bytes()
    with pytest.raises(TypeError):
        profile_of({"cond": TEN}, about={"an object": object()}).save(target)
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "dicache-profile-0"}, "format is 'dicache-profile-0'. Expected 'dicache"),
        ({"models/transformer/contexts/cond/rr": [[1.0]]}, "rr are not 10 x 10 finite numbers"),
        ({"models/transformer/contexts/cond/qq": [[math.nan] * 10] * 10}, "qq are not 10 x 10"),
        ({"models/transformer/contexts/cond/pp": [math.inf] * 10}, "pp are not 10 finite numbers"),
        ({"models/transformer/contexts/cond/rq": "text"}, "not a whole profile"),
        ({"models/transformer/contexts/cond/first": 3}, "(3, 10)] in a run of 10"),
        ({"models/transformer/contexts": {}}, "without contexts"),
        ({"models": {}}, "no model"),
        ({"models": None}, "not a whole profile"),
        ({"num_steps": "10"}, "not a whole profile"),
        ({"timesteps": [1.0] * 9}, "Expected 10 finite numbers"),
        ({"gains": [math.nan] * 10}, "Expected 10 finite numbers"),
        ({"gains": [-1.0] * 10}, "Expected numbers >= 0"),
        ({"peak": math.nan}, "peak is nan"),
        ({"peak": 0}, "peak is 0"),
    ],
)
def test_what_is_no_whole_profile_is_refused(changes, message, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(changed(**changes)))
    with pytest.raises(ValueError) as error:
        Profile.load(path)
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("missing", ["models", "gains", "about", "peak"])
def test_a_profile_without_a_part_is_refused(missing):
    data = changed()
    del data[missing]
    with pytest.raises(ValueError, match="not a whole profile"):
        Profile.from_dict(data)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    path = tmp_path / "short.json"
    profile_of({"cond": TEN}).save(path)
    path.write_text(path.read_text()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"is not JSON .* Expected a profile"):
        DiCacheConfig(profile=path, target_speedup=2)


@pytest.mark.parametrize("data", [[], "text", None, 3.0])
def test_json_of_another_kind_is_refused(data):
    with pytest.raises(ValueError, match="the format is"):
        Profile.from_dict(data)


def test_contexts_of_different_steps_are_refused():
    with pytest.raises(ValueError, match="guidance that pauses cannot be calibrated"):
        profile_of({"cond": TEN, "uncond": world(6)})


# --- whose it is ---------------------------------------------------------------------------------


def test_a_model_is_known_by_class_configuration_and_depth():
    def identity(num_blocks=4, **config):
        return Identity.of(SimpleNamespace(config=OrderedDict(config)), num_blocks)

    same = identity(width=8, heads=2)
    assert same == identity(heads=2, width=8, _name_or_path="elsewhere")
    assert same == identity(width=8, heads=2, quantization_config=object())
    assert len({same, identity(width=9, heads=2), identity(5, width=8, heads=2)}) == 3
    assert same != Identity.of(torch.nn.Linear(1, 1), 4)


def test_a_profile_refuses_other_models_and_probes():
    made = profile_of({"cond": TEN})
    own = made.models["transformer"].identity
    assert made.name_of(None, own, 1) == made.name_of("transformer", own, 1) == "transformer"
    others = (own._replace(model="Other"), own._replace(num_blocks=21), own)
    for name, other in zip(("transformer", None, "transformer_2"), others, strict=True):
        with pytest.raises(ValueError) as error:
            made.name_of(name, other, 1)
        for told in ("does not know this model", str(other), str(own), "dicache.calibrate"):
            assert told in str(error.value)
    with pytest.raises(ValueError, match="probe_depth is 2 and the profile was made with 1"):
        made.name_of(None, own, 2)


def test_two_like_models_are_told_apart_by_their_names():
    made = two_experts(TEN, 4)
    own = made.models["transformer"].identity
    assert made.name_of("transformer_2", own, 1) == "transformer_2"
    with pytest.raises(ValueError, match="knows several models like this one"):
        made.name_of(None, own, 1)
    with pytest.raises(ValueError, match="does not know this model, model"):
        made.name_of("model", own, 1)


# --- other timesteps -----------------------------------------------------------------------------

EVERY = tuple(np.linspace(1000, 50, 20))  # of which every second one is a run of its own


def test_vectors_between_known_steps_are_taken_for_cubic():
    rng = np.random.default_rng(0)
    places = torch.tensor([0.0, 0.5, 2.3, 5.5, 8.0], dtype=torch.float64)
    powers = rng.normal(size=(4, 60))

    def at(each):
        return np.stack([each**k for k in range(4)], 1) @ powers

    steps = np.arange(9.0)
    r = at(steps)
    one = replace(world(9, 60), r=r, q=0.5 * r)
    found, r = one.moments().at(places), at(places.numpy())
    assert np.allclose(found.rr, r @ r.T / 60)
    assert np.allclose(found.rq, 0.5 * r @ r.T / 60)


def test_a_run_of_half_the_steps_is_known_from_the_whole_one():
    whole = world(20, noise=0)
    made = profile_of({"cond": whole}, timesteps=EVERY, gains=tuple(np.linspace(4, 1, 20)))
    half = made.resampled(EVERY[::2])
    assert half.num_steps == 10 and half.timesteps == EVERY[::2]
    moments = half.models["transformer"].contexts["cond"]
    assert torch.allclose(moments.rr, whole.moments().rr[::2, ::2])
    assert moments.first == 0
    # Its steps are twice as large, and so is what an error in one of them does.
    assert np.allclose(half.gains[1:], 2 * np.array(made.gains[2::2]))


def test_a_part_of_a_run_is_known_from_the_whole_one():
    whole = world(20)
    made = profile_of({"cond": whole}, timesteps=EVERY)
    part = made.resampled(EVERY[8:])
    assert torch.allclose(
        part.models["transformer"].contexts["cond"].rr, whole.moments().rr[8:, 8:]
    )
    assert part.gains == (1.0,) * 12


def test_two_experts_keep_their_steps_in_a_run_of_other_timesteps():
    made = two_experts(world(20), 8, timesteps=EVERY)
    half = made.resampled(EVERY[::2])
    spans = {
        n: (m.contexts["cond"].first, m.contexts["cond"].num_steps) for n, m in half.models.items()
    }
    assert spans == {"transformer": (0, 4), "transformer_2": (4, 6)}


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        (None, EVERY[::2]),  # nobody knows where the profile's steps were
        (EVERY[::-1], EVERY[::2]),
        (EVERY, EVERY[::-1]),
        (EVERY, (1100.0, *EVERY[1::2])),  # begins with more noise
        (EVERY, (*EVERY[::2], -60.0)),
        (EVERY, ()),
    ],
)
def test_steps_outside_of_the_known_ones_are_not_guessed_at(known, asked):
    assert profile_of({"cond": world(20)}, timesteps=known).resampled(asked) is None


# --- the configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_speedup": 0.5}, "target_speedup is 0.5. Expected None or a number >= 1"),
        ({"target_speedup": True}, "target_speedup is True"),
        ({"target_psnr": math.nan}, "target_psnr is nan. Expected None or a number of dB >= 0"),
        ({"veto": 0.9}, "veto is 0.9. Expected None or a number >= 1"),
        ({"profile": 3}, "profile is 3. Expected None, a Profile, the path of one, or 'auto'."),
        ({"profile": None, "target_psnr": 40}, "target_psnr is 40 and there is no profile. Give"),
        ({"target_speedup": 2, "target_psnr": 40}, "target_speedup and target_psnr are given"),
        ({"target_speedup": 2, "threshold": 1}, "threshold and target_speedup are given"),
        ({"target_speedup": 2, "schedule": "CR"}, "schedule and target_speedup are given"),
        ({"error": "delta_y"}, "Expected error='weighted_alignment' or 'alignment'"),
    ],
)
def test_a_configuration_says_what_was_given_and_expected(fields, message):
    made = {"profile": profile_of({"cond": TEN}), **fields}
    with pytest.raises(ValueError) as error:
        DiCacheConfig(**made)
    assert message in str(error.value)


def test_a_configuration_reads_a_profile_and_can_be_a_key(tmp_path):
    profile_of({"cond": TEN}, peak=7.0).save(tmp_path / "a.json")
    config = DiCacheConfig(profile=str(tmp_path / "a.json"), target_speedup=2)
    assert config.profile.peak == 7.0
    assert {config: 1}[config] == 1
    with pytest.raises(FileNotFoundError):
        DiCacheConfig(profile=tmp_path / "b.json", target_speedup=2)


def test_nothing_of_a_profile_goes_to_the_default_device():
    data = changed()
    torch.set_default_device("meta")  # whose tensors have no values
    try:
        made = Profile.from_dict(data)
        made = replace(made, timesteps=EVERY[::2]).resampled(EVERY[2:14:2])
    finally:
        torch.set_default_device(None)
    assert isinstance(made.models["transformer"], ModelProfile)
    assert made.models["transformer"].contexts["cond"].rr.isfinite().all()
