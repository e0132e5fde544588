"""How fast is Sparse VideoGen, alone and with DiCache? HunyuanVideo at 720p, random weights.

diffusers always gives HunyuanVideo's attention a mask of the text's padding, which flash attention
does not take. Prompts here have no padding, so the mask says nothing, and `flash_attention` leaves
it out: the dense baseline is the faster one.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import models
import timing
import torch
from caches import Applied, Cache, dicache_with, family_of, shortened, uncached
from cases import Cases, emit
from diffusers.models.attention_dispatch import AttentionBackendName
from pipelines import SECONDS_TO_SPARE, SHARES, Bench, Run, make_mask
from stages import Finding
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dicache import (
    DiCacheConfig,
    SparseVideoGenConfig,
    apply_sparse_videogen,
    remove_sparse_videogen,
)
from dicache.sparse_videogen import attention as sparse
from dicache.sparse_videogen.families import SparseFamily, find_sparse_family
from dicache.sparse_videogen.masks import block_mask, kept_elements
from dicache.sparse_videogen.profiling import draw_rows, sampled_masks, temporal_heads

MODEL = "hunyuan-video-720p"
DENSITIES = (0.25, 0.2, 0.3)  # the goal's first, should the time run out
STEPS = 50
PROFILING_ROWS = 64
# Of a row's output, relative. With 119,056 equal weights a block of 128 amiss makes an error of
# sqrt(128 / 119,056) = 3.3e-2; what bf16 rounds off is about 4e-3.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
SAMPLE_SECONDS = 2.0  # of one case
_FEWEST_SAMPLES, _MOST_SAMPLES = 3, 10

# Short runs: at least two steps of every kind.
SHORT_MASKS = {"dense": "CC", "both": "CCRRR", "DiCache": "CCRRR", "sparse": "CC"}


def sparse_family(transformer: nn.Module) -> SparseFamily:
    """The row of Sparse VideoGen's table for this transformer, which must be in it."""
    family = find_sparse_family(transformer)
    assert family is not None, f"{type(transformer).__name__} is in no family"
    return family


def block_size(dry: bool) -> int:
    """Tokens a block of the mask."""
    return 16 if dry else 128


def compile_on(device: torch.device) -> None:
    """Sparse attention is compiled but on a CPU, where that would take longer than all the rest."""
    sparse.COMPILED = device.type != "cpu"


# --- Attention alone -----------------------------------------------------------------------------


def attention(device: torch.device, dry: bool, names: Sequence[str]) -> None:
    """Dense first, then sparse at every density."""
    compile_on(device)
    Attention(device, dry).run()


