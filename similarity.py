"""Pattern similarity (§4.3, Table 2): do the answers a PRM selects in math and in code look alike to a language model?

    python similarity.py                                                 # the tiny world: samples, selects, compares
    python similarity.py --task gsm8k humaneval+ --policy Qwen/Qwen2.5-0.5B-Instruct --prm runs/prm
    python similarity.py --model M --sets rows.jsonl                     # what search.py --strategy best_of_n wrote
    torchrun --nproc_per_node=8 similarity.py --model M --sets math.jsonl math_prm.jsonl code.jsonl code_prm.jsonl

For a reference model F with weights θ and a response s to a prompt,

    A(θ, s)_i = | θ_i · ∂F(θ, s)/∂θ_i |,      S(S1, S2) = 100 · mean over s1, s2 of  A(s1)·A(s2) / (‖A(s1)‖ ‖A(s2)‖)

  F        mean LM loss on the response's tokens given the prompt: the paper names no scalar. Its sign and scale cancel
           in S, so the sum of log-probabilities (--score logprob) gives the same S; the mean logit of the tokens
           (--score logit) does not. Which model F is, the paper leaves open: by default the policy, whose patterns
           are asked about and which knows both domains; --model takes another.
  θ^r      all weights of F, or those whose name matches --params; tied embeddings are one tensor, counted once.
  ∇A       A itself: the gradient of A would be second derivatives, and the text speaks of A's patterns.
  ‖·‖, ‖·‖ their product: a cosine, between 0 and 1 because A is not negative.
  Σ        the mean over pairs, times 100: a sum would grow with the sets, and Table 2 has 27 to 31.

The double sum is bilinear: Σ Σ Â1·Â2 = (Σ Â1)·(Σ Â2) with Â = A/‖A‖. So each of the four sets has one vector, cost is
linear in the responses, and one pass gives all pairs exactly. Intervals (95 %, bootstrap over problems: the responses
to a problem stay together) and controls need single responses: of each a random projection is kept (--sketch D). What
comes from sketches is a difference to S(Math, Code), added to its exact value.

Memory: the model, one gradient, four fp32 vectors of the size of the weights. --offload keeps these in main memory and
frees each gradient as soon as the backward pass reaches it, for two backward passes a response instead of one.
Shapes: N responses, P weights, D numbers of a sketch, K = 4 sets, n problems of a domain, R bootstrap draws.
"""
import argparse
import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks
from policy import add_policy_flags, chat_prompt, load_policy_flags, load_pretrained
from prm_model import AGGREGATIONS, aggregate, load_prm
from rows import distributed, read_rows

TINY = Path(__file__).resolve().parent / "tiny"
SETS = ["Math", "Math_PRM", "Code", "Code_PRM"]
PAIRS = [(1, 3), (1, 2), (0, 3), (0, 2)]  # in the order of Table 2
KINDS = {"norm": "norm", "att": "attention", "mlp": "MLP", "embed": "embedding"}  # the first that is in a weight's name


@dataclass
class Response:
    side: int                # 0 math, 1 code
    question: str
    text: str
    correct: bool | None     # None: nobody judged it
    sets: set                # which of SETS it is in: {0, 1} for a response to math that the PRM selected


# ---------------------------------------------------------------- §4.3: the pattern of a response

def score(lm, ids_T, start, how="nll"):
    """F(θ, s), a scalar: of the tokens from `start` on, given those before."""
    target = ids_T[start:]
    logits = lm(input_ids=ids_T[None], use_cache=False, logits_to_keep=len(target) + 1).logits[0, :-1].float()
    if how == "logit":
        return logits.gather(1, target[:, None]).mean()
    return cross_entropy(logits, target) * (1 if how == "nll" else -len(target))


