"""The responses that similarity.py compares: files of them, their tokens, and the printed table."""
import itertools
import json
from collections import namedtuple
from pathlib import Path

from common.data import read_rows, solutions_of
from common.run import expect, located

DOMAINS = ["math", "code"]
SETS = ["Math", "Math_PRM", "Code", "Code_PRM"]  # as Table 2 calls them
Response = namedtuple("Response", "domain question text sets")  # sets: names of those it is in


def sets_of(domain, selected, correct):
    """The sets of a response: sets_of("math", True, None) -> {"Math", "Math_PRM"}.
    correct, unless it is None (nobody judged it): "correct only" or "wrong only", too."""
    names = {domain.title(), f"{domain.title()}_PRM"} if selected else {domain.title()}
    return names if correct is None else names | {"correct only" if correct else "wrong only"}


def read_sets(files, limit, separator):
    """Responses from JSONL files, of the first `limit` rows of each. Either

    - four files, one for each of SETS, of stepwise rows ("prompt" and "completions"), of rows with
      a "prompt" and a "response", or of sample rows (common/data.py), or
    - one or two files of sample rows, whose "picked" is the index of the selected sample. Two files
      are math and code; in one file each row has its "domain".

    A malformed row is a ValueError with file and line.
    """
    responses = []
    for k, file in enumerate(files):
        # islice: rows after the limit are not even read
        for number, row in itertools.islice(read_rows(file), limit):
            with located(f"{file}:{number}"):
                responses += row_responses(row, k, len(files), separator)
    return responses


def row_responses(row, k, files, separator):
    """The responses of one row of the k-th of `files` files."""
    question, samples = solutions_of(row)
    domain = row["domain"] if files == 1 else DOMAINS[k * 2 // files]
    expect(domain in DOMAINS, f"domain: math or code is expected, not {domain!r}")
    for i, sample in enumerate(samples):
        text = separator.join(sample["steps"])
        expect(text.strip(), "an empty response")
        if files == 4:  # the second and the fourth repeat some of the first and the third
            names = {SETS[k]} if k % 2 else sets_of(domain, False, sample.get("correct"))
        else:
            names = sets_of(domain, i == row["picked"], sample.get("correct"))
        yield Response(domain, question, text, names)


def need_sets(responses):
    """ValueError if one of SETS is empty: there is no Table 2, and no need of gradients."""
    missing = set(SETS).difference(*(r.sets for r in responses))
    expect(not missing, "no responses in " + ", ".join(sorted(missing, key=SETS.index)))


def encode(policy, responses):
    """[(token ids, where the response starts)], and how many were cut at the end of the context."""
    items, cut, context = [], 0, policy.context
    for r in responses:
        prompt = list(policy.root("", r.question, r.domain).ids)  # as the policy itself is asked
        ids = prompt + policy.tokenizer(r.text, add_special_tokens=False)["input_ids"]
        expect(0 < len(prompt) < len(ids),
               f"no prompt, or a response without a token: {r.question[:50]!r}")
        cut += len(ids) > context
        # What is cut has no A, but the rest of a long response still has a pattern.
        items.append((ids[:context], len(prompt)))
    return items, cut


def report(result, file=None):
    """Print the table; write all of the result to `file`, as JSON."""
    model = result["args"]["model"] or result["args"]["policy"]
    print(f"F = {model}, {result['weights']:,} weights. Problems {dict(result['problems'])}, "
          f"responses {result['responses']}, {result['cut']} cut at the end of the context")
    print(f"{'pattern similarity':<38}S   95 % interval      minus S(Math, Code)")
    for name, x in result["table"].items():
        interval = "{:.2f} .. {:.2f}".format(*x["interval"])
        difference = "{:+.2f} .. {:+.2f}".format(*x["difference_interval"])
        print(f"  {name:<30}{x['S']:>7.2f}   {interval:<17} {x['difference']:>+7.2f}  ", difference)
    print(f"{result['random_as_high']:.1%} of the random subsets reach S(Math_PRM, Code_PRM). "
          f"Largest error of the sketches on the four pairs: {result['sketch_error']:.3f}")
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n")
