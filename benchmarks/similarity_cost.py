"""What one vector a set saves: similarity.py's pass against the direct double sum over stored vectors.

    python benchmarks/similarity_cost.py                     # policy tiny/A, two sets of 10, 100 and 400 responses
    python benchmarks/similarity_cost.py --memory Qwen/Qwen2.5-7B --tokens 1024         # needs its config.json only

CPU seconds, responses a second and peak memory beyond what the process had before; and a response's cost here (hooks,
vectors, sketch) against a plain forward and backward pass. Of the double sum --pairs pairs are timed, and multiplied.

--memory runs similarity.py's own code on a model of that shape in fake tensors, which have sizes but no numbers, and
counts the bytes that are alive at once: what a GPU must hold, whether or not there is one.
"""
import argparse
import multiprocessing
import random
import resource
import sys
import time
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import similarity  # noqa: E402
from common.policy import load_policy, load_pretrained  # noqa: E402
from similarity import Reference, Response, accumulate, encode, products, score  # noqa: E402
from tiny import world  # noqa: E402


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(n):  # the model, and n responses to problems of each domain, written by the world's author A
    policy, rng = load_policy(ROOT / "tiny" / "A"), random.Random(0)
    responses = [Response(side, p["question"], "\n".join(world.write(p, "A", rng)), None, {2 * side})
                 for side, domain in enumerate(("math", "code")) for p in world.problems(domain, "test", n)]
    return policy.lm, encode(policy.tokenizer, responses, "\n", 512)[0], [r.sets for r in responses]


def bilinear(n, pairs):
    lm, items, sets = load(n)
    before, started, reference = peak(), time.process_time(), Reference(lm)
    dots = sum(products(accumulate(reference, items, sets)[0], reference.spans).values())
    return 100 * float(dots[0, 2]) / n ** 2, time.process_time() - started, peak() - before, ""


def direct(n, pairs):
    lm, items, _ = load(n)
    before, started, vectors = peak(), time.process_time(), []
    for ids, start in items:
        score(lm, torch.tensor(ids), start).backward()
        A = torch.cat([(p.grad * p.detach()).abs_().flatten() for p in lm.parameters()])
        vectors.append(A / A.norm())
        lm.zero_grad()
    gradients, every = time.process_time() - started, [(a, b) for a in vectors[:n] for b in vectors[n:]]
    some, started = random.Random(0).sample(every, min(pairs, len(every))), time.process_time()
    total = sum(float(a @ b) for a, b in some)
    seconds = (time.process_time() - started) * len(every) / len(some)
    return 100 * total / len(some), gradients + seconds, peak() - before, f"   {len(some)} of {len(every)} pairs timed"


def overhead(n):
    """CPU seconds of similarity.py and of a plain forward and backward pass, the two taken in turns."""
    (lm, items, sets), plain = load(n), load(1)[0]
    reference, ours, theirs = Reference(lm), 0.0, 0.0
    sums, kept = torch.zeros(4, reference.P), torch.zeros(len(items), reference.D)
    for i, (ids, start) in enumerate(items):
        ours -= time.process_time()
        reference.accumulate(ids, start, [sums[k] for k in sets[i]], kept[i])
        ours, theirs = ours + time.process_time(), theirs - time.process_time()
        score(plain, torch.tensor(ids), start).backward()
        theirs += time.process_time()
        plain.zero_grad()
    return 1000 * ours / len(items), 1000 * theirs / len(items)


class Alive(TorchDispatchMode):
    """Bytes of all tensors that were made under this mode and are still there: now, and the most so far."""

    now = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and not hasattr(storage, "counted"):
                storage.counted = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        self.now -= size


def count_memory(path, tokens, params, dtype):
    """What one response takes, by the flags of similarity.py."""
    config = load_pretrained(AutoConfig, path)
    similarity.float = lambda x: 1.0 if isinstance(x, torch.Tensor) else float(x)  # a fake norm has no value
    print(f"{path}, {dtype}, a response of {tokens} tokens{f', --params {params}' * bool(params)}: GB alive at once")
    for low_memory in (False, True):
        for offload in (False, True):
            with FakeTensorMode(), Alive() as alive:
                lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
                weights, reference = alive.now, Reference(lm, params, low_memory=low_memory)
                sums = [] if offload else torch.zeros(4, reference.P)
                alive.peak = alive.now
                kept = torch.zeros(reference.D)
                reference.accumulate(list(range(tokens)), tokens // 3, sums[:1], kept)
            flags = "--low-memory " * low_memory + "--offload" * offload
            print(f"  {flags or 'no flag':<25}{alive.peak / 1e9:>8.1f}, of which weights {weights / 1e9:.1f}, signs "
                  f"{reference.P / 1e9:.1f}, vectors {0 if offload else 16 * reference.P / 1e9:.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 400], help="responses a set")
    parser.add_argument("--pairs", type=int, default=10_000, help="pairs of the double sum to time (10000)")
    parser.add_argument("--memory", metavar="MODEL", help="folder or hub id: count what a model of this shape takes")
    parser.add_argument("--tokens", type=int, default=1024, help="with --memory: of the response (1024)")
    parser.add_argument("--params", default="", help="with --memory: as in similarity.py")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="with --memory")
    args = parser.parse_args(argv)
    if args.memory:
        count_memory(args.memory, args.tokens, args.params, args.dtype)
        return
    torch.set_num_threads(1)
    print(f"{'responses a set':<18}{'':<14}{'S':>7}{'CPU s':>9}{'a second':>10}{'MiB':>8}")
    for n in args.sizes:
        for how in (bilinear, direct):  # a process each: peak memory has no way back
            with multiprocessing.get_context("fork").Pool(1) as pool:
                S, seconds, memory, note = pool.apply(how, (n, args.pairs))
            print(f"{n:<18}{how.__name__:<14}{S:>7.2f}{seconds:>9.2f}{2 * n / seconds:>10.1f}{memory:>8.0f}{note}")
    ours, plain = overhead(50)
    print(f"a response: {ours:.1f} ms, plain forward and backward {plain:.1f} ms, ratio {ours / plain:.2f}")


if __name__ == "__main__":
    main()
