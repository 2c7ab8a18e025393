"""tools.py -- the world an agent acts in. Floor 0: plain Python, no torch.

    1. apps     small stateful Python objects; every public method is a tool
    2. messages `parse` turns one assistant message into its calls and its structural STATE
    3. env      the multi-turn conversation: user turns, tool results, grading
    4. tasks    a seeded generator of stories in BFCL's four categories, and their demonstrations
    5. BFCL     the same game on real data: BFCL's own tasks and simulators (--world bfcl)
    6. ACEBench, ToolACE   single-turn calls graded against an answer; dialogues as SFT data

The paper (arXiv 2606.26027) trains on BFCL multi-turn: a user asks for things over several turns, the model calls
tools, and the reward is 1 only if EVERY user turn ended in the right state with the right results, else 0. A message
without a complete call ends the user turn. This file holds that game, small enough for a laptop:

    system     You can call these tools: ... (and how a call is written)
    user       create the file "plan" with text "red"                              <- user turn 1
    assistant  <tool_call>{"name": "create_file", "arguments": {...}}</tool_call>   state: call
    user       <tool_response> created "plan" </tool_response>                     <- the tool's answer, same role as in the paper
    assistant  Done.                                                               state: reply   (ends user turn 1)
    user       ...                                                                 <- user turn 2
"""
import ast
import contextlib
import copy
import decimal
import functools
import importlib
import inspect
import json
import random
import re
import sys
import threading
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


class UserError(Exception):
    """A mistake of the person at the keyboard: train.py prints its one sentence and exits with status 2."""


# ----------------------------------------------------------------------------------------------------------------------
# 1. The apps. State = public attributes (what grading compares); tools = public methods (what the model may call).
#    A wrong call raises; Env turns the exception into an "Error: ..." observation, as a real tool server would.


class Files:
    def __init__(self, rng):
        self.files = {name: rng.choice(WORDS) for name in rng.sample(WORDS, 3)}  # {"plan": "red", ...}

    def create_file(self, name, text):
        if name in self.files:
            raise ValueError(f'the file "{name}" exists')
        self.files[name] = text
        return f'created "{name}"'

    def read_file(self, name):
        return self.files[name]

    def delete_file(self, name):
        del self.files[name]
        return f'deleted "{name}"'


class Mail:
    def __init__(self, rng):
        self.inbox = {sender: rng.choice(WORDS) for sender in rng.sample(PEOPLE, 3)}
        self.sent = []  # [["bob", "red"], ...] in order

    def send_mail(self, to, text):
        self.sent.append([to, text])
        return f'sent to "{to}"'

    def read_mail(self, sender):
        return self.inbox[sender]

    def delete_mail(self, sender):
        del self.inbox[sender]
        return f'deleted "{sender}"'


class Bank:
    def __init__(self, rng):
        self.balance = rng.randint(40, 90)
        self.paid = []

    def pay_money(self, to, amount):
        if not 0 < amount <= self.balance:
            raise ValueError(f"cannot pay {amount}")
        self.balance -= amount
        self.paid.append([to, amount])
        return f'paid "{to}"'

    def check_balance(self):
        return self.balance


class Shop:
    def __init__(self, rng):
        self.cart = {name: rng.randint(1, 9) for name in rng.sample(WORDS, 3)}

    def add_item(self, name, amount):
        self.cart[name] = self.cart.get(name, 0) + amount
        return f'added "{name}"'

    def remove_item(self, name):
        del self.cart[name]
        return f'removed "{name}"'

    def count_item(self, name):
        return self.cart[name]


class Post:
    """Held out: no training task, demonstration or tool list ever shows this app (content-OOD). Its tools are new, but
    they are spelled with words that training does show (send_mail, add_item -> send_item): a model cannot write a token
    that it has never seen, and then the score would say nothing about format or tool use."""

    def __init__(self, rng):
        self.parcels = {name: rng.choice(PEOPLE) for name in rng.sample(WORDS, 3)}

    def send_item(self, name, to):
        if name in self.parcels:
            raise ValueError(f'"{name}" is on its way')
        self.parcels[name] = to
        return f'sent "{name}"'

    def check_item(self, name):
        return self.parcels[name]

    def delete_item(self, name):
        del self.parcels[name]
        return f'deleted "{name}"'


APPS = {"files": Files, "mail": Mail, "bank": Bank, "shop": Shop, "post": Post}
HELD_OUT = "post"
PEOPLE = "ann bob carl dora eve finn gina hugo iris jack kim liam mona nick olga paul".split()
WORDS = """plan list note song poem game lamp desk door road tree bird fish moon star rain snow wind gold blue green black
white bread milk tea cake rice soup apple monday friday sunday winter summer north south""".split()

# {"files": {"create_file": "create_file(name, text)", ...}, ...}: only these names can be called, so no text of a model
# ever reaches an attribute that is not a tool
DOCS = {app: {name: f"{name}({', '.join(list(inspect.signature(method).parameters)[1:])})"
              for name, method in vars(cls).items() if not name.startswith("_")} for app, cls in APPS.items()}
TOOL_APP = {tool: app for app, docs in DOCS.items() for tool in docs}  # {"create_file": "files", ...}


