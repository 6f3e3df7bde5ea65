"""What one vector a set saves: similarity.py's pass against the double sum over stored vectors.

    python benchmarks/similarity_cost.py              # policy tiny/A, 10, 100, 400 responses a set
    python benchmarks/similarity_cost.py --memory Qwen/Qwen2.5-7B --tokens 1024  # needs config.json

CPU seconds, responses a second and peak memory beyond what the process had before; and what a
response costs here (vectors, sketch) against a plain forward and backward pass. Of the double sum
--pairs pairs are timed, and multiplied.

--memory runs similarity.py's own code on a model of that shape in fake tensors, which have sizes
but no numbers, and counts the bytes that are alive at once: what a GPU must hold, if there is one.
"""
import argparse
import itertools
import multiprocessing
import random
import resource
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import similarity  # noqa: E402
from common.models import load_pretrained  # noqa: E402
from common.policy import load_policy  # noqa: E402
from common.responses import SETS, Response, encode, sets_of  # noqa: E402
from similarity import accumulate, activation, loss  # noqa: E402
from tiny import world  # noqa: E402


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(n):
    """The model, and n responses to problems of each domain, written by the world's author A."""
    policy, rng, responses = load_policy(ROOT / "tiny" / "A"), random.Random(0), []
    for domain in ("math", "code"):
        for p in world.problems(domain, "test", n):
            text = "\n".join(world.write(p, "A", rng))
            responses.append(Response(domain, p["question"], text, sets_of(domain, False, None)))
    return policy.lm, encode(policy, responses)[0], [r.sets for r in responses]


def bilinear(n, pairs):
    lm, items, sets = load(n)
    before, started = peak(), time.process_time()
    sums = accumulate(lm, items, sets)[0]
    S = 100 * float(sums[SETS.index("Math")].double() @ sums[SETS.index("Code")].double()) / n ** 2
    return S, time.process_time() - started, peak() - before, ""


def direct(n, pairs):
    lm, items, _ = load(n)
    before, started, vectors = peak(), time.process_time(), []
    for item in items:
        A = torch.cat([a.flatten() for a in activation(lm, *item)])
        vectors.append(A / A.norm())
    gradients = time.process_time() - started
    every = list(itertools.product(vectors[:n], vectors[n:]))
    drawn, started = random.Random(0).sample(every, min(pairs, len(every))), time.process_time()
    total = sum(float(a @ b) for a, b in drawn)
    seconds = (time.process_time() - started) * len(every) / len(drawn)
    note = f"   {len(drawn)} of {len(every)} pairs timed"
    return 100 * total / len(drawn), gradients + seconds, peak() - before, note


def overhead(n):
    """CPU ms a response: similarity.py, and a plain forward and backward pass, taken in turns."""
    (lm, items, sets), plain = load(n), load(1)[0]
    ours = theirs = 0.0
    for i in range(0, len(items), 50):
        started = time.process_time()
        accumulate(lm, items[i:i + 50], sets[i:i + 50])
        ours += time.process_time() - started
        started = time.process_time()
        for ids, start in items[i:i + 50]:
            loss(plain, ids, start).backward()
            plain.zero_grad()
        theirs += time.process_time() - started
    return 1000 * ours / len(items), 1000 * theirs / len(items)


class Alive(TorchDispatchMode):
    """Bytes of all tensors made under this mode that are still there: now, and at the peak."""

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


def fake_float(x):
    """A fake norm has no value."""
    return 1.0 if isinstance(x, torch.Tensor) else float(x)


def count(config, tokens, params="", dtype="bfloat16"):
    """Bytes alive at once while a response is added -> (at the peak, of the weights, P)."""
    fake = mock.patch.object(similarity, "float", fake_float, create=True)
    with fake, FakeTensorMode(), Alive() as alive:
        lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        weights = alive.peak = alive.now
        items = [(list(range(tokens)), tokens // 3)]
        P = accumulate(lm, items, [{"Math"}], params=params)[0].shape[1]
    return alive.peak, weights, P


def count_memory(path, tokens, params, dtype):
    """What one response takes, by the flags of similarity.py."""
    named = f", --params {params}" if params else ""
    print(f"{path}, {dtype}, a response of {tokens} tokens{named}: GB alive at once")
    peak, weights, P = count(load_pretrained(AutoConfig, path), tokens, params, dtype)
    vectors = 16 * P  # alive from the first to the last: with --offload, elsewhere
    for flags, there in (("no flag", vectors), ("--offload", 0)):
        print(f"  {flags:<12}{(peak - vectors + there) / 1e9:>8.1f}, of which weights "
              f"{weights / 1e9:.1f}, signs {P / 1e9:.1f}, vectors {there / 1e9:.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--sizes", type=int, nargs="+", default=[10, 100, 400], help="responses a set")
    a("--pairs", type=int, default=10_000, help="pairs of the double sum to time (10000)")
    a("--memory", metavar="MODEL", help="folder or hub id: count what a model of this shape takes")
    a("--tokens", type=int, default=1024, help="with --memory: of the response (1024)")
    a("--params", default="", help="with --memory: as in similarity.py")
    a("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="with --memory")
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
            print(f"{n:<18}{how.__name__:<14}{S:>7.2f}{seconds:>9.2f}{2 * n / seconds:>10.1f}"
                  f"{memory:>8.0f}{note}")
    ours, plain = overhead(100)
    print(f"a response: {ours:.1f} ms, plain forward and backward {plain:.1f} ms, "
          f"ratio {ours / plain:.2f}")


if __name__ == "__main__":
    main()
