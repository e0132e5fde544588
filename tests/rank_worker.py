"""One rank of a group of gloo processes, for `ranks.py`: runs checks and writes what it saw.

    python rank_worker.py RANK WORLD_SIZE FOLDER CHECK...

Everything that waits for another rank does so for at most `PATIENCE` seconds, so that a hang is an
error. What every check saw goes to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dicache import DiCacheConfig, DiCacheSession, Where
from dicache.core.recorder import Recorder
from dicache.core.rules import resolve
from dicache.core.step import Step

PATIENCE = float(os.environ.get("PATIENCE", "20"))
STEPS = 12
CHECKS: dict[str, Callable[..., Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    CHECKS[function.__name__] = function
    return function


def letters(records: Any) -> str:
    return "".join({"compute": "C", "resume": "c", "reuse": "R"}[each.action] for each in records)


@contextmanager
def counting(sizes: list[int] | None = None) -> Iterator[list[str]]:
    """The collectives that are called meanwhile, and the bytes that this rank hands in to them."""
    names = ("all_reduce", "broadcast", "all_gather", "broadcast_object_list")
    called: list[str] = []
    before = {name: getattr(dist, name) for name in names}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            if sizes is not None:
                sizes.append(args[0].numel() * args[0].element_size())
            return before[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, watched(name))
    try:
        yield called
    finally:
        for name in names:
            setattr(dist, name, before[name])


# --- a session in a loop of one's own -------------------------------------------------------------

# Tokens of a model whose blocks see one token at a time, so that parts need no other ranks.
TOKENS, WIDTH = 24, 8
UNEVEN = {2: (17, 7), 4: (11, 7, 5, 1)}  # tokens of every rank
_MIX = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)))[0]


def block(x: Tensor, share: float, depth: int) -> Tensor:
    return x + 0.3 * torch.sin(x @ _MIX + 3 * share + depth)


def tokens(share: float, batch: int = 2, seed: int = 0) -> Tensor:
    """[B, TOKENS, WIDTH]: the second half hardly moves."""
    noise, picture = torch.randn(
        2, batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)
    )
    moves = torch.ones(1, TOKENS, 1)
    moves[:, TOKENS // 2 :] = 0.02
    wave = 0.8 * torch.sin(6 * share + picture) * torch.arange(1, batch + 1).view(-1, 1, 1)
    return noise + moves * (share * (picture - noise) + wave)


def parts(x: Tensor, sizes: tuple[int, ...] = ()) -> Tensor:
    """This rank's tokens, in equal parts or in parts of these sizes."""
    cut = x.split(list(sizes), 1) if sizes else x.chunk(dist.get_world_size(), 1)
    return cut[dist.get_rank()]


def drive(
    session: DiCacheSession, take: Callable[[Tensor], Tensor], contexts: tuple[str, ...] = ("main",)
) -> list[Tensor]:
    """One run; the tokens behind the last block of every step and context."""
    answers = []
    for index in range(STEPS):
        share = index / STEPS
        for seed, context in enumerate(contexts):
            x = take(tokens(share, seed=seed))
            where = Where(context, timestep=1000 * (1 - share), num_steps=STEPS)
            with session.step(where) as step:
                answers.append(run_blocks(step, x, block(x, share, 0), share, (1, 2, 3)))
    return answers


def run_blocks(step: Step, x: Tensor, p: Tensor, share: float, depths: Iterable[int]) -> Tensor:
    """A step behind its probe, by blocks of these depths if they are needed: the tokens behind."""
    if step.needs_probe:
        step.probe(x, p)
    if step.action == "reuse":
        return step.reuse(x)
    y = p if step.rows is None else p[step.rows]
    for depth in depths:
        y = block(y, share, depth)
    return step.record(x, p, y)


RULES: dict[str, dict[str, Any]] = {
    "default": {"threshold": 0.12},
    "sample": {"threshold": 0.12, "granularity": "sample"},
    "delta_y": {"error": "delta_y", "alignment": "l1", "threshold": 0.5},
    "delta_minus": {"error": "delta_minus", "alignment": "l1", "threshold": 0.08},
    "packed": {"threshold": 0.12, "cache_dtype": torch.bfloat16},
    "reference": {"threshold": 0.12, "backend": "reference"},
    "contexts": {"threshold": 0.12},
    "guidance": {"threshold": 0.12, "cfg": "independent"},
    "uneven": {"threshold": 0.12},
}


