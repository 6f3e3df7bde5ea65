"""Figures of merit: AUC and calibration of step probabilities, bootstrap intervals, FLOPs and peak memory."""
import random
import re
import resource
import statistics
import sys

import torch
from torch.distributions import Multinomial
from torch.nn import functional as F

# ---------------------------------------------------------------- how good its probabilities are

def auc_pairs(p, right):
    """(U, pairs): of all pairs of a right and a wrong step, how many rank the right one higher (ties count half)."""
    n1, n0 = int(right.sum()), int((~right).sum())
    _, inverse, counts = p.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]  # from 1, ties share their mean rank
    return float(ranks[right].sum()) - n1 * (n1 + 1) / 2, n1 * n0


def metrics(logits_M, labels_M, steps_M):
    """Validation figures of all steps of all ranks together; "right" is a label of 0.5 or more, in all but the loss,
    Brier score and calibration error, which take soft labels as they are.

    auc_within compares steps at the same place t only (pairs pooled over t): a PRM that merely learnt that later steps
    are worse gets 0.5 there. f1_wrong: F1 of the wrong class at p < 0.5. ece: 15 equal bins.
    """
    p, y, right = logits_M.double().sigmoid(), labels_M.double(), labels_M >= 0.5
    wrong, said = ~right, p < 0.5
    u, pairs = auc_pairs(p, right)
    u_within, pairs_within = map(sum, zip(*(auc_pairs(p[steps_M == t], right[steps_M == t]) for t in steps_M.unique())))
    gaps = torch.zeros(15, dtype=torch.float64).index_add_(0, (p * 15).long().clamp(max=14), p - y)
    return {"loss": float(F.binary_cross_entropy_with_logits(logits_M.double(), y)),
            "accuracy": float((said == wrong).double().mean()),
            "auc": u / pairs if pairs else None, "auc_within": u_within / pairs_within if pairs_within else None,
            "f1_wrong": 2 * int((wrong & said).sum()) / max(1, int(wrong.sum() + said.sum())),
            "brier": float(((p - y) ** 2).mean()), "ece": float(gaps.abs().sum()) / len(p),
            "steps": len(p), "right": float(right.double().mean())}


# ---------------------------------------------------------------- what training it costs

def step_flops(N, config, lengths, frozen):
    """(6 N D, what attention adds): a forward takes 2 N a token, the backward twice that; QK' and PV of a causal row of
    n tokens take 2 h n^2 a layer forward, h = heads x head size. A frozen backbone has no backward. As is usual, all
    weights are counted for all tokens, though the last layer's MLP runs on the labelled positions only."""
    k, heads = 1 if frozen else 3, config.num_attention_heads
    h = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * k * N * sum(lengths), 2 * k * h * config.num_hidden_layers * sum(n * n for n in lengths)


def peak_flops(device):
    """FLOP/s of a GPU in dense bf16, from its data sheet; None for others, and for CPUs."""
    known = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
             "B200": 2250e12, "L40S": 362e12}  # the first that is in the name
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in known.items() if gpu in name), None)


def peak_memory(device):
    """Bytes this process has held at most: of the GPU's memory, or on a CPU all of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mean_se(values):
    """Mean and its standard error over problems (0 for a single one)."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / len(values) ** 0.5


# ---------------------------------------------------------------- statistics over problems

def interval(values, statistic=statistics.fmean, rounds=1000):
    """(statistic, low, high): 95 % percentile bootstrap of a list with one entry a problem."""
    rng = random.Random(0)
    drawn = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(rounds))
    return statistic(values), drawn[int(0.025 * rounds)], drawn[int(0.975 * rounds) - 1]


