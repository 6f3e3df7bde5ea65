"""Rows of other projects, told by their fields; scores that are no probabilities; sets of first errors."""
import json
import math

import pytest

import evaluate
from common import results, tasks
from common.data import read_set
from common.first_errors import read_first_errors, score_first_errors
from common.formats.converters import sample_row
from common.samples import measurable, read_samples

NAMES = ["prm by min", "prm by prod", "wmaj by prod", "maj", "pass"]


def read(tmp_path, rows, *flags):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(evaluate.parse(["--samples", str(tmp_path / "rows.jsonl"), *flags])[1])


def row(*samples, **more):
    return {"id": "a", "question": "q", "answer": "7", "samples": list(samples), **more}


def sample(scores, correct=True, steps=("6+1=7", "Answer: 7"), **more):
    return {"steps": list(steps), "scores": scores, "correct": correct, "answer": "7", **more}


# ------------------------------------------------------------ scores

@pytest.mark.parametrize("scores", [[-0.5, 0.5], [2.0, 3.0], [0.5, 1.0001], [math.nan, 0.5], [math.inf, 0.5]])
@pytest.mark.parametrize("flags, named", [((), "rows.jsonl:1: scores: "), (("--scores", "logits"), "rows.jsonl:1: scores: ")])
def test_what_is_no_probability_is_named_by_file_and_line(scores, flags, named, tmp_path):
    if flags and all(map(math.isfinite, scores)):
        assert read(tmp_path, [row(sample(scores))], *flags)
        return
    with pytest.raises(ValueError, match=named):
        read(tmp_path, [row(sample(scores))], *flags)


@pytest.mark.parametrize("better, worse", [
    (sample([-7.0], end="eos"), sample([6.0], False, end="length")),  # cut off: below all others
    (sample([1.0, 1.5]), sample([-5.0, -6.0], False)),                # 30 would be the larger product
    (sample([0.0, 0.0]), sample([-900.0, 900.0], False))])            # exp() of these overflows
def test_logits_rank_as_their_probabilities(better, worse, tmp_path):
    (read_row,) = read(tmp_path, [row(worse, better)], "--scores", "logits")
    assert evaluate.prm_at(read_row, 2, "prod") == 1


def test_one_score_for_a_solution_is_an_outcome_reward(tmp_path, capsys):
    rows = read(tmp_path, [row(sample([0.7]), sample([0.2], False))])
    assert measurable(rows, NAMES) == ["prm by min", "wmaj by prod", "maj", "pass"]
    assert "outcome reward" in capsys.readouterr().out
    assert evaluate.prm_at(rows[0], 2, "min") == 1


