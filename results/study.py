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
from analyze_tokens import read_rows  # noqa: E402

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
