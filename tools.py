"""tools.py -- the world an agent acts in. Plain Python, no torch.

The paper (arXiv 2606.26027) trains on BFCL multi-turn: a user asks for things over several turns, the model
calls tools, and the reward is 1 only if EVERY user turn ended in the right state with the right results. A
message without a complete call ends the user turn. This file holds that game, small enough for a laptop:

    system     You can call these tools: ... (and how a call is written)
    user       create the file "plan" with text "red"                                  <- user turn 1
    assistant  <tool_call>{"name": "create_file", "arguments": {...}}</tool_call>
    user       <tool_response> created "plan" </tool_response>                         <- the tool's answer
    assistant  Done.                                                                   ends user turn 1
    user       ...                                                                     <- user turn 2
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
import tracemalloc
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace


class UserError(Exception):
    """A mistake of the person at the keyboard: train.py prints its one sentence and exits with status 2."""


# ------------------------------------------------------------------------------------------------------------
# 1. The apps. State = public attributes (what grading compares); tools = public methods (what the model may
#    call). A wrong call raises; Env turns that into an "Error: ..." observation, as a real tool server would.


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
    """Held out: nothing in training shows this app (content-OOD). Its tools are new, but spelled with words
    that training shows (send_mail, add_item -> send_item): no model writes a token that it has never seen."""

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
WORDS = """plan list note song poem game lamp desk door road tree bird fish moon star rain snow
wind gold blue green black white bread milk tea cake rice soup apple
monday friday sunday winter summer north south""".split()

# Only these names can be called, so no text of a model ever reaches an attribute that is not a tool.
DOCS = {app: {} for app in APPS}                 # {"files": {"create_file": "create_file(name, text)", ...}}
TOOL_APP = {}                                    # {"create_file": "files", ...}
for app, app_class in APPS.items():
    for tool in [name for name in vars(app_class) if not name.startswith("_")]:
        arguments = list(inspect.signature(getattr(app_class, tool)).parameters)[1:]     # without self
        DOCS[app][tool] = f"{tool}({', '.join(arguments)})"
        TOOL_APP[tool] = app


# ------------------------------------------------------------------------------------------------------------
# 2. The environment. One conversation over one task: its opening(), then step(message), ..., grade().


@dataclass
class Turn:
    """One user turn with its ground truth. No calls: none is right here (a tool or a value is missing)."""
    user: str                                    # 'create the file "plan" with text "red"'
    calls: list                                  # [("create_file", {"name": "plan", "text": "red"})]
    reply: str                                   # "Done."
    reveal: list = field(default_factory=list)   # tools that become callable at this turn (miss_func)


@dataclass
class Task:
    """A story and its apps. The methods are all that Env asks of a world; these are the embedded world's."""
    id: str                                      # "base-train-17"
    category: str                                # base | miss_func | miss_param | long_context
    docs: dict                                   # visible tools: {"create_file": "create_file(name, text)"}
    apps: list                                   # ["files", "mail"]
    init: object                                 # the apps' initial state: a seed that it is drawn from
    turns: list
    padded: bool = False                         # long_context: every tool result carries filler text
    early: list = field(default_factory=list)    # withheld tools that answer even before they are revealed

    def system(self, syntax):
        return "\n".join(["You can call these tools:", *self.docs.values(), CALL_HELP[syntax]])

    def opening(self, syntax, hint=None):
        """The first messages, in chat-template form. hint: text at the system message's end (HBG)"""
        system = self.system(syntax) + (f"\n\n{hint}" if hint else "")
        return [{"role": "system", "content": system}, {"role": "user", "content": self.turns[0].user}]

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
        return {k: v for k, v in vars(app).items() if not k.startswith("_")}

    def env(self, syntax="A", closing="lenient"):
        return Env(self, syntax, closing)

    def verdicts(self, syntax, messages, reward):
        """A finished conversation and its reward -> {ending of the score's name: score}"""
        return {"": reward}


FILLER = " ".join(f"{a} {b}" for a, b in zip(WORDS, reversed(WORDS)))
CALL_HELP = {
    "A": 'A call is written\n<tool_call>\n{"name": "tool", "arguments": {"key": "value"}}\n</tool_call>',
    "B": "A call is written\n[tool(key='value')]"}


