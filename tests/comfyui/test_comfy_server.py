"""The node in the real server: workflows over HTTP, ComfyUI's loaders, KSampler, saved latents."""

import json
import re
from pathlib import Path

import comfy.sd
import comfy.supported_models as supported
import comfy.utils
import pytest
import torch
from comfy_server import Server
from comfy_twin import Twin
from test_comfy_runs import close, masks
from tiny_comfy import CONFIGS, TEXT, make_model, prompt, random_model, sample

from dicache import DiCacheConfig
from dicache.adapters.comfyui.attach import apply

DOCS = Path(__file__).parents[2] / "docs"
STEPS = 12
NEVER = 1e-9  # a threshold; the widget's 0 is the model's own

# Sizes that ComfyUI reads from a file's keys, or takes for granted. SD3 is as tiny as elsewhere.
FILES = {
    "sd3": CONFIGS["sd3"],
    "ltx": CONFIGS["ltx"],
    "wan": (
        supported.WAN21_T2V,
        CONFIGS["wan"][1]
        | {"dim": 128, "num_heads": 1, "ffn_dim": 128, "freq_dim": 256, "text_dim": 4096},
    ),
    "unet": (
        supported.SD15,
        {
            "use_spatial_transformer": True,
            "legacy": False,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "num_res_blocks": [1],
            "channel_mult": [1],
            "transformer_depth": [1],
            "transformer_depth_output": [1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 768,
            "num_heads": 8,
        },
    ),
}
LATENTS = {
    "sd3": ("EmptySD3LatentImage", {"width": 64, "height": 64}),
    "flux": ("EmptySD3LatentImage", {"width": 64, "height": 64}),
    "unet": ("EmptyLatentImage", {"width": 64, "height": 64}),
    "wan": ("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 9}),
    "ltx": ("EmptyLTXVLatentVideo", {"width": 128, "height": 128, "length": 17}),
}
# Blocks, and a threshold between never and always.
MODELS = {"sd3": (4, 0.03), "ltx": (5, 0.03), "wan": (6, 0.01), "flux": (7, 0.1)}


def save(path, name):
    """A file as somebody publishes it."""
    model = random_model(*FILES[name]).model.diffusion_model
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    # LTX-Video's files carry what their keys do not tell.
    config = {"config": json.dumps({"transformer": FILES[name][1]})} if name == "ltx" else None
    comfy.utils.save_torch_file(state, str(path), metadata=config)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    models = folder / "models" / "diffusion_models"
    models.mkdir(parents=True)
    for name in FILES:
        save(models / f"{name}.safetensors", name)
    one = Server(folder)
    yield one
    one.stop()


def step(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def dicache(model=("model", 0), **inputs):
    widgets = {"rules": "default", "threshold": 0.0, "start_percent": 0.0, "end_percent": 1.0}
    return step("DiCache", model=list(model), **widgets | inputs)


def width(name):
    return {"wan": 4096, "unet": 768}.get(name, TEXT)


def workflow(name, seed, *nodes, steps=STEPS, text=1):
    """From a file to a saved latent; nodes are put one behind the other, behind the loader."""
    found = {f"cache{place}": node for place, node in enumerate(nodes)}
    for place in range(1, len(nodes)):
        found[f"cache{place}"]["inputs"]["model"] = [f"cache{place - 1}", 0]
    if name in FILES:
        file = f"{name}.safetensors"
        found["model"] = step("UNETLoader", unet_name=file, weight_dtype="default")
    else:
        found["model"] = step("TinyModel", name=name)
    found["yes"] = step("TinyPrompt", seed=text, name=name, width=width(name))
    found["no"] = step("TinyPrompt", seed=2, name=name, width=width(name))
    kind, size = LATENTS[name]
    found["empty"] = step(kind, batch_size=1, **size)
    found["sampler"] = step(
        "KSampler",
        model=[f"cache{len(nodes) - 1}" if nodes else "model", 0],
        positive=["yes", 0],
        negative=["no", 0],
        latent_image=["empty", 0],
        seed=seed,
        steps=steps,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    found["save"] = step("SaveLatent", samples=["sampler", 0], filename_prefix=name)
    return found


def here(server, name):
    """The server's model in this process, and what samples it as the server's KSampler does."""
    if name in FILES:
        file = server.folder / "models" / "diffusion_models" / f"{name}.safetensors"
        model = comfy.sd.load_diffusion_model(str(file))
    else:
        model = make_model(name)

    def run(of, seed):
        conditions = {
            sign: prompt(number, name, width(name))
            for number, sign in ((1, "positive"), (2, "negative"))
        }
        return sample(of, name, steps=STEPS, cfg=3.0, noise_seed=seed, **conditions)

    return model, run


def report(threshold, mask, blocks):
    """The line of the log that a page promises, from a letter a step."""
    counts = f"{mask.count('C')} computed, {mask.count('c')} resumed, {mask.count('R')} reused"
    share = (len(mask) * blocks - (blocks - 1) * mask.count("R")) / (len(mask) * blocks)
    line = f"DiCache (threshold {threshold:g}): uncond+cond: {counts}."
    return f"{line} {share:.0%} of the blocks ran."


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_reuses_nothing_is_the_plain_run_bit_by_bit(server, name):
    before = len(server.reports())
    cached = server.run(workflow(name, 11, dicache(threshold=NEVER)))
    expected = report(NEVER, "C" + (STEPS - 2) * "c" + "C", MODELS[name][0])
    assert server.reports()[before:] == [expected]
    plain = server.run(workflow(name, 11))
    assert len(server.reports()) == before + 1, "the node is gone, and so is its cache"
    assert plain.abs().sum() > 0 and torch.equal(cached, plain)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_server_reuses_is_the_formula(server, name):
    blocks, threshold = MODELS[name]
    model, run = here(server, name)
    cached = apply(model, DiCacheConfig(threshold=threshold))
    run(cached, 21)
    (mask,) = masks(cached).values()
    with Twin(model, name, mask).on() as twin:
        expected = run(model, 21)
    assert len(twin.gammas) >= 2, mask
    actual = server.run(workflow(name, 21, dicache(threshold=threshold)))
    assert close(actual, expected)
    assert not close(actual, run(model, 21))
    assert server.reports()[-1] == report(threshold, mask, blocks)


def test_runs_follow_each_other_with_one_cache_and_are_what_they_are_alone(server):
    """ComfyUI keeps the node's output: these runs share the clone and all that is on it."""
    model, run = here(server, "flux")
    before = len(server.reports())
    first, other, again = (
        server.run(workflow("flux", seed, dicache(threshold=0.1))) for seed in (31, 32, 31)
    )
    assert len(server.reports()) == before + 3
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(other, run(apply(model, DiCacheConfig(threshold=0.1)), 32))


def test_a_run_after_an_interrupted_one_is_what_it_is_alone(server):
    most = 10000  # that KSampler takes
    before = len(server.reports())
    workflow_id = server.queue(workflow("flux", 41, dicache(threshold=0.1), steps=most))
    server.wait(lambda: re.search(rf"[ |](\d\d+)/{most} ", server.log()))
    assert server.post("/interrupt", {})[0] == 200
    outputs, messages = server.result(workflow_id)
    assert outputs == {} and messages["execution_interrupted"]["node_id"] == "sampler"
    assert len(server.reports()) == before, "an interrupted run reports nothing"
    model, run = here(server, "flux")
    expected = run(apply(model, DiCacheConfig(threshold=0.1)), 42)
    assert torch.equal(server.run(workflow("flux", 42, dicache(threshold=0.1))), expected)
    assert torch.equal(server.run(workflow("flux", 43)), run(model, 43))


def test_a_workflow_that_is_queued_again_with_another_prompt_has_the_target(server):
    """Of four blocks 4 of 12 steps, and the probe of 8, are half of the work."""
    before = len(server.reports())
    node = {"target_speedup": 2.0}
    first = server.run(workflow("sd3", 91, dicache(**node)))
    second = server.run(workflow("sd3", 92, dicache(**node), text=5))
    other = server.run(workflow("sd3", 92, dicache(**node), text=5, steps=STEPS + 2))
    third = server.run(workflow("sd3", 93, dicache(target_speedup=1.5), text=5))
    counts = "uncond+cond: {} computed, 0 resumed, {} reused. {} of the blocks ran."
    has_calibrated = (
        "DiCache has calibrated: from now on, runs with this model, steps, sampler, size and "
        "guidance have 2x less work in the model's blocks."
    )
    assert server.reports()[before:] == [
        f"DiCache (calibrating): {counts.format(12, 0, '100%')}",
        has_calibrated,
        f"DiCache (target 2x): {counts.format(4, 8, '50%')}",
        f"DiCache (calibrating): {counts.format(14, 0, '100%')}",
        has_calibrated,
        f"DiCache (target 1.5x): {counts.format(7, 5, '69%')}",
    ]
    assert torch.equal(first, server.run(workflow("sd3", 91)))
    plain = server.run(workflow("sd3", 92, text=5))
    for each in (second, third, other):
        assert each.isfinite().all()
    assert 0 < (second - plain).norm() < 0.2 * plain.norm()


def test_the_sampler_in_parts_makes_what_ksampler_makes(server):
    expected = server.run(workflow("sd3", 51, dicache(threshold=0.03)))
    parts = workflow("sd3", 51, dicache(threshold=0.03))
    model = ["cache0", 0]
    parts["noise"] = step("RandomNoise", noise_seed=51)
    parts["sigmas"] = step(
        "BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0
    )
    parts["kind"] = step("KSamplerSelect", sampler_name="euler")
    parts["guider"] = step(
        "CFGGuider", model=model, positive=["yes", 0], negative=["no", 0], cfg=3.0
    )
    parts["sampler"] = step(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["kind", 0],
        sigmas=["sigmas", 0],
        latent_image=["empty", 0],
    )
    assert torch.equal(server.run(parts), expected)
    first, second = server.reports()[-2:]
    assert first == second and re.search(r" [1-9]\d* reused", second)


def test_of_two_nodes_the_second_one_counts(server):
    once = server.run(workflow("flux", 61, dicache(threshold=0.1)))
    before = len(server.reports())
    twice = server.run(workflow("flux", 61, dicache(threshold=5.0), dicache(threshold=0.1)))
    (line,) = server.reports()[before:]
    assert line.startswith("DiCache (threshold 0.1)") and torch.equal(twice, once)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"threshold": -0.1}, "value_smaller_than_min"),
        ({"threshold": "much"}, "invalid_input_type"),
        ({"end_percent": 1.5}, "value_bigger_than_max"),
        ({"model": ["empty", 0]}, "return_type_mismatch"),
    ],
)
def test_the_server_refuses_what_the_widgets_do_not_take(server, wrong, reason):
    node = dicache()
    node["inputs"] |= wrong
    status, answer = server.post("/prompt", {"prompt": workflow("sd3", 71, node)})
    assert status == 400
    (error,) = answer["node_errors"]["cache0"]["errors"]
    assert error["type"] == reason and error["extra_info"]["input_name"] == next(iter(wrong))


