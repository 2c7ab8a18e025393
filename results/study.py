"""results/study.py -- every run behind README's "What we found": one command, resumable, cheapest question first.

    python results/study.py                      run what is missing (hours on two cores), then pack the rows
    python results/study.py --list               what there is to run, and what is done
    python results/study.py --only none ets      some recipes
    python results/study.py --tables             the tables of README, from the packed rows alone

Each run is one `train.py` command line: COMMON plus a line of RECIPES plus --seed. Runs live under runs/study/ and continue
where they were interrupted; a finished run's rows are packed into results/study/RECIPE-seedN.csv, all rows, rounded to four
digits, without the columns that no table or picture uses.
"""
import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from analyze_tokens import Alarm, collapse, mean, read_rows  # noqa: E402
from tools import STATES  # noqa: E402

COMMON = "--lr 5e-4 --steps 100 --eval_every 50 --save_every 25 --keep -1"
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
    "adaptive": ("--signal ets --schedule adaptive", 5),
    "random_time": ("--signal ets --schedule adaptive --trigger random", 5),
    "ets_sync": ("--signal ets --schedule synchronous --sft_batch 16", 3),
    # which cause? one thing changed in `none`
    "random_reward": ("--reward random", 3),
    "format_reward": ("--reward format", 3),
    "positive_only": ("--only positive", 3),
    "negative_only": ("--only negative", 3),
    "kl": ("--kl_weight 0.01", 3),
    "mask_control": ("--mask_control", 3),
    "retokenize": ("--retokenize", 3),
    "hbg_hint_kept": ("--signal hbg --hint_in_update", 3),
    # learning rates
    "none_lr2e-4": ("--lr 2e-4", 3),
    "strict_lr2e-4": ("--lr 2e-4 --closing strict", 3),
    "none_lr1e-3": ("--lr 1e-3", 5),
    "strict_lr1e-3": ("--lr 1e-3 --closing strict", 5),
    "ets_sft_lr5e-5": ("--signal ets --schedule interleaved --sft_lr 5e-5", 3),
    "ets_sft_lr2e-3": ("--signal ets --schedule interleaved --sft_lr 2e-3", 3),
}
KEEP = ("step", "phase", "reward", "reward_clean", "mixed_groups", "state/", "entropy", "kl_sampler", "kl_ref", "grad_norm", "push/",
        "p/", "alarm", "eval/", "sft_visits", "sft_updates", "skipped_updates", "hint_log_ratio", "messages", "no_call", "sft_loss")


def command(name, seed, out):
    flags, _ = RECIPES[name]
    return [sys.executable, str(ROOT / "train.py"), *COMMON.split(), *flags.split(), "--seed", str(seed), "--threads", "1",
            "--out", str(out)]


def finished(out):
    """The closing evaluation is the last thing that a run writes."""
    try:
        rows = read_rows(out)
    except Exception:                            # noqa: BLE001 -- no rows yet
        return False
    evals = [r["step"] for r in rows if "eval/average" in r]
    return len(evals) >= 2 and evals[-1] > max((r["step"] for r in rows if "phase" in r), default=0)


def pack(out, path):
    """runs/study/none-seed0 -> results/study/none-seed0.csv: one line per step, probe, evaluation and training merged"""
    steps = {}
    for row in read_rows(out):
        steps.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k.startswith(KEEP)})
    columns = list(dict.fromkeys(k for row in steps.values() for k in row))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in steps.values())


def work(names, seeds):
    """[(recipe, seed)]: three seeds of everything first, so that an interrupted study is balanced"""
    jobs = [(name, seed) for name in names for seed in range(RECIPES[name][1]) if seeds is None or seed in seeds]
    return sorted(jobs, key=lambda job: job[1] >= 3)


