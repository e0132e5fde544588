"""Block lists while a step is reused: the model sees its blocks, and they are back afterwards."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers import cached_model
from tiny_models import blocks, build, calls
from torch import nn

from dicache import DiCacheConfig, apply_dicache, get_stats
from dicache.driver.bypass import Bypass, twin_class

ALWAYS = DiCacheConfig(threshold=math.inf, retention_ratio=0, compute_last_step=False)
FAMILIES = ("flux", "hunyuan-video", "wan")


def run(model: nn.Module, steps: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**inputs)[0] for inputs in steps]


def in_the_head(model: nn.Module, look: Any) -> None:
    """Call `look` behind the blocks, while the model runs."""
    model.norm_out.register_forward_pre_hook(lambda *_: look())


def behind_the_decision(model: nn.Module, look: Any) -> None:
    """Call `look` in the model's loop, where a reused step begins to leave out blocks."""
    cached = cached_model(model)
    take = cached.after_probe

    def after_probe(*args: Any) -> None:
        take(*args)
        look()

    cached.after_probe = after_probe  # type: ignore[method-assign]


@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_looks_at_the_model_in_a_reused_step_sees_its_blocks(family: str) -> None:
    model, seen = build(family), []
    own = blocks(family, model)
    tensors = [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()]
    kinds = [type(block) for block in own]

    def look() -> None:
        found = model.state_dict(keep_vars=True)
        named = [(name, id(value)) for name, value in found.items()] == tensors
        now = blocks(family, model)
        alike = all(isinstance(each, kind) for each, kind in zip(now, kinds, strict=True))
        seen.append((named, alike, sum(a is b for a, b in zip(now, own, strict=True))))

    apply_dicache(model, ALWAYS)
    in_the_head(model, look)
    if family == "wan":  # its only list holds twins between the decision and the last block
        behind_the_decision(model, look)
    run(model, calls(family, 3))
    whole, twins = (True, True, len(own)), (True, True, 2)  # without the first and the last
    expected = [whole, whole, twins, whole, twins, whole] if family == "wan" else [whole] * 3
    assert seen == expected
    assert all(a is b for a, b in zip(blocks(family, model), own, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_abort_behind_the_decision_leaves_the_blocks_in_their_lists(error: type) -> None:
    model, fresh, steps = build("flux"), build("flux"), calls("flux", 4)
    own = blocks("flux", model)
    for each in (model, fresh):
        apply_dicache(each, ALWAYS)
    left = [2]  # the second call is the first reused step

    def abort() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error("stop")

    in_the_head(model, abort)
    with pytest.raises(error):
        run(model, steps)
    assert all(a is b for a, b in zip(blocks("flux", model), own, strict=True))
    for mine, its in zip(run(model, steps), run(fresh, steps), strict=True):
        assert torch.equal(mine, its)


class _Snapshot(nn.ModuleList):
    """Hands out the blocks that it has when a loop begins."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__()))


def test_a_model_that_took_its_blocks_before_the_decision_skips_them_all_the_same() -> None:
    model, plain, steps = build("wan"), build("wan"), calls("wan", 4)
    model.blocks = _Snapshot(model.blocks)
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for each in (model, plain):
        apply_dicache(each, ALWAYS)
    for mine, its in zip(run(model, steps), run(plain, steps), strict=True):
        assert torch.equal(mine, its)
    assert ran == [*range(len(model.blocks)), 0, 0, 0]
    assert get_stats(model).block_calls == len(ran)


def lengths_in_reused_steps(family: str, model: nn.Module, **arguments: Any) -> list[int]:
    """How many blocks the second list holds behind the decision, in each of two reused steps."""
    seen: list[int] = []
    behind_the_decision(model, lambda: seen.append(len(model.single_transformer_blocks)))
    run(model, [{**inputs, **arguments} for inputs in calls(family, 3)])
    return seen[1:]


@pytest.mark.parametrize("family", ["flux", "hunyuan-video"])
def test_a_list_whose_loop_has_not_begun_holds_the_last_block_alone(family: str) -> None:
    model = build(family)
    own = [*model.single_transformer_blocks]
    apply_dicache(model, ALWAYS)
    assert lengths_in_reused_steps(family, model) == [1, 1]
    assert [*model.single_transformer_blocks] == own


def pre_hook(model: nn.Module) -> None:
    model.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)


def hook_that_sees_errors(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, output: None, always_call=True)


def wrapped_forward(model: nn.Module) -> None:
    """It borrows the name and the module of what it wraps."""
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


def hook_of_accelerate(model: nn.Module) -> None:
    add_hook_to_module(model, ModelHook())


def copied_class(model: nn.Module) -> None:
    """As in a research repository: a model of its own under the name of diffusers'."""
    kind = type(model)
    body = {"forward": lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs)}
    model.__class__ = type(kind.__name__, (kind,), body)


def subclass_without_a_forward(model: nn.Module) -> None:
    model.__class__ = type("Mine", (type(model),), {"__module__": type(model).__module__})


def list_of_its_own_class(model: nn.Module) -> None:
    model.single_transformer_blocks = _Snapshot(model.single_transformer_blocks)  # type: ignore


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [pre_hook, hook_that_sees_errors, wrapped_forward, hook_of_accelerate],
)
def test_a_list_that_others_may_look_at_stays_whole(change: Any, when: str) -> None:
    model = build("flux")
    length = len(model.single_transformer_blocks)
    if when == "before":
        change(model)
    apply_dicache(model, ALWAYS)
    if when == "after":
        change(model)
    assert lengths_in_reused_steps("flux", model) == [length, length]


