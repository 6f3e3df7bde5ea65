"""The tree of a search, or the p_t of given solutions, as one page that needs no network.

    python search.py --strategy mcts --html tree.html       # its first twenty trees
    python prm_model.py --file samples.jsonl --html p.html  # Figures 6 and 8: p_t as a strip
    python -m common.page tree.html#2-all tree.svg          # its third tree, unfolded, as a picture
The README's is of `search.py --strategy beam --task tiny-math --seed 1 --limit 15`, #14-all.

The page is page.html with the trees as JSON in it; headless Chromium makes the picture of it.
"""
import json
import re
import shutil
import subprocess
from pathlib import Path

from common.run import command_line, expect

TEMPLATE = Path(__file__).with_suffix(".html")
PLACE = "/*trees*/[]"  # of the JSON in the template
MOST = 20              # trees of a page, which stays below a few MB
TITLES = {"beam": "beam search", "best_of_n": "best-of-N", "mcts": "MCTS",
          "majority": "majority vote"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page:
    """The file that --html names. It is written anew with each tree, so it can be opened early.

    file None: no page. ValueError: its folder is missing.
    """

    def __init__(self, file):
        self.file, self.trees = file, []
        expect(not file or Path(file).absolute().parent.is_dir(), f"--html {file}: no such folder")

    def add(self, tree, *arguments):
        """Add tree(*arguments), which is only made if there is a page with room for it."""
        if self.file and len(self.trees) < MOST:
            self.trees.append(tree(*arguments))
            Path(self.file).write_text(page(self.trees), encoding="utf-8")

    def finish(self):
        if self.file and not self.trees:
            print(f"--html {self.file}: not written, since --resume found all searches done, and "
                  "rows hold no trees")


def page(trees):
    """The HTML of these trees."""
    # "</script>" in a solution would end the script
    text = json.dumps(trees, ensure_ascii=False).replace("</", "<\\/")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def search_tree(search, row):
    """What the page shows of a finished search (common/driver.py) and its row (common/data.py).

    nodes      in the order of sampling; 0 is the question. Equal steps below one parent are one
               node, drawn `drawn` times. t: tokens generated until it was there; R: reward of the
               path up to it; visits: N of MCTS, 0 where there is none
    solutions  all that ended, in the order of row["samples"]: the number of their last node, t,
               answer, whether it is right, and R; cut off it ranks below all others
    picked     index of the chosen solution, or None
    """
    reward = search.options["reward"]
    visits = search.visits
    nodes = [{"parent": None, "text": row["question"], "visits": visits[search.root]}]
    number = {search.root: 0}  # of each node of the tree
    first = {}                 # (parent's number, text, has it ended?): number
    spent = 0
    for end in search.sampled:
        for node in end.path():
            if node in number:
                continue
            spent += len(node.ids)
            above = number[node.parent]
            if not node.text:  # only the end-of-text token
                number[node] = above
                continue
            at = first.setdefault((above, node.text, node.end is None), len(nodes))
            if at == len(nodes):
                nodes.append({"parent": above, "text": node.text, "p": node.p, "t": spent,
                              "scores": node.scores, "R": reward(node), "visits": 0, "drawn": 0})
            nodes[at]["visits"] += visits[node]
            nodes[at]["drawn"] += 1
            number[node] = at
    letters = {}  # a program's answer is a hash of what it does: A, B, ... are easier to tell apart
    solutions = []
    for (spent_then, end), sample in zip(search.finished, row["samples"], strict=True):
        answer = sample["answer"]
        if row["domain"] == "code" and answer is not None:
            answer = letters.setdefault(answer, f"program {chr(65 + len(letters) % 26)}")
        cut = sample["end"] == "length"
        solutions.append({"node": number[end], "t": spent_then, "answer": answer, "cut": cut,
                          "right": sample["correct"], "R": -1.0 if cut else reward(end)})
    return {"title": TITLES.get(row["strategy"], row["strategy"]), "id": row["id"],
            "rule": row["rule"], "spent": spent, "picked": row["picked"],
            "judged": bool(row.get("answer") or row.get("tests")),
            "nodes": nodes, "solutions": solutions}


def solution_tree(prm, question, steps, scores):
    """A given solution as a tree of one path: no search has been there."""
    nodes = [{"parent": None, "text": question, "visits": 0}]
    for t, (step, p) in enumerate(zip(steps, scores)):
        nodes.append({"parent": t, "text": step, "p": p, "t": 0, "scores": [p], "R": None,
                      "visits": 0, "drawn": 1})
    end = {"node": len(steps), "t": 0, "answer": None, "right": False, "cut": False, "R": None}
    return {"title": "PRM " + "/".join(Path(prm).parts[-2:]), "id": "", "rule": "argmax",
            "spent": 0, "picked": 0, "judged": False, "nodes": nodes, "solutions": [end]}


def opened(file):
    """The HTML of a page (FILE or FILE#TREE) after its script has run in headless Chromium."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    expect(browser, f"the picture needs a Chromium ({', '.join(BROWSERS)}), and none is on PATH")
    name, mark, tree = file.partition("#")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               "--virtual-time-budget=5000", Path(name).resolve().as_uri() + mark + tree]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("page", help="what --html has written, or one of its trees: FILE#2")
    parser.add_argument("svg", help="where the picture goes")
    args = parser.parse_args(argv)
    with parser:
        drawing = re.search(r"<svg .*?</svg>", opened(args.page), re.S)
        expect(drawing, f"{args.page}: no page of --html")
        Path(args.svg).write_text(drawing[0] + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
