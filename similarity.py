"""Pattern similarity (§4.3, Table 2): do the answers a PRM selects in math and in code look alike to a language model?

    python similarity.py                                                 # the tiny world: samples, selects, compares
    python similarity.py --task gsm8k humaneval+ --policy Qwen/Qwen2.5-0.5B-Instruct --prm runs/prm
    python similarity.py --model M --sets rows.jsonl                     # what search.py --strategy best_of_n wrote
    torchrun --nproc_per_node=8 similarity.py --model M --sets math.jsonl math_prm.jsonl code.jsonl code_prm.jsonl

For a reference model F with weights θ and a response s to a prompt,
    A(θ, s)_i = | θ_i · ∂F(θ, s)/∂θ_i |,      S(S1, S2) = 100 · mean over s1, s2 of  A(s1)·A(s2) / (‖A(s1)‖ ‖A(s2)‖)

  F        mean LM loss on the response's tokens given the prompt: the paper names no scalar. Its sign and scale cancel
           in S, so --score logprob (their sum) gives the same S; --score logit (mean logit) does not. Which model F
           is, the paper leaves open: by default the policy, whose patterns are asked about; --model takes another.
  θ^r      all weights of F, or those whose name matches --params; tied embeddings are one tensor, counted once.
  ∇A       A itself: the gradient of A would be second derivatives, and the text speaks of A's patterns.
  ‖·‖, ‖·‖ their product: a cosine, between 0 and 1 because A is not negative.
  Σ        the mean over pairs, times 100: a sum would grow with the sets, and Table 2 has 27 to 31.

The double sum is bilinear: Σ Σ Â1·Â2 = (Σ Â1)·(Σ Â2) with Â = A/‖A‖. So each of the four sets has one vector, cost is
linear in the responses, and one pass gives all pairs exactly. Intervals (95 %, bootstrap over problems: the responses
to a problem stay together) and controls need single responses: of each a random projection is kept (--sketch D). What
comes from sketches is a difference to S(Math, Code), added to its exact value. Memory: the model, one gradient (in its
dtype: A waits for its norm; none with --low-memory), a byte a weight for the sketch's signs, and four fp32 vectors of
the size of the weights, which --offload keeps in main memory.
N responses, P weights, D numbers of a sketch, K = 4 sets, n problems of a domain, R bootstrap draws.
"""
import json
import math
import random
import re
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributions import Multinomial
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from common import tasks
from common.data import read_rows
from common.policy import add_policy_flags, chat_prompt, load_policy, load_policy_flags
from common.run import command_line, distributed, gather, need_folder, need_positive
from prm_model import AGGREGATIONS, aggregate, load_prm

SETS = ["Math", "Math_PRM", "Code", "Code_PRM"]
PAIRS = [(1, 3), (1, 2), (0, 3), (0, 2)]  # in the order of Table 2
PHRASES = ["wait", "however", "let me check"]  # of self-correction (Figure 6)
KINDS = {"norm": "norm", "att": "attention", "mlp": "MLP", "embed": "embedding"}  # the first that is in a weight's name
# side: 0 math, 1 code; correct: None if nobody judged it; sets: which of SETS it is in, {0, 1} if the PRM selected it
Response = namedtuple("Response", "side question text correct sets")


def score(lm, ids_T, start, how="nll"):
    """F(θ, s), a scalar: of the tokens from `start` on, given those before."""
    target = ids_T[start:]
    logits = lm(input_ids=ids_T[None], use_cache=False, logits_to_keep=len(target) + 1).logits[0, :-1].float()
    loss, logit = cross_entropy(logits, target), logits.gather(1, target[:, None]).mean()
    return {"nll": loss, "logprob": -len(target) * loss, "logit": logit}[how]


