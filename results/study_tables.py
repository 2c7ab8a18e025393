"""results/study_tables.py -- the tables of the first study, from its packed records.

    python results/study.py --tables             write them into results/study/README.md, behind their marks:

    <!-- study: phase -->
    | learning rate | closing | collapsed (step) | ...

tests/test_results.py makes each of them again, and compares.

    1. numbers    of one run (`records`), of a recipe's seeds (`ends`), of two recipes compared
    2. cells      numbers as text
    3. tables     one function each
"""
import functools
import itertools
import json
import re
import statistics
from pathlib import Path

import numpy as np

from analyze_tokens import collapse, mean, smooth
from rl_step import PRESSURES
from rollout import STATES, is_clean
from study import DATA, FAST, RECIPES, STUDY

MAIN = ("none", "strict", "sft", "sft_then_rl", "ops", "hbg", "hbg_hint_kept", "ets", "ets_sft_lr5e-5",
        "ets_sft_lr2e-3", "prs", "ets_more_rows", "adaptive", "random_time", "ets_sync")
FASTS = tuple(name for name in RECIPES if name.startswith("fast"))
SLOWS = tuple(name for name in RECIPES if name.startswith("slow"))
CAUSES = ("random_reward", "shuffled_reward", "mask_control", "negative_only", "positive_only", *FASTS)
MALFORMED = tuple(f"state/{s}" for s in STATES if not is_clean([s]))
SOLVED = "final/average"                         # share of the test tasks at the end, greedy
TRAINED, OTHER = "final/average_clean", "final/format_ood_clean"     # ... every message clean; per syntax

# ------------------------------------------------------------------------------------------------------------
# 1. Numbers


def seeds(name):
    return [s for s in range(RECIPES[name].seeds) if STUDY.packed(name, s).exists()]


@functools.cache
def runs(name):
    """-> [records of each packed seed]"""
    return STUDY.records(name)


def late(records, *columns, n=10):
    """Mean over the last n records that have the columns, of their sum; None if there are none"""
    found = [sum(r[c] for c in columns) for r in records if columns[0] in r][-n:]
    return mean(found) if found else None


def ends(name, *columns):
    """-> `late` of each seed"""
    return [late(records, *columns) for records in runs(name)]


def start(column):
    """"final/average" -> that score of the model that every run starts from"""
    return json.loads((DATA / "base.json").read_text())[column.removeprefix("final/")]


def supervised(name, records):
    """Rows of supervision that the run has trained: by cross-entropy, or as the ground truth of ops"""
    in_groups = 0
    if "--signal ops" in RECIPES[name].flags:    # one rollout of each of 12 groups
        in_groups = 12 * sum("reward" in r for r in records)
    return sum(r.get("sft_visits", 0) for r in records) + in_groups


def peak(records, column):
    """-> the step of the highest 5-step mean, and that mean"""
    steps, values = smooth(records, column)
    return steps[values.index(max(values))], max(values)


def fall(records, end=10):
    """The step from which the clean reward stays below half of its peak, if it is there for `end` steps"""
    found = collapse(records, name="reward_clean", share=0.5)
    rolled = [r["step"] for r in records if "reward" in r]
    return found["step"] if found and found["step"] <= rolled[-end] else None


def rings(records, column, factor):
    """The step of the first probe above factor x the value at the start, or None. A metric of every step
    counts with its mean since the last probe. (The fastest alarm that there can be: the one of `adaptive`
    took three probes as baseline, and two in a row.)"""
    first, since = None, []
    for r in records:
        if "p/open|text" in r:                   # a probe: before the training of its step
            values = [r[column]] if column.startswith("p/") else since
            if values and first is None:
                first = mean(values)
            elif values and mean(values) > factor * first:
                return r["step"]
            since = []
        since += [r[column]] if column in r else []


def heard(done, column, factor):
    """-> leads (steps from the first ring to the fall) of the announced falls; rings without a fall"""
    leads, false = [], 0
    for records in done:
        fell, rang = fall(records), rings(records, column, factor)
        if rang is not None and fell is None:
            false += 1
        elif rang is not None and rang <= fell:
            leads.append(fell - rang)
    return leads, false


def untreated(fast):
    """-> the runs without a signal, at the large rate, 1e-3, or at the moderate ones, 2e-4 and 5e-4"""
    names = [name for name, recipe in RECIPES.items()
             if "--signal" not in recipe.flags and (FAST in recipe.flags) == fast]
    return [records for name in names for records in runs(name)]


