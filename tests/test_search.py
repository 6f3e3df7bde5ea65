"""The strategies on scripted trees where the right behaviour is known, and the whole script on the shipped models."""
import json
import math
import subprocess
import sys
import time
import weakref
from collections import Counter
from functools import partial

import pytest
from conftest import DEVICE, ROOT, TINY, begin, two_devices

import search
from common.driver import Search, run_together
from common.node import Node
from common.policy import load_policy
from prm_model import load_prm
from search import (
    TEXTBOOK,
    arg_max,
    choose,
    compare,
    merge,
    mode,
    report,
    samples_in_rounds,
    uct_select,
)
from search import (
    beam_extended as beam,
)
from search import (
    mcts_extended as mcts,
)


class Script:
    """Policy and PRM in one: a tree written down as {text so far: [(next step, p, ends), ...]}. A sample takes the
    children in turn; each step costs one token. Nothing is random, so every expected value can be worked out."""
    prefilled = tokens = 0

    def __init__(self, tree):
        self.tree = tree

    def step(self, node, i):
        options = self.tree["".join(node.steps())]
        text, p, ends = options[i % len(options)]
        new = Node(text, node, ids=[0], end="eos" if ends is True else ends or None, depth=node.depth + 1)
        new.true_p = p
        return new

    def propose(self, nodes, counts):
        out = []
        for node, n in zip(nodes, counts):
            out.append([self.step(node, node.drawn + i) for i in range(n)])
            node.drawn += n
        return out

    def complete(self, nodes, counts):
        out = [group for group in self.propose(nodes, counts)]
        for group in out:
            for i, node in enumerate(group):
                while node.end is None:
                    node = self.step(node, 0)
                group[i] = node
        return out

    def score_nodes(self, leaves):
        return {n: n.true_p for leaf in leaves for n in leaf.path() if n.p is None}


def texts(search):
    return ["".join(node.steps()) for _, node in search.finished]


def reward(node):
    return math.prod(n.p for n in node.path())


def total(node):
    return sum(n.p for n in node.path())


def run(strategy, tree, tokens=math.inf, **options):
    options = {"reward": reward, "path_score": total, **options}
    s = Search(Node("Q"), strategy, options, budget=tokens)
    script = Script(tree)
    run_together([s], script, [script])
    nodes = [node for _, node in s.finished]
    return s, ("".join(nodes[arg_max([reward(n) for n in nodes])].steps()) if nodes else None)


# "a" looks best and leads nowhere; "b" looks worse and leads to the only good end.
DECEPTIVE = {"": [("a", 0.9, False), ("c", 0.8, False), ("b", 0.5, False)],
             "a": [("x", 0.1, True), ("y", 0.1, True)], "c": [("x", 0.1, True), ("y", 0.1, True)],
             "b": [("x", 0.9, True), ("y", 0.2, True)]}


# by hand: a = 0.6 + sqrt(ln 10 / 9) = 1.106, b = 0.3 + sqrt(ln 10 / 1) = 1.817
@pytest.mark.parametrize("c, want", [(0.0, "a"), (1.0, "b")])
def test_uct_matches_hand_computation(c, want):
    assert uct_select("s", ["a", "b"], {"s": 10, "a": 9, "b": 1}, {"a": 0.6, "b": 0.3}, c) == want


def test_an_unvisited_child_goes_first_and_ties_keep_sampling_order():
    assert uct_select("s", ["a", "b", "c"], Counter(s=3, a=3), {"a": 1.0, "b": 0.0, "c": 0.0}, 1.0) == "b"


@pytest.mark.parametrize("beam, mcts", [(TEXTBOOK["beam"], TEXTBOOK["mcts"]), (beam, mcts)], ids=["textbook", "ours"])
def test_greedy_and_beam_lose_a_deceptive_tree_that_mcts_wins(beam, mcts):
    assert run(beam, DECEPTIVE, k=1, m=3)[1] == "ax"
    assert run(beam, DECEPTIVE, k=2, m=3)[1] in ("ax", "ay", "cx", "cy")
    assert run(mcts, DECEPTIVE, m=3, simulations=12, c=0.5)[1] == "bx"


