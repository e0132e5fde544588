"""Stand-ins and hooks against the released source of the engines, which is read and never imported.

For those who have both wheels unpacked in one folder:

    pip download --no-deps vllm-omni==0.30.0 sglang==0.5.23
    unzip -q -d engines vllm_omni-0.30.0-*.whl && unzip -q -d engines sglang-0.5.23-*.whl
    DICACHE_ENGINES=engines pytest tests/test_serving_releases.py
"""

from __future__ import annotations

import ast
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import serving_engines as engines
from serving_engines import SGLANG, VLLM_OMNI, build
from torch import nn

from dicache.adapters.serving.sglang import ENABLE, RESET
from dicache.driver.families import find_family

FOLDER = os.environ.get("DICACHE_ENGINES")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="DICACHE_ENGINES names no folder")

# The released class of each stand-in for a block whose name is not the release's.
BLOCKS: dict[str, tuple[str, ...]] = {
    "flux": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    "kontext": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    "longcat": ("LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock"),
    "ovis": ("OvisImageTransformerBlock", "OvisImageSingleTransformerBlock"),
    "flux2": ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    "sglang-flux": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    "sglang-qwen": ("QwenImageTransformerBlock",),
    "sglang-hunyuan": ("MMDoubleStreamBlock", "MMSingleStreamBlock"),
}


def tree_of(module: str) -> ast.Module:
    assert FOLDER is not None
    return ast.parse(Path(FOLDER, *module.split(".")).with_suffix(".py").read_text())


def found_in(module: str, name: str) -> Any:
    """A class or function of a module."""
    return next(each for each in tree_of(module).body if getattr(each, "name", None) == name)


def method(kind: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((each for each in kind.body if getattr(each, "name", None) == name), None)


def names_of(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [each.arg for each in (*arguments.args, *arguments.kwonlyargs)]
    return names + ([arguments.kwarg.arg] if arguments.kwarg else [])


def names_here(function: Any) -> list[str]:
    return [*inspect.signature(function).parameters]


@pytest.mark.parametrize("kind", [*VLLM_OMNI, *SGLANG])
def test_a_models_call_is_as_released(kind: str) -> None:
    model = type(build(kind))
    for base in model.__mro__:  # what one does not define itself is its base's
        if "forward" in vars(base) and base is not nn.Module:
            released = method(found_in(base.__module__, base.__name__), "forward")
            assert released is not None
            assert names_of(released) == names_here(base.forward)
            return
    pytest.fail("there is no forward")


@pytest.mark.parametrize("kind", [*VLLM_OMNI, *SGLANG])
def test_blocks_are_called_and_return_as_released(kind: str) -> None:
    model = build(kind)
    family = find_family(model)
    assert family is not None
    owner = next(base for base in type(model).__mro__ if family.is_of(base))
    source = ast.unparse(found_in(owner.__module__, owner.__name__))
    for index, stack in enumerate(family.stacks):
        assert f"self.{stack.attribute}" in source
        here = getattr(model, stack.attribute)[0]
        name = BLOCKS.get(kind, (type(here).__name__,) * 2)[index]
        released = method(found_in(owner.__module__, name), "forward")
        assert released is not None
        assert names_of(released) == names_here(type(here).forward)
        returns = [
            each.value
            for each in ast.walk(released)
            if isinstance(each, ast.Return) and each.value is not None
        ]
        # The last return: some can give other things, if asked for (split_hidden_states).
        widths = {len(each.elts) if isinstance(each, ast.Tuple) else 1 for each in returns}
        assert len(stack.outputs) in widths
        if len(stack.outputs) > 1:
            pairs = [[ast.unparse(e) for e in r.elts] for r in returns if isinstance(r, ast.Tuple)]
            assert list(stack.outputs) in pairs


def test_vllm_omnis_backend_and_choice_are_as_released() -> None:
    base = found_in("vllm_omni.diffusion.cache.base", "CacheBackend")
    for name in ("enable", "refresh", "is_enabled", "__init__"):
        released = method(base, name)
        assert released is not None
        assert names_of(released) == names_here(getattr(engines.CacheBackend, name))
    abstract = {
        each.name
        for each in base.body
        if isinstance(each, ast.FunctionDef)
        and any("abstractmethod" in ast.unparse(d) for d in each.decorator_list)
    }
    assert abstract == engines.CacheBackend.__abstractmethods__
    choose = found_in("vllm_omni.diffusion.cache.selector", "get_cache_backend")
    assert names_of(choose) == names_here(engines.get_cache_backend)
    runner = ast.unparse(tree_of("vllm_omni.diffusion.worker.diffusion_model_runner"))
    assert "from vllm_omni.diffusion.cache.selector import get_cache_backend" in runner
    assert "self.cache_backend = get_cache_backend(self.od_config.cache_backend" in runner
    assert "self.cache_backend.refresh(self.pipeline, num_inference_steps)" in runner
    config = ast.unparse(found_in("vllm_omni.diffusion.data", "DiffusionCacheConfig"))
    for field in ("rel_l1_thresh", "max_warmup_steps", "num_inference_steps", "_extra_params"):
        assert f"{field}: " in config
    sizes = ast.unparse(found_in("vllm_omni.diffusion.data", "DiffusionParallelConfig"))
    for name in ("tensor", "sequence", "pipeline", "cfg"):
        assert f"{name}_parallel_size: int" in sizes
    assert "use_hsdp: bool" in sizes


def test_sglangs_hooks_have_their_targets() -> None:
    module = "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising"
    stage = found_in(module, "DenoisingStage")
    for target in (ENABLE, RESET):
        name = target.rpartition(".")[2]
        assert target == f"{module}.DenoisingStage.{name}"
        released = method(stage, name)
        assert released is not None
        assert names_of(released) == names_here(getattr(engines.DenoisingStage, name))
    both = method(stage, "_maybe_enable_cache_dit_and_torch_compile")
    assert both is not None
    calls = [ast.unparse(each) for each in both.body if isinstance(each, ast.Expr)]
    enable, reset = (
        calls.index(call)
        for call in (
            "self._maybe_enable_cache_dit(num_inference_steps, batch)",
            "self._reset_dit_cache_states(batch)",
        )
    )
    assert enable < reset
    plugins = "sglang.multimodal_gen.runtime.platforms.plugins"
    assert names_of(found_in(plugins, "plugin_hook")) == ["target", "type"]
    kinds = ast.unparse(found_in("sglang.srt.plugins.hook_registry", "HookType"))
    for kind in (engines.HookType.AROUND, engines.HookType.AFTER):
        assert f"{kind.name} = {kind.value!r}" in kinds
    arguments = ast.unparse(
        found_in("sglang.multimodal_gen.runtime.server_args.server_args", "ServerArgs")
    )
    for name in (
        "tp_size",
        "sp_degree",
        "ring_degree",
        "enable_cfg_parallel",
        "use_fsdp_inference",
    ):
        assert f"{name}: " in arguments
    for name in ("_cache_dit_enabled", "transformer", "transformer_2", "scheduler"):
        assert f"self.{name} = " in ast.unparse(stage)


def test_the_entry_points_groups_are_those_that_are_looked_for() -> None:
    assert '"vllm_omni.general_plugins"' in ast.unparse(
        tree_of("vllm_omni.plugins.__init__")
    ).replace("'", '"')
    plugins = ast.unparse(tree_of("sglang.multimodal_gen.runtime.platforms.plugins"))
    assert "'sglang.multimodal_gen.plugins'" in plugins
