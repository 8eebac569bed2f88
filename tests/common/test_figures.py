"""Pictures are drawn to files with any matplotlib backend."""

import os
import subprocess
import sys

from common.figures import scientific
from training.options import ROOT


def test_a_notebooks_backend_is_not_needed():
    """Jupyter and Colab export a backend to `!make train-lora`. .venv does not contain it."""
    code = "from common.figures import new_figure; new_figure((1, 1)).subplots()"
    environment = os.environ | {"MPLBACKEND": "not installed"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)


def test_numbers_of_all_sizes_are_written_alike():
    assert list(map(scientific, (3e-5, 0.0015, 2.0))) == ["3e-5", "1.5e-3", "2e0"]
