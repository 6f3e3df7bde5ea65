"""What the tree cache buys: beam search with it, against re-encoding every prefix of every candidate as the usual
implementations do (search-and-learn's beam_search.py makes a prompt of each copy of each beam; its PRM reads each whole
path again, and what the policy's prompts share is left to vLLM), and best-of-N against model.generate. Same models,
same seeds, one run.

    python benchmarks/search_cache.py                # the tiny models, and a random Qwen2 of 4 layers, 256 wide
    python benchmarks/search_cache.py --device cuda  # in fp32, too

Prints, for 16 candidates a step and about 10 steps: PRM tokens, policy tokens prefilled, seconds, the ratios, the
largest difference between scores, and the peak memory of the cache with its formula.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import policy as policy_module  # noqa: E402
from common import tasks  # noqa: E402
from common.driver import Search, run_together  # noqa: E402
from common.node import Node, child_key  # noqa: E402
from common.policy import Policy, load_policy  # noqa: E402
from prm_model import PRM, aggregate, load_prm  # noqa: E402
from search import beam_extended as beam  # noqa: E402


class ReEncoding:
    """Policy and PRM without a cache: every path is encoded from its first token at every step, for both models."""

    def __init__(self, policy, prm):
        self.policy, self.prm, self.prefilled, self.tokens = policy, prm, 0, 0

    def propose(self, nodes, counts):
        """Each candidate is a prompt of its own, from the question's first token on."""
        flat = [Node(n.root().text, ids=[i for x in n.line() for i in x.ids], key=n.key, drawn=n.drawn + j,
                     depth=n.depth, domain=n.domain) for n, count in zip(nodes, counts) for j in range(count)]
        found = iter(self.policy.propose(flat, 1))
        groups = [[child for _ in range(count) for child in next(found)] for count in counts]
        for node, group in zip(nodes, groups):
            node.drawn += len(group)
            for child in group:
                child.parent = node
                child.kv.clear()
        self.prefilled = self.policy.prefilled
        return groups

    def score_nodes(self, leaves):
        scores = self.prm.score([x.root().text for x in leaves], [x.steps() for x in leaves])
        self.tokens = self.prm.tokens
        return {leaf: s[-1] for leaf, s in zip(leaves, scores)}


class Watched:
    """A PRM that notes the (bytes, tokens) of keys and values that are held when it has scored: the search's peak."""

    def __init__(self, prm):
        self.prm, self.seen, self.most = prm, set(), (0, 0)
    tokens = property(lambda self: self.prm.tokens)

    def score_nodes(self, leaves):
        found = self.prm.score_nodes(leaves)
        self.seen.update(n for leaf in leaves for n in leaf.line())
        held = [t for n in self.seen for t in n.kv.values()]
        self.most = max(self.most, (sum(t.nbytes for t in held), sum(map(len, held))))
        return found


def run(policy, prm, problems):
    """Beam search 4 x 4 of all problems at once -> (Searches, seconds)."""
    def total(node):
        return aggregate([n.p for n in node.path()], "sum")
    searches = [Search(policy.root(p.id, p.question, p.domain), beam,
                       {"k": 4, "m": 4, "path_score": total, "reward": total}) for p in problems]
    started = time.perf_counter()
    run_together(searches, policy, [prm])
    return searches, time.perf_counter() - started


def compare(name, policy_of, prm, problems):
    """Print the table -> {"PRM tokens": (cached, re-encoded), "policy prefilled", "seconds", "same": candidates,
    "apart": scores}."""
    if prm.backbone.device.type == "cuda":
        run(policy_of(), prm, problems[:1])  # the first call of each kernel loads it
    prm.tokens = 0
    policy = policy_of()
    cached, seconds = run(policy, prm, problems)
    prm_tokens, prefilled = prm.tokens, policy.prefilled
    watched = Watched(prm)
    run(policy_of(), watched, problems)  # once more: the clock need not see the counting
    prm.tokens = 0
    plain = policy_of()
    other = ReEncoding(plain, prm)
    other.root = plain.root
    slow, slow_seconds = run(other, other, problems)
    mine, theirs = ([(n.text, n.p) for s in searches for n in s.sampled] for searches in (cached, slow))
    same = [a for a, _ in mine] == [b for b, _ in theirs]
    apart = max((abs(a - b) for (_, a), (_, b) in zip(mine, theirs)), default=0.0) if same else float("nan")
    config = policy.model.config
    depth = sum(max(n.depth for n in s.sampled) for s in cached) / len(cached)
    print(f"\n{name}: {len(problems)} problems, {len(mine)} candidates, {depth:.1f} steps deep on average")
    print(f"{'':<24}{'cached':>12}{'re-encoded':>12}{'ratio':>8}")
    costs = {"PRM tokens": (prm_tokens, other.tokens), "policy prefilled": (prefilled, plain.prefilled),
             "seconds": (seconds, slow_seconds)}
    for what, (a, b) in costs.items():
        print(f"{what:<24}{a:>12,.1f}{b:>12,.1f}{b / a:>8.1f}")
    print(f"same candidates: {same}; largest difference of scores {apart:.1e}")
    held, tokens = watched.most
    print(f"cache at its peak: {held / 2**20:.1f} MiB = {tokens:,} tokens (both models) x 2 x layers "
          f"{config.num_hidden_layers} x kv heads {config.num_key_value_heads} x head dimension "
          f"{config.hidden_size // config.num_attention_heads} x 4 bytes")
    return {**costs, "same": same, "apart": apart}


