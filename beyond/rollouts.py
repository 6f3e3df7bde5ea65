"""Solutions of a policy: sampled in groups, scored, judged, evaluated, and their log-probabilities.

What beyond/reinforce.py needs around its formulas. A Solution keeps texts and token ids. The PRM
gets the texts, step by step, so that its tokenizer and its separator may differ from the policy's.

Shapes: S tokens of a solution, M tokens of all solutions of a micro-batch.
"""
import os
import statistics
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch.nn.utils.rnn import pad_sequence

from common import tasks
from common.driver import separator_of
from common.models import own_logits
from common.node import child_key
from common.results import by_domain
from common.run import gather, rank_and_world, write_rows
from common.samples import can_judge
from prm_model import aggregate
from search import arg_max, mode
from tiny import world

SAMPLES = 8  # of a held-out problem: for maj@8 and prm@8


@dataclass(eq=False)
class Solution:
    """A sampled solution: texts of its steps, the policy's tokens, what PRM and judge say."""
    problem: tasks.Problem
    prompt: list            # token ids
    ids: list               # token ids of all steps
    steps: list             # texts
    lengths: list           # tokens of each step: they sum to len(ids)
    cut: bool               # it did not end, or nothing was written
    logp: float             # of ids, when they were sampled
    p: list = field(default_factory=list)  # of each step; 0 for the last one of a cut solution
    right: bool = False     # the judge's word
    advantage: torch.Tensor | None = None  # (S)


# ------------------------------------------------------------ sampling, scores and verdicts

def to_solution(problem, leaf):
    """The path from the prompt to a node of the policy's tree, as a Solution."""
    steps, lengths, ids = [], [], []
    for node in leaf.path():
        if node.text or not steps:  # an end token alone is no step: it belongs to the one before
            steps.append(node.text)
            lengths.append(0)
        lengths[-1] += len(node.ids)
        ids += node.ids
    cut = leaf.end == "length" or not any(steps)
    logp = sum(node.logp for node in leaf.path())
    return Solution(problem, leaf.root().ids, ids, steps, lengths, cut, logp)


def sample_groups(policy, problems, n, name=""):
    """n solutions of each problem. Equal ones of a group are one object: scored and trained once.

    name: of this draw. With the seed and the problem's id it fixes the random numbers.
    """
    roots = [policy.root(f"{name}{p.id}", p.question, p.domain) for p in problems]
    groups = []
    for problem, leaves in zip(problems, policy.complete(roots, n)):
        distinct = {}
        group = [to_solution(problem, leaf) for leaf in leaves]
        groups.append([distinct.setdefault(tuple(s.ids), s) for s in group])
    return groups


def score_and_judge(prm, solutions, separator):
    """Set p and right. Training with a PRM's credit only reports what the judge says."""
    scores = prm.score([s.problem.question for s in solutions], [s.steps for s in solutions])
    for s, p in zip(solutions, scores):
        # no end, no reward: else the policy would learn not to end
        s.p = [*p[:-1], 0.0] if s.cut else p
    known = [s for s in solutions if can_judge(vars(s.problem))]
    verdicts = tasks.judge_many([(s.problem, separator.join(s.steps)) for s in known])
    for s, verdict in zip(known, verdicts):
        s.right = verdict.ok


def is_verified(problem, args):
    """Is it among the share --verified of problems whose answer may be looked at?"""
    return child_key(args.seed, f"verified {problem.id}") / 2 ** 63 < args.verified


def truth(s):
    """Is each step right, by the rule of the tiny world? None elsewhere."""
    if not s.problem.id.startswith("tiny-"):
        return None
    return world.grade({"domain": s.problem.domain, "meta": s.problem.meta}, s.steps)


# ------------------------------------------------------------ with gradient