def test_the_textbook_beam_takes_M_steps_of_each_live_path():
    """By hand, K = M = 2: a 0.9, b 0.8 (end); from a: ax 1.2 (end), ay 1.1; ax and ay are kept; ayz 2.0 twice."""
    tree = {"": [("a", 0.9, False), ("b", 0.8, True)], "a": [("x", 0.3, True), ("y", 0.2, False)],
            "ay": [("z", 0.9, True)]}
    s, _ = run(TEXTBOOK["beam"], tree, k=2, m=2)
    assert s.generated == 2 + 2 + 2
    assert texts(s) == ["b", "ax", "ayz", "ayz"]


def test_beam_sums_keeps_finished_paths_and_merges_duplicates():
    tree = {"": [("a", 0.9, False), ("a", 0.9, False), ("b", 0.8, True)], "a": [("x", 0.3, True), ("y", 0.2, False)],
            "ay": [("z", 0.9, True)]}
    s, _ = run(beam, tree, k=2, m=2)
    # step 1 draws 4: a a b a -> beams a, b(end). Step 2 from a: ax 1.2 (end), ay 1.1; kept: ax, ay; b has 0.8.
    # step 3 from ay: z, z -> merged; ayz = 2.0.
    assert s.generated == 4 + 2 + 2
    assert {"".join(n.steps()) for _, n in s.finished} == {"b", "ax", "ayz"}
    assert [n.text for n in merge([Node("a"), Node("b"), Node("a")])] == ["a", "b"]


@pytest.mark.parametrize("mcts", [TEXTBOOK["mcts"], mcts], ids=["textbook", "ours"])
def test_root_visits_equal_simulations_and_q_is_the_mean(mcts):
    wide = {"": [(c, 0.5, False) for c in "abc"], **{c: [("x", 0.5, False)] for c in "abc"},
            **{c + "x": [("y", p, True)] for c, p in zip("abc", (0.1, 0.5, 0.9))}}
    s, best = run(mcts, wide, m=3, simulations=7, c=1.0)
    N = s.visits
    assert N[s.root] == 7 == sum(N[a] for a in s.sampled if a.parent is s.root)
    assert best == "cxy"


def test_mcts_sees_no_worth_in_a_solution_that_was_cut_off():
    """By their p, a is worth 0.81 and b 0.25; but a only leads to a solution that never came to its answer."""
    tree = {"": [("a", 0.9, False), ("b", 0.5, False)], "a": [("x", 0.9, "length")], "b": [("y", 0.5, True)]}
    s, _ = run(mcts, tree, m=2, simulations=6, c=0.1)
    a, b = s.sampled[:2]
    assert s.visits[b] > s.visits[a]


def test_mcts_widens_where_it_visits():
    """Three samples are bad, the fourth is good: at the root's fourth visit three more are drawn."""
    late = {"": [("a", 0.1, True)] * 3 + [("b", 0.9, True)]}
    found = [run(mcts, late, m=3, simulations=n, c=1.0) for n in (4, 5)]
    assert [(s.generated, best) for s, best in found] == [(3, "a"), (6, "b")]
    # The same where the bad steps lead on and on and nothing is ever used up: at the fourth visit M more are drawn.
    late = {"": [("a", 0.5, False)] * 3 + [("b", 0.9, False)], "b": [("y", 0.9, True)],
            **{"a" * n: [("a", 0.5, n > 20)] for n in range(1, 23)}}
    assert [run(mcts, late, m=3, simulations=n, c=1.0)[1][0] for n in (4, 5)] == ["a", "b"]


@pytest.mark.parametrize("strategy, options", [(samples_in_rounds, {"n": 10**6, "until": math.inf}), (beam, {"k": 2, "m": 2}),
                                               (mcts, {"m": 2, "simulations": 10**6, "c": 1.0})])
