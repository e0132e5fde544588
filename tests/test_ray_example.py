"""The example with Ray actors draws what one process draws, and says what an actor holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from PIL import Image

from dicache import apply_dicache, get_stats
from dicache.demo import pipelines
from dicache.demo.pictures import to_image

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "ray_prompts.py"
STEPS = 12


@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'dicache[ray]'")
def test_actors_draw_what_one_process_draws(tmp_path):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts = ["red circle center on white", "blue ring left on black"]
    path.write_text("\n".join(prompts))
    command = [sys.executable, EXAMPLE, "--prompts", path, "--steps", STEPS, "--out", out]
    environment = {
        **os.environ,
        "HOME": str(tmp_path),  # Ray leaves a token there
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    run = subprocess.run(
        [*map(str, command), "--actors", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]

    pipe = pipelines.load_pipeline("flux")
    apply_dicache(pipe)
    for seed, prompt in enumerate(prompts):
        result = pipe(**pipelines.pipeline_inputs("flux", prompt, seed, STEPS))
        expected = to_image(pipelines.decode("flux", result)[0])
        drawn = Image.open(out / f"{seed:04}.png")
        assert numpy.array_equal(numpy.asarray(drawn), numpy.asarray(expected))
        reused = get_stats(pipe)["transformer"].num_reused
        assert reused > 0 and f"{seed:04}.png: {reused} steps reused, {prompt}\n" in run.stdout
    weights = sum(each.nbytes for each in pipe.transformer.parameters())
    cache = get_stats(pipe)["transformer"].cache_bytes
    found = re.findall(r"actor \w+: ([\d.]+) MB of weights \+ ([\d.]+) MB of cache", run.stdout)
    assert found and set(found) == {(f"{weights / 1e6:.1f}", f"{cache / 1e6:.1f}")}
