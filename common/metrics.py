"""Figures of merit: AUC and calibration of step probabilities, FLOPs and memory of training, and
95 % intervals over problems (Wilson for shares, bootstrap for the rest).
"""
import math
import random
import resource
import statistics
import sys

import torch
from torch.distributions import Multinomial
from torch.nn import functional as F

from common.run import rank_and_world

# ---------------------------------------------------------------- how good the probabilities are

def auc_pairs(p, right):
    """(U, pairs): of all pairs of a right and a wrong step, how many rank the right one higher.

    Ties count half; AUC = U / pairs (Mann and Whitney 1947). p (M) floats, right (M) booleans.
    """
    n1, n0 = int(right.sum()), int((~right).sum())
    _, inverse, counts = p.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]  # ties share a mean rank
    return float(ranks[right].sum()) - n1 * (n1 + 1) / 2, n1 * n0


def f1(called, true):
    """Harmonic mean of precision and recall; called, true (M) booleans."""
    return 2 * int((called & true).sum()) / max(1, int(called.sum() + true.sum()))


def wrong_class(level, p, right, threshold):
    """Figures of calling wrong what has p < threshold: p (M) float64, right (M) booleans."""
    flagged, wrong = p < threshold, ~right
    hits, (u, pairs) = int((flagged & wrong).sum()), auc_pairs(p, right)
    return {f"{level} precision": hits / max(1, int(flagged.sum())),
            f"{level} recall": hits / max(1, int(wrong.sum())),
            f"{level} F1": f1(flagged, wrong),
            f"{level} macro F1": (f1(flagged, wrong) + f1(~flagged, right)) / 2,
            f"{level} AUC": u / pairs if pairs else None}


def metrics(logits_M, labels_M, steps_M):
    """Validation figures of the M labelled steps of all ranks together; steps_M: place in solution.

    right       a label of 0.5 or more; loss, brier and ece take soft labels as they are
    auc_within  pairs at the same place t only: knowing that later steps are worse earns 0.5 there
    f1_wrong    F1 of the wrong class at p < 0.5;  ece: calibration error over 15 equal bins
    """
    p, y, right = logits_M.double().sigmoid(), labels_M.double(), labels_M >= 0.5
    wrong, flagged = ~right, p < 0.5
    u, pairs = auc_pairs(p, right)
    at_place = [auc_pairs(p[steps_M == t], right[steps_M == t]) for t in steps_M.unique()]
    u_within, pairs_within = map(sum, zip(*at_place))
    # sum of (p - y) in each bin: its absolute value over M is the bin's share of the error
    gaps = torch.zeros(15, dtype=torch.float64)
    gaps.index_add_(0, (p * 15).long().clamp(max=14), p - y)
    return {"loss": float(F.binary_cross_entropy_with_logits(logits_M.double(), y)),
            "accuracy": float((flagged == wrong).double().mean()),
            "auc": u / pairs if pairs else None,
            "auc_within": u_within / pairs_within if pairs_within else None,
            "f1_wrong": f1(flagged, wrong),
            "brier": float(((p - y) ** 2).mean()), "ece": float(gaps.abs().sum()) / len(p),
            "steps": len(p), "right": float(right.double().mean())}


# ---------------------------------------------------------------- what training costs

def step_flops(N, config, lengths, passes=3):
    """(6 N D, what attention adds), FLOPs of a step on rows of these lengths (§4.1).

    A forward pass takes 2 N a token, the backward pass as much as two. QK' and PV of a causal row
    of n tokens take 2 h n^2 a layer forward, h = heads x head size.
    """
    heads = config.num_attention_heads
    h = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 2 * passes * h * config.num_hidden_layers * sum(n * n for n in lengths)
    return 2 * passes * N * sum(lengths), attention


def peak_flops(device):
    """FLOP/s of a GPU in dense bf16, from its data sheet; None for others, and for CPUs."""
    # the first that is in the name
    known = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
             "H200": 989e12, "B200": 2250e12, "L40S": 362e12}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in known.items() if gpu in name), None)