# ----------------------------------------------------------------------------------------------------------------------
# 2. Messages. What an assistant message IS, structurally. The paper's four states, plus two that real logs need:
#      call       one or more complete, valid calls; plain text may stand before them, nothing after
#      reply      text without any tool artefact
#      polluted   tags or calls that are incomplete, misplaced or unreadable; control tokens inside text
#      collapsed  the open tag and then the end, nothing else: `<tool_call><|im_end|>`
#      empty      the end at once
#      cut        the length limit came before the end token
STATES = ("call", "reply", "polluted", "collapsed", "empty", "cut")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CONTROL = (OPEN, CLOSE, "<tool_response>", "</tool_response>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
CALL_IN_TEXT = re.compile(r'"name"\s*:|"arguments"\s*:|^\s*\[\s*\w+\(|\w\(\w+\s*=')  # a call without its tags, or in the other syntax


@dataclass
class Message:
    """parse('<tool_call>\\n{"name": "read_file", "arguments": {"name": "plan"}}\\n</tool_call>')
    -> Message(text=..., state="call", calls=[("read_file", {"name": "plan"})])

    A block whose body cannot be read stands in `calls` as an error string, which becomes its tool response."""
    text: str
    state: str
    calls: list = field(default_factory=list)  # [(name, {argument: value}) | "Error: ..."]


def _reject(constant):
    raise ValueError(f"{constant} is not JSON")  # NaN != NaN would make every later state check fail


def _json_call(body):
    try:
        call = json.loads(body, parse_constant=_reject)
    except (ValueError, RecursionError):  # ValueError covers bad JSON and integers of thousands of digits
        return "Error: the call is not valid JSON"
    if not (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)):
        return 'Error: a call needs "name" and "arguments"'
    return call["name"], call["arguments"]


def _bracket_calls(text):
    """"[f(a='x'), g()]" -> [("f", {"a": "x"}), ("g", {})]; None if it is not that. The text is parsed, never run."""
    if len(text) > 20_000:
        return None  # Python's parser needs stack space in proportion to nesting; no real call is this long
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(tree, ast.List) and tree.elts):
            return None
        calls = []
        for node in tree.elts:
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
                return None
            if any(k.arg is None for k in node.keywords):
                return None
            calls.append((node.func.id, {k.arg: ast.literal_eval(k.value) for k in node.keywords}))
        return calls
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def parse(text, syntax="A", ended=True):
    """One assistant message (without its end token) -> Message. Total: never raises, whatever the text.

    ended=False: the length limit cut the message, so it has no end token."""
    calls, outside, pos, whole = [], [], 0, True
    if syntax == "A":
        while True:  # walk the tags; a regex with .*? would take quadratic time on a message full of open tags
            start = text.find(OPEN, pos)
            end = text.find(CLOSE, start) if start >= 0 else -1
            if end < 0:
                outside.append(text[pos:])
                break
            outside.append(text[pos:start])
            calls.append(_json_call(text[start + len(OPEN):end]))
            pos = end + len(CLOSE)
        # text may stand before the first block; between and after the blocks only white space
        whole = all(isinstance(c, tuple) for c in calls) and not any(piece.strip() for piece in outside[1:])
    elif (found := _bracket_calls(text)) is not None:
        calls = found
    else:
        outside = [text]

    rest = "".join(outside)
    bare = rest.replace(OPEN, "").strip() if syntax == "A" else rest.replace(OPEN, "").strip().removeprefix("[")
    if not ended:
        state = "cut"
    elif not text.strip():
        state = "empty"
    elif not calls and not bare.strip():
        state = "collapsed"
    elif any(token in rest for token in CONTROL) or CALL_IN_TEXT.search(rest) or not whole:
        state = "polluted"
    elif not calls and syntax == "B" and text.strip().startswith("["):
        state = "polluted"
    else:
        state = "call" if calls else "reply"
    return Message(text, state, calls)


def write_calls(calls, syntax="A"):
    """[("f", {"a": "x"})] -> '<tool_call>\\n{"name": "f", "arguments": {"a": "x"}}\\n</tool_call>'  or  "[f(a='x')]" """
    if syntax == "B":
        return "[" + ", ".join(f"{name}({', '.join(f'{k}={v!r}' for k, v in args.items())})" for name, args in calls) + "]"
    return "\n".join(f"{OPEN}\n" + json.dumps({"name": name, "arguments": args}) + f"\n{CLOSE}" for name, args in calls)


SYNTAX_HELP = {s: "A call is written\n" + write_calls([("tool", {"key": "value"})], s) for s in "AB"}


# ----------------------------------------------------------------------------------------------------------------------
# 3. The environment. One conversation over one task: opening() -> step(message) -> ... -> grade().


@dataclass
class Turn:
    """One user turn with its ground truth. calls == [] means: no call is right here (a tool or a value is missing)."""
    user: str                                    # 'create the file "plan" with text "red"'
    calls: list                                  # [("create_file", {"name": "plan", "text": "red"})]
    reply: str                                   # "Done."
    reveal: list = field(default_factory=list)   # tools that become callable at this turn (miss_func)


