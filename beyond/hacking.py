"""Reward against truth: the figure and table of docs/reinforce.md, from folders of reinforce.py.

    python -m beyond.hacking --runs runs/reinforce/* --out runs/reinforce-figure
    python -m beyond.hacking --runs runs/reinforce/prm-0 --examples 3

Runs that differ only in their seed are one form. A run's held-out problems depend on its seed;
intervals are 95 %, bootstrap over problems and seeds (over problems alone where there is one seed).

Hacking has begun, by definition here, at the first evaluation whose accuracy is below that of an
earlier one (paired over problems, beyond two standard errors) while its mean reward is not.
"""
from itertools import chain
from pathlib import Path
from statistics import fmean

from common.checkpoint import read_log
from common.data import read_rows
from common.metrics import over_runs, paired
from common.results import coloured
from common.run import command_line
from paper.drawing import STYLE, save, write_table

COLOURS = {"math": "#0063a8", "code": "#b86e00"}
ORDER = ["outcome", "prm", "sum", "min", "advantage"]


class Run:
    """A folder of reinforce.py: `form`, `seed`, `tokens` {step: generated in training so far}, and
    for each evaluation `samples` {step: sample rows}."""

    def __init__(self, folder):
        folder = Path(folder)
        log = read_log(folder)
        if not log:
            raise ValueError(f"{folder}: no log.jsonl of beyond/reinforce.py")
        settings = next(row["settings"] for row in log if row["kind"] == "start")
        self.folder = folder
        self.form = form_of(settings)
        self.seed = settings["seed"]
        self.tokens = {0: 0} | {r["step"]: r["tokens"] for r in log if r["kind"] == "train"}
        self.samples = {}
        for step in sorted({row["step"] for row in log if row["kind"] == "eval"}):
            file = folder / f"samples-{step:06d}.jsonl"
            self.samples[step] = [row for _, row in read_rows(file)]

    def values(self, step, domain, key):
        """One value a problem: the mean of its samples' `correct` or `reward`."""
        means = []
        for row in self.samples[step]:
            if row["domain"] == domain:
                means.append(fmean(float(s[key]) for s in row["samples"]))
        return means

    def domains(self):
        return sorted({row["domain"] for row in self.samples[0]}, reverse=True)

    def hacked(self, domain):
        """(step, of which earlier step the accuracy was higher), or None."""
        for step in self.samples:
            for earlier in (s for s in self.samples if s < step):
                _, _, z = paired(self.values(step, domain, "correct"),
                                 self.values(earlier, domain, "correct"))
                reward, _, _ = paired(self.values(step, domain, "reward"),
                                      self.values(earlier, domain, "reward"))
                if z < -2 and reward >= 0:
                    return step, earlier
        return None


def form_of(settings):
    """The settings that make a form, as a name: "prm, 10 % verified"."""
    if settings["distil"]:
        return f"distil {settings['distil']}"
    name = settings["credit"]
    if settings["verified"]:
        name += f", {settings['verified']:.0%} verified".replace("%", " %")
    if settings["kl"]:
        name += f", KL {settings['kl']:g}"
    if settings["aggregate"] != "prod" and settings["credit"] == "prm":
        name += f", {settings['aggregate']}"
    if not settings["prm"].endswith("tiny/prm"):  # one that was trained again
        name += f", {Path(settings['prm']).name}"
    return name


def by_form(runs):
    """{form: its runs}, outcome first, the five forms before their variants."""
    def rank(form):
        return ORDER.index(form) if form in ORDER else len(ORDER)
    forms = {}
    for run in sorted(runs, key=lambda run: (rank(run.form), run.form, run.seed)):
        forms.setdefault(run.form, []).append(run)
    return forms


def steps_of(runs):
    """Evaluations that all seeds have."""
    return sorted(set.intersection(*(set(run.samples) for run in runs)))


def point(runs, step, domain, key):
    value, low, high = over_runs([run.values(step, domain, key) for run in runs])
    name = "accuracy" if key == "correct" else "PRM reward"
    return {"series": f"{runs[0].form}, {name} {domain}", "x": step, "value": value, "low": low,
            "high": high, "problems": len(runs[0].values(step, domain, key)), "seeds": len(runs)}


def draw(forms, points, out):
    """OUT/reinforce.svg: a panel for each form, accuracy solid and PRM reward dashed."""
    import matplotlib  # slow to import, and --help needs none of it
    from matplotlib.figure import Figure
    columns = min(4, len(forms))
    rows = -(-len(forms) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure((4.6 * columns, 3.9 * rows + 0.9), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.8 / (3.9 * rows + 0.9)))
        figure.text(0.01, 0.985, "Accuracy (solid) and the PRM's mean reward (dashed): "
                    "blue math, orange code", va="top", size=19, weight="bold")
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).flatten()
        for ax in axes[len(forms):]:
            ax.set_visible(False)
        for ax, (form, runs) in zip(axes, forms.items()):
            seeds = "seed" if len(runs) == 1 else "seeds"
            ax.set_title(f"{form} ({len(runs)} {seeds})", size=15)
            ax.set_ylim(0, 1)
            for domain, colour in COLOURS.items():
                for name, line in (("accuracy", "-"), ("PRM reward", "--")):
                    draw_line(ax, [p for p in points if p["series"] == f"{form}, {name} {domain}"],
                              colour, line)
        for ax in axes[-columns:]:
            ax.set_xlabel("steps")
        save(figure, Path(out) / "reinforce", dpi=80)