@check
def session(name: str) -> dict[str, Any]:
    """Masks of one process, of each rank alone, and of both together, and how far y differs."""
    rules = RULES[name]
    contexts = ("cond", "uncond") if name in ("contexts", "guidance") else ("main",)
    sizes = UNEVEN[dist.get_world_size()] if name == "uneven" else ()
    whole, alone = (DiCacheSession(DiCacheConfig(**rules)) for _ in range(2))
    shared = DiCacheSession(DiCacheConfig(**rules, process_group=dist.group.WORLD))
    expected = drive(whole, lambda x: x, contexts)
    drive(alone, lambda x: parts(x, sizes), contexts)
    handed: list[int] = []
    with counting(handed) as called:
        found = drive(shared, lambda x: parts(x, sizes), contexts)
    far = [(f - parts(e, sizes)).norm() / e.norm() for f, e in zip(found, expected, strict=True)]
    masks = {
        which: {key: letters(records) for key, records in each.stats.contexts.items()}
        for which, each in (("whole", whole), ("alone", alone), ("shared", shared))
    }
    return {**masks, "far": float(max(far)), "called": called, "bytes": handed}


@check
def two_groups() -> dict[str, Any]:
    """Two pairs of ranks, with a sequence and a threshold for each pair."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    which, place = divmod(dist.get_rank(), 2)
    rules = {"threshold": (0.12, 0.25)[which]}
    whole = DiCacheSession(DiCacheConfig(**rules))
    shared = DiCacheSession(DiCacheConfig(**rules, process_group=groups[which]))
    drive(whole, lambda x: x)
    drive(shared, lambda x: x.chunk(2, 1)[place])
    return {
        name: letters(each.stats.contexts["main"])
        for name, each in (("whole", whole), ("shared", shared))
    }


@check
def moments() -> dict[str, Any]:
    """What a profile is made of, from parts of unequal size."""
    sizes = UNEVEN[dist.get_world_size()]
    found = {}
    for which, group in (("whole", None), ("shared", dist.group.WORLD)):
        session = DiCacheSession(DiCacheConfig(threshold=0.0, process_group=group))
        session.recorder = Recorder()
        drive(session, (lambda x: x) if group is None else (lambda x: parts(x, sizes)))
        found[which] = session.recorder.moments(session.ranks)["main"]
    names = ("rr", "qq", "rq", "pp")
    pairs = [[getattr(each, name) for each in found.values()] for name in names]
    return {"far": max(float((a - b).norm() / a.norm()) for a, b in pairs)}


@check
def not_finite(which: str) -> dict[str, Any]:
    """NaN in some tokens of one rank in one step; then, in a whole run, for a profile."""
    seen = {}
    session = DiCacheSession(DiCacheConfig(**RULES["default"], process_group=dist.group.WORLD))
    calls = [0]

    def take(x: Tensor) -> Tensor:
        calls[0] += 1
        x = parts(x).clone()
        if str(dist.get_rank()) == which and calls[0] == 5:
            x[0, 0] = math.nan
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drive(session, take)
    seen["mask"] = letters(session.stats.contexts["main"])
    recorder = Recorder()
    session.reset()
    session.recorder, calls[0] = recorder, 0
    drive(session, take)
    try:
        recorder.moments(session.ranks)
    except ValueError as error:
        seen["refused"] = str(error)[:40]
    return seen


@check
def rounded() -> dict[str, Any]:
    """Totals that are not the same on all ranks, as if they had been added in another order."""
    from dicache.core.ranks import Ranks

    add_up, off = Ranks.add_up, torch.tensor([1.0, 1.07, 1.0, 1.0, 1.0, 0.8])
    rules = DiCacheConfig(**RULES["default"], process_group=dist.group.WORLD)
    alike, other = DiCacheSession(rules), DiCacheSession(rules)
    expected = drive(alike, parts)
    if dist.get_rank():
        Ranks.add_up = lambda self, sums: add_up(self, sums) * off  # type: ignore[method-assign]
    found = drive(other, parts)
    Ranks.add_up = add_up  # type: ignore[method-assign]
    far = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))
    gammas = [[r.gamma for r in each.stats.contexts["main"]] for each in (alike, other)]
    masks = [letters(each.stats.contexts["main"]) for each in (alike, other)]
    return {"far": far, "gammas": gammas, "masks": masks}


def _tiles(session: DiCacheSession, exchanged: bool) -> None:
    """Two calls a step that only their order tells apart, exchanged from the sixth step on."""
    for index in range(STEPS):
        share = index / STEPS
        order = (1, 0) if exchanged and index >= 6 else (0, 1)
        for seed in order:
            x = parts(tokens(share / 20, seed=seed))  # nearer to the step before than to the other
            where = Where(moment=index, timestep=1000 * (1 - share), num_steps=STEPS)
            with session.step(where) as step:
                run_blocks(step, x, block(x, share, 0), share, (1,))


@check
def tiles(schedule: str) -> dict[str, Any]:
    """Tiles whose order changes, as one rank's tokens tell it: the first's, or the second's."""
    seen = {}
    rules = {"threshold": 0.3} if schedule == "threshold" else {"schedule": schedule}
    for which in range(2):
        session = DiCacheSession(DiCacheConfig(**rules, process_group=dist.group.WORLD))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            _tiles(session, exchanged=dist.get_rank() == which)
        records = session.stats.contexts
        seen[f"as {which} tells"] = {key: letters(records[key]) for key in records}
        seen[f"told as {which} tells"] = [str(each.message)[:60] for each in told]
    return seen


