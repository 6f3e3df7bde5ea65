"""How noisy are automatic labels? In the tiny world the truth of every step is known.

    python annotate.py --limit 400 --samples 4 --keep-unanimous --out runs/tiny/rows.jsonl
    python -m paper.label_noise --votes runs/tiny/rows.jsonl.votes --searches --write DIR

label noise   share of step labels that are wrong, a label being "before the first wrong step"
position      share of solutions in which the first wrong step is not the true one (or none)
kept          share of the solutions voted on that the consensus keeps

± is half a 95 % bootstrap interval over problems. --searches: linear scan, binary search and early
stopping, by one LLM. --write: rows-X.jsonl with the labels of X (one LLM, the consensus, the
truth), of one size as in Table 3; and of one domain, by consensus.
"""
import json
import random
import statistics
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from annotate import consensus, first_wrong_steps, linear_scan, rollout_votes
from common.data import first_wrong, read_rows
from common.formats.loaders import own_row
from common.metrics import interval
from common.policy import load_policy
from common.results import by_domain
from common.run import TINY, command_line, located, new_file, write_rows
from common.solutions import Solution, hard_labels
from tiny import world


def read_votes(file):
    """The solutions that were voted on, each with its problem and the truth of its steps.
    "tiny-math-train-0-17-3" is sample 3 of the world's problem 17 of that split and seed 0."""
    records, sizes, problems = [r for _, r in read_rows(file) if r["votes"]], Counter(), {}
    for r in records:
        _, domain, split, seed, i, _ = r["id"].split("-")
        sizes[domain, split, seed] = max(sizes[domain, split, seed], int(i) + 1)
    for (domain, split, seed), n in sizes.items():  # the world is made again
        problems |= {p["id"]: p for p in world.problems(domain, split, n, seed=int(seed))}
    for r in records:
        r["problem"] = problems[r["id"].rpartition("-")[0]]
        r["true"] = world.grade(r["problem"], r["completions"])
    return records


def noise(votes):
    """[(record, first wrong step named)] -> {problem: [wrong labels, labels, wrong places, n]}"""
    problems = defaultdict(lambda: [0, 0, 0, 0])
    for r, place in votes:
        if place is not None:  # an abstention is not wrong
            wrong = sum(y != t for y, t in zip(hard_labels(place, len(r["true"])), r["true"]))
            counts = (wrong, len(r["true"]), place != first_wrong(r["true"]), 1)
            name = r["problem"]["id"]
            problems[name] = [a + b for a, b in zip(problems[name], counts)]
    return problems


def ratio(parts):
    """[(wrong, total, ...)] of each problem -> share."""
    return sum(x[0] for x in parts) / max(1, sum(x[1] for x in parts))


def line(name, problems, more=""):
    """Print and return label noise and wrong positions: (value, low, high)."""
    counts, n = list(problems.values()), sum(c[3] for c in problems.values())
    label, place = interval(counts, ratio), interval([c[2:] for c in counts], ratio)
    print(f"   {name:<34}{label[0]:>8.4f} ± {(label[2] - label[1]) / 2:.4f}   "
          f"{place[0]:>8.4f} ± {(place[2] - place[1]) / 2:.4f}   {n:>6}{more}")
    return {"label noise": label, "position": place, "solutions": n}


def measure(domain, records, how):
    """Noise of each voter and of the consensus over the solutions of one domain."""
    n = len({r["problem"]["id"] for r in records})
    print(f"\n{domain}: {len(records)} solutions of {n} problems\n"
          f"   {'':<34}{'label noise':>17}   {'wrong position':>17}   solutions")
    voters, out = list(records[0]["votes"]), {}
    singles = [noise(zip(records, [r["votes"][name] for r in records])) for name in voters]
    for name, problems in zip(voters, singles):
        out[name] = line(f"LLM {name} alone", problems)
    agreed = noise([(r, consensus(list(r["votes"].values()), how)) for r in records])
    out["kept"] = sum(c[3] for c in agreed.values()) / len(records)
    out["consensus"] = line(f"consensus ({how})", agreed, f"   kept {out['kept']:.3f}")

    def cut(drawn, choose):
        """1 - label noise of the consensus / that of the average, or the best, LLM."""
        *alone, together = [ratio([counts[p] for p in drawn if p in counts])
                            for counts in (*singles, agreed)]
        return 1 - together / choose(alone) if choose(alone) else 0.0
    for against, choose in (("average", statistics.fmean), ("best", min)):
        problems = sorted(set(agreed).union(*singles))
        shares = interval(problems, partial(cut, choose=choose), rounds=300)
        print("   consensus cuts the label noise of the {} LLM by {:.1%} ({:.1%} to {:.1%})".format(
            against, *shares))
        out[f"cut against the {against}"] = shares
    # What no vote can see: a right step after a wrong one, and a right answer after a wrong step.
    out["healed"] = statistics.fmean(r["true"] != sorted(r["true"])[::-1] for r in records)
    out["lucky"] = statistics.fmean(r["correct"] and False in r["true"] for r in records)
    print(f"   wrong does not stay wrong in {out['healed']:.2%} of the solutions; "
          f"{out['lucky']:.2%} end right after a wrong step")
    return out


