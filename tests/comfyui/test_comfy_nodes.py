"""The node as ComfyUI loads it, beside ComfyUI's own nodes that do something to the same model."""

import asyncio
import logging
from pathlib import Path

import comfy.context_windows
import comfy_extras.nodes_context_windows
import comfy_extras.nodes_easycache
import comfy_extras.nodes_slg
import nodes
import pytest
import torch
import torch._dynamo.testing
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_twin import Twin
from test_comfy_runs import SCHEDULE, cache_of, close, masks
from tiny_comfy import ROWS, latent, make_model, prompt, sample

import dicache.adapters.comfyui.custom_node
from dicache import DiCacheConfig
from dicache.adapters.comfyui import call
from dicache.adapters.comfyui.attach import OUTER_SAMPLE, apply


@pytest.fixture(scope="module")
def node():
    """The node's class, as ComfyUI has it after it loaded the folder."""
    folder = str(Path(dicache.adapters.comfyui.custom_node.__file__).parent)
    assert asyncio.run(nodes.load_custom_node(folder))
    return nodes.NODE_CLASS_MAPPINGS["DiCache"]


def cached_by(node, model, rules="default", threshold=0.0, start=0.0, end=1.0):
    return node.execute(model, rules, threshold, start, end).result[0]


def test_the_node_gives_a_cached_clone_and_reports_its_runs(node, caplog):
    model = make_model("flux")
    cached = cached_by(node, model, threshold=0.1)
    assert cached is not model and cached.model is model.model
    with caplog.at_level(logging.INFO, "dicache"):
        sample(cached, "flux", cfg=3.0)
    (mask,) = masks(cached).values()
    counts = f"{mask.count('C')} computed, {mask.count('c')} resumed, {mask.count('R')} reused"
    share = (12 * 7 - 6 * mask.count("R")) / (12 * 7)
    expected = f"DiCache (threshold 0.1): uncond+cond: {counts}. {share:.0%} of the blocks ran."
    assert caplog.messages == [expected]


@pytest.mark.parametrize(
    ("name", "own"), [("flux", 0.07), ("hunyuan_video", 0.035), ("wan", 0.02), ("sd3", 0.07)]
)
def test_a_threshold_of_zero_is_the_models_own(node, name, own):
    rules = cache_of(cached_by(node, make_model(name)))._rules
    assert rules.threshold == own and rules.is_default


def test_published_rules_bring_their_own_threshold(node):
    model = make_model("flux")
    assert cache_of(cached_by(node, model, "flux"))._rules.threshold == 0.4
    assert cache_of(cached_by(node, model, "wan2.1", 0.3))._rules.threshold == 0.3
    cached = cached_by(node, model, "flux")
    sample(cached, "flux")
    assert "R" in masks(cached)["cond"]


def test_a_second_node_takes_the_place_of_the_first(node):
    model = make_model("flux")
    twice = cached_by(node, cached_by(node, model, threshold=0.5), threshold=0.1)
    assert len(twice.get_all_wrappers(OUTER_SAMPLE)) == 1
    assert cache_of(twice)._rules.threshold == 0.1
    assert torch.equal(sample(twice, "flux"), sample(cached_by(node, model, threshold=0.1), "flux"))


def test_a_clone_of_a_cached_model_is_cached(node):
    clone = cached_by(node, make_model("flux"), threshold=0.1).clone()
    sample(clone, "flux")
    assert "R" in masks(clone)["cond"]


def test_a_model_that_is_not_known_is_named(node):
    model = make_model("flux")
    model.model.diffusion_model.__class__ = type("NextDiT", (torch.nn.Module,), {})
    with pytest.raises(ValueError, match="does not know the model class NextDiT"):
        cached_by(node, model)


@pytest.mark.parametrize("cached_first", [True, False])
def test_two_caches_do_not_stack(node, cached_first, caplog):
    def easy(model):
        other = comfy_extras.nodes_easycache.EasyCacheNode
        return other.execute(model, 0.2, 0.15, 0.95, False).result[0]

    model = make_model("flux")
    if not cached_first:
        with pytest.raises(ValueError, match="Another cache is on the model"):
            cached_by(node, easy(model), threshold=1.0)
        return
    both = easy(cached_by(node, model, threshold=1.0))
    assert torch.equal(sample(both, "flux"), sample(easy(model), "flux"))
    assert "Two caches do not stack" in caplog.text


