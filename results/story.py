"""results/story.py -- what breaks, why, what fixes it: README's runs, all from the shipped base.

    python results/story.py                      run what is missing (2 to 5 minutes a run on one core)
    python results/story.py --list               what there is to run, and what is done
    python results/story.py --only lr1e-3 --seeds 0 1
    python results/story.py --tables             README's tables again, from the packed records
    python results/story.py --picture            results/story/*.png, likewise

A recipe is named by what it adds to `python train.py --steps 60`. Runs live under runs/story/, go on where
they were interrupted, and are packed into results/story/RECIPE-seedN.csv.

    1. recipes       2. tables       3. pictures       4. the command line
"""
import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# This import comes first: it makes the files above importable
from study import ROOT, Recipe, Study, code, falls, jobs_of, late, markdown, parser, percent, spread
from analyze_tokens import mean, smooth
from plot import FILLS, pyplot
from rl_step import PRESSURES
from rollout import STATES, is_clean

DATA = ROOT / "results" / "story"
COMMON = "--steps 60 --eval_every -1 --save_every 30 --keep 1 --threads 1"
FINAL = "--eval_only --closing lenient --threads 1"

# ------------------------------------------------------------------------------------------------------------
# 1. Recipes
FAST, SLOW = "--lr 1e-3", "--lr 2e-4"
MASK, STRICT = "--mask_control", "--closing strict"
SYNC, PHASES = "--schedule synchronous", "--schedule interleaved"
RECIPES = {
    # RL alone, and each supervision signal, at a rate where RL alone collapses
    "lr1e-3": Recipe(FAST, 10),
    "lr1e-3+ets": Recipe(f"{FAST} --signal ets {SYNC}", 10),
    "lr1e-3+prs": Recipe(f"{FAST} --signal prs {SYNC}", 3),
    "lr1e-3+sft": Recipe(f"{FAST} --signal sft {SYNC}", 3),
    "lr1e-3+ets+phases": Recipe(f"{FAST} --signal ets {PHASES}", 3),
    "lr1e-3+prs+phases": Recipe(f"{FAST} --signal prs {PHASES}", 3),
    "lr1e-3+sft-first": Recipe(f"{FAST} --signal sft --schedule sft_then_rl", 3),
    "lr1e-3+ops": Recipe(f"{FAST} --signal ops", 3),
    "lr1e-3+hbg": Recipe(f"{FAST} --signal hbg", 3),
    "sft": Recipe("--signal sft --schedule sft", 3),
    # the spike and its switch, at a rate where RL alone holds: are control tokens pushed down where they were
    # sampled in failed rollouts, and is an empty call worth a reply?
    "lr2e-4": Recipe(SLOW, 5),
    "lr2e-4+ets": Recipe(f"{SLOW} --signal ets {SYNC}", 3),
    "lr2e-4+mask": Recipe(f"{SLOW} {MASK}", 5),
    "lr2e-4+strict": Recipe(f"{SLOW} {STRICT}", 3),
    "lr2e-4+mask+strict": Recipe(f"{SLOW} {MASK} {STRICT}", 5),
    # the cures where the spike is
    "lr2e-4+mask+ets": Recipe(f"{SLOW} {MASK} --signal ets {SYNC}", 5),
    "lr2e-4+mask+prs": Recipe(f"{SLOW} {MASK} --signal prs {SYNC}", 3),
    "lr2e-4+mask+sft": Recipe(f"{SLOW} {MASK} --signal sft {SYNC}", 3),
    "lr2e-4+mask+ets+phases": Recipe(f"{SLOW} {MASK} --signal ets {PHASES}", 5),
    "lr2e-4+mask+prs+phases": Recipe(f"{SLOW} {MASK} --signal prs {PHASES}", 3),
    # what else breaks a recipe that holds?
    "lr2e-4+shuffled": Recipe(f"{SLOW} --reward shuffled", 3),
    "lr2e-4+negative": Recipe(f"{SLOW} --only negative", 3),
    "lr2e-4+positive": Recipe(f"{SLOW} --only positive", 3),
    "lr5e-4": Recipe("--lr 5e-4", 3),
    "lr2e-4+released": Recipe(f"{SLOW} --as_released --kl_weight 1e-4", 3),
    # README's first and third command once more, as sums are rounded on two threads
    "lr1e-3+threads2": Recipe(f"{FAST} --threads 2", 10),
    "lr1e-3+ets+threads2": Recipe(f"{FAST} --signal ets {SYNC} --threads 2", 10),
}
# The main claims again from other bases: `lr1e-3@seed1` starts from the one of seed 1 (make_base.py makes it)
BASES = {"seed1": "--seed 1", "seed2": "--seed 2", "small": "--size small"}
CLAIMS = ["lr1e-3", "lr1e-3+ets", "lr2e-4", "lr2e-4+mask", "lr2e-4+mask+strict", "lr2e-4+mask+ets+phases",
          "lr2e-4+mask+ets"]
