"""What holds for every script: help with an example, and imports that go one way."""
import ast
import importlib

import pytest
from conftest import ROOT

OURS = {file.stem for file in ROOT.glob("*.py")}
# Each file may import, at module level, only files further down: so any can be read without those above it.
ALLOWED = {"rows": set(), "judge": set(), "tasks": {"judge", "rows"}, "policy": set(), "prm_model": {"policy", "rows"},
           "checkpoint": {"rows"}, "train": {"checkpoint", "prm_model", "rows"},
           "search": {"policy", "prm_model", "rows", "tasks"}, "annotate": {"policy", "rows", "tasks"},
           "similarity": {"policy", "prm_model", "rows", "tasks"},
           "evaluate": OURS - {"evaluate"}}
SCRIPTS = sorted(f for f in [*ROOT.glob("*.py"), *(ROOT / "tiny").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
                 if 'if __name__ == "' in f.read_text())


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
def test_help_opens_with_an_example(script, capsys):
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0 and f"python {script.relative_to(ROOT)}" in capsys.readouterr().out