class Reference:
    """F with a hook on each weight tensor, called when a backward pass has finished that tensor's gradient.

    low_memory: A's norm must be known before A is added, and so the gradient of all weights is held until then; with
    low_memory a first backward pass has only the norm taken, a second one adds, and either frees each tensor at once.
    """

    def __init__(self, lm, params="", how="nll", sketch=65536, seed=0, low_memory=False):
        self.lm, self.how, self.low_memory = lm.requires_grad_(False), how, low_memory
        self.spans, self.P, self.add = {}, 0, None
        for name, p in lm.named_parameters():  # lists a tied tensor once
            if re.search(params, name):
                span = self.spans[name] = p, self.P, self.P + p.numel()
                self.P += p.numel()
                p.requires_grad_().register_post_accumulate_grad_hook(lambda _, span=span: self._hook(*span))
        if not self.P:
            raise ValueError(f"no weight's name matches --params {params!r}")
        # Sketch: weight i, with a random sign, is added to entry i mod D. D is lowered to a prime, because a D that
        # divides a matrix's width would put the whole of a heavy column on one entry.
        self.D = next(d for d in range(sketch, 0, -1) if all(d % k for k in range(2, math.isqrt(d) + 1)))
        signs = torch.randint(0, 2, (self.P,), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
        self.signs = (2 * signs - 1).to(lm.device)

    def _hook(self, p, a, b):
        p.grad.mul_(p.detach()).abs_()  # A of this tensor, in the gradient's place
        if self.add:
            self.add(p, a, b)
        else:
            self.square = self.square + torch.linalg.vector_norm(p.grad, dtype=torch.float32) ** 2
        if self.low_memory:
            p.grad = None

    def accumulate(self, ids, start, sums, kept):
        """Add Â of a response to each of `sums` (P), and its sketch to `kept` (D)."""
        self.square, self.add = 0.0, None
        F = score(self.lm, torch.tensor(ids, device=self.lm.device), start, self.how)
        F.backward(retain_graph=self.low_memory)
        if not 0 < (norm := float(self.square) ** 0.5) < math.inf:
            raise ValueError(f"a response's A has norm {norm}: there is no pattern to compare")
        self.add = partial(self._add, norm, sums, kept)
        if self.low_memory:
            F.backward()
        else:
            for p, a, b in self.spans.values():
                self.add(p, a, b)
                p.grad = None

    def _add(self, norm, sums, kept, p, a, b):
        A = p.grad.flatten()
        for row in sums:
            row[a:b].add_(A.to(row.device), alpha=1 / norm)
        signed, head = A.float() * self.signs[a:b], min(-a % self.D, b - a)  # head: up to the next multiple of D
        n = (b - a - head) // self.D  # whole rows of D after it
        body, tail = signed[head:].split([n * self.D, b - a - head - n * self.D])
        for x, at in [(signed[:head], a % self.D), (tail, 0), *([(body.view(n, -1).sum(0), 0)] if n else [])]:
            kept[at:at + len(x)].add_(x.to(kept.device), alpha=1 / norm)


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


def accumulate(reference, items, sets, rank=0, world=1, device=None):
    """One pass, every rank over its share -> vectors (K, P) of SETS, kept (N, D): the same on all ranks."""
    size = len(SETS) * reference.P
    both = torch.zeros(size + len(items) * reference.D, device=device or reference.lm.device)
    sums, kept = both[:size].view(len(SETS), -1), both[size:].view(len(items), -1)
    for i in tqdm(range(rank, len(items), world), desc="gradients", leave=False, disable=rank > 0 or None):
        reference.accumulate(*items[i], [sums[k] for k in sets[i]], kept[i])
    if world > 1:
        dist.all_reduce(both)
    return sums, kept


def products(sums, spans):
    """{"MLP 3": (K, K) dot products of the sets' vectors over the MLP's weights in layer 3, ...}, whose sum is
    S before it is divided by the sets' sizes and multiplied by 100."""
    found = {}
    for name, (_, a, b) in spans.items():
        layer, kind = re.search(r"\.\d+\.", name), next((KINDS[k] for k in KINDS if k in name), "other")
        key = f"{kind} {layer[0][1:-1]}" if layer else kind
        for piece in sums[:, a:b].split(1 << 24, dim=1):  # fp64, a piece at a time
            found[key] = found.get(key, 0) + (piece.double() @ piece.double().T).cpu()
    return found


# ---------------------------------------------------------------- is the number meaningful?

def phrase_pattern(phrases=PHRASES):
    """Matches a text that has one of these phrases, as whole words, in capitals or not."""
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b", re.IGNORECASE)


def subsets(responses, items):
    """{name: response indices}. Length-matched: not selected, nearest in tokens to a selected one, each used once."""
    found = {k: [i for i, r in enumerate(responses) if k in r.sets] for k in range(len(SETS))}
    matched, size = [], [len(ids) - start for ids, start in items]
    for side in (0, 2):
        free = set(found[side]) - set(found[side + 1])
        for i in found[side + 1][:len(free)]:
            matched.append(min(free, key=lambda j: (abs(size[j] - size[i]), j)))  # noqa: B023
            free.remove(matched[-1])
    return {**found, "length-matched, not selected": matched,
            "correct only": [i for i, r in enumerate(responses) if r.correct],
            "wrong only": [i for i, r in enumerate(responses) if r.correct is False]}


def analyse(responses, found, kept, dots, phrases, seed, rounds=1000):
    """Table 2, its controls and Figure 6's phrases. found: {name: indices of responses}, as from subsets()."""
    rng, ends, number = random.Random(seed), torch.tensor([0.025, 0.975]).double(), [{}, {}]  # {question: its number}
    problem = torch.tensor([number[r.side].setdefault(r.question, len(number[r.side])) for r in responses])
    torch.manual_seed(seed)  # (1 + R, n) for each domain: how often a problem is drawn; row 0 is the data itself
    draws = [torch.cat([torch.ones(1, n), Multinomial(n, torch.ones(n)).sample((rounds,))]).double()
             for n in map(len, number)]

    def members(name, side):
        """Responses of a subset to one domain, and how often each draw has them: indices, (1 + R, members)."""
        own = [i for i in found[name] if responses[i].side == side]
        return own, draws[side][:, problem[own]]

    def drawn(one, two):
        """S of two subsets from the sketches, for the data and each draw: (1 + R)."""
        (i, w), (j, v) = members(one, 0), members(two, 1)
        return 100 * ((w @ (kept[i] @ kept[j].T).double().cpu()) * v).sum(1) / (w.sum(1) * v.sum(1))

    size = torch.tensor([len(found[k]) for k in range(len(SETS))]).double()
    exact = {key: 100 * x / (size[:, None] * size) for key, x in dots.items()}
    whole, plain, table = sum(exact.values()), drawn(0, 2), {}
    S = {f"S({SETS[i]}, {SETS[j]})": drawn(i, j) for i, j in PAIRS}
    known = dict(zip(S, (float(whole[ij]) for ij in PAIRS)))
    error, base = max(abs(float(S[name][0]) - known[name]) for name in S), float(whole[0, 2])
    S |= {name: drawn(name, name) for name in list(found)[len(SETS):]}
    # Random ones of the same problems. By bilinearity their mean is S(Math, Code): what counts is how high they get.
    pools = [[(problem[found[k - 1]] == problem[j]).nonzero()[:, 0].tolist() or range(len(found[k - 1]))
              for j in found[k]] for k in (1, 3)]
    pairs = 100 * (kept[found[0]] @ kept[found[2]].T).double().cpu()
    null = torch.stack([pairs[[rng.choice(x) for x in pools[0]]][:, [rng.choice(x) for x in pools[1]]].mean()
                        for _ in range(rounds)])
    S["random, as many"] = torch.cat([null.mean()[None], null])
    for name, values in S.items():
        if not values[0].isnan():  # nan: nobody judged the responses, say
            value = known.get(name, float(values[0] - plain[0]) + base)
            minus = values - (plain[0] if name.startswith("random") else plain)
            table[name] = {"S": value, "difference": value - base,
                           "interval": (values[1:] - values[0] + value).nanquantile(ends).tolist(),
                           "difference_interval": (minus[1:] - minus[0] + value - base).nanquantile(ends).tolist()}
    pattern = phrase_pattern(phrases)
    lines = [next((x.strip() for x in r.text.splitlines() if pattern.search(x)), None) for r in responses]
    shares, hits = {}, torch.tensor([x is not None for x in lines]).double()
    for k, name in enumerate(SETS):
        own, w = members(k, k // 2)
        share = w @ hits[own] / w.sum(1)
        shares[name] = {"share": float(share[0]), "interval": share[1:].nanquantile(ends).tolist(),
                        "examples": [lines[i] for i in own if lines[i]][:2]}
    return {"table": table, "phrases": shares, "sketch_error": error, "problems": [len(n) for n in number],
            "random_as_high": float((null - plain[0] + base >= whole[1, 3]).double().mean()),
            "responses": dict(zip(SETS, size.int().tolist())), "groups": {k: x.tolist() for k, x in exact.items()}}


# ---------------------------------------------------------------- where the responses come from

def sample(args, separator, rank, world, device):
    """n responses of the policy to each problem, judged; the one that the PRM scores highest is selected."""
    policy, out = load_policy_flags(args, device), []
    prm = load_prm(args.prm, device, args.dtype, max_batch_tokens=args.max_batch_tokens)
    for side, task in enumerate(args.task):
        problems = tasks.load(task, limit=args.limit or 50, seed=args.seed)[rank::world]
        ends = policy.complete([policy.root(p.id, p.question, p.domain) for p in problems], args.n)
        groups = [[node.steps() for node in last if any(node.steps())] for last in ends]
        texts = [(p, policy.separator.join(steps)) for p, own in zip(problems, groups) for steps in own]
        verdicts = iter(tasks.judge_many(texts))
        for p, own in zip(tqdm(problems, desc=task, leave=False, disable=rank > 0 or None), groups):
            scores = [aggregate(x, args.aggregate) for x in prm.score([p.question] * len(own), own)]
            for i, steps in enumerate(own):  # the first of equal scores is selected
                sets = {2 * side, 2 * side + (i == scores.index(max(scores)))}
                out.append(Response(side, p.question, separator.join(steps), next(verdicts).ok, sets))
    return sorted(sum(gather(out), []), key=lambda r: (r.side, r.question))  # in one order for any number of ranks


def read_sets(files, limit, separator):
    """From four files, one for each of SETS, or of one or two of sample rows, whose "picked" is selected."""
    out, where = [], {}
    for k, file in enumerate(files):
        for number, row in list(read_rows(file))[:limit]:
            try:
                question, samples = ((row["question"], row["samples"]) if "samples" in row else
                                     (row["prompt"], [{"steps": row.get("completions") or [row["response"]]}]))
                side = k * 2 // len(files) if len(files) > 1 else {"math": 0, "code": 1}[row["domain"]]
                for i, s in enumerate(samples):
                    if not isinstance(s["steps"], list) or not isinstance(question, str):
                        raise TypeError("the question must be a text, a response a list of texts")
                    text = separator.join(s["steps"])
                    if not text.strip():
                        raise ValueError("an empty response")
                    sets = {k} if len(files) == 4 else {2 * side, 2 * side + (i == row["picked"])}
                    if len(files) == 4 and k % 2 and (side, question, text) in where:  # in the file of all, too
                        where.pop((side, question, text)).sets.add(k)
                    else:
                        out.append(Response(side, question, text, s.get("correct"), sets))
                        where[side, question, text] = out[-1]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{file}:{number}: {'no field ' * isinstance(error, KeyError)}{error}") from None
    return out


def report(result, file=None):
    """Print the tables, and draw what each group of weights contributes to S into `file`."""
    print(f"{'pattern similarity':<38}S   95 % interval      minus S(Math, Code)")
    for name, x in result["table"].items():
        print(f"  {name:<30}{x['S']:>7.2f}   {'{:.2f} .. {:.2f}'.format(*x['interval']):<17} {x['difference']:>+7.2f}  "
              " {:+.2f} .. {:+.2f}".format(*x["difference_interval"]))
    print(f"{result['random_as_high']:.1%} of the random subsets reach S(Math_PRM, Code_PRM). Largest error of the "
          f"sketches on the four pairs: {result['sketch_error']:.3f}\n\nresponses with a phrase of self-correction")
    for name, x in result["phrases"].items():
        print(f"  {name:<10}{x['share']:.3f}   {'{:.3f} .. {:.3f}'.format(*x['interval'])}", *x["examples"], sep="   ")
    names, cells = list(result["groups"]), [[S[i][j] for i, j in PAIRS] for S in result["groups"].values()]
    pairs = [f"{SETS[i]}, {SETS[j]}" for i, j in PAIRS]
    print(f"\n{'part of S from':<16}" + "".join(f"{x:>20}" for x in pairs))
    for name, row in zip(names, cells):
        print(f"  {name:<14}" + "".join(f"{x:>20.3f}" for x in row))
    if file:
        from matplotlib.figure import Figure
        axes = (figure := Figure((9, 2 + 0.25 * len(names)), layout="constrained")).subplots()
        figure.colorbar(axes.imshow(cells, aspect="auto"), label="part of S")
        axes.set(xticks=range(4), xticklabels=pairs, yticks=range(len(names)), yticklabels=names)
        figure.savefig(file)


def main(argv=None):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--sets", nargs="+", help="JSONL: Math Math_PRM Code Code_PRM, or one or two files of sample rows with `picked`")
    a("--model", help="reference model F: folder or hub id (default: the policy)")
    a("--params", default="", help="regular expression: only weights whose name matches")
    a("--score", choices=["nll", "logprob", "logit"], default="nll", help="what F(θ, s) is (nll)")
    a("--sketch", type=int, default=65536, help="numbers kept of each response (65536)")
    a("--offload", action="store_true", help="the sets' vectors in main memory, not on the GPU")
    a("--low-memory", action="store_true", help="hold no gradient: a second backward pass for each response instead")
    a("--phrases", nargs="+", default=PHRASES, help="of self-correction")
    a("--task", nargs=2, default=["tiny-math", "tiny-code"], help="a task of math and one of code")
    a("--n", "--N", type=int, default=8, help="responses sampled for each problem (8)")
    a("--prm", default=str(Path(__file__).parent / "tiny" / "prm"), help="folder or hub id")
    a("--aggregate", choices=AGGREGATIONS, default="prod", help="reward of a response from its steps' p_t (prod)")
    add_policy_flags(parser, str(Path(__file__).parent / "tiny" / "A"))
    a("--limit", type=int, help="problems of each task (50), or rows of each file (all)")
    a("--seed", type=int, default=0)
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 elsewhere")
    a("--json", help="write the summary here, too")
    a("--plot", help="write the heat map of the groups here")
    args = parser.parse_args(argv)
    if args.sets and (not args.model or len(args.sets) not in (1, 2, 4)):
        parser.error("--sets takes 1, 2 or 4 files, and needs --model")
    need_positive(parser, args, "n", "limit", "sketch")
    need_folder(parser, args, "json", "plot")
    with parser:
        rank, world, device = distributed(args.device)
        F = load_policy(args.model or args.policy, device, args.dtype)
        responses = (read_sets(args.sets, args.limit, F.separator) if args.sets else
                     sample(args, F.separator, rank, world, device))
        items, cut = encode(F.tokenizer, responses, F.separator, F.context)
        found, rng = subsets(responses, items), random.Random(args.seed)
        if not all(found[k] for k in range(4)):
            raise ValueError("no responses in " + ", ".join(SETS[k] for k in range(4) if not found[k]))
        for i in found[1] + found[3]:  # one more control: the selected ones with their tokens shuffled
            ids, start = items[i]
            found.setdefault("selected, tokens shuffled", []).append(len(items))
            items.append((ids[:start] + rng.sample(ids[start:], len(ids) - start), start))
            responses.append(responses[i]._replace(text="", sets=set()))
        reference = Reference(F.lm, args.params, args.score, args.sketch, args.seed, args.low_memory)
        sums, kept = accumulate(reference, items, [r.sets for r in responses], rank, world,
                                "cpu" if args.offload else None)
    if rank == 0:
        result = analyse(responses, found, kept, products(sums, reference.spans), args.phrases, args.seed)
        print(f"F = {args.model or args.policy}, {reference.P:,} weights. Problems {result['problems']}, "
              f"responses {result['responses']}, {cut} cut at the context's end")
        report(result, args.plot)
        if args.json:
            Path(args.json).write_text(json.dumps({"args": vars(args), "cut": cut, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