def tiny(problems, device):
    prm = load_prm(ROOT / "tiny" / "prm", device, "float32")
    return compare("tiny models", lambda: load_policy(ROOT / "tiny" / "A", device, "float32", max_step_tokens=40,
                                                      max_steps=20), prm, problems)


def best_of_n(problems, n, device):
    """Tokens up to the end of text a second: ours against generate, all problems in one padded batch each."""
    policy = load_policy(ROOT / "tiny" / "A", device, "float32", max_step_tokens=40, max_steps=8)
    roots = [policy.root(p.id, p.question, p.domain) for p in problems]
    policy.complete(roots, n)  # warm up
    started, before = time.perf_counter(), policy.generated
    policy.complete([policy.root(p.id + "again", p.question, p.domain) for p in problems], n)
    ours = (policy.generated - before) / (time.perf_counter() - started)
    tok = policy.tokenizer
    batch = tok([p.question + "\n" for p in problems], return_tensors="pt", padding=True, padding_side="left")
    batch = batch.to(device)
    batch.pop("token_type_ids", None)

    def generate():
        return policy.lm.generate(**batch, do_sample=True, top_k=0, max_new_tokens=320, num_return_sequences=n)
    with torch.inference_mode():
        generate()
        started = time.perf_counter()
        out = generate()[:, batch["input_ids"].shape[1]:]
        seconds = time.perf_counter() - started
    ended = (out == tok.eos_token_id).int()
    useful = int(((ended.cumsum(1) - ended) == 0).sum())
    print(f"\nbest-of-{n} on {len(problems)} problems, tokens up to the end of text a second: ours {ours:,.0f}, "
          f"generate {useful / seconds:,.0f}, ratio {ours * seconds / useful:.2f}")


def decode_rates(policy, prompts, n, new):
    """Best-of-N as its users call it -> tokens a second, ours and generate's. prompts (B, T): token ids. No token ends
    a text before `new` tokens: all samples are equally long."""
    policy.max_step_tokens = policy.max_solution_tokens = new
    policy.eos_ids, policy.eos = [-1], torch.tensor([-1], device=prompts.device)

    def ours():
        roots = [Node("", ids=ids, key=child_key(0, i)) for i, ids in enumerate(prompts.tolist())]
        return sum(end.tokens() for ends in policy.complete(roots, n) for end in ends)

    @torch.inference_mode()
    def generate():
        out = policy.lm.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                                 max_new_tokens=new, num_return_sequences=n)
        return out[:, prompts.shape[1]:].numel()
    rates = []
    for sampler in (ours, generate):
        sampler()  # loads kernels, takes memory
        torch.get_device_module(prompts.device).synchronize()
        started = time.perf_counter()
        tokens = sampler()
        torch.get_device_module(prompts.device).synchronize()
        rates.append(tokens / (time.perf_counter() - started))
        assert tokens == len(prompts) * n * new, f"{sampler.__name__} wrote {tokens} tokens"
    return rates


def wide(problems, device, max_steps=10):
    """A random model writes no steps, so its text comes from a fixed sampler: a line end after 25 tokens on average,
    the end of the solution after max_steps. The forwards are the model's own."""
    torch.manual_seed(0)
    tokenizer = load_policy(ROOT / "tiny" / "A").tokenizer
    models = [Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
        bos_token_id=None)).eval().to(device) for _ in range(2)]
    line_end, letters = tokenizer("\n")["input_ids"][0], torch.tensor(tokenizer("abcdefgh")["input_ids"], device=device)

    def scripted(logits, keys, t, temperature, top_p):
        u, v = policy_module.uniform(keys, t), policy_module.uniform(keys ^ 12345, t)
        token = torch.where((u < 1 / 25) & (t > 10) | (t > 55), line_end, letters[(v * len(letters)).long()])
        return token, logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]
    prm = PRM(models[1].model, tokenizer, separator="\n").eval()
    real, policy_module.sample = policy_module.sample, scripted
    try:
        return compare("random Qwen2, 4 layers x 256", lambda: Policy(
            models[0], tokenizer, "\n", max_step_tokens=64, max_steps=max_steps), prm, problems)
    finally:
        policy_module.sample = real


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=20, help="problems (20)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (cpu)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    problems = tasks.load("tiny-math", limit=args.limit)
    tiny(problems, args.device)
    wide(problems, args.device)
    best_of_n(problems, 16, args.device)


if __name__ == "__main__":
    main()
