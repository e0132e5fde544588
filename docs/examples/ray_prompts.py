"""Draw prompts with Ray Data: actors with a pipeline each, on all GPUs of a cluster.

    pip install --no-build-isolation ".[cli,ray]"
    python docs/examples/ray_prompts.py --actors 2

Without `--model` it draws with the small Flux that ships with the package, on any machine; with
one, an image pipeline's folder or Hub name. A picture depends on its prompt and seed, not on the
actor. What an actor holds is printed at the end: its weights, and beside them the cache while it
draws. Activations come on top; on a GPU the most that was in use is printed, too.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import ray
import torch

from dicache import apply_dicache, get_stats
from dicache.demo import pipelines
from dicache.demo.pictures import to_image

DEMO = "flux"


class Painter:
    """One actor: a pipeline with the cache on it, loaded once."""

    def __init__(self, model: str, steps: int) -> None:
        self.model, self.steps = model, steps
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows it its GPU alone
        if model == DEMO:
            self.pipe: Any = pipelines.load_pipeline(DEMO)
        else:
            from diffusers import DiffusionPipeline

            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            self.pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype)
        self.pipe.to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        apply_dicache(self.pipe)
        modules = (each for each in self.pipe.components.values() if hasattr(each, "parameters"))
        self.weights = sum(p.nbytes for module in modules for p in module.parameters())

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        rows = [
            self._draw(str(prompt), int(seed))
            for prompt, seed in zip(batch["prompt"], batch["seed"], strict=True)
        ]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def _draw(self, prompt: str, seed: int) -> dict[str, Any]:
        """A row: the picture as PNG, and what the cache did."""
        if self.model == DEMO:
            inputs = pipelines.pipeline_inputs(DEMO, prompt, seed, self.steps, device=self.device)
            picture = pipelines.decode(DEMO, self.pipe(**inputs))[0]
        else:
            generator = torch.Generator().manual_seed(seed)
            options = {"num_inference_steps": self.steps, "output_type": "pt"}
            picture = self.pipe(prompt, generator=generator, **options).images[0]
        file = io.BytesIO()
        to_image(picture.float()).save(file, format="PNG")
        stats = get_stats(self.pipe).values()  # one a transformer
        return {
            "prompt": prompt,
            "seed": seed,
            "png": file.getvalue(),
            "reused": sum(each.num_reused for each in stats),
            "weights_bytes": self.weights,
            "cache_bytes": sum(each.cache_bytes for each in stats),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else 0,
            "actor": ray.get_runtime_context().get_actor_id(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO, help="a pipeline's folder or Hub name")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt a line")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--actors", type=int, default=1, help="a GPU each, where there are any")
    parser.add_argument("--out", type=Path, default=Path("dicache-output/ray-prompts"))
    given = parser.parse_args()

    prompts = pipelines.default_prompts(DEMO)
    if given.prompts is not None:
        prompts = [line.strip() for line in given.prompts.read_text().splitlines() if line.strip()]
    given.out.mkdir(parents=True, exist_ok=True)
    items = [{"prompt": text, "seed": seed} for seed, text in enumerate(prompts)]
    # A block a prompt, made here: a task that cuts blocks would need a CPU beside the actors' own.
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    drawn = rows.map_batches(
        Painter,
        fn_constructor_args=(given.model, given.steps),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=given.actors),
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    most: dict[str, tuple[int, int, int]] = {}
    for row in drawn.iter_rows():
        (given.out / f"{row['seed']:04}.png").write_bytes(row["png"])
        print(f"{row['seed']:04}.png: {row['reused']} steps reused, {row['prompt']}", flush=True)
        held = row["weights_bytes"], row["cache_bytes"], row["peak_bytes"]
        most[row["actor"]] = max(held, most.get(row["actor"], held))
    for actor, held in most.items():
        weights, cache, peak = (f"{count / 1e6:.1f} MB" for count in held)
        on_gpu = f", {peak} in use at most" if held[2] else ""
        print(f"actor {actor[:8]}: {weights} of weights + {cache} of cache{on_gpu}")


if __name__ == "__main__":
    main()
