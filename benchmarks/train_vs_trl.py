"""train.py against TRL's PRMTrainer: the same rows, tokenizer and Qwen2 sizes, one thread, CPU time.

    pip install trl==1.13.0 accelerate                  # the last release that has PRMTrainer; only this needs it
    python benchmarks/train_vs_trl.py                   # 0.4 M and 10 M parameters, then how time scales
    python benchmarks/train_vs_trl.py --sizes 10M --rows 3200 --only ours-bf16 trl-defaults
    python benchmarks/train_vs_trl.py --sizes 10M --seeds 8 --only ours ours-bf16       # is accuracy lost in bf16?

Each contender runs in a process of its own and reports real (non-padding) tokens per CPU second of its training loop,
its share of padding, and its accuracy on held-out steps after the same epochs. `trl-defaults` is PRMTrainer as it
comes: bf16 autocast, gradient checkpointing, rows in random order. `trl-tuned` is fp32, without checkpointing, and
with train_sampling_strategy="group_by_length". `ours` is fp32 or bf16. All take 8 rows a step and the
same peak learning rate. Accuracies of single runs scatter by some points: --seeds trains each several times, and prints
means, ± one standard error over the runs.
CPU time, not wall time: on a shared machine only the former repeats.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.metrics import mean_se  # noqa: E402

#         hidden, layers, heads
SIZES = {"0.4M": (128, 2, 4), "10M": (320, 6, 5)}
CONTENDERS = {"trl-defaults": {}, "trl-tuned": dict(bf16=False, gradient_checkpointing=False, disable_dropout=False,
                                                    train_sampling_strategy="group_by_length"),
              "ours": [], "ours-bf16": ["--dtype", "bfloat16"]}


def make_rows(folder, count):
    """Solutions of the tiny world with the truth of every step; a tokenizer trained on them."""
    from tiny import world
    from tiny.make import make_tokenizer
    rng = random.Random(0)
    for split, n in (("train", count), ("test", count // 5)):
        streams = [world.problems(d, split, n // 2, seed=1) for d in ("math", "code")]
        rows = []
        for p in [p for pair in zip(*streams) for p in pair]:
            steps = world.write(p, "A", rng)
            rows.append(dict(prompt=p["question"], completions=steps, labels=world.grade(p, steps)))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    make_tokenizer(folder / "tokenizer")


def make_model(folder, size):
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    hidden, layers, heads = SIZES[size]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads if heads % 2 else 2, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None, step_separator="\n",
    )).save_pretrained(folder / size)
    tokenizer.save_pretrained(folder / size)


# ---------------------------------------------------------------- one contender, in its own process

def run_trl(folder, size, options, epochs, lr, seed):
    from datasets import Dataset
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        TrainerCallback,
        set_seed,
    )
    from trl.experimental.prm import PRMConfig, PRMTrainer
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / size)
    model = AutoModelForTokenClassification.from_pretrained(folder / size, num_labels=2)
    rows, held = ([json.loads(line) for line in open(folder / f"{split}.jsonl")] for split in ("train", "test"))
    counts, clock = [0, 0], {}

    class Count(DataCollatorForTokenClassification):
        def torch_call(self, features):
            batch = super().torch_call(features)
            counts[0] += int(batch["attention_mask"].sum())
            counts[1] += batch["attention_mask"].numel()
            return batch

    class Clock(TrainerCallback):
        def on_train_begin(self, *a, **k):
            counts[:] = [0, 0]
            clock["begin"] = time.process_time()

        def on_train_end(self, *a, **k):
            clock["end"] = time.process_time()

    config = PRMConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=8, per_device_eval_batch_size=8,
                       learning_rate=lr, num_train_epochs=epochs, logging_strategy="no", report_to="none",
                       save_strategy="no", use_cpu=True, disable_tqdm=True, seed=seed, step_separator="\n",
                       max_length=1024, warmup_steps=0.05, lr_scheduler_type="cosine", **options)
    trainer = PRMTrainer(model=model, args=config, processing_class=tokenizer, data_collator=Count(tokenizer),
                         train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(held),
                         callbacks=[Clock()])
    trainer.train()
    real, padded = counts
    figures = trainer.evaluate()
    return dict(tokens=real, padding=1 - real / padded, cpu=clock["end"] - clock["begin"],
                accuracy=figures["eval_accuracy"], loss=figures["eval_loss"])


def run_ours(folder, size, options, epochs, lr, seed=0):
    import train
    spans = []  # CPU times at which validation and saving began and ended: the loop is what lies between

    def timed(original):
        def call(*a, **k):
            spans.append([original.__name__, time.process_time()])
            result = original(*a, **k)
            spans[-1].append(time.process_time())
            return result
        return call
    for name in ("validate", "save_prm", "save_checkpoint"):
        setattr(train, name, timed(getattr(train, name)))
    out = folder / "ours"
    train.main(["--data", str(folder / "train.jsonl"), "--val-data", str(folder / "test.jsonl"), "--model",
                str(folder / size), "--out", str(out), "--overwrite", "--batch-size", "8", "--accumulate", "1",
                "--epochs", str(epochs), "--lr", str(lr), "--eval-every", "1000000", "--device", "cpu",
                "--seed", str(seed), *options])
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    steps = [r for r in log if r["kind"] == "train"]
    last = [r for r in log if r["kind"] == "eval"][-1]
    end = [i for i, (name, *_) in enumerate(spans) if name == "validate"][-1]
    cpu = sum(spans[i + 1][1] - spans[i][2] for i in range(end))
    return dict(tokens=steps[-1]["tokens"], padding=sum(r["padding"] for r in steps) / len(steps), cpu=cpu,
                accuracy=last["accuracy"], loss=last["loss"])


# ---------------------------------------------------------------- how time scales

def cpu_per_token(prm, rows, tokens, repeat=3):
    """Microseconds of CPU time a token: forward and backward of `rows` rows of `tokens` tokens, a label in each 20."""
    import torch

    from train import prm_loss
    ids = torch.randint(prm.backbone.config.vocab_size, (rows, tokens))
    at = torch.arange(19, tokens, 20).repeat(rows)
    of = torch.arange(rows).repeat_interleave(len(at) // rows)
    best = float("inf")
    for _ in range(repeat + 1):  # the first one warms up, the best one was disturbed least
        started = time.process_time()
        prm_loss(prm(ids, of, at), torch.ones(len(at))).backward()
        best = min(best, time.process_time() - started)
        prm.zero_grad()
    return best / ids.numel() * 1e6


def scale(folder, sizes):
    import torch

    from prm_model import load_prm
    torch.set_num_threads(1)
    for size in sizes:
        prm = load_prm(folder / size, fresh=True).train()
        batches = ", ".join(f"{n * 128}: {cpu_per_token(prm, n, 128):.0f}" for n in (1, 4, 16, 64))
        lengths = ", ".join(f"{n}: {cpu_per_token(prm, 4096 // n, n):.0f}" for n in (64, 256, 1024))
        print(f"{size}: CPU us/token by batch tokens (rows of 128)  {batches}")
        print(f"{size}: CPU us/token by row length (4096 tokens)    {lengths}", flush=True)
        rates = {}
        for processes in (1, 2):  # the same optimizer steps: one process accumulates what two share
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                       str(ROOT / "train.py"), "--data", str(folder / "train.jsonl"), "--model", str(folder / size),
                       "--out", str(folder / f"ddp{processes}"), "--overwrite", "--accumulate", str(2 // processes),
                       "--max-steps", "12", "--eval-every", "1000", "--batch-size", "16", "--device", "cpu"]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            log = [json.loads(line) for line in open(folder / f"ddp{processes}" / "log.jsonl")]
            steps = sorted(r["tokens_per_second"] for r in log if r["kind"] == "train")
            rates[processes] = steps[len(steps) // 2]
        print(f"{size}: DDP tokens/s (wall, median step)  1 process {rates[1]:.0f}, 2 processes {rates[2]:.0f}: "
              f"efficiency {rates[2] / rates[1] / 2:.0%} (needs two idle cores)", flush=True)


def contend(folder, size, name, seed, args):
    """One run of one contender in a process of its own -> what its run_ function found, or None."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([sys.executable, __file__, "--epochs", str(args.epochs), "--lr", str(args.lr), "--worker",
                           str(folder), size, name, str(seed)], capture_output=True, text=True, env=env)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if found:
        return json.loads(found[0][7:])
    print(f"{size:6} {name:20} seed {seed} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--scale", action="store_true", help="only how time scales")
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1, help="training runs of each (1)")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)  # folder, size, contender, seed
    args = parser.parse_args(argv)
    if args.worker:
        import torch
        torch.set_num_threads(1)
        folder, size, name, seed = args.worker
        run = run_trl if name.startswith("trl") else run_ours
        print("RESULT " + json.dumps(run(Path(folder), size, CONTENDERS[name], args.epochs, args.lr, int(seed))))
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_rows(folder, args.rows)
        print("size   contender            tokens/CPU s  padding        accuracy            loss   CPU s", flush=True)
        for size in args.sizes:
            make_model(folder, size)
            for name in [] if args.scale else args.only:
                if runs := [r for seed in range(args.seeds) if (r := contend(folder, size, name, seed, args))]:
                    tokens, cpu, padding = (sum(r[k] for r in runs) for k in ("tokens", "cpu", "padding"))
                    means = [mean_se([r[k] for r in runs]) for k in ("accuracy", "loss")]
                    print(f"{size:6} {name:20} {tokens / cpu:12.0f} {padding / len(runs):8.1%}"
                          + "".join(f"   {m:.3f} ± {se:.3f}" for m, se in means) + f" {cpu:7.1f}", flush=True)
        scale(folder, args.sizes)


if __name__ == "__main__":
    main()