def test_budgets_are_respected_within_one_call(strategy, options):
    tree = {}  # ten levels and a fan of two: far more than the budget can see

    def grow(text, depth):
        tree[text] = [(c, 0.5, depth == 9) for c in "ab"]
        if depth < 9:
            for c in "ab":
                grow(text + c, depth + 1)
    grow("", 0)
    s, _ = run(strategy, tree, tokens=50, **options)
    assert s.generated <= 50 + 10
    assert s.request is None  # a whole solution is 10 tokens: one call's worth
    assert s.generated >= 50 or strategy is beam         # a beam of two is done with ten levels before


@pytest.mark.parametrize("strategy, options", [(beam, {"k": 2, "m": 2}), (mcts, {"m": 2, "simulations": 9, "c": 1.0})])
def test_a_search_that_is_over_gives_its_memory_back(strategy, options):
    policy, prm = load_policy(TINY / "A", DEVICE, "float32"), load_prm(TINY / "prm", DEVICE, "float32")
    for tokens in (40, math.inf):
        s = Search(policy.root("p", "Ann has 7 shells. In January she finds 5. How many now?"), strategy,
                   {**options, "path_score": total, "reward": total}, tokens)
        run_together([s], policy, [prm])
        assert s.sampled
        assert not any(n.kv or n.hidden for leaf in s.sampled for n in leaf.line())
        gone = weakref.ref(s)
        del s
        assert gone() is None  # at once: no cycle that waits for the garbage collector


def test_several_prms_are_averaged():
    """First PRM: a 0.9, b 0.8, c 0.5; second: a 0.1, b 0.4, c 0.5. The means are 0.5, 0.6, 0.5."""
    first = Script({"": [("a", 0.9, True), ("b", 0.8, True), ("c", 0.5, True)]})

    class Second:
        tokens = 0

        def score_nodes(self, leaves):
            return {n: {"a": 0.1, "b": 0.4, "c": 0.5}[n.text] for n in leaves}
    s = Search(Node("Q"), beam, {"k": 1, "m": 3, "path_score": total})
    run_together([s], first, [first, Second()])
    assert max((n for _, n in s.finished), key=total).text == "b"
    assert len(s.sampled[0].scores) == 2


def test_pruning():
    expanded = [{n.parent.text for n in run(beam, DECEPTIVE, k=3, m=3, threshold=p)[0].sampled} for p in (0.0, 0.85)]
    assert expanded == [{"Q", "a", "b", "c"}, {"Q", "a"}]


# Solutions of one token, 0.3, 0.9 (cut off), 0.2, 0.4, 0.6, 0.1, in this order; best-of-N draws 1, then 4, then 4
@pytest.mark.parametrize("until, tokens", [(0.25, 1), (0.35, 5), (0.5, 5), (0.8, 12)])
def test_a_search_ends_once_a_solution_is_good_enough(until, tokens):
    p = [0.3, 0.9, 0.2, 0.4, 0.6, 0.1]
    tree = {"": [(str(i), x, "length" if x == 0.9 else True) for i, x in enumerate(p)]}
    s, _ = run(samples_in_rounds, tree, n=12, until=until)
    assert s.generated == tokens


def test_mcts_ends_once_a_rollout_is_good_enough():
    tree = {"": [("a", 0.1, True), ("b", 0.9, True)]}
    assert run(mcts, tree, m=1, simulations=50, c=1.0, until=0.5)[1] == "b"
    assert run(mcts, tree, m=1, simulations=50, c=1.0, until=0.5)[0].generated == 2


def test_a_beam_of_equal_steps_keeps_its_breadth():
    """All first steps are the same: one path is left, and the samples of two go to it; the last of four is good."""
    tree = {"": [("a", 0.9, False)], "a": [("x", 0.1, True), ("x", 0.1, True), ("x", 0.1, True), ("y", 0.9, True)]}
    s, best = run(beam, tree, k=2, m=2)
    assert best == "ay"
    assert s.generated == 4 + 4


def test_arg_max_takes_the_first_of_equals():
    assert arg_max([0.1, 0.9, 0.9, 0.4]) == 1


