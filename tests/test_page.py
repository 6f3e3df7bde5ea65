"""The page of --html: its data are the search's, and a real browser opens it, unfolds and slides (Chromium, if there)."""
import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import DEVICE, TINY

import prm_model
import search
from common.node import Node
from common.page import BROWSERS, MOST, Page, main, opened, page, search_tree, solution_tree

needs_browser = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium on PATH")


def trees(file):
    return json.loads(re.search(r"^const TREES = (.*);$", file.read_text(), re.M)[1])


def steps(tree, n):
    """[(text, p)] of the path to node n."""
    path = []
    while n:
        path.append((tree["nodes"][n]["text"], round(tree["nodes"][n]["p"], 3)))
        n = tree["nodes"][n]["parent"]
    return path[::-1]


@pytest.fixture(scope="module", params=["beam", "mcts", "best_of_n", "majority"])
def searched(request, tmp_path_factory):
    """(the page's file, its first tree, the row) of one problem."""
    folder = tmp_path_factory.mktemp(request.param)
    search.main(["--strategy", request.param, "--task", "tiny-code", "--limit", "2", "--device", DEVICE, "--dtype",
                 "float32", "--html", str(folder / "tree.html"), "--out", str(folder / "rows.jsonl")])
    rows = [json.loads(line) for line in open(folder / "rows.jsonl")]
    return folder / "tree.html", trees(folder / "tree.html"), rows


def test_searches_that_are_done_have_no_page(searched, capsys):
    page, _, rows = searched
    capsys.readouterr()
    search.main(["--strategy", rows[0]["strategy"], "--task", "tiny-code", "--limit", "2", "--device", DEVICE, "--dtype",
                 "float32", "--html", str(page.with_name("more.html")), "--out", str(page.with_name("rows.jsonl")),
                 "--resume"])
    assert "more.html: not written, since --resume found all searches done" in capsys.readouterr().out
    assert not page.with_name("more.html").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_the_page_is_the_search(searched, number):
    tree, row = searched[1][number], searched[2][number]
    assert tree["nodes"][0]["text"] == row["question"]
    assert tree["spent"] == row["cost"]["policy_generated"]
    assert tree["picked"] == row["picked"]
    assert [s["right"] for s in tree["solutions"]] == [s["correct"] for s in row["samples"]]
    for solution, sample in zip(tree["solutions"], row["samples"], strict=True):
        assert [text for text, _ in steps(tree, solution["node"])] == sample["steps"]
        p = [p for _, p in steps(tree, solution["node"])]
        assert p == pytest.approx(sample["scores"], abs=2e-3)  # equal steps were scored in other batches


def test_the_visits_are_those_of_mcts(searched):
    tree = searched[1][0]
    first = [n["visits"] for n in tree["nodes"] if n["parent"] == 0]
    assert sum(first) == tree["nodes"][0]["visits"] == (32 if tree["title"] == "MCTS" else 0)


def test_equal_steps_below_one_parent_are_one_node():
    root = Node("Q")
    a, same = (Node("1+1=2", root, [5, 6], p=0.75, depth=1) for _ in "ab")
    ends = [Node("Answer: 2", a, [7], end="answer", p=0.5, depth=2), Node("3", same, [8, 9], end="eos", p=0.25, depth=2)]
    sampled = [a, same, *ends]
    s = SimpleNamespace(root=root, sampled=sampled, finished=list(zip((5, 7), ends)), visits=Counter({root: 3, a: 2}),
                        options={"reward": lambda node: node.p})
    row = {"question": "Q", "domain": "math", "id": "x", "strategy": "mcts", "rule": "weighted", "picked": 1,
           "answer": "2", "samples": [
        {"answer": "2", "correct": True, "end": "answer"}, {"answer": None, "correct": False, "end": "eos"}]}
    tree = search_tree(s, row)
    assert [(n["parent"], n["text"], n["visits"]) for n in tree["nodes"]] == [
        (None, "Q", 3), (0, "1+1=2", 2), (1, "Answer: 2", 0), (1, "3", 0)]
    assert [n.get("drawn") for n in tree["nodes"]] == [None, 2, 1, 1]
    assert [n.get("t") for n in tree["nodes"]] == [None, 2, 5, 7]  # in the order of sampling, whatever was merged
    assert [(x["node"], x["t"], x["R"]) for x in tree["solutions"]] == [(2, 5, 0.5), (3, 7, 0.25)]


def test_a_solution_cannot_end_the_script():
    assert page([solution_tree("a/b", "Q", ["</script>"], [0.5])]).count("</script>") == 1


def test_a_page_has_twenty_trees_at_most(tmp_path):
    pages = Page(str(tmp_path / "p.html"))
    for _ in range(MOST + 5):
        pages.add(solution_tree, "tiny/prm", "Q", ["x"], [0.5])
    assert len(trees(tmp_path / "p.html")) == MOST


def test_a_missing_folder_is_one_line(capsys):
    with pytest.raises(SystemExit):
        prm_model.main(["--question", "Q", "--steps", "x", "--html", "/nowhere/p.html"])
    assert capsys.readouterr().err.splitlines() == [
        "test: error: --html /nowhere/p.html: no such folder".replace("test", capsys_prog())]


def capsys_prog():
    return prm_model.command_line("").prog


# ---------------------------------------------------------------- in a browser

PROBE = """<script>window.errors = []; addEventListener("error", e => errors.push(e.message))</script>"""
SEEN = """<script>
const count = () => document.querySelectorAll("circle").length, seen = [count()];
document.querySelector(".fold")?.dispatchEvent(new MouseEvent("click", {bubbles: true}));
seen.push(count());
document.getElementById("spent").value = 0;
document.getElementById("spent").dispatchEvent(new Event("input"));
seen.push(count());
document.body.innerHTML = "<pre>" + JSON.stringify({errors, seen}) + "</pre>";
</script>"""


@needs_browser
def test_a_click_unfolds_and_the_slider_goes_back_to_the_question(searched):
    text = searched[0].read_text().replace("<script>", PROBE + "<script>", 1)
    probe = searched[0].with_name("probe.html")
    probe.write_text(text.replace("</html>", SEEN + "</html>"))
    found = json.loads(re.search(r"<pre>(.*)</pre>", opened(str(probe)))[1])
    first, unfolded, at_zero = found["seen"]
    assert found["errors"] == []
    assert first > 1
    # in the trees of plain samples every step leads to a solution, and there is room for all
    assert unfolded > first or searched[1][0]["title"] in ("best-of-N", "majority vote")
    assert at_zero == 1


@needs_browser
def test_a_strip_and_its_picture(tmp_path, capsys):
    """Figures 6 and 8, and the drawing as SVG: the steps, their p and their colours."""
    html, svg = tmp_path / "p.html", tmp_path / "p.svg"
    prm_model.main(["--prm", str(TINY / "prm"), "--device", "cpu", "--question", "Ann has 7 shells. How many?", "--steps",
                    "January: 7+5=12", "Answer: 12 <wait>", "--html", str(html)])
    main([str(html), str(svg)])
    texts = re.findall(r">([^<>\n]+)</text>", svg.read_text())
    printed = re.findall(r"^(\d\.\d{3})  (.*)$", capsys.readouterr().out, re.M)
    for p, step in printed:
        assert p in texts
        assert step.replace("<", "&lt;").replace(">", "&gt;") in texts


def test_no_browser_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["p.html", "p.svg"])
    assert "needs a Chromium" in capsys.readouterr().err
