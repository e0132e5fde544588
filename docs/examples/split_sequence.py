"""Several processes that draw one picture: each has a part of its tokens, and they decide as one.

    torchrun --nproc-per-node 2 docs/examples/split_sequence.py

It draws with the small Flux that ships with the package, on CPUs by gloo. The real one, on GPUs:

    torchrun --nproc-per-node 4 docs/examples/split_sequence.py \
        --model black-forest-labs/FLUX.1-dev --prompt "a lighthouse in a storm"

A picture a process is `dicache generate --prompts` (docs/many_prompts.md): there nobody waits for
another inside of the blocks, and each decides for itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline

from dicache import apply_dicache, context_parallel_plan, get_stats
from dicache.demo import pipelines
from dicache.demo.pictures import to_image

DEMO = "flux"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO, help="a pipeline's folder or Hub name")
    parser.add_argument("--prompt", default=pipelines.default_prompts(DEMO)[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("dicache-output/split-sequence"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    on_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    if on_gpus:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    else:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by their number
    pipe = load(given.model, on_gpus)
    pipe.transformer.enable_parallelism(
        config=ContextParallelConfig(ulysses_degree=dist.get_world_size()),
        cp_plan=context_parallel_plan(pipe.transformer),
    )
    apply_dicache(pipe)
    picture = draw(pipe, given)  # on every rank

    masks: list[Any] = [None] * dist.get_world_size()
    stats = get_stats(pipe)["transformer"]
    dist.all_gather_object(masks, stats.mask("cond"))
    if dist.get_rank() == 0:
        to_image(picture).save(given.out / "picture.png")
        for rank, mask in enumerate(masks):
            print(f"rank {rank}: {mask} (C computed, R reused)")
        print(stats.summary())
    dist.destroy_process_group()


def load(model: str, on_gpus: bool) -> Any:
    """A pipeline, on this process's GPU if there are any."""
    if model == DEMO:
        return pipelines.load_pipeline(DEMO).to("cuda" if on_gpus else "cpu")
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16)
    return pipe.to("cuda" if on_gpus else "cpu")


def draw(pipe: Any, given: argparse.Namespace) -> torch.Tensor:
    """A picture [3, H, W] in [0, 1], from the same noise in every process."""
    if given.model == DEMO:
        inputs = pipelines.pipeline_inputs(DEMO, given.prompt, 0, given.steps, device=pipe.device)
        return pipelines.decode(DEMO, pipe(**inputs))[0].cpu()
    options = {"num_inference_steps": given.steps, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    return pipe(given.prompt, generator=generator, **options).images[0].float().cpu()


if __name__ == "__main__":
    main()
