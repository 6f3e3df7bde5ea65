"""Metrics by hand and against brute force; the exhibits and saved samples, small and end to end."""
import itertools
import json
import random
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

import evaluate
from common.metrics import interval, over_runs, paired
from evaluate import anytime, at_budget, first_error_figures, maj_at, pass_at, prm_at


def row(correct, scores=None, answers=None, tokens=10):
    answers = answers or ["7" if c else f"{i}" for i, c in enumerate(correct)]
    scores = scores or [0.5] * len(correct)
    return {"id": "r", "samples": [{"steps": ["x"], "scores": [p], "answer": a, "correct": bool(c), "tokens": tokens}
                                   for c, p, a in zip(correct, scores, answers)]}


def test_pass_at_by_hand():
    assert pass_at(row([1, 0, 0, 0]), 2) == pytest.approx(1 - 3 / 6)  # C(3,2) of C(4,2) pairs miss the right one
    assert pass_at(row([1, 0, 0, 0]), 4) == 1 and pass_at(row([0, 0]), 2) == 0
    assert pass_at(row([0, 0, 1, 0]), 2, "first") == 0 and pass_at(row([0, 0, 1, 0]), 3, "first") == 1


@pytest.mark.parametrize("scores", [[0.1, 0.9, 0.4, 0.7, 0.2], [0.5, 0.9, 0.9, 0.5, 0.5], [0.3] * 5])
def test_prm_at_is_the_mean_over_all_subsets(scores):
    r = row([1, 0, 1, 0, 1], scores)
    for n in range(1, 6):
        brute = statistics.fmean(r["samples"][max(subset, key=lambda i: scores[i])]["correct"]  # ties: the first
                                 for subset in itertools.combinations(range(5), n))
        assert prm_at(r, n) == pytest.approx(brute)
    assert prm_at(r, 1) == pytest.approx(0.6)
    assert prm_at(row([0, 1], [0.2, 0.9]), 1, "first") == 0 and prm_at(row([0, 1], [0.2, 0.9]), 2, "first") == 1


def test_an_unfinished_sample_is_never_preferred():
    r = row([0, 1], [0.9, 0.1])
    r["samples"][0]["end"] = "length"
    assert prm_at(r, 2) == 1


def test_votes_by_hand():
    r = row([0, 0, 1], [0.1, 0.2, 0.9], ["3", "3", "7"])
    assert maj_at(r, 3) == 0 and maj_at(r, 3, how="prod") == 1    # two votes to one; 0.3 against 0.9
    assert maj_at(r, 1) == pytest.approx(1 / 3)
    # of the pairs (3 3), (3 7), (3 7) a tie goes to the first: always 3
    assert maj_at(r, 2) == 0 and maj_at(row([1, 0], answers=["7", "3"]), 2, "first") == 1
    assert maj_at(row([0, 1, 1], answers=[None, None, "7"]), 3) == 1


def test_interval_and_paired_by_hand():
    assert interval([1.0] * 9) == (1, 1, 1)
    value, low, high = interval([0, 1] * 200)
    assert value == 0.5 and abs(low - 0.451) < 0.01 and abs(high - 0.549) < 0.01
    mean, se, z = paired([1, 1, 0, 1], [0, 1, 0, 0])  # differences 1 0 0 1: sd sqrt(1/3), se sqrt(1/12)
    assert mean == 0.5 and se == pytest.approx((1 / 12) ** 0.5) and z == pytest.approx(3 ** 0.5)


def test_intervals_over_training_runs():
    """Problems alone, runs alone, and a difference that is the same in all problems."""
    alike, apart, mixed = [[1.0] * 50] * 3, [[0.0] * 50, [1.0] * 50], [[1.0] * 25 + [0.0] * 25]
    assert over_runs(alike) == (1, 1, 1)
    # a quarter of the draws take one of the runs twice; 0.5 to either side, widened by the root of 2 / 1
    assert over_runs(apart) == pytest.approx((0.5, 0.5 - 0.5 * 2 ** 0.5, 0.5 + 0.5 * 2 ** 0.5))
    value, low, high = over_runs(mixed)
    assert (value, low, high) == pytest.approx((0.5, 0.5 - 1.96 * 0.0707, 0.5 + 1.96 * 0.0707), abs=0.03)
    assert over_runs([[x - 0.25 for x in mixed[0]]], mixed) == pytest.approx((-0.25, -0.25, -0.25))  # paired
    assert evaluate.named(["a=x/1", "a=x/2", "x/3"]) == {"a": ["x/1", "x/2"], "3": ["x/3"]}


def test_budgets_by_hand():
    r = row([0, 1, 0], [0.1, 0.9, 0.5])
    assert at_budget(r, 25) == 1 and at_budget(r, 19) == 0 and at_budget(r, 3) == 0  # 2, 1, and at least 1 sample
    r["curve"] = [(10, 0.1, 0), (40, 0.4, 1)]
    assert [anytime(r, tokens=t) for t in (5, 10, 39, 40)] == [0, 0, 0, 1] and anytime(r, seconds=0.4) == 1