class Env:
    """Plain data all through: copy.deepcopy(env) branches a conversation, pickle stores one.

    closing="lenient" (the paper): a message in which no call is closed ends the user turn, WHATEVER it holds.
        So the degenerate `<tool_call><|im_end|>` is worth as much as a good reply, and calls in turns whose
        ground truth is empty go unpunished.
    closing="strict": a polluted, collapsed or empty message fails the episode, and so do calls where none is
        right, and calls that task.early answers."""

    def __init__(self, task, syntax="A", closing="lenient"):
        assert syntax in ("A", "B") and closing in ("lenient", "strict"), (syntax, closing)
        self.task, self.syntax, self.closing = task, syntax, closing
        self.apps = task.fresh_apps()            # what the model's calls change
        self.truth = task.fresh_apps()           # the twin that the ground truth changes, one turn at a time
        self.callable = set(task.docs)           # and what is revealed
        self.turn = 0                            # index of the current user turn
        self.turn_calls = 0                      # complete calls in this user turn
        self.results = Counter()                 # every tool result so far, as a multiset of strings
        self.status = None                       # once over: "finished", "format_error" or a limit's name
        self.failed_turn = None                  # index of the first user turn that was wrong

    def step(self, message):
        """Message -> the text of the next user-role message, or None when the episode is over."""
        assert self.status is None, "step() after the end of the episode"
        if message.state == "cut":
            return self.stop("message_tokens_limit")
        if self.closing == "strict" and message.state in ("polluted", "collapsed", "empty"):
            self._fail()
            return self.stop("format_error")
        if message.calls:
            results = [self._run(call) for call in message.calls]
            return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
        self._close_turn()
        self.turn += 1
        if self.turn == len(self.task.turns):
            return self.stop("finished")
        self.callable |= set(self.task.turns[self.turn].reveal)
        return self.task.turns[self.turn].user

    def stop(self, status):
        self.status = status

    def grade(self):
        """BFCL's rule: 1.0 if every user turn was reached and closed and none of them was wrong, else 0.0"""
        return float(self.status == "finished" and self.failed_turn is None)

    def _fail(self):
        if self.failed_turn is None:
            self.failed_turn = self.turn

    def _run(self, call):
        if isinstance(call, str):                # an unreadable block: the model reads the error and may go
            return call                          # on (as with the authors; BFCL's handler ends the user turn)
        self.turn_calls += 1
        name, args = call
        try:
            if name not in self.callable and name not in self.task.early:
                raise NameError(f'there is no tool "{name}"')
            if name not in self.callable and self.closing == "strict":
                self._fail()
            result = self.task.call(self.apps, name, args)
        except Exception as error:               # the model's arguments can break a tool in any way,
            with contextlib.suppress(Exception):  # and the text of its error (an integer of 5,000 digits)
                return self.task.explain(error)
            return "Error: the arguments cannot be written"
        self.results[result] += 1
        return result

    def _close_turn(self):
        """Grade the turn that ends: same state in every app, the ground truth's results among the model's."""
        task, calls = self.task, self.task.turns[self.turn].calls
        try:
            needed = Counter(task.call(self.truth, name, args) for name, args in calls)
        except Exception as error:
            raise UserError(f"{task.id}, user turn {self.turn}: the ground truth fails: {error!r}") from error
        if calls:
            same_state = all(task.state(self.apps[app]) == task.state(self.truth[app]) for app in task.apps)
            # No call at all is wrong, even if an earlier turn has brought the state and the results about.
            if not (self.turn_calls and same_state and needed <= self.results):
                self._fail()
        elif self.closing == "strict" and self.turn_calls:
            self._fail()
        self.turn_calls = 0


# ------------------------------------------------------------------------------------------------------------
# 3. Stories: walks through the apps. Each user turn asks for one or two things that are possible NOW, so the
#    generator plays the ground truth while it writes.
CATEGORIES = ("base", "miss_func", "miss_param", "long_context")     # BFCL's
TRAIN_CATEGORIES = CATEGORIES[:3]                # long_context is for evaluation only, as in the paper


class Stuck(Exception):
    """The story cannot go on (nothing left to read or delete); the generator starts another one."""


