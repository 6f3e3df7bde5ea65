"""ASLAF on truths that are known: searches against oracles, votes by hand, scripted LLMs."""
import itertools
import json
import math
import time

import pytest
from conftest import TINY, begin, run_ranks

import annotate
from annotate import consensus, first_wrong_steps, linear_scan, monte_carlo, rollout_votes
from common import tasks
from common.node import Node
from common.solutions import Solution, collect, parse_verdict, warn_if_none_is_right

# ---------------------------------------------------------------- the searches, on known truths

def search_all(search, truths, ends_right):
    """Run a search on known truths; truths[i][t]: is prefix 0..t of solution i good?
    -> (first wrong steps, for each solution the t asked about, in order)."""
    asked = [[] for _ in truths]
    paths = [[(i, t) for t in range(len(truth))] for i, truth in enumerate(truths)]

    def estimate(prefixes):
        for i, t in prefixes:
            asked[i].append(t)
        return [float(truths[i][t]) for i, t in prefixes]
    return search(paths, ends_right, estimate)[0], asked


def monotone(T):
    """All truths of T steps where wrong stays wrong; the last is right throughout."""
    return [[t < first for t in range(T)] for first in range(T + 1)]


@pytest.mark.parametrize("T", range(1, 13))
def test_binary_search_is_the_linear_scan_on_every_monotone_truth(T):
    truths, ends_right = monotone(T), [False] * T + [True]
    places, asked = search_all(first_wrong_steps, truths, ends_right)
    assert places == [*range(T), -1]
    assert search_all(linear_scan, truths, ends_right)[0] == places
    for questions in asked:
        assert len(questions) <= math.ceil(math.log2(T))
        assert len(set(questions)) == len(questions)
        assert T - 1 not in questions  # the end of a solution is known without a rollout


@pytest.mark.parametrize("search", [first_wrong_steps, linear_scan])
@pytest.mark.parametrize("T", range(1, 7))
def test_a_solution_that_breaks_off_is_asked_about_to_its_last_step(search, T):
    assert search_all(search, monotone(T), [None] * (T + 1))[0] == [*range(T), -1]


def test_solutions_of_all_lengths_halve_together():
    truths = list(itertools.chain.from_iterable(monotone(T) for T in range(1, 9)))
    ends_right = [truth[-1] for truth in truths]
    alone = [search_all(first_wrong_steps, [truth], [right])
             for truth, right in zip(truths, ends_right)]
    places, asked = search_all(first_wrong_steps, truths, ends_right)
    assert places == [place for [place], _ in alone]
    assert asked == [questions for _, [questions] in alone]


def test_where_wrong_does_not_stay_wrong_the_searches_differ():
    truth = [True, False, True, False, False]  # halves at 1 or 2, according to the length
    assert search_all(linear_scan, [truth], [False])[0] == [1]
    assert search_all(first_wrong_steps, [[True, True, False, True, False]], [False])[0] == [2]
    assert search_all(first_wrong_steps, [[True, False, True, True, False]], [False])[0] == [1]
    assert search_all(first_wrong_steps, [[False, True, True, True, False]], [False])[0] == [4]


# ---------------------------------------------------------------- Monte-Carlo values, by hand

class Script:
    """An LLM whose rollouts are written down: {prefix: [does each sample end right?]}, cycling."""
    separator, prefilled = "\n", 0

    def __init__(self, truth):
        self.truth, self.generated, self.rounds = truth, 0, []

    def root(self, name, question, domain="math"):
        return Node(question, domain=domain)

    def adopt(self, node, text):
        return Node(text, node)

    def complete(self, nodes, counts):
        groups = []
        for node, n in zip(nodes, counts):
            ends = self.truth["".join(node.steps())]
            right = [ends[(node.drawn + i) % len(ends)] for i in range(n)]
            groups.append([Node(f"Answer: {7 if r else 8}", node, [0], end="eos") for r in right])
            node.drawn += n
            self.generated += n
        self.rounds.append(list(counts))
        return groups


SEVEN = tasks.Problem("p", "What is seven?", "math", "7")


def seven(steps, ends_right=False):
    return Solution(SEVEN, steps=list(steps), ends_right=ends_right)


# k = 8: success at the n-th rollout, n = 0: never. Rounds of 1, 1, 2, 4 until it is there.
@pytest.mark.parametrize("success, rounds, value", [
    (1, [1], 1.0), (2, [1, 1], 1 / 2), (3, [1, 1, 2], 1 / 4), (4, [1, 1, 2], 1 / 4),
    (5, [1, 1, 2, 4], 1 / 8), (8, [1, 1, 2, 4], 1 / 8), (0, [1, 1, 2, 4], 0.0)])
