"""Rows on disk: the JSONL formats that the scripts share, and the original sets of step labels
(more of them in formats/converters.py).

Stepwise rows (annotate.py writes, train.py reads; TRL's format, so hub sets load as they are):
    {"prompt": str, "completions": [str, ...], "labels": [bool or float, ...]}, and optionally id,
    domain, source, rollouts, votes, first_error, and values (Monte-Carlo estimate of each step; too
    high where rollouts stopped early)
Sample rows (search.py and evaluate.py write and read; other projects' outputs convert easily):
    {"id", "domain", "question", "answer" or "tests", "picked": int, "cost": {...}, "samples": [
     {"steps": [str], "scores": [float] or null, "answer": str or null, "correct": bool,
      "tokens": int}]}
    and of each sample optionally "end": "eos", "answer", or "length" (cut off: ranks below all
    others). search.py adds "strategy", "rule" (of choice), "overshoot" (tokens), and to each sample
    "spent" (tokens of the whole search when it was finished) and, of MCTS, "visits" (of its steps)
"""
import gzip
import hashlib
import json
import random
import re
import zlib
from pathlib import Path

from tqdm import tqdm

from common.formats.converters import STEP_LABELS
from common.run import expect, is_first, located


def read_rows(file):
    """Yield (line number, row) of a JSONL file, or (row number, row) of a JSON array; .gz or not.

    ValueError "file:line: why" for anything that is not a JSON object.
    """
    number = 0
    opener = gzip.open if str(file).endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8") as lines:
        try:
            is_array = lines.read(1) == "["
            lines.seek(0)
            for number, text in enumerate([lines.read()] if is_array else lines, 1):
                if not text.strip():
                    continue
                value = json.loads(text)
                for n, row in enumerate(value, 1) if is_array else [(number, value)]:
                    if not isinstance(row, dict):
                        name = type(row).__name__
                        raise ValueError(f"{file}:{n}: a JSON object is expected, not {name}")
                    yield n, row
        except json.JSONDecodeError as error:
            line = error.lineno if is_array else number
            raise ValueError(f"{file}:{line}: not JSON ({error})") from error
        except RecursionError as error:  # json calls itself for each level of brackets
            raise ValueError(f"{file}:{number}: nested too deeply") from error
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            # the last three: a broken .gz; the next line could not be read
            raise ValueError(f"{file}:{number + 1}: {error}") from error


def solutions_of(row):
    """(question, samples) of a sample row, or of a stepwise row, as one sample with steps alone."""
    if "samples" in row:
        question, samples = row["question"], row["samples"]
    else:
        question = row["prompt"]
        samples = [{"steps": row.get("completions") or [row["response"]]}]
    expect(isinstance(question, str), f"the question must be a text, not {question!r:.50}")
    for sample in samples:
        expect(texts(sample["steps"]), "the steps must be a list of texts")
    return question, samples


def read_solutions(file):
    """Yield (question, steps) from a JSONL file of sample rows or stepwise rows."""
    for number, row in read_rows(file):
        with located(f"{file}:{number}: neither a sample row nor a stepwise row"):
            question, samples = solutions_of(row)
        for sample in samples:
            yield question, sample["steps"]


def hub_rows(name, *where, **keywords):
    """Yield ("NAME:NUMBER", row) of a hub's data set; where, keywords as for load_dataset."""
    import datasets
    try:
        rows = datasets.load_dataset(*where, **keywords)
    except Exception as error:  # the hub client raises many kinds, and each means: no data
        why = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise ConnectionError(f"cannot load {name} from the hub: {why}. Pass a local copy: "
                              "--data FILE (annotate.py: --task-data FILE), .jsonl, .json or .gz"
                              ) from None
    return ((f"{name}:{n}", row) for n, row in enumerate(rows, 1))


# ------------------------------------------------------------ stepwise rows, and the original sets

def first_wrong(labels):
    """Index of the first step that is labelled wrong, -1 if none is (as in ProcessBench)."""
    # None: nobody has labelled this step
    return next((t for t, y in enumerate(labels) if y is not None and y < 0.5), -1)


def from_prm800k(row, neutral="good"):
    """A PRM800K record -> stepwise rows: the chosen path, and one for each rated alternative to it.

    A step of the path carries the rating of the completion chosen there. A step that a human wrote
    (chosen_completion null) was never rated: label None. An alternative's row repeats the path
    before it without labels, so that each rating is used once.
    Ratings: 1 good, -1 bad, null none, 0 neutral (`neutral`: "good", "bad", or "drop": no label).
    """
    label_of = {1: 1.0, -1: 0.0, 0: {"good": 1.0, "bad": 0.0, "drop": None}[neutral], None: None}
    if row["label"]["finish_reason"] == "bad_problem":
        return []
    path, labels, alternatives = [], [], []
    for step in row["label"]["steps"]:
        chosen = step["chosen_completion"]
        rated = [(c["text"], label_of[c["rating"]]) for c in step["completions"] or []]
        for i, (text, y) in enumerate(rated):
            if i != chosen and y is not None:
                alternatives.append(([*path, text], [None] * len(path) + [y]))
        if chosen is None and not step["human_completion"]:
            break  # found_error, give_up: nothing was chosen, the record ends
        text, y = (step["human_completion"]["text"], None) if chosen is None else rated[chosen]
        path, labels = [*path, text], [*labels, y]
    rows = [(path, labels), *alternatives] if path else alternatives
    fields = {"prompt": row["question"]["problem"]}
    if answer := row["question"].get("ground_truth_answer"):
        fields["answer"] = answer
    return [{**fields, "completions": steps, "labels": ys} for steps, ys in rows]


