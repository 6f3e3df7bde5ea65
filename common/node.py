"""A node of the tree of partial solutions, and the random numbers that belong to it."""
import hashlib
from dataclasses import dataclass, field


@dataclass(eq=False)  # identity, not value: two samples of the same text are two nodes
class Node:
    """One step of a solution, or the prompt (parent None). `parent` leads to all before it."""
    text: str                       # the step without its separator; of the root: the question
    parent: "Node | None" = None
    ids: list = field(default_factory=list)  # the policy's tokens, separator included
    logp: float = 0.0               # log-probability of ids given the path, at temperature 1
    end: str | None = None          # None: goes on; "eos"; "answer": \boxed{}; "length": cut off
    key: int = 0                    # the node's own random stream
    drawn: int = 0                  # children sampled so far: the index of the next one
    depth: int = 0                  # steps from the root
    domain: str = "math"
    p: float | None = None          # PRM: probability that this step is correct
    scores: list = field(default_factory=list)  # the same for each PRM of several
    kv: dict = field(default_factory=dict)      # model -> (tokens, L, 2, H, D) of its own tokens
    hidden: dict = field(default_factory=dict)  # model -> (h) hidden state of its last token
    thought: str = ""               # what a thinking model writes before its first step

    def line(self):
        """This node and all before it, from the root."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def path(self):
        """The same without the root: the steps."""
        return self.line()[1:]

    def steps(self):
        return [node.text for node in self.path() if node.text]

    def root(self):
        return self.line()[0]

    def tokens(self):
        """Generated tokens on the path."""
        return sum(len(node.ids) for node in self.path())

    def forget(self):
        """Give keys, values and hidden states back: nothing will follow this node."""
        self.kv.clear()
        self.hidden.clear()


def child_key(key, index):
    """The random stream of a node's index-th sample: 63 bits that depend on the path of indices
    alone, not on the batch, the rank or the order of sampling."""
    digest = hashlib.blake2b(f"{key}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def next_keys(nodes, n):
    """[(node, keys of its next samples)] for n samples each (one number, or one a node). A node
    that is asked for again goes on numbering where it was."""
    counts = [n] * len(nodes) if isinstance(n, int) else n
    jobs = []
    for node, count in zip(nodes, counts):
        jobs.append((node, [child_key(node.key, node.drawn + i) for i in range(count)]))
        node.drawn += count
    return jobs
