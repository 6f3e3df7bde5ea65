"""Metrics by hand and against brute force; sample rows, made once, and anybody's."""
import itertools
import json
import random
import statistics

import pytest
from conftest import TINY, run_ranks

import evaluate
from common.metrics import interval, over_runs, paired, wilson
from common.run import journaled
from common.samples import Bench, name_of, read_samples
from evaluate import first_error_figures, maj_at, pass_at, prm_at


def row(correct, scores=None, answers=None, tokens=10):
    answers = answers or ["7" if c else f"{i}" for i, c in enumerate(correct)]
    scores = scores or [0.5] * len(correct)
    return {"id": "r", "samples": [
        {"steps": ["x"], "scores": [p], "answer": a, "correct": bool(c), "tokens": tokens}
        for c, p, a in zip(correct, scores, answers)]}


def bench_of(flags):
    parser, args = evaluate.parse([str(flag) for flag in flags])
    return Bench(parser, args, evaluate.load_prm, evaluate.search.solve)


def read(file, *flags):
    return read_samples(evaluate.parse(["--samples", str(file), *flags])[1])


# ---------------------------------------------------------------- metrics

@pytest.mark.parametrize("correct, n, want", [
    ([1, 0, 0, 0], 2, 1 - 3 / 6),  # C(3,2) of the C(4,2) pairs miss the right one
    ([1, 0, 0, 0], 4, 1), ([0, 0], 2, 0)])
def test_pass_at_by_hand(correct, n, want):
    assert pass_at(row(correct), n) == pytest.approx(want)


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("scores", [[0.1, 0.9, 0.4, 0.7, 0.2], [0.5, 0.9, 0.9, 0.5, 0.5],
                                    [0.3] * 5], ids=["different", "ties", "equal"])
def test_prm_at_is_the_mean_over_all_subsets(scores, n):
    r = row([1, 0, 1, 0, 1], scores)
    brute = []
    for subset in itertools.combinations(range(5), n):
        best = max(subset, key=lambda i: scores[i])  # ties: the first
        brute.append(r["samples"][best]["correct"])
    assert prm_at(r, n) == pytest.approx(statistics.fmean(brute))


def test_an_unfinished_sample_is_never_preferred():
    r = row([0, 1], [0.9, 0.1])
    r["samples"][0]["end"] = "length"
    assert prm_at(r, 2) == 1


VOTE = row([0, 0, 1], [0.1, 0.2, 0.9], ["3", "3", "7"])


@pytest.mark.parametrize("sampled, n, how, want", [
    (VOTE, 3, None, 0),     # two votes to one
    (VOTE, 3, "prod", 1),   # 0.3 against 0.9
    (VOTE, 1, None, 1 / 3),
    (VOTE, 2, None, 0),     # of the pairs (3 3), (3 7), (3 7) a tie goes to the first: always 3
    (row([1, 0], answers=["7", "3"]), 2, None, 1),
    (row([0, 1, 1], answers=[None, None, "7"]), 3, None, 1)])  # no answer is no vote
def test_votes_by_hand(sampled, n, how, want):
    assert maj_at(sampled, n, how=how) == pytest.approx(want)


# ---------------------------------------------------------------- intervals

# z²/n = 3.8416 / n. 6 of 6: centre (1 + 0.3201) / 1.6403 = 0.8048, half 0.3201 / 1.6403
@pytest.mark.parametrize("right, n, low, high", [
    (6, 6, 0.6097, 1.0), (0, 6, 0.0, 0.3903), (5, 10, 0.2366, 0.7634)])
def test_wilson_by_hand(right, n, low, high):
    assert wilson(right, n) == pytest.approx((right / n, low, high), abs=1e-4)
    assert interval([1] * right + [0.0] * (n - right)) == wilson(right, n)


def test_what_is_no_share_is_bootstrapped():
    assert interval([0.25] * 9) == (0.25, 0.25, 0.25)
    value, low, high = interval([0, 0.5] * 200)  # sd 0.25, se 0.0125
    assert (value, low, high) == pytest.approx((0.25, 0.2255, 0.2745), abs=0.005)


