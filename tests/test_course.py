"""docs/course.md: its functions exist and are as short as it says, its commands print what it shows, and here are the
solutions of its exercises, each checked against the project's own code."""
import importlib
import inspect
import math
import re
from collections import Counter

import pytest
import torch
from conftest import DEVICE, ROOT, TINY, ahead, printed
from test_search import DECEPTIVE, run

import annotate
from common import tasks
from common.data import first_wrong
from common.policy import load_policy
from common.solutions import Solution, hard_labels
from search import Request, mcts, mcts_extended
from tiny import world
from train import prm_loss

COURSE = (ROOT / "docs" / "course.md").read_text()
LESSONS = COURSE.split("\n## ")[1:]


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY / "A", DEVICE, "float32")


@pytest.fixture(scope="module")
def problem():
    return tasks.load("tiny-math", split="train", limit=1)[0]


# ---------------------------------------------------------------- the exercises, and what checks them

def solution_1(policy, problem, n):
    """Lesson 1: how often is each answer given, and how often is a sample right?"""
    root = policy.root(problem.id, problem.question, problem.domain)
    [ends] = policy.complete([root], n)
    texts = [policy.separator.join(end.steps()) for end in ends]
    verdicts = tasks.judge_many([(problem, text) for text in texts])
    return Counter(v.answer for v in verdicts), sum(v.ok for v in verdicts) / n


def test_lesson_1(policy, problem):
    answers, right = solution_1(policy, problem, 16)
    assert sum(answers.values()) == 16
    assert right == answers[problem.answer] / 16


def solution_2(policy, problem, steps, k):
    """Lesson 2: V of the prefix `steps`, by k rollouts."""
    node = policy.root(problem.id, problem.question, problem.domain)
    for step in steps:
        node = policy.adopt(node, step)
    [ends] = policy.complete([node], k)
    texts = [policy.separator.join(end.steps()) for end in ends]
    return sum(v.ok for v in tasks.judge_many([(problem, text) for text in texts])) / k


def test_lesson_2(policy, problem):
    steps = ["January: 1+1=2"]
    prefix = annotate.prefixes(policy, [Solution(problem, "a", "here", steps)])[0][0]
    assert [solution_2(policy, problem, steps, 8)] == annotate.monte_carlo(policy, [prefix], 8, early=False)


def solution_3(V, T):
    """Lesson 3: the first t with V(t) = 0, by halving; -1 if there is none."""
    low, high = -1, T  # V(low) > 0, V(high) = 0, as if there were a step T
    while high - low > 1:
        middle = (low + high) // 2
        if V(middle) > 0:
            low = middle
        else:
            high = middle
    return -1 if high == T else high


@pytest.mark.parametrize("T", [1, 2, 7, 8])
def test_lesson_3(T):
    for place in range(T + 1):
        asked = []
        values = [float(t < place) for t in range(T)]
        found = solution_3(lambda t, values=values, asked=asked: asked.append(t) or values[t], T)
        assert found == first_wrong(values)
        assert len(asked) <= math.ceil(math.log2(T + 1))
        assert annotate.first_wrong_steps([range(T)], [None], lambda ts, values=values: [values[t] for t in ts])[0] == [found]


def solution_4(solutions, truths):
    """Lesson 4: {voter, or "consensus": share of wrong labels} of solutions with votes."""
    wrong, labels = Counter(), Counter()
    for s, truth in zip(solutions, truths):
        places = {**s.votes, "consensus": annotate.consensus(list(s.votes.values()))}
        for name, place in places.items():
            if place is not None:
                wrong[name] += sum(y != t for y, t in zip(hard_labels(place, len(truth)), truth))
                labels[name] += len(truth)
    return {name: wrong[name] / labels[name] for name in labels}


def test_lesson_4():
    """By hand: the truth is right, wrong. A sees it; B calls both right; C both wrong. All agree on the second one."""
    one, two = Solution(None, "a", "", ["x", "y"]), Solution(None, "b", "", ["x", "y"])
    one.votes, two.votes = {"A": 1, "B": -1, "C": 0}, {"A": -1, "B": -1, "C": -1}
    noise = solution_4([one, two], [[True, False], [True, True]])
    assert noise == {"A": 0, "B": 0.25, "C": 0.25, "consensus": 0}
    [question] = world.problems("math", "train", 1)
    assert world.grade(question, ["January: 1+1=3"]) == [False]


