"""granularity="sample": every sample of a batch goes its own way, as if it were generated alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from tiny_models import FAMILIES, blocks, build, calls, context, latents_of, run_model, with_latents
from tiny_pipelines import pipeline, text
from tiny_pipelines import run as run_pipeline
from torch import Tensor, nn
from twin import Capture, Twin, assert_close, expected_run

from dicache import DiCacheConfig, DiCacheSession, DiCacheWarning, apply_dicache, get_stats
from dicache.driver.samples import Samples, UnknownSamplesError

LETTERS = {"compute": "C", "resume": "c", "reuse": "R"}
NUM_STEPS, BATCH = 12, 3
# A threshold for each family's tiny model at which samples disagree.
THRESHOLDS = dict.fromkeys(FAMILIES, 0.05)
THRESHOLDS |= {
    "flux2": 0.025,
    "hunyuan-video-1.5": 0.03,
    "mochi": 0.15,
    "z-image": 0.1,
    "motif-video": 0.02,
}


def config(family: str, **changes: Any) -> DiCacheConfig:
    values = {
        "threshold": THRESHOLDS[family],
        "granularity": "sample",
        "num_inference_steps": NUM_STEPS,
        "retention_ratio": 0.0,
    }
    return DiCacheConfig(**{**values, **changes})


def batch_of(family: str) -> list[dict[str, Any]]:
    """The calls of one run whose samples move at different speeds."""
    runs = calls(family, NUM_STEPS, batch=BATCH)
    first = latents_of(family, runs[0])
    speed = torch.tensor([0.3, 1.0, 3.0]).view(-1, *[1] * (first.dim() - 1))
    bent = []
    for step, inputs in enumerate(runs):
        bend = 0.3 * speed * torch.sin(speed * step / 2) * first.flip(-1)
        bent.append(with_latents(family, inputs, latents_of(family, inputs) + bend))
    return bent


def alone(steps: list[dict[str, Any]], row: int, batch: int = BATCH) -> list[dict[str, Any]]:
    """The calls for one sample of the batch; what the calls share stays one object."""
    parts: dict[int, Any] = {}

    def part(name: str, value: Any) -> Any:
        if isinstance(value, list) and len(value) == batch:  # one a sample
            return value[row : row + 1]
        if isinstance(value, list):
            return [part(name, each) for each in value]
        if isinstance(value, dict):
            return {key: part(key, each) for key, each in value.items()}
        if name == "encoder_hidden_states_llama3":  # [layers, batch, ...]
            return parts.setdefault(id(value), value[:, row : row + 1])
        is_shared = name.endswith(("_ids", "_scale")) or name.startswith("indices_")
        if is_shared or not isinstance(value, Tensor) or value.shape[0] != batch:
            return value
        return parts.setdefault(id(value), value[row : row + 1])

    return [{name: part(name, value) for name, value in inputs.items()} for inputs in steps]


def run(family: str, steps: list[dict[str, Any]], **changes: Any) -> tuple[Any, list[Tensor]]:
    return run_on(build(family), family, steps, **changes)


def run_on(
    model: Any, family: str, steps: list[dict[str, Any]], **changes: Any
) -> tuple[Any, list[Tensor]]:
    apply_dicache(model, config(family, **changes))
    outputs = []
    for inputs in steps:
        with context(model, "cond"):
            outputs.append(run_model(model, inputs))
    return model, outputs


def schedules(model: Any) -> list[str]:
    """The steps of every sample of the only context."""
    (records,) = get_stats(model).contexts.values()
    found: dict[Any, str] = {}
    for record in records:
        found[record.sample] = found.get(record.sample, "") + LETTERS[record.action]
    return [found[key] for key in sorted(found)]


def check_against_runs_alone(family: str, steps: list[dict[str, Any]], **changes: Any) -> Any:
    """Every sample's schedule and outputs are those of a run of its own; returns the model."""
    model, outputs = run(family, steps, **changes)
    together = schedules(model)
    assert len(set(together)) > 1, "the samples agree, so nothing is tested"
    evaluations = 0
    for row in range(BATCH):
        single, expected = run(family, alone(steps, row), **changes)
        assert schedules(single) == [together[row]]
        evaluations += get_stats(single).block_samples
        for output, wanted in zip(outputs, expected, strict=True):
            assert (output[row : row + 1] - wanted).norm() <= 1e-5 * wanted.norm()
    assert get_stats(model).block_samples == evaluations
    return model


@pytest.mark.backs("sample")
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen-image-2.1"}))
def test_a_sample_equals_its_own_run(family: str) -> None:
    check_against_runs_alone(family, batch_of(family))