@dataclass
class Task:
    id: str                                      # "base-train-17"
    category: str                                # base | miss_func | miss_param | long_context
    docs: dict                                   # {"create_file": "create_file(name, text)"}: the tools in the system message
    apps: list                                   # ["files", "mail"]
    init: object                                 # the apps' initial state: a seed that it is drawn from
    turns: list
    padded: bool = False                         # long_context: every tool result carries filler text

    # A world is these five methods; Env and grading know no other difference between worlds.
    def system(self, syntax):
        return "\n".join(["You can call these tools:", *self.docs.values(), SYNTAX_HELP[syntax]])

    def fresh_apps(self):
        rng = random.Random(self.init)
        return {app: APPS[app](rng) for app in self.apps}

    def call(self, apps, name, args):
        """-> what the model reads; raises whatever the tool raises"""
        result = getattr(apps[TOOL_APP[name]], name)(**args)
        text = result if isinstance(result, str) else json.dumps(result)
        return f"{text}\n{FILLER}" if self.padded else text

    def explain(self, error):
        return f"Error: {type(error).__name__} {error}"

    def state(self, app):
        return vars(app)


@dataclass
class Verdict:
    reward: float                                # 1.0 or 0.0
    failed_turn: int | None                      # index of the first wrong user turn; None if none was found wrong


FILLER = " ".join(f"{a} {b}" for a, b in zip(WORDS, reversed(WORDS)))


class Env:
    """Plain data all through: copy.deepcopy(env) branches a conversation, pickle stores one.

    closing="lenient" (the paper): a message without a complete call ends the user turn, WHATEVER it holds. So the
        degenerate `<tool_call><|im_end|>` is worth as much as a good reply, and calls in turns whose ground truth is
        empty go unpunished.
    closing="strict": a polluted, collapsed or empty message fails the episode, and so do calls where none is right.
    hide=False: withheld tools can be called before they are revealed (BFCL's own executor never hides them)."""

    def __init__(self, task, syntax="A", closing="lenient", hide=True):
        assert syntax in ("A", "B") and closing in ("lenient", "strict"), (syntax, closing)
        self.task, self.syntax, self.closing = task, syntax, closing
        self.apps = task.fresh_apps()            # what the model's calls change
        self.truth = task.fresh_apps()           # the twin that the ground truth changes, one turn at a time
        self.callable = set(task.docs).union(*([] if hide else [turn.reveal for turn in task.turns]))
        self.turn = 0                            # index of the current user turn
        self.turn_calls = 0                      # complete calls in this user turn
        self.results = Counter()                 # every tool result so far, as a multiset of strings
        self.status = None                       # None while running, then "finished", "format_error" or a limit's name
        self.failed_turn = None

    def opening(self):
        """The first messages, [system, user], in chat-template form."""
        return [{"role": "system", "content": self.task.system(self.syntax)},
                {"role": "user", "content": self.task.turns[0].user}]

    def step(self, message):
        """Message -> the text of the next user-role message, or None when the episode is over."""
        assert self.status is None, "step() after the end of the episode"
        if message.state == "cut":
            return self.stop("message_limit")
        if self.closing == "strict" and message.state in ("polluted", "collapsed", "empty"):
            self._fail()
            return self.stop("format_error")
        if message.calls:
            blocks = [f"<tool_response>\n{self._run(c)}\n</tool_response>" for c in message.calls]
            return "\n".join(blocks)
        self._close_turn()
        self.turn += 1
        if self.turn == len(self.task.turns):
            return self.stop("finished")
        self.callable |= set(self.task.turns[self.turn].reveal)
        return self.task.turns[self.turn].user

    def stop(self, status):
        self.status = status

    def grade(self):
        """BFCL's rule: every user turn was reached and closed, and none of them was wrong."""
        return Verdict(float(self.status == "finished" and self.failed_turn is None), self.failed_turn)

    def _fail(self):
        if self.failed_turn is None:
            self.failed_turn = self.turn

    def _run(self, call):
        if isinstance(call, str):
            return call                          # the block could not be read: its result is the error itself
        self.turn_calls += 1
        try:
            if call[0] not in self.callable:
                raise NameError(f'there is no tool "{call[0]}"')
            result = self.task.call(self.apps, *call)
        except Exception as error:               # the model's arguments can break a tool in any way; it gets to read how
            return self.task.explain(error)
        self.results[result] += 1
        return result

    def _close_turn(self):
        """Grade the turn that ends here: same state in every app, and the ground truth's results among the model's."""
        calls = self.task.turns[self.turn].calls
        needed = Counter(self.task.call(self.truth, *call) for call in calls)
        if calls:
            state = self.task.state
            same_state = all(state(self.apps[a]) == state(self.truth[a]) for a in self.apps)
            if not (self.turn_calls and same_state and needed <= self.results):
                self._fail()
        elif self.closing == "strict" and self.turn_calls:
            self._fail()
        self.turn_calls = 0


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tasks. A story is a walk through the apps: each user turn asks for one or two things that are possible NOW, so the
#    generator plays the ground truth while it writes. One entry per tool: two phrasings with the parts in another order; an
#    incomplete phrasing and the argument that it lacks (miss_param); a sampler of arguments, given the app's present state.


class Stuck(Exception):
    """The story cannot go on (nothing left to read or delete); the generator starts another one."""


def new(rng, taken, pool):
    return rng.choice([word for word in pool if word not in taken])


def old(rng, taken):
    if not taken:
        raise Stuck
    return rng.choice(sorted(taken))


