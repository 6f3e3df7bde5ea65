"""Draws the points of paper/figures.py for a talk: PNG and SVG, and their Markdown table.

A point is a dict with series ("PANEL, LINE"), x, value, low, high, problems, and more. Lines are
named at their right ends, a thing has one colour in all figures, and what has no PRM is dashed.
"""
import json
import re
import statistics
from itertools import chain
from pathlib import Path

from common.metrics import over_runs
from common.run import expect

COLOURS = {"majority": "#b86e00", "single": "#6b6b6b", "best-of-N": "#0063a8", "beam": "#007a5a",
           "MCTS": "#b8321a", "pass": "#3a96d0", "ASLAF": "#7b3294", "consensus": "#7b3294",
           "truth": "#111111", "LLM-A": "#8c510a", "LLM-B": "#01857a", "masked": "#b3247a",
           "PRM800K": "#8c510a", "Math-Shepherd": "#01857a"}
SPARE = ["#332288", "#117733", "#882255", "#5b7a00", "#1f78b4", "#a6611a"]  # for other labels
DASHED = re.compile(r"not corrected|^single$|^majority$|eval loss")
PANEL_LABELS = {"validation": "step AUC", "loss": "nats a step"}  # panels with a y of their own
STYLE = {"font.size": 15, "font.sans-serif": ["DejaVu Sans", "Verdana"], "lines.linewidth": 2.5,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#dddddd", "svg.fonttype": "none", "svg.hashsalt": "figures"}


def point(series, x, *runs, **more):
    """A point of a series "PANEL, LINE". runs: one value a problem, for each training run."""
    value, low, high = over_runs(runs)
    if len(runs) > 1:
        more["each run"] = " ".join(f"{statistics.fmean(run):.3f}" for run in runs)
    return {"series": series, "x": x, "value": value, "low": low, "high": high,
            "problems": len(runs[0]), **more}


def exact(series, x, value, **more):  # a point without an interval
    return {"series": series, "x": x, "value": value, "low": value, "high": value, **more}


def write_table(name, points, out, x_label, _, y_label):
    """The points as OUT/NAME.jsonl, and as a Markdown table in OUT/NAME.md, which is returned."""
    expect(points, f"{name}: there is nothing to draw")
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    more = dict.fromkeys(chain.from_iterable(points))  # further columns, in order
    more = [key for key in more if key not in ("series", "x", "value", "low", "high")]
    table = ["| " + " | ".join(["", x_label, y_label, "95 %", *more]) + " |",
             "|---" * (4 + len(more)) + "|"]
    for p in points:
        cells = [p["series"], f"{p['x']:.6g}", f"{p['value']:.3f}",
                 f"{p['low']:.3f} to {p['high']:.3f}", *(cell(p.get(key)) for key in more)]
        table.append("| " + " | ".join(cells) + " |")
    (Path(out) / f"{name}.md").write_text("\n".join(table) + "\n")
    return "\n".join(table)


def cell(value):
    if isinstance(value, tuple):  # a difference and its interval
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(*value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value) if value is not None else ""


def panel_and_line(series):
    """"math, prm@16 of l" -> ("math", "prm@16 of l"); the curves of training have two panels."""
    panel, _, line = series.partition(", ")
    if panel in ("math", "code", "validation"):
        return panel, line
    return ("loss" if line.endswith(" loss") else "validation set"), series


def colour(line, others):
    """A line's colour. others (a dict) collects the labels that COLOURS does not name."""
    thing = re.sub(r" at \d+$|, (weighted|until)\b", "", line)  # a strategy, whatever its rule
    thing = re.sub(r", (not )?corrected$|^.* of ", "", thing)  # "step AUC of l": it is about l
    thing = re.sub(r"\b(train|eval) ", "", re.sub(r"^prm@\d+$", "best-of-N", thing))
    number = others.setdefault(thing, len(others)) if thing not in COLOURS else 0
    return COLOURS.get(thing, SPARE[number % len(SPARE)])


def draw(name, points, out, title, x_label, scale, y_label):
    """OUT/NAME.png and OUT/NAME.svg: a panel for math and one for code, and bands of 95 %."""
    import matplotlib  # slow to import, and --help needs none of it
    from matplotlib.figure import Figure
    panels = {}
    for p in points:
        panel, line = panel_and_line(p["series"])
        panels.setdefault(panel, {}).setdefault(line, []).append(p)
    order = ["math", "code", *panels]  # these two first: they share their y
    panels = {panel: panels[panel] for panel in dict.fromkeys(order) if panel in panels}
    with matplotlib.rc_context(STYLE):
        figure = Figure((1.5 + 5 * len(panels), 5.8), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.85), wspace=0.04)  # room for the title
        figure.text(0.01, 0.98, title, va="top", size=20, weight="bold")
        figure.text(0.01, 0.905, subtitle(points), va="top", color="#444444")
        axes, others = figure.subplots(1, len(panels), squeeze=False)[0], {}
        for (panel, lines), ax in zip(panels.items(), axes):
            for line, dots in lines.items():
                draw_line(ax, line, sorted(dots, key=lambda p: p["x"]), colour(line, others))
            ax.set(title=panel, xlabel=x_label, ylabel=PANEL_LABELS.get(panel, y_label))
            scale_x(ax, scale, [p["x"] for p in sum(lines.values(), [])])
        if {"math", "code"} <= panels.keys():
            axes[1].sharey(axes[0])
            axes[0].autoscale(axis="y")  # over the lines of both
        for (_, lines), ax in zip(panels.items(), axes):  # once the limits of y are settled
            name_lines(ax, lines, others)
        save(figure, Path(out) / name, dpi=110)


