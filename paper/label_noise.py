"""How noisy are automatic labels? In the tiny world the truth of every step is known, so that it can be said.

    python annotate.py --limit 400 --samples 4 --keep-unanimous --out runs/tiny/rows.jsonl
    python -m paper.label_noise --votes runs/tiny/rows.jsonl.votes            # label noise: each LLM, and the consensus
    python -m paper.label_noise --votes runs/tiny/rows.jsonl.votes --searches   # and what each search costs, and errs
    python -m paper.label_noise --votes runs/tiny/rows.jsonl.votes --write DIR   # rows for train.py: label sets

label noise   share of step labels that are wrong, where a step's label is "before the first wrong step"
position      share of solutions in which the first wrong step is another one than the true one (or none)
kept          share of the solutions voted on that the consensus keeps; its noise is that of what it keeps

± is half a 95 % bootstrap interval over problems. --searches runs the linear scan and the binary search without early
stopping, the binary search with it, and that with its neighbours verified, by one LLM (--policy) on the same solutions.

--write makes rows-X.jsonl with X the labels of one LLM, of the consensus, or the truth: all of one size, as Table 3 of
the paper has it; and of the consensus rows-math.jsonl and rows-code.jsonl, of one size too.
"""
import json
import random
import statistics
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import annotate
from common.data import first_wrong, read_rows
from common.loaders import own_row
from common.metrics import interval
from common.policy import load_policy
from common.run import TINY, command_line, need_folder, write_rows
from tiny import world


def read_votes(file):
    """The solutions that were voted on, each with its problem, made again from the id, and the truth of its steps.
    "tiny-math-train-0-17-3" is sample 3 of the world's problem 17 of that split and seed 0."""
    records, largest = [r for _, r in read_rows(file) if r["votes"]], Counter()
    for r in records:
        _, domain, split, seed, i, _ = r["id"].split("-")
        largest[domain, split, seed] = max(largest[domain, split, seed], int(i) + 1)
    problems = {p["id"]: p for (domain, split, seed), n in largest.items()
                for p in world.problems(domain, split, n, seed=int(seed))}
    for r in records:
        r["problem"] = problems[r["id"].rpartition("-")[0]]
        r["true"] = world.grade(r["problem"], r["completions"])
    return records


def ratio(parts):
    """[(wrong, total)] of each problem -> share."""
    return sum(w for w, _ in parts) / max(1, sum(t for _, t in parts))


def noise(opinions):
    """opinions: [(record, first wrong step said)] -> {problem: [(wrong labels, labels, wrong place)]}"""
    found = defaultdict(list)
    for r, said in opinions:
        wrong = sum((said < 0 or t < said) != y for t, y in enumerate(r["true"]))
        found[r["problem"]["id"]].append((wrong, len(r["true"]), said != first_wrong(r["true"])))
    return found


def line(name, found, more=""):
    by_problem = list(found.values())
    label, low, high = interval([(sum(w for w, _, _ in x), sum(n for _, n, _ in x)) for x in by_problem], ratio)
    place, p_low, p_high = interval([(sum(p for _, _, p in x), len(x)) for x in by_problem], ratio)
    print(f"   {name:<34}{label:>8.4f} ± {(high - low) / 2:.4f}   {place:>8.4f} ± {(p_high - p_low) / 2:.4f}   "
          f"{sum(map(len, by_problem)):>6}{more}")
    return {"label noise": label, "low": low, "high": high, "position": place, "position low": p_low,
            "position high": p_high, "solutions": sum(map(len, by_problem))}


def reduction(singles, consensus):
    """1 - consensus noise / noise of the average, and of the best, single LLM, with intervals over problems."""
    def cut(problems, choose):
        *alone, together = [ratio([(w, n) for p in problems for w, n, _ in found.get(p, ())])
                            for found in (*singles, consensus)]
        base = choose(alone)
        return 1 - together / base if base else 0.0
    problems = sorted(set(consensus).union(*singles))
    return {name: interval(problems, partial(cut, choose=choose), rounds=300)
            for name, choose in (("average", statistics.fmean), ("best", min))}