SHIPPED = list(RECIPES)
for base in BASES:
    for name in CLAIMS:
        RECIPES[f"{name}@{base}"] = Recipe(f"{RECIPES[name].flags} --model runs/base-{base}", 5)
# Two schedules that left the code because of these runs (commit 75547fd has them): bursts of 64 rows, 384 in
# all, while an alarm on P(<tool_call> where text should begin) rings, or at random times
RETIRED = {"lr2e-4+mask+ets+alarm": Recipe(f"{SLOW} {MASK} --signal ets --schedule adaptive", 3),
           "lr2e-4+mask+ets+random": Recipe(f"{SLOW} {MASK} --signal ets --schedule adaptive_random", 3)}
STORY = Study(RECIPES | RETIRED, COMMON, FINAL, "runs/story", DATA)


# ------------------------------------------------------------------------------------------------------------
# 2. Tables
TESTS = {"test tasks, %": "final/average_clean", "other syntax, %": "final/format_ood_clean",
         "new tools, %": "final/content_ood_clean"}      # greedy, every message clean
TESTED = ["final/average_clean"]
MALFORMED = tuple(f"state/{state}" for state in STATES if not is_clean([state]))
SPIKE = "p/open|text"                            # <tool_call> where text should begin
WRONG = ("p/open|off", "p/close|off", "p/end|off", "p/start|off")    # where another token is right
# The paper's: Qwen2.5-1.5B, BFCL multi-turn / ACEBench in brackets / ACEBench in tags (the last two: from a
# single third-party note). Its ETS and PRS act in phases.
PAPER = {"base": "3.5 / 26 / 32", "lr1e-3": "0 / 25 / 0", "lr1e-3+ops": "1.5 / 26 / 23",
         "lr1e-3+hbg": "0 / 23 / 0", "lr1e-3+sft-first": "17 / – / –", "lr1e-3+ets+phases": "20 / 9 / 22",
         "lr1e-3+prs+phases": "26 / 12 / 26", "sft": "– / 0 / 24"}
PARTS = {                                        # table: its recipes
    "main": ["lr1e-3", "lr1e-3+ops", "lr1e-3+hbg", "lr1e-3+sft-first", "lr1e-3+ets+phases",
             "lr1e-3+prs+phases", "lr1e-3+ets", "sft", "lr2e-4", "lr2e-4+mask",
             "lr2e-4+mask+strict", "lr2e-4+mask+ets+phases", "lr2e-4+mask+ets"],
    "rates": ["lr2e-4", "lr5e-4", "lr1e-3"],
    "cures": [name for name in SHIPPED if name.startswith("lr1e-3") and "threads" not in name] + ["sft"],
    "threads": ["lr1e-3", "lr1e-3+threads2", "lr1e-3+ets", "lr1e-3+ets+threads2"],
    "switches": ["lr2e-4", "lr2e-4+strict", "lr2e-4+mask+strict", "lr2e-4+mask"],
    "spike": [name for name in [*SHIPPED, *RETIRED] if name.startswith("lr2e-4+mask")],
    "bases": [f"{name}@{base}" for base in BASES for name in CLAIMS]}


@functools.cache
def runs(name):
    """-> [records of each packed seed]"""
    return STORY.records(name)


def base_of(name):
    """"lr1e-3@seed1" -> "base-seed1", "lr1e-3" -> "base" """
    return "-".join(["base", *name.split("@")[1:]])


def start(at, columns, digits=0):
    """The columns' sum before the first update, %: the closing scores of the base, else the mean over the
    first steps of the runs of lr1e-3 that begin with it   "@seed1", ["final/average_clean"] -> "39" """
    scores = json.loads((DATA / f"{base_of(at)}.json").read_text())
    closing = {f"final/{name}": value for name, value in scores.items()}
    values = [sum((records[0] | closing)[column] for column in columns) for records in runs(f"lr1e-3{at}")]
    return f"{100 * mean(values):.{digits}f}"


