"""The paper's formula on a plain model of ComfyUI's, through torch's own hooks, without dicache.

Every block of every step runs. On a step that a mask calls reused, what the last block returns is
replaced by x + r_old + gamma (r_new - r_old), in double precision; or, where weights are given, by
x + r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (q - q_a). So a run with the twin's hooks on is what
a cached run has to be, sampler and all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Lists of blocks, and where a block's output has the image: its place in a tuple, or in a tensor
# that begins or ends with it.
_WHERE: dict[str, list[tuple[str, int | str]]] = {
    "flux": [("double_blocks", 0), ("single_blocks", "end")],
    "chroma": [("double_blocks", 0), ("single_blocks", "end")],
    "hunyuan_video": [("double_blocks", 0), ("single_blocks", "begin")],
    "wan": [("blocks", "begin")],
    "wan_vace": [("blocks", "begin")],
    "wan_camera": [("blocks", "begin")],
    "qwen_image": [("transformer_blocks", 1)],
    "ltx": [("transformer_blocks", "begin")],
    "sd3": [("joint_blocks", 1)],
}


class Twin:
    """Hooks on a plain model, and what they saw.

    Args:
        mask: A letter a call of the model: R where its blocks' work is replaced, N where a
            history begins anew with a computed one.
        branches: Whose history each call is of, where there are several.
        weights: Those of every call that is replaced, where they are calibrated.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        mask: str,
        probe_depth: int = 1,
        branches: str | None = None,
        weights: Sequence[tuple[float, ...] | None] = (),
    ) -> None:
        diffusion_model = model.model.diffusion_model
        self.blocks = [
            (block, where)
            for attribute, where in _WHERE[name]
            for block in getattr(diffusion_model, attribute)
        ]
        self.mask, self.depth, self.calls = mask, probe_depth, 0
        self.branches = "0" * len(mask) if branches is None else branches
        self.entries: dict[str, list[tuple[Tensor, Tensor]]] = {}  # q and r of computed steps
        self.x = self.p = torch.empty(0)
        self.gammas: list[float] = []
        self.weights = weights

    @contextmanager
    def on(self) -> Iterator[Twin]:
        """Hooks are on the blocks in this context."""
        first, probe, last = self.blocks[0], self.blocks[self.depth - 1], self.blocks[-1]
        hooks = [
            first[0].register_forward_pre_hook(self._note_x, with_kwargs=True),
            probe[0].register_forward_hook(lambda m, a, out: self._note_p(out, probe[1])),
            last[0].register_forward_hook(lambda m, a, out: self._end(out, last[1])),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _note_x(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs.get("img", kwargs.get("hidden_states"))
        if x is None:
            x = args[1] if len(args) > 1 else args[0]  # SD3's blocks take the text first
        self.x = x.double().clone()

    def _note_p(self, out: Any, where: int | str) -> None:
        self.p = self._image(out, where).double().clone()

    def _end(self, out: Any, where: int | str) -> None:
        letter, branch, self.calls = (
            self.mask[self.calls],
            self.branches[self.calls],
            self.calls + 1,
        )
        image, q = self._image(out, where), self.p - self.x
        entries = [] if letter == "N" else self.entries.get(branch, [])
        if letter == "R":
            image.copy_(self.x + self._residual(q, entries))
        else:
            self.entries[branch] = [*entries[-2:], (q, image.double() - self.x)]

    def _residual(self, q: Tensor, entries: list[tuple[Tensor, Tensor]]) -> Tensor:
        """r_old + gamma (r_new - r_old); with one entry there is no line to go along."""
        if self.weights:
            w1, w2, w3 = self.weights[self.calls - 1] or (0.0, 0.0, 0.0)
            # An entry that is not there has no part in it.
            (_, r_c), (_, r_b), (q_a, r_a) = [entries[0]] * (3 - len(entries)) + entries
            return r_a + w1 * (r_a - r_b) + w2 * (r_b - r_c) + w3 * (q - q_a)
        if len(entries) == 1:
            return entries[0][1]
        (q_old, r_old), (q_new, r_new) = entries[-2:]
        a, d = q - q_old, q_new - q_old
        self.gammas.append(min(max(float((a * d).sum() / (d * d).sum()), 0.0), 2.0))
        return r_old + self.gammas[-1] * (r_new - r_old)

    def _image(self, out: Any, where: int | str) -> Tensor:
        """A view of the image in a block's output."""
        if isinstance(where, int):
            return out[where]
        count = self.x.shape[1]
        return out[:, :count] if where == "begin" else out[:, -count:]
