"""results/study.py -- a study: recipes, each of them some runs of train.py, evaluated and packed alike.

    python results/story.py                      README's runs: collapse, cause, cure
    python results/paper.py                      the paper's comparison, here or on real data

Each run is one `train.py` command line: the study's flags, the recipe's, --seed. Runs go on where they were
interrupted. A finished one is evaluated once more, under the same rule whatever it was trained with (columns
final/*); then its records are packed into a CSV: all steps, rounded to four digits, without the columns that
no table or picture uses.

    1. runs      made and packed       2. the command line       3. tables     of the packed records
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
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import train  # noqa: E402
from analyze_tokens import collapse, mean, read_records  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# 1. Runs
KEEP = ("step", "phase", "reward", "mixed_groups", "state/", "entropy", "kl_", "grad_norm", "push/", "p/",
        "eval/", "test/", "final/", "sft_visits", "sft_updates", "sft_loss", "skipped_updates",
        "hint_log_ratio", "messages", "no_call")     # how the columns begin that are packed


@dataclass
class Recipe:
    flags: str                                   # a later flag overrides an earlier one, and the study's
    seeds: int = 3


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
    """runs/story/lr1e-3-seed0 -> results/story/lr1e-3-seed0.csv: one line per step, its probe, evaluation and
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
# 2. The command line


def parser(doc):
    """The flags that all studies have"""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", metavar="RECIPE", help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, help="default: all of the recipe's")
    p.add_argument("--parallel", type=int, help="runs at a time; default: 2 of one thread each, real ones 1")
    p.add_argument("--list", action="store_true", help="show the command lines and what is done")
    p.add_argument("--tables", action="store_true", help="make the tables again, from the packed records")
    return p


def jobs_of(study, args, error):
    """-> [("lr1e-3", 0), ...]: recipes and seeds"""
    if unknown := [name for name in args.only or [] if name not in study.recipes]:
        error(f"--only {unknown[0]} is none of the recipes: {', '.join(study.recipes)}")
    jobs = []
    for name in args.only or study.recipes:
        every = range(study.recipes[name].seeds)
        jobs += [(name, s) for s in every if args.seeds is None or s in args.seeds]
    return sorted(jobs, key=lambda job: job[1] >= 3)     # three seeds of all first: balanced if interrupted


# ------------------------------------------------------------------------------------------------------------
# 3. Tables


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
    """[.3, .1, .2] -> "0.20 (0.10 to 0.30)": mean over seeds, the lowest and the highest; [.3] -> "0.30" """
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    extremes = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{extremes}"


def percent(values, digits=0):
    return spread([100 * v for v in values if v is not None], digits)


def late(records, *columns, n=10):
    """Mean over the last n records that have the columns, of their sum; None if there are none"""
    found = [sum(r[c] for c in columns) for r in records if columns[0] in r][-n:]
    return mean(found) if found else None


def falls(done, measure):
    """-> "2 of 5 (41, 77)": runs whose `measure` fell below a tenth of its peak for good, and when"""
    found = [collapse(records, name=measure) for records in done]
    steps = [str(one["step"]) for one in found if one]
    return f"{len(steps)} of {len(done)}" + (f" ({', '.join(steps)})" if steps else "")
