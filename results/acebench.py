"""results/acebench.py -- a model on ACEBench's `normal` entries: tools that BFCL never shows, so content-OOD.

    python results/acebench.py --model runs/NAME --data data_all/data_en                    all 823 entries
    python results/acebench.py --model runs/NAME --data data_all/data_en --n 50 --out ace.json --engine vllm

One request, one message; its calls are compared with an answer, and nothing runs. An entry is asked twice: in
brackets, as ACEBench asks (ace_brackets; after training in tags new in format and content), and in tags
(ace_tags; new in content only). All further flags are those of train.py --world bfcl --eval_only.
"""
import argparse
import contextlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers.utils import logging as hf_logging  # noqa: E402

import train  # noqa: E402
from analyze_tokens import table  # noqa: E402
from sft_step import rank  # noqa: E402
from tools import DONE, WORLDS, Env, Task, Turn, UserError, tool_system  # noqa: E402
from toolace import read_entries  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# 1. An entry as a Task, and when a message solves it


@dataclass
class AceTask(Task):
    """turns[0].calls holds the first answer; init holds all of them: [[("f", {"x": "1"}), ...], ...]"""
    context: str = ""                            # "The current time is ...", or the user's profile
    required: dict = field(default_factory=dict)                     # {"f": ["x"]}

    def system(self, syntax):
        system = tool_system(self.docs.values(), syntax)
        return f"{system}\n\n{self.context}" if self.context else system

    def fresh_apps(self):
        return {}                                # nothing runs

    def env(self, syntax="A", closing="lenient"):
        return AceEnv(self, syntax, closing)


class AceEnv(Env):
    """One message, and it is over: what stands beside the calls does not matter."""

    def step(self, message):
        if message.state == "cut":
            return self.stop("message_tokens_limit")
        if not any(ace_solved(message.calls, answer, self.task.required) for answer in self.task.init):
            self._fail()
        return self.stop("finished")


def ace_solved(calls, answer, required):
    """ACEBench's rule: as many calls as the answer has, and for each call of the answer one that matches it.
    (Its checker also compares the types of numbers and booleans but not their values; here they must be
    equal.)"""
    def matches(call, name, wanted):
        called, args = call
        return (called == name and set(required.get(name, [])) <= args.keys() <= wanted.keys()
                and all(ace_equal(value, wanted[key]) for key, value in args.items()))
    if any(isinstance(call, str) for call in calls):
        return False                             # a block that cannot be read
    if Counter(name for name, _ in calls) != Counter(name for name, _ in answer):
        return False
    return all(any(matches(call, name, wanted) for call in calls) for name, wanted in answer)


def ace_equal(value, wanted, inside=False):
    """ace_equal("the city of New-York", "new york") -> True: texts without case, spaces and punctuation; the
    wanted one may be a part of what was said, except in lists (`inside`)."""
    if isinstance(wanted, str):
        if not isinstance(value, str):
            return False
        return squash(value) == squash(wanted) if inside else squash(wanted) in squash(value)
    if isinstance(wanted, dict):
        same_keys = isinstance(value, dict) and value.keys() == wanted.keys()
        return same_keys and all(ace_equal(value[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        same_length = isinstance(value, (list, tuple)) and len(value) == len(wanted)
        return same_length and all(ace_equal(v, w, inside=True) for v, w in zip(value, wanted))
    if isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    return value == wanted


def squash(text):
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


# ------------------------------------------------------------------------------------------------------------
# 2. The entries


def acebench_tasks(folder, n=None):
    """A folder with data_normal_*.json and possible_answer/ -> the first n [AceTask]; the English release has
    823"""
    files, tasks = sorted(Path(folder).glob("data_normal_*.json")), {}
    if not files:
        raise UserError(f"--data {folder} has no data_normal_*.json; name ACEBench's folder data_all/data_en")
    for file in files:
        answers = file.parent / "possible_answer" / file.name
        truths = {}
        for line, answer in read_entries(answers).items():
            with readable(answers, line):
                once(truths, of_type(answer["id"], str), answer["ground_truth"])
        for line, entry in read_entries(file).items():
            with readable(file, line):
                once(tasks, of_type(entry["id"], str), ace_task(entry, truths[entry["id"]]))
    return list(tasks.values())[:n]


@contextlib.contextmanager
def readable(file, line):
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{file}:{line} is no entry of ACEBench ({error!r:.200}).") from error


def once(known, id, value):
    if id in known:
        raise ValueError(f"{id} is there twice")
    known[id] = value


def of_type(value, kind):
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.60} is no {kind.__name__}")
    return value


def ace_task(entry, truth):
    """truth: {"f_1": {"x": "1"}, "f_2": {"x": "2"}} (f twice), or a list of such answers, each one right"""
    answers = []
    for answer in truth if isinstance(truth, list) else [truth]:
        answers.append([(re.sub(r"_\d+$", "", name), of_type(args, dict)) for name, args in answer.items()])
    docs, required = {}, {}
    for doc in entry["function"]:
        name = of_type(doc["name"], str)
        docs[name] = json.dumps({"type": "function", "function": doc}, ensure_ascii=False)
        required[name] = of_type(doc.get("parameters", {}).get("required", []), list)
        set(required[name])                      # of names, not of lists
    context = f"Character profile:\n{entry['profile']}" if "profile" in entry else entry.get("time", "")
    turn = Turn("Conversation history 1..t:\n" + entry["question"], answers[0], DONE)
    "".join([*docs.values(), of_type(context, str), turn.user]).encode()         # no half characters
    return AceTask(entry["id"], "acebench", docs, apps=[], init=answers, turns=[turn], context=context,
                   required=required)


# ------------------------------------------------------------------------------------------------------------
# 3. The evaluation, with the pieces of train.py


def main(argv=None):
    p = argparse.ArgumentParser(
        usage="python results/acebench.py --model MODEL --data DIR [--n N] [--out FILE] [--flag value ...]",
        description="A model on ACEBench's `normal` entries. All further flags are train.py's.",
        allow_abbrev=False)
    p.add_argument("--data", required=True, metavar="DIR", help="ACEBench's folder data_all/data_en")
    p.add_argument("--n", type=int, help="only the first N entries")
    p.add_argument("--out", metavar="FILE", help="write the scores there, as JSON")
    own, further = p.parse_known_args(argv)
    if own.n is not None and own.n < 1:
        p.error(f"--n {own.n} must be at least 1")
    args = train.parse_args(["--world", "bfcl", "--eval_only", *further])
    if own.out and not Path(own.out).resolve().parent.is_dir():
        raise UserError(f"--out {own.out}: there is no such folder; make it first.")
    tasks = acebench_tasks(own.data, own.n)
    sets = {"ace_brackets": [(task, "B") for task in tasks], "ace_tags": [(task, "A") for task in tasks]}
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    device = train.start_processes(args)
    model, chat = train.load_model(train.starting_point(args), args, device)
    train.refuse_long_prompts(chat, train.limits_of(args, "test"), *sets.values())
    engine = train.make_engine(args, model, chat)
    with train.sampling(engine, model):
        scores = train.evaluate(engine, chat, sets, WORLDS[args.world](args), args)
    scores = {name: score for name, score in scores.items() if name.startswith("ace_")}
    train.say(table({"score": scores}))
    if own.out and rank() == 0:
        train.write_atomically(own.out, json.dumps(scores, indent=1))


def cli(argv=None):
    """main, with user mistakes as one sentence and exit status 2"""
    try:
        main(argv)
    except UserError as error:
        print(f"acebench.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
