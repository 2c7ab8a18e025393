"""supervision.py -- the paper's supervision signals, one class each.

A signal's class holds all of it: who writes rollout k of a group (`source`, `hint`), what happens to a
rollout before the update (`before_update`), what enters the policy loss (`ratio`), what it remembers of the
rollouts (`observe`), and which rows are trained with cross-entropy (`rows`). What it does not override is
vanilla GRPO.

WHEN rows are trained is for the schedule to say (train.py: `plan`).

    1. signals       none, SFT, OPS, HBG, ETS, PRS; `sample_groups` lets them write a step's rollouts
    2. reflections   PRS's texts: the embedded judge's, and the prompts for a real one
    3. Judge         any OpenAI-compatible server, by the openai client
"""
import hashlib
import json
import os
import random
import time
from contextlib import closing, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import torch
from tqdm import tqdm

from rollout import Episode, begin, demonstrate, is_clean, parse, rollout, write_calls
from sft_step import over_ranks
from tools import APPS, ASKS, DOCS, TOOL_APP, UserError, ask

# ------------------------------------------------------------------------------------------------------------
# 1. The signals


class Signal:
    """none: vanilla GRPO. The base class of all others; see "Add your own" in README."""
    schedules = ("rl",)                          # with which it makes sense
    remembers = ()                               # attributes (plain lists, dicts) that a checkpoint must hold
    left_out = 0                                 # rows that the last call of rows() could not make
    note = ""  # what the person at the keyboard should read before the run starts

    def __init__(self, args, chat, tasks, limits):
        self.args, self.chat, self.limits = args, chat, limits       # args: train.py's flags
        self.tasks = {task.id: task for task in tasks}
        assert len(self.tasks) == len(tasks), "two tasks have the same id"

    def source(self, k):
        """Who writes rollout k of a group: "policy" | "truth" | "hinted" """
        return "policy"

    def hint(self, task):
        """What a "hinted" rollout reads at the end of its system message"""

    def before_update(self, episodes):
        """This rank's finished rollouts -> the same, in this order (credit goes by it), as trained"""
        return episodes

    def ratio(self, t):
        """rl_step.Tokens -> rho [N] in the policy loss"""
        return t.ratio

    def observe(self, step, episodes):
        """Called after every rollout with the step's Episodes of ALL processes, by (group, sample)"""

    def rows(self):
        """Episodes to train with cross-entropy now. Called on process 0 only; the others get copies."""
        return []

    def metrics(self, episodes):
        """For the step's line in metrics.jsonl; called on all processes, with their Episodes as trained"""
        return {}

    def state(self):
        return {name: getattr(self, name) for name in self.remembers}

    def load(self, state):
        vars(self).update(state)


class SFT(Signal):
    """Ground-truth demonstrations of all training tasks; or, with --sft_file, a file's dialogues."""
    schedules = ("sft", "sft_then_rl", "interleaved", "synchronous")

    def __init__(self, *args):
        super().__init__(*args)
        if self.args.sft_file:
            rows = self.read_dialogues(self.args.sft_file)
        else:
            rows = [demonstrate(self.chat, task, self.args.syntax, self.limits, self.args.closing)
                    for task in self.tasks.values()]
        self.demonstrations = {row.task_id: row for row in rows}

    def read_dialogues(self, path):
        """JSON lines of {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", ...}, ...]}:
        [system,] user, assistant, user, assistant, ... -> [Episode]; .note says how many are too long"""
        rows, i = [], 1
        try:
            for i, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
                if line.strip():
                    talk = json.loads(line.decode())["messages"]
                    rows.append(dialogue_row(self.chat, f"{path}:{i}", talk))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(f"--sft_file {path} cannot be read (line {i}: {error!r}); it must be "
                            "JSON lines of messages, as results/toolace.py writes them.") from error
        fitting = [row for row in rows if len(row.ids) <= self.limits.total_tokens]
        self.note = (f"{path}: {len(fitting)} dialogues; left out: {len(rows) - len(fitting)} longer than "
                     f"--max_total_tokens {self.limits.total_tokens}")
        if not fitting:
            raise UserError(f"--sft_file has no usable row. {self.note}.")
        return fitting

    def rows(self):
        return list(self.demonstrations.values())


