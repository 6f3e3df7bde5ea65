"""What holds for every script: help with an example, and imports that go one way."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

OURS = {"policy", "prm_model", "rows", "judge", "tasks", "search", "annotate", "train", "evaluate", "similarity"}
# Each file may import, at module level, only files further down: so any can be read without those above it.
ALLOWED = {"rows": set(), "judge": set(), "tasks": {"judge"}, "policy": set(), "prm_model": {"policy", "rows"},
           "train": {"policy", "prm_model", "rows"}, "search": {"policy", "prm_model", "rows", "tasks"},
           "annotate": {"policy", "rows", "tasks"}, "similarity": {"policy", "prm_model", "rows", "tasks"},
           "evaluate": OURS - {"evaluate"}}
SCRIPTS = sorted(f for f in [*ROOT.glob("*.py"), ROOT / "tiny" / "make.py"] if 'if __name__ == "' in f.read_text())


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=lambda f: f.name)
def test_imports_go_one_way(file):
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found & OURS <= ALLOWED[file.stem]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda f: f.name)
def test_help_opens_with_an_example(script):
    out = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout
    assert f"python {script.relative_to(ROOT)}" in out
