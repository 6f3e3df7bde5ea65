"""The recipes, line by line with the flags they print, on the tiny world's models."""
import json
import os
import subprocess
import sys

from conftest import ROOT


def test_the_qwen_recipe_runs_with_two_ranks_and_fsdp(tmp_path):
    """qwen_8gpu.sh sets sizes and calls qwen_1gpu.sh: so this runs every line of both."""
    errors = tmp_path / "errors.json"
    errors.write_text(json.dumps([{"id": f"gsm8k-{i}", "generator": "x", "problem": f"Ann has {i} pens. Now?",
                                   "steps": [f"January: {i}+2={i + 2}", "Answer: 3"], "final_answer_correct": False,
                                   "label": i % 3 - 1} for i in range(12)]))
    run = tmp_path / "run"
    settings = dict(PYTHON=sys.executable, RUN=run, PROCESSES=2, POLICY="tiny/A", VOTERS="tiny/A tiny/C",
                    BASE="tiny/xs", TASK="tiny-math", CODETASK="tiny-code", ERRORS=errors,
                    STRATEGIES="best_of_n majority beam", PROBLEMS=16, LIMIT=2, N=4, K=2, TOKENS=32, STEPS=12, EPOCHS=1,
                    VALIDATION=0.3, DTYPE="float32")
    env = {**os.environ, **{k: str(v) for k, v in settings.items()}}
    command = ["bash", str(ROOT / "recipes" / "qwen_8gpu.sh")]
    subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    stages = ["annotate", "train", "first-error", "math", "code", "similarity"]
    assert sorted(f.stem for f in run.glob("*.done")) == sorted(stages)
    assert json.loads((run / "annotate.json").read_text())["kept"] == len((run / "rows.jsonl").read_text().splitlines())
    [figures] = json.loads((run / "first-error.json").read_text())["first_error"].values()
    assert figures["solutions"] > 0
    for domain in ("math", "code"):
        found = json.loads((run / f"{domain}.json").read_text())
        assert set(found["metrics"]) == {domain} and found["cost"]["beam"]["policy_generated"] > 0
    assert len(json.loads((run / "similarity.json").read_text())["table"]) >= 4
    again = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert again.count("done already") == len(stages)
