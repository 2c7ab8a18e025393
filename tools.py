"""tools.py -- the world an agent acts in. Floor 0: plain Python, no torch.

    1. apps     small stateful Python objects; every public method is a tool
    2. messages `parse` turns one assistant message into its calls and its structural STATE
    3. env      the multi-turn conversation: user turns, tool results, grading
    4. tasks    a seeded generator of stories in BFCL's four categories, and their demonstrations

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
import inspect
import json
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field



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
    init_seed: str                               # the apps' initial state is drawn from this seed
    turns: list
    padded: bool = False                         # long_context: every tool result carries filler text

    def fresh_apps(self):
        rng = random.Random(self.init_seed)
        return {app: APPS[app](rng) for app in self.apps}


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
    closing="strict": a polluted, collapsed or empty message fails the episode, and so do calls where none is right."""

    def __init__(self, task, syntax="A", closing="lenient"):
        assert syntax in ("A", "B") and closing in ("lenient", "strict"), (syntax, closing)
        self.task, self.syntax, self.closing = task, syntax, closing
        self.apps = task.fresh_apps()            # what the model's calls change
        self.truth = task.fresh_apps()           # the twin that the ground truth changes, one turn at a time
        self.callable = set(task.docs)
        self.turn = 0                            # index of the current user turn
        self.turn_calls = 0                      # complete calls in this user turn
        self.results = Counter()                 # every tool result so far, as a multiset of strings
        self.status = None                       # None while running, then "finished", "format_error" or a limit's name
        self.failed_turn = None

    def opening(self):
        """The first messages, [system, user], in chat-template form."""
        system = "\n".join(["You can call these tools:", *self.task.docs.values(), SYNTAX_HELP[self.syntax]])
        return [{"role": "system", "content": system}, {"role": "user", "content": self.task.turns[0].user}]

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

    def _call(self, apps, name, args):
        if name not in self.callable:
            raise NameError(f'there is no tool "{name}"')
        result = getattr(apps[TOOL_APP[name]], name)(**args)
        text = result if isinstance(result, str) else json.dumps(result)
        return f"{text}\n{FILLER}" if self.task.padded else text

    def _run(self, call):
        if isinstance(call, str):
            return call                          # the block could not be read: its result is the error itself
        self.turn_calls += 1
        try:
            result = self._call(self.apps, *call)
        except Exception as error:               # the model's arguments can break a tool in any way; it gets to read how
            return f"Error: {type(error).__name__} {error}"
        self.results[result] += 1
        return result

    def _close_turn(self):
        """Grade the turn that ends here: same state in every app, and the ground truth's results among the model's."""
        calls = self.task.turns[self.turn].calls
        needed = Counter(self._call(self.truth, *call) for call in calls)
        if calls:
            same_state = all(vars(self.apps[a]) == vars(self.truth[a]) for a in self.apps)
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
