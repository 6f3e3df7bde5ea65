"""common/data.py: the row formats, the two original sets of step labels, and the split."""
import gzip
import json
import random
from pathlib import Path

import pytest

from common.data import (
    first_wrong,
    from_math_shepherd,
    from_prm800k,
    held_out,
    load_data,
    read_rows,
    read_set,
    read_solutions,
    split,
)
from tiny import world

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
GOOD = {"prompt": "q", "completions": ["a", "b"], "labels": [1, 0]}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """48 labelled solutions of the tiny world."""
    rng = random.Random(0)
    rows = []
    for domain in ("math", "code"):
        for problem in world.problems(domain, "train", 24):
            steps = world.write(problem, "A", rng)
            rows.append({"prompt": problem["question"], "completions": steps,
                         "labels": world.grade(problem, steps)})
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write(file, rows)
    return file


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------ files

@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz"])
def test_lines_and_arrays_zipped_or_not(tmp_path, name):
    rows = [{"a": 1}, {"a": "\u2028"}]  # U+2028 is a line end to str.splitlines() only
    text = json.dumps(rows)
    if "jsonl" in name:
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    numbers = [1, 3] if "jsonl" in name else [1, 2]  # lines of JSONL, rows of an array
    assert list(read_rows(tmp_path / name)) == list(zip(numbers, rows))


DEEP = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("line, message", [
    ('{"prompt": ', "not JSON"),
    (DEEP, "nested too deeply"),
    ("[1]", "a JSON object is expected, not list"),
    (json.dumps({**GOOD, "labels": [1]}), "labels: 2 are expected"),
    (json.dumps({**GOOD, "labels": [1, 1.5]}), "labels: 1.5 is not in [0, 1]"),
    (json.dumps({**GOOD, "labels": [1, float("nan")]}), "labels: nan is not in [0, 1]"),
    (json.dumps({**GOOD, "labels": [1, "+"]}), "labels: '+' is not in [0, 1]"),
    (json.dumps({**GOOD, "prompt": None}), "prompt: a text is expected"),
    (json.dumps({**GOOD, "prompt": "\ud800"}), "surrogates not allowed"),
    (json.dumps({**GOOD, "completions": "ab"}), "completions: a list of one text or more"),
    (json.dumps({**GOOD, "completions": []}), "completions: a list of one text or more"),
    ('{"label": {"steps": 3}}', "not a prm800k row"),
    ('{"input": "What? Step 1: x ки", "label": "What? Step 1: x *"}', "label: '*' where"),
    ('{"input": "x ки", "label": "x +"}', 'input: no "Step 1:"'),
], ids=["not JSON", "depth", "list", "labels short", "label 1.5", "label nan", "label +",
        "prompt null", "surrogate", "completions text", "no steps", "prm800k", "sign", "question"])
def test_a_malformed_row_is_named(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError) as error:
        list(read_set(str(tmp_path / "bad.jsonl")))
    assert "\n" not in str(error.value)
    assert "bad.jsonl:2: " in str(error.value)
    assert message in str(error.value)


def test_an_array_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="deep.json:1: nested too deeply"):
        list(read_rows(tmp_path / "deep.json"))


def test_a_broken_archive_is_named(tmp_path):
    whole = gzip.compress(b'{"prompt": "q"}\n' * 99)
    (tmp_path / "broken.jsonl.gz").write_bytes(whole[:-20] + b"x" * 20)
    with pytest.raises(ValueError, match=r"broken.jsonl.gz:\d+: "):
        list(read_rows(tmp_path / "broken.jsonl.gz"))