def titled(at):
    """"" -> "the base", "@seed1" -> "the base of seed1" """
    return at.replace("@", "the base of ") or "the base"


def recipe_table(names):
    """One line per recipe, behind its base: mean over seeds (lowest to highest seed). Messages: the last 10
    steps, probabilities: the last probe, tests: at the end; if a method is the paper's, its scores"""
    rows, seen, compared = [], set(), len(PAPER.keys() & names) > 1
    for name in [name for name in names if runs(name)]:
        done, at = runs(name), "".join(name.partition("@")[1:])      # "lr1e-3@seed1" -> "@seed1"
        if at not in seen:
            seen.add(at)
            rows.append([titled(at), None, None, start(at, MALFORMED), start(at, [SPIKE])])
            rows[-1] += [start(at, WRONG, 1), *(start(at, [score]) for score in TESTS.values())]
            if compared:
                rows[-1].append(PAPER["base"])
        rows.append([code(name), len(done), *["–"] * 4])
        if late(done[0], "reward") is not None:  # else there is no RL in it
            rows[-1][2:] = [falls(done, "reward"), percent([late(r, *MALFORMED) for r in done]),
                            percent([late(r, SPIKE, n=1) for r in done]),
                            percent([late(r, *WRONG, n=1) for r in done], 1)]
        rows[-1] += [percent([late(r, score, n=1) for r in done]) for score in TESTS.values()]
        if compared:
            rows[-1].append(PAPER.get(name))
    header = ["recipe", "seeds", "reward collapsed (step)", "malformed messages, %",
              "p(`<tool_call>`) where text should begin, %", "p(control tokens) where another is right, %",
              *TESTS]
    if compared:
        header.append("the paper's three, %")
    return markdown(" | ".join(header), rows)


def claims_table():
    """The main claims from every base: greedy test tasks at the end, mean over seeds (lowest to highest; how
    many seeds)"""
    places = ["", *(f"@{base}" for base in BASES if runs(f"lr1e-3@{base}"))]
    rows = [["before", *(start(at, TESTED) for at in places)]]
    for name in CLAIMS:
        rows.append([code(name)])
        for done in [runs(f"{name}{at}") for at in places]:
            scores = percent([late(records, *TESTED, n=1) for records in done])
            rows[-1].append(f"{scores.rstrip(')')}; {len(done)})" if len(done) > 1 else scores)
    titles = ["test tasks, % (lowest to highest; seeds)", *(titled(at) for at in places)]
    return markdown(" | ".join(titles), rows)


BESIDE = {"calls right, given the truth so far, %": ["p/calls_exact"],
          "test tasks by the reward's rule, %": ["final/average"],
          "`long_context`, %": ["final/long_context_clean"],
          "greedy messages: polluted, %": ["final/state/polluted"],
          "collapsed, %": ["final/state/collapsed"],
          "other, %": ["final/state/empty", "final/state/cut"]}


def beside_table():
    """What `recipe_table` leaves out: rows of supervision (a row again is one more); what the model knows;
    test tasks by the rule of the reward; those of one category; the greedy messages of the test tasks"""
    rows = [["the base", None, None, *(start("", of) for of in BESIDE.values())]]
    for name in [name for name in [*SHIPPED, *RETIRED] if runs(name)]:
        visits = [sum(r.get("sft_visits", 0) for r in records) for records in runs(name)]
        rows.append([code(name), len(runs(name)), spread(visits, 0) if any(visits) else None])
        rows[-1] += [percent([late(r, *columns, n=1) for r in runs(name)]) for columns in BESIDE.values()]
    return markdown(" | ".join(["recipe", "seeds", "rows of supervision", *BESIDE]), rows)


def recipes_table():
    done = {name: recipe for name, recipe in STORY.recipes.items() if runs(name)}
    rows = [[code(name), code(recipe.flags), len(runs(name))] for name, recipe in done.items()]
    return markdown("recipe | flags | seeds", rows)