def test_rollouts_stop_at_the_first_success(success, rounds, value):
    policy = Script({"a": [n == success for n in range(1, 9)]})
    [[prefix]] = annotate.prefixes(policy, [seven("a")])
    assert monte_carlo(policy, [prefix], k=8) == [value]
    assert policy.rounds == [[n] for n in rounds]


def test_without_early_stopping_all_rollouts_are_one_round():
    policy = Script({"a": [True, False, False, False], "ab": [False]})
    [[a, ab]] = annotate.prefixes(policy, [seven("ab")])
    assert monte_carlo(policy, [a, ab, a], k=8, early=False) == [0.25, 0.0, 0.25]
    assert policy.rounds == [[8, 8]]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_no_more_than_k_rollouts(k):
    policy = Script({"a": [False]})
    [[prefix]] = annotate.prefixes(policy, [seven("a")])
    monte_carlo(policy, [prefix], k)
    assert policy.generated == k


TRUTH = {"a": [False, True, False, False], "ab": [False], "abc": [False]}


def test_values_by_hand():
    [vote] = rollout_votes(Script(TRUTH), [seven("abcd")], k=4, search=linear_scan, early=False)
    assert vote == {"first_error": 1, "values": [0.25, 0.0, 0.0, 0.0], "rollouts": 12,
                    "timeouts": 0}


def test_hard_labels_by_hand():
    # Binary search asks about "ab" (0 of 4), then "a", which its second rollout settles.
    [vote] = rollout_votes(Script(TRUTH), [seven("abcd")], k=4)
    assert vote == {"first_error": 1, "values": [0.5, 0.0, None, 0.0], "rollouts": 6,
                    "timeouts": 0}


@pytest.mark.parametrize("search", [first_wrong_steps, linear_scan])
@pytest.mark.parametrize("steps, place", [("ab", 1), ("a", -1)])
def test_a_solution_that_breaks_off(search, steps, place):
    assert rollout_votes(Script(TRUTH), [seven(steps, None)], 4, search)[0]["first_error"] == place


def test_equal_prefixes_share_their_rollouts():
    policy = Script(TRUTH)
    votes = rollout_votes(policy, [seven("abcd"), seven("abd")], k=4)
    assert [vote["first_error"] for vote in votes] == [1, 1]
    assert [vote["rollouts"] for vote in votes] == [6, 6]  # counted for both,
    assert policy.generated == 6                           # drawn once


# ---------------------------------------------------------------- votes

@pytest.mark.parametrize("votes, how, want", [
    ([2, 2, 2], "all", 2), ([-1, -1, -1], "all", -1), ([2, 2, 3], "all", None),
    ([2, 2, None], "all", None), ([2, 2, 3], "majority", 2), ([1, 2, 3], "majority", None),
    ([2, 2, None], "2", 2), ([None, None], "1", None), ([2, 3], "1", 2)])
def test_consensus_by_hand(votes, how, want):
    assert consensus(votes, how) == want


@pytest.mark.parametrize("text, want", [
    ("Step 2 forgets the carry.\n\nFirst wrong step: 2", 1), ("**First wrong step: none**", -1),
    ("first wrong step: 4.", 3), ("First wrong step: 5", None), ("First wrong step: 0", None),
    ("", None), ("First wrong step: 2 or 3", None), ("First wrong step: 2\nNo, wait.", None),
    ("All steps are right.", None)])
def test_the_judge_is_read_strictly(text, want):
    assert parse_verdict(text, T=4) == want


def test_an_llm_that_reads_is_a_voter():
    """The judge's prompt holds the numbered steps; its last line is its vote."""
    class Reader(Script):
        def root(self, name, question, domain="math"):
            self.question = question
            return super().root(name, question, domain)

        def complete(self, nodes, counts):
            return [[Node("First wrong step: 2", node, [0], end="eos")] for node in nodes]
    solutions, judge = [seven("abcd")], Reader({})
    annotate.annotate(solutions, {"A": Script(TRUTH)}, judge)
    steps = "Step 1: a\n\nStep 2: b\n\nStep 3: c\n\nStep 4: d"
    assert judge.question == f"Problem: What is seven?\n\n{steps}"
    assert solutions[0].votes == {"A": 1, "judge": 1}
    assert solutions[0].labels == [True, False, False, False]