class OPS(Signal):
    """Off-policy supervision: the first --ops_k rollouts of each group are the ground truth, played through
    the live environment; they take part in the group's advantage like any other.

    What is p_old of tokens that no policy sampled? --ops_ratio one: the trainer's own probability, so that
    the ratio is 1 before the first update (as released). shaped: the ratio is p / (p + 0.1) (as the paper
    intends): there is no old policy to compare with; tokens with p near 0.1 get the largest gradient."""

    def __init__(self, *args):
        super().__init__(*args)
        for task in self.tasks.values():         # all fit and are right: else a later step would end the run
            demonstrate(self.chat, task, self.args.syntax, self.limits, self.args.closing)

    def source(self, k):
        return "truth" if k < self.args.ops_k else "policy"

    def ratio(self, t):
        if self.args.ops_ratio == "one":
            return t.ratio
        from_truth = t.of_rows([row.source == "truth" for row in t.rows])            # [N] bool
        p = t.logp.exp()                                                             # [N]
        return torch.where(from_truth, p / (p + 0.1), t.ratio)


class HBG(Signal):
    """Hint-based guidance: the first --hints rollouts of each group are sampled with the ground truth in the
    system message; the hint is removed before the update. So they were sampled in a context in which they are
    not trained, and the importance ratio pretends otherwise; --hint_in_update keeps the hint."""

    def source(self, k):
        return "hinted" if k < self.args.hints else "policy"

    def hint(self, task):
        return self.hint_text(task, self.args.syntax)

    @staticmethod
    def hint_text(task, syntax):
        """The paper lets an LLM summarise the ground truth; here the summary is the calls themselves.
        -> 'Notes that may help:\\nturn 1: <tool_call>...\\nturn 2: no call is right' """
        lines = ["Notes that may help:"]
        for i, turn in enumerate(task.turns, 1):
            lines.append(f"turn {i}: {write_calls(turn.calls, syntax) if turn.calls else 'no call is right'}")
        return "\n".join(lines)

    def before_update(self, episodes):
        if self.args.hint_in_update:
            return episodes
        return [self.without_hint(e) if e.source == "hinted" else e for e in episodes]

    def without_hint(self, episode):
        """The same messages behind the prompt that has no hint. Nobody sampled them THERE (.as_sampled is
        False), so p_old becomes the trainer's own p(token); .logprobs stay log p(token | hint)."""
        plain = self.chat.prompt(self.tasks[episode.task_id].opening(self.args.syntax))
        return episode.rewritten(lambda span: plain if span.who == "prompt" else None)

    def metrics(self, episodes):
        """hint_log_ratio: mean log p(token | hint) - log p(token) of hinted tokens: the update ignores it"""
        if self.args.hint_in_update or self.args.as_released:
            return {}
        hinted = [e for e in episodes if e.source == "hinted"]
        total = sum(sum(e.logprobs) - sum(e.logprobs_old) for e in hinted)
        total, n = over_ranks([total, sum(sum(e.mask) for e in hinted)])
        return {"hint_log_ratio": total / max(n, 1)}


class ETS(SFT):
    """Erroneous trajectory supervision: the ground truth of the tasks that failed in the last --ets_window RL
    steps. --ets_rule all: every rollout of the task in the window failed (the paper); any: one did (the
    paper's code)."""
    schedules = ("interleaved", "synchronous")
    remembers = ("outcomes",)

    def __init__(self, *args):
        super().__init__(*args)
        self.outcomes = []  # [{"step": 3, "task_id": "t0", "reward": 1.0}], of the policy, in the window

    def observe(self, step, episodes):
        for e in [e for e in episodes if e.source == "policy"]:
            self.outcomes.append({"step": step, "task_id": e.task_id, "reward": e.reward})
        self.outcomes = [o for o in self.outcomes if o["step"] > step - self.args.ets_window]

    def failed(self):
        """-> task ids, in the order of their first appearance"""
        rewards = {}
        for o in self.outcomes:
            rewards.setdefault(o["task_id"], []).append(o["reward"])
        enough = all if self.args.ets_rule == "all" else any
        return [task_id for task_id, of_task in rewards.items() if enough(reward == 0 for reward in of_task)]

    def rows(self):
        return [self.demonstrations[task_id] for task_id in self.failed()]