class Attention:
    """One layer's attention on normal random queries, keys and values [1, S, H, D]."""

    def __init__(self, device: torch.device, dry: bool) -> None:
        model = models.find_model(MODEL, dry)
        self.device, self.cases = device, Cases(device)
        self.dtype, self.block_size = torch.float32 if dry else torch.bfloat16, block_size(dry)
        frames, height, width = model.latents[2:]
        self.grid = (frames, height // 2, width // 2)  # a token is 1 x 2 x 2 places of the latents
        self.video, self.text = math.prod(self.grid), model.text[0]
        self.heads = (model.config["num_attention_heads"], model.config["attention_head_dim"])

    def run(self) -> None:
        """All cases."""
        shape = (1, self.video + self.text, *self.heads)
        generator = torch.Generator(self.device).manual_seed(0)
        self.qkv = [
            torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
            for _ in range(3)
        ]
        self.rows = self._draw(PROFILING_ROWS)
        emit("tokens", video=list(self.grid), text=self.text, shape=list(shape))
        for name, backend, optional in (
            ("dense flash", SDPBackend.FLASH_ATTENTION, False),
            ("dense cuDNN", SDPBackend.CUDNN_ATTENTION, True),
        ):
            measured = functools.partial(self._dense, name, backend)
            self.cases.attempt(name, measured, optional=optional)
        for density in DENSITIES:
            self.cases.attempt(f"sparse {density}", functools.partial(self._sparse, density))

    def _row(self, name: str, call: Callable[[], Any], **facts: Any) -> Finding:
        """Fastest and median time of single calls behind two to warm up, and the peak of memory."""
        call()  # compiles, loads modules, takes memory
        peak = timing.PeakBytes(self.device)
        call()
        facts["peak_bytes"] = peak.read()
        (each,) = timing.call_seconds(call, self.device, 1)
        count = max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, int(SAMPLE_SECONDS / each)))
        samples = timing.call_seconds(call, self.device, count)
        times = {"fastest_ms": min(samples) * 1e3, "median_ms": statistics.median(samples) * 1e3}
        return {"kind": "attention", "row": name, **times, "samples": count, **facts}

    def _draw(self, count: int) -> Tensor:
        drawn = draw_rows(min(count, self.video), self.video, 0, [0], torch.Generator())
        return drawn[0].to(self.device)

    def _plan(self, density: float) -> sparse.Plan:
        valid = torch.full((1,), self.text, dtype=torch.int32, device=self.device)
        return sparse.Plan.make(0, self.grid, self.text, valid, density, self.block_size)

    def _dense(self, name: str, backend: SDPBackend) -> Iterator[Finding]:
        """The row says which operator scaled_dot_product_attention became."""
        q, k, v = (each.transpose(1, 2) for each in self.qkv)

        def call() -> Tensor:
            with sdpa_kernel(backend):  # an error where it cannot be this one
                return scaled_dot_product_attention(q, k, v)

        operators = [each for each in timing.dispatched(call) if "attention" in each]
        yield self._row(name, call, density=1.0, operator=", ".join(operators))

    def _sparse(self, density: float) -> Iterator[Finding]:
        """All of it, flex_attention alone, and the plan."""
        (q, k, v), rows_, plan = self.qkv, self.rows, self._plan(density)
        facts = {"density": density, **self._kept(plan)}
        temporal = temporal_heads(q, k, v, rows_, plan.bounds, plan.positions)
        facts["temporal_heads"] = int(temporal.sum())
        facts["relative_error"] = self._check(plan, temporal)

        def flex() -> Tensor:
            mask = block_mask(plan.tables, plan.bounds, q.shape[1], plan.block_size)
            return sparse._attend(*(each.transpose(1, 2) for each in (q, k, v)), mask)

        whole = functools.partial(sparse.sparse_attention, q, k, v, plan, rows_)
        yield self._row("sparse: all", whole, **facts)
        yield self._row("flex_attention", flex, **facts)
        yield self._row("plan, once a run", lambda: self._plan(density), **facts)

    def _kept(self, plan: sparse.Plan) -> dict[str, float]:
        """Share of the elements, and of the blocks, that the mask keeps."""
        sink, video_end, valid_end, window = plan.bounds.long()[0]
        kept = kept_elements(int(sink), int(video_end), valid_end, window) / valid_end**2
        some, whole, rows_of_blocks = plan.tables[0], plan.tables[2], plan.tables[0].shape[-1]
        blocks = (some.sum() + whole.sum()) / rows_of_blocks**2
        return {"kept": float(kept), "kept_blocks": float(blocks)}

    def _check(self, plan: sparse.Plan, temporal: Tensor) -> float:
        """Largest relative error of a head's row, against plain arithmetic on the tokens' masks."""
        (q, k, v), length = self.qkv, self.video + self.text
        ends = torch.tensor([self.video, length - 1], device=self.device)
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


# --- Steps of the whole model --------------------------------------------------------------------


@contextmanager
def flash_attention(transformer: nn.Module) -> Iterator[None]:
    """The blocks' full attention is flash attention without a mask; an error where it cannot be."""
    layers = _attentions(transformer)
    handles = [each.register_forward_pre_hook(_unmasked, with_kwargs=True) for each in layers]
    backends = [each.processor._attention_backend for each in layers]
    for each in layers:
        each.processor._attention_backend = AttentionBackendName._NATIVE_FLASH
    try:
        yield
    finally:
        for each, handle, backend in zip(layers, handles, backends, strict=True):
            handle.remove()
            each.processor._attention_backend = backend


def _attentions(transformer: nn.Module) -> list[Any]:
    """The attention over the video of every block."""
    name = sparse_family(transformer).attention
    return [getattr(block, name) for block, _ in family_of(transformer).blocks(transformer)]


def _unmasked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": None}


def with_sparse(config: SparseVideoGenConfig, cache: Cache) -> Cache:
    """Sparse VideoGen, a cache on top of it, and a count of each step's really sparse layers."""

    @contextmanager
    def both(pipe: Any, mask: str) -> Iterator[Applied]:
        apply_sparse_videogen(pipe, config)
        counts: list[int] = []

        def count(module: Any, args: tuple[Any, ...]) -> None:
            counts[-1] += getattr(module.processor, "plan", None) is not None

        layers = _attentions(pipe.transformer)
        hooks = [each.register_forward_pre_hook(count) for each in layers]
        try:
            with cache(pipe, mask) as applied:

                def force(step: int) -> None:
                    counts.extend([0] * (step + 1 - len(counts)))
                    applied.force(step)

                yield Applied(force, lambda: {**applied.held(), "sparse_layers": counts})
        finally:
            for hook in hooks:
                hook.remove()
            remove_sparse_videogen(pipe)

    return both


