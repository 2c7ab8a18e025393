"""results/study.py -- every run behind README's "What we found": one command, resumable, cheapest question first.

    python results/study.py                      run what is missing (hours on two cores), then pack the rows
    python results/study.py --list               what there is to run, and what is done
    python results/study.py --only none ets      some recipes
    python results/study.py --tables             the tables of the two READMEs again, from the packed rows alone

Each run is one `train.py` command line: COMMON plus a line of RECIPES plus --seed. Runs live under runs/study/ and continue
where they were interrupted. A finished run is evaluated once more, under the same rule whatever it was trained with (columns
final/*); then its rows are packed into results/study/RECIPE-seedN.csv, all rows, rounded to four digits, without the columns
that no table or picture uses.
"""
import argparse
import csv
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from analyze_tokens import Alarm, collapse, mean, pyplot, read_rows, smooth  # noqa: E402
import train  # noqa: E402
from rl_step import PRESSURES  # noqa: E402
from tools import STATES  # noqa: E402

COMMON = "--lr 5e-4 --steps 100 --eval_every 50 --save_every 25 --keep -1"      # train.py's defaults, but for the last three
SLOW, FAST = "--lr 2e-4", "--lr 1e-3 --steps 60"
RECIPES = {                                      # name: (flags, seeds); a later flag overrides COMMON's
    # the paper's comparison, and ours
    "none": ("", 5),
    "strict": ("--closing strict", 5),
    "sft": ("--signal sft --schedule sft", 5),
    "sft_then_rl": ("--signal sft --schedule sft_then_rl", 5),
    "ops": ("--signal ops", 5),
    "hbg": ("--signal hbg", 5),
    "ets": ("--signal ets --schedule interleaved", 5),
    "prs": ("--signal prs --schedule interleaved", 5),
    "adaptive": ("--signal ets --schedule adaptive --sft_budget 256", 5),         # about as many rows as ets trains
    "random_time": ("--signal ets --schedule adaptive --sft_budget 256 --trigger random", 5),
    "ets_sync": ("--signal ets --schedule synchronous --sft_batch 16", 3),
    # which cause? at twice the learning rate, where every seed collapses within 60 steps; one thing changed in `fast`
    "fast": (FAST, 5),
    "fast_strict": (FAST + " --closing strict", 5),
    "fast_random_reward": (FAST + " --reward random", 3),
    "fast_shuffled_reward": (FAST + " --reward shuffled", 3),
    "fast_format_reward": (FAST + " --reward format", 3),
    "fast_positive_only": (FAST + " --only positive", 3),
    "fast_negative_only": (FAST + " --only negative", 3),
    "fast_mask_control": (FAST + " --mask_control", 3),
    "fast_one_update": (FAST + " --updates 1", 3),
    "fast_kl": (FAST + " --kl_weight 0.01", 3),
    "fast_ets": (FAST + " --signal ets --schedule interleaved", 3),
    "fast_adaptive": (FAST + " --signal ets --schedule adaptive --sft_budget 256", 3),
    "fast_ets_sync": (FAST + " --signal ets --schedule synchronous --sft_batch 16", 3),
    # the paper's side questions, and controls, at the main rate
    "positive_only": ("--only positive", 5),
    "negative_only": ("--only negative", 3),
    "random_reward": ("--reward random", 3),
    "mask_control": ("--mask_control", 3),
    "shuffled_reward": ("--reward shuffled", 3),
    "ets_more_rows": ("--signal ets --schedule interleaved --sft_epochs 8", 3),     # about as many rows as prs trains
    "hbg_hint_kept": ("--signal hbg --hint_in_update", 3),
    "retokenize": ("--retokenize", 3),
    "ets_sft_lr5e-5": ("--signal ets --schedule interleaved --sft_lr 5e-5", 3),
    "ets_sft_lr2e-3": ("--signal ets --schedule interleaved --sft_lr 2e-3", 3),
    # at less than half of the main rate, where vanilla GRPO turned out to live: does anything break it, does anything add to it?
    "slow": (SLOW, 5),
    "slow_strict": (SLOW + " --closing strict", 3),
    "slow_shuffled_reward": (SLOW + " --reward shuffled", 3),
    "slow_negative_only": (SLOW + " --only negative", 3),
    "slow_mask_control": (SLOW + " --mask_control", 3),
    "slow_sft_then_rl": (SLOW + " --signal sft --schedule sft_then_rl", 3),
    "slow_ops": (SLOW + " --signal ops", 3),
    "slow_hbg": (SLOW + " --signal hbg", 3),
    "slow_ets": (SLOW + " --signal ets --schedule interleaved", 3),
    "slow_prs": (SLOW + " --signal prs --schedule interleaved", 3),
}
KEEP = ("step", "phase", "reward", "mixed_groups", "state/", "entropy", "kl_", "grad_norm", "push/", "p/", "alarm", "eval/", "final/",
        "sft_visits", "sft_updates", "sft_loss", "skipped_updates", "hint_log_ratio", "messages", "no_call")
