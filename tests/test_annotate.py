"""ASLAF on truths that are known: searches against oracles, votes by hand, and the script on scripted LLMs."""
import itertools
import json
import math
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY

import annotate
from annotate import binary_search, consensus, fleiss_kappa, linear_scan, parse_verdict, settled, vote
from common import tasks
from common.node import Node


def follow(search, good, ends_right, **options):
    """Run a search on a known truth; good[t]: is the prefix of steps 0..t good? -> (its answer, questions asked)."""
    plan, asked = search(len(good) + 1, ends_right, **options), []
    try:
        t = next(plan)
        while True:
            asked.append(t)
            t = plan.send(good[t])
    except StopIteration as end:
        return end.value, asked


@pytest.mark.parametrize("T", range(1, 13))
def test_binary_search_is_the_linear_scan_on_every_monotone_truth(T):
    for first in range(T + 1):  # T: no step is wrong
        good, ends_right = [t < first for t in range(T - 1)], first == T
        place, asked = follow(binary_search, good, ends_right)
        assert place == follow(linear_scan, good, ends_right)[0] == (-1 if ends_right else first)
        assert len(asked) <= math.ceil(math.log2(T)) and len(set(asked)) == len(asked)
        assert follow(binary_search, good, ends_right, verify_neighbours=True)[0] == place


def test_neighbours_show_where_wrong_does_not_stay_wrong():
    # good good BAD good bad: the search asks about 2 (bad), 0 and 1 (good), says 2; its neighbour 3 is good again
    assert follow(binary_search, [True, True, False, True, False], False)[0] == 2
    assert follow(binary_search, [True, True, False, True, False], False, verify_neighbours=True)[0] is None


def test_when_rollouts_suffice():
    assert not settled([], 8) and settled([True], 8) and not settled([False] * 7, 8) and settled([False] * 8, 8)
    assert not settled([True], 8, stop="none")
    # more than half of 8, that is 5: out of reach after 4 wrong ones, certain after 5 right ones
    assert settled([False] * 4, 8, threshold=0.5) and not settled([False] * 3 + [True] * 4, 8, threshold=0.5)
    assert settled([True] * 5, 8, threshold=0.5)
    # Wilson, 16 of 16 right: z^2 / 2 (n + z^2) = 0.097; 8 of 16: 0.22
    assert settled([True] * 16, 64, stop="soft", width=0.1) and not settled([True] * 15, 64, stop="soft", width=0.1)
    assert not settled([True, False] * 8, 64, stop="soft", width=0.2)


class Script:
    """An LLM whose rollouts are written down: {prefix: [does the 1st, 2nd, ... sample end right?]}, cycling."""
    separator, generated, prefilled = "\n", 0, 0

    def __init__(self, truth):
        self.truth = truth

    def root(self, name, question, domain="math"):
        return Node(question, domain=domain)

    def adopt(self, node, text):
        return Node(text, node)

    def complete(self, nodes, counts):
        groups = []
        for node, n in zip(nodes, counts):
            ends = self.truth["".join(node.steps())]
            right = [ends[(node.drawn + i) % len(ends)] for i in range(n)]
            groups.append([Node("Answer: 7" if r else "Answer: 8", node, [0], end="eos") for r in right])
            node.drawn += n
            self.generated += n
        return groups


SEVEN = tasks.Problem("p", "What is seven?", "math", "7")


