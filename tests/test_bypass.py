"""Block lists while a step is reused: the model sees its blocks, and they are back afterwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import blocks, build, calls
from torch import nn

from dicache import DiCacheConfig, apply_dicache, get_stats
from dicache.integrations.bypass import Bypass, twin_class

ALWAYS = DiCacheConfig(threshold=math.inf, retention_ratio=0, compute_last_step=False)
FAMILIES = ("flux", "hunyuan-video", "wan")


def run(model: nn.Module, steps: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**inputs)[0] for inputs in steps]


def in_the_head(model: nn.Module, look: Any) -> None:
    """Call `look` behind the blocks, while the model runs."""
    model.norm_out.register_forward_pre_hook(lambda *_: look())


@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_looks_at_the_model_in_a_reused_step_sees_its_blocks(family: str) -> None:
    model, seen = build(family), []
    own = blocks(family, model)
    expected = [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()]
    kinds = [type(block) for block in own]

    def look() -> None:
        tensors = model.state_dict(keep_vars=True)
        named = [(name, id(value)) for name, value in tensors.items()] == expected
        now = blocks(family, model)
        alike = all(isinstance(each, kind) for each, kind in zip(now, kinds, strict=True))
        seen.append((named, alike, sum(a is b for a, b in zip(now, own, strict=True))))

    apply_dicache(model, ALWAYS)
    in_the_head(model, look)
    run(model, calls(family, 3))
    computed, *reused = seen
    assert computed == (True, True, len(own))
    assert reused == [(True, True, 2)] * 2  # the probe's block and the last one are themselves
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


class _Cache:
    skips = True


class _Add(nn.Module):
    """A block that could not run: its call shows whether it did."""

    def forward(self, x: int, text: int = 0, temb: int = 0) -> tuple[str, int]:
        return "ran", x


def bypass_of(blocks: nn.ModuleList, *chosen: nn.Module) -> tuple[Bypass, _Cache]:
    cache = _Cache()
    kind = twin_class(_Add, cache, ("text", "x"), ("x", "text", "temb"))
    assert kind is not None
    return Bypass(blocks, {_Add: kind}, set(chosen)), cache


def test_arguments_come_back_by_name_and_by_position() -> None:
    blocks = nn.ModuleList([_Add()])
    bypass, _ = bypass_of(blocks, blocks[0])
    bypass.begin()
    twin = blocks[0]
    assert twin(1, 2, temb=3) == twin(1, temb=3, text=2) == twin(text=2, x=1) == (2, 1)


def test_a_twin_that_somebody_kept_is_the_block_when_nothing_is_skipped() -> None:
    blocks = nn.ModuleList([_Add()])
    bypass, cache = bypass_of(blocks, blocks[0])
    bypass.begin()
    kept = blocks[0]
    cache.skips = False
    assert kept(1) == ("ran", 1)


def test_a_list_that_changed_is_left_alone() -> None:
    first, second = _Add(), _Add()
    blocks = nn.ModuleList([first, second])
    bypass, _ = bypass_of(blocks, second)
    del blocks[0]  # the second one is the first by name now
    bypass.begin()
    assert blocks[0] is second
    bypass.end()
    assert [*blocks] == [second]


def test_what_is_changed_while_twins_are_there_stays_changed() -> None:
    first, second, third, new = _Add(), _Add(), _Add(), _Add()
    blocks = nn.ModuleList([first, second, third])
    bypass, _ = bypass_of(blocks, first, second, third)
    bypass.begin()
    blocks[1] = new
    del blocks[0]
    bypass.end()
    assert [*blocks] == [new, third]


def test_ending_twice_and_beginning_over_an_unended_one_loses_nothing() -> None:
    own = [_Add(), _Add()]
    blocks = nn.ModuleList(own)
    bypass, _ = bypass_of(blocks, own[0])
    bypass.begin()
    bypass.begin()  # an interrupt kept the first one from its end
    bypass.end()
    bypass.end()
    assert [*blocks] == own


def test_classes_that_a_subclass_could_not_stand_for_get_no_twin() -> None:
    class Registering(nn.Module):
        def __init_subclass__(cls, name: str) -> None: ...

    class Slotted(nn.Module):
        __slots__ = ("value",)

    for kind in (Registering, Slotted):
        assert twin_class(kind, _Cache(), ("x",), ("x",)) is None