def searches(records, policy, k):
    """What the searches cost and err, by one LLM on the same solutions."""
    solutions = [Solution(own_row(r["problem"], 0), "", "", r["completions"], r["correct"])
                 for r in records]
    print(f"   {'':<34}{'label noise':>17}   {'wrong position':>17}   solutions   "
          "rollouts a solution")
    out, linear = {}, None
    for name, search, early in (("linear scan", linear_scan, False),
                                ("binary search", first_wrong_steps, False),
                                ("binary search, early stopping", first_wrong_steps, True)):
        votes = rollout_votes(policy, solutions, k, search, early)
        mean, low, high = cost = interval([vote["rollouts"] for vote in votes])
        linear = linear or mean
        text = f"   {mean:.2f} ± {(high - low) / 2:.2f} ({mean / linear:.0%})"
        problems = noise([(r, vote["first_error"]) for r, vote in zip(records, votes)])
        out[name] = line(name, problems, text) | {"rollouts": cost, "of linear": mean / linear}
    return out


def write(records, how, folder, seed):
    """Label sets of the same solutions' voters, drawn at random to the size of the smallest."""
    sets = defaultdict(list)
    for r in records:
        agreed = consensus(list(r["votes"].values()), how)
        places = {**r["votes"], "consensus": agreed, r["domain"]: agreed}
        labels = {name: hard_labels(place, len(r["true"])) for name, place in places.items()
                  if place is not None}
        for name, of_steps in {"truth": r["true"], **labels}.items():
            sets[name].append({"id": r["id"], "domain": r["domain"],
                               "source": f"{r['source']}, labels: {name}", "prompt": r["prompt"],
                               "completions": r["completions"], "labels": of_steps})
    folder.mkdir(parents=True, exist_ok=True)
    domains = {"math", "code"} & set(sets)
    for together in (set(sets) - domains, domains):
        size = min((len(sets[name]) for name in together), default=0)
        for name in sorted(together):
            rows = random.Random(f"{seed}").sample(sets[name], size)
            write_rows(folder / f"rows-{name}.jsonl", rows)
            print(f"rows-{name}.jsonl: {size} of {len(sets[name])} solutions")


def main(argv=None):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--votes", required=True, help="OUT.votes of annotate.py on the tiny world's problems")
    a("--consensus", default="all", help="all, majority, or a number of voters")
    a("--write", type=Path, metavar="DIR", help="write label sets there, too")
    a("--searches", action="store_true", help="measure the searches, too, by the four flags below")
    a("--policy", default=str(TINY / "A"), help="the LLM")
    a("--k", type=int, default=8, help="rollouts a prefix")
    a("--limit", type=int, help="solutions of each domain")
    a("--seed", type=int, default=0, help="of the rollouts, and of --write")
    a("--json", type=new_file, help="write the figures here")
    args = parser.parse_args(argv)
    with parser:
        with located(f"{args.votes}: not votes on the tiny world's problems"):
            records = read_votes(args.votes)
        policy = load_policy(args.policy, seed=args.seed) if args.searches else None
    out = {}
    for domain, group in by_domain(records).items():
        out[domain] = measure(domain, group, args.consensus)
        if args.searches:
            out[domain]["searches"] = searches(group[:args.limit], policy, args.k)
    if args.write:
        write(records, args.consensus, args.write, args.seed)
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