def test_paired_by_hand():
    mean, se, z = paired([1, 1, 0, 1], [0, 1, 0, 0])  # 1 0 0 1: sd sqrt(1/3), se sqrt(1/12)
    assert (mean, se, z) == pytest.approx((0.5, (1 / 12) ** 0.5, 3 ** 0.5))


SPLIT = [1.0] * 25 + [0.0] * 25


@pytest.mark.parametrize("runs, base, want, within", [
    ([[1.0] * 50] * 3, None, wilson(50, 50), 1e-9),      # runs that are alike are one run
    ([SPLIT], None, wilson(25, 50), 1e-9),               # of problems alone
    # of runs alone: a quarter of the draws take one of the two twice; 0.5 to either side, widened
    # by the root of 2 / 1
    ([[0.0] * 50, [1.0] * 50], None, (0.5, 0.5 - 0.5 * 2 ** 0.5, 0.5 + 0.5 * 2 ** 0.5), 1e-9),
    ([[x / 2 for x in SPLIT]], None, (0.25, 0.25 - 0.98 * 0.0707, 0.25 + 0.98 * 0.0707), 0.02),
    ([[x - 0.25 for x in SPLIT]], [SPLIT], (-0.25, -0.25, -0.25), 1e-9)],  # paired
    ids=["alike", "one share", "runs apart", "one mean", "difference"])
def test_intervals_over_training_runs(runs, base, want, within):
    assert over_runs(runs, base) == pytest.approx(want, abs=within)


# ---------------------------------------------------------------- first errors

STEPS = [([0.9, 0.2, 0.1], 1), ([0.9, 0.8], 1), ([0.9, 0.9], -1), ([0.4, 0.9], -1)]


@pytest.mark.parametrize("key, want", [
    # found in the 1st, missed in the 2nd; silent on the 3rd, false alarm on the 4th
    ("erroneous", 0.5), ("correct", 0.5), ("F1", 0.5),
    # labelled steps: 2 + 2 + 2 + 2, of which 2 wrong; flagged: .2 and .4
    ("steps", 8), ("step precision", 0.5), ("step recall", 0.5),
    ("step AUC", 11 / 12)])  # wrong .2 .8 against right .9 .9 .9 .9 .4 .9: 6 + 5 of 12 pairs
def test_first_errors_by_hand(key, want):
    assert first_error_figures(STEPS, 0.5)[key] == pytest.approx(want)


@pytest.mark.parametrize("key, want", [("erroneous", 0), ("correct", 1), ("F1", 0), ("step F1", 0)])
def test_a_prm_that_calls_nothing_wrong_divides_by_no_zero(key, want):
    assert first_error_figures(STEPS, 0.0)[key] == want


def test_first_errors_of_processbench_rows(tmp_path):
    """The shipped PRM finds first wrong steps in ProcessBench's schema better than guessing."""
    from tiny import world
    rows = []
    for p in world.problems("math", "test", 40, seed=5):
        steps = world.write(p, "A", random.Random(p["id"]))
        labels = world.grade(p, steps)
        rows.append({"id": p["id"], "problem": p["question"], "steps": steps, "generator": "A",
                     "final_answer_correct": labels[-1],
                     "label": labels.index(False) if False in labels else -1})
    (tmp_path / "pb.json").write_text(json.dumps(rows))
    evaluate.main(["--first-error", "processbench", "--data", str(tmp_path / "pb.json"),
                   "--json", str(tmp_path / "x.json"), "--out", str(tmp_path)])
    f = json.loads((tmp_path / "x.json").read_text())["first_error"]["processbench"]
    assert f["F1"] > f["F1 of chance"] + 0.2
    assert 0 < f["threshold"] < 1
    assert f["step AUC"] > 0.8


# ---------------------------------------------------------------- rows that are made once