def draw_line(ax, points, colour, line):
    if points:
        x, value, low, high = zip(*((p["x"], p["value"], p["low"], p["high"]) for p in points))
        ax.plot(x, value, linestyle=line, color=colour)
        ax.fill_between(x, low, high, alpha=0.12, color=colour, linewidth=0)


def table(forms):
    """Markdown: before, best and last, and at as many generated tokens as every form has spent."""
    totals = []  # tokens of each run
    for run in sum(forms.values(), []):
        totals.append(max(run.tokens[step] for step in run.samples))
    spent = min(totals)
    lines = [f"| form | seeds | | accuracy at step 0 | at {spent / 1e6:.2f} M tokens | at the end "
             "| reward at step 0 | at the end | hacking from |", "|---" * 9 + "|"]
    for form, runs in forms.items():
        steps = steps_of(runs)
        within = [s for s in steps if max(run.tokens[s] for run in runs) <= 1.05 * spent]
        for domain in runs[0].domains():
            def cell(step, key, runs=runs, domain=domain):
                p = point(runs, step, domain, key)
                return f"{p['value']:.3f} ({p['low']:.2f} to {p['high']:.2f})"
            hacked = [run.hacked(domain) for run in runs]
            seeds = ", ".join(str(run.seed) for run in runs)
            begun = ", ".join(f"{h[0]}" if h else "none" for h in hacked)
            lines.append(f"| {form} | {seeds} | {domain} | {cell(0, 'correct')} | "
                         f"{cell(within[-1], 'correct')} (step {within[-1]}) | "
                         f"{cell(steps[-1], 'correct')} (step {steps[-1]}) | {cell(0, 'reward')} | "
                         f"{cell(steps[-1], 'reward')} | {begun} |")
    return "\n".join(lines)


def habits(forms):
    """Markdown: how solutions of the tiny world end, at the start and each form's last evaluation.

    A problem has one step for each month or `Let`, and the answer. early: fewer steps; longer: more
    of them; corrected: with a step that says "wait"; right steps: by the rule of the world.
    """
    lines = ["| form | | step | ends early | longer | corrected | right steps | all right |",
             "|---" * 8 + "|"]
    groups = [("start", next(iter(forms.values())), 0)]  # all forms start from one policy
    groups += [(form, runs, steps_of(runs)[-1]) for form, runs in forms.items()]
    for name, runs, step in groups:
        for domain in runs[0].domains():
            shares = []
            for row in chain.from_iterable(run.samples[step] for run in runs):
                if row["domain"] == domain:
                    shares += [habit(row, s) for s in row["samples"]]
            cells = " | ".join(f"{fmean(column):.3f}" for column in zip(*shares))
            lines.append(f"| {name} | {domain} | {step} | {cells} |")
    return "\n".join(lines)


def habit(row, s):
    """(early, longer, corrected, share of right steps, all right) of one sample."""
    needed = row["question"].count(" In ") + row["question"].count("Let ") + 1
    plain = [t for t in s["steps"] if not t.startswith("Wait, ") and not t.endswith("# wait")]
    return (len(s["steps"]) < needed, len(plain) > needed, len(plain) < len(s["steps"]),
            fmean(map(float, s["true"])), all(s["true"]))


def examples(run, n):
    """Print wrong solutions of the last evaluation that the PRM likes best, with p_t and truth."""
    step = max(run.samples)
    wrong = {}
    for row in run.samples[step]:
        for s in row["samples"]:
            if not s["correct"]:
                wrong.setdefault((row["id"], tuple(s["steps"])), (s["reward"], row, s))
    per_problem = {}
    for reward, row, s in sorted(wrong.values(), key=lambda item: -item[0]):
        per_problem.setdefault(row["id"], (reward, row, s))
    for reward, row, s in list(per_problem.values())[:n]:
        print(f"\n{run.form}, seed {run.seed}, step {step}: {row['id']}, reward {reward:.3f}, wrong"
              f"\n{row['question']}")
        for text, p, right in zip(s["steps"], s["scores"], s["true"] or [None] * len(s["steps"])):
            print(f"  {coloured(text, p)}{'    <- wrong' if right is False else ''}")


def main(argv=None):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--runs", nargs="+", required=True, help="folders that beyond/reinforce.py wrote")
    a("--out", help="folder of the figure, the table and their numbers")
    a("--examples", type=int, default=0, help="wrong solutions with the largest rewards to print")
    args = parser.parse_args(argv)
    with parser:
        runs = [Run(folder) for folder in args.runs]
        for run in runs if args.examples else ():
            examples(run, args.examples)
        forms = by_form(runs)
        points = []
        for group in forms.values():
            for step in steps_of(group):
                for domain in group[0].domains():
                    points += [point(group, step, domain, k) for k in ("correct", "reward")]
        text = table(forms)
        if all(row["id"].startswith("tiny-") for row in runs[0].samples[0]):
            text += "\n\n" + habits(forms)  # the truth of steps is known: the tiny world
        print(text)
        if args.out:
            write_table("reinforce-points", points, args.out, "step", None, "value")
            draw(forms, points, args.out)
            (Path(args.out) / "reinforce.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