def solution_5(y):
    """Lesson 5: the p at which the loss of a step with the soft label y is smallest."""
    logits = torch.linspace(-6, 6, 2401)
    losses = [prm_loss(logit[None], torch.tensor([y])) for logit in logits]
    return float(logits[int(torch.stack(losses).argmin())].sigmoid())


@pytest.mark.parametrize("y", [0.125, 0.5, 0.875])
def test_lesson_5(y):
    assert solution_5(y) == pytest.approx(y, abs=2e-3)


def dvts(root, k, m, path_score, **_):
    """Lesson 6, as in README.md, "Fork me"."""
    [steps] = yield Request([root], k * m)
    paths = [max(steps[i::k], key=path_score) for i in range(k)]
    while live := [node for node in paths if node.end is None]:
        new = dict(zip(live, (yield Request(live, m))))
        paths = [max(new[node], key=path_score) if node in new else node for node in paths]


def test_lesson_6():
    assert run(dvts, DECEPTIVE, k=3, m=1)[1] == "bx"
    assert run(dvts, DECEPTIVE, k=1, m=3)[1] == "ax"  # one tree is greedy


# Lesson 7. The first rollout through b goes wrong: 0.8 x 0.1 = 0.08, below a's 0.9 x 0.3 = 0.27. The good end, bzx, has 0.64.
SOLUTION_7 = {"": [("a", 0.9, False), ("b", 0.8, False)], "a": [("x", 0.3, True)],
              "b": [("y", 0.1, True), ("z", 0.9, False)], "bz": [("x", 0.9, True)]}


@pytest.mark.parametrize("c, want", [(0.0, "ax"), (0.5, "bzx")], ids=["greedy", "UCT"])
@pytest.mark.parametrize("mcts", [mcts, mcts_extended], ids=["textbook", "ours"])
def test_lesson_7(mcts, c, want):
    assert run(mcts, SOLUTION_7, m=2, simulations=12, c=c)[1] == want


# ---------------------------------------------------------------- the course's own words

def test_there_are_seven_lessons():
    assert [lesson[0] for lesson in LESSONS if lesson[0].isdigit()] == list("1234567")


@pytest.mark.parametrize("file, name, lines", re.findall(r"`([\w/]+)\.py`: `(\w+)` \((\d+) lines\)", COURSE))
def test_the_code_is_as_short_as_the_course_says(file, name, lines):
    module = importlib.import_module(file.replace("/", "."))
    owner = getattr(module, name, None) or getattr(module.PRM, name)
    assert len(inspect.getsource(owner).splitlines()) == int(lines)


def sessions():
    """(command, what it prints) of each block "$ python SCRIPT.py FLAGS" of the course."""
    return re.findall(r"^\$ python (\w+)\.py(.*)\n((?:.*\n)*?)```", COURSE, re.M)


@ahead
def outputs(folder):
    """What each command prints here."""
    texts = {}
    for script, flags, _ in sessions():
        texts[script, flags] = printed(script, [*flags.split(), "--device", "cpu"], folder / str(len(texts)))
    return texts


@pytest.mark.parametrize("script, flags, shown", sessions(), ids=lambda x: x[:12])
def test_a_command_prints_what_the_course_shows(script, flags, shown, outputs):
    lines = [line.rstrip() for line in outputs[script, flags].splitlines()]
    for line in filter(str.strip, shown.splitlines()):
        if line.strip() != "...":
            assert any(map(same(line.rstrip()), lines)), line


def same(shown):
    """Is a printed line the shown one? Seconds differ, and another processor may round a token the other way."""
    number = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")

    def compare(line):
        if number.sub("#", shown).split() != number.sub("#", line).split():
            return False
        a, b = ([float(x.replace(",", "")) for x in number.findall(text)[:3]] for text in (shown, line))  # then: seconds
        return b == pytest.approx(a, rel=0.1, abs=0.05)
    return compare
