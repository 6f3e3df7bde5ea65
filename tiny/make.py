"""Make the tiny world's models again: tokenizer, policies, backbones, labelled rows, PRM.

    python tiny/make.py                          # every stage that is not done yet, on all cores
    python tiny/make.py --stages tokenizer A     # some of them
    python tiny/make.py --out /tmp/tiny          # elsewhere

Restart it after a kill: each model goes on from where it was two minutes before. A model is a
Qwen2-architecture causal LM pre-trained on the text of one author of tiny/world.py. Policies (A, B,
C) learn from careless authors, each with his own habits; backbones of four sizes learn from the
careful one, who makes every kind of mistake and corrects it. Only the train split's problems are
ever seen. One run is deterministic for a seed on one machine. The PRM is trained by train.py, on
labels that annotate.py makes.
"""
import argparse
import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from prm_model import load_prm  # noqa: E402
from tiny import world  # noqa: E402

SEPARATOR = "\n"  # the last step is followed by the end-of-text token instead
# cycles: optimizer steps of each cosine cycle (warm restarts: arXiv 1608.03983)
#        author    hidden layers heads cycles  batch seed
MODELS = {
    "A": ("A", 96, 4, 4, (1500,), 64, 1),
    "B": ("B", 64, 4, 4, (1500,), 64, 2),
    "C": ("C", 112, 4, 4, (1500,), 64, 3),
    "xs": ("careful", 48, 3, 4, (1500,), 64, 4),
    "s": ("careful", 64, 4, 4, (1500,), 64, 5),
    "m": ("careful", 96, 5, 4, (1500,), 64, 6),
    "l": ("careful", 128, 6, 4, (1500, 2200), 64, 7),
}

STAGES = ["tokenizer", *MODELS, "rows", "prm"]


def make_tokenizer(out):
    """Byte-level BPE over words, digits and line ends: every word of the world is one token."""
    rng, text = random.Random(0), []
    for domain in ("math", "code"):
        for p in world.problems(domain, "train", 3000, seed=99, strict=False):
            text.append(p["question"] + SEPARATOR + SEPARATOR.join(world.write(p, "careful", rng)))
    tokenizer = Tokenizer(bpe.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n|\d| ?[A-Za-z]+|[^\sA-Za-z\d]+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                            eos_token="<eos>").save_pretrained(out)


def get_batch(author, tokenizer, rng, seed, size):
    """size texts, half of each domain -> [(token ids, how many of them are the question)]."""
    rows = []
    for domain in ("math", "code"):
        for p in world.problems(domain, "train", size // 2, seed=seed, strict=False):
            question = tokenizer(p["question"] + SEPARATOR)["input_ids"]
            solution = tokenizer(SEPARATOR.join(world.write(p, author, rng)))["input_ids"]
            rows.append((torch.tensor(question + solution + [tokenizer.eos_token_id]),
                         len(question)))
    return rows


def backward(model, rows, at_once=16):
    """Mean next-token loss on the solutions, and its gradients. Rows of similar length go together:
    code is shorter than math, and 43 % of the batch would be padding. The head runs on the
    solutions' positions only."""
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    starts = torch.tensor([start for _, start in rows])
    total, loss = (lengths - starts).sum(), 0.0
    for part in lengths.argsort().split(at_once):
        ids = pad_sequence([rows[i][0] for i in part], batch_first=True)
        # causal attention: no mask needed
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        next_at = torch.arange(1, ids.shape[1])
        keep = (next_at >= starts[part, None]) & (next_at < lengths[part, None])
        logits = model.lm_head(hidden[keep])
        part_loss = F.cross_entropy(logits, ids[:, 1:][keep], reduction="sum") / total
        part_loss.backward()
        loss += part_loss.item()
    return loss


def train_lm(name, tokenizer, out):
    """Pre-train one LM, with a checkpoint every two minutes, from which a killed run goes on."""
    author, hidden, layers, heads, cycles, size, seed = MODELS[name]
    steps = sum(cycles)
    lr_max = 3e-3 * (64 / hidden) ** 0.5
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        max_position_embeddings=512, rope_theta=10000.0, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, step_separator=SEPARATOR))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=lr_max, betas=(0.9, 0.98), fused=True)
    partial, first, seconds, seen = out / f"{name}.partial", 0, 0.0, 0
    if partial.exists():
        saved = torch.load(partial, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds, seen = saved["step"], saved["seconds"], saved["tokens"]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters / 1e6:.2f} M parameters, author {author}, "
          f"{steps} steps from {first}", flush=True)
    started, saved_at, tokens, running = time.time(), time.time(), 0, None
    for step in range(first, steps):
        at, length = step, cycles[0]
        for length in cycles:
            if at < length:
                break
            at -= length
        if at == 0:
            optimizer.state.clear()
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * at / length))
        lr = lr_max * min(1, (at + 1) / 100) * cosine
        for group in optimizer.param_groups:
            group["lr"] = lr
        # batch `step` is the same whether or not the run was interrupted
        rng = random.Random(f"{name} {seed} {step}")
        rows = get_batch(author, tokenizer, rng, f"{name} {step}", size)
        loss = backward(model, rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(ids) for ids, _ in rows)
        running = loss if running is None else 0.95 * running + 0.05 * loss
        if step % 50 == 0 or step == steps - 1:
            print(f"{name} step {step} loss {running:.4f} lr {lr:.5f} "
                  f"{tokens / (time.time() - started):.0f} tokens/s "
                  f"{(seconds + time.time() - started) / 60:.1f} min", flush=True)
        if time.time() - saved_at > 120 or at == length - 1:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "step": step + 1, "seconds": seconds + time.time() - started,
                        "tokens": seen + tokens}, out / f"{name}.tmp")
            os.replace(out / f"{name}.tmp", partial)
            saved_at = time.time()
    model.config.pretraining_tokens = seen + tokens  # for the FLOPs of Figure 1
    model.half().save_pretrained(out / f"{name}.tmp_dir")
    tokenizer.save_pretrained(out / f"{name}.tmp_dir")
    record = dict(author=author, cycles=cycles, batch=size, seed=seed, loss=running,
                  minutes=(seconds + time.time() - started) / 60)
    (out / f"{name}.tmp_dir" / "made.json").write_text(json.dumps(record) + "\n")
    shutil.rmtree(out / name, ignore_errors=True)
    os.replace(out / f"{name}.tmp_dir", out / name)
    partial.unlink(missing_ok=True)
    return record["minutes"]