def unused(rng, taken):
    return rng.choice([word for word in WORDS if word not in taken])


def existing(rng, taken):
    if not taken:
        raise Stuck
    return rng.choice(sorted(taken))


@dataclass
class Ask:
    """How a user asks for a tool."""
    phrasings: list                              # two, with the parts in another order
    arguments: object                            # a function: rng, app -> arguments that are possible now
    vague: str | None = None                     # miss_param: the request without one of its values ...
    lacks: str | None = None                     # ... and the name of that argument


def about(verb, thing, arguments):
    """about("read", 'the file "x"', ...) -> 'read the file "x"' or 'the file "x", read it' """
    return Ask([f"{verb} {thing}", f"{thing}, {verb} it"], arguments)


MAIL_FROM, THE_ITEM = 'the mail from "{sender}"', 'the item "{name}"'
ASKS = {
    "create_file": Ask(
        ['create the file "{name}" with text "{text}"', 'with text "{text}" create the file "{name}"'],
        lambda rng, app: {"name": unused(rng, app.files), "text": rng.choice(WORDS)},
        'create the file "{name}"', "text"),
    "read_file": about("read", 'the file "{name}"', lambda rng, app: {"name": existing(rng, app.files)}),
    "delete_file": about("delete", 'the file "{name}"', lambda rng, app: {"name": existing(rng, app.files)}),
    "send_mail": Ask(
        ['send a mail to "{to}" with text "{text}"', 'with text "{text}" send a mail to "{to}"'],
        lambda rng, app: {"to": rng.choice(PEOPLE), "text": rng.choice(WORDS)},
        'send a mail to "{to}"', "text"),
    "read_mail": about("read", MAIL_FROM, lambda rng, app: {"sender": existing(rng, app.inbox)}),
    "delete_mail": about("delete", MAIL_FROM, lambda rng, app: {"sender": existing(rng, app.inbox)}),
    "pay_money": Ask(
        ['pay money to "{to}", {amount} coins', 'pay {amount} coins of money to "{to}"'],
        lambda rng, app: {"to": rng.choice(PEOPLE), "amount": rng.randint(1, 9)},
        'pay money to "{to}"', "amount"),
    "check_balance": about("check", "the balance", lambda rng, app: {}),
    "add_item": Ask(
        ['add the item "{name}", {amount} of it', 'add {amount} of the item "{name}"'],
        lambda rng, app: {"name": rng.choice(WORDS), "amount": rng.randint(1, 9)},
        'add the item "{name}"', "amount"),
    "remove_item": about("remove", THE_ITEM, lambda rng, app: {"name": existing(rng, app.cart)}),
    "count_item": about("count", THE_ITEM, lambda rng, app: {"name": existing(rng, app.cart)}),
    "send_item": Ask(
        ['send the item "{name}" to "{to}"', 'to "{to}" send the item "{name}"'],
        lambda rng, app: {"name": unused(rng, app.parcels), "to": rng.choice(PEOPLE)},
        'send the item "{name}"', "to"),
    "check_item": about("check", THE_ITEM, lambda rng, app: {"name": existing(rng, app.parcels)}),
    "delete_item": about("delete", THE_ITEM, lambda rng, app: {"name": existing(rng, app.parcels)}),
}


def ask(rng, apps, tools):
    """-> (phrase, [(tool, args)]) for one thing that the user can ask for now."""
    for tool in rng.sample(tools, len(tools)):
        try:
            args = ASKS[tool].arguments(rng, apps[TOOL_APP[tool]])
        except Stuck:
            continue                             # ask for something else
        return rng.choice(ASKS[tool].phrasings).format(**args), [(tool, args)]
    raise Stuck


def two_steps(rng, apps):
    """-> a request whose second call needs the first one's result: the loop is multi-STEP within a turn"""
    files, inbox = apps["files"].files, apps["mail"].inbox
    if rng.choice(("mail a file", "file a mail")) == "mail a file":
        name, to = existing(rng, files), rng.choice(PEOPLE)
        return (f'read the file "{name}", then send a mail to "{to}" with its text',
                [("read_file", {"name": name}), ("send_mail", {"to": to, "text": files[name]})])
    sender, name = existing(rng, inbox), unused(rng, files)
    return (f'read the mail from "{sender}", then create the file "{name}" with its text',
            [("read_mail", {"sender": sender}), ("create_file", {"name": name, "text": inbox[sender]})])


