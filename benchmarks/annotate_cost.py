"""What does annotating cost? Ours beside the plain way: one solution, one prefix at a time.

    OMP_NUM_THREADS=1 python benchmarks/annotate_cost.py                # a few minutes on one core
    python benchmarks/annotate_cost.py --limit 20 --grow               # how cost grows with T and k

Both do the same work on the same solutions: the linear scan with k rollouts of every prefix, by
one LLM at temperature 1 and one judge. The plain way is `model.generate(num_return_sequences=k)`
for each prefix in turn, which encodes the prefix again. The third line is annotate.py's default:
binary search that stops at the first success. A label is one step's.
"""
import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import annotate  # noqa: E402
from common import tasks  # noqa: E402
from common.policy import load_policy  # noqa: E402
from common.solutions import Solution  # noqa: E402


@torch.inference_mode()
def plain(policy, solutions, k, longest=256):
    """Values of every prefix, one prefix at a time -> (values of each solution, tokens)."""
    lm, tokenizer, separator = policy.lm, policy.tokenizer, policy.separator
    values, tokens = [], 0
    for s in solutions:
        values.append([])
        for t in range(1, len(s.steps)):
            prefix = separator.join([s.problem.question, *s.steps[:t]]) + separator
            ids = torch.tensor([tokenizer(prefix, add_special_tokens=False)["input_ids"]])
            out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True,
                              temperature=1.0, top_k=0, num_return_sequences=k,
                              max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id)
            out = out[:, ids.shape[1]:]
            tokens += int((out != tokenizer.pad_token_id).sum())
            ends = tokenizer.batch_decode(out, skip_special_tokens=True)
            texts = [(s.problem, separator.join([*s.steps[:t], end])) for end in ends]
            values[-1].append(statistics.fmean(v.ok for v in tasks.judge_many(texts)))
    return values, tokens


def ours(path, solutions, *options):
    policy = load_policy(path, seed=1, max_step_tokens=40, max_steps=20)
    return annotate.rollout_votes(policy, solutions, *options), policy.generated


def timed(name, steps, work, *options):
    """Run it, print one line; returns (seconds, result)."""
    started, cpu = time.perf_counter(), time.process_time()
    result, tokens = work(*options)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"{name:<42}{seconds:>8.1f} s {cpu:>8.1f} CPU s {steps / seconds:>9.1f} labels/s "
          f"{tokens / steps:>9.1f} tokens/label", flush=True)
    return seconds, result


def sampled(policy, limit, samples, seed):
    """Solutions of the tiny world's problems, each with whether it ends right."""
    problems = tasks.load("tiny-math", None, "train", limit, seed)
    problems += tasks.load("tiny-code", None, "train", limit, seed)
    groups = []
    for p in problems:
        groups.append([Solution(p, f"{p.id}-{i}") for i in range(samples)])
    annotate.write_solutions(policy, groups)
    return annotate.candidates(groups, policy.separator, keep_unanimous=True)


def grow(path, solutions, k):
    for rollouts in (2, 4, 8, 16, 32):
        steps = sum(len(s.steps) for s in solutions)
        timed(f"k = {rollouts}", steps, ours, path, solutions, rollouts)
    for low, high in ((2, 5), (6, 7), (8, 9), (10, 20)):
        group = [s for s in solutions if low <= len(s.steps) <= high]
        if group:
            steps = sum(len(s.steps) for s in group)
            timed(f"T = {low} to {high}, {len(group)} solutions", steps, ours, path, group, k)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--policy", default=str(ROOT / "tiny" / "A"))
    a("--limit", type=int, default=10, help="problems of each domain (10)")
    a("--samples", type=int, default=4, help="solutions a problem (4)")
    a("--k", type=int, default=8, help="rollouts a prefix (8)")
    a("--seed", type=int, default=0)
    a("--grow", action="store_true", help="print how cost grows with the steps T and with k")
    args = parser.parse_args(argv)
    policy = load_policy(args.policy, seed=args.seed, max_step_tokens=40, max_steps=20)
    solutions = sampled(policy, args.limit, args.samples, args.seed)
    labels = sum(len(s.steps) for s in solutions)
    print(f"{len(solutions)} solutions, {labels} steps, k = {args.k}, "
          f"{torch.get_num_threads()} threads")
    base, one = timed("plain: generate, one prefix at a time", labels, plain, policy, solutions,
                      args.k)
    scan, votes = timed("ours, the same linear scan", labels, ours, args.policy, solutions, args.k,
                        annotate.linear_scan, False)
    many = [vote["values"][:-1] for vote in votes]  # the last value is the solution's own
    one, many = (statistics.fmean(itertools.chain.from_iterable(values)) for values in (one, many))
    print(f"   {base / scan:.1f} times fewer seconds; mean value {one:.3f}, ours {many:.3f}")
    fast, _ = timed("ours, binary search with early stopping", labels, ours, args.policy, solutions,
                    args.k)
    print(f"   {base / fast:.1f} times fewer seconds")
    if args.grow:
        grow(args.policy, solutions, args.k)


if __name__ == "__main__":
    main()
