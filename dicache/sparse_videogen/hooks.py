"""Sparse attention in diffusers models: processors in the blocks, and a hook that plans every call.

Before the transformer runs, the hook is told by the transformer's site where the call stands, as
the cache is, reads the video's geometry off the arguments, and hands every sparse layer the plan of
the call, or none on a dense step. It is one of torch's forward hooks, which offloading leaves alone
where it replaces a model's `forward`.
"""

from __future__ import annotations

import inspect
import math
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.diffusers.attach import cache_on
from ..adapters.diffusers.components import class_names, components_of, is_pipeline
from ..adapters.diffusers.site import Site, find_feature, find_site
from ..core.run import UNTOLD, Timeline
from ..core.warning import warn_user
from ..driver.families import find_family
from ..driver.model import needs_gradients
from .attention import Plan
from .config import SparseVideoGenConfig
from .families import find_sparse_family, supported_classes
from .kept_heads import KeptHeads
from .masks import is_narrow
from .profiling import draw_rows
from .recorder import Recorder
from .stats import SparseVideoGenStats

_SPARSE = "sparse_videogen"
_MOST_PLANS = 4  # a prompt and its negative, of two resolutions
_GPU_BLOCK = 128  # flex_attention's kernels take a block apart in tiles of up to this many tokens


def apply(model: Any, config: SparseVideoGenConfig | None = None) -> None:
    """See `dicache.apply_sparse_videogen`."""
    config = SparseVideoGenConfig() if config is None else config
    if not isinstance(config, SparseVideoGenConfig):
        raise TypeError(f"config is a {type(config).__name__}. Expected a SparseVideoGenConfig.")
    parts = [_SparseTransformer(each, config) for each in _transformers(model)]
    for part in parts:  # only now, so that an error above leaves every transformer as it was
        part.attach(model if is_pipeline(model) else None)


def remove(model: Any) -> None:
    """See `dicache.remove_sparse_videogen`."""
    found = _parts(model).values()
    if not found:
        warn_user(
            f"There is no Sparse VideoGen on this {type(model).__name__}, so nothing was removed."
        )
    for part in found:
        part.detach()


def get_stats(model: Any) -> dict[str, SparseVideoGenStats]:
    """See `dicache.get_sparse_videogen_stats`; a bare transformer's name is "transformer"."""
    recorders = {name: part.recorder for name, part in _parts(model).items()}
    found = {name: each.stats() for name, each in recorders.items() if each is not None}
    if not found:
        missing = "statistics" if recorders else "Sparse VideoGen"
        raise ValueError(
            f"This {type(model).__name__} has no {missing}. Expected one with "
            f"apply_sparse_videogen(..., SparseVideoGenConfig(stats=True)): remove what is there "
            f"and apply that."
        )
    return found


def _transformers(model: Any) -> list[nn.Module]:
    parts = components_of(model).values()
    found = [part for part in parts if find_sparse_family(part) is not None]
    if not found:
        raise ValueError(
            f"Sparse VideoGen does not support {type(model).__name__} ({class_names(model)}). "
            f"Supported transformers: {', '.join(supported_classes())}."
        )
    return found


def _parts(model: Any) -> dict[str, _SparseTransformer]:
    """What there is of ours on a model's components, by their names."""
    parts = {name: find_feature(part, _SPARSE) for name, part in components_of(model).items()}
    return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class _Call:
    """What the arguments of a transformer's call say.

    Attributes:
        grid: Frames, height and width of the video in tokens.
        text: Number of text tokens in the sequence, with padding.
        mask: [B, text] the text's mask, if there is one.
    """

    hidden_states: Tensor
    grid: tuple[int, int, int]
    text: int
    mask: Tensor | None


