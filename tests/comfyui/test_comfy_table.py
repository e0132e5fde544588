"""The table of families says of ComfyUI's models what the tests of this folder show."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_comfy import ROWS, make_model

from dicache.adapters.comfyui.table import find_model


def test_the_table_is_what_the_tests_say():
    script = Path(__file__).parents[1] / "family_table.py"
    command = [sys.executable, str(script), "--check", "tests/comfyui"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ROWS)
def test_a_model_is_of_the_row_that_tests_say(name):
    assert find_model(make_model(name).model.diffusion_model).name == ROWS[name]
