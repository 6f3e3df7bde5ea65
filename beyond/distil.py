"""Expert iteration: fine-tune the policy on what search chose, search with the new policy, repeat.

The simplest way to "aggregate the ability from exploration in test-time scaling back into the model
itself" (the talk's slide 9): Anthony et al. 2017 (arXiv 1705.08439) with a PRM as the judge of what
is worth imitating. `python -m beyond.reinforce --distil beam` runs it in the loop of
beyond/reinforce.py; a step searches --problems problems and takes --updates steps of gradient on
the solutions that were chosen. No answer is seen.

    beam       beam search, K = 4 paths of M = 4 next steps; of all that ended the largest R_i
    weighted   16 whole solutions; of the answer with the largest sum of R_i the best one
"""
import argparse
import math
from dataclasses import replace

import torch

from beyond.rollouts import to_solution
from search import solve

STRATEGIES = {"beam": ("beam", "argmax"), "weighted": ("best_of_n", "weighted")}


def choose_by_search(policy, prm, problems, args, name):
    """One group for each problem: the solution that search chose, or none if it found no end.

    Every token has the advantage 1, so that the policy gradient is the gradient of the chosen
    solution's log-likelihood. name: of this draw, as in sample_groups().
    """
    strategy, choose = STRATEGIES[args.distil]
    options = argparse.Namespace(n=16, k=4, m=4, tokens=math.inf, textbook=False, until=math.inf,
                                 choose=choose, aggregate=args.aggregate)
    # the id fixes the random numbers: another draw of the same problem needs another one
    named = [replace(problem, id=name + problem.id) for problem in problems]
    searches, rows = solve(named, strategy, policy, [prm], options)
    groups = []
    for problem, search, row in zip(problems, searches, rows):
        if row["picked"] is None:
            continue
        s = to_solution(problem, search.finished[row["picked"]][1])
        if not s.cut:  # nothing to imitate
            chosen = row["samples"][row["picked"]]  # the search has scored and judged it
            s.p, s.right = chosen["scores"], chosen["correct"]
            s.advantage = torch.ones(len(s.ids))
            groups.append([s])
    return groups