def run_one(name, seed):
    out, packed = Path("runs/study") / f"{name}-seed{seed}", HERE / "study" / f"{name}-seed{seed}.csv"
    if not packed.exists():
        if not finished(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{out}.log", "a") as log:
                done = subprocess.run(command(name, seed, out) + (["--resume"] if out.exists() else []), stdout=log, stderr=log,
                                      env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                return f"{name}-seed{seed} failed with status {done.returncode}; see {out}.log"
        pack(out, packed)


# ----------------------------------------------------------------------------------------------------------------------
# Tables: from the packed rows alone. tests/test_results.py makes them again and compares them with README.
MAIN = ("none", "strict", "sft", "sft_then_rl", "ops", "hbg", "ets", "prs", "adaptive", "random_time", "ets_sync")
CAUSES = ("none", "strict", "random_reward", "format_reward", "positive_only", "negative_only", "kl", "mask_control", "retokenize",
          "hbg", "hbg_hint_kept")
DETECTORS = ("p/open|text", "p/open|off", "p/end|off", "p/close|off", "p/short_circuit", "p/moved", "state/polluted", "entropy",
             "kl_sampler", "grad_norm")
MALFORMED = tuple(f"state/{s}" for s in STATES if s not in ("call", "reply"))


def runs(name):
    """-> [rows of seed 0, rows of seed 1, ...] of what is packed"""
    return [read_rows(p) for p in sorted((HERE / "study").glob(f"{name}-seed*.csv"))]


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


def evaluation(rows, name, which=-1):
    return [r[f"eval/{name}"] for r in rows if f"eval/{name}" in r][which]


def falls(done, name):
    """"2 of 5 (41, 77)": runs whose 5-step mean fell below a tenth of its peak for good, and when"""
    steps = [found["step"] for rows in done if (found := collapse(rows, name=name))]
    return f"{len(steps)} of {len(done)}" + (f" ({', '.join(map(str, steps))})" if steps else "")


def recipe_table(names):
    """One line per recipe: mean over seeds (lowest to highest seed)"""
    lines = ["| recipe | seeds | task reward | clean reward | malformed messages, % | P(open, text) | calls exact, % | test tasks, % | "
             "... clean, % | other syntax, % | reward collapsed | clean reward collapsed | SFT rows |", "|---" * 13 + "|"]
    for name in names:
        if not (done := runs(name)):
            continue
        rl = [rows for rows in done if any("reward" in r for r in rows)]
        probes = lambda metric: [[r[metric] for r in rows if metric in r][-1] for rows in done]
        lines.append(" | ".join([
            f"| {name}", str(len(done)), spread([late(r, "reward") for r in rl]), spread([late(r, "reward_clean") for r in rl]),
            percent([late(r, *MALFORMED) for r in rl]), spread(probes("p/open|text"), 3), percent(probes("p/calls_exact")),
            *(percent([evaluation(r, n) for r in done]) for n in ("average", "average_clean", "format_ood")),
            falls(rl, "reward") if rl else "–", falls(rl, "reward_clean") if rl else "–",
            f"{mean(sum(r.get('sft_visits', 0) for r in rows) for rows in done):.0f} |"]))
    return "\n".join(lines)


def phase_table():
    """collapse yes/no over learning rate x closing rule x seed"""
    lines = ["| learning rate | closing | reward collapsed | clean reward collapsed | malformed messages at the end, % |", "|---" * 5 + "|"]
    for lr in ("2e-4", "5e-4", "1e-3"):
        for closing, recipe in (("lenient", "none"), ("strict", "strict")):
            if done := runs(recipe if lr == "5e-4" else f"{recipe}_lr{lr}"):
                lines.append(f"| {lr} | {closing} | {falls(done, 'reward')} | {falls(done, 'reward_clean')} | "
                             f"{percent([late(r, *MALFORMED) for r in done])} |")
    return "\n".join(lines)


def series(rows, name):
    """[(step, value)] of a detector at the probes' steps; a metric of every step is averaged over the steps since the last probe"""
    probes = [r["step"] for r in rows if "p/open|text" in r]
    if name.startswith("p/"):
        return [(r["step"], r[name]) for r in rows if name in r]
    return [(b, mean(v)) for a, b in zip(probes, probes[1:]) if (v := [r[name] for r in rows if name in r and a <= r["step"] < b])]


def rings(rows, name, factor):
    """The step at which the alarm on this metric first rings, or None"""
    alarm = Alarm(factor, 2)
    return next((step for step, value in series(rows, name) if alarm.update(value)), None)


def alarm_table(names=("none", "strict", "none_lr1e-3", "random_reward", "positive_only", "negative_only", "format_reward",
                       "sft_then_rl", "ets", "prs", "ops", "hbg")):
    """Every run without an adaptive schedule: did the clean reward halve for good (the event)? Did the alarm ring before?"""
    done = [rows for name in names for rows in runs(name)]
    events = [found["step"] if (found := collapse(rows, name="reward_clean", share=0.5)) else None for rows in done]
    lines = [f"| metric | factor | rang before the fall, of {sum(e is not None for e in events)} | median lead, steps | "
             f"rang without a fall, of {events.count(None)} |", "|---" * 5 + "|"]
    for name in DETECTORS:
        for factor in (2, 3, 5, 10):
            rang = [rings(rows, name, factor) for rows in done]
            leads = sorted(e - r for e, r in zip(events, rang) if e is not None and r is not None and r <= e)
            false = sum(e is None and r is not None for e, r in zip(events, rang))
            lead = leads[len(leads) // 2] if leads else "–"
            lines.append(f"| {name.replace('|', ', ')} | {factor} | {len(leads)} | {lead} | {false} |")
    return "\n".join(lines)


TABLES = {"main": lambda: recipe_table(MAIN), "causes": lambda: recipe_table(CAUSES), "phase": phase_table, "alarm": alarm_table}


def tables():
    return "\n\n".join(f"<!-- study: {name} -->\n{make()}" for name, make in TABLES.items())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE", help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, help="default: all of the recipe's")
    p.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--list", action="store_true", help="show the command lines and what is done")
    p.add_argument("--tables", action="store_true", help="print README's tables from results/study/*.csv")
    a = p.parse_args()
    jobs = work(a.only, a.seeds)
    if a.tables:
        print(tables())
    elif a.list:
        for name, seed in jobs:
            done = (HERE / "study" / f"{name}-seed{seed}.csv").exists()
            print("done   " if done else "missing", " ".join(command(name, seed, f"runs/study/{name}-seed{seed}")[1:]))
    else:
        (HERE / "study").mkdir(exist_ok=True)
        # the embedded base model first: two runs at once must not both make it
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--eval_only", "--eval_tasks", "3"], check=True)
        failures = []
        with ThreadPoolExecutor(a.parallel) as pool:
            for failure in tqdm(pool.map(lambda job: run_one(*job), jobs), total=len(jobs), desc="study"):
                failures += [failure] if failure else []
        print("\n".join(failures) or "all runs are done")
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
