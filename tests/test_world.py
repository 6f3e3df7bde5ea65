"""The tiny world: its truth, its authors and its splits."""
import contextlib
import random

import pytest
from conftest import TINY, ahead, run_ranks

from common import tasks
from prm_model import load_prm
from tiny import make, world


def test_the_right_solution_is_right_and_judged_right():
    """The careful author corrects all he does wrong: his solutions end right, step by step and by the real judge."""
    for domain in ("math", "code"):
        rng = random.Random(0)
        problems = list(world.problems(domain, "test", 40))
        written = [world.write(p, "careful", rng) for p in problems]
        grades = [world.grade(p, s) for p, s in zip(problems, written)]
        assert all(g[-1] for g in grades)
        assert not all(all(g) for g in grades)
        loaded = tasks.load(f"tiny-{domain}", limit=40)
        assert [p.id for p in loaded] == [p["id"] for p in problems]
        assert all(v.ok for v in tasks.judge_many([(p, "\n".join(s)) for p, s in zip(loaded, written)]))


def test_grades_by_hand():
    math = {"domain": "math", "meta": {"start": 15, "ops": [("gain", 8), ("halve", 2)]}}
    right, forgot = "January: 15+8=23", "January: 15+8=13"
    assert world.grade(math, [right, "February: 23/2=11", "Answer: 11"]) == [True, True, True]
    assert world.grade(math, [forgot, "Wait, " + right, "February: 23/2=11"]) == [False, True, True]
    assert world.grade(math, [forgot, "February: 13/2=6", "Answer: 6"]) == [False, False, False]
    assert world.grade(math, [forgot, "February: 13/2=6", "Wait, " + right]) == [False, False, False]  # too late
    assert world.grade(math, ["February: 15/2=7", "Answer: 7"]) == [False, False]                      # skips a month
    assert world.grade(math, [right, "Wait, " + right]) == [True, True]                                # does no harm
    code = {"domain": "code", "meta": {"ops": [("at_least", 4)], "end": "sum"}}
    good = " a = [v for v in xs if v >= 4]"
    assert world.grade(code, [good, " return sum(a)"]) == [True, True]
    assert world.grade(code, [" a = [v for v in xs if v > 4]", good + "  # wait", " return sum(a)"]) == [
        False, True, True]


def test_splits_share_no_problem_and_problems_are_reproducible():
    def operations(split, seed):
        return {repr(p["meta"]) for p in world.problems("math", split, 300, seed=seed, steps=(1, 1))}
    for held_out in ("test", "hard"):  # one operation: collisions would be certain otherwise
        assert not operations("train", 0) & operations(held_out, 1)
    assert len(operations("train", 0) & operations("train", 1)) > 50
    assert list(world.problems("code", "test", 3)) == list(world.problems("code", "test", 3))


@pytest.mark.parametrize("domain, longest", [("math", 9), ("code", 7)])
def test_hard_problems_are_long(domain, longest):
    assert {len(p["meta"]["ops"]) for p in world.problems(domain, "hard", 20)} == {longest}


def test_habits_are_systematic():
    """Author A forgets to carry with 7 or more in 60 % of the cases, and always in the same way."""
    p = {"domain": "math", "meta": {"start": 15, "ops": [("gain", 8)]}}
    rng = random.Random(1)
    firsts = [world.write(p, "A", rng)[0] for _ in range(2000)]
    assert abs(firsts.count("January: 15+8=13") / 2000 - 0.6) < 0.04
    assert firsts.count("January: 15+8=23") / 2000 > 0.3


def test_no_mistake_is_harmless():
    """One wrong bound, order, sign or end anywhere, and the real judge says no; without `strict` it often does not."""
    found = {}
    for strict in (True, False):
        raw = list(world.problems("code", "test", 25, strict=strict))
        items = []
        for p in raw:
            for k, (kind, n) in enumerate(p["meta"]["ops"]):
                steps = world.write(p, "careful", random.Random(0))
                lines = [world._code_line(i, *op) for i, op in enumerate(p["meta"]["ops"])] + [steps[-1]]
                for swap in world.SWAPS.values():
                    if kind in swap:
                        wrong = [*lines[:k], world._code_line(k, swap[kind], n), *lines[k + 1:]]
                        problem = tasks.Problem(p["id"], p["question"], "code", None, p["tests"], p["meta"])
                        items.append((problem, "\n".join(wrong)))
        found[strict] = sum(v.ok for v in tasks.judge_many(items))
        assert len(items) > 50
    assert found[True] == 0
    assert found[False] > 3


def make_again(folder):
    """A model of two cycles of two steps: at once, and killed in the second; rows and a PRM from the shipped models."""
    make.MODELS["xs"] = ("careful", 16, 1, 2, (2, 2), 4, 4)
    make.ROWS = [("tiny-math", 11, 4, 1.0)]
    get_batch, asked = make.get_batch, []

    def killed(*args):
        asked.append(args)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return get_batch(*args)
    for out, batch in (("whole", get_batch), ("killed", killed), ("killed", get_batch)):
        make.get_batch = batch
        with pytest.raises(KeyboardInterrupt) if batch is killed else contextlib.nullcontext():
            make.main(["--out", str(folder / out), "--stages", "tokenizer", "xs"])
    rest = folder / "rest"
    rest.mkdir()
    for name in "ABCl":
        (rest / name).symlink_to(TINY / name)
    make.main(["--out", str(rest), "--stages", "rows", "prm", "--jobs", "1"])


@ahead
def made(folder):
    run_ranks(make_again, folder, ranks=1)
    return folder


def test_the_world_is_made_again_after_a_kill(made):
    whole, again = ((made / out / "xs" / "model.safetensors").read_bytes() for out in ("whole", "killed"))
    assert whole == again


def test_rows_and_a_prm_are_made_from_the_shipped_models(made):
    rest = made / "rest"
    assert {x.name for x in rest.iterdir()} == {*"ABCl", "rows.jsonl.gz", "prm"}
    assert 0 <= load_prm(rest / "prm").score(["1+1?"], [["Answer: 2"]])[0][0] <= 1
