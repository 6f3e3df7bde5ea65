"""Pattern similarity (§4.3, Table 2): are responses that a PRM selects in math and in code alike?

    python similarity.py                               # the tiny world: sample, select, compare
    python similarity.py --task gsm8k humaneval+ --policy Qwen/Qwen2.5-0.5B-Instruct --prm runs/prm
    python similarity.py --model M --sets rows.jsonl   # rows of search.py --strategy best_of_n
    torchrun --nproc_per_node=8 similarity.py --model M --sets Math Math_PRM Code Code_PRM

For a reference model F with weights θ and a response s to a prompt,
    A(θ, s)_i  = | θ_i · ∂F(θ, s)/∂θ_i |
    S(S1, S2)  = 100 · mean over s1 in S1, s2 in S2 of  A(s1)·A(s2) / (‖A(s1)‖ ‖A(s2)‖)
How the paper's formula is read:
  F         mean LM loss of the response's tokens given the prompt: the paper names no scalar. Sign
            and scale cancel in S: the log-probability gives the same, the mean logit does not. Nor
            does it say which model F is: by default the policy, whose patterns are asked about.
  θ^r       all weights of F, or those whose name matches --params; a tied tensor counts once.
  ∇A        A itself: A's gradient would be second derivatives, and the text speaks of A's patterns.
  ‖·‖, ‖·‖  their product: S averages cosines, between 0 and 1 because A is not negative.
  Σ         the mean over pairs, times 100: a sum grows with the sets, and Table 2 has 27 to 31.

Memory: the model, one gradient in its dtype, a byte a weight for the sketch's signs, and four fp32
vectors of the weights' size, which --offload keeps in main memory.
Symbols: N responses, P weights, K = 4 sets, D numbers of a sketch, R bootstrap draws.
"""
import common.early  # noqa: F401  answers --help before what is slow to import
import math
import random
import re
from collections import Counter, defaultdict

import torch
import torch.distributed as dist
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from common import metrics, run, tasks
from common.policy import load_policy
from common.responses import DOMAINS, SETS, Response, encode, need_sets, read_sets, report, sets_of
from prm_model import AGGREGATIONS, aggregate, load_prm

TABLE_2 = [("Math_PRM", "Code_PRM"), ("Math_PRM", "Code"), ("Math", "Code_PRM"), ("Math", "Code")]
SELECTED, SHUFFLED = {"Math_PRM", "Code_PRM"}, "selected, tokens shuffled"


# ---------------------------------------------------------------- the paper's definitions

def loss(F, ids, start):
    """F(θ, s), a scalar: the mean LM loss of the response ids[start:] given ids[:start]."""
    ids = torch.tensor(ids, device=F.device)
    response = ids[start:]
    # The logits at one token predict the next: keep one position more, and drop the last.
    logits = F(input_ids=ids[None], use_cache=False, logits_to_keep=len(response) + 1).logits
    return cross_entropy(logits[0, :-1].float(), response)


