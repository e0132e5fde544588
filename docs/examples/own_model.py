"""A model of your own in a loop of your own: the cache without any framework.

    python docs/examples/own_model.py

The model is made here, with random weights: four blocks over tokens [B, S, D], and a flow that
Euler steps follow. For yours, put its leading blocks into `probe` and the others into `rest`; what
is in `cached` stays. `register_family` (docs/extending.md) is the other way, where `apply_dicache`
is to know the model.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from dicache import DiCacheConfig, DiCacheSession

WIDTH = 32


class Model(nn.Module):
    """Blocks that add to their tokens; the first one is the probe."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.evaluated = 0

    def probe(self, x: Tensor) -> Tensor:
        return self._through(self.blocks[:1], x)

    def rest(self, p: Tensor) -> Tensor:
        return self._through(self.blocks[1:], p)

    def _through(self, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        for block in blocks:
            tokens = tokens + 0.2 * torch.tanh(block(tokens))
            self.evaluated += 1
        return tokens


@torch.no_grad()
def draw(model: Model, noise: Tensor, steps: int, session: DiCacheSession | None = None) -> Tensor:
    """Follow the flow from t = 1 to 0, in Euler steps; with a session, cached."""
    x = noise
    times = torch.linspace(1.0, 0.0, steps + 1).tolist()
    for t, coming in zip(times, times[1:], strict=False):
        tokens = x + t  # an embedding of the time, of a kind
        if session is None:
            y = model.rest(model.probe(tokens))
        else:
            y = cached(model, tokens, session, t, steps)
        x = x + (coming - t) * model.head(y)
    return x


def cached(model: Model, x: Tensor, session: DiCacheSession, t: float, steps: int) -> Tensor:
    """What the last block gives, or what the cache takes for it."""
    with session.step("cond", timestep=t, num_inference_steps=steps) as step:
        p = model.probe(x)
        if step.needs_probe:
            step.probe(x, p)  # decides
        if step.action == "reuse":
            return step.reuse(x)
        y = model.rest(p)
        step.record(x, p, y)
        return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threshold", type=float, default=0.05)
    given = parser.parse_args()

    torch.manual_seed(0)
    model, noise = Model(), torch.randn(1, 64, WIDTH)
    exact = draw(model, noise, given.steps)
    evaluated, model.evaluated = model.evaluated, 0

    session = DiCacheSession(DiCacheConfig(threshold=given.threshold))
    result = draw(model, noise, given.steps, session)
    session.reset()  # frees what it keeps; statistics stay

    off = float((result - exact).norm() / exact.norm())
    print(f"{evaluated} blocks without cache, {model.evaluated} with, relative error {off:.2e}")
    print(session.stats.summary())


if __name__ == "__main__":
    main()
