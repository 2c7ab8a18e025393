"""results/paper.py -- the paper's comparison by the paper's names: one list of recipes for both worlds.

    python results/paper.py                                          on the laptop's model
    python results/paper.py --world bfcl --model Qwen/Qwen2.5-1.5B-Instruct \\
        --launch "torchrun --nproc-per-node 8 --" --flags "--engine vllm --kv_cache_gb 20 --shard ..."
    ... --list       the command lines, what they cost, what is done
    ... --tables     tables and pictures once more, of what is done so far

First it prints what it is going to run and what that costs; then it trains, evaluates, and writes into --out

    paper.md         main table (per category), OOD table, learning rates
    rates.png        bars over learning rates         curves.png      reward and KL over training
    NAME-seedN.csv   records of each run

A run that was interrupted goes on, a finished one is not run again. `sft` and `sft+rl` on ToolACE instead of
the world's own demonstrations: --flags "--sft_file FILE" --only sft sft+rl, with an --out of its own.
"""
import importlib.util
import json
import shlex
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# This import comes first: it makes the files above importable
from study import Recipe, Study, code, falls, jobs_of, late, markdown, parser, percent
import train
from analyze_tokens import mean, read_records, smooth
from tools import CATEGORIES

# ------------------------------------------------------------------------------------------------------------
# 1. Recipes: name -> what it adds to `python train.py`. Vanilla GRPO at the world's own rates, and one signal
#    each. (OPS and HBG act inside the update, so they are synchronous; ETS and PRS come in both kinds.)
METHODS = {
    "grpo": "",
    "sft": "--signal sft --schedule sft",
    "sft+rl": "--signal sft --schedule sft_then_rl",
    "ops": "--signal ops",
    "hbg": "--signal hbg",
    "ets-interleaved": "--signal ets --schedule interleaved",
    "ets-synchronous": "--signal ets --schedule synchronous",
    "prs-interleaved": "--signal prs --schedule interleaved",
    "prs-synchronous": "--signal prs --schedule synchronous",
}
RATES = {                                        # recipe -> flag -> further values of it, by world
    "grpo": ("lr", {"tiny": ("2e-4", "5e-4"), "bfcl": ("3e-6", "1e-5")}),
    "ets-interleaved": ("sft_lr", {"tiny": ("5e-5", "2e-3"), "bfcl": ("1e-6",)}),
}
# The paper's averages, Qwen2.5-1.5B-Instruct on BFCL-V3 multi-turn, %. *: from a single third-party note.
PAPER = {"untrained": "3.50", "grpo": "0.0", "sft+rl": "17.25", "ops": "1.50 *", "hbg": "0.0 *",
         "ets-interleaved": "20.0", "prs-interleaved": "25.75", "ets-interleaved-sft_lr1e-6": "17.25 *"}


def recipes_of(world, seeds):
    """-> {"grpo": Recipe(""), "grpo-lr2e-4": Recipe("--lr 2e-4"), ...}"""
    recipes = {}
    for name, flags in METHODS.items():
        recipes[name] = Recipe(flags, seeds)
        if name in RATES:
            flag, values = RATES[name]
            for value in values[world]:
                recipes[f"{name}-{flag}{value}"] = Recipe(f"{flags} --{flag} {value}".strip(), seeds)
    return recipes


def study_of(args):
    """The flags -> Study. On the laptop the paper's KL weight is set, so that the KL is logged."""
    out = args.out or f"runs/paper/{Path(args.model or args.world).name}"
    launch = tuple(shlex.split(args.launch)) if args.launch else (sys.executable,)
    if args.world == "tiny":
        common = f"--kl_weight 1e-4 --eval_every 50 --save_every 25 --threads 1 {args.flags}"
        final = f"--eval_only --closing lenient --threads 1 {args.flags}"
        return Study(recipes_of("tiny", 3), common, final, out, Path(out), launch)
    common = f"--world bfcl --model {args.model} {args.flags}"
    return Study(recipes_of("bfcl", 1), common, f"--eval_only {common}", out, Path(out), launch, tested=True,
                 acebench=args.acebench)


