"""results/study.py -- runs of train.py, trained, evaluated and packed alike: what all studies share.

    python results/story.py                      README's runs: collapse, cause, cure
    python results/study.py --paper              the paper's comparison, here or on real data: study_paper.py
    python results/study.py --list               the first study: its command lines
    python results/study.py --tables             ... its tables again, from the packed records
    python results/study.py --pictures           ... and results/study/*.png

A study is a list of recipes; each run is one `train.py` command line: common flags, the recipe's, --seed. Runs go
on where they were interrupted. A finished run is evaluated once more, under the same rule whatever it was
trained with (columns final/*); then its records are packed into a CSV: all steps, rounded to four digits,
without the columns that no table or picture uses.

The first study (130 runs) is closed: its base is not the one that ships now, so nothing can be added to it.
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


COMMON = "--lr 5e-4 --steps 100 --eval_every 50 --save_every 25 --keep -1 --threads 1"
SLOW, FAST = "--lr 2e-4", "--lr 1e-3 --steps 60"
ETS, PRS = "--signal ets --schedule interleaved", "--signal prs --schedule interleaved"
# About as many rows as ETS trains. (This schedule and adaptive_random have left the code; see results/story.)
ADAPTIVE = "--signal ets --schedule adaptive --sft_budget 256"
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
        "eval/", "test/", "final/", "sft_visits", "sft_updates", "sft_loss", "skipped_updates",
        "hint_log_ratio", "messages", "no_call")     # how the columns begin that are packed
FINAL = "--eval_only --closing lenient --threads 1"


@dataclass
class Study:
    """Recipes whose runs are trained, evaluated and packed alike"""
    recipes: dict                                # {"ets": Recipe, ...}
    common: str                                  # flags of every run, before the recipe's own
    final: str                                   # flags of an evaluation
    runs: str                                    # the run folders stand here ...
    data: Path                                   # ... and the packed records there
    launch: tuple = (sys.executable,)            # what starts train.py
    tested: bool = False                         # has a run played the test tasks itself, at its end?
    acebench: str | None = None                  # ACEBench's folder: evaluate there too

    def out(self, name, seed):
        return f"{self.runs}/{name}-seed{seed}"

    def packed(self, name, seed):
        return self.data / f"{name}-seed{seed}.csv"

    def records(self, name):
        """-> [records of each packed seed]"""
        paths = [self.packed(name, seed) for seed in range(self.recipes[name].seeds)]
        return [read_records(path) for path in paths if path.exists()]

    def argv_of(self, name, seed):
        """-> the arguments of train.py"""
        flags = f"{self.common} {self.recipes[name].flags} --seed {seed}"
        return [*flags.split(), "--out", self.out(name, seed)]

    def call(self, log, argv, script="train.py"):
        """A script with these arguments -> its status"""
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as f:
            return subprocess.run([*self.launch, str(ROOT / script), *argv], stdout=f, stderr=f,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode

    def evaluate(self, out, model=(), tested=False):
        """Closing scores, where they are missing -> OUT/eval.json, OUT/ace.json -> status"""
        status, log, flags = 0, f"{out}.log", [*self.final.split(), *model]
        if not tested and not Path(out, "eval.json").exists():
            status = self.call(log, [*flags, "--out", out])
        if status == 0 and self.acebench and not Path(out, "ace.json").exists():
            Path(out).mkdir(parents=True, exist_ok=True)
            flags += ["--data", self.acebench, "--out", f"{out}/ace.json"]
            status = self.call(log, flags, "results/acebench.py")
        return status

    def evaluate_base(self, name="base", model=()):
        """The scores of the model that runs start from -> DATA/NAME.json"""
        scores, out = self.data / f"{name}.json", f"{self.runs}/{name}"
        if scores.exists():
            return
        if self.evaluate(out, model):
            sys.exit(f"the base model cannot be evaluated; see {out}.log")
        scores.parent.mkdir(parents=True, exist_ok=True)
        scores.write_text(json.dumps(closing_scores(out), indent=1))

    def run_one(self, name, seed):
        """Train, evaluate, pack; whatever of it is not done yet. -> None, or what went wrong"""
        out, status = self.out(name, seed), 0
        if self.packed(name, seed).exists():
            return None
        if not finished(out):
            resume = ["--resume"] if Path(out, "config.json").exists() else []
            status = self.call(f"{out}.log", self.argv_of(name, seed) + resume)
        status = status or self.evaluate(out, ["--model", out], self.tested)
        if status:
            return f"{name}-seed{seed} failed with status {status}; see {out}.log"
        pack(out, self.packed(name, seed), closing_scores(out))

    def run_all(self, jobs, parallel):
        """-> exit status"""
        self.evaluate_base()
        with ThreadPoolExecutor(parallel) as pool:
            ended = pool.map(lambda job: self.run_one(*job), jobs)
            done = list(tqdm(ended, total=len(jobs), desc="study"))
        failures = [failure for failure in done if failure]
        print("\n".join(failures) or "all runs are done")
        return 1 if failures else 0


STUDY = Study(RECIPES, COMMON, FINAL, "runs/study", DATA)


def finished(out):
    """Has the run written its last checkpoint?"""
    latest = Path(out, "checkpoints", "latest")
    if not latest.exists():
        return False
    args = argparse.Namespace(**json.loads(Path(out, "config.json").read_text()))
    return latest.read_text().strip() == f"step-{len(train.plan(args))}"


def closing_scores(out):
    """-> {"average": .31, ...}: what the closing evaluations wrote, or the run's own test at its end"""
    scores = {}
    if Path(out, "metrics.jsonl").exists():
        for record in read_records(out):
            scores |= {name[5:]: value for name, value in record.items() if name.startswith("test/")}
    for file in ("eval.json", "ace.json"):
        if Path(out, file).exists():
            scores |= json.loads(Path(out, file).read_text())
    return scores


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


