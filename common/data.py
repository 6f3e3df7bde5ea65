"""Rows on disk: the JSONL formats that the scripts share, and the two original schemas of step labels.

Stepwise rows (annotate.py writes, train.py reads; TRL's format, so hub sets load as they are):
    {"prompt": str, "completions": [str, ...], "labels": [bool or float, ...]}, and optionally id, domain, source,
    values (Monte-Carlo estimate of each step; too high where rollouts stopped early), rollouts, votes, first_error
Sample rows (search.py and evaluate.py write and read; other projects' outputs convert in a few lines):
    {"id", "domain", "question", "answer" or "tests", "picked": int, "cost": {...},
     "samples": [{"steps": [str], "scores": [float] or null, "answer": str or null, "correct": bool, "tokens": int}]}
    and of each sample optionally "end": "eos", "answer", or "length" (cut off: ranks below all others). search.py adds
    "strategy", "vote" (index that the vote picks), "curve" ([tokens, seconds, sample] whenever the best answer changed:
    Figures 4 and 5), "overshoot" (tokens) and "compared"
"""
import gzip
import hashlib
import json
import random
import re
import zlib
from pathlib import Path

from tqdm import tqdm


def read_rows(file):
    """Yield (line number, row) of a JSONL file, or (row number, row) of a JSON array; .gz or not. What is no JSON
    object is a ValueError file:line."""
    number = 0
    with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
        try:
            array = lines.read(1) == "["
            lines.seek(0)
            for number, text in enumerate([lines.read()] if array else lines, 1):
                if not text.strip():
                    continue
                found = json.loads(text)
                for n, row in enumerate(found, 1) if array else [(number, found)]:
                    if not isinstance(row, dict):
                        raise ValueError(f"{file}:{n}: a JSON object is expected, not {type(row).__name__}")
                    yield n, row
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno if array else number}: not JSON ({error})") from error
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:  # the last three: a broken .gz
            raise ValueError(f"{file}:{number + 1}: {error}") from error