def from_math_shepherd(row, neutral=None):
    """A Math-Shepherd record -> [stepwise row].

    `input` has the Cyrillic tag "ки" after each step; `label` is the same text with + or - in place
    of each tag. A tag inside the question is an annotation error of the set, and is ignored.
    """
    text, signs = row["input"], row["label"]
    numbered = re.search(r"\bstep 1:", text, re.IGNORECASE)
    # a few rows number no steps
    begin = numbered.start() if numbered else text.find("?", 0, text.find("ки")) + 1
    expect(begin > 0, 'input: no "Step 1:" and no "?" where the question could end')
    question, steps, labels = text[:begin], [], []
    # Look for the sign at the tag's place, since sums have + and -, too. A tag is two characters
    # long, its sign is one.
    at = begin - question.count("ки")
    for step in text[begin:].split("ки")[:-1]:
        at += len(step) + 1
        sign = signs[at - 1:at]
        steps.append(step.strip())
        labels.append(float(sign == "+"))
        expect(sign in ("+", "-"),
               f"label: {sign!r} where the tag of step {len(steps)} is, + or - is expected")
    return [{"prompt": question.replace("ки", "").strip(), "completions": steps, "labels": labels}]


FORMATS = {"stepwise": lambda row, neutral: [row], "prm800k": from_prm800k,
           "math-shepherd": from_math_shepherd,
           **{name: convert for name, (_, convert) in STEP_LABELS.items()}}


def format_of(row):
    """The key of FORMATS that a row's fields show."""
    if isinstance(row.get("label"), dict):
        return "prm800k"
    if "label" in row and "input" in row:
        return "math-shepherd"
    named = (name for name, (fields, _) in STEP_LABELS.items() if fields <= row.keys())
    return next(named, "stepwise")


def check(row):
    """ValueError that names the field, if this is no stepwise row. Labels: None, or in [0, 1]."""
    prompt, steps, labels = row.get("prompt"), row.get("completions"), row.get("labels")
    expect(isinstance(prompt, str) and prompt.strip(), "prompt: a text is expected")
    expect(texts(steps), "completions: a list of one text or more is expected")
    "".join([prompt, *steps]).encode()  # half a surrogate pair would crash the tokenizer
    # millions of labels: no message is written for the right ones
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"labels: {len(steps)} are expected, one for each of completions, "
                         f"not {labels!r:.60}")
    for y in labels:
        if y is not None and not (isinstance(y, (int, float)) and 0 <= y <= 1):
            raise ValueError(f"labels: {y!r} is not in [0, 1]")


def texts(steps):
    """Is it a list of texts, and not empty?"""
    return isinstance(steps, list) and steps and all(isinstance(s, str) for s in steps)


def read_set(name, neutral="good"):
    """Yield ("file:line", stepwise row) of a JSONL file or of a hub set's train split."""
    if Path(name).is_file():
        records = ((f"{name}:{number}", row) for number, row in read_rows(name))
    elif name.endswith((".jsonl", ".gz", ".json")):
        raise ValueError(f"{name}: no such file")  # the hub has no such names: do not ask it
    else:
        records = hub_rows(name, name, split="train")
    for where, record in records:
        schema = format_of(record)
        with located(f"{where}: not a {schema} row"):
            for row in FORMATS[schema](record, neutral):
                check(row)
                yield where, row


# ------------------------------------------------------------ training and validation sets

def load_data(names, neutral, samples, seed):
    """All sets of --data as one list of (where, row): at most `samples` of each, drawn at random
    (§3.1, Table 3)."""
    data = []
    for name in names:
        rows = [*tqdm(read_set(name, neutral), f"read {name}", leave=False,
                      disable=not is_first() or None)]
        expect(rows, f"{name}: no rows")
        # seeded by the file's name: no other set, and no folder, changes which rows are drawn
        random.Random(f"{seed} {Path(name).name}").shuffle(rows)
        data += rows[:samples]
    return data


def plain(prompt):
    return " ".join(prompt.split())  # another line break makes no other problem


def held_out(prompt, fraction):
    """Does this problem belong to validation? A hash of the question decides.

    So all of a problem's solutions fall on one side, and on the same side in every set and every
    run: PRMs trained on different sets can be compared.
    """
    digest = hashlib.blake2b(plain(prompt).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") < fraction * 2 ** 48


def split(rows, val_rows, fraction, val_samples):
    """(training rows, validation rows), with no problem on both sides.

    Validation is val_rows or, without any, what held_out() takes from `rows`; of these at most
    val_samples, drawn from all sets. ValueError: one side would be empty.
    """
    if val_rows:
        val_problems = {plain(row["prompt"]) for _, row in val_rows}
    else:
        prompts = [row["prompt"] for _, row in rows]
        val_problems = {plain(prompt) for prompt in prompts if held_out(prompt, fraction)}
        val_rows = [item for item in rows if plain(item[1]["prompt"]) in val_problems]
    train_rows = [item for item in rows if plain(item[1]["prompt"]) not in val_problems]
    side = "validation" if train_rows else "training"
    expect(train_rows and val_rows, f"{side} would be empty: {len(val_problems)} problems are held "
           f"out (--val-fraction, --val-data), and {len(train_rows)} rows are left to train on")
    val_rows = list(val_rows)
    random.Random(0).shuffle(val_rows)
    return train_rows, val_rows[:val_samples]