FINAL = "--eval_only --closing lenient"


def flags_of(name, seed, out):
    return [*COMMON.split(), *RECIPES[name][0].split(), "--seed", str(seed), "--threads", "1", "--out", str(out)]


def finished(out):
    """Has the run written its last checkpoint?"""
    latest, config = Path(out) / "checkpoints" / "latest", Path(out) / "config.json"
    if not latest.exists():
        return False
    last = train.total_steps(argparse.Namespace(**json.loads(config.read_text())))
    return latest.read_text().strip() == f"step-{last}"


def pack(out, path, final=None):
    """runs/study/none-seed0 -> results/study/none-seed0.csv: one line per step, probe, evaluation and training merged"""
    steps = {}
    for row in read_rows(out):
        steps.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k.startswith(KEEP)})
    steps[max(steps)] |= {f"final/{k}": v for k, v in (final or {}).items()}
    columns = list(dict.fromkeys(k for row in steps.values() for k in row))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in steps.values())


def work(names, seeds):
    """[(recipe, seed)]: three seeds of everything first, so that an interrupted study is balanced"""
    jobs = [(name, seed) for name in names for seed in range(RECIPES[name][1]) if seeds is None or seed in seeds]
    return sorted(jobs, key=lambda job: job[1] >= 3)


def call(log, *argv):
    with open(log, "a") as f:
        return subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], stdout=f, stderr=f,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def make_base():
    """Pre-train and evaluate the model that every run starts from, if that is not done -> did it work?"""
    packed = HERE / "study" / "base.json"
    if Path(train.tiny_folder(train.parse_args([]))).exists() and packed.exists():
        return True
    if call("runs/study/base.log", *FINAL.split(), "--threads", "1", "--out", "runs/study/base"):
        return False
    if not packed.exists():
        packed.write_text(Path("runs/study/base/eval.json").read_text())
    return True


def run_one(name, seed):
    """Train, evaluate, pack; whatever of it is not done yet. -> None, or what went wrong"""
    out, packed = Path("runs/study") / f"{name}-seed{seed}", HERE / "study" / f"{name}-seed{seed}.csv"
    if packed.exists():
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    status = 0 if finished(out) else call(f"{out}.log", *flags_of(name, seed, out), *(["--resume"] if out.exists() else []))
    if status == 0 and not (out / "eval.json").exists():
        status = call(f"{out}.log", *FINAL.split(), "--threads", "1", "--model", str(out), "--out", str(out))
    if status:
        return f"{name}-seed{seed} failed with status {status}; see {out}.log"
    pack(out, packed, json.loads((out / "eval.json").read_text()))


