"""What the stages of sparse.py run, each in a process: `python sparse_tasks.py TASK --device ...`.

Every finding is emitted as it is made, with the hardware and the versions. A case that fails costs
its own row, the others have theirs, and the stage fails at its end. No time without a right result:
sparse attention is compared with plain arithmetic in some rows, the layout operators with the
reference bit by bit, and in every step the blocks and the sparse layers are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import rows
import timing
import torch
from efficiency_caches import Cache, dicache_with, shortened, uncached
from efficiency_runs import Bench, Run, make_mask
from efficiency_tasks import NO_LIMIT_SECONDS, SHARES, guarded
from sparse_models import (
    FULL,
    TINY,
    Size,
    SparseLayers,
    flash_attention,
    sparse_family,
    with_sparse,
)
from stages import Deadline, emit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import dicache
from dicache import DiCacheConfig, apply_sparse_videogen, ops
from dicache.sparse_videogen import attention as sparse
from dicache.sparse_videogen import layout
from dicache.sparse_videogen.masks import block_mask, kept_elements
from dicache.sparse_videogen.profiling import draw_rows, sampled_masks, temporal_heads

DENSITIES = (0.25, 0.2, 0.3)  # the goal's first, should the time run out
STEPS = 50
PROFILING_ROWS = 64
# Of a row's output, relative. With 119,056 equal weights a block of 128 amiss makes an error of
# sqrt(128 / 119,056) = 3.3e-2; what bf16 rounds off is about 4e-3.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
SECONDS_TO_SPARE = 10.0  # for a case with its warm-up
COMPILE_SECONDS = 60.0  # for the two graphs of a block
SAMPLE_SECONDS = 2.0  # of one case
_FEWEST_SAMPLES, _MOST_SAMPLES = 3, 10

# Short runs: at least two steps of every kind.
SHORT_MASKS = {"dense": "CC", "both": "CCRRR", "DiCache": "CCRRR", "sparse": "CC"}


def measure(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Fastest and median time of single calls behind two to warm up, and the peak of memory."""
    call()  # compiles, loads modules, takes memory
    peak = timing.peak_bytes(call, device)
    (each,) = timing.call_seconds(call, device, 1)
    count = max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, int(SAMPLE_SECONDS / each)))
    samples = timing.call_seconds(call, device, count)
    return {
        "fastest_ms": min(samples) * 1e3,
        "median_ms": statistics.median(samples) * 1e3,
        "samples": count,
        "peak_bytes": peak,
    }


