"""docs/engines.md: every block of code runs, one after the other, and what it asserts holds."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import page_code
import pytest
import torch

from dicache.core.trajectory import Trajectory

PAGE = page_code.ROOT / "docs" / "engines.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return page_code.run(PAGE)


def test_all_code_of_the_page_is_python_that_runs(page: dict[str, Any]) -> None:
    assert len(page_code.blocks(PAGE, "python")) == PAGE.read_text().count("```") // 2 >= 6
    assert {"generate", "one_step", "packed_step", "guided_step"} <= page.keys()


def test_the_functional_loop_is_the_session(page: dict[str, Any]) -> None:
    """Both follow the default rules, so they decide alike and end alike."""
    session = page["DiCacheSession"](page["DiCacheConfig"](threshold=0.01))
    request = page["Request"]("a", 1, 20)
    while not request.is_done:
        page["one_step"](session, request)
    latents, done = page["generate"](page["noise"](1), page["times"])
    assert done == page["letters"](request.stats)
    assert (latents - request.x).abs().max() < 1e-5


def test_members_of_a_batch_decide_apart(page: dict[str, Any]) -> None:
    """In some steps of the page's batch some requests reuse and others do not."""
    schedules = {page["letters"](each.stats) for each in page["finished"]}
    assert len(schedules) >= 3 and all("R" in each for each in schedules)


def test_a_request_that_is_cancelled_leaves_nothing_and_may_come_again(
    page: dict[str, Any],
) -> None:
    session = page["DiCacheSession"](page["config"])
    batch = [page["Request"](name, seed, 20) for name, seed in (("a", 1), ("b", 2))]
    for _ in range(7):
        page["packed_step"](session, batch)
    session.end("a")
    batch[0] = page["Request"]("a", 5, 16)  # the same id, another request
    while batch:
        page["packed_step"](session, batch)
        for request in [each for each in batch if each.is_done]:
            batch.remove(request)
            given = ("a", 5, 16) if request.name == "a" else ("b", 2, 20)
            expected = page["alone"](*given)
            assert page["letters"](request.stats) == page["letters"](expected.stats)
            assert (request.x - expected.x).abs().max() < 1e-5


def test_a_run_that_was_ended_is_freed_and_does_not_go_on(page: dict[str, Any]) -> None:
    session = page["DiCacheSession"](page["config"])
    request, other = page["Request"]("a", 1, 20), page["Request"]("b", 2, 20)
    before = trajectories()
    for _ in range(9):
        page["one_step"](session, request)
        page["one_step"](session, other)
    stats = request.stats
    assert trajectories() == before + 2
    session.end("a")
    assert trajectories() == before + 1
    page["one_step"](session, request)
    assert request.stats is not stats and page["letters"](request.stats) == "C"
    page["one_step"](session, other)
    assert len(page["letters"](other.stats)) == 10


def trajectories() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(isinstance(each, Trajectory) for each in gc.get_objects())


def test_a_position_that_goes_back_begins_the_run_anew(page: dict[str, Any]) -> None:
    """An id that comes again, though nobody said that its run had ended."""
    session = page["DiCacheSession"](page["config"])
    first = page["Request"]("a", 1, 20)
    for _ in range(7):
        page["one_step"](session, first)
    again = page["Request"]("a", 6, 20)
    while not again.is_done:
        page["one_step"](session, again)
    assert torch.equal(again.x, page["alone"]("a", 6, 20).x)


def test_a_step_that_fails_costs_a_computed_one_and_the_others_nothing(
    page: dict[str, Any],
) -> None:
    session = page["DiCacheSession"](page["config"])
    a, b = page["Request"]("a", 1, 20), page["Request"]("b", 2, 20)
    for _ in range(9):
        for request in (a, b):
            page["one_step"](session, request)
    with pytest.raises(RuntimeError, match="device"), session.step(a.where()):
        raise RuntimeError("the device fell over")
    for _ in range(11):
        for request in (a, b):
            page["one_step"](session, request)
    assert page["letters"](a.stats)[10] == "C"
    assert torch.equal(b.x, page["alone"]("b", 2, 20).x)


def test_more_runs_than_a_session_keeps_are_computed_never_mixed_up(page: dict[str, Any]) -> None:
    session = page["DiCacheSession"](page["config"])
    requests = [page["Request"](k, k, 8) for k in range(70)]
    for _ in range(8):
        for request in requests:
            page["one_step"](session, request)
    for request in requests[::23]:
        plain, _ = page["generate"](page["noise"](request.name), request.times, 0.0)
        assert (request.x - plain).abs().max() < 1e-5
        # Each step was of a run that was forgotten, until the first ones were done and made room.
        assert page["letters"](request.stats) in ("C", "CC")