ASKS = {
    "create_file": (['create the file "{name}" with text "{text}"', 'with text "{text}" create the file "{name}"'],
                    'create the file "{name}"', "text",
                    lambda rng, app: {"name": new(rng, app.files, WORDS), "text": rng.choice(WORDS)}),
    "read_file": (['read the file "{name}"', 'the file "{name}", read it'], None, None,
                  lambda rng, app: {"name": old(rng, app.files)}),
    "delete_file": (['delete the file "{name}"', 'the file "{name}", delete it'], None, None,
                    lambda rng, app: {"name": old(rng, app.files)}),
    "send_mail": (['send a mail to "{to}" with text "{text}"', 'with text "{text}" send a mail to "{to}"'],
                  'send a mail to "{to}"', "text",
                  lambda rng, app: {"to": rng.choice(PEOPLE), "text": rng.choice(WORDS)}),
    "read_mail": (['read the mail from "{sender}"', 'the mail from "{sender}", read it'], None, None,
                  lambda rng, app: {"sender": old(rng, app.inbox)}),
    "delete_mail": (['delete the mail from "{sender}"', 'the mail from "{sender}", delete it'], None, None,
                    lambda rng, app: {"sender": old(rng, app.inbox)}),
    "pay_money": (['pay money to "{to}", {amount} coins', 'pay {amount} coins of money to "{to}"'], 'pay money to "{to}"', "amount",
                  lambda rng, app: {"to": rng.choice(PEOPLE), "amount": rng.randint(1, 9)}),
    "check_balance": (["check the balance", "the balance, check it"], None, None, lambda rng, app: {}),
    "add_item": (['add the item "{name}", {amount} of it', 'add {amount} of the item "{name}"'], 'add the item "{name}"', "amount",
                 lambda rng, app: {"name": rng.choice(WORDS), "amount": rng.randint(1, 9)}),
    "remove_item": (['remove the item "{name}"', 'the item "{name}", remove it'], None, None,
                    lambda rng, app: {"name": old(rng, app.cart)}),
    "count_item": (['count the item "{name}"', 'the item "{name}", count it'], None, None,
                   lambda rng, app: {"name": old(rng, app.cart)}),
    "send_item": (['send the item "{name}" to "{to}"', 'to "{to}" send the item "{name}"'], 'send the item "{name}"', "to",
                  lambda rng, app: {"name": new(rng, app.parcels, WORDS), "to": rng.choice(PEOPLE)}),
    "check_item": (['check the item "{name}"', 'the item "{name}", check it'], None, None,
                   lambda rng, app: {"name": old(rng, app.parcels)}),
    "delete_item": (['delete the item "{name}"', 'the item "{name}", delete it'], None, None,
                    lambda rng, app: {"name": old(rng, app.parcels)}),
}
# Requests whose second call needs the first one's result: the reason why the loop is multi-STEP within a turn.
CHAINS = [
    (("files", "mail"), 'read the file "{name}", then send a mail to "{to}" with its text',
     lambda rng, a: [("read_file", {"name": (n := old(rng, a["files"].files))}),
                     ("send_mail", {"to": rng.choice(PEOPLE), "text": a["files"].files[n]})]),
    (("mail", "files"), 'read the mail from "{sender}", then create the file "{name}" with its text',
     lambda rng, a: [("read_mail", {"sender": (s := old(rng, a["mail"].inbox))}),
                     ("create_file", {"name": new(rng, a["files"].files, WORDS), "text": a["mail"].inbox[s]})]),
]
CATEGORIES = ("base", "miss_func", "miss_param", "long_context")  # BFCL's; long_context is for evaluation only


def ask(rng, apps, tools):
    """-> (phrase, [(tool, args)]) for one thing that the user can ask for now."""
    for tool in rng.sample(tools, len(tools)):
        try:
            args = ASKS[tool][3](rng, apps[TOOL_APP[tool]])
        except Stuck:
            continue                             # ask for something else
        return rng.choice(ASKS[tool][0]).format(**args), [(tool, args)]
    raise Stuck


def _make_task(rng, category, task_id, held_out):
    usable = [HELD_OUT] if held_out else rng.sample([app for app in APPS if app != HELD_OUT], rng.choice((1, 2)))
    task = Task(task_id, category, {}, usable, f"apps {rng.random()}", [])
    tools, apps = [tool for app in usable for tool in DOCS[app]], task.fresh_apps()
    chains = [chain for chain in CHAINS if set(chain[0]) <= set(usable)]
    missing = category in ("miss_func", "miss_param")              # the missing tool or value costs one more user turn
    n_requests = rng.randint(1, 3 if missing else 4)
    special = rng.randrange(n_requests) if missing else None       # which request meets it
    hidden = rng.choice(tools) if category == "miss_func" else None
    for request in range(n_requests):
        reveal = []
        if request == special and hidden:                          # the tool is not there: no call; then it is revealed
            phrase, calls = ask(rng, apps, [hidden])
            task.turns.append(Turn(phrase, [], "I have no tool for that."))
            user, reveal = f"You can now call\n{DOCS[TOOL_APP[hidden]][hidden]}", [hidden]
        elif request == special:                                   # a value is not there: no call; then it is supplied
            _, calls = ask(rng, apps, [tool for tool in tools if ASKS[tool][1]])
            (tool, args), = calls
            _, vague, lacks, _ = ASKS[tool]
            task.turns.append(Turn(vague.format(**args), [], f"What is the {lacks}?"))
            user = f"the {lacks} is " + json.dumps(args[lacks])
        elif chains and hidden is None and rng.random() < 0.25:    # the second call needs the first one's result
            _, phrase, sample = rng.choice(chains)
            calls = sample(rng, apps)
            user = phrase.format(**(calls[0][1] | calls[1][1]))
        else:
            user, calls = ask(rng, apps, [tool for tool in tools if tool != hidden or request > special])
        play = lambda calls: [getattr(apps[TOOL_APP[tool]], tool)(**args) for tool, args in calls]
        results = play(calls)
        if request != special and rng.random() < 0.25:             # two requests in one message
            phrase, more = ask(rng, apps, [tool for tool in tools if tool != hidden or request > special])
            user, calls, results = f"{user}, then {phrase}", calls + more, results + play(more)
        answers = calls[-1][0].startswith(("read", "check", "count"))
        task.turns.append(Turn(user, calls, f'It is "{results[-1]}".' if answers else "Done.", reveal))
    task.docs = {tool: DOCS[TOOL_APP[tool]][tool] for tool in tools if tool != hidden}
    return task


