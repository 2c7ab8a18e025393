"""results/study.py -- every run behind README's "What we found": one command, resumable.

    python results/study.py                      run what is missing (hours on two cores), and pack it
    python results/study.py --list               what there is to run, and what is done
    python results/study.py --only none ets      some recipes
    python results/study.py --tables             the tables of the two READMEs again, from the packed records
    python results/study.py --pictures           results/study/*.png, likewise

Each run is one `train.py` command line: COMMON plus a recipe's flags plus --seed. Runs live under runs/study/
and go on where they were interrupted. A finished run is evaluated once more, under the same rule whatever it
was trained with (columns final/*); then its records are packed into results/study/RECIPE-seedN.csv: all
steps, rounded to four digits, without the columns that no table or picture uses.

Tables: study_tables.py. Pictures: study_pictures.py.
"""
import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "results" / "study"
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import train  # noqa: E402
from analyze_tokens import read_records  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# 1. Recipes


@dataclass
class Recipe:
    flags: str                                   # a later flag overrides an earlier one, and COMMON's
    seeds: int = 3


COMMON = "--lr 5e-4 --steps 100 --eval_every 50 --save_every 25 --keep -1"   # the last three: not train.py's
SLOW, FAST = "--lr 2e-4", "--lr 1e-3 --steps 60"
ETS, PRS = "--signal ets --schedule interleaved", "--signal prs --schedule interleaved"
ADAPTIVE = "--signal ets --schedule adaptive --sft_budget 256"           # about as many rows as ETS trains
SYNC = "--signal ets --schedule synchronous --sft_batch 80"
RECIPES = {
    # the paper's comparison, and ours
    "none": Recipe("", 5),
    "strict": Recipe("--closing strict", 5),
    "sft": Recipe("--signal sft --schedule sft", 5),
    "sft_then_rl": Recipe("--signal sft --schedule sft_then_rl", 5),
    "ops": Recipe("--signal ops", 5),
    "hbg": Recipe("--signal hbg", 5),
    "ets": Recipe(ETS, 5),
    "prs": Recipe(PRS, 5),
    "adaptive": Recipe(ADAPTIVE, 5),
    "random_time": Recipe("--signal ets --schedule adaptive_random --sft_budget 256", 5),
    "ets_sync": Recipe(SYNC),
    # which cause? one thing changed in `fast`: twice the rate, where every seed collapses within 60 steps
    "fast": Recipe(FAST, 5),
    "fast_strict": Recipe(f"{FAST} --closing strict", 5),
    "fast_random_reward": Recipe(f"{FAST} --reward random"),
    "fast_shuffled_reward": Recipe(f"{FAST} --reward shuffled"),
    "fast_format_reward": Recipe(f"{FAST} --reward format"),
    "fast_positive_only": Recipe(f"{FAST} --only positive"),
    "fast_negative_only": Recipe(f"{FAST} --only negative"),
    "fast_mask_control": Recipe(f"{FAST} --mask_control"),
    "fast_one_update": Recipe(f"{FAST} --updates 1"),
    "fast_kl": Recipe(f"{FAST} --kl_weight 0.01"),
    "fast_ets": Recipe(f"{FAST} {ETS}"),
    "fast_adaptive": Recipe(f"{FAST} {ADAPTIVE}"),
    "fast_ets_sync": Recipe(f"{FAST} {SYNC}"),
    # the paper's side questions, and controls, at the main rate
    "positive_only": Recipe("--only positive", 5),
    "negative_only": Recipe("--only negative"),
    "random_reward": Recipe("--reward random"),
    "mask_control": Recipe("--mask_control"),
    "shuffled_reward": Recipe("--reward shuffled"),
    "ets_more_rows": Recipe(f"{ETS} --sft_epochs 8"),        # about as many rows as PRS trains
    "hbg_hint_kept": Recipe("--signal hbg --hint_in_update"),
    "ets_sft_lr5e-5": Recipe(f"{ETS} --sft_lr 5e-5"),
    "ets_sft_lr2e-3": Recipe(f"{ETS} --sft_lr 2e-3"),
    # at less than half of the main rate, where vanilla GRPO lives: does anything break it, or add to it?
    "slow": Recipe(SLOW, 5),
    "slow_strict": Recipe(f"{SLOW} --closing strict"),
    "slow_shuffled_reward": Recipe(f"{SLOW} --reward shuffled"),
    "slow_negative_only": Recipe(f"{SLOW} --only negative"),
    "slow_mask_control": Recipe(f"{SLOW} --mask_control"),
    "slow_sft_then_rl": Recipe(f"{SLOW} --signal sft --schedule sft_then_rl"),
    "slow_ops": Recipe(f"{SLOW} --signal ops"),
    "slow_hbg": Recipe(f"{SLOW} --signal hbg"),
    "slow_ets": Recipe(f"{SLOW} {ETS}"),
    "slow_prs": Recipe(f"{SLOW} {PRS}"),
}