def pressure_table():
    """Who pushes the logits of the open tag and of the end token? Per RL step and 1,000 trained tokens, all
    places together (rl_step.pressure); mean over the run, then over seeds"""
    rows = []
    for name in [name for name in PUSHED if runs(name)]:
        for token in ("open", "end"):
            parts = []
            for part in PRESSURES:
                parts.append(1000 * mean(late(r, f"push/{token}|{part}", n=len(r)) for r in runs(name)))
            rows.append([code(name), token, *(f"{push:+.2f}" for push in (*parts, sum(parts)))])
    return markdown("recipe | token | sampled in a clean message | sampled in a malformed one | "
                    "others, A > 0 | others, A < 0 | sum", rows)


PUSHED = ("lr1e-3", "lr2e-4", "lr2e-4+mask", "lr2e-4+mask+strict", "lr2e-4+mask+ets+phases")


def autopsy_table():
    """What autopsy.py --json has written, a file per base: a column per wreck, beside the base that it
    started from"""
    reports = {}
    for path in sorted(DATA.glob("autopsy*.json"), key=lambda path: path.stem):   # the shipped one first
        reports |= json.loads(path.read_text())
    first, rows = next(iter(reports.values())), []
    for line in [line for line in first if not line.startswith("base: ") and line != "risers"]:
        plain, cells = line.removeprefix("model: "), []
        for report in reports.values():
            both = [report.get(f"base: {plain}"), report.get(line)]
            cells.append(" / ".join("" if value is None else f"{value:.2f}" for value in both).strip(" /"))
        shown = plain.replace("<|im_end|>", "the end token")         # Markdown eats it, and bare tags
        rows.append([re.sub(r"</?tool_call>", r"`\g<0>`", shown), *cells])
    risen = []
    for report in reports.values():
        highest = report["risers"][:2]
        risen.append(", ".join(f"{code(repr(token))} {after:.2f}" for token, _, after in highest))
    rows.append(["what rose most where it does not belong, mean probability", *risen])
    return markdown(" | ".join(["base / wreck", *(code(Path(run).name) for run in reports)]), rows)


TABLES = {name: functools.partial(recipe_table, names) for name, names in PARTS.items()}
TABLES |= {"recipes": recipes_table, "claims": claims_table, "beside": beside_table,
           "pressure": pressure_table, "autopsy": autopsy_table}
PAGES = (ROOT / "README.md", DATA / "README.md")
# What finds the tables on a page; groups: the table's name, its lines
MARKED = re.compile(r"(?<=<!-- story: )(\S+) -->\n((?:\|[^\n]*(?:\n(?=\|))?)*)")


def rewrite():
    for page in PAGES:
        page.write_text(MARKED.sub(lambda m: f"{m[1]} -->\n{TABLES[m[1]]()}", page.read_text()))


# ------------------------------------------------------------------------------------------------------------
# 3. Pictures
RED, BLUE = "#b2182b", "#1b5e9b"


@dataclass
class Pair:
    """A picture: collapse, cause, cure"""
    alone: str                                   # the recipes
    cured: str
    wreck: str                                   # their labels
    cure: str
    reward: str                                  # the metric
    title: str


PICTURES = {
    "story.png": Pair("lr1e-3", "lr1e-3+ets", "RL alone", "RL + ETS, same update", "reward",
                      "RL alone collapses; with ETS it holds"),
    "spike.png": Pair("lr2e-4+mask", "lr2e-4+mask+ets", "RL, control tokens unpunished",
                      "... + ETS, same update", "reward_clean",
                      "Unpunished control tokens, and the cure")}


def picture(png, pair):
    """The reward of every seed; one run's messages and tokens; the tests at the end"""
    fig, axes = pyplot().subplots(1, 3, figsize=(11, 3.5), width_ratios=[1, 1.1, 0.9])
    rewards(axes[0], pair)
    messages(axes[1], runs(pair.alone)[0])
    tests(axes[2], pair)
    fig.tight_layout()
    fig.savefig(png, dpi=130, facecolor="white")         # readable on a dark page too