def make_tasks(split, category, n, seed=0, held_out=False):
    """make_tasks("train", "base", 100) -> 100 tasks, always the same ones.

    Train and test are disjoint for every seed and size: what the user says decides, by its checksum, on which side a
    story may appear. held_out=True: stories in the app that training never shows (content-OOD)."""
    assert split in ("train", "test") and category in CATEGORIES, (split, category)
    story = "base" if category == "long_context" else category       # long_context: the base stories, padded
    rng, tasks, seen = random.Random(f"{seed} {split} {story} {held_out}"), [], set()
    while len(tasks) < n:
        try:
            task = _make_task(rng, story, f"{category}-{split}-{seed}-{len(tasks)}", held_out)
        except Stuck:
            continue
        said = " / ".join(turn.user for turn in task.turns)
        if said in seen or (zlib.crc32(said.encode()) % 4 == 0) != (split == "test"):
            continue
        task.category, task.padded = category, category == "long_context"
        seen.add(said)
        tasks.append(task)
    return tasks


def demonstration(task, syntax="A"):
    """What a perfect assistant says, per user turn: one call per message (as in the paper's SFT data), then the reply.
    -> [['<tool_call>...</tool_call>', 'Done.'], ['I have no tool for that.'], ...]"""
    return [[write_calls([call], syntax) for call in turn.calls] + [turn.reply] for turn in task.turns]


def noisy_demonstration(task, syntax, rng, wrong, malformed):
    """The same with mistakes, to pre-train a base model that is worth training: each call gets a wrong value or tool
    with probability `wrong`, each message is malformed with probability `malformed`. Without the wrong calls every
    rollout of a group succeeds; without the malformed messages no control token ever has a wrong place to spike in."""
    script = []
    for turn, messages in zip(task.turns, demonstration(task, syntax)):
        calls = [_wrong_call(call, task, rng) if rng.random() < wrong else call for call in turn.calls]
        messages = [write_calls([call], syntax) for call in calls] + [turn.reply]
        script.append([_malformed(m, syntax, rng) if rng.random() < malformed else m for m in messages])
    return script


def _wrong_call(call, task, rng):
    name, args = call
    if not args or rng.random() < 0.2:
        return rng.choice(sorted(task.docs)), args
    spoiled = rng.choice(sorted(args))
    value = rng.randint(1, 9) if isinstance(args[spoiled], int) else rng.choice(WORDS + PEOPLE)
    return name, args | {spoiled: value}


def _malformed(text, syntax, rng):
    if syntax == "B":
        return rng.choice(["", "[", f"[{text}", text.removesuffix(")]") if text.startswith("[") else f"[tool({text}"])
    if text.startswith(OPEN):
        return rng.choice(["", OPEN, text.removesuffix(f"\n{CLOSE}"), text.removeprefix(f"{OPEN}\n"), f"{OPEN}\n{text}"])
    return rng.choice(["", OPEN, f"{text}\n{OPEN}", f"{OPEN}\n{text}", f"{text}\n{CLOSE}"])


# ----------------------------------------------------------------------------------------------------------------------
# 5. BFCL. The same game on real data: 800 stories (200 in each category, index i tells the same one in all four) and eight
#    simulated APIs with 128 tools, all from the package bfcl-eval. Its own executor runs eval() on the model's text and keeps
#    its objects in module globals; nothing of that is used here. (From here on nothing belongs to the tiny world: train.py
#    names the cached base model by the source above this line.)
BFCL_PACKAGES = "bfcl-eval==2026.3.23 mpmath==1.3.0"
BFCL_CLASSES = ("GorillaFileSystem", "MathAPI", "MessageAPI", "TwitterAPI", "TicketAPI", "TradingBot", "TravelAPI",
                "VehicleControlAPI")
JSON_TYPES = {"dict": "object", "float": "number", "int": "integer", "tuple": "array", "list": "array", "str": "string",
              "bool": "boolean", "any": "string"}


@functools.cache
def bfcl():
    """The package, read once -> its data folder, {"MathAPI": class}, {"add": ("MathAPI", {"type": "function", ...})}"""
    try:
        config = importlib.import_module("bfcl_eval.constants.executable_backend_config")
        modules = {name: importlib.import_module(config.CLASS_FILE_PATH_MAPPING[name]) for name in BFCL_CLASSES}
    except ImportError as error:
        raise UserError(f"--world bfcl needs two packages ({error}): pip install --no-deps {BFCL_PACKAGES}") from error
    data = Path(importlib.import_module("bfcl_eval").__file__).parent / "data"
    classes = {name: getattr(module, name) for name, module in modules.items()}
    tools = {doc["name"]: (name, openai_doc(doc)) for name in BFCL_CLASSES for doc in
             read_json_lines(data / "multi_turn_func_doc" / config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name])}
    return data, classes, tools