def steps(device: torch.device, dry: bool, names: Sequence[str]) -> None:
    """Steps of the pipeline, dense, sparse, cached and both."""
    compile_on(device)
    with torch.no_grad():
        Steps(device, dry).run()


class Steps:
    """Short runs with forced masks, whose steps a run of 50 is put together from."""

    def __init__(self, device: torch.device, dry: bool) -> None:
        self.cases = Cases(device)
        self.bench = Bench(models.find_model(MODEL, dry), device, dry)
        # Sparse in every step: short runs have no leading ones.
        self.config = SparseVideoGenConfig(dense_steps=0.0, block_size=block_size(dry))

    def run(self) -> None:
        """One short run each, with as many blocks as there is time for."""
        transformer = self.bench.transformer
        family = sparse_family(transformer)
        emit(
            "schedule",
            title=self.bench.model.title,
            blocks=self.bench.num_blocks,
            mask=schedule(),
            leading=leading_steps(family.dense_steps),
            density=family.density,
        )
        with flash_attention(transformer), shortened(transformer, self._share()):
            for name in SHORT_MASKS:
                self.cases.attempt(f"steps, {name}", functools.partial(self._short, name))

    def _share(self) -> float:
        """The share of the blocks for which there is time, from steps of few blocks that warm up.

        As if no step were sparse: nearly all of the time goes to those that are not.
        """
        transformer, total = self.bench.transformer, self.bench.num_blocks
        with shortened(transformer, SHARES[-1]):
            few = self.bench.num_blocks
            step_s = self.bench.run("CCC").step_ms[-1] / 1e3
            for name in ("sparse", "both"):
                self.bench.run("CCRR", self._cache(name))
        return plan_share(self.cases.left() - SECONDS_TO_SPARE, step_s * total / few)

    def _cache(self, name: str) -> Cache:
        cache = functools.partial(dicache_with, "auto") if name in ("DiCache", "both") else uncached
        return with_sparse(self.config, cache) if name in ("sparse", "both") else cache

    def _short(self, name: str) -> Iterator[Finding]:
        run = self.bench.run(SHORT_MASKS[name], self._cache(name))
        deviation = self.bench.deviation(run) or self._sparse_deviation(name, run)
        _require(deviation is None, str(deviation))
        yield {
            "kind": "steps",
            "run": name,
            "mask": run.mask,
            "blocks": self.bench.num_blocks,
            "computed_ms": run.median_ms("C", warm_up=0),
            "reused_ms": run.median_ms("R", warm_up=0),
            "step_ms": run.step_ms,
            "peak_bytes": run.peak_bytes,
            **run.held,
        }

    def _sparse_deviation(self, name: str, run: Run) -> str | None:
        """A computed sparse step has full attention in its first block, a reused one runs no other.

        So neither a step that fell back to full attention nor one that should have had it passes.
        """
        is_sparse = name in ("sparse", "both")
        counts = run.held.get("sparse_layers", [0] * len(run.mask))
        for step, (letter, count) in enumerate(zip(run.mask, counts, strict=True)):
            wanted = self.bench.num_blocks - 1 if is_sparse and letter == "C" else 0
            if count != wanted:
                return f"step {step} should have {wanted} sparse layers, and had {count}"
        return None


def plan_share(left_s: float, step_s: float) -> float:
    """The largest share of the blocks with which the short runs fit, and a tenth to spare."""
    computed = sum(mask.count("C") for mask in SHORT_MASKS.values())
    fitting = (share for share in SHARES if 1.1 * share * computed * step_s <= left_s)
    return next(fitting, SHARES[-1])


def schedule() -> str:
    """50 steps: the published retention, then 30 reused steps spread evenly."""
    retained = DiCacheConfig.preset("hunyuan-video").retained_steps(STEPS)
    return make_mask(STEPS, head=retained)


def leading_steps(share: float) -> int:
    """Steps of the run that Sparse VideoGen leaves dense at its start."""
    return math.floor(share * STEPS + 0.5)