@pytest.mark.parametrize("answers, weights, want", [
    (["7", "8", "8", "7"], None, 0),                  # a tie: the answer that was seen first
    (["7", "8", "8", "7"], [0.1, 0.8, 0.9, 0.4], 2),  # 0.5 for 7, 1.7 for 8, of which the second is better
    (["7", "8", "8"], [0.5, 0.9, -1.0], 1),           # an unfinished solution takes no weight away
    (["7", "7", "8"], [0.1, 0.9, 0.2], 1),            # two programs that are equal on the examples: the better one
    ([None, None, "3", "4"], None, 2),                # no answer is no vote
    ([None, None], None, 0)])
def test_mode(answers, weights, want):
    assert mode(answers, weights) == want


# 7 has two votes of weight 0.4, 8 one of 0.8, 9 two of 1.0. MCTS went most often into the step of the second and the
# fourth, and there three times into that of the second. A budget of 30 tokens buys the first three.
@pytest.mark.parametrize("rule, tokens, want", [
    ("argmax", math.inf, 2), ("vote", math.inf, 0), ("weighted", math.inf, 3), ("visited", math.inf, 1),
    ("argmax", 20, 0), ("weighted", 30, 2), ("vote", 9, None)])
def test_each_rule_chooses_its_own_solution(rule, tokens, want):
    samples = zip([0.2, 0.2, 0.8, 0.6, 0.4], ["7", "7", "8", "9", "9"], [[1], [5, 3], [4], [5, 2], [1]])
    row = {"samples": [{"scores": [p], "answer": answer, "visits": visits, "spent": 10 * i, "end": "eos"}
                       for i, (p, answer, visits) in enumerate(samples, 1)]}
    assert choose(row, rule, "prod", tokens) == want


def test_a_solution_that_was_cut_off_is_chosen_last():
    samples = [{"scores": [0.9], "answer": "1", "spent": 1, "end": "length"},
               {"scores": [0.1], "answer": "2", "spent": 2, "end": "eos"}]
    assert [choose({"samples": samples}, rule, "prod") for rule in ("argmax", "weighted")] == [1, 1]


def test_a_baseline_counts_only_the_samples_that_fit_the_budget():
    """Three samples of 40 tokens, of which the third alone is right and has the best p, beside a search of 100."""
    pool = {"samples": [{"scores": [p], "answer": p, "spent": 40 * i, "tokens": 40, "correct": p == 0.9}
                        for i, p in enumerate([0.1, 0.2, 0.9], 1)]}
    row = {"cost": {"policy_generated": 100}}
    assert compare(row, pool, partial(choose, how="prod")) == {
        "samples": 2, "tokens": 80, "single": 0.0, "argmax": False, "weighted": False, "vote": False}
    row = {"cost": {"policy_generated": 120}}
    assert compare(row, pool, partial(choose, how="prod"))["argmax"]


def test_problems_searched_together_are_searched_as_alone():
    scripts = [DECEPTIVE, {**DECEPTIVE, "": [("b", 0.7, False), ("a", 0.6, False)]}]
    alone = [run(mcts, t, m=3, simulations=9, c=0.5) for t in scripts]
    for tree, (s, _) in zip(scripts, alone):
        searches = [Search(Node("Q"), mcts, {"m": 3, "simulations": n, "c": 0.5, "reward": reward}) for n in (2, 9, 5)]
        script = Script(tree)
        run_together(searches, script, [script])
        assert texts(searches[1]) == texts(s)
        assert searches[1].generated == s.generated


# ---------------------------------------------------------------- the script, on the shipped models

SMALL = ["--strategy", "beam", "--task", "tiny-math", "--limit", "4", "--max-solution-tokens", "320",
         "--device", DEVICE, "--dtype", "float32"]


def results(file):
    """Rows without the seconds, which differ from run to run, and with scores rounded to what fp32 promises."""
    rows = [json.loads(line) for line in open(file)]
    for row in rows:
        row["cost"] = row["cost"]["policy_generated"]
        for s in row["samples"]:
            s["scores"] = [round(p, 3) for p in s["scores"]]
    return rows


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "rows.jsonl"
    search.main([*SMALL, "--out", str(out)])
    return results(out)


