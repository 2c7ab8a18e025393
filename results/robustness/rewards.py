"""results/robustness/rewards.py -- what policies earn that do not do the work, in both worlds.

    python results/robustness/rewards.py                        the embedded world, 300 tasks of each category
    python results/robustness/rewards.py --world tiny bfcl      ... and BFCL's 200: the tables of rewards.md

Nothing is sampled here: a policy is a script of calls, made from the ground truth, one call in a message;
every user turn ends with "Done." `lenient` is the paper's rule and BFCL's own verdict, `strict` the second.
"""
import argparse
import pickle
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from rollout import Message  # noqa: E402
from tools import CATEGORIES, UserError, bfcl_stories, make_tasks  # noqa: E402

JUNK = ("junk", {})                              # no world has this tool


# ------------------------------------------------------------------------------------------------------------
# 1. The policies: a task -> the calls of every user turn


def ground_truth(task):
    return [turn.calls for turn in task.turns]


def nothing(task):
    return [[] for _ in task.turns]


def junk(task):
    return [[JUNK] for _ in task.turns]


def each_twice(task):
    return [[call for call in turn.calls for _ in range(2)] for turn in task.turns]


def at_once(task):
    return [sum(ground_truth(task), [])] + nothing(task)[1:]


def at_once_then_junk(task):
    return at_once(task)[:1] + junk(task)[1:]


@dataclass
class Played:
    """A call of the ground truth. is_read: it left all apps as they were"""
    turn: int
    call: tuple                                  # ("read_file", {"name": "plan"})
    result: str
    is_read: bool


def played(task):
    apps, log = task.fresh_apps(), []
    for t, turn in enumerate(task.turns):
        for name, args in turn.calls:
            before = pickle.dumps(apps)
            result = task.call(apps, name, args)
            log.append(Played(t, (name, args), result, pickle.dumps(apps) == before))
    return log


def junk_for_reads(task):
    script = nothing(task)
    for p in played(task):
        script[p.turn].append(JUNK if p.is_read else p.call)
    return script


def junk_for_known_reads(task):
    """A read is not made if an earlier call had its result: BFCL's rule looks at all results so far."""
    script, needed, seen = nothing(task), Counter(), Counter()
    for p in played(task):
        needed[p.turn, p.result] += 1
        known = p.is_read and needed[p.turn, p.result] <= seen[p.result]
        script[p.turn].append(JUNK if known else p.call)
        seen[p.result] += not known
    return script


def reads_first(task):
    """All reads of the story at the beginning of the first turn; where they belong, junk"""
    script = junk_for_reads(task)
    script[0] = [p.call for p in played(task) if p.is_read] + script[0]
    return script


POLICIES = {"the ground truth": ground_truth, "nothing": nothing, "junk in every turn": junk,
            "each call twice": each_twice, "all calls in the first turn": at_once,
            "... and then junk in every turn": at_once_then_junk, "junk for every read": junk_for_reads,
            "junk for a read whose result is known": junk_for_known_reads,
            "all reads in the first turn, then junk for them": reads_first}


# ------------------------------------------------------------------------------------------------------------
# 2. The table


def reward(task, script, closing):
    env = task.env("A", closing)
    for calls in script:
        for call in calls:
            env.step(Message("", "call", [call]))
        env.step(Message("Done.", "reply"))
    return env.grade()


def solved(tasks, policy):
    """-> "113, 0 of 300": under the lenient and the strict rule, of the tasks where it is no ground truth"""
    scripts = [(task, POLICIES[policy](task)) for task in tasks]
    tried = [(task, s) for task, s in scripts if s != ground_truth(task) or policy == "the ground truth"]
    lenient = sum(reward(task, script, "lenient") for task, script in tried)
    strict = sum(reward(task, script, "strict") for task, script in tried)
    return f"{lenient:.0f}, {strict:.0f} of {len(tried)}"


def table(name, tasks):
    """table("tiny", {"base": [Task, ...], ...}) -> markdown, a line for each policy"""
    lines = [f"| {name}: lenient, strict | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    for policy in POLICIES:
        cells = [solved(tasks[category], policy) for category in tasks]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tiny_tasks(n):
    return {category: make_tasks("test", category, n) for category in CATEGORIES}


def bfcl_tasks(n):
    return {category: bfcl_stories(category)[:n] for category in CATEGORIES}


def main(argv=None):
    p = argparse.ArgumentParser(description="What policies earn that do not do the work.")
    p.add_argument("--world", nargs="+", choices=("tiny", "bfcl"), default=["tiny"])
    args = p.parse_args(argv)
    try:
        if "tiny" in args.world:
            print(table("tiny", tiny_tasks(300)))
        if "bfcl" in args.world:
            print("\n" + table("bfcl", bfcl_tasks(200)))
    except UserError as error:
        print(f"rewards.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