def test_skip_layer_guidance_calls_the_same_condition_with_other_blocks():
    def with_slg(model):
        slg = comfy_extras.nodes_slg.SkipLayerGuidanceDiT
        return slg.execute(model, 3.0, 0.0, 1.0, "1", "2").result[0]

    model = make_model("flux")
    plain = sample(with_slg(model), "flux", cfg=3.0)
    assert not torch.equal(plain, sample(model, "flux", cfg=3.0))
    for order in (lambda c: with_slg(apply(model, c)), lambda c: apply(with_slg(model), c)):
        assert torch.equal(sample(order(DiCacheConfig(threshold=0.0)), "flux", cfg=3.0), plain)
        cached = order(DiCacheConfig(schedule=SCHEDULE))
        sample(cached, "flux", cfg=3.0)
        assert masks(cached) == {"uncond+cond": SCHEDULE, "cond": SCHEDULE}


def test_windows_of_a_video_have_a_history_each():
    def windowed(model):
        model = model.clone()
        model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
            context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
            fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
            context_length=3,
            context_overlap=1,
            dim=2,
        )
        comfy.context_windows.create_prepare_sampling_wrapper(model)
        return model

    model, video = make_model("wan"), torch.zeros(1, 16, 5, 8, 8)
    plain = sample(windowed(model), "wan", image=video)
    cached = apply(windowed(model), DiCacheConfig(threshold=0.0))
    assert torch.equal(sample(cached, "wan", image=video), plain)
    cached = apply(windowed(model), DiCacheConfig(schedule=SCHEDULE))
    actual = sample(cached, "wan", image=video)
    assert masks(cached) == {"cond": SCHEDULE, "cond#2": SCHEDULE}
    letters = "".join(2 * letter for letter in SCHEDULE)
    with Twin(model, "wan", letters, branches="01" * 12).on():
        assert close(actual, sample(windowed(model), "wan", image=video))


def test_parts_of_a_picture_with_prompts_of_their_own_have_a_history_each():
    model = make_model("flux")
    left = prompt(4, area=(8, 4, 0, 0), strength=1.0)
    positive = prompt(1) + left
    plain = sample(model, "flux", positive=positive)
    zero = apply(model, DiCacheConfig(threshold=0.0))
    assert torch.equal(sample(zero, "flux", positive=positive), plain)
    cached = apply(model, DiCacheConfig(schedule=SCHEDULE))
    actual = sample(cached, "flux", positive=positive)
    assert masks(cached) == {"cond": SCHEDULE, "cond#2": SCHEDULE}
    letters = "".join(2 * letter for letter in SCHEDULE)
    with Twin(model, "flux", letters, branches="01" * 12).on():
        assert close(actual, sample(model, "flux", positive=positive))


@pytest.mark.backs("compile", rows=ROWS)
@pytest.mark.parametrize("cached_first", [True, False])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_compiled_model_is_cached_outside_of_the_compiled_code(name, cached_first):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    traces = []

    def backend(graph, inputs):
        traces.extend(node.meta.get("stack_trace") or "" for node in graph.graph.nodes)
        return counter(graph, inputs)

    def compiled(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend=backend)
        return model

    def both(config):
        return compiled(apply(model, config)) if cached_first else apply(compiled(model), config)

    model = make_model(name)
    plain = sample(model, name)
    assert torch.equal(sample(both(DiCacheConfig(threshold=0.0)), name), plain)
    graphs = counter.frame_count
    assert graphs > 1 and not any(call.__file__ in each for each in traces)
    actual = sample(both(DiCacheConfig(schedule=SCHEDULE)), name)
    assert counter.frame_count == graphs, "a reused step compiles nothing"
    with Twin(model, name, SCHEDULE).on():
        assert close(actual, sample(model, name))
    torch._dynamo.reset()


def test_a_latent_with_nothing_to_do_is_given_back():
    cached = apply(make_model("flux"), DiCacheConfig(threshold=0.0))
    assert sample(cached, "flux", steps=1).shape == latent("flux").shape