@pytest.mark.parametrize("name, message", [("empty.jsonl", "no rows"), ("no.gz", "no such file")])
def test_a_set_without_rows_is_named(tmp_path, name, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        load_data([str(tmp_path / name)], "good", 9, 0)


def test_solutions_of_both_formats(tmp_path):
    samples = {"question": "Q", "samples": [{"steps": ["x"]}, {"steps": ["y", "z"]}]}
    write(tmp_path / "x.jsonl", [GOOD, samples])
    assert list(read_solutions(tmp_path / "x.jsonl")) == [
        ("q", ["a", "b"]), ("Q", ["x"]), ("Q", ["y", "z"])]


def test_a_row_of_neither_format_is_named(tmp_path):
    write(tmp_path / "x.jsonl", [GOOD, {"question": "Q"}])
    with pytest.raises(ValueError, match="x.jsonl:2: neither"):
        list(read_solutions(tmp_path / "x.jsonl"))


def test_a_set_as_the_hub_has_it(rows_file, tmp_path, monkeypatch):
    """A folder with data/train-*.parquet, read as datasets.load_dataset reads the hub's sets."""
    datasets = pytest.importorskip("datasets")
    rows = [row for _, row in read_set(str(rows_file))][:3]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parquet = tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    name = str(tmp_path / "hub")
    assert list(read_set(name)) == [(f"{name}:{n}", row) for n, row in enumerate(rows, 1)]


# ------------------------------------------------------------ labels

@pytest.mark.parametrize("labels, want", [
    ([1, 1, 0, 1, 0], 2), ([True, False], 1), ([1, None, 0.4], 2), ([1, 0.5], -1), ([None], -1),
    ([], -1)])
def test_first_wrong(labels, want):
    assert first_wrong(labels) == want


def prm800k(steps, finish="solution"):
    """A record. steps: [([(text, rating), ...] or None, index chosen, a human's text)]."""
    records = []
    for completions, chosen, human in steps:
        if completions is not None:
            completions = [{"text": t, "rating": r, "flagged": False} for t, r in completions]
        records.append({"completions": completions, "chosen_completion": chosen,
                        "human_completion": human and {"text": human, "rating": None}})
    return {"question": {"problem": "Q?"}, "label": {"finish_reason": finish, "steps": records}}


@pytest.mark.parametrize("neutral, y", [("good", 1.0), ("bad", 0.0), ("drop", None)])
def test_prm800k(neutral, y):
    record = prm800k([([("a", 1)], 0, None),
                      ([("b", -1), ("c", None)], None, "human b"),  # a human wrote on: not rated
                      ([("d", 0), ("e", -1), ("f", 1)], 0, None),   # the path goes on with d
                      (None, None, None)], "give_up")               # completions null
    rows = {tuple(r["completions"]): r["labels"] for r in from_prm800k(record, neutral)}
    assert rows == {("a", "human b", "d"): [1.0, None, y], ("a", "b"): [None, 0.0],
                    ("a", "human b", "e"): [None, None, 0.0],
                    ("a", "human b", "f"): [None, None, 1.0]}


def test_prm800k_without_a_choice_at_the_end():
    record = prm800k([([("a", 1)], 0, None), ([("b", -1), ("c", 1)], None, None)], "found_error")
    assert [(r["completions"], r["labels"]) for r in from_prm800k(record)] == [
        (["a"], [1.0]), (["a", "b"], [None, 0.0]), (["a", "c"], [None, 1.0])]


@pytest.mark.parametrize("steps, finish", [([([("a", 1)], 0, None)], "bad_problem"),
                                           ([], "solution")])
def test_prm800k_without_rows(steps, finish):
    assert from_prm800k(prm800k(steps, finish)) == []


def shepherd(text, signs):
    """Both texts of a record: the k-th # is the tag in one and the k-th sign in the other."""
    parts = text.split("#")
    label = "".join(part + sign for part, sign in zip(parts, [*signs, ""]))
    return {"input": "ки".join(parts), "label": label, "task": "GSM8K"}


@pytest.mark.parametrize("text, signs, prompt, steps, labels", [
    ("What is 3 + 4? Step 1: 3 + 4 = 7 #\nStep 2: 7 - 0 = 7 The answer is: 7 #", "+-",
     "What is 3 + 4?", ["Step 1: 3 + 4 = 7", "Step 2: 7 - 0 = 7 The answer is: 7"], [1, 0]),
    ("Add # 3 and 4. step 1: 3 + 4 = 7 #", "-+", "Add  3 and 4.", ["step 1: 3 + 4 = 7"], [1]),
    ("How many? Seven #\nSurely #", "+-", "How many?", ["Seven", "Surely"], [1, 0]),
], ids=["signs in the sums", "tag in the question", "no numbers"])
def test_math_shepherd(text, signs, prompt, steps, labels):
    assert from_math_shepherd(shepherd(text, signs)) == [
        {"prompt": prompt, "completions": steps, "labels": labels}]


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"no {name} beside the repository")
    return str(REAL / name)