def over_runs(runs, base=None, rounds=1000):
    """(mean, low, high) of PRMs that were trained several times: runs (R lists) of one value a problem. Bootstrap over
    both: R runs and P problems are drawn with replacement. base: of what is subtracted, for the same problems.

    R draws of R runs spread less than new runs would; their deviations are widened by sqrt(R / (R - 1)) for it. Three
    runs still say little of how runs differ: where that is most of the interval, it covers less than 95 %.
    """
    rng = torch.Generator().manual_seed(0)
    problems = torch.randint(len(runs[0]), (rounds, len(runs[0])), generator=rng)

    def mean(some):  # -> of all, and of each round
        values = torch.tensor(some, dtype=torch.float64)
        drawn = torch.randint(len(some), (rounds, len(some)), generator=rng)
        each = torch.stack([run[problems].mean(1) for run in values], dim=1)  # (rounds, R)
        centre, R = each.mean(1), len(some)
        return float(values.mean()), centre + (each.gather(1, drawn).mean(1) - centre) * (R / max(1, R - 1)) ** 0.5
    value, drawn = mean(runs)
    if base is not None:
        minus, other = mean(base)
        value, drawn = value - minus, drawn - other
    drawn = drawn.sort().values
    return value, float(drawn[int(0.025 * rounds)]), float(drawn[int(0.975 * rounds) - 1])


def paired(a, b):
    """(mean difference, its standard error, z) of two lists with one entry for each of the same problems."""
    mean, se = mean_se([float(x) - float(y) for x, y in zip(a, b, strict=True)])
    return mean, se, mean / se if se else 0.0


def bootstrap_counts(groups, rounds=1000, seed=0):
    """(1 + rounds, N) how often each of N values occurs in each bootstrap draw; row 0 is the data.

    groups (N): (stratum, group) of each value. Within a stratum, as many groups as it has are drawn
    with replacement: the values of a group stay together. Groups are problems, strata domains.
    """
    torch.manual_seed(seed)  # Multinomial takes no generator
    counts = torch.ones(1 + rounds, len(groups), dtype=torch.double)
    for stratum in dict.fromkeys(stratum for stratum, _ in groups):
        index = [i for i, (s, _) in enumerate(groups) if s == stratum]
        column = {group: n for n, group in enumerate(dict.fromkeys(groups[i] for i in index))}
        draws = Multinomial(len(column), torch.ones(len(column))).sample((rounds,)).double()
        counts[1:, index] = draws[:, [column[groups[i]] for i in index]]
    return counts


def intervals(rows, base):
    """Bootstrap rows -> a table of their values and 95 % intervals.

    rows: {name: (1 + R) values, of the data and of each draw}; base: (1 + R), or a number
    returns {name: {"S", "interval", "difference" (to base), "difference_interval"}}. NaN is a draw
    in which a set was empty: it is left out, and so is a row whose data is NaN.
    """
    ends, table = torch.tensor([0.025, 0.975], dtype=torch.double), {}
    for name, values in rows.items():
        minus = values - base  # draw by draw: both come from the same problems
        if not values[0].isnan():
            table[name] = {"S": float(values[0]), "interval": values[1:].nanquantile(ends).tolist(),
                           "difference": float(minus[0]),
                           "difference_interval": minus[1:].nanquantile(ends).tolist()}
    return table


# ---------------------------------------------------------------- sketches of very long vectors

def random_signs(P, seed=0):
    """P random signs, -1 or 1 (int8). Sketches can be compared if their signs were the same."""
    return torch.randint(0, 2, (P,), dtype=torch.int8,
                         generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1)


def sketch(tensors, signs, D=65521):
    """D numbers (fp32) in place of a vector of P, which comes in pieces, tensors of any shapes.

    Number j is the sum of all entries i with i mod D = j, each with its random sign. In the dot
    product of two sketches the terms of different entries cancel on average. What is left is the
    vectors' own dot product, up to an error of about 1 / sqrt(D) of the product of their norms
    (feature hashing, arXiv:0902.2206). D should be a prime, as 65,521: one that divides the width
    of a weight matrix would put a whole heavy column on one number.
    """
    numbers, start = torch.zeros(D, device=signs.device), 0
    for x in tensors:
        signed = x.flatten() * signs[start:start + x.numel()]
        end = start + len(signed)
        # Zeros on both sides put entry i into column i mod D of whole rows.
        numbers += F.pad(signed, (start % D, -end % D)).view(-1, D).sum(0, dtype=torch.float)
        start = end
    return numbers


# ---------------------------------------------------------------- self-correction (Figure 6)

def phrase_pattern(phrases=("wait", "however", "let me check")):
    """Matches a text that has one of these phrases, as whole words, in capitals or not."""
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b", re.IGNORECASE)