T95 = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}     # Student's t, by degrees of freedom


def welch(a, b):
    """Difference of the means of two lists of seeds, and half the width of its 95 % interval (Welch's t; a
    bootstrap over three to five seeds would be too narrow: its 95 % cover 84 to 86 %)"""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (va + vb) ** 2 / max(va**2 / (len(a) - 1) + vb**2 / (len(b) - 1), 1e-12)
    return np.mean(a) - np.mean(b), T95[max(2, min(8, int(freedom)))] * (va + vb) ** 0.5


def permutation(a, b):
    """Exact two-sided p of the difference of means: of all ways to split the seeds, how many differ so?"""
    both, observed = np.array([*a, *b]), abs(np.mean(a) - np.mean(b))
    firsts = [both[list(pick)].sum() for pick in itertools.combinations(range(len(both)), len(a))]
    differences = [abs(first / len(a) - (both.sum() - first) / len(b)) for first in firsts]
    return np.mean([d >= observed - 1e-12 for d in differences])


# ------------------------------------------------------------------------------------------------------------
# 2. Cells


def markdown(header, rows):
    """"run | reward", [["a", 0.42], ["b", None]]
    -> "| run | reward |\\n|---|---|\\n| a | 0.42 |\\n| b | |" """
    lines = [f"| {header} |", "|---" * (header.count("|") + 1) + "|"]
    for cells in rows:
        lines.append("|" + "".join(" |" if cell is None else f" {cell} |" for cell in cells))
    return "\n".join(lines)


def code(text):
    """"p/open|text" -> "`p/open\\|text`" """
    return "`" + text.replace("|", "\\|") + "`"


def spread(values, digits=2):
    """[.3, .1, .2] -> "0.20 (0.10 to 0.30)": the mean over seeds, and the lowest and highest seed"""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def percent(values, digits=0):
    return spread([100 * v for v in values if v is not None], digits)


def falls(done, share=0.1, name="reward_clean"):
    """"2 of 5 (41, 77)": runs whose clean reward fell below `share` of its peak for good, and when"""
    found = [collapse(records, name=name, share=share) for records in done]
    steps = [str(one["step"]) for one in found if one]
    return f"{len(steps)} of {len(done)}" + (f" ({', '.join(steps)})" if steps else "")


def points(a, b):
    """Two lists of seeds -> "+5 (-18 to +28)": the difference of their means in points, its 95 % interval"""
    difference, half = (100 * x for x in welch(a, b))
    return f"{difference:+.0f} ({difference - half:+.0f} to {difference + half:+.0f})"


# ------------------------------------------------------------------------------------------------------------
# 3. Tables


def recipes_table():
    """Recipe -> what it adds to `python train.py`, and how many seeds of it were run"""
    rows = []
    for name, recipe in RECIPES.items():
        rows.append([code(name), code(recipe.flags) if recipe.flags else "", len(seeds(name))])
    return markdown("recipe | flags | seeds", rows)


def recipe_table(names, with_base=True):
    """One line per recipe: mean over seeds (lowest to highest seed); rewards and messages of the last 10 RL
    steps, sampled; test tasks at the end, greedy"""
    scores, rows = (SOLVED, TRAINED, OTHER), []
    if with_base:
        before = [f"{100 * start(score):.0f}" for score in scores]
        rows.append(["the base", *[None] * 4, *before, *[None] * 4])
    for name in [name for name in names if runs(name)]:
        done, fell = runs(name), ["–"] * 3
        if late(done[0], "reward") is not None:
            fell = [falls(done, name="reward"), falls(done), falls(done, share=0.5)]
        solved = [percent(ends(name, score)) for score in scores]
        rows.append([code(name), len(done), spread(ends(name, "reward")), spread(ends(name, "reward_clean")),
                     percent(ends(name, *MALFORMED)), *solved, *fell,
                     f"{mean(supervised(name, records) for records in done):.0f}"])
    return markdown("recipe | seeds | task reward | clean reward | malformed messages, % | test tasks, % | "
                    "... clean, % | other syntax, clean, % | task reward fell to 10 % | "
                    "clean reward fell to 10 % | ... to 50 % | supervised rows", rows)