def save(figure, file, dpi):
    """FILE.png and FILE.svg, within a matplotlib.rc_context(STYLE)."""
    figure.savefig(f"{file}.png", dpi=dpi)
    unsaid = dict.fromkeys(["Date", "Creator", "Format", "Type"])  # the same bytes every time
    figure.savefig(svg := Path(f"{file}.svg"), metadata=unsaid)
    # two decimals, and a path on one line: half the size
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", svg.read_text())
    svg.write_text(re.sub(r" ?\n(?=[LQCz])", " ", text).replace(' \n"', '"'))


def subtitle(points):
    """What the band is, and n."""
    n = sorted({p["problems"] for p in points if p.get("problems")})
    if not n:
        return "as train.py logged it; no interval"
    runs = max(len(str(p.get("each run", "")).split()) for p in points)
    count = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    return f"band: 95 % interval over n = {count} problems" + (
        f" and {runs} training runs" if runs else "")


def draw_line(ax, line, points, colour):
    """One line with its band, and what is to be said at its points: a PRM, a beam's width."""
    keys = ("x", "value", "low", "high")
    x, value, low, high = zip(*(map(p.get, keys) for p in points))
    dashed = DASHED.search(line)
    rules = {", weighted": "-.", ", until": ":"}  # one strategy, one colour; dashed has no PRM
    plain = next((style for rule, style in rules.items() if rule in line), "-")
    style = {"color": colour, "linestyle": "--" if dashed else plain}
    if dashed and len(set(value)) == 1:  # a level, with no points to be read off
        ax.axhline(value[0], **style)
    else:
        ax.plot(x, value, marker="o", **style)
    if high != low:
        ax.fill_between(x, low, high, alpha=0.12, color=colour, linewidth=0)
    for p in points:
        if text := p.get("width") or ("" if " of " in line else p.get("prm")):
            ax.annotate(text, (p["x"], p["value"]), (0, 9), textcoords="offset points",
                        ha="center", color=colour, size=13)


def scale_x(ax, scale, x):
    """Ticks to be read: 1 2 4 8 16 for powers, 1 3 10 for decades; 0 has a place of its own."""
    from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator
    if scale == "linear":
        return ax.set_xticks(sorted(set(x)))
    if scale == "powers":
        ax.set_xscale("symlog", base=2, linthresh=1)  # as log from 1 on, and with a place for 0
        ticks = [2 ** i for i in range(40) if min(x) * 0.99 <= 2 ** i <= max(x) * 1.01]
        ticks = ticks[::2] if len(ticks) > 7 else ticks
        ax.xaxis.set_major_locator(FixedLocator([0, *ticks] if min(x) < 1 else ticks))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    else:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}") if max(x) > 1e4 else
                                     FuncFormatter(lambda tick, _: f"{tick:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def spread(heights, gap, high):
    """Heights in ascending order -> the same, at least a gap apart and none above high."""
    heights = list(heights)
    for i in range(1, len(heights)):  # up from the lowest,
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], high)
    for i in reversed(range(len(heights) - 1)):  # and down again from the top
        heights[i] = min(heights[i], heights[i + 1] - gap)
    return heights


def name_lines(ax, lines, others):
    """Each line's name right of the axes at the height of its end, pushed apart where they meet."""
    low, high = ax.get_ylim()
    last = {line: max(points, key=lambda p: p["x"]) for line, points in lines.items()}
    ends = sorted((p["value"], p["x"], line) for line, p in last.items())
    # a line of text is 0.062 of the axes high
    heights = spread([y for y, _, _ in ends], 0.062 * (high - low), high)
    for (y, x, line), height in zip(ends, heights):
        tint = colour(line, others)
        text = line.replace(", corrected", "").replace(", not corrected", " (not)")
        ax.annotate(text, (x, y), (1.03, height), textcoords=ax.get_yaxis_transform(),
                    va="center", color=tint,
                    arrowprops={"arrowstyle": "-", "color": tint, "alpha": 0.4, "shrinkA": 1})