def _make_task(rng, category, task_id, held_out):
    known = [app for app in APPS if app != HELD_OUT]
    usable = [HELD_OUT] if held_out else rng.sample(known, rng.choice((1, 2)))
    task = Task(task_id, category, {}, usable, f"apps {rng.random()}", [], padded=category == "long_context")
    docs = {tool: doc for app in usable for tool, doc in DOCS[app].items()}
    tools, apps = list(docs), task.fresh_apps()
    play = lambda calls: [getattr(apps[TOOL_APP[tool]], tool)(**args) for tool, args in calls]
    missing = category in ("miss_func", "miss_param")      # what is missing costs one more user turn
    n_requests = rng.randint(1, 3 if missing else 4)
    special = rng.randrange(n_requests) if missing else None         # the request that meets it
    hidden = rng.choice(tools) if category == "miss_func" else None
    for request in range(n_requests):
        visible = [tool for tool in tools if tool != hidden or request > special]
        reveal = []
        if request == special and hidden:        # the tool is not there, no call is right; then it is shown
            phrase, calls = ask(rng, apps, [hidden])
            task.turns.append(Turn(phrase, [], "I have no tool for that."))
            user, reveal = f"You can now call\n{docs[hidden]}", [hidden]
        elif request == special:                 # a value is not there, no call is right; then it is given
            _, calls = ask(rng, apps, [tool for tool in tools if ASKS[tool].vague])
            (tool, args), = calls
            lacks = ASKS[tool].lacks
            task.turns.append(Turn(ASKS[tool].vague.format(**args), [], f"What is the {lacks}?"))
            user = f"the {lacks} is " + json.dumps(args[lacks])
        elif {"files", "mail"} <= set(usable) and hidden is None and rng.random() < 0.25:
            user, calls = two_steps(rng, apps)
        else:
            user, calls = ask(rng, apps, visible)
        results = play(calls)
        if request != special and rng.random() < 0.25:               # two requests in one message
            phrase, more = ask(rng, apps, visible)
            user, calls, results = f"{user}, then {phrase}", calls + more, results + play(more)
        last_tool, _ = calls[-1]
        answers = last_tool.startswith(("read", "check", "count"))
        task.turns.append(Turn(user, calls, f'It is "{results[-1]}".' if answers else "Done.", reveal))
    task.docs = {tool: doc for tool, doc in docs.items() if tool != hidden}
    return task


def make_tasks(split, category, n, seed=0, held_out=False):
    """make_tasks("train", "base", 100) -> 100 tasks, always the same ones.

    Train and test are disjoint for every seed and size: what the user says decides, by its checksum, on which
    side a story may appear. held_out=True: stories in the app that training never shows (content-OOD)."""
    assert split in ("train", "test") and category in CATEGORIES, (split, category)
    story = "base" if category == "long_context" else category       # long_context: the base stories, padded
    rng, tasks, seen = random.Random(f"{seed} {split} {story} {held_out}"), [], set()
    while len(tasks) < n:
        try:
            task = _make_task(rng, category, f"{category}-{split}-{seed}-{len(tasks)}", held_out)
        except Stuck:
            continue
        said = " / ".join(turn.user for turn in task.turns)
        is_test = zlib.crc32(said.encode()) % 4 == 0
        if said in seen or is_test != (split == "test"):
            continue
        seen.add(said)
        tasks.append(task)
    return tasks


# ------------------------------------------------------------------------------------------------------------
# 4. BFCL. The same game on real data: 800 stories (200 in each category, index i tells the same one in all
#    four) and eight simulated APIs with 128 tools, all from the package bfcl-eval. Its own executor runs
#    eval() on the model's text and keeps its objects in module globals; nothing of that is used here.
BFCL_PACKAGES = "bfcl-eval==2026.3.23 mpmath==1.3.0"
BFCL_CLASSES = ("GorillaFileSystem", "MathAPI", "MessageAPI", "TwitterAPI", "TicketAPI", "TradingBot",
                "TravelAPI", "VehicleControlAPI")