def test_two_ranks_are_one_and_a_rerun_does_nothing_again(tmp_path, monkeypatch):
    flags = ["--limit", "2", "--N", "4", "--strategies", "best_of_n", "beam", "--dtype", "float32",
             "--concurrent", "2", "--policy", str(TINY / "A")]
    one, two = ([*flags, "--out", str(tmp_path / x), "--json", str(tmp_path / f"{x}.json")]
                for x in ("one", "two"))
    evaluate.main(one)
    run_ranks(evaluate.main, two)
    figures = [json.loads((tmp_path / f"{x}.json").read_text()) for x in ("one", "two")]
    assert figures[0]["metrics"] == figures[1]["metrics"]
    assert figures[0]["beam"] == figures[1]["beam"]
    assert set(figures[0]["metrics"]["math"]["pass"]) == {"1", "2", "4"}
    names = ["beam-4x4-tiny-A-tiny-prm", "best_of_n-4-tiny-A-tiny-prm",
             "best_of_n-tokens-tiny-A-tiny-prm"]
    assert sorted(f.stem for f in (tmp_path / "one").glob("*.jsonl")) == names
    monkeypatch.setattr(evaluate.search, "solve", None)  # a second run searches nothing
    evaluate.main(one)
    assert json.loads((tmp_path / "one.json").read_text()) == figures[0]


def test_the_same_tokens_are_the_same_samples_and_then_more(tmp_path):
    bench = bench_of(["--limit", 2, "--N", 2, "--task", "tiny-math", "--out", tmp_path])
    policy, prm = str(TINY / "A"), str(TINY / "prm")
    pool = bench.run("best_of_n", policy, prm)
    dear = [{"id": r["id"], "cost": {"policy_generated": 500}} for r in pool]
    for few, many in zip(pool, bench.same_tokens(pool, policy, prm, dear), strict=True):
        assert few["id"] == many["id"]
        texts = [[s["steps"] for s in r["samples"]] for r in (few, many)]
        assert texts[1][:2] == texts[0]
        spent = [sum(s["tokens"] for s in r["samples"]) for r in (few, many)]
        assert spent[0] < 500 <= spent[1]