# ------------------------------------------------------------------------------------------------------------
# 2. Runs
KEEP = ("step", "phase", "reward", "mixed_groups", "state/", "entropy", "kl_", "grad_norm", "push/", "p/",
        "alarm", "eval/", "final/", "sft_visits", "sft_updates", "sft_loss", "skipped_updates",
        "hint_log_ratio", "messages", "no_call")     # how the columns begin that are packed
FINAL = "--eval_only --closing lenient --threads 1"


def argv_of(name, seed):
    """-> the arguments of train.py"""
    run = f"--seed {seed} --threads 1 --out runs/study/{name}-seed{seed}"
    return f"{COMMON} {RECIPES[name].flags} {run}".split()


def packed(name, seed):
    return DATA / f"{name}-seed{seed}.csv"


def finished(out):
    """Has the run written its last checkpoint?"""
    latest = Path(out, "checkpoints", "latest")
    if not latest.exists():
        return False
    args = argparse.Namespace(**json.loads(Path(out, "config.json").read_text()))
    return latest.read_text().strip() == f"step-{len(train.plan(args))}"


def pack(out, path, scores=()):
    """runs/study/none-seed0 -> results/study/none-seed0.csv: one line per step, its probe, evaluation and
    training merged; the closing scores stand in the last one"""
    steps = {}
    for record in read_records(out):
        kept = {name: value for name, value in record.items() if name.startswith(KEEP)}
        steps.setdefault(record["step"], {}).update(kept)
    for name in scores:
        steps[max(steps)][f"final/{name}"] = scores[name]
    columns = list(dict.fromkeys(itertools.chain(*steps.values())))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        for record in steps.values():
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()})


def call(log, argv):
    """train.py with these arguments -> its status"""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as f:
        return subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], stdout=f, stderr=f,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def evaluate_base():
    """The model that every run starts from; train.py makes it at its first use -> status"""
    scores, status = DATA / "base.json", 0
    if not (train.BASE.exists() and scores.exists()):
        status = call("runs/study/base.log", [*FINAL.split(), "--out", "runs/study/base"])
    if status == 0 and not scores.exists():
        scores.write_text(Path("runs/study/base/eval.json").read_text())
    return status


def run_one(name, seed):
    """Train, evaluate, pack; whatever of it is not done yet. -> None, or what went wrong"""
    out, status = f"runs/study/{name}-seed{seed}", 0
    if packed(name, seed).exists():
        return None
    if not finished(out):
        resume = ["--resume"] if Path(out).exists() else []
        status = call(f"{out}.log", argv_of(name, seed) + resume)
    if status == 0 and not Path(out, "eval.json").exists():
        status = call(f"{out}.log", [*FINAL.split(), "--model", out, "--out", out])
    if status:
        return f"{name}-seed{seed} failed with status {status}; see {out}.log"
    pack(out, packed(name, seed), json.loads(Path(out, "eval.json").read_text()))


def run_all(jobs, parallel):
    """-> exit status"""
    if evaluate_base():                          # first: two runs at once must not both make it
        sys.exit("the base model cannot be made; see runs/study/base.log")
    with ThreadPoolExecutor(parallel) as pool:
        done = list(tqdm(pool.map(lambda job: run_one(*job), jobs), total=len(jobs), desc="study"))
    failures = [failure for failure in done if failure]
    print("\n".join(failures) or "all runs are done")
    return 1 if failures else 0


# ------------------------------------------------------------------------------------------------------------
# 3. The command line


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE",
                   help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, help="default: all of the recipe's")
    p.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--list", action="store_true", help="show the command lines and what is done")
    p.add_argument("--tables", action="store_true", help="make the tables in the READMEs again")
    p.add_argument("--pictures", action="store_true", help="draw results/study/*.png again")
    args = p.parse_args()
    jobs = []
    for name in args.only:
        jobs += [(name, s) for s in range(RECIPES[name].seeds) if args.seeds is None or s in args.seeds]
    jobs.sort(key=lambda job: job[1] >= 3)       # three seeds of everything first: balanced if interrupted
    if args.tables:
        from study_tables import write           # here, because both read the recipes above
        write()
    elif args.pictures:
        from study_pictures import pictures
        pictures()
    elif args.list:
        for name, seed in jobs:
            state = "done   " if packed(name, seed).exists() else "missing"
            print(state, "python train.py", *argv_of(name, seed))
    else:
        return run_all(jobs, args.parallel)


if __name__ == "__main__":
    sys.exit(main())
