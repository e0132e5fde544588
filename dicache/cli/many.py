"""`dicache generate --prompts`: a file of prompts, on one device or in several processes.

Processes, which `torchrun` or `accelerate launch` starts, have a pipeline each and a part of the
prompts, and share nothing but the folder of the results; `records.py` says what is finished there.
A picture depends on its line of the file and on the options alone: not on the number of processes,
on who draws it, or on what was drawn before.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dicache import DiCacheConfig, Profile, SparseVideoGenConfig
from dicache.demo.report import config_to_dict, summarize
from dicache.demo.runner import Run, Sample

from .errors import InputError, note, one_line
from .generate import (
    NOT_FINITE,
    Request,
    draw_cached,
    find_device,
    find_dtype,
    load,
    memory_errors,
    refused_arguments,
)
from .info import versions
from .prompts import Job, read_jobs
from .records import Records, only_run
from .rules import make_config, make_sparse_config

SOME_MISSING = 1
INTERRUPTED = 130
# One process waits for another only at the end, as long as the prompts of that one take.
_PATIENCE = timedelta(days=365)

T = TypeVar("T")


@dataclass(frozen=True)
class _Plan:
    """What every process finds out for itself, the same in all of them but for the device."""

    jobs: list[Job]
    records: Records
    config: DiCacheConfig
    sparse: SparseVideoGenConfig | None
    device: torch.device
    dtype: torch.dtype


def run_many(request: Request, prompts: Path) -> int:
    """Draw all prompts of a file that are not drawn yet, tell of each, and write the manifest.

    Args:
        request: What to do with each; its own prompt is not used.
        prompts: The file.

    Returns:
        The command's exit code: 0, or 1 where a prompt failed, or 130 after Ctrl-C.

    Raises:
        InputError: The request cannot be met.
    """
    # No tensor goes from one process to another, so none needs more than gloo.
    state = PartialState(cpu=True, timeout=_PATIENCE)
    plan = None
    try:
        plan = _in_all(state, lambda: _make_plan(request, prompts, state))
        with ExitStack() as stack:
            found = _in_all(state, lambda: _take_over(plan, state, stack))
            todo = broadcast_object_list([found])[0]
            missing = _draw_in_all(plan, request, todo, state)
            if state.is_main_process:
                plan.records.write_manifest(plan.jobs)
                drawn = len(todo) - missing
                before = len(plan.jobs) - len(todo)
                counts = f"{drawn} drawn, {before} finished before, {missing} not drawn"
                _say(f"{request.out}: {counts}; manifest.jsonl tells of each")
        return SOME_MISSING if missing else 0
    except KeyboardInterrupt:
        if state.num_processes > 1:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another one
        if state.is_main_process and plan is not None:
            plan.records.write_manifest(plan.jobs)
            left = len(plan.records.remaining(plan.jobs))
            note(
                f"interrupted; the same command draws the {left} of {len(plan.jobs)} that are left"
            )
        return INTERRUPTED
    finally:
        state.destroy_process_group()


def _in_all(state: PartialState, work: Callable[[], T]) -> T:
    """Do something in every process. Where one of them cannot, all end, and the user hears it once.

    Raises:
        InputError: The first process's that had one; in the main process only.
        SystemExit: In the others.
    """
    result, trouble = None, ""
    try:
        result = work()
    except InputError as error:
        trouble = str(error)
    troubles = [each for each in gather_object([trouble]) if each]
    if troubles and state.is_main_process:
        raise InputError(troubles[0])
    if troubles:
        raise SystemExit(2)
    return result  # type: ignore[return-value]  # there was no trouble here


def _make_plan(request: Request, prompts: Path, state: PartialState) -> _Plan:
    if request.compare:
        raise InputError("--compare is for one --prompt; expected --prompts without it")
    config = make_config(**request.rules)
    sparse = make_sparse_config(**request.sparsity)
    device = _own_device(request.device, state)
    dtype = find_dtype(request.dtype, device)
    jobs = read_jobs(prompts, request.seed)
    settings = {
        "model": _whole_name(request.model),
        "arguments": request.arguments,
        "config": config_to_dict(config),
        "profile": _hash_of(config.profile),
        "sparse": None if sparse is None else asdict(sparse),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return _Plan(jobs, Records(request.out, settings), config, sparse, device, dtype)


def _own_device(name: str, state: PartialState) -> torch.device:
    """A process's own, where several of them have GPUs."""
    device = find_device(name)
    if device.type != "cuda" or state.num_processes == 1:
        return device
    if device.index is not None:
        raise InputError(
            f"--device {name} is one device for {state.num_processes} processes; expected cuda, "
            f"which is another one for each"
        )
    device = find_device(f"cuda:{state.local_process_index}")
    torch.cuda.set_device(device)
    return device