def test_values_and_labels_by_hand():
    truth = {"a": [False, True, False, False], "ab": [False], "abc": [False]}
    [linear] = vote(Script(truth), [(SEVEN, ["a", "b", "c", "Answer: 8"], False)], k=4, search="linear", stop="none")
    assert linear == {"first_error": 1, "values": [0.25, 0.0, 0.0, 0.0], "rollouts": 12, "timeouts": 0}
    # hard label: any right. Binary asks about "ab" (0 of 4), then "a", settled by its second rollout
    [binary] = vote(Script(truth), [(SEVEN, ["a", "b", "c", "Answer: 8"], False)], k=4)
    assert binary == {"first_error": 1, "values": [0.5, 0.0, None, 0.0], "rollouts": 6, "timeouts": 0}
    # a solution that breaks off: its last step is asked about like any other
    for steps, place in ((["a", "b"], 1), (["a"], -1)):
        for how in ("linear", "binary"):
            assert vote(Script(truth), [(SEVEN, steps, None)], k=4, search=how)[0]["first_error"] == place
    # equal prefixes of two solutions share their rollouts: drawn once, counted for both
    policy = Script(truth)
    both = vote(policy, [(SEVEN, ["a", "b", "c", "Answer: 8"], False), (SEVEN, ["a", "b", "Answer: 8"], False)], k=4)
    assert [b["first_error"] for b in both] == [1, 1] and policy.generated == 6


def test_consensus_by_hand():
    assert consensus([2, 2, 2]) == 2 and consensus([2, 2, 3]) is None and consensus([2, 2, None]) is None
    assert consensus([2, 2, 3], "majority") == 2 and consensus([2, 2, None], "2") == 2
    assert consensus([1, 2, 3], "majority") is None and consensus([-1, -1, -1]) == -1
    assert consensus([None, None], "1") is None


def test_kappa_by_hand():
    # two raters, four items, agree on three. p: a 5/8, b 3/8 -> chance 34/64; (3/4 - 34/64) / (1 - 34/64) = 14/30
    assert fleiss_kappa([["a", "a"], ["a", "a"], ["a", "b"], ["b", "b"]]) == pytest.approx(14 / 30)
    assert fleiss_kappa([["a", "a"]] * 3) is None and fleiss_kappa([]) is None


@pytest.mark.parametrize("text, want", [
    ("Step 2 forgets the carry.\n\nFirst wrong step: 2", 1), ("**First wrong step: none**", -1),
    ("first wrong step: 4.", 3), ("First wrong step: 5", None), ("First wrong step: 0", None), ("", None),
    ("First wrong step: 2 or 3", None), ("First wrong step: 2\nNo, wait.", None), ("All steps are right.", None)])
def test_the_judge_is_read_strictly(text, want):
    assert parse_verdict(text, T=4) == want


SMALL = ["--policies", str(TINY / "A"), "--limit", "4", "--samples", "2", "--keep-unanimous", "--k", "2", "--dtype",
         "float32"]


def fails(flags, capsys):
    """The last line of what the script says as it exits."""
    with pytest.raises(SystemExit) as stop:
        annotate.main(flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def lines(file):
    return [json.loads(x) for x in file.read_text().splitlines()]


def test_killed_and_resumed_and_two_ranks_are_one_whole_run(tmp_path, capsys):
    flags = [*SMALL, "--policies", str(TINY / "A"), str(TINY / "A"), "--concurrent", "2"]
    whole, killed, two = (tmp_path / f"{x}.jsonl" for x in ("whole", "killed", "two"))
    annotate.main([*flags, "--out", str(whole)])
    assert lines(whole) and len(lines(tmp_path / "whole.jsonl.votes")) == 16
    for row in lines(whole):
        place = row["first_error"]
        assert row["labels"] == [place < 0 or t < place for t in range(len(row["completions"]))]
        assert set(row["votes"].values()) == {place}

    process = subprocess.Popen([sys.executable, "annotate.py", *flags, "--out", str(killed)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "killed.jsonl.votes.part0"
    while not part.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "pass --resume" in fails([*flags, "--out", str(killed)], capsys)
    assert "not soft" in fails([*flags, "--out", str(killed), "--resume", "--stop", "soft"], capsys)
    with open(part, "a") as file:
        file.write('{"id": "half a li')
    annotate.main([*flags, "--out", str(killed), "--resume"])
    assert killed.read_text() == whole.read_text()

    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "annotate.py", *flags, "--out",
                    str(two)], cwd=ROOT, check=True)
    assert two.read_text() == whole.read_text()


def test_what_cannot_be_annotated_is_counted_and_costs_nothing_else(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "What is seven?", "completions": ["6+1=7", "Answer: 7"], "labels": [True, True], "answer": "7"},
            {"prompt": "What is it?", "completions": ["?", "Answer: 7"], "labels": [True, True]},
            {"prompt": "What is seven?", "completions": ["Answer: 7"], "labels": [True], "answer": "7"},
            {"prompt": "What is seven?", "completions": ["6+1=7", "and"], "labels": [None, False], "answer": "7"}]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "out.jsonl"
    annotate.main([*SMALL, "--data", str(data), "--out", str(out), "--vote-labels", "--consensus", "1"])
    votes = {"|".join([r["prompt"], *r["completions"]]): r for r in lines(tmp_path / "out.jsonl.votes")}
    found = [votes["|".join([r["prompt"], *r["completions"]])] for r in rows]
    assert [r["dropped"] for r in found] == [None, "no answer is known", "too short", None]
    assert found[3]["correct"] is None and found[3]["votes"]["labels"] == 1
    assert rows[0]["completions"] in [r["completions"] for r in lines(out)]