def read_json_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def openai_doc(doc):
    """{"name", "description", "parameters": {"type": "dict", ...}, "response"} -> the tool as Qwen's templates are given it"""
    def schema(s):
        s = s | ({"type": JSON_TYPES.get(s["type"], s["type"])} if isinstance(s.get("type"), str) else {})
        if isinstance(s.get("properties"), dict):                    # its keys are names, one of which may be "type"
            s["properties"] = {name: schema(p) if isinstance(p, dict) else p for name, p in s["properties"].items()}
        return s | ({"items": schema(s["items"])} if isinstance(s.get("items"), dict) else {})
    function = {k: doc[k] for k in ("name", "description") if k in doc} | {"parameters": schema(doc.get("parameters") or {})}
    return {"type": "function", "function": function}


# As Qwen2.5's chat template writes it when it is given `tools`: Chat passes only plain messages through the template.
QWEN_SYSTEM = """You are Qwen, created by Alibaba Cloud. You are a helpful assistant.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{docs}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
BRACKET_SYSTEM = """You are given a question and a set of functions. Call what is needed to do what the user asks.
If none of the functions fits, or a value that one of them needs is missing, say so.
A message that calls functions holds nothing but the calls, in the form
[func_name1(param_name1=value1, param_name2=value2), func_name2()]
Go on until the user's request is done; a message without a call ends the turn.