def rewards(ax, pair):
    lines = (pair.alone, RED, "-", pair.wreck), (pair.cured, BLUE, "--", pair.cure)
    for name, colour, dashes, label in lines:
        done = [smooth(records, pair.reward) for records in runs(name)]
        for steps, values in done:
            ax.plot(steps, values, dashes, color=colour, lw=0.6, alpha=0.6)
        middle = [mean(values) for values in zip(*(values for _, values in done))]
        label = f"{label} ({len(done)} seeds)"
        ax.plot(done[0][0], middle, dashes, color=colour, lw=2.2, label=label)
    ax.set_title(pair.title)
    ax.set_xlabel(f"step (learning rate {pair.alone[2:6]})")
    ax.set_ylabel("reward, mean of 5 steps" if pair.reward == "reward" else
                  "solved with clean messages, mean of 5 steps")
    ax.set_ylim(0, 1.05)
    ax.legend(loc="upper left")


def messages(ax, records):
    """Shares of the messages' states, stacked; over them the two control tokens where they are wrong"""
    rolled = [r for r in records if "reward" in r]
    shares = [[r[f"state/{state}"] for r in rolled] for state in STATES]
    colours, hatches = zip(*(FILLS[state] for state in STATES))
    ax.stackplot([r["step"] for r in rolled], shares, labels=STATES, colors=colours, hatch=hatches,
                 alpha=0.75, edgecolor="white", lw=0.2)
    for column, style, label in (("p/open|text", "k-o", "p(<tool_call>) where text should begin"),
                                 ("p/end|open", "k--s", "p(<|im_end|>) right after <tool_call>")):
        ax.plot(*smooth(records, column, 1), style, ms=3, lw=1.4, label=label)
    ax.set_ylim(0, 1)
    ax.set_xlim(0, rolled[-1]["step"])
    ax.set_title("Why, seed 0: control tokens rise where they are wrong")
    ax.set_ylabel("share of messages; probability")
    ax.set_xlabel("step")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncol=4, fontsize=6, columnspacing=1)


def tests(ax, pair):
    base = json.loads((DATA / "base.json").read_text())
    bars = (("base", "#bbbbbb", "", None), ("RL", RED, "xx", pair.alone),
            ("RL + ETS", BLUE, "///", pair.cured))
    for k, (label, colour, hatch, name) in enumerate(bars):
        for x, score in enumerate(TESTS.values()):
            values = [100 * base[score.removeprefix("final/")]]
            if name:
                values = [100 * late(records, score, n=1) for records in runs(name)]
            middle = mean(values)
            ax.bar(x + 0.27 * (k - 1), middle, 0.25, color=colour, hatch=hatch, edgecolor="black", lw=0.4,
                   yerr=[[middle - min(values)], [max(values) - middle]], capsize=2, error_kw={"lw": 0.8},
                   label=label if x == 0 else None)
            ax.text(x + 0.27 * (k - 1), max(values) + 1, f"{middle:.0f}", ha="center", fontsize=7)
    ax.set_xticks(range(len(TESTS)), ["test tasks", "other syntax", "new tools"])
    ax.set_title("Test scores at the end")
    ax.set_ylabel("solved with clean messages, %\n(whiskers: lowest, highest seed)")
    ax.set_ylim(0, 68)
    ax.legend(loc="upper right", ncol=3)


# ------------------------------------------------------------------------------------------------------------
# 4. The command line


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("--picture", action="store_true", help="draw results/story/*.png again")
    args = p.parse_args(argv)
    jobs = [(name, seed) for name, seed in jobs_of(STORY, args, p.error) if name not in RETIRED]
    if not jobs:
        p.error(f"--only {' '.join(args.only)}: that schedule has left the code; commit 75547fd has it")
    if args.tables:
        rewrite()
    elif args.picture:
        for name, pair in PICTURES.items():
            picture(DATA / name, pair)
    elif args.list:
        for name, seed in jobs:
            state = "done   " if STORY.packed(name, seed).exists() else "missing"
            print(state, "python train.py", *STORY.argv_of(name, seed))
    else:
        for base in {name.split("@")[1] for name, _ in jobs if "@" in name}:
            make_base(base)
        return STORY.run_all(jobs, args.parallel or 2)


def make_base(base):
    """runs/base-seed1 and its scores, story/base-seed1.json, where they are missing"""
    folder = ROOT / f"runs/base-{base}"
    argv = [*BASES[base].split(), "--eval_tasks", "0", "--out", str(folder)]
    if not folder.exists() and STORY.call(f"{folder}.log", argv, "results/make_base.py"):
        sys.exit(f"the base cannot be made; see {folder}.log")
    STORY.evaluate_base(f"base-{base}", ["--model", str(folder)])


if __name__ == "__main__":
    sys.exit(main())
