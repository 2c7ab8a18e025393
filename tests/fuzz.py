"""tests/fuzz.py -- hostile text against the parser, the worlds and the tokenizer: whatever a model says,
nothing may raise.

    python tests/fuzz.py messages --n 1000000 --seed 0           texts through parse, JSON, copies, Chat
    python tests/fuzz.py conversations --n 100000 --seed 0       ... and through Env, to the grade

Case i of a seed is always the same, whatever --n is: `--only i` plays it alone, with its traceback. Counts of
what was tried stand at the end, failures before them; the exit status is 1 if there are any. pytest runs a
small slice (test_rollout.py).
"""
import argparse
import copy
import functools
import importlib.util
import json
import pickle
import random
import sys
from collections import Counter
from pathlib import Path
from unicodedata import normalize

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

from tqdm import tqdm  # noqa: E402

from make_base import tiny_tokenizer  # noqa: E402
from rollout import CLOSE, CONTROL, OPEN, STATES, Chat, parse, truth_script, write_calls  # noqa: E402
from tools import CATEGORIES, bfcl_stories, make_tasks  # noqa: E402

PIECES = [*CONTROL, "{", "}", "[", "]", "(", ")", '"name": ', '"arguments": ', '"', "'", "f", "=", ",", ":",
          "\\", "\\u", "\\ud800", "\\x00", "\n", "\r", "\t", "\0", " ", "#", "*", "1e999", "NaN", "-", "0x",
          "9" * 30, "None", "true", "\ud800", "\udfff", "\uff46", "\ufb03", "\u2028", "\u202e", "\U0001f600",
          "e\u0301", "\ufeff", '{"name": "f", "arguments": {}}', "[f(a=1)]", f"{OPEN}\n", f"\n{CLOSE}"]


# ------------------------------------------------------------------------------------------------------------
# 1. Texts