def measure(domain, records, how):
    """Noise of each voter and of the consensus over the solutions of one domain that were voted on."""
    names = list(records[0]["votes"])
    print(f"\n{domain}: {len(records)} solutions of {len({r['problem']['id'] for r in records})} problems\n"
          f"   {'':<34}{'label noise':>17}   {'wrong position':>17}   solutions")
    singles = [noise((r, r["votes"][n]) for r in records if r["votes"][n] is not None) for n in names]
    out = {n: line(f"LLM {n} alone", found) for n, found in zip(names, singles)}
    kept = [(r, annotate.consensus(list(r["votes"].values()), how)) for r in records]
    kept = [(r, place) for r, place in kept if place is not None]
    agreed = noise(kept)
    out["consensus"] = line(f"consensus ({how})", agreed, f"   kept {len(kept) / len(records):.3f}")
    for against, (value, low, high) in reduction(singles, agreed).items():
        print(f"   consensus cuts the label noise of the {against} LLM by {value:.1%} ({low:.1%} to {high:.1%})")
        out[f"cut against the {against}"] = {"value": value, "low": low, "high": high}
    healed = statistics.fmean(any(a < b for a, b in zip(r["true"], r["true"][1:])) for r in records)
    lucky = statistics.fmean(r["correct"] and False in r["true"] for r in records)
    print(f"   wrong does not stay wrong in {healed:.2%} of the solutions; {lucky:.2%} end right after a wrong step")
    out |= {"healed": healed, "lucky": lucky, "kept": len(kept) / len(records)}
    return out


def searches(records, policy, k, chunk=400):
    """What linear scan, binary search and early stopping cost and err, by one LLM on the same solutions."""
    print(f"   {'':<34}{'label noise':>17}   {'wrong position':>17}   solutions   rollouts a solution")
    out, base = {}, None
    for name, options in {"linear scan": {"search": "linear", "stop": "none"}, "binary search": {"stop": "none"},
                          "binary search, early stopping": {}, "... neighbours verified": {"verify_neighbours": True}
                          }.items():
        found = []
        for a in range(0, len(records), chunk):
            found += annotate.vote(policy, [(own_row(r["problem"], 0), r["completions"], r["correct"])
                                            for r in records[a:a + chunk]], k=k, **options)
        opinions = [(r, x["first_error"]) for r, x in zip(records, found) if x["first_error"] is not None]
        mean, low, high = interval([x["rollouts"] for x in found])
        base = base or mean
        out[name] = line(name, noise(opinions), f"   {mean:.2f} ± {(high - low) / 2:.2f} ({mean / base:.0%})")
        out[name] |= {"rollouts": mean, "rollouts low": low, "rollouts high": high, "of linear": mean / base}
    return out


def write(records, how, folder, seed):
    """Label sets of the same solutions' voters, drawn at random to the size of the smallest."""
    sets = defaultdict(list)
    for r in records:
        agreed = annotate.consensus(list(r["votes"].values()), how)
        sets["truth"].append((r, r["true"]))
        for name, said in [*r["votes"].items(), ("consensus", agreed), (r["domain"], agreed)]:
            if said is not None:
                sets[name].append((r, [said < 0 or t < said for t in range(len(r["true"]))]))
    folder.mkdir(parents=True, exist_ok=True)
    domains = {"math", "code"} & set(sets)
    for together in (set(sets) - domains, domains):
        size = min((len(sets[name]) for name in together), default=0)
        for name in sorted(together):
            write_rows(folder / f"rows-{name}.jsonl", [
                {"id": r["id"], "domain": r["domain"], "source": f"{r['source']}, labels: {name}",
                 "prompt": r["prompt"], "completions": r["completions"], "labels": labels}
                for r, labels in random.Random(f"{seed}").sample(sets[name], size)])
            print(f"rows-{name}.jsonl: {size} of {len(sets[name])} solutions")


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("--votes", required=True, help="OUT.votes of annotate.py on the tiny world's problems")
    parser.add_argument("--consensus", default="all", help="all, majority, or a number of voters")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write label sets there, too")
    parser.add_argument("--searches", action="store_true", help="measure the searches, too")
    parser.add_argument("--policy", default=str(TINY / "A"), help="the LLM of --searches")
    parser.add_argument("--k", type=int, default=8, help="rollouts a prefix")
    parser.add_argument("--limit", type=int, help="solutions of each domain for --searches")
    parser.add_argument("--seed", type=int, default=0, help="of the rollouts of --searches")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args(argv)
    need_folder(parser, args, "json")
    try:
        records = read_votes(args.votes)
    except (ValueError, OSError, KeyError) as error:
        parser.error(f"{args.votes}: not votes on the tiny world's problems ({error})")
    policy, out = load_policy(args.policy, seed=args.seed) if args.searches else None, {}
    for domain in ("math", "code"):
        mine = [r for r in records if r["domain"] == domain]
        if mine:
            out[domain] = measure(domain, mine, args.consensus)
            if args.searches:
                out[domain]["searches"] = searches(mine[:args.limit], policy, args.k)
    if args.write:
        write(records, args.consensus, args.write, args.seed)
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