def test_soft_labels_are_the_mean_values_of_the_voters():
    voters = {"A": Script(TRUTH), "B": Script({**TRUTH, "a": [True]})}
    solutions = [seven("abcd")]
    annotate.annotate(solutions, voters, k=4, labels="soft")
    assert solutions[0].labels == [0.625, 0.0, 0.0, 0.0]
    assert solutions[0].rollouts == 24


@pytest.mark.parametrize("right, want", [(True, [True] * 4), (False, [False] * 4), (None, None)])
def test_outcome_labels_are_the_answers_and_need_no_rollout(right, want):
    solution = seven("abcd")
    solution.ends_right = right
    annotate.annotate([solution], {"A": Script({})}, labels="outcome")
    assert (solution.labels, solution.rollouts) == (want, 0)


def test_a_run_in_which_nothing_is_right_says_so(capsys):
    """Gold answers in another form: without the warning the rollouts of a night would be spent on them."""
    wrong = [seven("ab") for _ in range(20)]
    warn_if_none_is_right(wrong[:19])
    warn_if_none_is_right([*wrong[:19], seven("ab", ends_right=True)])
    assert capsys.readouterr().err == ""
    warn_if_none_is_right(wrong)
    assert capsys.readouterr().err == (
        f"warning: none of the first 20 solutions is right. To {SEVEN.id} {SEVEN.answer!r} is expected, the first "
        "solution ends in 'ab'\n")


# ---------------------------------------------------------------- the script

SMALL = ["--policies", str(TINY / "A"), "--limit", "4", "--samples", "2", "--keep-unanimous",
         "--k", "2", "--dtype", "float32"]


