"""Pictures are drawn to files, whatever shows pictures elsewhere."""

import os
import subprocess
import sys

from training.options import ROOT


def test_a_notebooks_backend_is_not_needed():
    """Jupyter and Colab name theirs to what `!make train-lora` starts; .venv does not have it."""
    code = "import lesson.experiments.diagram as drawn; drawn.subplots(figsize=(1, 1))"
    environment = os.environ | {"MPLBACKEND": "not installed"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