@pytest.mark.rules_out("sample")
@pytest.mark.parametrize("name", ["qwen-image-2.1"])
def test_modulations_with_a_row_more_than_samples_run_the_block_for_all(name: str) -> None:
    steps = batch_of(name)
    with pytest.warns(DiCacheWarning, match="'modulation' has shape"):
        model, outputs = run(name, steps)
    assert len(set(schedules(model))) > 1
    for row in range(BATCH):
        single, expected = run(name, alone(steps, row))
        assert schedules(single) == [schedules(model)[row]]
        for output, wanted in zip(outputs, expected, strict=True):
            assert (output[row : row + 1] - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"error": "delta_y", "alignment": "l1", "threshold": 0.4},
        {"error": "delta_minus", "alignment": "l1", "threshold": 0.02},
        {"error": "alignment", "threshold": 0.4},
        {"probe_depth": 2},
        {"backend": "reference"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_under_other_rules(changes: dict[str, Any]) -> None:
    check_against_runs_alone("flux", batch_of("flux"), **changes)


def test_residuals_added_between_blocks_reach_every_sample() -> None:
    """As a ControlNet adds them; the blocks' callers see the whole batch."""
    steps = batch_of("flux")
    generator = torch.Generator().manual_seed(5)
    control = [0.3 * torch.randn(BATCH, 16, 24, generator=generator) for _ in range(2)]
    for inputs in steps:
        inputs["controlnet_block_samples"] = control
        inputs["controlnet_single_block_samples"] = control
    check_against_runs_alone("flux", steps)


def test_image_prompts_of_sd3_have_a_row_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its IP-Adapter is given the timestep's embedding beside the picture's."""
    attend = nn.functional.scaled_dot_product_attention

    def attend_by_token(*args: Any, **options: Any) -> Tensor:
        """diffusers' processor takes a view of it that not every kernel of torch's allows."""
        return attend(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend_by_token)
    steps, generator = batch_of("sd3"), torch.Generator().manual_seed(5)
    picture = torch.randn(BATCH, 2, 16, generator=generator)
    for inputs in steps:
        temb = torch.randn(BATCH, 8, generator=generator)
        inputs["joint_attention_kwargs"] = {"ip_hidden_states": picture, "temb": temb}
    model = build("sd3")
    put_on_image_prompts(model)
    _, expected = run_on(model, "sd3", steps)
    for row in range(BATCH):
        single = build("sd3")
        put_on_image_prompts(single)
        _, outputs = run_on(single, "sd3", alone(steps, row))
        for output, wanted in zip(outputs, expected, strict=True):
            assert (output - wanted[row : row + 1]).norm() <= 1e-5 * output.norm()
    assert len(set(schedules(model))) > 1
    evaluations = sum(
        schedule.count("R") + 4 * (NUM_STEPS - schedule.count("R")) for schedule in schedules(model)
    )
    assert get_stats(model).block_samples == evaluations


def put_on_image_prompts(model: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for block in model.transformer_blocks:
            block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(24, 16, 12, 8))


@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_blocks_take_parts_of_a_batch(order: str) -> None:
    eager, expected = run("flux", batch_of("flux"))
    model = build("flux")
    if order == "before":
        model.compile_repeated_blocks(backend="eager", dynamic=True)
    apply_dicache(model, config("flux"))
    if order == "after":
        model.compile_repeated_blocks(backend="eager", dynamic=True)
    for inputs, wanted in zip(batch_of("flux"), expected, strict=True):
        with model.cache_context("cond"):
            assert torch.equal(model(**inputs)[0], wanted)
    assert schedules(model) == schedules(eager)
    torch._dynamo.reset()


def test_nan_in_one_sample_leaves_the_others_alone() -> None:
    steps = batch_of("wan")
    _, expected = run("wan", steps)
    model = build("wan")
    apply_dicache(model, config("wan"))
    block, step = blocks("wan", model)[0], 0

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if step != 5:
            return output
        rows = torch.arange(BATCH).view(-1, 1, 1)
        return torch.where(rows == 1, torch.nan, output)

    block.register_forward_hook(spoil)
    with pytest.warns(DiCacheWarning, match="sample 1"):
        for step, (inputs, wanted) in enumerate(zip(steps, expected, strict=True)):  # noqa: B007
            with model.cache_context("cond"):
                output = model(**inputs)[0]
            for row in (0, 2):
                assert torch.allclose(output[row], wanted[row], rtol=1e-4, atol=1e-5)
            assert output[1].isfinite().all() == (step != 5)
    assert schedules(model)[1][5:7] == "cc"  # computed, and its entry was of no use


def test_an_argument_with_rows_of_its_own_kind_runs_the_block_for_all() -> None:
    """Whatever cannot be told apart is computed, and the result is the same."""
    steps = batch_of("flux")
    _, expected = run("flux", steps)
    model = build("flux")
    apply_dicache(model, config("flux"))
    for inputs in steps:
        inputs["joint_attention_kwargs"] = {"ip_hidden_states": torch.zeros(2 * BATCH, 1, 1)}
    for block in blocks("flux", model):  # takes it and has no use for it
        block.register_forward_pre_hook(without_joint_attention_kwargs, with_kwargs=True)
    with pytest.warns(DiCacheWarning, match="ip_hidden_states"):
        for inputs, wanted in zip(steps, expected, strict=True):
            with model.cache_context("cond"):
                output = model(**inputs)[0]
            assert (output - wanted).norm() <= 1e-5 * wanted.norm()


def without_joint_attention_kwargs(
    module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "joint_attention_kwargs": None}


@pytest.mark.parametrize("name", ["ltx", "cogvideox", "mochi"])
def test_guidance_branches_in_one_batch_have_schedules_of_their_own(name: str) -> None:
    pipe = pipeline(name)
    apply_dicache(pipe, DiCacheConfig(threshold=0.1, granularity="sample", retention_ratio=0))
    run_pipeline(name, pipe, num_steps=8)
    stats = get_stats(pipe)["transformer"]
    (records,) = stats.contexts.values()
    assert {record.sample for record in records} == {0, 1}
    assert len(records) == 16 and stats.num_reused > 0


class Halves:
    """The twin of a batch of two branches, each of which it runs alone."""

    def __init__(self, family: str) -> None:
        self.twin = Twin(family, build(family))

    def call(self, inputs: dict[str, Any]) -> Capture:
        parts = [self.twin.call(each) for each in self._parts(inputs)]
        return Capture(
            *(
                torch.cat([getattr(part, key) for part in parts])
                for key in ("x", "p", "y", "output")
            )
        )

    def head(self, inputs: dict[str, Any], y: Tensor) -> Tensor:
        parts = zip(self._parts(inputs), y.split(1), strict=True)
        return torch.cat([self.twin.head(each, own) for each, own in parts])

    def _parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        return [alone([inputs], row, batch=2)[0] for row in (0, 1)]


@pytest.mark.backs("guidance")
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_in_one_batch_have_one_decision_and_a_result_each(family: str) -> None:
    """Under the default rules a step is reused in both, by an error and a gamma of both."""
    model, steps = build(family), calls(family, NUM_STEPS, batch=2)
    for inputs in steps:  # one latent for both
        latents = latents_of(family, inputs)[:1]
        inputs |= with_latents(family, inputs, torch.cat([latents, latents]))
    rules = config(family, granularity="batch")
    apply_dicache(model, rules)
    outputs = []
    for inputs in steps:
        with context(model, "cond_uncond"):
            outputs.append(run_model(model, inputs))
    (mask,) = schedules(model)
    assert {"c", "R"} <= set(mask), mask
    plain = mask.replace("c", "C")
    expected = expected_run(Halves(family), steps, plain, rules.alignment, rules.gamma_range)
    (records,) = get_stats(model).contexts.values()
    for output, step, record in zip(outputs, expected, records, strict=True):
        assert_close(output, step.output, 1e-4)  # a batch of one rounds otherwise
        assert record.gamma == (None if step.gamma is None else pytest.approx(step.gamma, rel=1e-3))


def test_without_guidance_a_batch_of_prompts_has_no_pairs() -> None:
    """Pipelines call the context cond_uncond also where there is but one branch."""
    texts, schedules_found = [text(seed) for seed in (0, 7)], []
    for embeds in (torch.cat(texts), *texts):
        pipe = pipeline("ltx")
        rules = DiCacheConfig(threshold=0.02, granularity="sample", retention_ratio=0)
        apply_dicache(pipe, rules)
        mask = torch.ones(embeds.shape[:2])
        arguments = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 1.0}
        arguments |= {f"negative_{name}": arguments[name] for name in list(arguments)[:2]}
        start = torch.Generator().manual_seed(3)
        run_pipeline("ltx", pipe, num_steps=12, generator=start, **arguments)
        schedules_found.append(schedules(pipe.transformer))
    together, _, _ = schedules_found
    assert len(together) == 2 and together[0] != together[1]


@pytest.mark.parametrize("argument", [{"mask": torch.zeros(BATCH, 1)}, {"state": object()}])
def test_an_argument_that_nobody_named_runs_the_block_for_all(argument: dict[str, Any]) -> None:
    """It may have a row a sample; and the statistics tell what that costs."""
    steps = batch_of("flux")
    _, expected = run("flux", steps)
    model, ran = build("flux"), 0
    apply_dicache(model, config("flux"))

    def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal ran
        ran += len(kwargs["hidden_states"])
        return args, {**kwargs, "joint_attention_kwargs": None}

    for block in blocks("flux", model):
        block.register_forward_pre_hook(count, with_kwargs=True)
    with pytest.warns(DiCacheWarning, match="joint_attention_kwargs"):
        for inputs, wanted in zip(steps, expected, strict=True):
            with model.cache_context("cond"):
                output = model(**inputs, joint_attention_kwargs=argument)[0]
            assert (output - wanted).norm() <= 1e-5 * wanted.norm()
    assert get_stats(model).block_samples == ran


def test_rows_are_gathered_by_name_and_scattered_back() -> None:
    rows, whole = Samples([0, 2], torch.zeros(3, 4)), torch.arange(12.0).view(3, 4)
    given = {
        "temb": (whole, [whole[:1]]),
        "rope": whole[:2],
        "kwargs": {"ip": [whole], "scale": 0.5},
        "mask": None,
    }
    gathered = rows.gather(given, ("temb", "kwargs.ip", "mask", "absent"))
    assert torch.equal(gathered["temb"][0], whole[[0, 2]])
    assert gathered["temb"][1][0].shape == (1, 4)  # shared by all samples
    assert (
        gathered["rope"] is given["rope"] and gathered["mask"] is None and "absent" not in gathered
    )
    assert torch.equal(gathered["kwargs"]["ip"][0], whole[[0, 2]])
    assert gathered["kwargs"]["scale"] == 0.5
    assert given["kwargs"]["ip"][0] is whole  # the caller's dictionary is as it was
    scattered = rows.scatter(-whole[[0, 2]], whole)
    assert torch.equal(scattered, torch.stack([-whole[0], whole[1], -whole[2]]))
    options = {"kwargs": {"ip": whole, "temb": whole, "mask": whole}}
    named = rows.gather(options, ("kwargs.ip", "kwargs.temb", "kwargs.mask"))["kwargs"]
    assert all(torch.equal(each, whole[[0, 2]]) for each in named.values()) and len(named) == 3
    with pytest.raises(UnknownSamplesError, match="'kwargs' holds"):
        rows.gather(options, ("kwargs.ip", "kwargs.temb"))
    with pytest.raises(UnknownSamplesError, match="'rope' has shape"):
        rows.gather({"rope": torch.zeros(2, 4)}, ("rope",))
    with pytest.raises(UnknownSamplesError, match="'other' holds"):
        rows.gather({"other": [{"deep": whole}]}, ("rope",))


# --- the session, without a model ----------------------------------------------------------------


def test_an_engine_runs_the_rows_that_it_is_told() -> None:
    session = DiCacheSession(DiCacheConfig(granularity="sample", threshold=0.3, retention_ratio=0))
    reference = [
        DiCacheSession(DiCacheConfig(threshold=0.3, retention_ratio=0)) for _ in range(BATCH)
    ]
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(BATCH, 4, 8, generator=generator) for _ in range(3)]
    noise = torch.tensor([0.0, 0.05, 1.0]).view(-1, 1, 1)
    mixed = 0
    for index in range(10):
        moved = [b + noise * torch.randn(b.shape, generator=generator) for b in base]
        x, p, y = (value + 0.1 * index for value in moved)
        with session.step("cond", timestep=10.0 - index, num_inference_steps=10) as step:
            if step.needs_probe:
                step.probe(x, p)
            if step.action == "reuse":
                got = step.reuse(x)
            else:
                mixed += step.rows is not None
                rows = range(BATCH) if step.rows is None else step.rows
                if step.rows is not None:
                    with pytest.raises(ValueError, match="step.rows"):
                        step.record(x, p, y)
                got = step.record(x, p, y[list(rows)])
        for row, single in enumerate(reference):
            one = slice(row, row + 1)
            with single.step("cond", timestep=10.0 - index, num_inference_steps=10) as step:
                if step.needs_probe:
                    step.probe(x[one], p[one])
                if step.action == "reuse":
                    wanted = step.reuse(x[one])
                else:
                    wanted = step.record(x[one], p[one], y[one])
            assert torch.equal(got[one], wanted)
    assert mixed > 0