def log_probs(lm, solutions):
    """Log-probabilities (M) of the tokens of these solutions, one after another: one forward.

    Logits are computed for the M tokens only, not for prompts and padding.
    """
    device = lm.device
    ids_BT = pad_sequence([torch.tensor(s.prompt + s.ids) for s in solutions], batch_first=True)
    row_M = torch.cat([torch.full((len(s.ids),), i) for i, s in enumerate(solutions)])
    # a token is predicted at the one before it
    place_M = torch.cat([torch.arange(len(s.ids)) + len(s.prompt) - 1 for s in solutions])
    target_M = ids_BT[row_M, place_M + 1].to(device)
    # attention is causal, so that padding on the right needs no mask
    hidden_BTh = lm.base_model(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state
    logits_MV = own_logits(lm, hidden_BTh[row_M.to(device), place_M.to(device)]).float()
    return logits_MV.gather(-1, target_M[:, None])[:, 0] - logits_MV.logsumexp(-1)


def columns(solutions, counts, device):
    """Advantage (M) of each token, and how often (M) its solution was sampled."""
    advantage_M = torch.cat([s.advantage for s in solutions])
    times = torch.tensor([float(counts[s]) for s in solutions])
    weight_M = times.repeat_interleave(torch.tensor([len(s.ids) for s in solutions]))
    return advantage_M.to(device), weight_M.to(device)


# ------------------------------------------------------------ reward against truth

def account(counts, how, generated):
    """Sums over the solutions {solution: how often} that this rank sampled in a step."""
    sums = {"generated": generated, "distinct": len(counts)}
    for name, value in (("samples", lambda s: 1), ("tokens", lambda s: len(s.ids)),
                        ("right", lambda s: s.right), ("nats", lambda s: -s.logp),
                        ("reward", lambda s: aggregate(s.p, how))):
        sums[name] = sum(n * value(s) for s, n in counts.items())
    return sums


def evaluate(policy, prm, problems, how, file):
    """{domain: figures} of 8 samples of each held-out problem, shared among the ranks.

    The samples go to `file`, in the format of common/data.py, with `true`, the truth of each step.
    how: makes one reward of a solution's p_t.
    """
    rank, world_size = rank_and_world()
    share = problems[rank::world_size]
    groups = sample_groups(policy, share, SAMPLES)
    distinct = list(dict.fromkeys(chain.from_iterable(groups)))
    score_and_judge(prm, distinct, policy.separator)
    texts = [(s.problem, policy.separator.join(s.steps)) for s in distinct]
    answers = dict(zip(distinct, tasks.vote_keys(texts)))
    rows = []
    for problem, group in zip(share, groups):
        samples = [{"steps": s.steps, "scores": s.p, "answer": answers[s], "correct": s.right,
                    "tokens": len(s.ids), "end": "length" if s.cut else "eos", "true": truth(s),
                    "reward": aggregate(s.p, how)} for s in group]
        rows.append({"id": problem.id, "domain": problem.domain, "question": problem.question,
                     "answer": problem.answer, "samples": samples,
                     "picked": arg_max([sample["reward"] for sample in samples]),
                     "vote": mode([sample["answer"] for sample in samples])})
    rows = sorted(chain.from_iterable(gather(rows)), key=lambda row: row["id"])
    if rank == 0:
        write_rows(file, rows)
    return {domain: figures(part) for domain, part in by_domain(rows).items()}


def figures(rows):
    """single: accuracy of one sample. maj, prm: of the majority vote, and of the largest reward.
    reward: mean over samples. steps: share of right steps. length: tokens. cut: share without an
    end."""
    samples = list(chain.from_iterable(row["samples"] for row in rows))
    true = list(chain.from_iterable(sample["true"] or () for sample in samples))

    def mean(values):
        return statistics.fmean(map(float, values))
    return {"single": mean(s["correct"] for s in samples),
            "maj": mean(row["samples"][row["vote"]]["correct"] for row in rows),
            "prm": mean(row["samples"][row["picked"]]["correct"] for row in rows),
            "reward": mean(s["reward"] for s in samples), "steps": mean(true) if true else None,
            "length": mean(s["tokens"] for s in samples),
            "cut": mean(s["end"] == "length" for s in samples)}


# ------------------------------------------------------------ before and after a run

def check_problems(problems, held_out, args):
    """ValueError: no answers where they are needed, too few problems, or one of them in both."""
    for problem in problems:
        needed = args.credit == "outcome" and not args.distil or is_verified(problem, args)
        if needed and not can_judge(vars(problem)):
            raise ValueError(f"{problem.id}: no answer and no tests, which --credit outcome and "
                             "--verified need; --credit prm or min need none")
    if len(problems) < args.problems:
        raise ValueError(f"{len(problems)} training problems are fewer than --problems "
                         f"{args.problems}, those of one step")
    if both := {p.question for p in problems} & {p.question for p in held_out}:
        raise ValueError(f"{len(both)} held-out problems are trained on, too: {min(both)!r:.60}")


def check_separators(policy, prm):
    """ValueError if one step of the policy may hold several of the PRM's (trl, issue 2577).

    Other differences do no harm, as scores are mapped by text: "\\n" and "<extra_0>", say.
    """
    theirs = separator_of(prm)
    if theirs is not None and policy.separator not in theirs:
        raise ValueError(f"the PRM's steps end in {theirs!r}, the policy's in "
                         f"{policy.separator!r}: one of the policy's may hold several of the "
                         f"PRM's. Pass --separator {theirs!r}")


def save_policy(out, policy):
    """OUT becomes a folder for --policy. Weights last: without them nothing can be loaded."""
    partial = out / "policy.partial"
    policy.lm.save_pretrained(partial)
    policy.tokenizer.save_pretrained(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, out / file.name)
    partial.rmdir()