# Task, seed, problems, temperature of the solutions. The hot ones are full of mistakes that no
# author makes, broken lines above all: a PRM that has never seen any takes them for right.
ROWS = [("tiny-code", 11, 1200, 1.0), ("tiny-math", 11, 1200, 1.0), ("tiny-code", 12, 1600, 1.0),
        ("tiny-code", 13, 400, 1.4), ("tiny-math", 13, 400, 1.4)]


def script(name, *flags, ranks=1):
    launch = []
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    subprocess.run([sys.executable, *launch, str(ROOT / name), *map(str, flags)], check=True)


def make_rows(out, jobs):
    """Stepwise rows for train.py: solutions of A on train problems, labelled by A, B and C."""
    rows = []
    for task, seed, problems, heat in ROWS:
        part = out / f"rows-{task}-{seed}.partial.jsonl"
        script("annotate.py", "--policies", *(out / x for x in "ABC"), "--task", task,
               "--seed", seed, "--limit", problems, "--sampler-temperature", heat,
               "--samples", 4, "--keep-unanimous", "--concurrent", 200, "--out", part, "--resume",
               ranks=jobs)
        rows.append(part.read_bytes())
    with gzip.GzipFile(out / "rows.partial.gz", "wb", mtime=0) as file:
        file.write(b"".join(rows))
    os.replace(out / "rows.partial.gz", out / "rows.jsonl.gz")
    for part in out.glob("rows-*.partial.jsonl*"):
        part.unlink()


def make_prm(out, jobs):
    """The PRM, from backbone l and those rows. At a learning rate of 1e-3 the backbone forgets how
    to check what is rare in the rows."""
    ranks = min(jobs, 2)
    script("train.py", "--data", out / "rows.jsonl.gz", "--model", out / "l", "--epochs", 5,
           "--lr", 3e-4, "--lr-head", 2e-3, "--accumulate", 4 // ranks, "--val-samples", 300,
           "--out", out / "prm.training", "--resume", ranks=ranks)
    prm = load_prm(out / "prm.training").half()
    prm.format["base_model"] = "tiny/l"
    prm.save(out / "prm")
    shutil.rmtree(out / "prm.training")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent,
                        help="folder of the models")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="models trained at once, a thread each")
    parser.add_argument("--overwrite", action="store_true", help="make a stage again that is done")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    def todo(stage):
        file = args.out / ("rows.jsonl.gz" if stage == "rows" else stage)
        done = file.exists() and not args.overwrite
        if done and stage in args.stages:
            print(f"{stage}: done already")
        return stage in args.stages and not done
    models = [x for x in MODELS if todo(x)]
    if (models or args.stages != STAGES) and todo("tokenizer"):  # each model's folder has a copy
        make_tokenizer(args.out / "tokenizer")
    if len(models) == 1:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "tokenizer")
        print(f"{models[0]}: {train_lm(models[0], tokenizer, args.out):.1f} minutes", flush=True)
    elif models:  # small matrices: a model a core, not one on all; the slowest model first
        models.sort(key=lambda x: -MODELS[x][1] * MODELS[x][2] * sum(MODELS[x][4]))
        again = ["--overwrite"] if args.overwrite else []
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda x: script("tiny/make.py", "--out", args.out, "--stages", x,
                                           *again), models))
    for stage, make in (("rows", make_rows), ("prm", make_prm)):
        if todo(stage):
            started = time.time()
            make(args.out, args.jobs)
            print(f"{stage}: {(time.time() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