def main(argv=None):
    """-> exit status"""
    p = parser(__doc__)
    p.add_argument("--world", choices=("tiny", "bfcl"), default="tiny", help="the laptop's, or real data")
    p.add_argument("--model", help="bfcl: the model that every run starts from")
    p.add_argument("--flags", default="", help="train.py's, for every run (--engine, --shard, ...)")
    p.add_argument("--launch", help='what starts train.py, such as "torchrun --nproc-per-node 8 --"')
    p.add_argument("--acebench", metavar="DIR", help="bfcl: evaluate on ACEBench's data_all/data_en too")
    p.add_argument("--tflops", type=float, default=100, help="what a GPU sustains, for the estimate")
    p.add_argument("--out", help="folder of runs, tables and pictures; default runs/paper/MODEL")
    args = p.parse_args(argv)
    if (args.world == "bfcl") != bool(args.model):
        p.error("--world bfcl and --model go together, such as --model Qwen/Qwen2.5-1.5B-Instruct")
    study, status = study_of(args), 0
    jobs = jobs_of(study, args, p.error)
    if not args.tables:
        print(plan_text(study, jobs, args.tflops), flush=True)
    if not (args.list or args.tables):
        status = study.run_all(jobs, args.parallel or (1 if args.world == "bfcl" else 2))
    if not args.list:
        print(write(study))
    return status


# ------------------------------------------------------------------------------------------------------------
# 2. What is it going to cost? Counts are exact or upper bounds; GPU-hours an estimate by the formula that is
#    printed; seconds were measured, where a run has begun.
FORMULA = """GPU-hours, at most: 12 P T / (TFLOPS x 3600 s), with P parameters and T tokens: per token 2 P to
sample it, 2 P for the reference, 6 P to train, 2 P for what --grad_checkpointing computes again. T: every
episode as long as --max_total_tokens allows; most are far shorter. TFLOPS (--tflops): what one GPU sustains
over the whole step, an assumption. Not counted: SFT (a few passes over the demonstrations), evaluation."""


def plan_text(study, jobs, tflops):
    """Every command line, whether it is done, and what it costs"""
    lines, model = [], train.parse_args(study.final.split()).model
    parameters = parameters_of(model) if study.tested else 0         # the laptop's minutes need no formula
    start = ["python" if part == sys.executable else part for part in study.launch]
    for name, seed in jobs:
        state, argv = "done" if study.packed(name, seed).exists() else "to do", study.argv_of(name, seed)
        lines.append(f"{state:6s} {shlex.join([*start, 'train.py', *argv])}")
        lines.append(f"       {cost(train.parse_args(argv), parameters, tflops)}")
    if parameters:
        lines.append(f"P = {parameters / 1e9:.3g} billion, TFLOPS = {tflops:g}. {FORMULA}")
    return "\n".join(lines)


def cost(args, parameters, tflops):
    """-> "300 RL steps, 144,000 rollouts, at most 2.36e+09 tokens, 900 updates, at most 121 GPU-hours"; and
    what was measured, once the run has begun"""
    if args.schedule == "sft":
        return "no rollouts: a few passes over the demonstrations"
    rollouts = args.steps * args.prompts * args.group
    tokens = rollouts * args.max_total_tokens
    parts = [f"{args.steps} RL steps", f"{rollouts:,} rollouts", f"at most {tokens:.3g} tokens",
             f"{args.steps * args.updates} updates"]
    if parameters:
        parts.append(f"at most {12 * parameters * tokens / (tflops * 1e12) / 3600:.3g} GPU-hours")
    if Path(args.out, "metrics.jsonl").exists():
        seconds = [r["seconds"] for r in read_records(args.out) if "reward" in r]
        parts.append(f"measured: {mean(seconds):.3g} s per RL step")
    return ", ".join(parts)


def parameters_of(model):
    """A Hugging Face name or folder -> how many parameters it has, without its weights"""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        sys.exit(f"paper.py: error: cannot read the model {model}: {reason}; check --model.")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in skeleton.parameters())


# ------------------------------------------------------------------------------------------------------------
# 3. Tables and pictures of what is done
OOD = {"format_ood": "format (the other syntax)", "content_ood": "content (unseen tools)",
       "ace_tags": "content (ACEBench, tags)", "ace_brackets": "format and content (ACEBench, brackets)"}


def done_of(study):
    """-> {recipe: [records of each packed seed]}, of recipes that have some"""
    done = {}
    for name in study.recipes:
        if found := study.records(name):
            done[name] = found
    return done


def scores_of(study, done, columns):
    """-> {"untrained": ["4.0", "5.0", ...], "grpo": [...], ...}: closing scores, %"""
    base = json.loads((study.data / "base.json").read_text())
    rows = {"untrained": [f"{100 * base[c]:.1f}" if c in base else "–" for c in columns]}
    for name, runs in done.items():
        rows[name] = [cell(runs, c) for c in columns]
    return rows


def cell(runs, column):
    """A closing score of a recipe's seeds, % -> "4.0", or "4.0 (3.0 to 5.5)": mean, lowest, highest seed"""
    return percent([late(records, f"final/{column}", n=1) for records in runs], 1)


