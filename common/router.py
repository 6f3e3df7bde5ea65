"""The router: how a budget of tokens is best spent, as measured (the future work of the talk).

    python -m paper.figures router --prm runs/prm       # measures; copy router.json beside the PRM
    python search.py --strategy auto --tokens 1000      # looks up

A route is a dict of flags of search.py, with the mean tokens "generated" a problem and the
"accuracy" that were measured with them.
"""
import json
import math
from pathlib import Path

from common.run import expect, is_first

MEASURED = ("generated", "accuracy")  # what of a route is no flag


def frontier(routes, problems):
    """The routes that are better than every cheaper one, by their tokens.

    Better by more than a standard error (the rule of Breiman et al. 1984): otherwise the winner of
    many measured routes is the luckiest one, and dear.
    """
    best = []
    for route in sorted(routes, key=lambda route: (route["generated"], -route["accuracy"])):
        share = route["accuracy"]
        error = (share * (1 - share) / problems) ** 0.5
        if not best or share - best[-1]["accuracy"] > error:
            best.append(route)
    return best


def read_routes(prm):
    """The routes of router.json in a PRM's folder, the cheapest first; none without the file."""
    file = Path(prm) / "router.json"
    return json.loads(file.read_text())["routes"] if file.exists() else []


def route(prm, tokens):
    """The flags that have been best for a mean of so many tokens a problem.

    A route has a budget and an --until of its own, or none: `tokens` is only looked up.
    """
    expect(tokens < math.inf, "--strategy auto needs --tokens, the mean budget of a problem")
    routes = read_routes(prm)
    expect(routes, f"{prm}/router.json: no such file; paper.figures router makes it")
    affordable = [r for r in routes if r["generated"] <= tokens] or routes[:1]  # else the cheapest
    best = affordable[-1]
    if is_first():
        print(f"--strategy auto for {tokens} tokens: {best}")
    flags = {name: value for name, value in best.items() if name not in MEASURED}
    return {"tokens": math.inf, "until": math.inf, **flags}