JSON_TYPES = {"dict": "object", "float": "number", "int": "integer", "tuple": "array", "list": "array",
              "str": "string", "bool": "boolean", "any": "string"}


@functools.cache
def bfcl():
    """The package, read once -> .data, its folder; .classes {"MathAPI": class}; .docs {"add": {"type":
    "function", ...}}; .app_of {"add": "MathAPI"}"""
    try:
        config = importlib.import_module("bfcl_eval.constants.executable_backend_config")
        classes = {name: getattr(importlib.import_module(config.CLASS_FILE_PATH_MAPPING[name]), name)
                   for name in BFCL_CLASSES}
    except ImportError as error:
        raise UserError(f"--world bfcl needs two packages ({error}): "
                        f"pip install --no-deps {BFCL_PACKAGES}") from error
    data = Path(importlib.import_module("bfcl_eval").__file__).parent / "data"
    package = SimpleNamespace(data=data, classes=classes, docs={}, app_of={})
    for name in BFCL_CLASSES:
        file = config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]
        for doc in read_json_lines(data / "multi_turn_func_doc" / file):
            package.docs[doc["name"]], package.app_of[doc["name"]] = openai_doc(doc), name
    return package


def read_json_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def openai_doc(doc):
    """{"name", "description", "parameters": {"type": "dict", ...}} -> the tool as Qwen's templates take it"""
    kept = {key: doc[key] for key in ("name", "description") if key in doc}
    return {"type": "function", "function": kept | {"parameters": json_schema(doc.get("parameters") or {})}}


