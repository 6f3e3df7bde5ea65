"""One driver for all searches: many problems advance together, and share each batch.

A strategy of search.py is a generator for one problem:

    plan = beam(root, ...)
    request = plan.send(None)       # Request: "sample n next steps below each of these nodes"
    request = plan.send(groups)     # the answer: for each node its new nodes, scored by the PRM

The driver samples for the pending requests of all problems in one call of the policy and scores in
one pass of the PRM. So a strategy can be read one problem at a time, as in the paper, and a GPU
still sees full batches.
"""
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice

from common.run import expect, is_first


@dataclass
class Request:
    """Sample n continuations below each node: one step each, or (whole) to the solution's end."""
    nodes: list
    n: int
    whole: bool = False


@dataclass(eq=False)
class Search:
    """One problem's search and its account. A batch's costs are shared out by generated tokens."""
    root: object
    strategy: object
    options: dict
    budget: float = math.inf          # generated tokens; checked before each call of the policy
    generated: int = 0                # tokens
    cost: Counter = field(default_factory=Counter)  # what else it has cost: answer()
    sampled: list = field(default_factory=list)   # every node of the tree, in order
    finished: list = field(default_factory=list)  # (tokens spent so far, last node) of a solution
    visits: Counter = field(default_factory=Counter)  # MCTS: N; it outlives the plan
    sure: bool = False                # --until: one of the solutions is good enough

    def __post_init__(self):
        def left():
            return self.budget - self.generated
        self.plan = self.strategy(self.root, left=left, N=self.visits, **self.options)
        self.request = None
        self.advance(None)

    def advance(self, groups):
        """Send the new nodes to the strategy and receive its next request, None at its end."""
        try:
            self.request = self.plan.send(groups)
        except StopIteration:
            self.request = None
        if self.request is None or self.generated >= self.budget or self.sure:
            self.stop()

    def stop(self):
        self.request = None
        # The plan's frame holds left(), which holds this search: without the cycle the tree is
        # freed now. close() alone does not clear the frame in all versions of Python.
        self.plan.close()
        self.plan = None
        for node in [self.root, *self.sampled]:
            node.forget()  # keys and values: most of the tree's memory

    def book(self, groups):
        """Take in this search's new nodes. -> their tokens"""
        before = self.generated
        for parent, group in zip(self.request.nodes, groups):
            known = parent.tokens()
            for node in group:
                # one after the other: a smaller budget would have bought the first of them
                self.generated += node.tokens() - known
                self.sampled.append(node)
                if node.end:
                    self.finished.append((self.generated, node))
                    self.sure = self.sure or self.is_good(node)
        return self.generated - before

    def is_good(self, end):
        """D.2: no more samples where one solution is good enough. One that was cut off is none."""
        until = self.options.get("until", math.inf)
        return until < math.inf and end.end != "length" and self.options["reward"](end) >= until


def run_together(searches, policy, prms=(), progress=None):
    """Advance all searches until each is done or has spent its budget. progress: a tqdm bar."""
    for prm in prms:
        theirs = separator_of(prm)
        if theirs is not None and theirs != policy.separator:  # its steps are of another size
            warn_once(f"warning: the policy ends a step by {policy.separator!r}, the PRM was "
                      f"trained with {theirs!r}: --separator {theirs!r} makes them equal")
    live = [search for search in searches if search.request]
    while live:
        for whole in (False, True):  # too different in length to share a batch
            batch = [search for search in live if search.request and search.request.whole == whole]
            if batch:
                answer(batch, whole, policy, prms)
        if progress is not None:  # tokens: with a real model no problem may be done for minutes
            tokens = sum(search.generated for search in searches)
            progress.set_postfix_str(f"{tokens} tokens", refresh=False)
            progress.update(sum(search.request is None for search in live))
        live = [search for search in live if search.request]


def separator_of(prm):
    """The white space that ends a PRM's steps. None: a mark such as <extra_0> or a turn (RLHFlow's)
    does, which stands behind steps of any kind."""
    form = getattr(prm, "format", {"separator": ""})  # some scorers are no models
    white = form["separator"].isspace() and form["template"] != "rlhflow"
    return form["separator"] if white else None


@cache
def warn_once(text):
    if is_first():
        print(text, file=sys.stderr)


def answer(batch, whole, policy, prms):
    """One call of the policy and one pass of each PRM for the requests of all these searches."""
    prefilled, prm_tokens = policy.prefilled, sum(prm.tokens for prm in prms)
    started = time.perf_counter()
    nodes, counts = [], []
    for search in batch:
        nodes += search.request.nodes
        counts += [search.request.n] * len(search.request.nodes)
    groups = (policy.complete if whole else policy.propose)(nodes, counts)
    sampled = time.perf_counter()
    score_steps(prms, list(chain.from_iterable(groups)))
    scored = time.perf_counter()
    cost = {"policy_prefilled": policy.prefilled - prefilled,
            "prm_tokens": sum(prm.tokens for prm in prms) - prm_tokens,
            "seconds": scored - started, "prm_seconds": scored - sampled}

    groups = iter(groups)
    answers = [list(islice(groups, len(search.request.nodes))) for search in batch]
    tokens = [search.book(groups) for search, groups in zip(batch, answers)]
    for search, groups, new in zip(batch, answers, tokens):
        for name, amount in cost.items():
            search.cost[name] += amount * new / max(1, sum(tokens))
        search.advance(groups)


def score_steps(prms, leaves):
    """Set node.p of all new steps above `leaves`; of several PRMs (§4.2) the mean."""
    for prm in prms:
        for node, p in prm.score_nodes(leaves).items():
            expect(0 <= p <= 1, f"a step's score is {p:g}, no probability in [0, 1]")
            if node.p is None:
                node.scores.append(p)
    for leaf in leaves:
        for node in leaf.path():
            if node.p is None and node.scores:
                node.p = sum(node.scores) / len(node.scores)