@check
def noise() -> dict[str, Any]:
    """One rank's tokens look as if every step brought new noise."""
    seen = {}
    for which in range(2):
        rules = resolve(DiCacheConfig(process_group=dist.group.WORLD), threshold=0.12)
        session = DiCacheSession(rules)
        for index in range(STEPS):
            share = index / STEPS
            x = parts(tokens(share)).clone()
            if dist.get_rank() == which:
                x += (-1) ** index
            where = Where(timestep=1000 * (1 - share), num_steps=STEPS, is_noisy=None)
            with session.step(where) as step:
                run_blocks(step, x, x + 0.1, share, (1,))
        seen[f"as {which} tells"] = letters(session.stats.contexts["main"])
    return seen


@check
def branches() -> dict[str, Any]:
    """Each rank has a branch of guidance, whole; they exchange answers behind every step."""
    session = DiCacheSession(DiCacheConfig(**RULES["default"]))
    half = TOKENS // 2
    take = (lambda x: x[:, :half]) if dist.get_rank() == 0 else (lambda x: x[:, half:])
    with counting() as called:
        for answer in drive(session, take):
            pieces = [torch.empty_like(answer) for _ in range(dist.get_world_size())]
            dist.all_gather(pieces, answer.contiguous())
    return {"mask": letters(session.stats.contexts["main"]), "called": sorted({*called})}


# --- ends -----------------------------------------------------------------------------------------


def _run_until(step_of_the_end: int, end: Callable[[], None]) -> None:
    """A run of a loop whose blocks exchange something, as attention does."""
    session = DiCacheSession(DiCacheConfig(**RULES["default"], process_group=dist.group.WORLD))
    seen = [0]

    def take(x: Tensor) -> Tensor:
        seen[0] += 1
        if seen[0] == step_of_the_end and dist.get_rank() == 1:
            end()
        return parts(x)

    drive(session, take)


@check
def raises() -> dict[str, Any]:
    def end() -> None:
        raise ValueError("the second rank gives up")

    _run_until(5, end)
    return {}