class _SparseTransformer:
    """Sparse VideoGen on one transformer.

    Raises:
        ValueError: The transformer cannot take it; nothing was changed.
    """

    def __init__(self, transformer: nn.Module, config: SparseVideoGenConfig) -> None:
        if getattr(transformer, "_parallel_config", None) is not None:
            raise ValueError(
                f"This {type(transformer).__name__} is split over several devices "
                f"(enable_parallelism), and Sparse VideoGen needs all tokens of a head in their "
                f"order. Expected a transformer on one device, or leave Sparse VideoGen out: the "
                f"cache works with several."
            )
        family = find_sparse_family(transformer)
        blocks = find_family(transformer)
        assert family is not None and blocks is not None  # _transformers lets no other pass
        self.transformer, self.family = transformer, family
        self.density = family.density if config.density is None else config.density
        steps = family.dense_steps if config.dense_steps is None else config.dense_steps
        self.config = replace(config, density=self.density, dense_steps=steps)
        layers = [getattr(block, family.attention) for block, _ in blocks.blocks(transformer)]
        self._check(layers)
        # The leading layers get a processor, too: compiled code would tell another kind apart.
        self.attentions = layers
        self.processors = [family.sparse_processor(each.processor) for each in layers]
        self.site = find_site(transformer) or Site(transformer, blocks)
        self.timeline: Timeline[None] = Timeline(lambda _: None, config.num_inference_steps)
        parameters = inspect.signature(type(transformer).forward).parameters
        self._places = {name: place for place, name in enumerate(list(parameters)[1:])}
        self._plans: list[tuple[Any, weakref.ref[Tensor] | None, Plan]] = []
        self._generator = torch.Generator()
        self._is_running = False
        self.recorder = Recorder() if config.stats else None
        self.kept = KeptHeads(config.keep_heads) if config.keep_heads > 1 else None
        self._context = ""  # of the call that runs
        for processor in self.processors:
            processor.records = config.stats or config.keep_heads > 1

    def attach(self, pipeline: Any) -> None:
        """Put the processors in and hook the transformer's calls."""
        self.site.add(_SPARSE, self, self.reset, pipeline)
        for attention, processor in zip(self.attentions, self.processors, strict=True):
            attention.set_processor(processor)
        self._handles = (
            self.transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            self.transformer.register_forward_hook(self._after, always_call=True),
        )

    def detach(self) -> None:
        """Leave the transformer as it was before `attach`."""
        self.reset()
        for handle in self._handles:
            handle.remove()
        for attention, processor in zip(self.attentions, self.processors, strict=True):
            if attention.processor is processor:  # else somebody put in another one meanwhile
                attention.set_processor(processor.dense)
        self.site.remove(_SPARSE)

    def _refuse_copy(self, *_: Any) -> Any:
        """Stands for what pickle and deepcopy ask of what hangs on the transformer."""
        raise TypeError(
            "A model with Sparse VideoGen cannot be copied or pickled: diffusers' hooks would run "
            "the original's weights. Call remove_sparse_videogen first, and apply it to both."
        )

    __deepcopy__ = __reduce_ex__ = _refuse_copy

    def reset(self) -> None:
        """Free all state, as when a pipeline ends."""
        self.timeline.reset()
        self._plans.clear()
        if self.kept is not None:
            self.kept.clear()
        self._hand_out(None, None)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_running:  # torch calls `_after` for an error, but not for an interrupt
            self.reset()
            self.site.end_call()
        self._is_running = True
        given = {
            name: kwargs[name] if name in kwargs else args[place]
            for name, place in self._places.items()
            if name in kwargs or place < len(args)
        }
        if given.get("hidden_states") is None:
            return  # the model says what is missing
        where = self.site.where(given)
        visit = self.timeline.visit(where)
        # A second expert goes on where the first one stopped; its own steps begin at 0.
        index = max(visit.index, where.position or 0)
        call = self._read(given)
        plan = self._plan(call) if self._is_sparse(index, call) else None
        self._hand_out(plan, None if plan is None else self._rows(call, index))
        self.site.note(_SPARSE, "dense" if plan is None else "sparse")
        self._context = context = UNTOLD if visit.branch is None else visit.branch.name
        if self.kept is not None and plan is not None:
            batch = call.hidden_states.shape[0]
            for layer in self._sparse_layers():
                known = self.kept.recall(visit.run, context, layer, batch)
                self.processors[layer].kept = known
        if self.recorder is not None:
            self.recorder.begin(visit.run, context, index, self._valid_tokens(call), plan)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._is_running = False
        if cache_on(self.transformer) is None:  # else it ends the call, when it is done itself
            self.site.end_call()
        if output is None:  # the call raised: an aborted run leaves nothing behind
            self.reset()
        else:
            self._gather_heads()
        plan = self.processors[-1].plan
        if plan is not None and plan.misfit:
            plan.misfit = False
            self.timeline.run.warn(
                "misfit",
                "Blocks were called with other tensors than the transformer (a part of the batch, "
                "another length or device), so their attention was computed in full.",
            )
        self._hand_out(None, None)

    def _gather_heads(self) -> None:
        """Keep the kinds of heads that the layers left behind, for those who want them."""
        if self.recorder is not None:
            self.recorder.end(each.heads for each in self.processors)
        if self.kept is None:
            return
        for layer, each in enumerate(self.processors):
            if each.heads is not None and each.heads.shape[1]:  # it ran, and not in full
                self.kept.note(self._context, layer, each.heads, each.kept is not None)

    def _sparse_layers(self) -> range:
        """All but the leading ones and those of a cache's probe, whose gate sees no difference."""
        cache = cache_on(self.transformer)
        probe_depth = 0 if cache is None else cache.config.probe_depth
        return range(max(self.config.dense_layers, probe_depth), len(self.processors))

    def _hand_out(self, plan: Plan | None, rows: Tensor | None) -> None:
        layers = self._sparse_layers()
        for layer, processor in enumerate(self.processors):
            is_sparse = layer in layers
            processor.plan = plan if is_sparse else None
            processor.heads = processor.kept = None
            processor.rows = rows[layer - layers.start] if is_sparse and rows is not None else None

    def _read(self, given: dict[str, Any]) -> _Call:
        hidden_states, name = given["hidden_states"], self.family.text_mask
        sizes = zip(hidden_states.shape[2:], self._patch(), strict=True)
        frames, height, width = (size // patch for size, patch in sizes)
        text = 0 if name is None else given["encoder_hidden_states"].shape[1]
        mask = None if name is None else given.get(name)
        return _Call(hidden_states, (frames, height, width), text, mask)

    def _patch(self) -> tuple[int, int, int]:
        return self.family.patch(self.transformer.config)

    def _is_sparse(self, index: int, call: _Call) -> bool:
        """Whether a call is computed with sparse attention; warns where it cannot be."""
        if call.grid[0] - self.family.sink_frames < 2:  # a picture has no time
            return False
        if self._is_leading(index):
            return False
        if torch.is_grad_enabled() and needs_gradients(self.transformer, call.hidden_states):
            self.timeline.run.warn(
                "gradients",
                "Gradients are recorded, and sparse attention has none to give, so attention is "
                "computed in full. Call the model inside torch.no_grad().",
            )
            return False
        if self.processors[0]._parallel_config is not None:
            self.timeline.run.warn(
                "parallel",
                "The sequence is split over several devices, so attention is computed in full: "
                "Sparse VideoGen needs all tokens of a head in one place.",
            )
            return False
        return True

    def _is_leading(self, index: int) -> bool:
        share, steps = self.config.dense_steps, self.timeline.run.num_steps
        assert share is not None  # the family's, if not the user's
        if share == 0:
            return False
        if steps is None:
            self.timeline.run.warn(
                "num_inference_steps",
                "The number of steps is unknown, and with it which ones are the leading ones, so "
                "attention is computed in full in all of them. Set "
                "SparseVideoGenConfig(num_inference_steps=...), or use apply_sparse_videogen(pipe) "
                "instead of applying it to the transformer.",
            )
            return True
        return index < math.floor(share * steps + 0.5)

    def _plan(self, call: _Call) -> Plan:
        """The plan for this geometry and these prompts, which the calls of a run share."""
        x, mask = call.hidden_states, call.mask
        version = None if mask is None or mask.is_inference() else mask._version
        key = (call.grid, call.text, x.shape[0], x.device, version)
        for known, ref, plan in self._plans:
            same_text = mask is None if ref is None else mask is not None and ref() is mask
            if known == key and same_text:
                return plan
        if x.device.type != "cpu" and self.config.block_size % _GPU_BLOCK:
            raise ValueError(
                f"block_size is {self.config.block_size} on {x.device}. Expected a multiple of "
                f"{_GPU_BLOCK}; smaller blocks are for the CPU."
            )
        family, size, valid = self.family, self.config.block_size, self._valid_text(call)
        self._warn_of_narrow_band(call)
        plan = Plan.make(family.sink_frames, call.grid, call.text, valid, self.density, size)
        entry = (key, None if mask is None else weakref.ref(mask), plan)
        self._plans = [*self._plans[1 - _MOST_PLANS :], entry]
        return plan

    def _warn_of_narrow_band(self, call: _Call) -> None:
        frames, height, width = call.grid
        sink = self.family.sink_frames * height * width
        if is_narrow(sink, call.grid, call.text, self.density):
            self.timeline.run.warn(
                "narrow",
                f"The density is {self.density:g} and the video has {frames} frames of "
                f"{height * width} tokens. Beside what is always kept, that leaves no head as much "
                f"as a frame around its token, and the picture suffers. Raise "
                f"SparseVideoGenConfig(density=...), or draw videos as short as this without it.",
            )

    def _valid_text(self, call: _Call) -> Tensor:
        """int32 [B], how many of the text's tokens are no padding."""
        x = call.hidden_states
        if call.mask is None:
            return torch.full((x.shape[0],), call.text, dtype=torch.int32, device=x.device)
        return call.mask.sum(dim=1, dtype=torch.int32).to(x.device)

    def _valid_tokens(self, call: _Call) -> Tensor:
        """int32 [B], the tokens of the video and of the text that are no padding."""
        return self._valid_text(call) + math.prod(call.grid)

    def _rows(self, call: _Call, index: int) -> Tensor:
        """The sampled queries of every sparse layer in this step: int64 [layers, R]."""
        tokens, device = math.prod(call.grid), call.hidden_states.device
        count = min(self.config.profiling_rows, tokens)
        with torch.inference_mode(False):
            rows = draw_rows(count, tokens, index, self._sparse_layers(), self._generator)
            if device.type == "cuda":
                rows = rows.pin_memory()
            return rows.to(device, non_blocking=True)

    def _check(self, attentions: list[Any]) -> None:
        name, family = type(self.transformer).__name__, self.family
        if find_feature(self.transformer, _SPARSE) is not None:
            raise ValueError(
                f"This {name} has Sparse VideoGen already. Call remove_sparse_videogen first."
            )
        if self.config.dense_layers >= len(attentions):
            raise ValueError(
                f"dense_layers is {self.config.dense_layers} and this {name} has {len(attentions)} "
                f"blocks. Expected fewer dense_layers than blocks."
            )
        others = {type(each.processor).__name__ for each in attentions} - {family.processor}
        if others:
            raise ValueError(
                f"This {name} has the attention processor {sorted(others)[0]}. Expected "
                f"{family.processor}, which Sparse VideoGen replaces and can stand for: put it "
                f"back with set_attn_processor."
            )