def activation(F, ids, start):
    """A(θ, s) = |θ · ∂F/∂θ|, one tensor for each weight tensor: the paper's A is all of them."""
    weights = [w for w in F.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(loss(F, ids, start), weights)
    # In the gradient's place: a second tensor of that size would be 15 GB for a model of 7B.
    return [g.mul_(w.detach()).abs_() for w, g in zip(weights, gradients)]


def similarity(F, S1, S2):
    """S(S1, S2) word by word, of lists of (token ids, where the response starts). It holds P
    numbers for each response: for small models, and the oracle of the tests."""
    def unit(item):
        A = torch.cat([a.flatten() for a in activation(F, *item)])
        return A / A.norm()
    cosines = torch.stack([unit(s) for s in S1]) @ torch.stack([unit(s) for s in S2]).T
    return 100 * cosines.mean()


# ---------------------------------------------------------------- the same, for large models

def accumulate(F, items, sets, rank=0, world=1, params="", offload=False, D=65521, seed=0):
    """Sums (K, P) of Â = A/‖A‖ over each of SETS, sketches (N, D) of each Â: fp32, on all ranks.

    items (N): (token ids, start); sets (N): names of the sets that the response is in.
    1. The mean over pairs is bilinear, ΣΣ Â1·Â2 = (Σ Â1)·(Σ Â2): one vector a set is enough for S.
    2. Intervals and controls are S of a thousand other sets of these responses: they need a vector
       for each response, 24 TB for 800 of them and a 7B model. A sketch has nearly the same dot
       products and D numbers instead of P: 0.2 GB.
    """
    for name, w in F.named_parameters():  # choose θ^r
        w.requires_grad_(bool(re.search(params, name)))
    sizes = [w.numel() for w in F.parameters() if w.requires_grad]
    if not sizes:
        raise ValueError(f"no weight's name matches --params {params!r}")
    signs = metrics.random_signs(sum(sizes), seed).to(F.device)
    home = "cpu" if offload else F.device
    sums = torch.zeros(len(SETS), sum(sizes), device=home)  # fp32: bf16 would lose small addends
    sketches = torch.zeros(len(items), D, device=home)
    # One response at a time: the backward of a batch gives the sum of gradients, A needs each one.
    for i in tqdm(range(rank, len(items), world), "gradients", disable=rank > 0 or None):
        A = activation(F, *items[i])
        norm = float(torch.stack([vector_norm(a, dtype=torch.float) for a in A]).norm())
        if not 0 < norm < math.inf:
            raise ValueError(f"a response's A has norm {norm}: there is no pattern to compare")
        for k in (SETS.index(name) for name in sets[i] if name in SETS):
            for total, a in zip(sums[k].split(sizes), A):
                total.add_(a.flatten().to(home), alpha=1 / norm)
        sketches[i] = metrics.sketch(A, signs, D) / norm
    if world > 1:  # zero on this rank where another rank had the response
        dist.all_reduce(sums)
        dist.all_reduce(sketches)
    return sums, sketches


# ---------------------------------------------------------------- Table 2, intervals, controls

def add_shuffled(responses, items, seed):
    """Append the control of order: the selected responses again, their tokens shuffled."""
    rng = random.Random(seed)
    for r, (ids, start) in list(zip(responses, items)):  # a copy: the loop makes both longer
        if r.sets & SELECTED:
            responses.append(r._replace(text="", sets={SHUFFLED}))
            items.append((ids[:start] + rng.sample(ids[start:], len(ids) - start), start))


def random_subsets(responses, rounds, seed):
    """(R, N) the control of chance: for each selected response a random one to the same problem."""
    rng, same = random.Random(seed), defaultdict(list)
    for i, r in enumerate(responses):
        if r.sets & {"Math", "Code"}:
            same[r.domain, r.question].append(i)
    pools = [same[r.domain, r.question] or [i]  # itself, if its file alone has the problem
             for i, r in enumerate(responses) if r.sets & SELECTED]
    counts = torch.zeros(rounds, len(responses)).double()
    for row in counts:
        row += torch.tensor([rng.choice(pool) for pool in pools]).bincount(minlength=len(responses))
    return counts


def table_2(responses, sums, sketches, seed, rounds=1000):
    """Table 2 and its controls, with 95 % intervals over problems: the command's JSON."""
    def members(name):  # (N) is the response in this set?
        return torch.tensor([float(name in r.sets) for r in responses]).double()

    def S(w, v):  # w, v (R, N): how often each response counts in S1, in S2 -> (R), by the sketches
        w, v = w * is_math, v * (1 - is_math)
        return 100 * ((w @ cosines) * v).sum(-1) / (w.sum(-1) * v.sum(-1))  # NaN: an empty set

    is_math = torch.tensor([float(r.domain == "math") for r in responses]).double()
    cosines = (sketches @ sketches.T).double().cpu()
    # exact[i, j] is S(SETS[i], SETS[j]) from the sums: fp64, for some of the weights at a time.
    sizes = torch.stack([members(name).sum() for name in SETS])
    dots = sum(x.double() @ x.double().T for x in sums.split(1 << 24, dim=1)).cpu()
    exact = 100 * dots / (sizes[:, None] * sizes)
    # Row 0 of counts is the data. The responses to a problem are alike: a draw has all or none.
    problems = [(r.domain, r.question) for r in responses]
    counts, rows, errors = metrics.bootstrap_counts(problems, rounds, seed), {}, []
    pairs = {f"S({one}, {two})": (one, two) for one, two in TABLE_2}
    pairs |= {name: (name, name) for name in ("correct only", "wrong only", SHUFFLED)}
    for name, (one, two) in pairs.items():
        values = S(counts * members(one), counts * members(two))
        if one in SETS:  # the sums give S itself: shift the values of the sketches onto it
            errors.append(float(values[0] - exact[SETS.index(one), SETS.index(two)]))
        rows[name] = values - errors[-1]  # controls have no sums: shifted as S(Math, Code) is
    # The mean over random subsets is S(Math, Code), by bilinearity: their spread is what counts.
    drawn = random_subsets(responses, rounds, seed)
    null = S(drawn, drawn) - errors[-1]
    chance = {"random, as many": torch.cat([null.mean()[None], null])}
    as_high = null >= rows["S(Math_PRM, Code_PRM)"][0]
    table = metrics.intervals(rows, rows["S(Math, Code)"]) | metrics.intervals(chance, exact[0, 2])
    return {"table": table, "responses": dict(zip(SETS, sizes.int().tolist())),
            "problems": Counter(domain for domain, _ in dict.fromkeys(problems)),
            "sketch_error": max(map(abs, errors)), "random_as_high": float(as_high.double().mean())}


def sample(args, separator, rank, world, device):
    """n responses of the policy to each problem; the PRM selects the one of the highest reward."""
    flags = ("seed", "temperature", "max_solution_tokens", "max_batch_tokens")
    policy = load_policy(args.policy, device, args.dtype, **{x: getattr(args, x) for x in flags})
    prm = load_prm(args.prm, device, args.dtype, max_batch_tokens=args.max_batch_tokens)
    responses = []
    for domain, task in zip(DOMAINS, args.task):
        problems = tasks.load(task, limit=args.limit or 50, seed=args.seed)[rank::world]
        ends = policy.complete([policy.root(p.id, p.question, p.domain) for p in problems], args.n)
        solutions, best = [], {}  # best: problem -> the index of the selected solution
        for problem, nodes in zip(problems, ends):
            solutions += [(problem, node.steps()) for node in nodes if any(node.steps())]
        verdicts = tasks.judge_many((p, policy.separator.join(x)) for p, x in solutions)
        scores = prm.score([p.question for p, _ in solutions], [steps for _, steps in solutions])
        rewards = [aggregate(p_t, args.aggregate) for p_t in scores]
        for i, (problem, _) in enumerate(solutions):  # arg max; the first of equal rewards
            if rewards[i] > rewards[best.setdefault(problem.id, i)]:
                best[problem.id] = i
        for i, (problem, steps) in enumerate(solutions):
            names = sets_of(domain, i == best[problem.id], verdicts[i].ok)
            responses.append(Response(domain, problem.question, separator.join(steps), names))
    # In one order for any number of ranks.
    everyone = sum(run.gather(responses), [])
    return sorted(everyone, key=lambda r: (DOMAINS.index(r.domain), r.question))


def main(argv=None):
    parser = run.command_line(__doc__)
    a = parser.add_argument
    a("--sets", nargs="+", help="JSONL, instead of sampling: common/responses.py, read_sets()")
    a("--model", help="reference model F: folder or hub id (default: the policy)")
    a("--params", type=run.pattern, default="", help="regular expression of weights' names")
    a("--offload", action="store_true", help="the sets' vectors in main memory, not on the GPU")
    a("--task", nargs=2, default=tasks.DEFAULT, help="a task of math and one of code")
    a("--n", "--N", type=int, default=8, help="responses sampled for each problem (8)")
    a("--policy", default=str(run.TINY / "A"), help="folder or hub id")
    a("--prm", default=str(run.TINY / "prm"), help="folder, hub id or http://...")
    a("--aggregate", choices=AGGREGATIONS, default="prod", help="reward, of the steps' p_t (prod)")
    a("--temperature", type=run.amount, default=1.0, help="0 is greedy (1)")
    a("--max-solution-tokens", type=int, default=2048, help="tokens of a response (2048)")
    a("--max-batch-tokens", type=int, default=65536, help="lower it to save memory (65536)")
    a("--limit", type=int, help="problems of each task (50), or rows of each file (all)")
    a("--seed", type=int, default=0)
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    a("--json", type=run.new_file, help="write the summary here, too")
    args = parser.parse_args(argv)
    if args.sets and (not args.model or len(args.sets) not in (1, 2, 4)):
        parser.error("--sets takes 1, 2 or 4 files, and needs --model")
    if "://" in args.policy:  # A needs gradients
        parser.error("a server has no gradients: sample with search.py --out, then pass --sets")
    run.need_positive(parser, args, "n", "limit", "max_solution_tokens", "max_batch_tokens")
    with parser:
        rank, world, device = run.distributed(args.device)
        policy = load_policy(args.model or args.policy, device, args.dtype)
        responses = (read_sets(args.sets, args.limit, policy.separator) if args.sets else
                     sample(args, policy.separator, rank, world, device))
        items, cut = encode(policy, responses)
        need_sets(responses)
        add_shuffled(responses, items, args.seed)
        sums, sketches = accumulate(policy.lm, items, [r.sets for r in responses], rank, world,
                                    args.params, args.offload, seed=args.seed)
    if rank == 0:
        report({"args": vars(args), "weights": sums.shape[1], "cut": cut,
                **table_2(responses, sums, sketches, args.seed)}, args.json)


if __name__ == "__main__":
    main()