# ------------------------------------------------------------------------------------------------------------
# 3. The command line


def parser():
    """The flags that all studies have"""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", metavar="RECIPE", help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, help="default: all of the recipe's")
    p.add_argument("--parallel", type=int, help="runs at a time; default: 2 of one thread each, real ones 1")
    p.add_argument("--list", action="store_true", help="show the command lines and what is done")
    p.add_argument("--tables", action="store_true", help="make the tables again, from the packed records")
    return p


def jobs_of(study, args, error):
    """-> [("none", 0), ...]: recipes and seeds"""
    if unknown := [name for name in args.only or [] if name not in study.recipes]:
        error(f"--only {unknown[0]} is none of the recipes: {', '.join(study.recipes)}")
    jobs = []
    for name in args.only or study.recipes:
        every = range(study.recipes[name].seeds)
        jobs += [(name, s) for s in every if args.seeds is None or s in args.seeds]
    return sorted(jobs, key=lambda job: job[1] >= 3)     # three seeds of all first: balanced if interrupted


def main(argv=None):
    if "--paper" in (sys.argv if argv is None else argv):
        import study_paper                       # here, because it and the two below read what stands above
        return study_paper.main(argv)
    p = parser()
    p.add_argument("--pictures", action="store_true", help="draw results/study/*.png again")
    p.add_argument("--paper", action="store_true", help="the paper's comparison; see --paper --help")
    args = p.parse_args(argv)
    if args.tables:
        from study_tables import MARKED, PAGES, TABLES, rewrite
        rewrite(PAGES, MARKED, TABLES)
    elif args.pictures:
        from study_pictures import pictures
        pictures()
    elif args.list:
        for name, seed in jobs_of(STUDY, args, p.error):
            print("python train.py", *STUDY.argv_of(name, seed))
    else:
        p.error("the first study is closed, for its base is gone (git checkout d7c520a makes it again); "
                "README's runs: python results/story.py; the paper's comparison: --paper")


if __name__ == "__main__":
    sys.exit(main())