def read_solutions(file):
    """Yield (question, steps) from a JSONL file of sample rows or stepwise rows."""
    for number, row in read_rows(file):
        try:
            if "completions" in row:
                yield row["prompt"], row["completions"]
            else:
                yield from [(row["question"], sample["steps"]) for sample in row["samples"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: neither a sample row nor a stepwise row "
                             f"({error!r})") from error


def hub_rows(name, *where, **keywords):
    """("NAME:NUMBER", row) of a data set on the hub. where, keywords: what load_dataset takes."""
    import datasets
    try:
        rows = datasets.load_dataset(*where, **keywords)
    except Exception as error:  # the hub client raises many kinds; each of them means that there is no data
        why = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise ConnectionError(f"cannot load {name} from the hub: {why}. Pass a local copy: --data FILE (annotate.py: "
                              "--task-data FILE), .jsonl, .json or .gz") from None
    return ((f"{name}:{n}", row) for n, row in enumerate(rows, 1))


# ---------------------------------------------------------------- stepwise rows, and the two original schemas

def first_wrong(labels):
    """The first step whose label says wrong, from 0; -1 where there is none (as in ProcessBench). None is no label."""
    return next((t for t, y in enumerate(labels) if y is not None and y < 0.5), -1)


def from_prm800k(row, neutral="good"):
    """A PRM800K record -> stepwise rows: the path that was followed, and one row for each rated alternative to it.

    A path step carries the rating of the completion chosen there; a human's text (chosen_completion null) was never
    rated, label None. Alternatives repeat the path before them unlabelled, so that each rating is used once.
    Ratings: 1 good, -1 bad, 0 neutral (`neutral`: "good", "bad", or "drop": no label), null no label.
    """
    y = {1: 1.0, -1: 0.0, 0: {"good": 1.0, "bad": 0.0, "drop": None}[neutral], None: None}
    if row["label"]["finish_reason"] == "bad_problem":
        return []
    path, labels, rows = [], [], []
    for step in row["label"]["steps"]:
        completions, chosen, human = step["completions"] or [], step["chosen_completion"], step["human_completion"]
        for i, c in enumerate(completions):
            if i != chosen and y[c["rating"]] is not None:
                rows.append((path + [c["text"]], [None] * len(path) + [y[c["rating"]]]))
        if chosen is None and not human:
            break  # found_error, give_up: nothing was chosen, the record ends
        path = path + [human["text"] if chosen is None else completions[chosen]["text"]]
        labels = labels + [None if chosen is None else y[completions[chosen]["rating"]]]
    rows = [(path, labels), *rows] if path else rows
    answer = {"answer": row["question"]["ground_truth_answer"]} if row["question"].get("ground_truth_answer") else {}
    return [{"prompt": row["question"]["problem"], "completions": s, "labels": v, **answer} for s, v in rows]


def from_math_shepherd(row, neutral=None):
    """A Math-Shepherd record -> [stepwise row].

    `input` has the Cyrillic tag "ки" after each step; `label` is the same text with the tags replaced by + or -. The
    sign is read at the tag's offset, since + and - also occur in sums; each tag before shifted it by one character.
    A tag inside the question is an annotation error of the set, and is ignored.
    """
    text, signs = row["input"], row["label"]
    first = re.search(r"\bstep 1:", text, re.IGNORECASE)
    begin = first.start() if first else text.find("?", 0, text.find("ки")) + 1  # a few rows number no steps
    if begin <= 0:
        raise ValueError('input: no "Step 1:" and no "?" where the question could end')
    steps, labels, a = [], [], begin
    for k, tag in enumerate(re.finditer("ки", text)):
        sign = signs[tag.start() - k:tag.start() - k + 1]
        if sign not in ("+", "-"):
            raise ValueError(f"label: {sign!r} where the tag of step {k + 1} is, + or - is expected")
        if tag.start() >= begin:
            steps.append(text[a:tag.start()].strip())
            labels.append(float(sign == "+"))
            a = tag.end()
    return [{"prompt": text[:begin].replace("ки", "").strip(), "completions": steps, "labels": labels}]


FORMATS = {"stepwise": lambda row, neutral: [row], "prm800k": from_prm800k, "math-shepherd": from_math_shepherd}


def check(row):
    """Raise a ValueError that names the field if this is no stepwise row. A label is in [0, 1], or None: not known."""
    prompt, steps, labels = (row.get(k) for k in ("prompt", "completions", "labels"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt: a text is expected")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise ValueError("completions: a list of texts is expected")
    "".join([prompt, *steps]).encode()  # half a surrogate pair is a ValueError here, and would be worse in a tokenizer
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"labels: {len(steps)} are expected, one for each of completions, not {labels!r:.60}")
    for y in labels:
        if y is not None and not (isinstance(y, (int, float)) and 0 <= y <= 1):
            raise ValueError(f"labels: {y!r} is not in [0, 1]")


def read_set(name, form="auto", neutral="good"):
    """Yield (where, stepwise row) of a JSONL file or of a hub set's train split."""
    if Path(name).is_file():
        found = ((f"{name}:{number}", row) for number, row in read_rows(name))
    elif name.endswith((".jsonl", ".gz", ".json")):
        raise ValueError(f"{name}: no such file")
    else:
        found = hub_rows(name, name, split="train")
    for where, raw in found:
        schema = form if form != "auto" else "prm800k" if isinstance(raw.get("label"), dict) else \
            "math-shepherd" if "label" in raw and "input" in raw else "stepwise"
        try:
            for row in FORMATS[schema](raw, neutral):
                check(row)
                yield where, row
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{where}: not a {schema} row ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def load_data(names, neutral, samples, seed):
    """All sets of --data as one list of (where, row): at most `samples` of each, drawn at random
    (§3.1, Table 3)."""
    found = []
    for name in names:
        rows = list(tqdm(read_set(name, neutral=neutral), f"read {name}", disable=None, leave=False))
        if not rows:
            raise ValueError(f"{name}: no rows")
        # by the file's name: the draw is the same whatever the other sets, and wherever it lies
        random.Random(f"{seed} {Path(name).name}").shuffle(rows)
        found += rows[:samples]
    return found


def held_out(prompt, fraction):
    """Does this problem belong to validation? A hash of the question decides: all its solutions fall on one side, and
    on the same side in every set and every run, so that PRMs trained on different sets can be compared."""
    digest = hashlib.blake2b(" ".join(prompt.split()).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") < fraction * 2 ** 48


def split(found, val_found, fraction, val_samples):
    """(training rows, validation rows) with no problem on both sides: val_found, or what is held out of `found`; of
    validation rows at most val_samples, drawn from all sets."""
    def problem(row):
        return " ".join(row["prompt"].split())  # as held_out() has it
    asked = {problem(row) for _, row in val_found or found if val_found or held_out(row["prompt"], fraction)}
    val_found = val_found or [(where, row) for where, row in found if problem(row) in asked]
    found = [(where, row) for where, row in found if problem(row) not in asked]
    if not found or not val_found:
        raise ValueError(f"{'validation' if found else 'training'} would be empty: {len(asked)} problems are held out "
                         f"(--val-fraction, --val-data), and {len(found)} rows are left to train on")
    random.Random(0).shuffle(val_found)
    return found, val_found[:val_samples]
