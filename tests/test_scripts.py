"""What holds for every script: help with an example, and imports that go one way."""
import ast
import importlib
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common import early

# Each floor may import, at module level, only what stands before it: so any file can be read without those above it.
FLOORS = ["early", "run", "formats.converters", "data", "grading.inside", "grading.referee", "grading.programs",
          "grading.sandbox", "grading.judge", "grading.notation", "grading.answers", "formats.loaders",
          "tasks", "node", "driver", "cache", "models", "thinking", "policy", "formats.published", "examples", "server",
          "prm_server", "metrics", "router", "results", "page", "responses", "samples", "first_errors", "solutions",
          "checkpoint"]
FLOORS = [f"common.{name}" for name in FLOORS]
FLOORS += ["tiny.world", "prm_model", "train", "search", "annotate", "similarity", "evaluate"]
FLOORS += ["paper.label_noise", "paper.bars", "paper.drawing", "paper.scaling", "paper.figures", "tiny.make"]
FLOORS += ["beyond.rollouts", "beyond.distil", "beyond.reinforce", "beyond.hacking"]
FILES = [ROOT / (name.replace(".", "/") + ".py") for name in FLOORS]
SCRIPTS = sorted(f for folder in (".", "tiny", "paper", "common", "benchmarks", "beyond") for f in (ROOT / folder).glob("*.py")
                 if 'if __name__ == "' in f.read_text())


def test_every_file_has_a_floor():
    found = {f for folder in (".", "tiny", "paper", "beyond") for f in (ROOT / folder).glob("*.py")}
    found |= set((ROOT / "common").rglob("*.py"))
    assert {f for f in found if f.name != "__init__.py"} == set(FILES)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_one_way(name):
    found = set()
    for node in ast.parse(FILES[FLOORS.index(name)].read_text()).body:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    assert found & set(FLOORS) <= set(FLOORS[:FLOORS.index(name)])


def test_a_script_is_a_module_too_in_a_prompt_of_this_folder():
    """README, Fork me: `import search` where no script runs, which must rehearse none."""
    code = "import search, prm_model; print(search.arg_max([1, 3, 2]))"
    for how in (["-c", code], ["-"]):  # and in a pipe
        done = subprocess.run([sys.executable, *how], cwd=ROOT, capture_output=True, text=True, input=code)
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize("file, ours", [("search.py", True), ("paper/figures.py", True), ("my_fork.py", False),
                                        ("<stdin>", False), (None, False), ("tests/search.py", False)])
def test_a_forks_own_script_is_not_rehearsed(file, ours):
    assert early.is_script(file and ROOT / file) is ours


@pytest.mark.parametrize("flags, code", [("--help", 0), ("--nonsense 1", 2), ("--strategy beam --n 0", 2)])
@pytest.mark.parametrize("script", ["search", "train", "annotate", "prm_model", "evaluate", "similarity"])
def test_flags_are_read_before_torch_is_imported(script, flags, code, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemError('torch was imported')")
    (tmp_path / "transformers.py").write_text("raise SystemError('transformers was imported')")
    run = subprocess.run([sys.executable, f"{script}.py", *flags.split()], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (run.returncode, len(run.stderr.splitlines())) == (code, code // 2)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda f: f.name)
def test_help_opens_with_an_example(script, capsys):
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    module = script.parent.name in ("common", "paper", "beyond")
    command = f"python -m {name}" if module else f"python {script.relative_to(ROOT)}"
    assert stop.value.code == 0
    assert command in capsys.readouterr().out
