"""The recipes, line by line with the flags they print, on the tiny world's models."""
import json
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, ahead

SETTINGS = {  # of each recipe, beside those of both
    "qwen_cpu.sh": dict(MODEL="tiny/A", QUESTIONS=16, CODELIMIT=2, CODEN=2),
    # sets sizes and calls qwen_1gpu.sh: so this runs every line of both, here with one process
    "qwen_8gpu.sh": dict(PROCESSES=1, TRAINING="--checkpointing", POLICY="tiny/A", VOTERS="tiny/A tiny/C", BASE="tiny/xs",
                         STRATEGIES="best_of_n majority beam", PROBLEMS=16, TOKENS=32, STEPS=12)}


def start(name, folder):
    """The recipe as a process."""
    errors = folder / "errors.json"
    errors.write_text(json.dumps([{"id": f"gsm8k-{i}", "generator": "x", "problem": f"Ann has {i} pens. Now?",
                                   "steps": [f"January: {i}+2={i + 2}", "Answer: 3"], "final_answer_correct": False,
                                   "label": i % 3 - 1} for i in range(12)]))
    settings = SETTINGS[name] | dict(PYTHON=sys.executable, RUN=folder / "run", TASK="tiny-math", CODETASK="tiny-code", N=4, K=2,
                                     ERRORS=errors, LIMIT=2, EPOCHS=1, VALIDATION=0.3, DTYPE="float32")
    return subprocess.Popen(["bash", str(ROOT / "recipes" / name)], env=ENVIRONMENT | {k: str(v) for k, v in settings.items()},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@ahead
def folders(folder):
    """{recipe: its folder} of recipes that have run."""
    folders = {name: folder / name for name in SETTINGS}
    for name in SETTINGS:
        folders[name].mkdir()
        process = start(name, folders[name])
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return folders


def test_the_cpu_recipe_runs(folders):
    """From a model's own solutions to a PRM's head on its frozen layers, and the three tests of it."""
    run = folders["qwen_cpu.sh"] / "run"
    assert sorted(f.stem for f in run.glob("*.done")) == ["annotate", "code", "first-error", "math", "train"]
    assert json.loads((run / "annotate.json").read_text())["kept"] == len((run / "rows.jsonl").read_text().splitlines())
    assert set(json.loads((run / "code.json").read_text())["metrics"]) == {"code"}


def test_the_qwen_recipe_runs(folders):
    run = folders["qwen_8gpu.sh"] / "run"
    assert sorted(f.stem for f in run.glob("*.done")) == ["annotate", "code", "first-error", "math", "similarity", "train"]
    assert json.loads((run / "annotate.json").read_text())["kept"] == len((run / "rows.jsonl").read_text().splitlines())
    [figures] = json.loads((run / "first-error.json").read_text())["first_error"].values()
    assert figures["solutions"] > 0
    for domain in ("math", "code"):
        found = json.loads((run / f"{domain}.json").read_text())
        assert set(found["metrics"]) == {domain}
        assert found["cost"]["beam"]["policy_generated"] > 0
    assert len(json.loads((run / "similarity.json").read_text())["table"]) >= 4


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_done_is_not_done_again(folders, name):
    printed, _ = start(name, folders[name]).communicate()
    assert printed.count("done already") == len(list((folders[name] / "run").glob("*.done")))