@pytest.mark.parametrize(
    ("name", "nodes", "message"),
    [
        # The server holds no value against such a node's list, nor another node's against limits.
        (
            "sd3",
            [dicache(rules="flux2")],
            "rules is 'flux2'. Expected one of default, flux, flux-delta-minus, hunyuan-video, "
            "wan2.1.",
        ),
        ("sd3", [dicache(threshold=["below", 0])], "threshold is -0.1. Expected"),
        (
            "sd3",
            [dicache(start_percent=0.8, end_percent=0.2)],
            "start_percent is 0.8 and end_percent 0.2. Expected 0 <= start <= end <= 1.",
        ),
        (
            "unet",
            [dicache()],
            "DiCache does not know the model class UNetModel "
            "(comfy.ldm.modules.diffusionmodules.openaimodel).",
        ),
        (
            "sd3",
            [
                step(
                    "EasyCache",
                    model=["model", 0],
                    reuse_threshold=0.2,
                    start_percent=0.15,
                    end_percent=0.95,
                    verbose=False,
                ),
                dicache(),
            ],
            "Another cache is on the model (easycache). Two caches do not stack: take one off.",
        ),
    ],
)
def test_the_server_tells_what_the_node_refuses(server, name, nodes, message):
    below = step("PrimitiveFloat", value=-0.1)
    error = server.failure(workflow(name, 81, *nodes) | {"below": below})
    assert error["node_type"] == "DiCache" and error["node_id"] == f"cache{len(nodes) - 1}"
    assert error["exception_type"] == "ValueError"
    assert error["exception_message"].startswith(message)