Here is a list of functions in JSON format that you can invoke.
{docs}"""
REVEALED = "I have updated some more functions you can choose from. What about now?"
# What the demonstrations say; no reply is ever graded.
DONE, NO_TOOL, NO_VALUE = ("Done.", "I am sorry, none of my functions can do that.",
                           "Something is missing for that. Could you give me the missing value?")


def tool_system(docs, syntax):
    return {"A": QWEN_SYSTEM, "B": BRACKET_SYSTEM}[syntax].format(docs="\n".join(docs))


@dataclass
class BfclTask(Task):
    """Task(id="multi_turn_base_0", category="base", docs={"ls": '{"type": "function", ...}'}, apps=["TwitterAPI", ...],
    init={"TwitterAPI": {"username": ...}}, turns=[...], padded=False)"""

    def system(self, syntax):
        return tool_system(self.docs.values(), syntax)

    def fresh_apps(self):
        apps = {}
        for name in self.apps:
            apps[name] = bfcl()[1][name]()
            if hasattr(apps[name], "_load_scenario"):                # all but MathAPI, which has no state
                apps[name]._load_scenario(copy.deepcopy(self.init.get(name, {})), long_context=self.padded)
        return copy.deepcopy(apps)               # without it, long_context's credit cards are one object in all episodes

    def call(self, apps, name, args):
        app, doc = bfcl()[2][name]
        parameters = doc["function"]["parameters"]
        args = coerce(args, parameters)          # a copy down to the last list: simulators keep and change what they are given
        guard(args, parameters["properties"])
        return run_tool(getattr(apps[app], name), args)

    def explain(self, error):
        return f"Error during execution: {error}"

    def state(self, app):
        return {k: v for k, v in vars(app).items() if not k.startswith("_")}


def coerce(value, schema):
    """coerce({"a": 5, "n": 2.0}, {... "a": number, "n": integer}) -> {"a": 5.0, "n": 2}, with new dicts and lists

    Results are compared as strings, and "5" is not "5.0"; JSON does not distinguish the two. So both sides are written as
    the documentation says. Nothing is rejected here: one ground truth has a string where an integer belongs."""
    kind = schema.get("type")
    if isinstance(value, dict):
        return {k: coerce(v, schema.get("properties", {}).get(k, {})) for k, v in value.items()}
    if isinstance(value, list):
        return [coerce(v, schema.get("items", {})) for v in value]
    if kind == "number" and type(value) is int:
        return float(value)
    return int(value) if kind == "integer" and type(value) is float and value.is_integer() else value


# Why a call cannot hang. (1) `guard` keeps every single operation short: after `coerce` no number is an integer that could
# grow, no text stands where a number belongs (mpmath reads "1e999999999" for minutes), digits are bounded. (2) What is left
# is Python code running for long: directories can be made to contain themselves or to double at each level, and `find`
# walks all paths. So Python lines are counted, by a trace function, and the one over the budget raises. Unlike signals
# this works in any thread and inside code that ignores them; unlike a clock it stops the same call on every machine.
MAX_DIGITS = {"precision": 1000, "decimal_places": 400}
MAX_LINES = 200_000                              # 0.1 s; the longest call of all ground truths runs 11,000


class TooLong(BaseException):
    """Not an Exception: simulators catch those."""


def guard(args, properties):
    for key, value in args.items():
        if key in MAX_DIGITS and not (type(value) is int and abs(value) <= MAX_DIGITS[key]):
            raise ValueError(f"{key} must be an integer of at most {MAX_DIGITS[key]}")
        if properties.get(key, {}).get("type") == "number" and not isinstance(value, float):
            raise ValueError(f"{key} must be a number")


@contextlib.contextmanager
def line_budget(lines):
    def count(frame, event, arg):
        nonlocal lines
        lines -= 1
        if lines < 0:
            raise TooLong
        return count
    before = sys.gettrace()                      # a debugger's, or None
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


# The simulators share process state: mpmath's precision, the decimal context, one weather report. And a result may be part of
# an app's live state, so it becomes text before the lock is given back.
LOCK = threading.Lock()


def run_tool(method, args):
    """A bound method and its arguments -> the result as BFCL writes it: text as it is, dicts as JSON, all else as Python"""
    for p in inspect.signature(method).parameters.values():          # post_tweet(tags=[]): one default list for all calls
        if p.name not in args and isinstance(p.default, (list, dict)):
            args[p.name] = copy.deepcopy(p.default)
    try:
        with LOCK, decimal.localcontext(), importlib.import_module("mpmath").workdps(15), line_budget(MAX_LINES):
            result = method(**args)
            if isinstance(result, dict):
                with contextlib.suppress(TypeError, ValueError):     # a Decimal, or a list that holds itself
                    return json.dumps(result)
            return str(result)
    except TooLong:
        raise TimeoutError("the call takes too long") from None


def truth_call(text):
    """"sort('a.txt')" -> ("sort", {"file_name": "a.txt"}): ground truth is Python text, literal arguments, some positional"""
    node = ast.parse(text, mode="eval").body
    app = bfcl()[2][node.func.id][0]
    names = list(inspect.signature(getattr(bfcl()[1][app], node.func.id)).parameters)[1:]
    args = dict(zip(names, map(ast.literal_eval, node.args)))
    return node.func.id, args | {k.arg: ast.literal_eval(k.value) for k in node.keywords}


def _bfcl_task(entry, truth, category):
    """One line of the questions, one line of the answers -> BfclTask"""
    text = {name: json.dumps(doc, ensure_ascii=False) for name, (app, doc) in bfcl()[2].items()
            if app in entry["involved_classes"]}
    reveals = {int(t): names for t, names in entry.get("missed_function", {}).items()}
    withheld = {name for names in reveals.values() for name in names}
    task = BfclTask(entry["id"], category, {name: doc for name, doc in text.items() if name not in withheld},
                    entry["involved_classes"], entry["initial_config"], [], category == "long_context")
    for t, (messages, calls) in enumerate(zip(entry["question"], truth["ground_truth"], strict=True)):
        user = messages[0]["content"] if messages else "\n".join([*(text[name] for name in reveals[t]), REVEALED])
        reply = DONE if calls else NO_VALUE if category == "miss_param" else NO_TOOL
        task.turns.append(Turn(user, [truth_call(call) for call in calls], reply, reveals.get(t, [])))
    return task


@functools.cache
def _bfcl_category(category):
    data = bfcl()[0]
    name = f"BFCL_v4_multi_turn_{category}.json"
    answers = {row["id"]: row for row in read_json_lines(data / "possible_answer" / name)}
    return [_bfcl_task(entry, answers[entry["id"]], category) for entry in read_json_lines(data / name)]


def bfcl_split(split, validation=20):
    """"train" | "validation" | "test" -> story indices. The halves are the paper's, the same for every category; the last
    `validation` stories of its training half are set aside, because the paper has none and looks at test tasks instead."""
    order = list(range(200))
    random.Random(42).shuffle(order)
    return {"train": order[:100 - validation], "validation": order[100 - validation:100], "test": order[100:]}[split]


def bfcl_tasks(split, category, n=None, validation=20):
    """bfcl_tasks("train", "base", 3) -> [BfclTask, BfclTask, BfclTask]. long_context exists only in the test split."""
    assert category in CATEGORIES and (category != "long_context" or split == "test"), (split, category)
    stories = _bfcl_category(category)
    return [stories[i] for i in bfcl_split(split, validation)][:n]


def verdicts(task, syntax, messages):
    """A conversation's Messages -> {"": 1.0, "_strict": 0.0}

    ""       BFCL's own checker: what is called in turns without ground truth does not matter, nor how messages are written,
             and a withheld tool answers before it is revealed. 800 of 800 ground truths pass.
    _strict  none of that is forgiven. 799 pass: multi_turn_miss_func_49 needs its withheld tool too early."""
    rewards = {}
    for name, closing, hide in (("", "lenient", False), ("_strict", "strict", True)):
        env = Env(task, syntax, closing, hide)
        for message in messages:
            if env.status is None:
                env.step(message)
        rewards[name] = env.grade().reward
    return rewards


# ----------------------------------------------------------------------------------------------------------------------
# 6. Two more sources. ACEBench's `normal` entries: one request, one message, its calls compared with an answer; nothing runs.
#    In brackets, as ACEBench asks, they are new in format and content; in tags only in content. ToolACE: dialogues for SFT.


@dataclass
class AceTask(Task):
    """turns[0].calls holds the first answer; init holds all of them: [[("f", {"x": "1"}), ...], ...]"""
    context: str = ""                            # "The current time is ...", or the user's profile
    required: dict = field(default_factory=dict)  # {"f": ["x"]}

    def system(self, syntax):
        return "\n\n".join([tool_system(self.docs.values(), syntax)] + [self.context] * bool(self.context))

    def fresh_apps(self):
        return {}


class AceEnv(Env):
    def step(self, message):
        if message.state == "cut":
            return self.stop("message_limit")
        if not any(ace_solved(message.calls, answer, self.task.required) for answer in self.task.init):
            self._fail()
        return self.stop("finished")


def make_env(task, syntax, closing):
    return (AceEnv if isinstance(task, AceTask) else Env)(task, syntax, closing)


def ace_solved(calls, answer, required):
    """ACEBench's rule: as many calls as the answer has, and for each call of the answer one that matches it. (Its checker also
    compares the types of numbers and booleans but not their values; here they must be equal.)"""
    def matches(call, name, wanted):
        return (call[0] == name and set(required.get(name, [])) <= call[1].keys() <= wanted.keys()
                and all(ace_equal(value, wanted[key]) for key, value in call[1].items()))
    names = Counter(call[0] for call in calls if not isinstance(call, str))
    return (len(calls) == len(answer) and names == Counter(name for name, _ in answer)
            and all(any(matches(call, name, wanted) for call in calls) for name, wanted in answer))


def ace_equal(value, wanted, inside=False):
    """Texts without case, spaces and punctuation; the wanted one may be a part of what was said, except in lists (`inside`)."""
    squash = lambda text: re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
    if isinstance(wanted, str):
        return isinstance(value, str) and (squash(value) == squash(wanted) if inside else squash(wanted) in squash(value))
    if isinstance(wanted, dict):
        return isinstance(value, dict) and value.keys() == wanted.keys() and all(ace_equal(value[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list):
        return (isinstance(value, (list, tuple)) and len(value) == len(wanted)
                and all(ace_equal(v, w, inside=True) for v, w in zip(value, wanted)))
    return str(value).lower() == str(wanted).lower() if isinstance(wanted, bool) else value == wanted


def acebench_tasks(folder, n=None):
    """A folder with data_normal_*.json and possible_answer/ -> [AceTask], 823 of them in the English release"""
    files = sorted(Path(folder).glob("data_normal_*.json"))
    if not files:
        raise UserError(f"--acebench {folder} has no data_normal_*.json; name ACEBench's folder data_all/data_en.")
    tasks = []
    for file in files:
        truths = {row["id"]: row["ground_truth"] for row in read_json_lines(file.parent / "possible_answer" / file.name)}
        for entry in read_json_lines(file):
            truth = truths[entry["id"]]
            answers = [[(re.sub(r"_\d+$", "", name), args) for name, args in a.items()]      # f_1, f_2: the same tool twice
                       for a in (truth if isinstance(truth, list) else [truth])]
            docs = {doc["name"]: doc for doc in entry["function"]}
            text = {name: json.dumps({"type": "function", "function": doc}, ensure_ascii=False) for name, doc in docs.items()}
            required = {name: doc.get("parameters", {}).get("required", []) for name, doc in docs.items()}
            context = f"Character profile:\n{entry['profile']}" if "profile" in entry else entry.get("time", "")
            turn = Turn("Conversation history 1..t:\n" + entry["question"], answers[0], DONE)
            tasks.append(AceTask(entry["id"], "acebench", text, [], answers, [turn], False, context, required))
    return tasks[:n]


def _toolace_calls(text, names):
    """'[Market Trends(kind="x")]' -> [("Market Trends", {"kind": "x"})]; None if it is not that. Such names are no Python, so
    each one is replaced by an identifier before parsing."""
    for i, name in enumerate(names):
        text = text.replace(f"{name}(", f"tool_{i}_(")
    calls = _bracket_calls(text)
    if calls is None or not all(re.fullmatch(r"tool_\d+_", name) for name, _ in calls):
        return None
    if re.search(r"tool_\d+_\(", str([args for _, args in calls])):    # a name was replaced inside a value
        return None
    return [(names[int(name[5:-1])], args) for name, args in calls]


def _toolace_dialogue(row, syntax):
    """-> [{"role": "system", ...}, {"role": "user", ...}, {"role": "assistant", ...}, ...], or None if it cannot be read"""
    try:
        docs, _ = json.JSONDecoder().raw_decode(row["system"], re.search(r'\[\s*\{\s*"', row["system"]).start())
        names = sorted((doc["name"] for doc in docs), key=len, reverse=True)
        text = [json.dumps(openai_doc(doc), ensure_ascii=False) for doc in docs]
        messages = [{"role": "system", "content": tool_system(text, syntax)}]
        for turn in row["conversations"]:
            who, text = turn["from"], turn["value"]
            if who == "assistant":
                text = write_calls(_toolace_calls(text, names), syntax) if text.strip().startswith("[") else text.strip()
                if syntax == "A" and parse(text).state not in ("call", "reply"):
                    return None
            messages.append({"role": "assistant" if who == "assistant" else "user",
                             "content": f"<tool_response>\n{text}\n</tool_response>" if who == "tool" else text})
    except (ValueError, TypeError, KeyError, AttributeError):        # a list of tools or a call that is not what it should be
        return None
    if messages[-1]["role"] == "user":
        messages.pop()                           # it has no answer to learn
    asked, said = messages[1::2], messages[2::2]
    return messages if said and {m["role"] for m in asked} == {"user"} and {m["role"] for m in said} == {"assistant"} else None


def read_toolace(path, syntax="A"):
    """A JSON list or JSON lines of {"system": ..., "conversations": [{"from": "user", "value": ...}, ...]}
    -> the dialogues with their bracket calls rewritten in `syntax`, and how many rows could not be read"""
    try:
        text = Path(path).read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--sft_file {path} cannot be read ({error}); it must be ToolACE's JSON file.") from error
    dialogues = [_toolace_dialogue(row, syntax) for row in rows]
    return [d for d in dialogues if d], sum(d is None for d in dialogues)