# ----------------------------------------------------------------------------------------------------------------------
# Tables: from the packed rows alone. tests/test_results.py makes them again and compares them with README.
MAIN = ("none", "strict", "sft", "sft_then_rl", "ops", "hbg", "hbg_hint_kept", "ets", "ets_sft_lr5e-5", "ets_sft_lr2e-3", "prs",
        "ets_more_rows", "adaptive", "random_time", "ets_sync", "retokenize")
SLOWS = tuple(name for name in RECIPES if name.startswith("slow"))
CAUSES = ("random_reward", "shuffled_reward", "mask_control", "negative_only", "positive_only",
          *(name for name in RECIPES if name.startswith("fast")))
DETECTORS = ("p/open|text", "p/open|off", "p/end|off", "p/close|off", "p/json|in_text", "state/polluted", "entropy", "kl_sampler",
             "grad_norm")
MALFORMED = tuple(f"state/{s}" for s in STATES if s not in ("call", "reply"))


def runs(name):
    """-> [rows of each seed] of what is packed"""
    return [read_rows(HERE / "study" / f"{name}-seed{seed}.csv") for seed in seeds(name)]


def seeds(name):
    return [s for s in range(RECIPES[name][1]) if (HERE / "study" / f"{name}-seed{s}.csv").exists()]


def late(rows, *names, n=10):
    """Mean over the last n RL steps (of the sum of the metrics)"""
    rows = [r for r in rows if names[0] in r][-n:]
    return mean(sum(r[name] for name in names) for r in rows) if rows else None


def spread(values, digits=2):
    """[.3, .1, .2] -> ".20 (.10 to .30)": the mean over seeds, and the lowest and highest seed"""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def percent(values):
    return spread([100 * v for v in values], 0)


def final(rows, name):
    return rows[-1][f"final/{name}"]


def base_score(name):
    """The same evaluation of the model that every run starts from"""
    return json.loads((HERE / "study" / "base.json").read_text())[name]


def falls(done, name, share=0.1):
    """"2 of 5 (41, 77)": runs whose 5-step mean fell below `share` of its peak for good, and when"""
    steps = [found["step"] for rows in done if (found := collapse(rows, name=name, share=share))]
    return f"{len(steps)} of {len(done)}" + (f" ({', '.join(map(str, steps))})" if steps else "")


def supervised(name, rows):
    """Rows of supervision that the run has trained on: by cross-entropy, or as ground truth in the groups of ops"""
    a = train.parse_args(RECIPES[name][0].split())
    steps = sum("reward" in r for r in rows)
    return sum(r.get("sft_visits", 0) for r in rows) + steps * a.prompts * a.ops_k * (a.signal == "ops")


def recipe_table(names):
    """One line per recipe: mean over seeds (lowest to highest seed); rewards and messages of the last 10 RL steps, sampled; test
    tasks at the end, greedy"""
    lines = ["| recipe | seeds | task reward | clean reward | malformed messages, % | test tasks, % | ... clean, % | "
             "other syntax, clean, % | clean reward fell to 10 % | ... to 50 % | supervised rows |", "|---" * 11 + "|"]
    if names in (MAIN, SLOWS):
        scores = [f"{100 * base_score(score):.0f}" for score in ("average", "average_clean", "format_ood_clean")]
        lines.append(f"| the base | | | | | {' | '.join(scores)} | | | |")
    for name in names:
        if not (done := runs(name)):
            continue
        rl = [rows for rows in done if any("reward" in r for r in rows)]
        lines.append(" | ".join([
            f"| `{name}`", str(len(done)), spread([late(r, "reward") for r in rl]), spread([late(r, "reward_clean") for r in rl]),
            percent([late(r, *MALFORMED) for r in rl]),
            *(percent([final(r, score) for r in done]) for score in ("average", "average_clean", "format_ood_clean")),
            *(falls(rl, "reward_clean", share) if rl else "–" for share in (0.1, 0.5)),
            f"{mean(supervised(name, rows) for rows in done):.0f} |"]))
    return "\n".join(lines)


