"""The exhibits of paper/figures.py, small and end to end; the drawing by what stands in the SVG."""
import json
import math
import re

import pytest
from conftest import TINY

import evaluate
from common import router
from paper import drawing, figures, scaling


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder that the exhibits share: what one has sampled and searched, the next need not."""
    return tmp_path_factory.mktemp("exhibits")


@pytest.mark.parametrize("exhibit", ["fig4", "fig5", "difficulty", "router", "fig6", "fig3", "fig1", "table1"])
def test_exhibits_are_drawn(exhibit, out, capsys):
    many = exhibit == "fig6"  # self-corrections that end right are rare
    figures.main([exhibit, "--limit", "25" if many else "8", "--n", "16" if many else "4",
                  "--widths", "1x2", "--tokens", "256", "--prms", f"Tiny={TINY / 'prm'}",
                  "--policies", f"A={TINY / 'A'}", "--out", str(out)])
    points = [json.loads(x) for x in (out / f"{exhibit}.jsonl").read_text().splitlines()]
    assert points
    assert all(p["low"] <= p["value"] <= p["high"] for p in points)
    assert len((out / f"{exhibit}.md").read_text().splitlines()) == len(points) + 2
    printed = capsys.readouterr().out
    assert f"written: {out}/{exhibit}.*" in printed
    if exhibit == "router":
        routes = json.loads((out / "router.json").read_text())["routes"]
        assert [(r["generated"], r["accuracy"]) for r in routes] == [(p["x"], p["value"]) for p in points]
    elif exhibit != "table1":
        assert (out / f"{exhibit}.png").stat().st_size > 5000
        assert "<svg" in (out / f"{exhibit}.svg").read_text()
    if exhibit == "fig6":
        at = {p["x"]: p for p in points if p["series"] == "math, Tiny, corrected"}
        assert at[-2]["value"] > 0.5 > at[-1]["value"]
        assert at[-1]["solutions"] >= at[-1]["problems"] > 0
        assert re.search(r"\n0\.\d+  .*[wW]ait", printed)


def test_evaluates_door_makes_the_same(out):
    flags = ["--limit", "8", "--n", "4", "--prms", f"Tiny={TINY / 'prm'}", "--out", str(out)]
    written = []
    for main in (lambda: figures.main(["fig3", *flags]),
                 lambda: evaluate.main([*flags, "--exhibit", "fig3"])):
        main()
        written.append((out / "fig3.jsonl").read_text())
    assert written[0] == written[1]


def test_the_bins_of_difficulty_by_hand():
    """Ten problems, of which i solves i of the ten samples beyond 20 tokens; the first two samples do not count."""
    pool = [{"id": i, "samples": [{"spent": 10 * n, "correct": n <= 2 + i} for n in range(1, 13)]} for i in range(10)]
    known = scaling.by_difficulty(pool, 20)
    assert [known[i] for i in (0, 1, 2, 9)] == [(0, 0.0), (0, 0.1), (1, 0.2), (4, 0.9)]


# Four samples are finished after 40, 90, 100 and 150 tokens, with R = 0.2, 0.4, 0.9, 0.1; the search cost 150
@pytest.mark.parametrize("flags, budget, want", [
    ({}, 64, 64), ({}, 1000, 150), ({"until": 0.1}, 1000, 40), ({"until": 0.3}, 1000, 100), ({"until": 0.3}, 64, 64),
    ({"until": 0.95}, 1000, 150), ({"until": 0.3, "strategy": "mcts"}, 1000, 90)])
def test_tokens_spent_by_hand(flags, budget, want, monkeypatch):
    monkeypatch.setattr(scaling, "ROUND", 2)  # best-of-N looks after 1 and 3 samples, MCTS after each
    row = {"samples": [{"spent": spent, "scores": [p], "answer": "1"}
                       for spent, p in ((40, 0.2), (90, 0.4), (100, 0.9), (150, 0.1))], "cost": {"policy_generated": 150}}
    line = scaling.Line("", [row], {"strategy": "best_of_n"} | flags)
    assert scaling.spent(line, row, budget, "prod") == want


ROUTES = [{"strategy": "best_of_n", "generated": 60, "accuracy": 0.3}, {"strategy": "beam", "generated": 900, "accuracy": 0.8},
          {"strategy": "mcts", "generated": 700, "accuracy": 0.7, "until": 0.5}]


def test_the_frontier_has_no_route_that_a_cheaper_one_reaches():
    worse = {"strategy": "beam", "generated": 800, "accuracy": 0.7}
    assert [r["generated"] for r in router.frontier([*ROUTES, worse], 100)] == [60, 700, 900]
    # of 9 problems 0.1 more is less than a standard error, sqrt(0.8 * 0.2 / 9) = 0.13
    assert [r["generated"] for r in router.frontier(ROUTES, 9)] == [60, 700]


@pytest.mark.parametrize("tokens, strategy, until", [
    (10, "best_of_n", math.inf), (899, "mcts", 0.5), (900, "beam", math.inf), (10 ** 6, "beam", math.inf)])
def test_a_budget_is_looked_up(tokens, strategy, until, tmp_path):
    (tmp_path / "router.json").write_text(json.dumps({"routes": router.frontier(ROUTES, 100)}))
    found = router.route(tmp_path, tokens)
    assert (found["strategy"], found["until"], found["tokens"]) == (strategy, until, math.inf)


def test_one_label_names_several_training_runs():
    assert figures.named(["a=x/1", "a=x/2", "x/3"]) == {"a": ["x/1", "x/2"], "3": ["x/3"]}


@pytest.mark.parametrize("flags, message", [
    (["fig1"], "--prms"), (["fig4", "--widths", "4"], "KxM"), (["fig4", "--widths", "0x4"], "KxM"), (["fig4", "--tokens", "-5"], "--tokens must be positive"),
    (["curves", "--prms", "/nosuch"], "--prms /nosuch: no such folder"),
    (["curves", "--prms", str(TINY / "prm")], "prm/log.jsonl: no such file"),
    (["fig2", "--prms", str(TINY / "prm"), "--n", "1"], "no snapshots"), (["fig9"], "invalid choice")],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_flags_are_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        figures.main([*flags, "--limit", "1", "--out", str(tmp_path)])
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert stop.value.code == 2
    assert message in line


# ---------------------------------------------------------------- the drawing

def svg_texts(folder, name, points):
    _, title, *axes = figures.EXHIBITS[name]
    drawing.draw(name, points, folder, title, *axes)
    return re.findall(r"<text[^>]*>([^<]*)</text>", (folder / f"{name}.svg").read_text())


def line(series, xs, **more):
    return [{"series": series, "x": x, "value": 0.5, "low": 0.4, "high": 0.6, "problems": 7, **more}
            for x in xs]


@pytest.mark.parametrize("text", [
    "PRMs from different labels", "band: 95 % interval over n = 7 problems and 2 training runs",
    "math", "code", "majority", "ASLAF", "1", "2", "4", "8", "16"])
def test_a_figure_says(text, tmp_path):
    points = []
    for domain in ("math", "code"):
        points += line(f"{domain}, majority", [1, 2, 4, 8, 16])
        points += line(f"{domain}, ASLAF", [1, 2, 4, 8, 16], **{"each run": "0.4 0.6"})
    assert text in svg_texts(tmp_path, "fig3", points)


def test_an_auc_is_not_under_accuracy(tmp_path):
    points = line("math, prm@16", [1, 2]) + line("validation, step AUC", [0, 1])
    texts = svg_texts(tmp_path, "fig2", points)
    assert texts.count("accuracy") == 1
    assert texts.count("step AUC") == 2  # of the axis, and of the line


def test_sizes_have_their_models_names(tmp_path):
    points = line("math, prm@16", [1e5], prm="xs") + line("math, prm@16", [1e6], prm="l")
    assert {"xs", "l"} <= set(svg_texts(tmp_path, "fig1", points))


@pytest.mark.parametrize("lines", [
    ("consensus", "ASLAF"), ("prm@16", "best-of-N"), ("truth, corrected", "truth, not corrected"),
    ("step AUC of l", "prm@16 of l"), ("l, train loss", "l, eval loss")])
def test_one_thing_has_one_colour(lines):
    others = {}
    assert len({drawing.colour(name, others) for name in lines}) == 1


def test_different_things_have_different_colours():
    names = [x for x in drawing.COLOURS if x not in ("consensus", "PRM800K", "Math-Shepherd")]
    others = {}
    assert len({drawing.colour(name, others) for name in [*names, "x", "y", "z"]}) == len(names) + 3


@pytest.mark.parametrize("ends", [[0.5, 0.5, 0.5], [0.98, 0.99, 1.0], [0.0, 0.01, 0.9]],
                         ids=["equal", "at the top", "at the bottom"])
def test_names_at_line_ends_do_not_meet(ends):
    heights = drawing.spread(ends, 0.1, 1.0)
    gaps = [b - a for a, b in zip(heights, heights[1:])]
    assert min(gaps) >= 0.1 - 1e-9
    assert heights[-1] <= 1.0


@pytest.mark.parametrize("text, has_one", [
    ("Wait, no", True), ("LET ME CHECK", True), ("await", False)])
def test_phrases_of_self_correction(text, has_one):
    assert bool(figures.PHRASES.search(text)) == has_one