def test_the_node_has_the_inputs_that_its_page_names(server):
    info = server.get("/object_info/DiCache")["DiCache"]
    page = (DOCS / "comfyui.md").read_text()
    rows = dict(re.findall(r"^\| (`.*`) \| (.*) \|$", page.split("## Models")[0], re.MULTILINE))
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert info["input_order"] == {"required": documented[:-1], "optional": documented[-1:]}
    inputs = info["input"]["required"] | info["input"]["optional"]
    options = inputs["rules"][1]["options"]
    assert options == re.findall(r"`([\w.-]+)`", rows["`rules`"])
    assert info["category"] == re.search(r"under \*(.*)\*", page)[1]
    assert info["output"] == ["MODEL"] and not info["output_node"]
    ranges = {name: (given[1]["min"], given[1]["max"]) for name, given in list(inputs.items())[2:]}
    assert ranges["start_percent"] == ranges["end_percent"] == (0.0, 1.0)
    assert ranges["threshold"][0] == ranges["target_speedup"][0] == 0.0


def test_the_server_takes_the_example(server):
    """Empty files bear the names that the example has: it is accepted, and fails at its loaders."""
    example = json.loads((DOCS / "examples" / "dicache_flux.json").read_text())
    for node in example.values():  # whether an input is too many is what the server does not ask
        order = server.get(f"/object_info/{node['class_type']}")[node["class_type"]]["input_order"]
        assert set(node["inputs"]) <= set(order["required"] + order.get("optional", []))
    folders = {"unet_name": "diffusion_models", "clip_name": "text_encoders", "vae_name": "vae"}
    for node in example.values():
        for name, value in node["inputs"].items():
            folder = folders.get(name.rstrip("12"))
            if folder is not None:
                path = server.folder / "models" / folder / value
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    assert server.failure(example)["node_type"].endswith("Loader")