@pytest.mark.parametrize("samples, message", [([sample([0.7]), sample([0.7, 0.8])], "others one in all")])
def test_kinds_of_scores_do_not_mix(samples, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        measurable(read(tmp_path, [row(*samples)]), NAMES)


@pytest.mark.parametrize("more", [{}, {"answer": None}, {"tests": {}}, {"answer": ""}], ids=str)
def test_nothing_to_judge_by_is_no_zero(more, tmp_path):
    bare = {"id": 1, "question": "q", "samples": [{"steps": ["x"]}], **more}
    with pytest.raises(ValueError, match="rows.jsonl:1: nothing to judge by"):
        read(tmp_path, [bare])


def test_a_task_without_answers_is_refused(tmp_path, capsys):
    (tmp_path / "pb.json").write_text(json.dumps([{"id": "x", "problem": "Q", "steps": ["a"], "label": 0}]))
    with pytest.raises(SystemExit):
        evaluate.main(["--task", "processbench", "--data", str(tmp_path / "pb.json"), "--out", str(tmp_path)])
    assert "nothing can be judged" in capsys.readouterr().err


@pytest.mark.parametrize("answer, names", [(None, ["prm by min", "prm by prod", "pass"]), ("7", NAMES)])
def test_without_answers_there_is_no_vote(answer, names, tmp_path):
    rows = read(tmp_path, [row(sample([0.5, 0.5]) | {"answer": answer})])
    assert measurable(rows, NAMES) == names


@pytest.mark.parametrize("flags, want", [(["--N", "1", "3"], ["1", "3"]), (["--N", "2"], ["2"]), ([], ["1", "2", "3"])])
def test_those_n_are_printed_that_are_asked_for(flags, want, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(row(*[sample([0.5, p]) for p in (0.1, 0.2, 0.3)])))
    evaluate.main(["--samples", str(tmp_path / "x.jsonl"), "--json", str(tmp_path / "x.json"), "--out", str(tmp_path), *flags])
    assert list(json.loads((tmp_path / "x.json").read_text())["metrics"]["math"]["pass"]) == want


@pytest.mark.parametrize("n", ["0", "4"])
def test_more_than_there_are_is_an_error(n, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps(row(sample([0.5, 0.5]))))
    with pytest.raises(SystemExit):
        evaluate.main(["--samples", str(tmp_path / "x.jsonl"), "--out", str(tmp_path), "--N", "1", n])
    assert "--n" in capsys.readouterr().err.lower()


# ------------------------------------------------------------ rows of other projects

TWO = ["6+1=7\n\nThe answer is 7.", "The answer is 8."]
POOLS = {
    "search-and-learn": {"problem": "Q", "answer": "7", "unique_id": "u/1", "completions": TWO, "pred": TWO[0],
                         "scores": [[0.9, 0.8], [0.1]], "completion_tokens": [9, 5]},
    "RLHFlow": {"prompt": "Q", "answers": ["6+1=7 ки\nThe answer is 7. ки", "The answer is 8. ки"], "label": [1, 0],
                "step_scores": [[0.9, 0.8], [0.1]]},
    "RLHFlow, outcome": {"prompt": "Q", "answers": TWO, "label": [1, 0], "step_scores": [0.9, 0.1]},
    "Qwen2.5-Math": {"idx": 3, "question": "Q", "gt": "7", "code": TWO, "pred": ["7", "8"], "score": [True, False],
                     "pred_score": [[0.9], [0.1]]},
    "BiRM": {"idx": 3, "question": "Q", "ground_truth": "7", "outputs": [
        {"response": "6+1=7ки\nThe answer is: 7ки", "label": True, "vscores": [0.9, 0.9, 0.9]},
        {"response": "The answer is: 8ки", "label": False, "vscores": [0.1, 0.1]}]}}


@pytest.mark.parametrize("name", POOLS)
def test_pools_are_read_as_they_are(name, tmp_path):
    (pool,) = read(tmp_path, [POOLS[name]])
    assert [len(s["steps"]) for s in pool["samples"]] == [2, 1]
    assert [s["correct"] for s in pool["samples"]] == [True, False]
    assert [s["answer"] for s in pool["samples"]] == ["7", "8"]
    assert evaluate.prm_at(pool, 2) == 1


@pytest.mark.parametrize("name, key, value, message", [
    ("search-and-learn", "scores", [[0.5]], "1 scores for 2 solutions"), ("search-and-learn", "scores", [[0.5], [1] * 3], "3 scores for 1 steps"),
    ("RLHFlow", "answers", [1, 2], "not a row of rlhflow"), ("Qwen2.5-Math", "pred_score", [[3.5], [1.2]], "--scores logits")])
def test_a_pool_that_does_not_fit_is_named(name, key, value, message, tmp_path):
    with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{message}"):
        read(tmp_path, [POOLS[name] | {key: value}])


HUMAN = {"task_id": "HumanEval/0", "entry_point": "add", "prompt": 'def add(a, b):\n    """Add."""\n',
         "canonical_solution": "    return a + b\n", "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}
CODE = [{"task_id": "HumanEval/0", "completion": "    return a + b\n"},
        {"task_id": "HumanEval/0", "solution": "def add(a, b):\n    return a - b\n"}]


def test_evalplus_samples_find_their_tests(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(HUMAN))
    (read_row,) = read(tmp_path, CODE, "--task", "humaneval+", "--data", str(tmp_path / "data.jsonl"))
    assert [s["correct"] for s in read_row["samples"]] == [True, False]


@pytest.mark.parametrize("rows, flags, message", [
    (CODE, [], "programs without tests: --task humaneval"), (CODE, ["--data", "x"], "--task says what it holds"),
    ([{"id": "x", "scores": [0.5]}], [], "--first-error SET")], ids=["no task", "data alone", "scores alone"])
def test_the_flag_that_helps_is_named(rows, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, rows, *flags)


def test_an_answer_is_found_by_the_question(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "One  more\\nthan six?", "answer": "#### 7"}')
    bare = {"id": 5, "question": "One more than six?", "samples": [{"steps": ["The answer is 7"]}]}
    (found,) = read(tmp_path, [bare], "--task", "gsm8k", "--data", str(tmp_path / "data.jsonl"))
    assert found["samples"][0]["correct"]


@pytest.mark.parametrize("task, likely, data", [
    ("math500", "gsm8k", {"question": "Q", "answer": "1+1=2\n#### 2"}), ("gsm8k", "math500", {"problem": "Q", "answer": "2", "level": 2}),
    ("aime24", "math500", {"problem": "Q", "answer": "2", "subject": "Algebra"}), ("mbpp+", "humaneval+", HUMAN),
    ("humaneval+", "mbpp+", {"task_id": 2, "prompt": "Add.", "code": "x = 1", "test_list": ["assert x"]}),
    ("math500", "processbench", {"id": "x", "problem": "Q", "steps": ["a"], "label": 0}),
    ("codecontests", "apps or taco", {"question": "Q", "input_output": "{}", "solutions": "[]"})])
def test_data_of_another_task_is_named(task, likely, data, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"x.jsonl:1: .*no row of {task.replace('+', '.')} but of {likely.replace('+', '.')}"):
        tasks.load(task, data=tmp_path / "x.jsonl")


# ------------------------------------------------------------ sets of first errors

MR = {"id": 4, "question": "Q", "model_output_step_format": [["a", "b"], ["c"]],
      "model_output_solution_correctness": "wrong", "model_output_solution_first_error_step": "2"}
SETS = {
    "processbench": ({"problem": "Q", "steps": ["a", "b", "c"], "label": 1}, [1, 0, None]),
    "processbench, no error": ({"problem": "Q", "steps": ["a", "b"], "label": -1}, [1, 1]),
    "prmbench": ({"question": "Q", "modified_question": "Q", "modified_process": ["a", "b", "c"], "error_steps": [2], "idx": "x"}, [1, 0, 1]),
    "reasoneval": (MR, [1, 0]),
    "math-aps": ({"question": "Q", "process": "a \n\n\n\n\n b \n\n\n\n\n", "label": ["+", "-"]}, [1, 0]),
    "math-aps, a prefix": ({"question": "Q", "process": "a \n\n\n\n\nb \n\n\n\n\n", "label": ["-"]}, [None, 0])}


@pytest.mark.parametrize("name", SETS)
def test_sets_of_step_labels(name, tmp_path):
    data, labels = SETS[name]
    (tmp_path / "x.jsonl").write_text(json.dumps(data))
    [(_, found)] = read_set(str(tmp_path / "x.jsonl"))
    assert (found["prompt"], found["labels"]) == ("Q", labels)


def test_scores_of_another_prm_for_each_sentence(tmp_path):
    """Three classes: wrong, right, right and needed. A step is as good as its worst sentence."""
    (tmp_path / "set.jsonl").write_text(json.dumps(MR))
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": 4, "scores": [[0.1, 0.4, 0.5], [0.3, 0.1, 0.6], [0.8, 0.1, 0.1]]}))
    _, args = evaluate.parse(["--first-error", str(tmp_path / "set.jsonl"), "--samples", str(tmp_path / "p.jsonl")])
    [[(question, p, first)]] = score_first_errors(None, args).values()
    assert (question, first) == ("Q", 1)
    assert p == pytest.approx([0.7, 0.2])


def sorted_set(tmp_path):
    """Erroneous solutions first, as in ProcessBench's files."""
    rows = [{"id": str(i), "problem": f"Q{i}", "steps": ["a", "b"], "label": 0 if i < 20 else -1} for i in range(40)]
    (tmp_path / "pb.json").write_text(json.dumps(rows))
    return str(tmp_path / "pb.json")


@pytest.mark.parametrize("how", ["file", "task"])
def test_a_limit_draws_from_the_whole_file_by_the_seed(how, tmp_path):
    file = sorted_set(tmp_path)
    flags = [file] if how == "file" else ["processbench", "--data", file]

    def firsts(*more):
        [items] = read_first_errors(evaluate.parse(["--first-error", *flags, *more])[1]).values()
        return [item[2] for item in items], [item[0] for item in items]
    assert len(firsts()[0]) == 40
    assert {0, -1} == set(firsts("--limit", "20")[0])
    assert firsts("--limit", "20") == firsts("--limit", "20")
    assert firsts("--limit", "20") != firsts("--limit", "20", "--seed", "1")


def test_a_threshold_takes_all_rows_and_several_sets_have_a_mean(tmp_path, monkeypatch):
    def score(_, args):  # of two sets: F1 1, and F1 2 * 0.5 * 1 / 1.5
        good, bad = ("q", [0.9, 0.1], 1), ("q", [0.4, 0.9], 1)
        return {"x": [good, ("q", [0.9, 0.9], -1)], "y": [good, bad, ("q", [0.9, 0.9], -1)]}
    monkeypatch.setattr(evaluate, "score_first_errors", score)
    figures = evaluate.first_error(None, evaluate.parse(["--first-error", "x", "y", "--threshold", "0.5"])[1])
    assert figures["y"]["solutions"] == 3
    assert figures["mean"]["F1"] == pytest.approx((1 + 2 / 3) / 2)


# by hand: lowest p .1 .4 .8 .6, of which the first two are wrong; at 0.5 all are called right
@pytest.mark.parametrize("threshold, key, want", [
    (0.5, "solution macro F1", 1.0), (0.5, "solution AUC", 1.0), (0.7, "solution macro F1", (2 * 2 / 5 + 2 * 1 / 3) / 2)])
def test_figures_of_solutions(threshold, key, want):
    solutions = [([0.9, 0.1], 1), ([0.4], 0), ([0.8, 0.9], -1), ([0.9, 0.6], -1)]
    assert evaluate.first_error_figures(solutions, threshold)[key] == pytest.approx(want)


def test_a_row_of_ours_stays_as_it_is():
    assert sample_row(ours := row(sample([0.5, 0.5]))) is ours


@pytest.mark.parametrize("values, printed", [([0.125], "0.125"), ([0.5, 0.5], "0.500"), ([1.0], "1.000 [0.21, 1.00]"),
                                             ([1.0, 0.5], "0.750 [0.50, 1.00]")])
def test_an_interval_without_width_is_not_printed(values, printed, capsys):
    results.line("x", values, "")
    assert capsys.readouterr().out.split(maxsplit=1)[1].strip() == printed


def test_samples_without_scores_are_counted(capsys):
    rows = [{"samples": [{"steps": ["a"], "scores": [0.5], "answer": "1"}, {"steps": ["a"], "scores": None, "answer": "1"}]}]
    assert measurable(rows, ["prm by prod", "maj"]) == ["maj"]
    assert "1 of 2 samples have no scores" in capsys.readouterr().out