@two_devices
def test_two_ranks_give_the_output_of_one_process(one_process, tmp_path):
    out = tmp_path / "rows.jsonl"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "search.py",
                    *SMALL, "--out", str(out)], cwd=ROOT, check=True)
    assert results(out) == one_process
    names = ["rows.jsonl", "rows.jsonl.baseline", "rows.jsonl.flags"]
    assert sorted(f.name for f in tmp_path.iterdir()) == names


def test_a_killed_run_goes_on_to_the_same_output(one_process, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    flags = [*SMALL, "--out", str(out), "--concurrent", "1"]
    [child] = begin(search.main, flags)
    part, deadline = tmp_path / "rows.jsonl.part0", time.time() + 120
    while not (part.exists() and part.read_text().count("\n") >= 2) and time.time() < deadline and child.is_alive():
        time.sleep(0.02)
    child.kill()
    child.join()
    assert part.exists()
    assert not out.exists()
    with open(part, "a", encoding="utf-8") as file:
        file.write('{"id": "half a li\u043a')  # what a kill in the middle of a write leaves
    part.write_bytes(part.read_bytes()[:-1])  # and in the middle of a character
    (tmp_path / "rows.jsonl.partial").write_text("")
    with pytest.raises(SystemExit):
        search.main(flags)
    assert "pass --resume" in capsys.readouterr().err
    assert part.exists()
    with pytest.raises(SystemExit):
        search.main([*flags, "--resume", "--seed", "5"])
    assert "was begun with --seed 0, not 5" in capsys.readouterr().err
    assert part.exists()
    search.main([*flags, "--resume"])
    assert results(out) == one_process


@pytest.mark.parametrize("flags, words", [
    (["--n", "0"], "--n must be positive"), (["--tokens", "-5"], "--tokens must be positive"),
    (["--question", " "], "--question is empty"), (["--prm", "/nowhere"], "/nowhere: no such folder"),
    (["--policy", "/nowhere"], "pass the path of a local"), (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
    (["--choose", "visited"], "for --strategy mcts"), (["--strategy", "auto"], "needs --tokens"),
    (["--strategy", "auto", "--tokens", "9", "--prm", "tiny/xs"], "tiny/xs/router.json: no such file"), (["--strategy", "mcts", "--aggregate", "sum"], "which UCT and --until need")])
def test_bad_input_is_one_clear_line(flags, words, capsys):
    with pytest.raises(SystemExit):
        search.main(["--strategy", "beam", "--task", "gsm8k" if "--data" in flags else "tiny-math", *flags])
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_without_answers_nothing_is_judged(capsys):
    report([{"domain": "math", "answer": None}], None)
    assert "nothing is judged" in capsys.readouterr().out


def test_malformed_data_names_file_and_line(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?"\n')
    with pytest.raises(SystemExit):
        search.main(["--strategy", "beam", "--task", "gsm8k", "--data", str(data)])
    assert f"{data}:2" in capsys.readouterr().err


def test_an_output_that_exists_is_not_overwritten(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    out.write_text("precious\n")
    with pytest.raises(SystemExit):
        search.main(["--strategy", "beam", "--out", str(out)])
    assert "exists" in capsys.readouterr().err
    assert out.read_text() == "precious\n"


def test_the_shipped_policy_writes_the_recorded_text():
    """A checkpoint that loads wrongly, or a forward that is subtly off, does not write this."""
    from common.policy import load_policy
    policy = load_policy(TINY / "A", DEVICE, "float32", temperature=0, max_step_tokens=40, max_steps=16)
    question = ("Ann has 6 shells. In January she finds 5. In February she doubles them. In March she loses 4. "
                "In April she sells half. In May she buys 4. How many now?")
    [[end]] = policy.complete([policy.root("p", question)], 1)
    assert end.steps() == ["January: 6+5=11", "February: 11*2=22", "March: 22-4=18", "April: 18/2=9", "May: 9+4=13",
                           "Answer: 13"]
    assert end.end == "eos"