def phase_table():
    """collapse yes/no over learning rate x closing rule x seed"""
    lines = ["| learning rate | closing | collapsed (step) | malformed messages, % | test tasks, clean, % | other syntax, clean, % |",
             "|---" * 6 + "|", "| the base | | | | " + " | ".join(
                 f"{100 * base_score(score):.0f}" for score in ("average_clean", "format_ood_clean")) + " |"]
    for lr, lenient, strict in (("2e-4", "slow", "slow_strict"), ("5e-4", "none", "strict"), ("1e-3", "fast", "fast_strict")):
        for closing, recipe in (("lenient", lenient), ("strict", strict)):
            done = runs(recipe)
            lines.append(f"| {lr} | {closing} | {falls(done, 'reward_clean')} | {percent([late(r, *MALFORMED) for r in done])} | "
                         + " | ".join(percent([final(r, score) for r in done]) for score in ("average_clean", "format_ood_clean")) + " |")
    return "\n".join(lines)


def series(rows, name):
    """[(step, value)] of a detector at the probes' steps; a metric of every step is averaged over the steps since the last probe"""
    probes = [r["step"] for r in rows if "p/open|text" in r]
    if name.startswith("p/"):
        return [(r["step"], r[name]) for r in rows if name in r]
    return [(b, mean(v)) for a, b in zip(probes, probes[1:]) if (v := [r[name] for r in rows if name in r and a <= r["step"] < b])]


def rings(rows, name, factor):
    """The step of the first probe at which the metric is above factor x its value at the start, or None. (The fastest alarm that
    there can be. The one that train.py uses for its bursts, three probes as baseline and two in a row, is slower.)"""
    alarm = Alarm(factor, checks=1, baseline=1)
    return next((step for step, value in series(rows, name) if alarm.update(value)), None)


ALARM_RUNS = tuple(name for name, (flags, _) in RECIPES.items() if "--signal" not in flags)      # nothing treats the patient


def alarm_runs():
    """-> {"moderate rate": runs at 2e-4 and 5e-4, "large rate": runs at 1e-3}"""
    return {rate: [rows for name in ALARM_RUNS if (FAST in RECIPES[name][0]) == (rate == "large rate") for rows in runs(name)]
            for rate in ("moderate rate", "large rate")}


def fall(rows, end=10):
    """The step from which the clean reward stays below half of its peak, if that is seen for at least `end` RL steps"""
    found = collapse(rows, name="reward_clean", share=0.5)
    rolled = [r["step"] for r in rows if "reward" in r]
    return found["step"] if found and found["step"] <= rolled[-end] else None


def heard(done, name, factor):
    """Runs -> leads (steps from the first ring to the fall) of the falls that were announced, runs that rang without a fall"""
    pairs = [(fall(rows), rings(rows, name, factor)) for rows in done]
    return [e - r for e, r in pairs if e is not None and r is not None and r <= e], sum(e is None and r is not None for e, r in pairs)


def alarm_table(factors=(2, 3, 5)):
    """All runs that nothing treats: did the clean reward halve for good (the fall)? Did the alarm ring before?"""
    lines = ["| metric | " + " | ".join(f"{f} x, {rate}" for f in factors for rate in alarm_runs()) + " |",
             "|---" * (1 + 2 * len(factors)) + "|"]
    for name in DETECTORS:
        cells = []
        for factor in factors:
            for done in alarm_runs().values():
                leads, false = heard(done, name, factor)
                n = sum(fall(rows) is not None for rows in done)
                cells.append(f"{len(leads)} of {n}{f' ({statistics.median(leads):.0f})' if leads else ''}; {false} of {len(done) - n}")
        lines.append(f"| {code(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def code(name):
    return "`" + name.replace("|", "\\|") + "`"


def change(rows, name):
    return final(rows, name) - base_score(name)


T95 = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}             # Student's t, by degrees of freedom