@pytest.mark.parametrize(
    "change", [copied_class, subclass_without_a_forward, list_of_its_own_class]
)
def test_a_list_of_a_model_that_is_not_diffusers_own_stays_whole(change: Any) -> None:
    model = build("flux")
    length = len(model.single_transformer_blocks)
    change(model)
    apply_dicache(model, ALWAYS)
    assert lengths_in_reused_steps("flux", model) == [length, length]


def test_a_list_of_a_class_that_was_patched_stays_whole(monkeypatch: Any) -> None:
    kind = type(build("flux"))
    forward = kind.forward

    @functools.wraps(forward)
    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", patched)
    model = build("flux")
    length = len(model.single_transformer_blocks)
    apply_dicache(model, ALWAYS)
    assert lengths_in_reused_steps("flux", model) == [length, length]


@pytest.mark.parametrize(
    ("family", "argument"),
    [("flux", "joint_attention_kwargs"), ("hunyuan-video", "attention_kwargs")],
)
def test_a_list_whose_loras_may_be_scaled_stays_whole(family: str, argument: str) -> None:
    """Their scales are put back behind the model's loop, also by an error in the middle of it."""
    model = build(family)
    length = len(model.single_transformer_blocks)
    apply_dicache(model, ALWAYS)
    assert lengths_in_reused_steps(family, model, **{argument: {}}) == [length, length]


class _Running:
    """A model in the middle of a reused step."""

    skips = True


class _Add(nn.Module):
    """A block that could not run: its call shows whether it did."""

    def forward(self, x: int, text: int = 0, temb: int = 0) -> tuple[str, int]:
        return "ran", x


def bypass_of(blocks: nn.ModuleList, *chosen: nn.Module) -> tuple[Bypass, _Running]:
    running = _Running()
    kind = twin_class(_Add, running, ("text", "x"), ("x", "text", "temb"))
    assert kind is not None
    return Bypass(blocks, {_Add: kind}, set(chosen)), running


def test_arguments_come_back_by_name_and_by_position() -> None:
    blocks = nn.ModuleList([_Add()])
    bypass, _ = bypass_of(blocks, blocks[0])
    bypass.begin({})
    twin = blocks[0]
    assert twin(1, 2, temb=3) == twin(1, temb=3, text=2) == twin(text=2, x=1) == (2, 1)


def test_a_twin_that_somebody_kept_is_the_block_when_nothing_is_skipped() -> None:
    blocks = nn.ModuleList([_Add()])
    bypass, running = bypass_of(blocks, blocks[0])
    bypass.begin({})
    kept = blocks[0]
    running.skips = False
    assert kept(1) == ("ran", 1)


def test_a_list_that_changed_is_left_alone() -> None:
    first, second = _Add(), _Add()
    blocks = nn.ModuleList([first, second])
    bypass, _ = bypass_of(blocks, second)
    del blocks[0]  # the second one is the first by name now
    bypass.begin({})
    assert blocks[0] is second
    bypass.end()
    assert [*blocks] == [second]


def test_a_short_list_holds_what_runs_unless_a_call_counts_its_blocks() -> None:
    own = [_Add(), _Add(), _Add()]
    blocks = nn.ModuleList(own)
    kind = twin_class(_Add, _Running(), ("x",), ("x", "text", "temb"))
    bypass = Bypass(blocks, {_Add: kind}, set(own[:2]), whole_for=("residuals",))
    for arguments, length in (({}, 1), ({"residuals": None}, 1), ({"residuals": 1}, 3)):
        bypass.begin(arguments)
        bypass.begin(arguments)  # an interrupt kept the first one from its end
        assert len(blocks) == length
        assert [*blocks][-1] is own[-1]
        bypass.end()
        bypass.end()
        assert [*blocks] == own
        assert [*blocks.state_dict()] == [*nn.ModuleList(own).state_dict()]


def test_what_is_changed_while_twins_are_there_stays_changed() -> None:
    first, second, third, new = _Add(), _Add(), _Add(), _Add()
    blocks = nn.ModuleList([first, second, third])
    bypass, _ = bypass_of(blocks, first, second, third)
    bypass.begin({})
    blocks[1] = new
    del blocks[0]
    bypass.end()
    assert [*blocks] == [new, third]


def test_ending_twice_and_beginning_over_an_unended_one_loses_nothing() -> None:
    own = [_Add(), _Add()]
    blocks = nn.ModuleList(own)
    bypass, _ = bypass_of(blocks, own[0])
    bypass.begin({})
    bypass.begin({})  # an interrupt kept the first one from its end
    bypass.end()
    bypass.end()
    assert [*blocks] == own


def test_classes_that_a_subclass_could_not_stand_for_get_no_twin() -> None:
    class Registering(nn.Module):
        def __init_subclass__(cls, name: str) -> None: ...

    class Slotted(nn.Module):
        __slots__ = ("value",)

    for kind in (Registering, Slotted):
        assert twin_class(kind, _Running(), ("x",), ("x",)) is None