def fails(flags, capsys):
    """The last line of what the script says as it exits."""
    with pytest.raises(SystemExit) as stop:
        annotate.main(flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def lines(file):
    return [json.loads(x) for x in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(flags, --out of an uninterrupted run by two voters)."""
    flags = [*SMALL, "--limit", "2", "--policies", str(TINY / "A"), str(TINY / "A"), "--concurrent", "2"]
    out = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    annotate.main([*flags, "--out", str(out)])
    return flags, out


def test_labels_follow_from_the_place_that_all_voters_name(whole):
    _, out = whole
    assert lines(out)
    assert len(lines(out.with_name("rows.jsonl.votes"))) == 8
    for row in lines(out):
        place = row["first_error"]
        assert row["labels"] == [place < 0 or t < place for t in range(len(row["completions"]))]
        assert set(row["votes"].values()) == {place}


def test_killed_and_resumed_is_one_whole_run(whole, tmp_path, capsys):
    flags, out = whole
    killed, part = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.votes.part0"
    [process] = begin(annotate.main, [*flags, "--out", str(killed)])
    while not part.exists() and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    flags = [*flags, "--out", str(killed)]
    assert "pass --resume" in fails(flags, capsys)
    assert "not soft" in fails([*flags, "--resume", "--labels", "soft"], capsys)
    with open(part, "a") as file:
        file.write('{"id": "half a li')
    annotate.main([*flags, "--resume"])
    assert killed.read_text() == out.read_text()


def test_two_ranks_are_one_whole_run(whole, tmp_path):
    flags, out = whole
    two = tmp_path / "two.jsonl"
    run_ranks(annotate.main, [*flags, "--out", str(two)])
    assert two.read_text() == out.read_text()


def row(steps, question="What is seven?", **fields):
    return {"prompt": question, "completions": steps, "labels": [True] * len(steps), **fields}


def test_what_cannot_be_annotated_is_counted_and_costs_nothing_else(tmp_path, capsys):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [row(["6+1=7", "Answer: 7"], answer="7"), row(["?", "Answer: 7"], "What is it?"),
            row(["Answer: 7"], answer="7"), row(["6+1=7", "and"], answer="7", labels=[None, False])]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    annotate.main([*SMALL, "--data", str(data), "--out", str(out), "--vote-labels",
                   "--consensus", "1"])
    votes = {(r["prompt"], *r["completions"]): r for r in lines(tmp_path / "out.jsonl.votes")}
    records = [votes[(r["prompt"], *r["completions"])] for r in rows]
    assert [r["dropped"] for r in records] == [None, "no answer is known", "too short", None]
    assert records[3]["correct"] is None  # breaks off
    assert records[3]["votes"]["labels"] == 1
    assert rows[0]["completions"] in [r["completions"] for r in lines(out)]
    printed = capsys.readouterr().out
    assert "1 no answer is known" in printed
    assert "1 too short" in printed
    assert "{" not in printed  # a table, no dictionaries


def test_without_out_the_command_says_that_nothing_is_written(capsys):
    annotate.main([*SMALL, "--limit", "1", "--task", "tiny-math", "--k", "1"])
    assert "nothing is written" in capsys.readouterr().out


def test_an_unfinished_solution_and_a_judge_that_times_out(monkeypatch):
    verdict = itertools.cycle([tasks.Verdict(False, None, "ok"),
                               tasks.Verdict(False, None, "timeout")])
    monkeypatch.setattr(tasks, "judge_many", lambda items: [next(verdict) for _ in items])
    group = [Solution(SEVEN, steps=["a", "b"], end="length"), Solution(SEVEN, steps=["c", "b"]),
             Solution(SEVEN, steps=["a", "d"])]
    candidates = annotate.candidates([group], "\n", keep_unanimous=True)
    assert [s.dropped for s in group] == ["unfinished", "the judge timed out", None]
    annotate.annotate(candidates, {"A": Script({"a": [True]})})
    # the third: 8 rollouts of its prefix, every second one a timeout of the judge, none right
    assert group[2].votes == {"A": 0}
    assert group[2].timeouts == 4
    assert group[2].labels == [False, False]


@pytest.mark.parametrize("answers, keep, want", [
    ([7, 7], False, ["always solved", "always solved"]), ([8, 8], True, [None, None]),
    ([8, 8], False, ["never solved", "never solved"]), ([7, 8], False, [None, None]),
    ([7], False, [None])])
def test_problems_always_or_never_solved_are_dropped(answers, keep, want):
    group = [Solution(SEVEN, steps=[f"{i}", f"Answer: {x}"]) for i, x in enumerate(answers)]
    annotate.candidates([group], "\n", keep)
    assert [s.dropped for s in group] == want


def test_a_solution_that_was_seen_is_a_duplicate():
    group = [Solution(SEVEN, steps=["a", "Answer: 7"]) for _ in range(2)]
    annotate.candidates([group], "\n", keep_unanimous=True)
    assert [s.dropped for s in group] == [None, "duplicate"]


def step(*texts):
    """A step of a PRM800K record: rated completions, of which the first was followed."""
    return {"completions": [{"text": text, "rating": 1} for text in texts], "chosen_completion": 0,
            "human_completion": None}


def test_every_row_of_a_prm800k_record_and_a_late_answer_are_kept(tmp_path):
    """A record is a path and its rated alternatives. R?: the second row brings the answer."""
    steps = [step("a", "b"), step("c", "d", "e")]
    record = {"question": {"problem": "Q?", "ground_truth_answer": "4"},
              "label": {"finish_reason": "solution", "steps": steps}}
    plain = [row(["x"], "R?", id="1"), row(["y"], "R?", id="1", answer=5)]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text(json.dumps(record) + "\n")
    files[1].write_text("".join(json.dumps(r) + "\n" for r in plain))
    groups = collect(annotate.parse(["--data", *map(str, files)])[1])
    problems = [group[0].problem for group in groups]
    assert [(p.question, p.answer) for p in problems] == [("Q?", "4"), ("R?", "5")]
    assert [len(group) for group in groups] == [4, 2]
    names = {s.id for s in itertools.chain.from_iterable(groups)}
    assert len(names) == 6
    assert {"1", "1#2"} < names


@pytest.mark.parametrize("neutral, want", [("good", -1), ("bad", 1), ("drop", -1)])
def test_prm800ks_neutral_rating_votes_as_vote_labels_says(tmp_path, neutral, want):
    neutral_step = step("b")
    neutral_step["completions"][0]["rating"] = 0
    record = {"question": {"problem": "Q?", "ground_truth_answer": "4"},
              "label": {"finish_reason": "solution", "steps": [step("a"), neutral_step]}}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(record) + "\n")
    [[solution]] = collect(annotate.parse(["--data", str(file), "--vote-labels", neutral])[1])
    assert solution.label == want


@pytest.mark.parametrize("flags, message", [
    (["--k", "0"], "--k must be positive"), (["--consensus", "4"], "1 to 3"),
    (["--consensus", "x"], "1 to 3"), (["--policies", "nowhere"], "nowhere")])
def test_bad_flags_are_one_line(flags, message, capsys):
    assert message in fails(flags, capsys)