def fuzzed_value(rng, depth=0):
    """A value that a call may hold, or should not"""
    kinds = ["text", "letters", "number", "huge", "odd", "nested"] + ["list", "dict"] * (depth < 4)
    kind = rng.choice(kinds)
    if kind == "text":
        return rng.choice(["plan", "bob", ".", "..", "/", "", "a b", "it's", "None", "<|im_end|>", OPEN])
    if kind == "letters":                        # from everywhere, halves of characters too
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, 8)))
    if kind == "number":
        return rng.choice([0, 1, -1, 5, 2.5, -0.0, 1e300, 10 ** 15, True, None])
    if kind == "huge":
        return rng.choice([10 ** 400, -10 ** 4000, 2 ** 64, 1e308])
    if kind == "odd":
        return rng.choice([float("inf"), float("nan"), (), (1, "a"), {}, []])
    if kind == "nested":
        value = 1
        for _ in range(rng.choice([3, 30, 31, 32, 33, 100, 800])):
            value = [value] if rng.random() < 0.9 else {"a": value}
        return value
    if kind == "list":
        return [fuzzed_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    keys = rng.sample(["a", "b", "name", "\ud800", "x y"], rng.randint(0, 3))
    return {key: fuzzed_value(rng, depth + 1) for key in keys}


def fuzzed_call(rng, call):
    """("f", {"x": 1}) -> the same call with another name, with values changed, arguments gone or new ones"""
    name, args = call
    args = dict(args)
    for key in list(args):
        if rng.random() < 0.4:
            args[key] = fuzzed_value(rng)
        elif rng.random() < 0.1:
            del args[key]
    if rng.random() < 0.2:
        args[rng.choice(["x", "self", "name", "amount", "path"])] = fuzzed_value(rng)
    return (rng.choice(["", "__init__", "apps", "f\ud800", "no tool"]) if rng.random() < 0.05 else name), args


def written(calls, syntax):
    """Where Python cannot write a value (800 lists in each other), a text that could be meant"""
    try:
        return write_calls(calls, syntax)
    except (RecursionError, ValueError):
        deep = "[" * 800 + "]" * 800
        if syntax == "B":
            return f"[f(a=0x{'f' * 5000}, b={deep})]"
        return f'{OPEN}{{"name": "f", "arguments": {{"a": {"9" * 5000}, "b": {deep}}}}}{CLOSE}'


def edited(rng, text):
    """A few slips: something falls out, stands twice, comes in, moves, or the rest is missing"""
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        cut = rng.choice([text[:i] + text[j:], text[:j] + text[i:], text[:i] + rng.choice(PIECES) + text[i:],
                          text[:i] + rng.choice(PIECES) + text[j:], text[j:] + text[:i], text[:i]])
        text = cut[:30_000]
    return text


def fuzzed_text(rng, call, syntax):
    """A message that is, more or less, `call`"""
    kind = rng.choice(["edited", "edited", "values", "values", "edited values", "pieces", "letters", "two",
                       "long"])
    calls = [fuzzed_call(rng, call)] if "values" in kind else [call]
    if kind == "pieces":
        return "".join(rng.choices(PIECES, k=rng.randint(0, 40)))
    if kind == "letters":
        limit = rng.choice([0x80, 0x3000, 0x110000])
        return "".join(chr(rng.randrange(limit)) for _ in range(rng.randint(0, 60)))
    if kind == "two":
        first, second = written(calls, syntax), written(calls, rng.choice("AB"))
        return rng.choice(["", "I look. ", "# "]) + first + rng.choice(PIECES) + second
    if kind == "long" and rng.random() < 0.02:
        return rng.choice(PIECES) * rng.choice([100, 3000])
    text = written(calls, syntax)
    return edited(rng, text) if "edited" in kind else text


# ------------------------------------------------------------------------------------------------------------
# 2. What must hold


def check_message(chat, text, syntax, ended=True):
    """-> the Message"""
    message = parse(text, syntax, ended)
    assert message.state in STATES and parse(message.text, syntax, ended) == message
    assert message.state != "call" or not any(isinstance(call, str) for call in message.calls)
    stored = json.dumps(message.calls, allow_nan=False, ensure_ascii=False)
    same = json.loads(stored.encode()), json.loads(json.dumps(json.loads(stored)))
    assert same[0] == same[1] and len(same[0]) == len(message.calls)
    assert copy.deepcopy(message) == message == pickle.loads(pickle.dumps(message))
    ids = chat.message(text)
    assert ids[-1] == chat.end_id and not forbidden(chat) & set(ids[:-1])
    lossless = text.encode("utf-8", "replace").decode()              # but for what Qwen's tokenizer composes
    assert normalize("NFC", chat.text(ids[:-1])) == normalize("NFC", lossless)
    return message


@functools.cache
def forbidden(chat):
    """The control tokens that no message of somebody else holds"""
    return {i for token, i in chat.control_ids().items() if token not in (OPEN, CLOSE)}


def check_observation(chat, text):
    ids = chat.observation(text, 256)
    inside = ids[len(chat.head):-len(chat.foot)]
    assert len(inside) <= 256 and chat.end_id not in inside


def check_conversation(chat, rng, task, syntax, closing):
    """The truth of a task, with slips, to the end -> how many messages it had"""
    env, script, said = task.env(syntax, closing), truth_script(task, syntax), 0
    slips = rng.choice([0.1, 0.5, 1.0])          # how often a message is not the ground truth
    while env.status is None and said < 30:
        turn = task.turns[env.turn]
        text = script[env.turn][min(env.turn_calls, len(turn.calls))]
        if rng.random() < slips:
            text = fuzzed_text(rng, rng.choice(right_calls(task)), syntax)
        message = check_message(chat, text, syntax, ended=rng.random() > 0.01)
        if rng.random() < 0.1:
            env = copy.deepcopy(env) if rng.random() < 0.5 else pickle.loads(pickle.dumps(env))
        answer, said = env.step(message), said + 1
        if answer is not None:
            check_observation(chat, answer)
    assert env.grade() in (0.0, 1.0) and copy.deepcopy(env).grade() == pickle.loads(pickle.dumps(env)).grade()
    return said


# ------------------------------------------------------------------------------------------------------------
# 3. The cases


@functools.cache
def chat_of_the_base():
    return Chat(tiny_tokenizer())


@functools.cache
def tasks(world):
    if world == "bfcl":
        return [task for category in CATEGORIES for task in bfcl_stories(category)]
    held_out = make_tasks("test", "base", 50, held_out=True)
    return [task for category in CATEGORIES for task in make_tasks("train", category, 100)] + held_out


def right_calls(task):
    return [call for turn in task.turns for call in turn.calls] or [("f", {})]


def message_case(rng, counts):
    """One text, in both syntaxes"""
    text = fuzzed_text(rng, rng.choice(right_calls(rng.choice(tasks("tiny")))), rng.choice("AB"))
    for syntax in "AB":
        counts[f"{syntax} {check_message(chat_of_the_base(), text, syntax).state}"] += 1
    check_observation(chat_of_the_base(), text)


def conversation_case(rng, counts):
    """A tenth of them on BFCL, if its package is here: its worlds are slow"""
    has_bfcl = importlib.util.find_spec("bfcl_eval") is not None
    world = "bfcl" if has_bfcl and rng.random() < 0.1 else "tiny"
    syntax, closing = rng.choice("AB"), rng.choice(["lenient", "strict"])
    counts[f"{world} {syntax} {closing}"] += 1
    task = rng.choice(tasks(world))
    counts["messages"] += check_conversation(chat_of_the_base(), rng, task, syntax, closing)


CASES = {"messages": message_case, "conversations": conversation_case}


def fuzz(kind, cases, seed):
    """-> what was tried, and [(case, its exception)]"""
    counts, failures = Counter(), []
    for i in tqdm(cases, desc=kind, disable=None):
        try:
            CASES[kind](random.Random(f"{kind} {seed} {i}"), counts)
        except Exception as error:
            failures.append((i, error))
    return counts, failures


def main(argv=None):
    p = argparse.ArgumentParser(description="Hostile text: whatever a model says, nothing may raise.")
    p.add_argument("kind", choices=CASES)
    p.add_argument("--n", type=int, default=10_000, help="cases; default 10000")
    p.add_argument("--seed", type=int, default=0, help="default 0")
    p.add_argument("--only", type=int, metavar="I", help="case I alone, with its traceback")
    args = p.parse_args(argv)
    if args.only is not None:
        CASES[args.kind](random.Random(f"{args.kind} {args.seed} {args.only}"), Counter())
        return 0
    counts, failures = fuzz(args.kind, range(args.n), args.seed)
    for i, error in failures[:20]:
        print(f"--only {i}: {error!r:.200}")
    print(f"{args.n} {args.kind}, seed {args.seed}: {len(failures)} failed")
    print("  ".join(f"{name}: {n}" for name, n in sorted(counts.items())))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