def json_schema(schema):
    """{"type": "dict", "properties": {"n": {"type": "float"}}} -> {"type": "object", ... "number"}}}"""
    schema = dict(schema)
    if isinstance(schema.get("type"), str):
        schema["type"] = JSON_TYPES.get(schema["type"], schema["type"])
    if isinstance(schema.get("properties"), dict):       # its keys are names, one of which may be "type"
        schema["properties"] = {name: json_schema(p) if isinstance(p, dict) else p
                                for name, p in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        schema["items"] = json_schema(schema["items"])
    return schema


# As Qwen2.5's chat template writes it when it is given `tools`; Chat passes only plain messages through it.
QWEN_SYSTEM = """You are Qwen, created by Alibaba Cloud. You are a helpful assistant.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{docs}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
BRACKET_SYSTEM = """You are given a question and a set of functions. \
Call what is needed to do what the user asks.
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
    """BfclTask(id="multi_turn_base_0", category="base", docs={"ls": '{"type": "function", ...}'},
    apps=["TwitterAPI", ...], init={"TwitterAPI": {"username": ...}}, turns=[...], padded=False)"""

    def system(self, syntax):
        return tool_system(self.docs.values(), syntax)

    def fresh_apps(self):
        apps = {}
        for name in self.apps:
            apps[name] = bfcl().classes[name]()
            if hasattr(apps[name], "_load_scenario"):                # all but MathAPI, which has no state
                apps[name]._load_scenario(copy.deepcopy(self.init.get(name, {})), long_context=self.padded)
        return copy.deepcopy(apps)               # else all episodes share long_context's credit cards

    def call(self, apps, name, args):
        parameters = bfcl().docs[name]["function"]["parameters"]
        args = coerce(args, parameters)          # a deep copy: simulators keep and change what they get
        guard(args, parameters["properties"])
        return run_tool(getattr(apps[bfcl().app_of[name]], name), args)

    def explain(self, error):
        return f"Error during execution: {error}"

    def verdicts(self, syntax, messages, reward):
        """The conversation's Messages and its reward under the lenient rule -> {"": 1.0, "_strict": 0.0}

        ""       BFCL's own checker: what is called in turns without ground truth does not matter, nor how
                 messages are written, and a withheld tool answers at any time. 800 of 800 ground truths pass.
        _strict  none of that is forgiven. 799 pass: multi_turn_miss_func_49 needs its withheld tool early."""
        strict = Env(self, syntax, "strict")
        for message in messages:
            if strict.status is None:
                strict.step(message)
        return {"": reward, "_strict": strict.grade()}


def coerce(value, schema):
    """coerce({"a": 5, "n": 2.0}, {... "a": number, "n": integer}) -> {"a": 5.0, "n": 2}, new dicts and lists

    Results are compared as strings, and "5" is not "5.0"; JSON does not distinguish the two. So both sides
    are written as documented. Nothing is rejected: one ground truth has a string for an integer."""
    kind = schema.get("type")
    if isinstance(value, dict):
        return {k: coerce(v, schema.get("properties", {}).get(k, {})) for k, v in value.items()}
    if isinstance(value, list):
        return [coerce(v, schema.get("items", {})) for v in value]
    if kind == "number" and type(value) is int:
        return float(value)
    return int(value) if kind == "integer" and type(value) is float and value.is_integer() else value


# Why a call can neither hang nor fill the memory. (1) `guard` keeps every operation short: after `coerce` no
# number is an integer that could grow, no text stands for a number (mpmath reads "1e999999999" for minutes),
# digits are bounded. (2) `find` walks all paths, of directories that may double at each level: so a trace
# function counts lines and new memory. It works in any thread and, unlike a clock, stops the same calls.
MAX_DIGITS = {"precision": 1000, "decimal_places": 400}
MAX_LINES, MAX_BYTES = 200_000, 2**24            # 0.1 s, 16 MB; the most of all ground truths: 11,000, 0.3 MB
LOCK = threading.Lock()                          # simulators share state: mpmath's precision, the weather


class TooLong(BaseException):
    """Not an Exception: simulators catch those."""


def guard(args, properties):
    if "source" in args and args["source"] == args.get("destination"):
        raise ValueError("source and destination are the same")      # cp and mv would make a cycle of folders
    for key, value in args.items():
        if key in MAX_DIGITS and not (type(value) is int and abs(value) <= MAX_DIGITS[key]):
            raise ValueError(f"{key} must be an integer of at most {MAX_DIGITS[key]}")
        if properties.get(key, {}).get("type") == "number" and not isinstance(value, float):
            raise ValueError(f"{key} must be a number")


@contextlib.contextmanager
def budget():
    def count(frame, event, arg):
        nonlocal lines
        lines -= 1
        if lines < 0 or (lines % 32 == 0 and tracemalloc.get_traced_memory()[0] > memory):
            raise TooLong
        return count                             # Python calls it at every line, as long as it returns itself
    trace, measured = sys.gettrace(), tracemalloc.is_tracing()       # somebody debugs, or looks for a leak
    tracemalloc.start()
    lines, memory = MAX_LINES, tracemalloc.get_traced_memory()[0] + MAX_BYTES
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(trace)
        if not measured:
            tracemalloc.stop()


# Two messages that hold a Python set, which every process would print in another order
UNSORTED = re.compile(r"(Must be one of \{|Invalid fields for update: )([^}\"]*)")


def run_tool(method, args):
    """A bound method, its arguments -> the result as BFCL writes it: text dicts as JSON, or Python"""
    for p in inspect.signature(method).parameters.values():          # post_tweet(tags=[]): ONE list for all
        if p.name not in args and isinstance(p.default, (list, dict)):
            args[p.name] = copy.deepcopy(p.default)
    try:
        with LOCK, decimal.localcontext(), importlib.import_module("mpmath").workdps(15), budget():
            result = method(**args)              # it becomes text inside the lock
            if isinstance(result, dict):
                with contextlib.suppress(TypeError, ValueError):     # a Decimal, or a list that holds itself
                    result = json.dumps(result)
            text = re.sub(UNSORTED, lambda m: m[1] + ", ".join(sorted(m[2].split(", "))), str(result))
            return text[-2**18:]                 # the longest of all ground truths has 32,000 characters
    except TooLong:
        raise TimeoutError("the call takes too long, or too much memory") from None


def truth_call(text):
    """"sort('a.txt')" -> ("sort", {"file_name": "a.txt"}): ground truth is Python, partly positional"""
    node = ast.parse(text, mode="eval").body
    name = node.func.id
    method = getattr(bfcl().classes[bfcl().app_of[name]], name)
    names = list(inspect.signature(method).parameters)[1:]           # without self
    args = dict(zip(names, map(ast.literal_eval, node.args)))
    return name, args | {k.arg: ast.literal_eval(k.value) for k in node.keywords}


@functools.cache
def bfcl_stories(category):
    """-> the 200 BfclTasks of a category, made of its questions and its answers"""
    name, stories = f"BFCL_v4_multi_turn_{category}.json", []
    answers = read_json_lines(bfcl().data / "possible_answer" / name)
    truths = {answer["id"]: answer["ground_truth"] for answer in answers}
    for entry in read_json_lines(bfcl().data / name):
        text = {tool: json.dumps(doc, ensure_ascii=False) for tool, doc in bfcl().docs.items()
                if bfcl().app_of[tool] in entry["involved_classes"]}
        reveals = {int(t): tools for t, tools in entry.get("missed_function", {}).items()}
        withheld = [tool for tools in reveals.values() for tool in tools]
        docs = {tool: doc for tool, doc in text.items() if tool not in withheld}
        task = BfclTask(entry["id"], category, docs, entry["involved_classes"], entry["initial_config"], [],
                        category == "long_context", withheld)
        for t, (messages, calls) in enumerate(zip(entry["question"], truths[entry["id"]], strict=True)):
            revealed = "\n".join([text[tool] for tool in reveals.get(t, [])] + [REVEALED])
            cannot = NO_VALUE if category == "miss_param" else NO_TOOL
            reply = DONE if calls else cannot
            task.turns.append(Turn(messages[0]["content"] if messages else revealed,
                                   [truth_call(call) for call in calls], reply, reveals.get(t, [])))
        stories.append(task)
    return stories


# ------------------------------------------------------------------------------------------------------------
# 5. Worlds: where a run's tasks come from. What a task DOES is Task's affair.


class World:
    """--world tiny: the embedded one, and the base class of the others. A world of your own: see README."""
    defaults = {}                                # of train.py's flags, where they differ from the laptop's
    eval_closing = None                          # evaluate under this rule, whatever --closing says
    has_test = False                             # test tasks of its own, played only once, at the end

    def __init__(self, args):
        self.args = args                         # train.py's flags

    def categories(self, split):
        return CATEGORIES if split != "train" else TRAIN_CATEGORIES

    def tasks(self, split, category, n):
        """The first n of split "train" | "validation" | "test"; here the last two are the same tasks."""
        return make_tasks("train" if split == "train" else "test", category, n)

    def mixed(self, split, n):
        """n tasks, a third of each training category"""
        return [task for c in TRAIN_CATEGORIES for task in self.tasks(split, c, -(-n // 3))][:n]

    def unseen(self, split, n, syntax):
        """Evaluation sets of tools that training never shows -> {name: [(task, syntax)]}"""
        return {"content_ood": [(task, syntax) for task in make_tasks("test", "base", n, held_out=True)]}


class BfclWorld(World):
    """--world bfcl. The defaults are the paper's numbers (its restarts: --as_released)."""
    defaults = dict(steps=300, prompts=60, lr=1e-6, sft_lr=1e-5, kl_weight=1e-4, warmup=10, sft_batch=128,
                    max_messages=30, max_message_tokens=2048, max_total_tokens=16_384, eval_tasks=1000,
                    max_observation_tokens=1024, test_total_tokens=24_576, test_observation_tokens=4096)
    eval_closing = "lenient"                     # both verdicts need the conversation to its end
    has_test = True

    def categories(self, split):
        return CATEGORIES if split == "test" else TRAIN_CATEGORIES   # long_context: only to test

    def stories(self, split):
        """Their indices. The halves are the paper's, the same for every category; the last --validation of
        its training half are set aside, because the paper has none (0) and looks at test tasks instead."""
        order, cut = list(range(200)), 100 - self.args.validation
        random.Random(42).shuffle(order)
        return {"train": order[:cut], "validation": order[cut:100], "test": order[100:]}[split]

    def tasks(self, split, category, n=None):
        assert category in self.categories(split), (split, category)
        return [bfcl_stories(category)[i] for i in self.stories(split)][:n]

    def unseen(self, split, n, syntax):
        return {}                                # ACEBench is one: results/acebench.py


WORLDS = {"tiny": World, "bfcl": BfclWorld}