@pytest.mark.parametrize("extra, outcome", [
    ([], "kept"), (["--simulations", "3"], "kept"), (["--concurrent", "7"], "kept"),
    (["--K", "8"], "made"),                        # a file of its own: beam-8x4
    (["--overwrite"], "made"), (["--overwrite", "--textbook"], "made"),
    (["--textbook"], "refused"), (["--seed", "1"], "refused"), (["--top-p", "0.5"], "refused")],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_rows_are_kept_for_their_settings_only(extra, outcome, tmp_path, monkeypatch, capsys):
    calls = []

    def solve(some, *_):
        calls.append(1)
        return None, [{"id": p.id, "cost": {}} for p in some]
    monkeypatch.setattr(evaluate.search, "solve", solve)

    def run(extra):
        bench = bench_of(["--limit", 2, "--task", "tiny-math", "--out", tmp_path, *extra])
        bench.run("beam", str(TINY / "A"), str(TINY / "prm"))
    run([])
    if outcome == "refused":
        with pytest.raises(SystemExit):
            run(extra)
        assert "was begun with" in capsys.readouterr().err
    else:
        run(extra)
    assert len(calls) == (2 if outcome == "made" else 1)


@pytest.mark.parametrize("path, name", [("runs/a/prm", "a-prm"), (str(TINY / "prm"), "tiny-prm"),
                                        ("http://localhost:8000/v1", "localhost-8000-v1")])
def test_files_are_named_by_two_parts_of_a_path(path, name):
    assert name_of(path) == name


# ---------------------------------------------------------------- anybody's sample rows

SAMPLE = {"steps": ["6+1=7", "Answer: 7"], "scores": [0.9, 0.8]}
SEVEN = {"id": 1, "question": "What is seven?", "answer": "7",
         "samples": [SAMPLE, {"steps": ["Answer: 8"], "scores": [0.1]}]}


def test_saved_samples_of_anybody(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(SEVEN) + "\n")
    evaluate.main(["--samples", str(tmp_path / "samples.jsonl"), "--json", str(tmp_path / "x.json"),
                   "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "x.json").read_text())["metrics"]["math"]
    assert metrics["pass"]["1"]["value"] == 0.5
    assert metrics["prm by prod"]["2"]["value"] == 1


@pytest.mark.parametrize("bad, message", [
    ({"id": 1, "question": "q", "samples": [{"steps": ["a"], "scores": [1, 1]}]}, "2 scores"),
    ({"id": 1, "question": "q", "samples": [{"steps": ["a"], "scores": "x"}]}, "scores: a list"),
    ({"id": 1, "question": "q", "samples": [{"steps": []}]}, "a sample without steps"),
    ({"id": 1, "question": "q", "samples": [{"steps": ["a"], "correct": "x"}]}, "correct: true"),
    ({"id": 2, "question": "q", "answer": "7", "samples": [{"steps": ["a"], "tokens": -5}]}, "tokens: a number from 0"),
    ({**SEVEN, "id": 2, "picked": 9}, "picked: 9 is no index of 2"), ({**SEVEN, "id": 2, "domain": "art"}, "domain: math or"),
    (SEVEN, "id 1 is that of line 1, too"),
    ({"id": 1, "question": "q", "samples": []}, "no samples"), ({"id": 1}, "no question")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_malformed_sample_rows_are_named(bad, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(SEVEN) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl:2: {message}"):
        read(tmp_path / "bad.jsonl")


def test_an_id_twice_is_refused():
    with pytest.raises(ValueError, match="1 ids occur more than once"):
        journaled(None, [{"id": 1}, {"id": 1}], lambda some: some)


@pytest.mark.parametrize("extra, value", [([], 0), (["--score", "--prm", str(TINY / "prm")], 1)],
                         ids=["their scores", "--score"])
def test_a_prm_scores_saved_samples_whatever_scores_they_have(extra, value, tmp_path):
    samples = [{"steps": [f"January: 7+5={n}", f"Answer: {n}"], "scores": [p, p]}
               for n, p in ((11, 0.9), (12, 0.1))]
    question = "Ann has 7 shells. In January she finds 5. How many now?"
    (tmp_path / "samples.jsonl").write_text(json.dumps(
        {"id": 1, "question": question, "answer": "12", "samples": samples}))
    evaluate.main(["--samples", str(tmp_path / "samples.jsonl"), "--json", str(tmp_path / "x.json"),
                   "--out", str(tmp_path), *extra])
    metrics = json.loads((tmp_path / "x.json").read_text())["metrics"]["math"]
    assert metrics["prm by prod"]["2"]["value"] == value


def test_reference_solutions_that_fail_are_named_before_a_benchmark_is_scored(tmp_path, capsys):
    tests = {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2]}
    rows = [{"id": f"p{k}", "question": "Add one.",
             "tests": {**tests, "reference": f"def f(x): return x + {k}"}} for k in (1, 2)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    bench = bench_of(["--task", "humaneval+", "--data", tmp_path / "code.jsonl",
                      "--out", tmp_path])
    assert len(bench.problems) == 2
    assert capsys.readouterr().out == "reference solutions right: 1 of 2\n  p2: wrong answer\n"


@pytest.mark.parametrize("flags, message", [
    (["--n", "0"], "--n must be"), (["--policy", "nowhere"], "nowhere"),
    (["--prm", "a", "b"], "--prm takes one PRM"), (["--no-such-flag"], "--no-such-flag")],
    ids=lambda x: x[0] if isinstance(x, list) else "")
def test_bad_flags_are_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--limit", "1", "--out", str(tmp_path)])
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert stop.value.code == 2
    assert message in line


def test_ctrl_c_can_say_how_to_resume():
    """Two parsers read the flags; the one that reports has all of them."""
    parser, args = evaluate.parse(["--k", "3"])
    assert parser.args is args
    assert (parser.args.out, parser.args.k) == ("runs/evaluate", 3)
