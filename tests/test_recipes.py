"""The recipes, line by line with the flags they print, on the tiny world's models."""
import json
import os
import subprocess
import sys

from conftest import ROOT


def recipe(tmp_path, name, **settings):
    """Run a recipe on the tiny world -> (its folder, a function that runs it again and returns what it prints)."""
    errors, run = tmp_path / "errors.json", tmp_path / "run"
    errors.write_text(json.dumps([{"id": f"gsm8k-{i}", "generator": "x", "problem": f"Ann has {i} pens. Now?",
                                   "steps": [f"January: {i}+2={i + 2}", "Answer: 3"], "final_answer_correct": False,
                                   "label": i % 3 - 1} for i in range(12)]))
    settings |= dict(PYTHON=sys.executable, RUN=run, TASK="tiny-math", CODETASK="tiny-code", ERRORS=errors, N=4, K=2,
                     LIMIT=2, EPOCHS=1, VALIDATION=0.3, DTYPE="float32")
    env = {**os.environ, **{k: str(v) for k, v in settings.items()}}

    def again():
        command = ["bash", str(ROOT / "recipes" / name)]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    again()
    return run, again


def test_the_cpu_recipe_runs(tmp_path):
    """From a model's own solutions to a PRM's head on its frozen layers, and the three tests of it."""
    run, again = recipe(tmp_path, "qwen_cpu.sh", MODEL="tiny/A", QUESTIONS=16, CODELIMIT=2, CODEN=2)
    stages = ["annotate", "train", "math", "code", "first-error"]
    assert sorted(f.stem for f in run.glob("*.done")) == sorted(stages)
    assert json.loads((run / "annotate.json").read_text())["kept"] == len((run / "rows.jsonl").read_text().splitlines())
    assert set(json.loads((run / "code.json").read_text())["metrics"]) == {"code"}
    assert again().count("done already") == len(stages)


def test_the_qwen_recipe_runs(tmp_path):
    """qwen_8gpu.sh sets sizes and calls qwen_1gpu.sh: so this runs every line of both, here with one process."""
    run, again = recipe(tmp_path, "qwen_8gpu.sh", PROCESSES=1, TRAINING="--checkpointing", POLICY="tiny/A", VOTERS="tiny/A tiny/C", BASE="tiny/xs",
                        STRATEGIES="best_of_n majority beam", PROBLEMS=16, TOKENS=32, STEPS=12)
    stages = ["annotate", "train", "first-error", "math", "code", "similarity"]
    assert sorted(f.stem for f in run.glob("*.done")) == sorted(stages)
    assert json.loads((run / "annotate.json").read_text())["kept"] == len((run / "rows.jsonl").read_text().splitlines())
    [figures] = json.loads((run / "first-error.json").read_text())["first_error"].values()
    assert figures["solutions"] > 0
    for domain in ("math", "code"):
        found = json.loads((run / f"{domain}.json").read_text())
        assert set(found["metrics"]) == {domain} and found["cost"]["beam"]["policy_generated"] > 0
    assert len(json.loads((run / "similarity.json").read_text())["table"]) >= 4
    assert again().count("done already") == len(stages)