def phase_table():
    """Did it collapse? Over learning rate x closing rule x seed"""
    rows = [["the base", *[None] * 4, *(f"{100 * start(score):.0f}" for score in (TRAINED, OTHER))]]
    for rate, closing, name in (("2e-4", "lenient", "slow"), ("2e-4", "strict", "slow_strict"),
                                ("5e-4", "lenient", "none"), ("5e-4", "strict", "strict"),
                                ("1e-3", "lenient", "fast"), ("1e-3", "strict", "fast_strict")):
        shares = [percent(ends(name, *columns)) for columns in (MALFORMED, [TRAINED], [OTHER])]
        rows.append([rate, closing, falls(runs(name)), falls(runs(name), name="reward"), *shares])
    return markdown("learning rate | closing | collapsed (step) | ... by the task reward | "
                    "malformed messages, % | test tasks, clean, % | other syntax, clean, %", rows)


def alarm_table():
    """Runs that nothing treats: did the clean reward halve for good (the fall)? Did the alarm ring first?"""
    groups, rows = {"moderate rate": untreated(fast=False), "large rate": untreated(fast=True)}, []
    pairs = list(itertools.product((2, 3, 5), groups))
    for column in ("p/open|text", "p/open|off", "p/end|off", "p/close|off", "p/json|in_text",
                   "state/polluted", "entropy", "kl_sampler", "grad_norm"):
        cells = [code(column)]
        for factor, rate in pairs:
            leads, false = heard(groups[rate], column, factor)
            fell = sum(fall(records) is not None for records in groups[rate])
            lead = f" ({statistics.median(leads):.0f})" if leads else ""
            cells.append(f"{len(leads)} of {fell}{lead}; {false} of {len(groups[rate]) - fell}")
        rows.append(cells)
    return markdown(" | ".join(["metric", *(f"{factor} x, {rate}" for factor, rate in pairs)]), rows)


def crossing_table():
    """Does a recipe trade the other syntax for the trained one? Change of greedy clean scores from start to
    end, in points, and its difference to `none`, with the 95 % interval over seeds"""
    rows = []
    for name in [name for name in MAIN if len(runs(name)) > 1]:
        changes, against = [], []
        for score in (TRAINED, OTHER):
            changes.append(percent([end - start(score) for end in ends(name, score)]))
            against.append("–" if name == "none" else points(ends(name, score), ends("none", score)))
        rows.append([code(name), *changes, *against])
    return markdown("recipe | trained syntax | other syntax | trained, difference to `none` | "
                    "other, difference to `none`", rows)


DIRTY, CLEAN, CROSSED = "malformed messages at the end", "test tasks, clean", "other syntax, clean"
COLUMNS = {DIRTY: MALFORMED, CLEAN: [TRAINED], CROSSED: [OTHER]}
COMPARISONS = (                                  # question, recipes, the one that they are compared with
    (DIRTY, ("strict", "positive_only", "slow"), "none"),
    (CROSSED, ("slow",), "none"),
    (CLEAN, ("slow", "strict", "positive_only", "ops", "prs", "ets_more_rows"), "none"),
    (CLEAN, ("ets_more_rows",), "ets"),
    (CLEAN, ("ets_sft_lr2e-3",), "ets_sft_lr5e-5"),
    (CLEAN, ("adaptive",), "random_time"),
    (CLEAN, ("hbg_hint_kept",), "hbg"),
    (CLEAN, SLOWS[1:], "slow"),
)


def evidence_table():
    """The comparisons that the text leans on"""
    rows = []
    for question, names, other in COMPARISONS:
        for one in names:
            a, b = ends(one, *COLUMNS[question]), ends(other, *COLUMNS[question])
            if min(len(a), len(b)) > 1:
                answer = f"{points(a, b)}, p = {permutation(a, b):.2f}"
                rows.append([f"{question}: `{one}` - `{other}`", answer])
    done = [records for name in MAIN if name != "sft" for records in runs(name)]
    together = np.corrcoef([late(r, TRAINED) for r in done], [late(r, OTHER) for r in done])[0, 1]
    rows.append(["trained against other syntax at the end, clean: correlation over all "
                 f"{len(done)} RL runs", f"{together:+.2f}"])
    for column, syntax in (("eval/average_clean", "trained"), ("eval/format_ood", "other")):
        worse = 0
        for records in done:
            values = [r[column] for r in records if r["step"] >= 50 and column in r]
            worse += values[-1] < values[0]
        rows.append([f"RL runs whose {syntax} syntax is worse at the end than at step 50",
                     f"{worse} of {len(done)}"])
    return markdown("question | answer", rows)


