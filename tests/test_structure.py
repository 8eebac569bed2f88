"""Check that the core can be copied out, and that a folder imports only from lower folders."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the commands down. A file imports from its folder and the folders after it.
LAYERS = [
    "train",
    "evaluate",
    "generate",
    "one_page",
    "training",
    "evaluation",
    "adapters",
    "storage",
    "data",
    "model",
    "common",
    "lora",
]
OURS = {*LAYERS, "lora_conformance", "generators", "lesson", "benchmarks", "tests"}


OPTIONAL = {
    "bitsandbytes",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "tokenizers",
    "transformers",
}


def modules(path: Path, nodes: Iterable[ast.AST]) -> set[str]:
    """Return the top-level modules that these nodes of a file import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def imported(path: Path) -> set[str]:
    """Return our top-level modules that a file imports anywhere."""
    return modules(path, ast.walk(ast.parse(path.read_text()))) & OURS


@pytest.mark.parametrize("path", ["lora/config.py", "model/gpt2.py"])
def test_the_config_and_the_model_need_no_other_file(path):
    assert imported(ROOT / path) == set()


def test_the_layer_needs_only_the_config_and_the_guards():
    names = set()
    for file in ("lora/layer.py", "lora/guards.py"):
        nodes = ast.walk(ast.parse((ROOT / file).read_text()))
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.startswith("lora")} == {"lora.config", "lora.guards"}


def test_lora_imports_nothing_but_lora():
    for path in (ROOT / "lora").rglob("*.py"):
        assert imported(path) <= {"lora"}, path


def test_the_referee_imports_nothing_of_this_project():
    for path in (ROOT / "conformance" / "lora_conformance").rglob("*.py"):
        assert imported(path) <= {"lora_conformance"}, path


@pytest.mark.parametrize("folder", LAYERS[4:])
def test_no_folder_imports_from_one_above_it(folder):
    below = set(LAYERS[LAYERS.index(folder) :])
    for path in (ROOT / folder).rglob("*.py"):
        assert imported(path) <= below, path


@pytest.mark.parametrize("folder", [*LAYERS, "lesson/examples"])
def test_optional_packages_are_imported_only_where_they_are_used(folder):
    """They may be missing, and bitsandbytes can print a warning when it is imported."""
    packages = OPTIONAL
    if folder == "lesson/examples":  # examples with models of transformers
        packages = {"bitsandbytes", "peft"}
    paths = [*ROOT.glob(f"{folder}.py"), *(ROOT / folder).rglob("*.py")]
    assert paths
    for path in paths:
        assert not modules(path, ast.parse(path.read_text()).body) & packages, path
