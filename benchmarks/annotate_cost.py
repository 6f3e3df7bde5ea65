"""What does annotating cost? Ours beside the plain way: one solution at a time, prefixes encoded again for every probe.

    OMP_NUM_THREADS=1 python benchmarks/annotate_cost.py                  # a few minutes on one core
    python benchmarks/annotate_cost.py --limit 20 --grow                  # and how cost grows with T and k

Both do the same work on the same solutions: the linear scan with k rollouts of every prefix, by the same LLM at
temperature 1, judged by the same judge. The plain way is `model.generate(num_return_sequences=k)` for each prefix in
turn. The third line is what annotate.py does by default: a binary search that stops early. A label is one step's.
"""
import argparse
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


@torch.inference_mode()
def plain(policy, solutions, k, longest=256):
    """Values of every prefix, one solution and one prefix at a time -> (values, tokens generated)."""
    lm, tokenizer, values, tokens = policy.lm, policy.tokenizer, [], 0
    for problem, steps, _ in solutions:
        mine = []
        for t in range(len(steps) - 1):
            prefix = policy.separator.join([problem.question, *steps[:t + 1]]) + policy.separator
            ids = torch.tensor([tokenizer(prefix, add_special_tokens=False)["input_ids"]])
            out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
                              top_k=0, num_return_sequences=k, max_new_tokens=longest,
                              pad_token_id=tokenizer.pad_token_id)[:, ids.shape[1]:]
            ends = tokenizer.batch_decode(out, skip_special_tokens=True)
            tokens += int((out != tokenizer.pad_token_id).sum())
            texts = [policy.separator.join([*steps[:t + 1], end]) for end in ends]
            mine.append(statistics.fmean(v.ok for v in tasks.judge_many([(problem, x) for x in texts])))
        values.append(mine)
    return values, tokens


def timed(name, steps, work, *args, **options):
    """Run it, print one line; returns (seconds, result)."""
    started, cpu = time.perf_counter(), time.process_time()
    result, tokens = work(*args, **options)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"{name:<44}{seconds:>8.1f} s {cpu:>8.1f} CPU s {steps / seconds:>9.1f} labels/s {tokens / steps:>9.1f} "
          "tokens/label", flush=True)
    return seconds, result


def ours(path, solutions, **options):
    policy = load_policy(path, seed=1, max_step_tokens=40, max_steps=20)
    return annotate.vote(policy, solutions, **options), policy.generated


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(ROOT / "tiny" / "A"))
    parser.add_argument("--limit", type=int, default=10, help="problems of each domain (10)")
    parser.add_argument("--samples", type=int, default=4, help="solutions a problem (4)")
    parser.add_argument("--k", type=int, default=8, help="rollouts a prefix (8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grow", action="store_true", help="print how cost grows with the steps T and with k")
    args = parser.parse_args(argv)
    policy = load_policy(args.policy, seed=args.seed, max_step_tokens=40, max_steps=20)
    problems = [p for d in ("math", "code") for p in tasks.load(f"tiny-{d}", split="train", limit=args.limit,
                                                                seed=args.seed)]
    groups = policy.complete([policy.root(p.id, p.question, p.domain) for p in problems], args.samples)
    flat = [(p, list(steps)) for p, ends in zip(problems, groups)
            for steps in dict.fromkeys(tuple(e.steps()) for e in ends if e.end != "length") if len(steps) > 1]
    verdicts = tasks.judge_many([(p, policy.separator.join(steps)) for p, steps in flat])
    solutions = [(p, steps, v.ok) for (p, steps), v in zip(flat, verdicts)]
    labels = sum(len(steps) for _, steps, _ in solutions)
    print(f"{len(solutions)} solutions, {labels} steps, k = {args.k}, {torch.get_num_threads()} threads")
    base, one = timed("plain: generate, one prefix at a time", labels, plain, policy, solutions, args.k)
    linear = {"search": "linear", "stop": "none", "k": args.k}
    mine, many = timed("ours, the same linear scan", labels, ours, args.policy, solutions, **linear)
    print(f"   {base / mine:.1f} times fewer seconds; mean value {statistics.fmean(v for x in one for v in x):.3f}, "
          f"ours {statistics.fmean(v for x in many for v in x['values'][:-1]):.3f}")
    fast, _ = timed("ours, binary search with early stopping", labels, ours, args.policy, solutions, k=args.k)
    print(f"   {base / fast:.1f} times fewer seconds")
    if args.grow:
        for k in (2, 4, 8, 16, 32):
            timed(f"k = {k}", labels, ours, args.policy, solutions, k=k)
        for low, high in ((2, 5), (6, 7), (8, 9), (10, 20)):
            some = [s for s in solutions if low <= len(s[1]) <= high]
            if some:
                timed(f"T = {low} to {high}, {len(some)} solutions", sum(len(s[1]) for s in some),
                      ours, args.policy, some, k=args.k)


if __name__ == "__main__":
    main()