def story_table():
    """One line per run that collapsed: how fast, in which order, and what the messages had become"""
    rows = []
    for name in RECIPES:
        for seed, records in zip(seeds(name), runs(name)):
            if found := collapse(records, name="reward_clean"):
                rows.append([f"{name}-seed{seed}", *story(records, found)])
    return markdown("run | 80 % of the clean reward's peak to 10 %, steps | polluted: highest, step | "
                    "collapsed: highest, step | P(`<tool_call>` where text should begin): first, highest | "
                    "messages of the last 5 steps, %", rows)


def story(records, found):
    """-> cells; found: what `collapse` says"""
    steps, values = smooth(records, "reward_clean")
    high = [s for s, v in zip(steps, values) if v >= 0.8 * found["peak"] and s < found["step"]]
    cells = [found["step"] - max(high)]
    for column in ("state/polluted", "state/collapsed"):
        step, share = peak(records, column)
        cells.append(f"{share:.2f}, {step}")
    opens = [r["p/open|text"] for r in records if "p/open|text" in r]
    after = [f"{state} {100 * share:.0f}" for state, share in found["after"].items() if share >= 0.01]
    return [*cells, f"{opens[0]:.3f}, {max(opens):.3f}", ", ".join(after)]


def pressure_table():
    """Who pushes the logit of the open tag and of the end token? Per RL step and 1,000 trained tokens"""
    rows = []
    for name in ("none", "strict", "slow", "fast", "fast_random_reward", "fast_shuffled_reward",
                 "fast_negative_only", "fast_positive_only", "fast_mask_control"):
        for token in ("open", "end"):
            parts = []
            for part in PRESSURES:
                over_time = [late(records, f"push/{token}|{part}", n=len(records)) for records in runs(name)]
                parts.append(1000 * mean(over_time))
            rows.append([name, token, *(f"{push:+.2f}" for push in (*parts, sum(parts)))])
    return markdown("recipe | token | sampled in a clean message | sampled in a malformed one | "
                    "others, A > 0 | others, A < 0 | sum", rows)


SHORT = ("task reward, greedy", "clean reward, greedy", "clean reward in syntax B",
         "syntax A, calls right from the open tag", "syntax B, calls right from the open tag",
         "model, control tokens", "base, control tokens", "model, JSON", "base, JSON", "after 4 SFT steps",
         "after 16 SFT steps")


def autopsy_table(short=False, file=DATA / "autopsy.json"):
    """What autopsy.py --json has written -> one column per checkpoint, base first"""
    reports = json.loads(file.read_text())
    reports = {Path(run).name: report for run, report in reports.items()}
    if short:
        reports.pop("fast-seed0", None)          # nothing of it is left that could be told apart
    first, rows = next(iter(reports.values())), []
    for line in first:
        left_out = short and ("only" in line or not any(part in line for part in SHORT))
        if line.startswith("base: ") or line == "risers" or left_out:
            continue
        plain = line.removeprefix("model: ")
        values = [first.get(f"base: {plain}"), *(report.get(line) for report in reports.values())]
        shown = plain.replace("<|im_end|>", "the end token")     # Markdown eats it, and bare tags
        rows.append([re.sub(r"</?tool_call>", r"`\g<0>`", shown),
                     *("" if value is None else f"{value:.2f}" for value in values)])
    if not short:
        cells = ["what rose most where it does not belong, mean probability", None]
        for report in reports.values():
            risen = [f"`{token!r}` {after:.3f}" for token, _, after in report["risers"][:3]]
            cells.append(", ".join(risen))
        rows.append(cells)
    return markdown(" | ".join(["| base", *reports]), rows)


TABLES = {"recipes": recipes_table, "crossing": crossing_table, "story": story_table,
          "pressure": pressure_table, "evidence": evidence_table, "autopsy": autopsy_table,
          "phase": phase_table, "alarm": alarm_table,
          "autopsy_short": functools.partial(autopsy_table, short=True),
          "main": functools.partial(recipe_table, MAIN), "slow": functools.partial(recipe_table, SLOWS),
          "causes": functools.partial(recipe_table, CAUSES, with_base=False)}
PAGES = (DATA / "README.md",)


def marked(study):
    """-> what finds the tables of a page behind <!-- STUDY: NAME -->; groups: its name, its lines"""
    return re.compile(rf"(?<=<!-- {study}: )(\S+) -->\n((?:\|[^\n]*(?:\n(?=\|))?)*)")


def rewrite(pages, found, tables):
    for page in pages:
        page.write_text(found.sub(lambda m: f"{m[1]} -->\n{tables[m[1]]()}", page.read_text()))


MARKED = marked("study")