def _whole_name(model: str) -> str:
    """The same for a folder from wherever it is looked at."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _hash_of(profile: Any) -> str | None:
    if not isinstance(profile, Profile):
        return None
    return hashlib.sha256(json.dumps(profile.to_dict()).encode()).hexdigest()


def _take_over(plan: _Plan, state: PartialState, stack: ExitStack) -> list[Job]:
    """Take the folder for this run, and find what is left to draw. The main process looks for all:
    what others see might change meanwhile.
    """
    if not state.is_main_process:
        return []
    stack.enter_context(only_run(plan.records.folder))
    plan.records.clean()
    plan.records.write_settings({"versions": versions()})
    plan.records.write_manifest(plan.jobs)
    others = plan.records.replaced(plan.jobs)
    if others:
        note(f"{others} pictures of other settings are there, which this run replaces")
    return plan.records.remaining(plan.jobs)


def _draw_in_all(plan: _Plan, request: Request, todo: list[Job], state: PartialState) -> int:
    """Draw in all processes, each its part; how many pictures are missing at the end."""
    with state.split_between_processes(todo) as mine:
        pipeline = _in_all(state, lambda: _load(plan, request, mine))
        failed = 0
        for number, job in enumerate(mine, start=1):
            place = f"process {state.process_index}, " if state.num_processes > 1 else ""
            drawn = _draw_one(plan, job, pipeline, f"[{place}{number}/{len(mine)}]", state)
            failed += not drawn
    try:
        return sum(gather_object([failed]))
    except RuntimeError:  # gloo's, of a connection that broke
        note("another process ended early; the same command draws what is left")
        return len(plan.records.remaining(todo))


def _load(plan: _Plan, request: Request, mine: list[Job]) -> tuple[Any, dict[str, Any]]:
    if not mine:  # fewer pictures than processes
        return None, {}
    pipe, arguments = load(request, plan.dtype, plan.config, plan.sparse)
    with memory_errors(plan.device):
        pipe.to(plan.device)
    return pipe, arguments


def _draw_one(
    plan: _Plan, job: Job, pipeline: tuple[Any, dict[str, Any]], place: str, state: PartialState
) -> bool:
    """Draw a picture and write it with its record. What goes wrong is told, and ends nothing.

    Raises:
        InputError: Not even the record can be written; hours of drawing would be for nothing.
    """
    about = {"process": state.process_index, "device": str(plan.device)}
    try:
        run = _draw(plan, job, *pipeline, state)
        facts = {**_facts(job, run), **about}
        file = plan.records.finish(job, run.pictures, facts)
    except Exception as error:  # whatever it is, the other prompts do not depend on it
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        print(f"{place} {job.name} FAILED: {one_line(text)}", file=sys.stderr, flush=True)
        plan.records.fail(job, text, {**about, "traceback": traceback.format_exc()})
        return False
    computed = facts["computed"] + facts["resumed"]
    whole = f"{computed} of {computed + facts['reused']} steps computed"
    _say(f"{place} {file}: {run.seconds:.1f} s, {whole}, {facts['block_speedup']:.2f}x less work")
    if NOT_FINITE in facts["notes"]:
        note(f"{job.name}: {NOT_FINITE}")
    return True


def _draw(plan: _Plan, job: Job, pipe: Any, arguments: dict[str, Any], state: PartialState) -> Run:
    def inputs() -> dict[str, Any]:
        prompt = {"prompt": job.prompt} if "prompt" in arguments else {}
        # On the CPU, a seed gives the same noise whatever the device.
        generator = torch.Generator().manual_seed(job.seed)
        return {**arguments, **prompt, "generator": generator}

    # Bars of several processes would overwrite each other.
    shown = state.num_processes == 1 and sys.stderr.isatty()
    pipe.set_progress_bar_config(desc=job.name, leave=False, disable=not shown)
    with refused_arguments(), memory_errors(plan.device):
        return draw_cached(pipe, inputs, plan.config, plan.sparse)


def _facts(job: Job, run: Run) -> dict[str, Any]:
    """What a run says of itself, for its record."""
    summary = summarize("", [Sample(job.prompt, job.seed, run)])
    stats = {name: report.stats for name, report in run.caches.items()}
    notes = [text for each in stats.values() for text in each.notes]
    if not bool(run.pictures.isfinite().all()):
        notes.append(NOT_FINITE)
    return {
        "seconds": run.seconds,
        "computed": int(summary.computed),
        "resumed": int(summary.resumed),
        "reused": int(summary.reused),
        "block_speedup": summary.fewer_blocks,
        "cache_bytes": summary.cache_bytes,
        "masks": {
            name: {context: each.mask(context) for context in each.contexts}
            for name, each in stats.items()
        },
        "notes": notes,
    }


def _say(text: str) -> None:
    print(text, flush=True)