def main_table(study, done):
    """Test tasks solved, %, greedy, mean over seeds (lowest to highest); and did the reward collapse (fall
    below a tenth of its peak for good; the steps)? By the paper's measure and by ours"""
    rows = []
    for name, cells in scores_of(study, done, (*CATEGORIES, "average", "average_clean")).items():
        rolled = [records for records in done.get(name, []) if any("reward" in r for r in records)]
        fell = [falls(rolled, measure) if rolled else "–" for measure in ("reward", "reward_clean")]
        rows.append([code(name), len(done.get(name, [])) or "–", *cells, *fell, PAPER.get(name)])
    header = ["method", "seeds", *CATEGORIES, "average", "... clean", "task reward collapsed",
              "clean reward collapsed", "the paper's average (1.5 B)"]
    return markdown(" | ".join(header), rows)


def ood_table(study, done):
    """The same scores where format, content or both are new"""
    base = json.loads((study.data / "base.json").read_text())
    columns = ["average", *(c for c in OOD if c in base)]
    rows = [[code(name), *cells] for name, cells in scores_of(study, done, columns).items()]
    return markdown(" | ".join(["method", "trained format and tools", *(OOD[c] for c in columns[1:])]), rows)


def rate_bars(study, done):
    """-> [("grpo", "lr 0.001", its runs), ...]: the recipes of RATES with all of their rates"""
    bars = []
    for name, (flag, _) in RATES.items():
        for other in [other for other in done if other == name or other.startswith(f"{name}-{flag}")]:
            rate = getattr(train.parse_args(study.argv_of(other, 0)), flag)
            bars.append((name, f"{flag} {rate:g}", done[other]))
    return bars


def rates_table(study, done):
    """Average of the four categories"""
    rows = [[code(name), rate, cell(runs, "average")] for name, rate, runs in rate_bars(study, done)]
    return markdown("method | learning rate | average, %", rows)


def write(study):
    """-> what was written"""
    done = done_of(study)
    if not done:
        return f"nothing is done yet, so there are no tables in {study.data}"
    parts = []
    for title, table in (("Main table", main_table), ("Out of distribution", ood_table),
                         ("Learning rates", rates_table)):
        parts.append(f"## {title}\n\n{' '.join(table.__doc__.split())}\n\n{table(study, done)}\n")
    note = "(* in the last column: that score of the paper is known from a single third-party note.)\n"
    (study.data / "paper.md").write_text("\n".join([*parts, note]))
    written = [study.data / "paper.md"]
    if importlib.util.find_spec("matplotlib"):
        written += [bars(study, done, study.data / "rates.png"), curves(done, study.data / "curves.png")]
    return "\n".join(map(str, written))


def bars(study, done, png):
    from plot import pyplot
    found, averages = rate_bars(study, done), []
    for _, _, runs in found:
        averages.append([100 * late(records, "final/average", n=1) for records in runs])
    fig, ax = pyplot().subplots(figsize=(1.5 + len(found), 3))
    ax.bar(range(len(found)), [mean(of) for of in averages], 0.6, color="#9ec9ea", edgecolor="black", lw=0.4)
    for i, of_seeds in enumerate(averages):
        ax.plot([i] * len(of_seeds), of_seeds, "k.", ms=4)
    ax.set_xticks(range(len(found)), [f"{name}\n{rate}" for name, rate, _ in found], fontsize=6)
    ax.set_ylabel("test tasks solved, %")
    fig.tight_layout()
    fig.savefig(png, dpi=110)
    pyplot().close(fig)
    return png


def curves(done, png):
    """Reward and KL to the starting model on one time axis, a column per recipe with RL, a line per seed"""
    from plot import pyplot
    done = {name: runs for name, runs in done.items() if any("reward" in r for r in runs[0])}
    if not done:
        return "no recipe with RL is done, so no curves"
    fig, axes = pyplot().subplots(2, len(done), figsize=(1 + 2.2 * len(done), 4), sharex="col", sharey="row",
                                  squeeze=False)
    for (reward, kl), (name, runs) in zip(axes.T, done.items()):
        for records in runs:
            reward.plot(*smooth(records, "reward"), "k-", lw=0.9)
            reward.plot(*smooth(records, "reward_clean"), "k--", lw=0.7)
            kl.plot(*smooth(records, "kl_ref", 1), "k-", lw=0.9)
        reward.set_title(name)
        kl.set_xlabel("step")
    axes[0, 0].set_ylabel("reward (dashed: clean),\nmean of 5 steps")
    axes[1, 0].set_ylabel("KL to the model at the\nstart, per token (k3)")
    fig.tight_layout()
    fig.savefig(png, dpi=110)
    pyplot().close(fig)
    return png


if __name__ == "__main__":
    sys.exit(main())