def test_first_errors_by_hand():
    found = [([0.9, 0.2, 0.1], 1), ([0.9, 0.8], 1), ([0.9, 0.9], -1), ([0.4, 0.9], -1)]
    f = first_error_figures(found, 0.5)
    # found in the 1st, missed in the 2nd; silent on the 3rd, false alarm on the 4th: 1/2 and 1/2
    assert (f["erroneous"], f["correct"], f["F1"]) == (0.5, 0.5, 0.5)
    # labelled steps: 2 + 2 + 2 + 2, of which 2 wrong; flagged: .2 and .4
    assert (f["steps"], f["step precision"], f["step recall"]) == (8, 0.5, 0.5)
    # wrong .2 .8 against right .9 .9 .9 .9 .4 .9: 6 + 5 of 12 pairs
    assert f["step AUC"] == pytest.approx(11 / 12)
    silent = first_error_figures(found, 0.0)
    assert (silent["erroneous"], silent["correct"], silent["F1"], silent["step F1"]) == (0, 1, 0, 0)  # no 0 / 0


def test_two_ranks_are_one_and_a_rerun_does_nothing_again(tmp_path, monkeypatch):
    flags = ["--limit", "3", "--N", "4", "--strategies", "best_of_n", "beam", "--dtype", "float32", "--concurrent", "2",
             "--policy", str(TINY / "A")]
    one, two = ([*flags, "--out", str(tmp_path / x), "--json", str(tmp_path / f"{x}.json")] for x in ("one", "two"))
    evaluate.main(one)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "evaluate.py", *two], cwd=ROOT,
                   check=True)
    figures = [json.loads((tmp_path / f"{x}.json").read_text()) for x in ("one", "two")]
    assert figures[0]["metrics"] == figures[1]["metrics"] and figures[0]["beam"] == figures[1]["beam"]
    assert set(figures[0]["metrics"]["math"]["pass"]) == {"1", "2", "4"}
    assert len(list((tmp_path / "one" / "done").iterdir())) == 3  # samples, beam, and as many samples as beam cost
    monkeypatch.setattr(evaluate.search, "solve", None)  # a second run searches nothing
    evaluate.main(one)
    assert json.loads((tmp_path / "one.json").read_text()) == figures[0]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder that the exhibits share: what one has sampled and searched, the next need not."""
    return tmp_path_factory.mktemp("bench")


@pytest.mark.parametrize("exhibit", ["fig4", "fig5", "fig6", "fig3", "table1"])
def test_exhibits_are_drawn(exhibit, bench, capsys):
    many = exhibit == "fig6"  # self-corrections that end right are rare
    evaluate.main(["--exhibit", exhibit, "--limit", "25" if many else "8", "--n", "16" if many else "4", "--widths",
                   "1x2", "--simulations", "2", "--prms", f"Tiny={TINY / 'prm'}", "--policies", f"A={TINY / 'A'}",
                   "--out", str(bench)])
    points = [json.loads(x) for x in (bench / f"{exhibit}.jsonl").read_text().splitlines()]
    assert points and all(p["low"] <= p["value"] <= p["high"] for p in points)
    assert len((bench / f"{exhibit}.md").read_text().splitlines()) == len(points) + 2
    if exhibit != "table1":
        assert (bench / f"{exhibit}.png").stat().st_size > 5000
        assert "<svg" in (bench / f"{exhibit}.svg").read_text()
    if exhibit == "fig6":
        at = {p["x"]: p for p in points if p["series"] == "math, Tiny, corrected"}
        assert at[-2]["value"] > 0.5 > at[-1]["value"] and at[-1]["solutions"] >= at[-1]["problems"] > 0
        assert re.search(r"\n0\.\d+  .*[wW]ait", capsys.readouterr().out)


def test_other_flags_are_another_run_and_the_same_tokens_are_the_same(tmp_path, monkeypatch):
    """What is kept is used again only for what it was made with; a search dearer than the pool gets more samples."""
    flags = ["--limit", "2", "--N", "2", "--task", "tiny-math", "--out", str(tmp_path), "--prms", f"a={TINY / 'prm'}"]
    bench = evaluate.Bench(evaluate.parse(flags)[1])
    pool = bench.run("best_of_n", str(TINY / "A"), str(TINY / "prm"), n=2)
    dear = [{"id": r["id"], "cost": {"policy_generated": 500}} for r in pool]
    more = bench.same_tokens(pool, str(TINY / "A"), str(TINY / "prm"), dear)
    for few, many in zip(pool, more):
        assert [s["steps"] for s in many["samples"][:2]] == [s["steps"] for s in few["samples"]]
        assert sum(s["tokens"] for s in many["samples"]) >= 500 > sum(s["tokens"] for s in few["samples"])
    called = []
    monkeypatch.setattr(evaluate.search, "solve", lambda some, *_: called.append(1) or (None, [
        {"id": p.id, "cost": {}} for p in some]))
    for extra, runs in (([], 1), ([], 1), (["--prune", "0"], 2), (["--K", "8"], 3), (["--simulations", "3"], 3),
                        (["--overwrite"], 4), (["--split", "train"], 5)):
        args = evaluate.parse([*flags, *extra])[1]
        evaluate.Bench(args).run("beam", str(TINY / "A"), str(TINY / "prm"))
        assert len(called) == runs


def test_saved_samples_of_anybody(tmp_path):
    file = tmp_path / "samples.jsonl"
    sample = {"steps": ["6+1=7", "Answer: 7"], "scores": [0.9, 0.8]}
    file.write_text(json.dumps({"id": 1, "question": "What is seven?", "answer": "7", "samples": [
        sample, {"steps": ["Answer: 8"], "scores": [0.1]}]}) + "\n")
    evaluate.main(["--samples", str(file), "--json", str(tmp_path / "x.json"), "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "x.json").read_text())["metrics"]["math"]
    assert metrics["pass"]["1"]["value"] == 0.5 and metrics["prm by prod"]["2"]["value"] == 1
    with pytest.raises(ValueError, match="1 ids occur more than once"):
        evaluate.journaled(None, [{"id": 1}, {"id": 1}], lambda some: some)
    for bad, message in (({"id": 1, "question": "q", "samples": [{"steps": ["a"], "scores": [1, 1]}]}, ":2: 2 scores"),
                         ({"id": 1, "question": "q", "samples": []}, ":2: no samples"), ({"id": 1}, ":2: no question")):
        (tmp_path / "bad.jsonl").write_text(file.read_text() + json.dumps(bad) + "\n")
        with pytest.raises(ValueError, match=f"bad.jsonl{message}"):
            evaluate.read_samples(tmp_path / "bad.jsonl")


def test_a_prm_scores_saved_samples_whatever_scores_they_have(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(
        {"id": 1, "question": "Ann has 7 shells. In January she finds 5. How many now?", "answer": "12", "samples": [
            {"steps": [f"January: 7+5={n}", f"Answer: {n}"], "scores": [p, p]} for n, p in ((11, 0.9), (12, 0.1))]}))
    picked = []
    for extra in ([], ["--score", "--prm", str(TINY / "prm")]):
        evaluate.main(["--samples", str(tmp_path / "samples.jsonl"), "--json", str(tmp_path / "x.json"), "--out",
                       str(tmp_path), *extra])
        metrics = json.loads((tmp_path / "x.json").read_text())["metrics"]["math"]
        picked.append(metrics["prm by prod"]["2"]["value"])
    assert picked == [0, 1]


def test_reference_solutions_that_fail_are_named_before_a_benchmark_is_scored(tmp_path, capsys):
    data = tmp_path / "code.jsonl"
    tests = {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2]}
    data.write_text("".join(json.dumps({"id": f"p{k}", "question": "Add one.", "tests": {
        **tests, "reference": f"def f(x): return x + {k}"}}) + "\n" for k in (1, 2)))
    args = evaluate.parse(["--task", "humaneval+", "--data", str(data), "--out", str(tmp_path)])[1]
    assert len(evaluate.Bench(args).problems) == 2
    assert capsys.readouterr().out == "reference solutions right: 1 of 2\n  p2: wrong answer\n"


def test_first_errors_of_processbench_rows(tmp_path):
    """The shipped PRM finds first wrong steps of sums told in ProcessBench's schema better than guessing."""
    from tiny import world
    rows = []
    for p in world.problems("math", "test", 40, seed=5):
        steps = world.write(p, "A", random.Random(p["id"]))
        labels = world.grade(p, steps)
        rows.append({"id": p["id"], "problem": p["question"], "steps": steps, "generator": "A",
                     "final_answer_correct": labels[-1], "label": labels.index(False) if False in labels else -1})
    file = tmp_path / "pb.json"
    file.write_text(json.dumps(rows))
    evaluate.main(["--first-error", "processbench", "--data", str(file), "--json", str(tmp_path / "x.json"), "--out",
                   str(tmp_path)])
    f = json.loads((tmp_path / "x.json").read_text())["first_error"]
    assert f["F1"] > f["F1 of chance"] + 0.2 and 0 < f["threshold"] < 1 and f["step AUC"] > 0.8


@pytest.mark.parametrize("flags, message", [(["--exhibit", "fig1"], "--prms"), (["--widths", "4"], "KxM"),
                                            (["--n", "0"], "--n must be"), (["--policy", "nowhere"], "nowhere")])
def test_bad_flags_are_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--limit", "1", "--out", str(tmp_path)])
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert stop.value.code == 2 and message in line
