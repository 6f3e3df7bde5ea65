"""Pattern similarity (§4.3, Table 2): do responses that a PRM selects in math and in code look alike?

    python similarity.py                                    # the tiny world: sample, select, compare
    python similarity.py --task gsm8k humaneval+ --policy Qwen/Qwen2.5-0.5B-Instruct --prm runs/prm
    python similarity.py --model M --sets rows.jsonl        # rows of search.py --strategy best_of_n
    torchrun --nproc_per_node=8 similarity.py --model M --sets m.jsonl m_prm.jsonl c.jsonl c_prm.jsonl

For a reference model F with weights θ and a response s to a prompt,
    A(θ, s)_i  = | θ_i · ∂F(θ, s)/∂θ_i |
    S(S1, S2)  = 100 · mean over s1 in S1, s2 in S2 of  A(s1)·A(s2) / (‖A(s1)‖ ‖A(s2)‖)
How the paper's formula is read:
  F         mean LM loss of the response's tokens given the prompt: the paper names no scalar. Sign and
            scale of F cancel in S, so the log-probability gives the same S; the mean logit does not.
            Nor does it say which model F is: by default the policy, whose patterns are asked about.
  θ^r       all weights of F, or those whose name matches --params; a tied tensor counts once.
  ∇A        A itself: the gradient of A would be second derivatives, and the text speaks of A's patterns.
  ‖·‖, ‖·‖  their product: S averages cosines, between 0 and 1 because A is not negative.
  Σ         the mean over pairs, times 100: a sum would grow with the sets, and Table 2 has 27 to 31.

Memory: the model, one gradient in its dtype, a byte a weight for the sketch's signs, and four fp32
vectors of the weights' size, which --offload keeps in main memory.
N responses, P weights, K = 4 sets, D numbers of a sketch, R bootstrap draws.
"""
import math
import random
import re
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from common import tasks
from common.metrics import bootstrap_counts, percentiles, phrase_pattern, random_signs, sketch  # noqa: F401
from common.policy import load_policy
from common.responses import DOMAINS, SETS, Response, encode, read_sets, report, sets_of
from common.run import TINY, command_line, distributed, gather, need_folder, need_positive
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
    """A(θ, s) = |θ · ∂F/∂θ|, a tensor for each weight tensor: the paper's A is their concatenation."""
    weights = [w for w in F.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(loss(F, ids, start), weights)
    # In the gradient's place: a second tensor of that size would be 15 GB for a model of 7B.
    return [g.mul_(w.detach()).abs_() for w, g in zip(weights, gradients)]


def similarity(F, S1, S2):
    """S(S1, S2) word by word. S1, S2: lists of (token ids, where the response starts).

    Holds P numbers for each response: for small models, and the oracle of the tests."""
    def unit(item):
        A = torch.cat([a.flatten() for a in activation(F, *item)])
        return A / A.norm()
    cosines = torch.stack([unit(s) for s in S1]) @ torch.stack([unit(s) for s in S2]).T
    return 100 * cosines.mean()


# ---------------------------------------------------------------- the same, for models of any size

def accumulate(F, items, sets, rank=0, world=1, params="", offload=False, D=65521, seed=0):
    """Sums (K, P) of Â = A/‖A‖ over each of SETS, and sketches (N, D) of each Â: fp32, on all ranks.

    items (N): (token ids, start); sets (N): names of the sets that the response is in.
    1. The mean over pairs is bilinear, ΣΣ Â1·Â2 = (Σ Â1)·(Σ Â2): one vector a set is enough for S.
    2. Intervals and controls are S of a thousand other sets, made of the same responses: they need a
       vector for each response, 24 TB for 800 responses of a 7B model. A sketch has D numbers instead
       of P and nearly the same dot products: 0.2 GB.
    """
    for name, w in F.named_parameters():  # θ^r
        w.requires_grad_(bool(re.search(params, name)))
    sizes = [w.numel() for w in F.parameters() if w.requires_grad]
    if not sizes:
        raise ValueError(f"no weight's name matches --params {params!r}")
    signs = random_signs(sum(sizes), seed).to(F.device)
    home = "cpu" if offload else F.device
    sums = torch.zeros(len(SETS), sum(sizes), device=home)
    sketches = torch.zeros(len(items), D, device=home)
    # One response at a time: the backward of a batch gives the sum of gradients, A needs each one.
    for i in tqdm(range(rank, len(items), world), "gradients", leave=False, disable=rank > 0 or None):
        A = activation(F, *items[i])
        norm = float(torch.stack([torch.linalg.vector_norm(a, dtype=torch.float) for a in A]).norm())
        if not 0 < norm < math.inf:
            raise ValueError(f"a response's A has norm {norm}: there is no pattern to compare")
        for k in (SETS.index(name) for name in sets[i] if name in SETS):
            for total, a in zip(sums[k].split(sizes), A):
                total.add_(a.flatten().to(home), alpha=1 / norm)
        sketches[i] = sketch(A, signs, D) / norm
    if world > 1:  # zero on this rank where another rank had the response
        dist.all_reduce(sums)
        dist.all_reduce(sketches)
    return sums, sketches


# ---------------------------------------------------------------- Table 2, intervals, controls

def add_shuffled(responses, items, seed):
    """Append the control of order: the selected responses again, their tokens shuffled."""
    rng = random.Random(seed)
    for r, (ids, start) in list(zip(responses, items)):
        if r.sets & SELECTED:
            responses.append(r._replace(text="", sets={SHUFFLED}))
            items.append((ids[:start] + rng.sample(ids[start:], len(ids) - start), start))


def random_subsets(responses, rounds, seed):
    """(R, N) the control of chance: for each selected response a random one to the same problem."""
    rng, same = random.Random(seed), defaultdict(list)
    for i, r in enumerate(responses):
        if r.sets & {"Math", "Code"}:
            same[r.domain, r.question].append(i)
    pools = [same[r.domain, r.question] or [i] for i, r in enumerate(responses) if r.sets & SELECTED]
    draws = [torch.tensor([rng.choice(pool) for pool in pools]) for _ in range(rounds)]
    return torch.stack([draw.bincount(minlength=len(responses)) for draw in draws]).double()


def table_2(responses, sums, sketches, seed, rounds=1000):
    """Table 2 and its controls, with 95 % intervals over problems: the command's JSON."""
    def members(name, domain):  # (N) is the response in S1, in S2?
        return torch.tensor([float(r.domain == domain and name in r.sets) for r in responses])

    def S(w, v):  # (R, N) how often the response is in S1, in S2 -> (R), NaN where a set is empty
        return 100 * ((w @ cosines) * v).sum(-1) / (w.sum(-1) * v.sum(-1))

    sizes = torch.tensor([sum(name in r.sets for r in responses) for name in SETS])
    pieces = sums.split(1 << 24, dim=1)  # fp64 for some of the weights at a time, not for all
    dots = sum(piece.double() @ piece.double().T for piece in pieces).cpu()
    exact = 100 * dots / (sizes[:, None] * sizes)
    cosines = (sketches @ sketches.T).double().cpu()
    # Row 0 of counts is the data. The responses to a problem are alike: a draw has all of them or none.
    counts = bootstrap_counts([(r.domain, r.question) for r in responses], rounds, seed)
    pairs = {f"S({one}, {two})": (one, two) for one, two in TABLE_2}
    pairs |= {name: (name, name) for name in ("correct only", "wrong only", SHUFFLED)}
    rows, errors = {}, []
    for name, (one, two) in pairs.items():
        values = S(counts * members(one, "math"), counts * members(two, "code"))
        if one in SETS:  # the last of these errors, of S(Math, Code), is what the controls share, too
            errors.append(float(values[0] - exact[SETS.index(one), SETS.index(two)]))
        rows[name] = values - errors[-1]
    # The mean over random subsets is S(Math, Code), by bilinearity: their spread is what counts.
    drawn, is_math = random_subsets(responses, rounds, seed), members("Math", "math")
    null = S(drawn * is_math, drawn * (1 - is_math)) - errors[-1]
    rows["random, as many"] = torch.cat([null.mean()[None], null])
    base, table = rows["S(Math, Code)"], {}
    for name, values in rows.items():
        minus = values - (base[0] if name.startswith("random") else base)
        if not values[0].isnan():  # NaN: nobody judged the responses, say
            table[name] = {"S": float(values[0]), "interval": percentiles(values[1:]),
                           "difference": float(minus[0]), "difference_interval": percentiles(minus[1:])}
    return {"table": table, "responses": dict(zip(SETS, sizes.tolist())),
            "problems": [len({r.question for r in responses if r.domain == d}) for d in DOMAINS],
            "sketch_error": max(map(abs, errors)),
            "random_as_high": float((null >= rows["S(Math_PRM, Code_PRM)"][0]).double().mean())}


# ---------------------------------------------------------------- sampling, and the command

def sample(args, separator, rank, world, device):
    """n responses of the policy to each problem; the PRM selects the one with the highest reward."""
    flags = ("seed", "temperature", "max_solution_tokens", "max_batch_tokens")
    policy = load_policy(args.policy, device, args.dtype, **{x: getattr(args, x) for x in flags})
    prm = load_prm(args.prm, device, args.dtype, max_batch_tokens=args.max_batch_tokens)
    responses = []
    for domain, task in zip(DOMAINS, args.task):
        problems = tasks.load(task, limit=args.limit or 50, seed=args.seed)[rank::world]
        ends = policy.complete([policy.root(p.id, p.question, p.domain) for p in problems], args.n)
        solutions, best = [], {}
        for problem, nodes in zip(problems, ends):
            solutions += [(problem, node.steps()) for node in nodes if any(node.steps())]
        verdicts = tasks.judge_many([(p, policy.separator.join(steps)) for p, steps in solutions])
        scores = prm.score([p.question for p, _ in solutions], [steps for _, steps in solutions])
        rewards = [aggregate(p_t, args.aggregate) for p_t in scores]
        for i, (problem, _) in enumerate(solutions):  # arg max; the first of equal rewards
            if rewards[i] > rewards[best.setdefault(problem.id, i)]:
                best[problem.id] = i
        for i, (problem, steps) in enumerate(solutions):
            names = sets_of(domain, i == best[problem.id], verdicts[i].ok)
            responses.append(Response(domain, problem.question, separator.join(steps), names))
    # In one order for any number of ranks.
    return sorted(sum(gather(responses), []), key=lambda r: (DOMAINS.index(r.domain), r.question))


def main(argv=None):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--sets", nargs="+", help="JSONL, instead of sampling: common/responses.py, read_sets()")
    a("--model", help="reference model F: folder or hub id (default: the policy)")
    a("--params", default="", help="regular expression: only weights whose name matches")
    a("--offload", action="store_true", help="the sets' vectors in main memory, not on the GPU")
    a("--task", nargs=2, default=["tiny-math", "tiny-code"], help="a task of math and one of code")
    a("--n", "--N", type=int, default=8, help="responses sampled for each problem (8)")
    a("--policy", default=str(TINY / "A"), help="folder or hub id")
    a("--prm", default=str(TINY / "prm"), help="folder or hub id")
    a("--aggregate", choices=AGGREGATIONS, default="prod", help="reward, of the steps' p_t (prod)")
    a("--temperature", type=float, default=1.0, help="0 is greedy (1)")
    a("--max-solution-tokens", type=int, default=2048, help="tokens of a response (2048)")
    a("--max-batch-tokens", type=int, default=65536, help="lower it to save memory (65536)")
    a("--limit", type=int, help="problems of each task (50), or rows of each file (all)")
    a("--seed", type=int, default=0)
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    a("--json", help="write the summary here, too")
    args = parser.parse_args(argv)
    if args.sets and (not args.model or len(args.sets) not in (1, 2, 4)):
        parser.error("--sets takes 1, 2 or 4 files, and needs --model")
    need_positive(parser, args, "n", "limit", "max_solution_tokens", "max_batch_tokens")
    need_folder(parser, args, "json")
    with parser:
        rank, world, device = distributed(args.device)
        policy = load_policy(args.model or args.policy, device, args.dtype)
        responses = (read_sets(args.sets, args.limit, policy.separator) if args.sets else
                     sample(args, policy.separator, rank, world, device))
        items, cut = encode(policy, responses)
        if missing := [name for name in SETS if not any(name in r.sets for r in responses)]:
            raise ValueError("no responses in " + ", ".join(missing))
        add_shuffled(responses, items, args.seed)
        sums, sketches = accumulate(policy.lm, items, [r.sets for r in responses], rank, world,
                                    args.params, args.offload, seed=args.seed)
    if rank == 0:
        result = table_2(responses, sums, sketches, args.seed)
        print(f"F = {args.model or args.policy}, {sums.shape[1]:,} weights")
        report({"args": vars(args), "cut": cut, **result}, args.json)


if __name__ == "__main__":
    main()