def test_an_unfinished_solution_and_a_judge_that_times_out(monkeypatch):
    args = annotate.parse(["--keep-unanimous"])[1]
    args.join = "\n"
    verdict = itertools.cycle([tasks.Verdict(False, None, "ok"), tasks.Verdict(False, None, "timeout")])
    monkeypatch.setattr(tasks, "judge_many", lambda items: [next(verdict) for _ in items])
    jobs = [(SEVEN, [("1", ["a", "b"], "length", "x", None), ("2", ["c", "b"], "eos", "x", None),
                     ("3", ["a", "d"], "eos", "x", None)])]
    records = annotate.annotate(jobs, {"A": Script({"a": [True]})}, None, args)
    assert [r["dropped"] for r in records] == ["unfinished", "the judge timed out", None]
    # the third: 8 rollouts of the prefix, every second one a timeout of the judge, none right
    assert (records[2]["votes"], records[2]["timeouts"], records[2]["labels"]) == ({"A": 0}, 4, [False, False])


def test_every_row_of_a_prm800k_record_and_a_late_answer_are_kept(tmp_path):
    """A record is a path and its rated alternatives; of the rows to one question the second brings the answer."""
    step = lambda *texts: {"completions": [{"text": t, "rating": 1} for t in texts], "chosen_completion": 0,  # noqa: E731
                           "human_completion": None}
    record = {"question": {"problem": "Q?", "ground_truth_answer": "4"},
              "label": {"finish_reason": "solution", "steps": [step("a", "b"), step("c", "d", "e")]}}
    plain = {"prompt": "R?", "completions": ["x"], "labels": [True], "id": "1"}
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text(json.dumps(record) + "\n")
    files[1].write_text(json.dumps(plain) + "\n" + json.dumps({**plain, "completions": ["y"], "answer": 5}) + "\n")
    args = annotate.parse(["--data", *map(str, files)])[1]
    jobs = annotate.collect(args)
    names = [s[0] for _, solutions in jobs for s in solutions]
    assert [(p.question, p.answer, len(s)) for p, s in jobs] == [("Q?", "4", 4), ("R?", "5", 2)]
    assert len(set(names)) == 6 and {"1", "1#2"} < set(names)


@pytest.mark.parametrize("flags, message", [(["--k", "0"], "--k must be positive"), (["--consensus", "4"], "1 to 3"),
                                            (["--labels", "soft"], "--search linear"),
                                            (["--policies", "nowhere"], "nowhere")])
def test_bad_flags_are_one_line(flags, message, capsys):
    assert message in fails(flags, capsys)