class PRS(ETS):
    """Process reflection supervision: ETS's rows, plus a judge's reflections on one rollout of every prompt
    in the window (sample 1, the second of its group, whatever its reward, as in the paper). A row is: judge
    prompt -> judge answer."""
    remembers = ("outcomes", "reflections")

    def __init__(self, *args):
        super().__init__(*args)
        self.judge = Judge(self.args.judge_url, self.args.judge_model) if self.args.judge_url else None
        self.reflections = []                    # of the window, as dicts

    def observe(self, step, episodes):
        super().observe(step, episodes)
        for e in [e for e in episodes if e.sample == 1]:
            task = self.tasks[e.task_id]
            for kind, prompt in reflection_prompts(task, e, self.args.syntax, real=bool(self.judge)):
                asked = {"step": step, "kind": kind, "task_id": task.id, "prompt": prompt, "answer": None}
                if not self.judge:               # a real one answers later, in rows()
                    asked["answer"] = EMBEDDED_JUDGE[kind](task, e, self.args.syntax)
                self.reflections.append(asked)
        self.reflections = [r for r in self.reflections if r["step"] > step - self.args.ets_window]

    def rows(self):
        answers = [r["answer"] for r in self.reflections]
        if self.judge:
            answers = self.judge.answers([r["prompt"] for r in self.reflections])
        rows = []
        for r, answer in zip(self.reflections, answers, strict=True):
            if answer:
                talk = [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": answer}]
                rows.append(dialogue_row(self.chat, f"{r['kind']}:{r['task_id']}", talk))
        rows = [row for row in rows if len(row.ids) <= self.limits.total_tokens]
        self.left_out = len(self.reflections) - len(rows)
        return super().rows() + rows


SIGNALS = {"none": Signal, "sft": SFT, "ops": OPS, "hbg": HBG, "ets": ETS, "prs": PRS}


def dialogue_row(chat, name, messages):
    """[system,] user, assistant, user, assistant, ... -> an Episode whose assistant messages are trained.
    (Chat spells out the control tokens in what they say, but for call tags: an answer that mentions an
    "<|im_end|>" must not train an end in mid-message.)"""
    roles = [m["role"] for m in messages]
    if not all(isinstance(m["content"], str) for m in messages):     # a list would be encoded as many texts
        raise ValueError("the content of a message must be a text")
    talk = roles[1:] if roles[0] == "system" else roles
    if talk != ["user", "assistant"] * (len(talk) // 2) or not talk:
        raise ValueError(f"the roles must be [system,] user, assistant, user, assistant, ..., not {roles}")
    first = roles.index("assistant")
    row = Episode(name, -1, source="truth", as_sampled=False)
    row.append(chat.prompt(messages[:first]), "prompt", 0, text=messages[first - 1]["content"])
    for m in messages[first:]:
        said = m["role"] == "assistant"
        ids = chat.message(m["content"]) if said else chat.observation(m["content"])
        row.append(ids, "model" if said else "user", 0, text=m["content"])
    return row


def sample_groups(signal, engine, tasks, mine, seed):
    """--group rollouts of each task tasks[g], g in `mine`, by whom the signal names -> Episodes by (g, k)"""
    args, chat, limits, done, begun, envs = signal.args, signal.chat, signal.limits, [], [], []
    for g in mine:
        for k in range(args.group):
            task, source = tasks[g], signal.source(k)
            if source == "truth":
                done.append(demonstrate(chat, task, args.syntax, limits, args.closing, group_id=g, sample=k))
                continue
            env = task.env(args.syntax, args.closing)
            envs.append(env)
            begun.append(begin(chat, env, g, k, source, signal.hint(task) if source == "hinted" else None))
    done += rollout(engine, chat, envs, limits, begun, seed)
    return sorted(done, key=lambda e: (e.group_id, e.sample))


# ------------------------------------------------------------------------------------------------------------
# 2. Reflections (PRS). Two texts per trajectory, trained as prompt -> answer:
#      whole   every turn: what was asked, was it right, the corrected calls
#      error   the turn that failed: root cause, fix, similar scenarios, one look-alike with another answer
#    Both show the judge the step that really failed, and the ground truth with all its arguments.
ASK_WHOLE = "Read each turn. Is it right? Write the cause and the right call."
ASK_ERROR = ("The last turn is not right. Write the cause, the fix, similar turns, and one that is not "
             "similar.")
# The same two questions for a language model as judge, with what the paper asks of it.
JUDGE_WHOLE = """Below is a conversation between a user and an assistant that calls tools. After each turn, \
"right" is the ground truth.
For every turn write: what the user wanted and what a correct answer does; whether the assistant's turn was \
correct, and if not, the kind of mistake and its root cause; how to do better, with the corrected calls \
exactly as in the ground truth, in the same syntax."""
JUDGE_ERROR = """Below is a conversation between a user and an assistant that calls tools. Its LAST turn is \
wrong; "right" is the ground truth.
Write: the root cause, with two to four pieces of evidence from the log; the fix, with the corrected calls; \
three to five similar scenarios of different kinds (a missing value, the wrong tool, a failed call, an \
ambiguous request), each with its request, the typical mistake, the correct calls, and why; and one scenario \
that looks alike but needs another solution."""


def right(turn, syntax):
    return write_calls(turn.calls, syntax) if turn.calls else f"no call, but: {turn.reply}"


def log_of(task, episode, syntax, n_turns=None):
    """The first n_turns with their ground truth, for the judge to read; None: all"""
    lines = []
    for t, turn in enumerate(task.turns[:n_turns]):
        lines += [f"turn {t + 1}", f"user: {turn.user}"]
        for s in episode.spans:
            if s.turn == t and s.who in ("model", "tool"):
                lines.append(f"{'assistant' if s.who == 'model' else 'result'}: {s.text}")
        lines.append(f"right: {right(turn, syntax)}")
    return "\n".join(lines)


def reflection_prompts(task, episode, syntax, real=False):
    """-> [(kind, prompt)]: always the whole interaction; the failing turn too, if any. real: for a model"""
    prompts = [("whole", f"{JUDGE_WHOLE if real else ASK_WHOLE}\n\n{log_of(task, episode, syntax)}")]
    if episode.failed_turn is not None:
        log = log_of(task, episode, syntax, episode.failed_turn + 1)
        prompts.append(("error", f"{JUDGE_ERROR if real else ASK_ERROR}\n\n{log}"))
    return prompts


def cause(task, episode, t, syntax):
    """Why turn t is not the ground truth -> a phrase, or None if it is."""
    spans = [s for s in episode.spans if s.turn == t and s.who == "model"]
    if not spans:
        return "the turn was never reached"
    # First of all the form: with lenient closing the reward does not see it, and only the reflection says it.
    if not is_clean([s.state for s in spans]):
        return "a message is not a complete call and not a clean reply"
    said, wanted = [call for s in spans for call in parse(s.text, syntax).calls], task.turns[t].calls
    if said == wanted:
        return None
    if not wanted:
        return "a call where no call is right"
    if not said:
        return "no call where one is right"
    for (tool, args), (called, given) in zip(wanted, said):
        if called != tool:
            return f"the tool must be {tool}"
        for key, value in args.items():
            if given.get(key) != value:
                return f"the value of {key} must be {value}"
    return "a call is missing" if len(said) < len(wanted) else "a call too many"


def reflect_whole(task, episode, syntax):
    """The embedded judge's text about every turn"""
    lines = []
    for t, turn in enumerate(task.turns):
        why = cause(task, episode, t, syntax)
        verdict = f"not right: {why}\nright: {right(turn, syntax)}" if why else "right"
        lines.append(f"turn {t + 1} is {verdict}")
    return "\n".join(lines)


def reflect_error(task, episode, syntax):
    """The embedded judge's text about the turn that failed"""
    t, rng = episode.failed_turn, random.Random(f"{task.id} {episode.failed_turn}")
    turn = task.turns[t]
    called = [tool for tool, _ in turn.calls]
    tool = called[-1] if called else rng.choice(sorted(task.docs))
    why = cause(task, episode, t, syntax) or "the state is not right"
    lines = [f"cause: {why}", f"fix: {right(turn, syntax)}"]
    if tool not in ASKS:                         # real data: only a language model can invent scenarios there
        return "\n".join(lines)
    app = TOOL_APP[tool]
    lines.append("similar:")
    for _ in range(3):
        phrase, calls = ask(rng, {app: APPS[app](rng)}, [tool])
        lines += [f"user: {phrase}", write_calls(calls, syntax)]
    lines.append("not similar:")
    if ASKS[tool].vague:                         # the look-alike: nearly the same words, and no call is right
        args = ASKS[tool].arguments(rng, APPS[app](rng))
        lines += [f"user: {ASKS[tool].vague.format(**args)}", f"What is the {ASKS[tool].lacks}?"]
    else:
        phrase, calls = ask(rng, {app: APPS[app](rng)}, [other for other in DOCS[app] if other != tool])
        lines += [f"user: {phrase}", write_calls(calls, syntax)]
    return "\n".join(lines)


EMBEDDED_JUDGE = {"whole": reflect_whole, "error": reflect_error}


# ------------------------------------------------------------------------------------------------------------
# 3. The judge of real runs


class Judge:
    """An OpenAI-compatible server. Whatever it does costs reflections, never the run. An answer is stored
    under the hash of its question before it is used: none is paid for twice. No sampling parameters are sent:
    some models refuse them."""
    cache = Path("runs/judge-cache")
    workers, timeout, retries = 16, 120.0, 5     # requests at once; seconds for one; attempts after the first
    patience = 1800.0                            # seconds for all: the other processes wait an hour at most
    give_up, longest = 5, 1_000_000              # failures in a row; bytes of a reply

    def __init__(self, url, model):
        openais = url.startswith("https://api.openai.com/")          # the second key is for no other host
        key = os.environ.get("JUDGE_API_KEY") or (openais and os.environ.get("OPENAI_API_KEY")) or ""
        self.url, self.model, self.key = url, model, key.strip()
        if not (self.key.isascii() and self.key.isprintable()):      # else the error about a header shows it
            raise UserError("the key in JUDGE_API_KEY or OPENAI_API_KEY holds what no key holds.")
        self.failed_in_a_row, self.trouble = 0, None
        try:
            self.client = self._connect()
        except Exception as error:
            raise UserError(f"--judge_url {url}: {error!r}; it takes a URL, `pip install openai`") from error

    def _connect(self):
        """-> openai's client, with its retries. It bounds only the waits for bytes; Http bounds the rest."""
        import openai                            # nobody but a real judge needs it
        judge = self

        class Http(openai.DefaultHttpxClient):
            def send(self, request, **options):  # without what OPENAI_ORG_ID, _CUSTOM_HEADERS and so on add
                for name in set(request.headers) - {"host", "user-agent", "content-type", "content-length"}:
                    del request.headers[name]
                request.headers["Authorization"] = f"Bearer {judge.key or 'none'}"
                body, until = b"", time.monotonic() + judge.timeout
                with closing(super().send(request, stream=True, follow_redirects=False)) as reply:
                    for block in reply.iter_raw():
                        body += block
                        if len(body) > judge.longest or time.monotonic() > until:
                            raise openai.APIConnectionError(message="no end of the reply", request=request)
                reply.headers.pop("Content-Encoding", None)          # nothing is inflated to gigabytes
                return type(reply)(reply.status_code, headers=reply.headers, content=body, request=request)
        return openai.OpenAI(base_url=self.url, api_key="none", timeout=self.timeout, http_client=Http())

    def _ask(self, prompt, retries):
        """-> the answer; None where there is none of use, and .trouble says why. Never raises."""
        try:
            ask = self.client.with_options(max_retries=retries).chat.completions.create
            reply = ask(model=self.model, messages=[{"role": "user", "content": prompt}])
            answer = usable(reply.choices[0].message.content)
            self.failed_in_a_row = 0
            return answer
        except Exception as error:               # openai's have a .request: there was no reply, or a status
            said = error.response.text if hasattr(error, "response") else error.__cause__  # may hold the key
            reason = f"{type(error).__name__}: {error}: {said}".replace(self.key or "\0", "***")
            self.trouble = repr(reason[:500])    # on one line
            down = hasattr(error, "request") and getattr(error, "status_code", 0) not in (400, 413, 422)
            self.failed_in_a_row = self.failed_in_a_row + 1 if down else 0

    def check(self):
        """Before anything starts: is it there, does it know the model, does it take the key?"""
        if self._ask("Say yes.", retries=0) is None:
            raise UserError(f"the judge {self.model!r} at {self.url} does not answer ({self.trouble}); "
                            "check --judge_url, --judge_model and the key in JUDGE_API_KEY.")

    def _file(self, prompt):
        question = json.dumps([self.url, self.model, prompt]).encode()
        return self.cache / f"{hashlib.sha256(question).hexdigest()}.json"

    def _stored(self, prompt):
        """-> the answer in the cache; None if it is not there, or damaged"""
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            return usable(json.loads(self._file(prompt).read_text())["answer"])

    def _answer(self, prompt):
        """-> the answer, now in the cache too; None if none can be had. Runs in a thread: never raises."""
        answer = self._ask(prompt, 0 if self.failed_in_a_row >= self.give_up else self.retries)
        with suppress(OSError):                  # a full disk: the answer is used, and not kept
            if answer:
                self.cache.mkdir(parents=True, exist_ok=True)
                part = self.cache / os.urandom(16).hex()              # other processes write here too
                part.write_text(json.dumps({"model": self.model, "prompt": prompt, "answer": answer}))
                os.replace(part, self._file(prompt))
        return answer

    def answers(self, prompts):
        """-> one answer per prompt, None where there was none in time. After `give_up` failures in a row the
        rest is not asked; as long as it is down, later calls wait for one request's time at most."""
        found = {prompt: self._stored(prompt) for prompt in prompts}             # equal ones are asked once
        unknown = [prompt for prompt in found if found[prompt] is None]
        todo, done, self.trouble = [None] * self.workers + unknown, SimpleQueue(), None

        def work():
            for prompt in iter(todo.pop, None):  # from the end; then each thread finds one None, and stops
                done.put((prompt, self._answer(prompt)))
        for _ in unknown[:self.workers]:
            Thread(target=work, daemon=True).start()     # a daemon: Ctrl-C does not wait for its request
        until = time.monotonic() + (self.timeout if self.failed_in_a_row >= self.give_up else self.patience)
        try:
            for _ in tqdm(unknown, "judge", leave=False, disable=None):
                prompt, found[prompt] = done.get(timeout=max(0, until - time.monotonic()))
                if self.failed_in_a_row >= self.give_up:
                    break
        except Empty:                            # the time is up; a late answer makes it 0 again
            self.failed_in_a_row = self.give_up
        todo[:] = [None] * self.workers          # the threads end with the requests that they are at
        if missing := sum(found[prompt] is None for prompt in unknown):
            tqdm.write(f"judge: {missing} of {len(unknown)} questions unanswered ({self.trouble})")
        return [found[prompt] for prompt in prompts]


def usable(answer):
    """An answer's text; or ValueError: a list, None, "", a lone surrogate, which no tokenizer takes"""
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"no text, but {str(answer)[:80]!r}")
    answer.encode()
    return answer
