"""The node. ComfyUI imports this module; nothing in dicache does."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .attach import DEFAULT, RULES, apply, config_for


class DiCache(io.ComfyNode):
    """Model in, cached model out."""

    @classmethod
    def define_schema(cls) -> Any:
        """What ComfyUI shows of it."""
        return io.Schema(
            node_id="DiCache",
            display_name="DiCache",
            category="advanced/model",
            description="Reuses steps of a diffusion transformer that its first block predicts.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "rules",
                    options=list(RULES),
                    default=DEFAULT,
                    tooltip="DiCache's own rules, or published ones of a model.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="Larger reuses more. 0 takes the model's own value.",
                ),
                _share("start_percent", 0.0, "Steps before are computed."),
                _share("end_percent", 1.0, "Steps behind are computed."),
                # The last one, and no required one: saved workflows know their widgets by order.
                io.Float.Input(
                    "target_speedup",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Work of the blocks over that of cached runs; 0 is none. The first run "
                    "with a model, steps, sampler, size and guidance computes everything, to plan "
                    "the following ones.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        rules: str,
        threshold: float,
        start_percent: float,
        end_percent: float,
        target_speedup: float = 0.0,
    ) -> Any:
        """A clone of the model with the cache on it."""
        config = config_for(rules, threshold, target_speedup)
        return io.NodeOutput(apply(model, config, start_percent, end_percent))


class DiCacheExtension(ComfyExtension):
    """What ComfyUI asks for nodes."""

    async def get_node_list(self) -> list[type[Any]]:
        """There is one."""
        return [DiCache]


async def comfy_entrypoint() -> DiCacheExtension:
    """Where ComfyUI begins."""
    return DiCacheExtension()


def _share(name: str, default: float, tooltip: str) -> Any:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)