def test_real_math_shepherd():
    rows = [row for _, row in read_set(real("math_shepherd/rows.jsonl"))]
    assert len(rows) == 7
    assert rows[0]["labels"] == [1, 1, 1, 1, 0]
    assert rows[0]["completions"][0].startswith("Step 1: Janet")
    assert "ки" not in json.dumps(rows, ensure_ascii=False)


def test_real_prm800k_uses_each_rating_once():
    file = real("prm800k/prm800k_rows.jsonl")
    ratings, labels = [], []
    for _, record in read_rows(file):
        for step in record["label"]["steps"]:
            ratings += [c["rating"] for c in step["completions"] or []]
    for _, row in read_set(file):
        labels += row["labels"]
    assert sum(y is not None for y in labels) == sum(rating is not None for rating in ratings)
    assert labels.count(0.0) == ratings.count(-1)


# ------------------------------------------------------------ shares and splits

def test_at_most_so_many_rows_of_each_set(rows_file, tmp_path):
    write(tmp_path / "small.jsonl", [{**GOOD, "prompt": f"q{i}"} for i in range(10)])
    both = load_data([str(rows_file), str(tmp_path / "small.jsonl")], "good", 20, 0)
    assert len(both) == 30
    assert sum(row["prompt"].startswith("q") for _, row in both) == 10


def test_the_draw_is_without_repetition_and_seeded(rows_file):
    drawn = load_data([str(rows_file)], "good", 20, 0)
    assert len({where for where, _ in drawn}) == 20
    assert load_data([str(rows_file)], "good", 20, 0) == drawn
    assert load_data([str(rows_file)], "good", 20, 1) != drawn


def test_a_large_share_is_the_whole_set(rows_file):
    assert len(load_data([str(rows_file)], "good", 10**6, 0)) == 48


def test_spaces_make_no_new_problem():
    for fraction in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert held_out("What  is\n1+1?", fraction) == held_out("What is 1+1?", fraction)


def test_about_the_fraction_is_held_out():
    assert 60 < sum(held_out(f"problem {i}", 0.1) for i in range(1000)) < 140


def test_no_problem_is_on_both_sides():
    rows = [("a:1", {"prompt": "1 + 1?"}), ("a:2", {"prompt": "2 + 2?"})]
    train_rows, val_rows = split(rows, [("b:1", {"prompt": " 1  + 1?"})], 0, 9)
    assert [where for where, _ in train_rows] == ["a:2"]
    assert [where for where, _ in val_rows] == ["b:1"]


def test_the_split_without_a_validation_set():
    rows = [(f"a:{i}", {"prompt": f"problem {i // 2}"}) for i in range(400)]
    train_rows, val_rows = split(rows, [], 0.2, 50)
    prompts = {row["prompt"] for _, row in train_rows}
    assert len(val_rows) == 50
    assert not prompts & {row["prompt"] for _, row in val_rows}
    assert all(held_out(row["prompt"], 0.2) for _, row in val_rows)


@pytest.mark.parametrize("fraction, side", [(0, "validation"), (1, "training")])
def test_an_empty_side_is_refused(fraction, side):
    with pytest.raises(ValueError, match=f"{side} would be empty"):
        split([("a:1", {"prompt": "q"})], [], fraction, 9)