class Task:
    """One stage: cases that are tried one after another, and whether one of them failed."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.deadline = Deadline()
        self.failed = False
        self._stands_for = {
            "device": rows.device_name(device),
            "versions": rows.versions()
            | {"diffusers": diffusers.__version__, "dicache": dicache.__version__},
        }

    def emit(self, kind: str, **finding: Any) -> None:
        """A finding with the hardware and the versions."""
        emit({"kind": kind, **finding, **self._stands_for})

    def leave_out(self, case: str, reason: str) -> None:
        """Say that a case has no row, and why."""
        emit({"kind": "left out", "case": case, "reason": reason})

    def attempt(
        self, case: str, measured: Callable[[], Any], needs_s: float = SECONDS_TO_SPARE
    ) -> None:
        """Try a case if there is time for it."""
        if self.deadline.left() < needs_s:
            self.leave_out(case, "no time left")
        elif not guarded(case, self.device, measured):
            self.failed = True

    def attempt_optional(self, case: str, measured: Callable[[], Any]) -> None:
        """Try a case that no goal is about, and that a device need not be able to run."""

        def tolerant() -> None:
            try:
                measured()
            except RuntimeError as error:  # no such kernel, or not enough memory
                self.leave_out(case, str(error).partition("\n")[0])

        self.attempt(case, tolerant)


# --- Attention alone -----------------------------------------------------------------------------


class Attention(Task):
    """One layer's attention on normal random queries, keys and values [1, S, H, D]."""

    def run(self) -> None:
        """Dense first, then what sparse attention consists of, and the whole of it."""
        size, generator = self.size, torch.Generator(self.device).manual_seed(0)
        length = size.video + size.text
        shape = (1, length, *size.heads)
        self.qkv = [
            torch.randn(shape, generator=generator, device=self.device, dtype=size.dtype)
            for _ in range(3)
        ]
        self.rows = self._draw(PROFILING_ROWS)
        self.emit("tokens", video=list(size.grid), text=size.text, shape=list(shape))
        dense = functools.partial(self._dense_row, "dense flash", SDPBackend.FLASH_ATTENTION)
        self.attempt("dense flash", dense)
        dense = functools.partial(self._dense_row, "dense cuDNN", SDPBackend.CUDNN_ATTENTION)
        self.attempt_optional("dense cuDNN", dense)
        self.attempt("layout", self._layout)
        self.attempt("profiling", self._profiling)
        for density in DENSITIES:
            self.attempt(f"sparse {density}", functools.partial(self._sparse, density))

    def _row(self, case: str, call: Callable[[], Any], **facts: Any) -> None:
        self.emit("attention", case=case, **measure(call, self.device), **facts)

    def _draw(self, count: int) -> Tensor:
        drawn = draw_rows(min(count, self.size.video), self.size.video, 0, [0], torch.Generator())
        return drawn[0].to(self.device)

    def _plan(self, density: float) -> sparse.Plan:
        size = self.size
        valid = torch.full((1,), size.text, dtype=torch.int32, device=self.device)
        return sparse.Plan.make(0, size.grid, size.text, valid, density, size.block_size)

    def _dense(self, backend: SDPBackend) -> Callable[[], Tensor]:
        q, k, v = (each.transpose(1, 2) for each in self.qkv)

        def call() -> Tensor:
            with sdpa_kernel(backend):  # an error where it cannot be this one
                return scaled_dot_product_attention(q, k, v)

        return call

    def _dense_row(self, case: str, backend: SDPBackend) -> None:
        """The row says which operator scaled_dot_product_attention became."""
        call = self._dense(backend)
        operators = [name for name in timing.dispatched(call) if "attention" in name]
        self._row(case, call, density=1.0, operator=", ".join(operators))
        if self.device.type == "cuda":
            names = functools.partial(self._kernels, case, call)
            self.attempt_optional(f"{case}, names of kernels", names)

    def _kernels(self, case: str, call: Callable[[], Any]) -> None:
        self.emit("kernels", case=case, names=[name[:200] for name in timing.device_events(call)])

    def _alternating(self) -> Tensor:
        """Every other head is a temporal one."""
        heads = torch.arange(self.size.heads[0], device=self.device, dtype=torch.uint8)
        return (heads % 2)[None]

    def _layout(self) -> None:
        """Both ways, by the operators' body for this device and by the reference's gather."""
        (q, k, v), temporal, plan = self.qkv, self._alternating(), self._plan(DENSITIES[0])
        there, back = (q, k, v, temporal, plan.order), (q, temporal, plan.positions)
        expected = layout.reference_permute_qkv(*there)
        for given, wanted in zip(layout.permute_qkv(*there), expected, strict=True):
            _require(torch.equal(given, wanted), "permute_qkv is not what the reference gives")
        given = layout.permute_tokens(expected[0], temporal, plan.positions)
        _require(torch.equal(given, q), "permute_tokens does not lead back")
        del expected, given, wanted
        for name, call in (
            ("permute q, k, v: operator", lambda: layout.permute_qkv(*there)),
            ("permute q, k, v: reference", lambda: layout.reference_permute_qkv(*there)),
            ("permute back: operator", lambda: layout.permute_tokens(*back)),
            ("permute back: reference", lambda: layout.reference_permute_tokens(*back)),
        ):
            self._row(name, call)

    def _profiling(self) -> None:
        plan = self._plan(DENSITIES[0])
        given = (*self.qkv, self.rows, plan.bounds, plan.positions)
        self._row("profiling", lambda: temporal_heads(*given))

    def _sparse(self, density: float) -> None:
        """Plan, flex_attention alone, with the layout around it, and with the profiling as well."""
        (q, k, v), rows_, plan = self.qkv, self.rows, self._plan(density)
        facts = {"density": density, **self._kept(plan)}
        temporal = temporal_heads(q, k, v, rows_, plan.bounds, plan.positions)
        facts["temporal_heads"] = int(temporal.sum())
        facts["relative_error"] = self._check(plan, temporal)
        half = self._alternating()

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = block_mask(plan.tables, plan.bounds, q.shape[1], plan.block_size)
            heads_first = (each.transpose(1, 2) for each in (q, k, v))
            return sparse._attend(*heads_first, mask).transpose(1, 2)

        def around() -> Tensor:
            output = flex(*layout.permute_qkv(q, k, v, half, plan.order))
            return layout.permute_tokens(output, half, plan.positions)

        whole = functools.partial(sparse.sparse_attention, q, k, v, plan, rows_)
        self._row("sparse: all", whole, **facts)
        self._row("flex_attention", lambda: flex(q, k, v), **facts)
        self._row("flex_attention, layout", around, **facts)
        self._row("plan, once a run", lambda: self._plan(density), **facts)

    def _kept(self, plan: sparse.Plan) -> dict[str, float]:
        """Share of the elements, and of the blocks, that the mask keeps."""
        sink, video_end, valid_end, window = plan.bounds.long()[0]
        kept = kept_elements(int(sink), int(video_end), valid_end, window) / valid_end**2
        some, whole, rows_of_blocks = plan.tables[0], plan.tables[2], plan.tables[0].shape[-1]
        blocks = (some.sum() + whole.sum()) / rows_of_blocks**2
        return {"kept": float(kept), "kept_blocks": float(blocks)}

    def _check(self, plan: sparse.Plan, temporal: Tensor) -> float:
        """Largest relative error of a head's row, against plain arithmetic on the tokens' masks."""
        (q, k, v), length = self.qkv, self.size.video + self.size.text
        ends = torch.tensor([self.size.video, length - 1], device=self.device)
        chosen = torch.cat([self._draw(PROFILING_ROWS), ends])
        masks = sampled_masks(chosen, plan.bounds, plan.positions)[0]  # [3, R, S]
        output, _ = sparse.sparse_attention(q, k, v, plan, self.rows)
        given = output[0, chosen].float()  # [R, H, D]
        wanted = torch.empty_like(given)
        for head, kind in enumerate(temporal[0].tolist()):
            scores = q[0, chosen, head].float() @ k[0, :, head].float().T / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(~masks[1 + kind], -math.inf)
            wanted[:, head] = scores.softmax(dim=-1) @ v[0, :, head].float()
        error = float(((given - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
        _require(error <= TOLERANCES[q.dtype], f"a row of sparse attention is off by {error:.3g}")
        return error


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


# --- One block of each kind ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """A block with what it was given in a sparse step."""

    block: nn.Module
    attention: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plan: Any
    rows: Any

    def bind(self, is_sparse: bool) -> Callable[[], Any]:
        """The block's call, dense or sparse."""

        def call() -> Any:
            processor = self.attention.processor
            processor.plan = self.plan if is_sparse else None
            processor.rows = self.rows if is_sparse else None
            return self.block(*self.args, **self.kwargs)

        return call


class Blocks(Task):
    """A double and a single block of full width, through Sparse VideoGen's own processors."""

    def run(self) -> None:
        """Everything as it is, as diffusers would run it with its mask, then compiled."""
        calls = self._capture()
        for name, call in calls.items():
            self.attempt(f"{name}, eager", functools.partial(self._pair, name, "eager", call))
        for name, call in calls.items():
            row = functools.partial(self._row, name, "eager", "dense, masked", call.bind(False))
            self.attempt_optional(f"{name}, masked", row)
        for name, call in reversed(calls.items()):  # two blocks of three are single ones
            measured = functools.partial(self._pair, name, "compiled", call)
            self.attempt(f"{name}, compiled", measured, COMPILE_SECONDS)

    def _capture(self) -> dict[str, BlockCall]:
        model = self.size.model
        config = {**model.config, "num_layers": 1, "num_single_layers": 1}
        model = dataclasses.replace(model, config=config)
        self.bench = Bench(model, self.device, self.size.dtype)
        self.bench.stop_counting()
        self.transformer = self.bench.transformer
        apply_sparse_videogen(self.bench.pipe, self.size.sparse_config(dense_layers=0))
        found: dict[str, BlockCall] = {}
        names = ("double block", "single block")
        attribute, handles = sparse_family(self.transformer).attention, []
        blocks = [block for block, _ in self.bench.family.blocks(self.transformer)]
        for name, block in zip(names, blocks, strict=True):

            def note(
                module: nn.Module, args: Any, kwargs: Any, name: str = name, block: Any = block
            ) -> None:
                layer = getattr(block, attribute)
                plan, drawn = layer.processor.plan, layer.processor.rows
                found[name] = BlockCall(block, layer, args, kwargs, plan, drawn)

            handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
        with flash_attention(self.transformer):
            self.bench.run("C")
        for handle in handles:
            handle.remove()
        _require(all(call.plan is not None for call in found.values()), "the step was not sparse")
        return found

    def _pair(self, name: str, mode: str, call: BlockCall) -> None:
        with flash_attention(self.transformer):
            if mode == "compiled":
                # On a CPU tracing alone: its code would take longer to make than all the rest.
                backend = "inductor" if self.device.type == "cuda" else "eager"
                call.block.compile(fullgraph=True, backend=backend)
            self._row(name, mode, "dense", call.bind(False))
            self._row(name, mode, "sparse", call.bind(True))

    def _row(self, name: str, mode: str, kind: str, call: Callable[[], Any]) -> None:
        outputs = call()
        finite = all(bool(each.isfinite().all()) for each in outputs)
        _require(finite, "the block's output is not finite")
        del outputs
        density = sparse_family(self.transformer).density if kind == "sparse" else 1.0
        facts = {"block": name, "mode": mode, "attention": kind, "density": density}
        self.emit("block", **facts, **measure(call, self.device))


# --- Steps of the whole model --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepSeconds:
    """Estimated seconds of steps: of the first block alone, and what every block adds."""

    base: float
    dense_block: float
    sparse_block: float

    def of_run(self, name: str, num_blocks: float) -> float:
        """A short run with so many blocks, and a tenth to spare."""
        mask = SHORT_MASKS[name]
        block = self.sparse_block if name in ("sparse", "both") else self.dense_block
        return 1.1 * (len(mask) * self.base + mask.count("C") * num_blocks * block)

    def plan_share(self, left_s: float, num_blocks: int) -> float:
        """The largest share of the blocks with which all short runs fit into this time."""
        for share in SHARES:
            if sum(self.of_run(name, share * num_blocks) for name in SHORT_MASKS) <= left_s:
                return share
        return SHARES[-1]


class Stack(Task):
    """Steps of the pipeline, dense, sparse, cached and both, from short runs with forced masks."""

    def run(self) -> None:
        """One short run each, with as many blocks as there is time for."""
        self.bench = Bench(self.size.model, self.device, self.size.dtype)
        with flash_attention(self.bench.transformer):
            self._describe()
            each = self._estimate()
            left = min(self.deadline.left(), NO_LIMIT_SECONDS) - SECONDS_TO_SPARE
            with shortened(self.bench.transformer, each.plan_share(left, self.bench.num_blocks)):
                for name in SHORT_MASKS:
                    needed = each.of_run(name, self.bench.num_blocks)
                    self.attempt(f"steps, {name}", functools.partial(self._short, name), needed)

    def _describe(self) -> None:
        """The run of 50 steps that the short ones are put together to."""
        transformer = self.bench.transformer
        family = sparse_family(transformer)
        self.emit(
            "schedule",
            title=self.size.model.title,
            blocks=self.bench.num_blocks,
            mask=schedule(),
            leading=leading_steps(family.dense_steps),
            density=family.density,
        )
        emit({"kind": "backends", "status": ops.backend_status()})

    def _estimate(self) -> StepSeconds:
        """Steps of few blocks, which also warm up all that the short runs need."""
        transformer = self.bench.transformer
        with shortened(transformer, 0):
            base = self.bench.run("CCC").step_ms[-1]
        with shortened(transformer, SHARES[-1]):
            more = self.bench.num_blocks - 1
            dense = self.bench.run("CCC").step_ms[-1]
            sparse_ = self.bench.run("CCC", self._cache("sparse", "CCC")).step_ms[-1]
            self.bench.run("CCRR", self._cache("both", "CCRR"))
        blocks = (max(step - base, 0.0) / more / 1e3 for step in (dense, sparse_))
        return StepSeconds(base / 1e3, *blocks)

    def _cache(self, name: str, mask: str) -> Cache:
        cache = functools.partial(dicache_with, "auto") if name in ("DiCache", "both") else uncached
        if name in ("sparse", "both"):
            return with_sparse(self.size.sparse_config(), cache)
        return cache

    def _short(self, name: str) -> None:
        mask = SHORT_MASKS[name]
        layers = SparseLayers(self.bench.transformer)
        try:
            run = self.bench.run(mask, self._cache(name, mask), layers.boundary)
        finally:
            counts = layers.finish()
        deviation = self.bench.deviation(run) or self._sparse_deviation(name, run, counts)
        _require(deviation is None, str(deviation))
        self.emit(
            "steps",
            run=name,
            mask=mask,
            blocks=self.bench.num_blocks,
            computed_ms=_median(run, "C"),
            reused_ms=_median(run, "R"),
            step_ms=run.step_ms,
            sparse_layers=counts,
            peak_bytes=run.peak_bytes,
            **run.held,
        )

    def _sparse_deviation(self, name: str, run: Run, counts: Sequence[int]) -> str | None:
        """A computed sparse step has full attention in its first block, a reused one runs no other.

        So neither a step that fell back to full attention nor one that should have had it passes.
        """
        is_sparse = name in ("sparse", "both")
        for step, (letter, count) in enumerate(zip(run.mask, counts, strict=True)):
            wanted = self.bench.num_blocks - 1 if is_sparse and letter == "C" else 0
            if count != wanted:
                return f"step {step} should have {wanted} sparse layers, and had {count}"
        return None


def schedule() -> str:
    """50 steps: the published retention, then 30 reused steps spread evenly."""
    retained = DiCacheConfig.preset("hunyuan-video").retained_steps(STEPS)
    return make_mask(STEPS, head=retained)


def leading_steps(share: float) -> int:
    """Steps of the run that Sparse VideoGen leaves dense at its start."""
    return math.floor(share * STEPS + 0.5)


def _median(run: Run, letter: str) -> float | None:
    chosen = [ms for kind, ms in zip(run.mask, run.step_ms, strict=True) if kind == letter]
    return statistics.median(chosen) if chosen else None


# --- Command line --------------------------------------------------------------------------------

TASKS: dict[str, type[Attention] | type[Blocks] | type[Stack]] = {
    "attention": Attention,
    "stack": Stack,
    "blocks": Blocks,
}


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
        sparse.COMPILED = False  # compiling for a CPU would take longer than all the rest
    failed = False
    for name in args.tasks:
        task = TASKS[name](TINY if device.type == "cpu" else FULL, device)
        with torch.no_grad():
            task.run()
        failed |= task.failed
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