def welch(a, b):
    """Difference of the means of two lists of seeds, and half the width of its 95 % interval (Welch's t; a bootstrap over three
    to five seeds would be too narrow: its 95 % cover 84 to 86 %)"""
    va, vb = (np.var(x, ddof=1) / len(x) for x in (a, b))
    freedom = (va + vb) ** 2 / max(va**2 / (len(a) - 1) + vb**2 / (len(b) - 1), 1e-12)
    return np.mean(a) - np.mean(b), T95[max(2, min(8, int(freedom)))] * (va + vb) ** 0.5


def points(a, b):
    """Two lists of seeds -> "+5 (-18 to +28)": the difference of their means in points, with its 95 % interval"""
    difference, half = (100 * x for x in welch(a, b))
    return f"{difference:+.0f} ({difference - half:+.0f} to {difference + half:+.0f})"


def crossing_table(names=MAIN):
    """Does a recipe trade the other syntax for the trained one? Change of greedy clean scores from start to end, in points, and
    its difference to `none`, with the 95 % interval over seeds."""
    lines = ["| recipe | trained syntax | other syntax | trained, difference to `none` | other, difference to `none` |", "|---" * 5 + "|"]
    for name in names:
        if len(done := runs(name)) < 2:
            continue
        both = [[change(r, metric) for r in done] for metric in ("average_clean", "format_ood_clean")]
        plain = [[change(r, metric) for r in runs("none")] for metric in ("average_clean", "format_ood_clean")]
        cells = ["–", "–"] if name == "none" else [points(a, b) for a, b in zip(both, plain)]
        lines.append(f"| `{name}` | {' | '.join(map(percent, both))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def permutation(a, b):
    """Exact two-sided p of the difference of means: how many of all ways to split the seeds differ at least as much?"""
    both, observed = np.array([*a, *b]), abs(np.mean(a) - np.mean(b))
    splits = [both[list(pick)].sum() for pick in itertools.combinations(range(len(both)), len(a))]
    others = [abs(x / len(a) - (both.sum() - x) / len(b)) for x in splits]
    return np.mean([d >= observed - 1e-12 for d in others])


def evidence_table():
    """The comparisons that the text leans on"""
    score = lambda name, metric: [final(r, metric) for r in runs(name)]
    dirty = lambda name: [late(r, *MALFORMED) for r in runs(name)]
    rl = [name for name in MAIN if name != "sft" and runs(name)]
    ends = [(final(r, "average_clean"), final(r, "format_ood_clean")) for name in rl for r in runs(name)]
    middle = lambda m: [(next(r[m] for r in rows if r["step"] >= 50 and m in r), rows[-1][m]) for name in rl for rows in runs(name)]
    lines = ["| question | answer |", "|---|---|"]
    def line(question, a, b):
        lines.append(f"| {question} | {points(a, b)}, p = {permutation(a, b):.2f} |")
    for one in ("strict", "positive_only", "slow"):
        line(f"malformed messages at the end: `{one}` - `none`", dirty(one), dirty("none"))
    line("other syntax, clean: `slow` - `none`", score("slow", "format_ood_clean"), score("none", "format_ood_clean"))
    for one, other in (("slow", "none"), ("strict", "none"), ("positive_only", "none"), ("ops", "none"), ("prs", "none"),
                       ("ets_more_rows", "none"), ("ets_more_rows", "ets"), ("ets_sft_lr2e-3", "ets_sft_lr5e-5"),
                       ("adaptive", "random_time"), ("hbg_hint_kept", "hbg"), *((name, "slow") for name in SLOWS[1:])):
        if len(runs(one)) > 1 and len(runs(other)) > 1:
            line(f"test tasks, clean: `{one}` - `{other}`", score(one, "average_clean"), score(other, "average_clean"))
    together = np.corrcoef(*zip(*ends))[0, 1]
    lines.append(f"| trained against other syntax at the end, clean: correlation over all {len(ends)} RL runs | {together:+.2f} |")
    for m, what in (("eval/average_clean", "trained"), ("eval/format_ood", "other")):
        worse = sum(after < before for before, after in middle(m))
        lines.append(f"| RL runs whose {what} syntax is worse at the end than at step 50 | {worse} of {len(ends)} |")
    return "\n".join(lines)


def drop_steps(rows, name):
    """Steps from the last 5-step mean above 80 % of the peak to the first one that is below 10 % for good; None: no collapse"""
    if not (found := collapse(rows, name=name)):
        return None
    steps, values = smooth(rows, name)
    return found["step"] - max(s for s, v in zip(steps, values) if v >= 0.8 * found["peak"] and s < found["step"])


def peak_step(rows, name):
    steps, values = smooth(rows, name)
    return steps[values.index(max(values))], max(values)


def story_table():
    """One line per run that collapsed: how fast, in which order, and what the messages had become"""
    lines = ["| run | 80 % of the clean reward's peak to 10 %, steps | polluted: highest, step | collapsed: highest, step | "
             "P(`<tool_call>` where text should begin): first, highest | messages of the last 5 steps, % |", "|---" * 6 + "|"]
    for name in RECIPES:
        for seed, rows in zip(seeds(name), runs(name)):
            if not (found := collapse(rows, name="reward_clean")):
                continue
            (a, polluted), (b, collapsed) = peak_step(rows, "state/polluted"), peak_step(rows, "state/collapsed")
            opens = [r["p/open|text"] for r in rows if "p/open|text" in r]
            lines.append(f"| {name}-seed{seed} | {drop_steps(rows, 'reward_clean')} | {polluted:.2f}, {a} | {collapsed:.2f}, {b} | "
                         f"{opens[0]:.3f}, {max(opens):.3f} | "
                         + ", ".join(f"{s} {100 * v:.0f}" for s, v in found["after"].items() if v >= 0.01) + " |")
    return "\n".join(lines)


def pressure_table(names=("none", "strict", "slow", "fast", *(f"fast_{x}" for x in (
        "random_reward", "shuffled_reward", "negative_only", "positive_only", "mask_control"))), first=0):
    """Who pushes the logit of the open tag and of the end token? Per RL step (from `first` on) and 1,000 trained tokens"""
    lines = ["| recipe | token | sampled in a clean message | sampled in a malformed one | others, A > 0 | others, A < 0 | sum |",
             "|---" * 7 + "|"]
    for name in names:
        for token in ("open", "end"):
            done = [[r for r in rows if f"push/{token}|clean" in r and r["step"] >= first] for rows in runs(name)]
            if done:
                parts = [1000 * mean(mean(r[f"push/{token}|{part}"] for r in rows) for rows in done) for part in PRESSURES]
                lines.append(f"| {name} | {token} | " + " | ".join(f"{x:+.2f}" for x in (*parts, sum(parts))) + " |")
    return "\n".join(lines)


SHORT = ("task reward, greedy", "clean reward, greedy", "clean reward in syntax B", "syntax A, calls right from the open tag",
         "syntax B, calls right from the open tag", "model, control tokens", "base, control tokens", "model, JSON", "base, JSON",
         "after 4 SFT steps", "after 16 SFT steps")


def autopsy_table(short=False):
    """results/study/autopsy.json: {checkpoint: {line of the report: number}} -> one column per checkpoint, base first"""
    reports = {Path(k).name: v for k, v in json.loads((HERE / "study" / "autopsy.json").read_text()).items()}
    if short:
        reports.pop("fast-seed0")                # nothing of it is left that could be told apart
    first = next(iter(reports.values()))
    lines = ["| | base | " + " | ".join(reports) + " |", "|---" * (2 + len(reports)) + "|"]
    for name in first:
        if name.startswith("base: ") or name == "risers" or (short and ("only" in name or not any(part in name for part in SHORT))):
            continue
        plain = name.removeprefix("model: ")
        values = [first.get(f"base: {plain}"), *(report.get(name) for report in reports.values())]
        shown = re.sub(r"</?tool_call>", r"`\g<0>`", plain).replace("<|im_end|>", "the end token")      # Markdown eats both
        lines.append(f"| {shown} | " + " | ".join("" if v is None else f"{v:.2f}" for v in values) + " |")
    if not short:
        risen = [", ".join(f"`{token!r}` {after:.3f}" for token, _, after in report["risers"][:3]) for report in reports.values()]
        lines.append("| what rose most where it does not belong, mean probability | | " + " | ".join(risen) + " |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def pictures():
    plt, out = pyplot(), HERE / "study"
    aligned(plt, out / "aligned.png")
    bars(plt, out / "crossing.png")
    detectors(plt, out / "alarm.png")


def aligned(plt, png, names=("none", "fast")):
    """Every run whose clean reward halved for good, on one axis: steps from that fall"""
    done = [(rows, step) for name in names for rows in runs(name) if (step := fall(rows)) is not None]
    panels = {"reward_clean": "clean reward", "state/polluted": "polluted messages",
              "p/open|text": "P(<tool_call> where text\nshould begin)", "p/calls_exact": "ground-truth calls that are\nthe model's first choice"}
    fig, axes = plt.subplots(1, len(panels), figsize=(11, 2.6), sharex=True)
    for ax, (name, title) in zip(axes, panels.items()):
        curves = []
        for rows, zero in done:
            steps, values = smooth(rows, name, 1 if name.startswith("p/") else 5)
            ax.plot([x - zero for x in steps], values, color="#999999", lw=0.7)
            curves.append({round((x - zero) / 5): v for x, v in zip(steps, values)})
        common = [t for t in range(-12, 9) if sum(t in c for c in curves) >= max(2, len(curves) // 2)]
        ax.plot([5 * t for t in common], [mean(c[t] for c in curves if t in c) for t in common], "k-", lw=2)
        ax.axvline(0, color="black", ls=":")
        ax.set_xlim(-60, 40)
        ax.set_title(title)
        ax.set_xlabel("steps from the fall")
    axes[2].set_yscale("log")
    fig.suptitle(f"{len(done)} runs, aligned where the clean reward falls below half of its peak for good (grey: runs, black: mean)",
                 fontsize=8)
    fig.tight_layout()
    fig.savefig(png, dpi=110)
    plt.close(fig)


def bars(plt, png, names=("none", "strict", "sft", "sft_then_rl", "ops", "hbg", "ets", "prs", "slow", "slow_ops", "slow_hbg", "slow_ets",
                          "slow_prs")):
    """Trained and unseen syntax at the end, one pair of bars per recipe; whiskers: lowest and highest seed"""
    names = [n for n in names if runs(n)]
    fig, ax = plt.subplots(figsize=(10, 3))
    for k, (metric, label, colour, hatch) in enumerate((("average_clean", "trained syntax", "#1b5e9b", ""),
                                                        ("format_ood_clean", "other syntax", "#e8c48a", "///"))):
        values = [[100 * final(r, metric) for r in runs(n)] for n in names]
        middle = [mean(v) for v in values]
        ax.bar([i + 0.38 * k - 0.19 for i in range(len(names))], middle, 0.38, label=label, color=colour, hatch=hatch,
               edgecolor="black", lw=0.4, yerr=[[m - min(v) for m, v in zip(middle, values)], [max(v) - m for m, v in zip(middle, values)]], capsize=2,
               error_kw={"lw": 0.8})
        start = 100 * base_score(metric)
        ax.axhline(start, color="black", ls=("-", "--")[k], lw=0.8, label=f"... before training: {start:.0f} %")
    ax.set_xticks(range(len(names)), [f"{n}\n{len(runs(n))} seeds" for n in names])
    ax.set_ylabel("test tasks solved with\nclean messages, %, greedy")
    ax.legend(ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    fig.tight_layout()
    fig.savefig(png, dpi=110)
    plt.close(fig)


def detectors(plt, png, factors=(1.5, 2, 3, 5, 10, 20, 50)):
    """How many falls each metric announces (and how early), against how often it cries wolf, as its threshold moves"""
    done = [rows for group in alarm_runs().values() for rows in group]
    n = sum(fall(rows) is not None for rows in done)
    quiet = len(done) - n
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for name, style in zip(("p/open|text", "p/open|off", "p/json|in_text", "state/polluted", "entropy", "kl_sampler", "grad_norm"),
                           ("k-o", "k--s", "k:^", "-v", "--D", ":x", "-.+")):
        curve = [heard(done, name, factor) for factor in factors]
        left.plot([false / max(quiet, 1) for _, false in curve], [len(leads) / max(n, 1) for leads, _ in curve], style, ms=3, lw=1,
                  label=name)
        right.plot(factors, [statistics.median(leads) if leads else float("nan") for leads, _ in curve], style, ms=3, lw=1)
    left.set_xlabel(f"alarm without a fall (share of {quiet} runs)")
    left.set_ylabel(f"alarm before the fall (share of {n})")
    left.legend()
    right.set_xscale("log")
    right.set_xlabel("threshold, times the value at the start")
    right.set_ylabel("median lead, steps")
    fig.tight_layout()
    fig.savefig(png, dpi=110)
    plt.close(fig)


def recipes_table():
    """Recipe -> what it adds to `python train.py`, and how many seeds of it were run"""
    return "\n".join(["| recipe | flags | seeds |", "|---|---|---|", *(
        f"| `{name}` | {f'`{flags}`' if flags else ''} | {len(seeds(name))} |" for name, (flags, _) in RECIPES.items())])


TABLES = {"recipes": recipes_table, "crossing": crossing_table, "story": story_table, "pressure": pressure_table, "evidence": evidence_table,
          "autopsy": autopsy_table, "autopsy_short": lambda: autopsy_table(short=True),
          "main": lambda: recipe_table(MAIN), "causes": lambda: recipe_table(CAUSES), "slow": lambda: recipe_table(SLOWS), "phase": phase_table, "alarm": alarm_table}


PAGES = (ROOT / "README.md", HERE / "study" / "README.md")
MARKED = re.compile(r"(?<=<!-- study: )(\S+) -->\n(.*?)(?=\n\n|\Z)", re.S)      # tests/test_results.py compares each with its rows


def write():
    for page in PAGES:
        page.write_text(MARKED.sub(lambda m: f"{m[1]} -->\n{TABLES[m[1]]()}", page.read_text()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE", help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, help="default: all of the recipe's")
    p.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--list", action="store_true", help="show the command lines and what is done")
    p.add_argument("--pictures", action="store_true", help="draw results/study/*.png from the packed rows")
    p.add_argument("--tables", action="store_true", help="make the tables in README.md and results/study/README.md again, from the rows")
    a = p.parse_args()
    jobs = work(a.only, a.seeds)
    if a.tables:
        write()
    elif a.pictures:
        pictures()
    elif a.list:
        for name, seed in jobs:
            done = (HERE / "study" / f"{name}-seed{seed}.csv").exists()
            print("done   " if done else "missing", "python train.py", *flags_of(name, seed, f"runs/study/{name}-seed{seed}"))
    else:
        (HERE / "study").mkdir(exist_ok=True)
        Path("runs/study").mkdir(parents=True, exist_ok=True)
        if not make_base():                      # first: two runs at once must not both make it
            sys.exit("the base model cannot be made; see runs/study/base.log")
        failures = []
        with ThreadPoolExecutor(a.parallel) as pool:
            for failure in tqdm(pool.map(lambda job: run_one(*job), jobs), total=len(jobs), desc="study"):
                failures += [failure] if failure else []
        print("\n".join(failures) or "all runs are done")
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
