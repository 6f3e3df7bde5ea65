"""Rows as other projects write them -> this project's (common/data.py), told by their fields.

Sets of step labels, for training and for --first-error: ProcessBench (arXiv 2412.06559), PRMBench
(2501.03124), ReasonEval's MR-MATH (2404.05692), MATH-APS of OpenR (2410.09671).
Pools of scored solutions, for evaluate.py --samples: evalplus, search-and-learn, RLHFlow's
prm_evaluate.py and orm_evaluate.py, Qwen2.5-Math's evaluation, BiRM (2503.04618).
"""
from common.run import expect, located

# ------------------------------------------------------------ step labels -> stepwise rows

def first_error_labels(steps, first):
    """first: index of the first wrong step, -1 for none. Later steps have no label."""
    expect(-1 <= first < len(steps), f"label: {first} is no step's number, nor -1")
    if first < 0:
        return [1.0] * len(steps)
    return [1.0] * first + [0.0] + [None] * (len(steps) - first - 1)


def from_processbench(row, neutral=None):
    """Its label counts from 0; -1: no error."""
    labels = first_error_labels(row["steps"], int(row["label"]))
    return [{"prompt": row["problem"], "completions": row["steps"], "labels": labels}]


def from_prmbench(row, neutral=None):
    """Its error_steps count from 1, and all steps are labelled, also those after an error."""
    steps, wrong = row["modified_process"], set(row["error_steps"] or ())
    labels = [float(number not in wrong) for number in range(1, len(steps) + 1)]
    return [{"prompt": row.get("modified_question") or row["question"], "completions": steps,
             "labels": labels}]


def from_reasoneval(row, neutral=None):
    """Its steps are lists of sentences, each with a score of its own; they count from 1. A solution
    that is wrong in no step is left out, as in its figures."""
    steps = row["model_output_step_format"]
    first = row["model_output_solution_first_error_step"]
    # a wrong answer without a wrong step: nobody knows what a PRM should say there
    if first == "N/A" and row["model_output_solution_correctness"] != "correct":
        return []
    labels = first_error_labels(steps, -1 if first == "N/A" else int(first) - 1)
    texts = ["\n".join(step) for step in steps]
    return [{"id": row["id"], "prompt": row["question"], "completions": texts, "labels": labels,
             "sentences": list(map(len, steps))}]


def from_math_aps(row, neutral=None):
    """Five line breaks end a step; "+" or "-" for each. Of a prefix only the end has a label."""
    steps = steps_of(row["process"], "\n" * 5)
    signs = [{"+": 1.0, "-": 0.0}[sign] for sign in row["label"]]
    # what comes before a labelled end are the steps of the same prefix, labelled in other rows
    labels = [None] * (len(steps) - len(signs)) + signs
    return [{"prompt": row["question"], "completions": steps, "labels": labels}]


# fields that only such a row has -> converter
STEP_LABELS = {"processbench": ({"problem", "steps", "label"}, from_processbench),
               "prmbench": ({"modified_process", "error_steps"}, from_prmbench),
               "reasoneval": ({"model_output_step_format",
                               "model_output_solution_first_error_step"}, from_reasoneval),
               "math-aps": ({"question", "process", "label"}, from_math_aps)}


# ------------------------------------------------------------ pools -> sample rows

def steps_of(text, separator="\n\n"):
    return [step.strip() for step in text.split(separator) if step.strip()] or [text]


def columns(texts, **lists):
    """Samples from lists of equal length; a list that is None gives no key. ValueError: lengths."""
    samples = [{"steps": steps} for steps in texts]
    for key, values in lists.items():
        expect(values is None or len(values) == len(samples),
               f"{len(values or ())} {key} for {len(samples)} solutions")
        for sample, value in zip(samples, values or ()):
            sample[key] = value
    return samples


def from_evalplus(row):
    """A line is a sample: {"task_id", "solution": whole program or "completion": of the prompt}."""
    # the steps are made where the prompt is known: common/samples.py
    name = "solution" if "solution" in row else "completion"
    return {"id": row["task_id"], "samples": [{name: row[name]}]}


def from_search_and_learn(row):
    """Steps end with an empty line; "scores" has those of each step."""
    texts = map(steps_of, row["completions"])
    return {**row, "id": row.get("unique_id", row["problem"]), "question": row["problem"],
            "samples": columns(texts, scores=row.get("scores"))}


def from_rlhflow(row):
    """Steps end with Math-Shepherd's tag or an empty line. step_scores: of each step, or of each
    solution (orm_evaluate.py)."""
    # its Mistral pools carry the tag, its Deepseek pools do not
    texts = [steps_of(text, "ки" if "ки" in text else "\n\n") for text in row["answers"]]
    scores = row.get("step_scores")
    if scores and not isinstance(scores[0], list):
        scores = [[score] for score in scores]
    right = row.get("label") and [x == 1 for x in row["label"]]
    return {"id": row.get("idx", row["prompt"]), "question": row["prompt"],
            "samples": columns(texts, scores=scores, correct=right)}


def from_qwen_math(row):
    """"score" says what is right, "pred" is the answer, "pred_score" has a reward model's logit."""
    # "" is no answer there, and no vote here
    answers = row.get("pred") and [answer or None for answer in row["pred"]]
    return {"id": row["idx"], "question": row.get("question") or row["problem"],
            "answer": row.get("gt", row.get("answer")),
            "samples": columns(map(steps_of, row["code"]), correct=row.get("score"),
                               answer=answers, scores=row.get("pred_score"))}


def from_birm(row):
    """vscores has one score a token; the first is the solution's, as in its best-of-N."""
    outputs = row["outputs"]
    scores = [x["vscores"][:1] for x in outputs] if "vscores" in outputs[0] else None
    right = [x["label"] for x in outputs] if "label" in outputs[0] else None
    texts = [steps_of(x["response"].replace("ки", "\n\n")) for x in outputs]
    return {"id": row["idx"], "question": row["question"], "answer": row.get("ground_truth"),
            "samples": columns(texts, scores=scores, correct=right)}


# the first whose fields a row has
POOLS = [({"task_id", "solution"}, from_evalplus), ({"task_id", "completion"}, from_evalplus),
         ({"problem", "completions"}, from_search_and_learn), ({"prompt", "answers"}, from_rlhflow),
         ({"idx", "code"}, from_qwen_math), ({"question", "outputs"}, from_birm)]


def sample_row(row):
    """Anybody's row -> a sample row, by its fields. ValueError: one that does not fit together."""
    for fields, convert in () if "samples" in row else POOLS:
        if fields <= row.keys():
            with located(f"not a row of {convert.__name__.removeprefix('from_')}"):
                return convert(row)
    expect("samples" in row or not {"id", "scores"} <= row.keys(), "scores without solutions: pass "
           "the set that they belong to as --first-error SET beside --samples")
    return row


def one_a_problem(rows):
    """Rows of one sample each, as evalplus has them -> a row a problem. rows: [(line, row)]."""
    merged = {}
    for number, row in rows:
        # a row with a question is whole: two of one id stay two
        key = row.get("id") if "question" not in row else (row.get("id"), number)
        if key in merged:
            merged[key][1]["samples"] += row["samples"]
        else:
            merged[key] = (number, row)
    return list(merged.values())
