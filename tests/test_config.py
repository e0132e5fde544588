"""`DiCacheConfig` refuses what it cannot mean, and its presets say what the paper's scripts do."""

import dataclasses
import math

import pytest

from dicache import DiCacheConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", -0.1),
        ("threshold", math.nan),
        ("threshold", "0.1"),
        ("threshold", True),
        ("reuse_at_threshold", 1),
        ("probe_depth", 0),
        ("probe_depth", 1.0),
        ("retention_ratio", 1.01),
        ("retention_ratio", -0.1),
        ("retention_ratio", math.nan),
        ("retention_rounding", "ceil"),
        ("compute_last_step", None),
        ("error", "delta_x"),
        ("alignment", "l2"),
        ("gamma_range", (2.0, 1.0)),
        ("gamma_range", (-1.0, 1.0)),
        ("gamma_range", (math.nan, 1.0)),
        ("gamma_range", (math.inf, math.inf)),
        ("gamma_range", 1.5),
        ("max_consecutive_reuse", 0),
        ("max_consecutive_reuse", True),
        ("schedule", ""),
        ("schedule", "CCX"),
        ("schedule", ["C", "R"]),
        ("num_inference_steps", 0),
        ("num_inference_steps", 2.5),
        ("granularity", "token"),
        ("cfg", "both"),
        ("backend", "cudnn"),
    ],
)
def test_an_invalid_field_is_named_with_its_value(field, value):
    with pytest.raises(ValueError) as error:
        DiCacheConfig(**{field: value})
    assert field in str(error.value)
    assert repr(value) in str(error.value)
    assert "Expected" in str(error.value)


def test_an_infinite_threshold_is_allowed():
    assert DiCacheConfig(threshold=math.inf).threshold == math.inf


def test_a_configuration_is_immutable_and_hashable():
    config = DiCacheConfig(gamma_range=[1.0, 1.5])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 1.0
    assert hash(config) == hash(DiCacheConfig(gamma_range=(1.0, 1.5)))


@pytest.mark.parametrize("error", ["alignment", "weighted_alignment"])
def test_an_alignment_error_needs_the_least_squares_gamma(error):
    with pytest.raises(ValueError, match="least_squares"):
        DiCacheConfig(error=error, alignment="l1")


@pytest.mark.parametrize(
    ("preset", "steps", "retained"),
    [
        ("flux", 30, 7),  # floor(6.0) + 1
        ("flux", 28, 6),  # floor(5.6) + 1
        ("flux-delta-minus", 30, 1),  # floor(0) + 1
        ("hunyuan-video", 28, 5),  # floor(5.6)
        ("hunyuan-video", 4, 0),
        ("wan2.1", 28, 6),  # floor(5.6 + 1/2)
        ("wan2.1", 12, 2),  # floor(2.4 + 1/2)
    ],
)
def test_presets_retain_the_published_number_of_steps(preset, steps, retained):
    assert DiCacheConfig.preset(preset).retained_steps(steps) == retained


def test_a_preset_takes_overrides_and_names_what_it_does_not_know():
    assert DiCacheConfig.preset("flux", threshold=0.2).threshold == 0.2
    with pytest.raises(ValueError, match=r"'sdxl'.*flux.*wan2\.1"):
        DiCacheConfig.preset("sdxl")
    with pytest.raises(ValueError, match="'treshold'.*threshold"):
        DiCacheConfig.preset("flux", treshold=0.2)