def accounting(micros, lengths, multiple, flops, seconds, device, totals):
    """What a step has cost: tokens/s, padding, utilisation of a known GPU; all steps' totals.

    micros: its micro-batches' row numbers; flops: (without attention, that of attention).
    """
    tokens, padded, all_flops = 0, 0, sum(flops)
    for numbers in filter(None, micros):
        row_lengths = [lengths[i] for i in numbers]
        tokens += sum(row_lengths)
        padded += len(numbers) * math.ceil(max(row_lengths) / multiple) * multiple
    totals.update(tokens=tokens, seconds=seconds, flops=flops[0], flops_with_attention=all_flops)
    peak = peak_flops(device)
    mfu = all_flops / seconds / rank_and_world()[1] / peak if peak else None
    return {"tokens_per_second": tokens / seconds, "padding": 1 - tokens / padded, "mfu": mfu,
            **totals}


def peak_memory(device):
    """Bytes that this process has held at most: GPU memory, or on a CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------- statistics over problems

def mean_se(values):
    """Mean and its standard error over problems (0 for a single one)."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / len(values) ** 0.5


def paired(a, b):
    """(mean difference, its standard error, z) of two lists over the same problems."""
    mean, se = mean_se([float(x) - float(y) for x, y in zip(a, b, strict=True)])
    return mean, se, mean / se if se else 0.0


def wilson(right, n, z=1.96):
    """(share, low, high) of `right` in n trials (Wilson 1927, doi 10.1080/01621459.1927.10502953).

        (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n),   p = right / n

    Six of six is 1.00 [0.61, 1.00], where a bootstrap, which never draws a wrong one, says ± 0.
    """
    p, scale = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / scale
    # at p = 0 and 1 an end is exactly p: no rounding error there
    return p, max(0.0, min(p, centre - half)), max(p, centre + half)


def interval(values, statistic=statistics.fmean, rounds=1000):
    """(statistic, low, high), 95 %, of a list with one entry a problem.

    A share (the mean of zeros and ones) has Wilson's interval. Everything else is bootstrapped: the
    problems are drawn with replacement, `rounds` times, and the middle 95 % of the results count.
    """
    if statistic is statistics.fmean and all(x in (0, 1) for x in values):
        return wilson(sum(values), len(values))
    rng = random.Random(0)
    drawn = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(rounds))
    return statistic(values), drawn[int(0.025 * rounds)], drawn[int(0.975 * rounds) - 1]


def _resampled(runs, problems, rng):
    """(mean of all values, its bootstrap draws): runs and problems are drawn with replacement."""
    values, R = torch.tensor(runs, dtype=torch.float64), len(runs)
    drawn = torch.randint(R, (len(problems), R), generator=rng)
    each = torch.stack([run[problems].mean(1) for run in values], dim=1)  # (rounds, R)
    centre = each.mean(1)
    # R draws of R runs spread less than R new runs would: widen their deviations from the centre
    wider = (R / max(1, R - 1)) ** 0.5
    return float(values.mean()), centre + (each.gather(1, drawn).mean(1) - centre) * wider


def over_runs(runs, base=None, rounds=1000):
    """(mean, low, high), 95 %, of a PRM that was trained R times: R lists of one value a problem.

    Bootstrap over training runs and problems, minus that of `base` on the same problems. Runs that
    are all alike, as one run is, have Wilson's interval if they are a share. Three runs still say
    little of how runs differ: where that is most of the interval, it covers less than 95 %.
    """
    if base is None and runs.count(runs[0]) == len(runs) and all(x in (0, 1) for x in runs[0]):
        return interval(runs[0])
    rng = torch.Generator().manual_seed(0)
    problems = torch.randint(len(runs[0]), (rounds, len(runs[0])), generator=rng)
    value, drawn = _resampled(runs, problems, rng)
    if base is not None:
        minus, other = _resampled(base, problems, rng)
        value, drawn = value - minus, drawn - other
    drawn = drawn.sort().values
    return value, float(drawn[int(0.025 * rounds)]), float(drawn[int(0.975 * rounds) - 1])


def bootstrap_counts(groups, rounds=1000, seed=0):
    """(1 + rounds, N) how often each of N values occurs in each bootstrap draw; row 0 is the data.

    groups (N): (stratum, group) of each value. Within a stratum, as many groups as it has are drawn
    with replacement: the values of a group stay together. Groups are problems, strata domains.
    """
    counts = torch.ones(1 + rounds, len(groups), dtype=torch.double)
    with torch.random.fork_rng(devices=[]):  # Multinomial takes no generator
        torch.manual_seed(seed)
        for stratum in dict.fromkeys(stratum for stratum, _ in groups):
            index = [i for i, (s, _) in enumerate(groups) if s == stratum]
            distinct = dict.fromkeys(groups[i] for i in index)
            column = {group: n for n, group in enumerate(distinct)}
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