@check
def is_killed() -> dict[str, Any]:
    _run_until(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return {}


@check
def decide_alone(name: str) -> dict[str, Any]:
    """A model whose sequence is split, and a cache that does not look for other ranks."""
    from dicache import apply_dicache
    from dicache.driver.model import CachedModel

    CachedModel._find_ranks = lambda self: False  # type: ignore[method-assign]
    shared = _tiny().build(name)
    split(shared)
    apply_dicache(shared, rules_for(name))
    stopped = None
    try:
        generate(shared, name)
    except RuntimeError as error:
        stopped = str(error)
    return {"stopped": stopped, "masks": masks(shared)}


# --- diffusers ------------------------------------------------------------------------------------

MODEL_STEPS = 8


def _tiny() -> Any:
    """`tiny_models`, with texts that two ranks can divide."""
    import tiny_models

    tiny_models.TEXT_TOKENS = 6
    # On builds for the CPU diffusers divides by the number of accelerators.
    torch.accelerator.device_count = lambda: 1
    return tiny_models


def split(model: Any) -> None:
    """Let the ranks share the model's sequence."""
    from diffusers import ContextParallelConfig

    from dicache import context_parallel_plan

    degree = ContextParallelConfig(ulysses_degree=dist.get_world_size())
    model.enable_parallelism(config=degree, cp_plan=context_parallel_plan(model))


def still(name: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls with latents of which the last half hardly moves: the second rank's tokens."""
    tiny = _tiny()
    made = []
    first = tiny.latents_of(name, calls[0])
    dim = 1 if first.dim() == 3 else 3  # tokens, or rows of a video of one frame
    half = first.shape[dim] // 2
    for call in calls:
        latents = tiny.latents_of(name, call).clone()
        latents[1] = 0.3 * latents[1] + 0.7 * first[1]  # samples that differ
        rest = latents.narrow(dim, half, first.shape[dim] - half)
        rest.copy_(first.narrow(dim, half, rest.shape[dim]) * 0.98 + rest * 0.02)
        made.append(tiny.with_latents(name, call, latents))
    return made


def generate(model: Any, name: str) -> list[Tensor]:
    """What a model with the cache answers in every step of two branches, which share latents."""
    tiny = _tiny()
    conds, unconds = (still(name, tiny.calls(name, MODEL_STEPS, seed=seed)) for seed in (0, 7))
    if name == "ltx":  # diffusers cannot split its attention with a mask
        for call in (*conds, *unconds):
            call["encoder_attention_mask"] = None
    if name == "flux2":  # its plan splits places [1, S, 4], as pipelines give them
        for call in (*conds, *unconds):
            call |= {key: call[key][None] for key in ("img_ids", "txt_ids")}
    names = tiny.FAMILIES[name].names
    answers = []
    for cond, other in zip(conds, unconds, strict=True):
        uncond = {**other, **{key: cond[key] for key in names}}
        for context, call in (("cond", cond), ("uncond", uncond)):
            with tiny.context(model, context):
                answers.append(tiny.run_model(model, call))
    return answers


def masks(model: Any) -> dict[str, str]:
    from dicache import get_stats

    return {key: letters(records) for key, records in get_stats(model).contexts.items()}


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


# Between what the two ranks see of their own tokens, so that alone they would not do the same.
THRESHOLDS = {"flux": 0.05, "hunyuan-video": 0.0295, "wan": 0.0435}


def rules_for(name: str, **given: Any) -> DiCacheConfig:
    threshold = {"threshold": THRESHOLDS.get(name, 0.05)}
    return DiCacheConfig(**{**threshold, "num_inference_steps": MODEL_STEPS, **given})


@check
def model(name: str) -> dict[str, Any]:
    """One process, and both orders of cache and context parallelism.

    Args:
        name: A family; with "/sample" every sample decides for itself.
    """
    from dicache import apply_dicache, remove_dicache

    tiny = _tiny()
    name, _, granularity = name.partition("/")
    rules = rules_for(name, granularity=granularity or "batch")
    alone = tiny.build(name)
    apply_dicache(alone, rules)
    expected = generate(alone, name)
    seen: dict[str, Any] = {"whole": masks(alone)}
    remove_dicache(alone)
    plain = generate(alone, name)
    seen["worth"] = distance(expected, plain)
    for order in ("before", "after"):
        shared = tiny.build(name)
        if order == "before":
            apply_dicache(shared, rules)
        split(shared)
        if order == "after":
            apply_dicache(shared, rules)
        with counting() as called:
            found = generate(shared, name)
        seen[order] = masks(shared)
        seen[f"far {order}"] = distance(found, expected)
        seen[f"collectives {order}"] = {each: called.count(each) for each in {*called}}
        remove_dicache(shared)
        seen[f"plain {order}"] = distance(generate(shared, name), plain)
    return seen


@check
def pipeline(name: str) -> dict[str, Any]:
    """Two runs of a pipeline in one process, and with a transformer that is split in between."""
    _tiny()
    import tiny_pipelines

    from dicache import apply_dicache, get_stats

    seen: dict[str, Any] = {}
    latents = {}
    for which in ("whole", "shared"):
        pipe = tiny_pipelines.pipeline(name)
        apply_dicache(pipe, DiCacheConfig(threshold=0.2))
        if which == "shared":
            split(pipe.transformer)
        latents[which] = [tiny_pipelines.run(name, pipe, 10, seed) for seed in range(2)]
        records = get_stats(pipe)["transformer"].contexts
        seen[which] = {key: letters(each) for key, each in records.items()}
    return seen | {"far": distance(latents["shared"], latents["whole"])}


@check
def ten_runs(name: str) -> dict[str, Any]:
    """The masks of ten runs in a row of a model that is split."""
    from dicache import apply_dicache

    shared = _tiny().build(name)
    split(shared)
    apply_dicache(shared, rules_for(name))
    return {"runs": [[generate(shared, name), masks(shared)][1] for _ in range(10)]}


@check
def compiled(name: str) -> dict[str, Any]:
    """As `model`, with compiled blocks."""
    from dicache import apply_dicache

    tiny = _tiny()
    alone, shared = tiny.build(name), tiny.build(name)
    for each in (alone, shared):
        apply_dicache(each, rules_for(name))
    split(shared)
    shared.compile_repeated_blocks(backend="eager")
    expected, found = generate(alone, name), generate(shared, name)
    return {"whole": masks(alone), "shared": masks(shared), "far": distance(found, expected)}


@check
def calibrated(name: str) -> dict[str, Any]:
    """A profile that ranks make together, and the plans that come of it."""
    from dicache import Profile, apply_dicache, calibrate, remove_dicache

    tiny = _tiny()
    alone, shared = tiny.build(name), tiny.build(name)
    split(shared)

    def run(model: Any) -> Callable[[int], Tensor]:
        return lambda index: torch.cat(generate(model, name)[-2:]) * (1 + index)

    expected: Profile = calibrate(alone, run(alone), samples=1, gains=3)
    found: Profile = calibrate(shared, run(shared), samples=1, gains=3)
    seen: dict[str, Any] = {"profile": found.to_dict(), "expected": expected.to_dict()}
    for which, veto in (("veto", 3.0), ("blind", None)):
        rules = DiCacheConfig(
            profile=found, target_speedup=1.4, veto=veto, num_inference_steps=MODEL_STEPS
        )
        answers = {}
        for model in (alone, shared):
            apply_dicache(model, rules)
            with counting() as called:
                answers[model] = generate(model, name)
            seen[f"{which} {'alone' if model is alone else 'shared'}"] = masks(model)
            remove_dicache(model)
        seen[f"{which} far"] = distance(answers[shared], answers[alone])
        seen[f"{which} collectives"] = len(called)
    return seen


@check
def learned(name: str) -> dict[str, Any]:
    """`profile="auto"` in three runs."""
    from dicache import apply_dicache

    tiny = _tiny()
    alone, shared = tiny.build(name), tiny.build(name)
    split(shared)
    seen: dict[str, Any] = {}
    for which, model in (("whole", alone), ("shared", shared)):
        rules = {"profile": "auto", "target_speedup": 1.4, "threshold": None}
        apply_dicache(model, rules_for(name, **rules))
        seen[which] = [[generate(model, name), masks(model)][1] for _ in range(3)]
    return seen


# --- weights in parts -----------------------------------------------------------------------------


def _shard(model: Any, kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for each in model.blocks:
            fully_shard(each, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        for index, each in enumerate(model.blocks):
            model.blocks[index] = FullyShardedDataParallel(each, device_id=torch.device("cpu"))
        return model
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"ffn.net.0.proj": ColwiseParallel(), "ffn.net.2": RowwiseParallel()}
    for each in model.blocks:
        parallelize_module(each, mesh, plan)
    return model


@check
def weights(kind: str) -> dict[str, Any]:
    """Ranks that have a part of the weights each, and of FSDP's other samples."""
    from dicache import apply_dicache

    tiny = _tiny()
    mine = range(2) if kind == "tensor" else [dist.get_rank()]

    def run(model: Any, samples: Any) -> list[Tensor]:
        answers = []
        calls = tiny.calls("wan", MODEL_STEPS)
        first = calls[0]["hidden_states"][1]
        for call in calls:
            call["hidden_states"][1].mul_(0.02).add_(first)  # the second sample hardly moves
            chosen = {
                key: value[list(samples)] if isinstance(value, Tensor) else value
                for key, value in call.items()
            }
            with model.cache_context("cond"):
                answers.append(model(**chosen)[0])
        return answers

    # FSDP 1 puts other modules in the blocks' place, so the cache comes after it.
    orders = ("before", "after") if kind != "fsdp1" else ("after",)
    models = {which: tiny.build("wan") for which in ("whole", "alone", *orders)}
    for which, model in models.items():
        if which == "after":
            models[which] = _shard(model, kind)
        apply_dicache(models[which], rules_for("wan"))
        if which == "before":
            models[which] = _shard(model, kind)
    expected = [each[list(mine)] for each in run(models["whole"], range(2))]
    run(models["alone"], mine)
    seen = {f"far {which}": distance(run(models[which], mine), expected) for which in orders}
    return seen | {which: masks(model) for which, model in models.items()}


# --- original code --------------------------------------------------------------------------------


def _whole(tensor: Tensor, dim: int) -> Tensor:
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, tensor.contiguous())
    return torch.cat(pieces, dim)


def _split_original(model: Any, kind: str) -> None:
    """As the repositories' launchers do it: another `forward` on the instance."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if kind == "hunyuan":
        forward = model.forward

        def mean(part: Tensor) -> Tensor:
            total = part.clone()
            dist.all_reduce(total)
            return total / size

        def new_forward(x: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            for each in (*model.double_blocks, *model.single_blocks):
                each.hybrid_seq_parallel_attn = mean
            out = forward(x.chunk(size, -1)[rank], *args, return_dict=False, **kwargs)
            return {"x": _whole(out, -1)} if return_dict else _whole(out, -1)

        model.forward = new_forward
        for each in model.double_blocks:
            each.hybrid_seq_parallel_attn = mean
        return

    def dit_forward(
        self: Any, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int, y: Any = None
    ) -> list[Tensor]:
        tokens, lengths, grids = self.embed(x, seq_len)
        e = self.times(t[:, None].expand(len(t), seq_len) if kind == "2.2" else t)
        e = e.chunk(size, 1)[rank] if kind == "2.2" else e
        shared: dict[str, Any] = {"e": e, "seq_lens": lengths, "grid_sizes": grids}
        shared |= {"freqs": torch.ones(1024, 4), "context": self.texts(context)}
        tokens = tokens.chunk(size, 1)[rank]
        for each in self.blocks:
            tokens = each(tokens, **shared, context_lens=None)
        return self.unpatchify(_whole(tokens, 1), grids)

    dit_forward.__name__ = "sp_dit_forward" if kind == "2.2" else "usp_dit_forward"
    model.forward = dit_forward.__get__(model)


def _fake_xfuser() -> None:
    names = ("xfuser", "xfuser.core", "xfuser.core.distributed")
    for name in names:
        sys.modules[name] = ModuleType(name)
    group = SimpleNamespace(device_group=dist.group.WORLD)
    sys.modules[names[-1]].get_sp_group = lambda: group  # type: ignore[attr-defined]


@check
def original(kind: str) -> dict[str, Any]:
    """A stand-in in one process, and split before and after the cache was applied."""
    from original_models import ask, build, steps
    from original_models import branches as branches_of

    from dicache import apply_dicache

    if kind != "2.2":
        _fake_xfuser()

    made = branches_of(kind)

    def run_branches(model: Any) -> list[Tensor]:
        return [
            ask(model, _slow(latents, kind), timestep, branch, kind)
            for latents, timestep in steps(kind, MODEL_STEPS)
            for branch in made
        ]

    rules = DiCacheConfig(threshold=0.02, num_inference_steps=MODEL_STEPS)
    alone = build(kind)
    apply_dicache(alone, rules)
    expected = run_branches(alone)
    seen: dict[str, Any] = {"whole": masks(alone)}
    for order in ("before", "after"):
        shared = build(kind)
        if order == "before":
            apply_dicache(shared, rules)
        _split_original(shared, kind)
        if order == "after":
            apply_dicache(shared, rules)
        found = run_branches(shared)
        seen |= {order: masks(shared), f"far {order}": distance(found, expected)}
    return seen


def _slow(latents: Any, kind: str) -> Any:
    """Latents whose last columns, the second rank's tokens of HunyuanVideo, hardly move."""
    whole = torch.stack([*latents]).clone()
    whole[..., whole.shape[-1] // 2 :] *= 0.05
    return whole if kind == "hunyuan" else [*whole]


def main(rank: int, size: int, folder: Path, names: list[str]) -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    seen: dict[str, Any] = {}
    for name in names:
        function, _, argument = name.partition(":")
        started = time.monotonic()
        try:
            seen[name] = CHECKS[function](*([argument] if argument else []))
        except Exception as error:  # the other ranks may be anywhere by now
            seen[name] = {"error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            seen[name] |= {"seconds": time.monotonic() - started}
            (folder / f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