class Reference:
    """F with a hook on each weight tensor, called when a backward pass has finished that tensor's gradient."""

    def __init__(self, lm, params="", how="nll", sketch=65536, seed=0, offload=False):
        self.lm, self.how, self.offload, self.spans, self.P = lm.requires_grad_(False), how, offload, {}, 0
        for name, p in lm.named_parameters():  # lists a tied tensor once
            if re.search(params, name):
                self.spans[name] = a, b = self.P, self.P + p.numel()
                p.requires_grad_().register_post_accumulate_grad_hook(lambda p, a=a, b=b: self._hook(p, a, b))
                self.P = b
        if not self.P:
            raise ValueError(f"no weight's name matches --params {params!r}")
        self.tensors = [p for p in lm.parameters() if p.requires_grad]
        self.device = self.tensors[0].device
        # Sketch: weight i, with a random sign, is added to entry i mod D. D is lowered to a prime, because a D that
        # divides a matrix's width would put the whole of a heavy column on one entry.
        self.D = next(d for d in range(sketch, 0, -1) if all(d % k for k in range(2, math.isqrt(d) + 1)))
        signs = torch.randint(0, 2, (self.P,), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
        self.signs = (2 * signs - 1).to(self.device)

    def _hook(self, p, a, b):
        p.grad.mul_(p.detach()).abs_()  # A of this tensor, in the gradient's place
        if self.target:
            self._add(p, a, b)
        else:
            self.square = self.square + p.grad.float().square().sum()
        if self.offload:
            p.grad = None

    def _add(self, p, a, b):
        sums, kept, scale = self.target
        A = p.grad.flatten()
        for row in sums:
            row[a:b].add_(A.to(row.device), alpha=scale)
        signed = pad(A.float() * self.signs[a:b], (a % self.D, -b % self.D))
        kept.add_(signed.view(-1, self.D).sum(0).to(kept.device), alpha=scale)

    def accumulate(self, ids, start, sums, kept):
        """Add Â of a response to each of `sums` (P), and its sketch to `kept` (D)."""
        ids, self.target, self.square = torch.tensor(ids, device=self.device), None, 0.0
        score(self.lm, ids, start, self.how).backward()
        norm = float(self.square) ** 0.5  # known only now, so A has waited for it, or is computed again
        if not 0 < norm < math.inf:
            raise ValueError(f"a response's A has norm {norm}: there is no pattern to compare")
        self.target = sums, kept, 1 / norm
        if self.offload:
            return score(self.lm, ids, start, self.how).backward()
        for p, (a, b) in zip(self.tensors, self.spans.values()):
            self._add(p, a, b)
            p.grad = None


def encode(tokenizer, responses, separator, context):
    """[(token ids, where the response starts)], and how many were cut at the context's end."""
    items, cut = [], 0
    for r in responses:
        prompt = (chat_prompt(tokenizer, r.question, ("math", "code")[r.side], True) if tokenizer.chat_template else
                  tokenizer(r.question + separator, add_special_tokens=False)["input_ids"])
        ids = list(prompt) + tokenizer(r.text, add_special_tokens=False)["input_ids"]
        if not 0 < len(prompt) < min(context, len(ids)):
            raise ValueError(f"no prompt, or no token of the response in a context of {context}: {r.question[:50]!r}")
        cut += len(ids) > context
        items.append((ids[:context], len(prompt)))
    return items, cut


def accumulate(reference, items, sets, rank=0, world=1):
    """One pass, every rank over its share -> vectors (K, P) of SETS, kept (N, D): the same on all ranks."""
    K, N, P = len(SETS), len(items), reference.P
    both = torch.zeros(K * P + N * reference.D, device="cpu" if reference.offload else reference.device)
    sums, kept = both[:K * P].view(K, P), both[K * P:].view(N, -1)
    for i in tqdm(range(rank, N, world), desc="gradients", leave=False, disable=rank > 0 or None):
        reference.accumulate(*items[i], [sums[k] for k in sets[i]], kept[i])
    if world > 1:
        dist.all_reduce(both)
    return sums, kept


def products(sums, spans):
    """{"MLP 3": (K, K) dot products of the sets' vectors over the MLP's weights in layer 3, ...}, which add up to S."""
    found = {}
    for name, (a, b) in spans.items():
        layer, kind = re.search(r"\.\d+\.", name), next((KINDS[k] for k in KINDS if k in name), "other")
        key = f"{kind} {layer[0][1:-1]}" if layer else kind
        for piece in sums[:, a:b].split(1 << 24, dim=1):  # fp64, a piece at a time
            found[key] = found.get(key, 0) + (piece.double() @ piece.double().T).cpu()
    return found


# ---------------------------------------------------------------- is the number meaningful?

def subsets(responses, items):
    """{name: response indices}. Length-matched: for each selected response the one nearest to it in tokens that was
    not selected, each used once."""
    found = {k: [i for i, r in enumerate(responses) if k in r.sets] for k in range(len(SETS))}
    matched, size = [], [len(ids) - start for ids, start in items]
    for side in (0, 2):
        free = set(found[side]) - set(found[side + 1])
        for n in [size[i] for i in found[side + 1]][:len(free)]:
            matched.append(min(free, key=lambda j: (abs(size[j] - n), j)))  # noqa: B023
            free.remove(matched[-1])
    return {**found, "length-matched, not selected": matched,
            "correct only": [i for i, r in enumerate(responses) if r.correct],
            "wrong only": [i for i, r in enumerate(responses) if r.correct is False]}


def ends(values):
    return values.nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()


def analyse(responses, found, kept, dots, phrases, seed, rounds=1000):
    """Table 2, its controls and Figure 6's phrases. found: {name: indices of responses}, as from subsets()."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    number = [{q: n for n, q in enumerate(dict.fromkeys(r.question for r in responses if r.side == s))} for s in (0, 1)]
    problem = torch.tensor([number[r.side][r.question] for r in responses])
    draws = [torch.stack([torch.ones(n), *(  # (1 + R, n): how often a problem is drawn; row 0 is the data itself
        torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n) for _ in range(rounds))]).double()
        for n in map(len, number)]

    def totals(values, name, side):
        """Of a subset's responses to each problem of a domain: sums of values (N, ...), numbers -> (n, ...), (n)."""
        members = [i for i in found[name] if responses[i].side == side]
        out = torch.zeros(len(number[side]), *values.shape[1:], dtype=values.dtype, device=values.device)
        out.index_add_(0, problem[members].to(out.device), values[members])
        return out, torch.bincount(problem[members], minlength=len(out)).double()

    def drawn(one, two):
        """S of two subsets from the kept vectors, for the data and each bootstrap draw: (1 + R)."""
        (x, n_x), (y, n_y) = totals(kept, one, 0), totals(kept, two, 1)
        between = (x @ y.T).double().cpu()  # (n, n): what one problem's responses contribute with another's
        return 100 * ((draws[0] @ between) * draws[1]).sum(1) / ((draws[0] @ n_x) * (draws[1] @ n_y))

    size = torch.tensor([len(found[k]) for k in range(len(SETS))]).double()
    exact = 100 * sum(dots.values()) / (size[:, None] * size)
    base, plain, table = float(exact[0, 2]), drawn(0, 2), {}
    S = {f"S({SETS[i]}, {SETS[j]})": drawn(i, j) for i, j in PAIRS}
    known = dict(zip(S, (float(exact[ij]) for ij in PAIRS)))
    error = max(abs(float(S[name][0]) - known[name]) for name in S)
    S |= {name: drawn(name, name) for name in list(found)[len(SETS):]}
    # Random: each selected response gives way to any one of its problem. By bilinearity the mean of that is S(Math,
    # Code); what counts is the spread, how high a subset of this size gets without a PRM.
    means = []
    for k in (1, 3):
        pools = [[i for i in found[k - 1] if problem[i] == problem[j]] or found[k - 1] for j in found[k]]
        means.append(torch.stack([kept[[rng.choice(pool) for pool in pools]].mean(0) for _ in range(rounds // 4)]))
    null = 100 * (means[0] * means[1]).sum(1).double().cpu()
    S["random, as many"] = torch.cat([null.mean()[None], null])
    for name, values in S.items():
        if not values[0].isnan():  # nan: nobody judged the responses, say
            value = known.get(name, float(values[0] - plain[0]) + base)
            other = plain if len(values) == len(plain) else plain[:1].expand(len(values))
            table[name] = {"S": value, "interval": ends(values[1:] - values[0] + value), "difference": value - base,
                           "difference_interval": ends((values - other)[1:] - (values - other)[0] + value - base)}
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b", re.IGNORECASE)
    lines = [next((x.strip() for x in r.text.splitlines() if pattern.search(x)), None) for r in responses]
    shares, hits = {}, torch.tensor([x is not None for x in lines]).double()
    for k, name in enumerate(SETS):
        some, n = totals(hits, k, k // 2)
        share = draws[k // 2] @ some / (draws[k // 2] @ n)
        shares[name] = {"share": float(share[0]), "interval": ends(share[1:]),
                        "examples": [lines[i] for i in found[k] if lines[i]][:2]}
    return {"table": table, "phrases": shares, "sketch_error": error,
            "random_as_high": float((null - plain[0] + base >= exact[1, 3]).double().mean()),
            "responses": dict(zip(SETS, map(int, size))), "problems": [len(n) for n in number],
            "groups": {key: (100 * x / (size[:, None] * size)).tolist() for key, x in dots.items()}}


# ---------------------------------------------------------------- where the responses come from

def sample(args, separator, rank, world, device):
    """n responses of the policy to each problem, judged; the one that the PRM scores highest is selected."""
    policy, out = load_policy_flags(args, device), []
    prm = load_prm(args.prm, device, policy.dtype, max_batch_tokens=args.max_batch_tokens)
    for side, task in enumerate(args.task):
        problems = tasks.load(task, limit=args.limit or 50, seed=args.seed)[rank::world]
        for at in tqdm(range(0, len(problems), 50), desc=task, leave=False, disable=rank > 0 or None):
            some = problems[at:at + 50]
            groups = policy.complete([policy.root(p.id, p.question, p.domain) for p in some], args.n)
            for p, ends in zip(some, groups):
                own = [node.steps() for node in ends if any(node.steps())]
                scores = [aggregate(x, args.aggregate) for x in prm.score([p.question] * len(own), own)]
                verdicts = tasks.judge_many([(p, policy.separator.join(steps)) for steps in own])
                for i, (steps, v) in enumerate(zip(own, verdicts)):  # the first of equal scores is selected
                    sets = {2 * side, 2 * side + (i == scores.index(max(scores)))}
                    out.append(Response(side, p.question, separator.join(steps), v.ok, sets))
    parts = [out] * world
    if world > 1:
        dist.all_gather_object(parts, out)
    return sum(parts, []) if world > 1 else out


def read_sets(files, limit, separator):
    """Responses of four files, one for each of SETS; or of one or two with sample rows, "picked" being the selected."""
    out, where, four = [], {}, len(files) == 4
    for k, file in enumerate(files):
        for number, row in itertools.islice(read_rows(file), limit):
            try:
                samples = row["samples"] if "samples" in row else [{"steps": row.get("completions") or [row["response"]]}]
                question = row["question"] if "samples" in row else row["prompt"]
                side = k * 2 // len(files) if len(files) > 1 else ("math", "code").index(row["domain"])
                for i, s in enumerate(samples):
                    text = separator.join(s["steps"])
                    sets = {k} if four else {2 * side, 2 * side + (i == row["picked"])}
                    if not text.strip():
                        raise ValueError("an empty response")
                    if four and k % 2 and (side, question, text) in where:  # one response, which is in both sets
                        where.pop((side, question, text)).sets.add(k)
                        continue
                    out.append(Response(side, question, text, s.get("correct"), sets))
                    where[side, question, text] = out[-1]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{file}:{number}: {'no field ' * isinstance(error, KeyError)}{error}") from None
    return out


# ---------------------------------------------------------------- what is printed

def report(result, file=None):
    """The tables; into `file` a heat map: the cosine of the sets' mean patterns in each group, whatever its share."""
    print(f"{'pattern similarity':<38}S   95 % interval      minus S(Math, Code)")
    for name, x in result["table"].items():
        print(f"  {name:<30}{x['S']:>7.2f}   {'{:.2f} .. {:.2f}'.format(*x['interval']):<17} {x['difference']:>+7.2f}   "
              "{:+.2f} .. {:+.2f}".format(*x["difference_interval"]))
    print(f"{result['random_as_high']:.1%} of the random subsets reach S(Math_PRM, Code_PRM). Largest error of the sketches "
          f"on the four pairs: {result['sketch_error']:.3f}\n\npart of S from    " + "".join(
              f"{f'{SETS[i]}, {SETS[j]}':>20}" for i, j in PAIRS))
    for name, S in result["groups"].items():
        print(f"  {name:<16}" + "".join(f"{S[i][j]:>20.3f}" for i, j in PAIRS))
    print("\nresponses with a phrase of self-correction")
    for name, x in result["phrases"].items():
        print(f"  {name:<10}{x['share']:.3f}   {x['interval'][0]:.3f} .. {x['interval'][1]:.3f}   ", *x["examples"], sep="  ")
    if file:
        import matplotlib.figure
        figure = matplotlib.figure.Figure((7, 2 + 0.25 * len(result["groups"])), layout="constrained")
        axes = figure.subplots()
        figure.colorbar(axes.imshow([[S[i][j] / (S[i][i] * S[j][j]) ** 0.5 for i, j in PAIRS]
                                     for S in result["groups"].values()], aspect="auto"), label="cosine of mean patterns")
        axes.set_xticks(range(4), [f"{SETS[i]}\n{SETS[j]}" for i, j in PAIRS])
        axes.set_yticks(range(len(result["groups"])), result["groups"])
        figure.savefig(file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--sets", nargs="+", help="JSONL: Math Math_PRM Code Code_PRM, or one or two files of sample rows with `picked`")
    a("--model", help="reference model F: folder or hub id (default: the policy)")
    a("--params", default="", help="regular expression: only weights whose name matches")
    a("--score", choices=["nll", "logprob", "logit"], default="nll", help="what F(θ, s) is (nll)")
    a("--sketch", type=int, default=65536, help="numbers kept of each response (65536)")
    a("--offload", action="store_true", help="less memory, twice the time (see above)")
    a("--phrases", nargs="+", default=["wait", "however", "let me check"], help="of self-correction")
    a("--task", nargs=2, default=["tiny-math", "tiny-code"], help="a task of math and one of code, from tasks.py")
    a("--n", type=int, default=8, help="responses sampled for each problem (8)")
    a("--prm", default=str(TINY / "prm"), help="folder or hub id")
    a("--aggregate", choices=AGGREGATIONS, default="prod", help="reward of a response from its steps' p_t (prod)")
    add_policy_flags(parser, str(TINY / "A"))
    a("--limit", type=int, help="problems of each task (50), or rows of each file (all)")
    a("--seed", type=int, default=0)
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 elsewhere")
    a("--json", help="write the summary here, too")
    a("--plot", help="write the heat map of the groups here")
    args = parser.parse_args(argv)
    if args.sets and (not args.model or len(args.sets) not in (1, 2, 4)):
        parser.error("--sets takes 1, 2 or 4 files, and needs --model")
    if args.n <= 0 or args.sketch < 2 or (args.limit is not None and args.limit <= 0):
        parser.error("--n and --limit must be positive, --sketch at least 2")
    rank, world, device = distributed(args.device)
    dtype, model = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"), args.model or args.policy
    try:
        tokenizer = load_pretrained(AutoTokenizer, model)
        lm = load_pretrained(AutoModelForCausalLM, model, dtype=getattr(torch, dtype)).to(device).eval()
        separator = getattr(lm.config, "step_separator", None) or "\n\n"
        responses = (read_sets(args.sets, args.limit, separator) if args.sets else
                     sample(args, separator, rank, world, device))
        items, cut = encode(tokenizer, responses, separator, getattr(lm.config, "max_position_embeddings", 10 ** 9))
        found, rng = subsets(responses, items), random.Random(args.seed)
        if not all(found[k] for k in range(4)):
            raise ValueError("no responses in " + ", ".join(SETS[k] for k in range(4) if not found[k]))
        for i in found[1] + found[3]:  # one more control: the selected ones with their tokens shuffled
            ids, start = items[i]
            found.setdefault("selected, tokens shuffled", []).append(len(items))
            items.append((ids[:start] + rng.sample(ids[start:], len(ids) - start), start))
            responses.append(Response(responses[i].side, responses[i].question, "", None, set()))
        reference = Reference(lm, args.params, args.score, args.sketch, args.seed, args.offload)
        sums, kept = accumulate(reference, items, [r.sets for r in responses], rank, world)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if rank == 0:
        result = analyse(responses, found, kept, products(sums, reference.spans), args.phrases, args.seed)
        print(f"F = {model}, {reference.P:,} weights. Problems {result['problems']}, responses {result['responses']}, "
              f"{cut} cut at the context's end")
        report(result, args.plot)
        if args.json:
            summary = {"args": vars(args), "weights": reference.P, "cut": cut, **result}
            Path(args.json).write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
