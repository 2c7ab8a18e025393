"""supervision.py -- the paper's supervision signals, each behind the same three hooks. Floor 3.

A signal may say who writes rollout k of a group, look at a step's finished rollouts, and give rows to train with cross-entropy
(`source`, `observe`, `rows` of the class Signal); or do nothing, which is vanilla GRPO.

The SCHEDULE (train.py, `plan`) decides when rows are trained: never (rl), alone (sft, sft_then_rl), in phases between RL
phases (interleaved), when the alarm rings (adaptive), or as one more term of each RL update (synchronous).

    1. demonstrations   ground truth as Episodes
    2. hints            HBG's text
    3. reflections      PRS's texts: a judge's view of a trajectory (embedded here, any OpenAI-compatible server on real data)
    4. the signals
    5. the embedded base model, which is itself made by supervision alone
"""
import hashlib
import json
import math
import os
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from rollout import TEMPLATES, Chat, Episode, Limits, begin, play, rollout, without_hint
from sft_step import optimizer_step, sft_backward
from tools import (APPS, ASKS, CATEGORIES, CONTROL, DOCS, TOOL_APP, Env, UserError, ask, demonstration, make_tasks,
                   noisy_demonstration, parse, read_toolace, write_calls)

TRAIN_CATEGORIES = [c for c in CATEGORIES if c != "long_context"]    # long_context is for evaluation only, as in the paper

# ----------------------------------------------------------------------------------------------------------------------
# 1. Demonstrations


def demonstrate(chat, task, a, limits, **kw):
    """Ground truth played through the LIVE environment (real tool results) -> an Episode whose model spans are trained."""
    episode = play(chat, Env(task, a.syntax, a.closing), demonstration(task, a.syntax), limits, **kw)
    if episode.reward != 1:
        raise UserError(f"the ground truth of {task.id} " + (
            f"does not fit into the limits ({episode.status}); raise --max_total_tokens or --max_messages."
            if episode.status.endswith("limit") else f"is graded as wrong (user turn {episode.failed_turn}); leave that task out."))
    return episode


# ----------------------------------------------------------------------------------------------------------------------
# 2. Hints (HBG). The paper lets an LLM summarise the ground truth; here the summary is the calls themselves.


def hint(task, syntax):
    """-> 'Notes that may help:\\nturn 1: <tool_call>...' """
    calls = [write_calls(turn.calls, syntax) if turn.calls else "no call is right" for turn in task.turns]
    return "\n".join(["Notes that may help:"] + [f"turn {i}: {text}" for i, text in enumerate(calls, 1)])


# ----------------------------------------------------------------------------------------------------------------------
# 3. Reflections (PRS). Two texts per trajectory, trained as prompt -> answer:
#      whole   every turn: what was asked, was it right, the corrected calls
#      error   the turn that failed: root cause, fix, similar scenarios, one look-alike that needs another answer
#    Both show the judge the step that really failed, and the ground truth with all its arguments, of every type.


def right(turn, syntax):
    return write_calls(turn.calls, syntax) if turn.calls else f"no call, but: {turn.reply}"


def dialogue(task, episode, syntax, last=None):
    """The log of turns 0..last with their ground truth, for the judge to read."""
    lines = []
    for t, turn in enumerate(task.turns[:None if last is None else last + 1]):
        lines += [f"turn {t + 1}", f"user: {turn.user}"]
        lines += [f"{'assistant' if s.who == 'model' else 'result'}: {s.text}" for s in episode.spans
                  if s.turn == t and s.who in ("model", "tool")]
        lines += [f"right: {right(turn, syntax)}"]
    return "\n".join(lines)


def cause(task, episode, t, syntax):
    """Why turn t is not the ground truth -> a phrase, or None if it is."""
    spans = [s for s in episode.spans if s.turn == t and s.who == "model"]
    if not spans:
        return "the turn was never reached"
    said, wanted = [c for s in spans for c in parse(s.text, syntax).calls], task.turns[t].calls
    # first of all the form: with lenient closing the reward does not see it, so the reflection is the only one to say it
    if any(s.state in ("polluted", "collapsed", "empty", "cut") for s in spans):
        return "a message is not a complete call and not a clean reply"
    if said == wanted:
        return None
    if not wanted:
        return "a call where no call is right"
    if not said:
        return "no call where one is right"
    for (name, args), call in zip(wanted, said):
        if isinstance(call, str) or call[0] != name:
            return f"the tool must be {name}"
        for key, value in args.items():
            if call[1].get(key) != value:
                return f"the value of {key} must be {value}"
    return "a call is missing" if len(said) < len(wanted) else "a call too many"


def reflect_whole(task, episode, syntax):
    """The embedded judge, text (a)."""
    lines = []
    for t, turn in enumerate(task.turns):
        why = cause(task, episode, t, syntax)
        lines.append(f"turn {t + 1} is right" if why is None else f"turn {t + 1} is not right: {why}\nright: {right(turn, syntax)}")
    return "\n".join(lines)


def reflect_error(task, episode, syntax):
    """The embedded judge, text (b), about the turn that failed."""
    turn, rng = task.turns[episode.failed_turn], random.Random(f"{task.id} {episode.failed_turn}")
    tool = turn.calls[-1][0] if turn.calls else rng.choice(sorted(task.docs))
    lines = [f"cause: {cause(task, episode, episode.failed_turn, syntax) or 'the state is not right'}",
             f"fix: {right(turn, syntax)}"]
    if tool not in ASKS:                             # real data: only a language model (--judge_url) can invent scenarios there
        return "\n".join(lines)
    app = TOOL_APP[tool]
    lines += ["similar:"]
    for _ in range(3):
        phrase, calls = ask(rng, {app: APPS[app](rng)}, [tool])
        lines += [f"user: {phrase}", write_calls(calls, syntax)]
    phrasings, vague, lacks, sample = ASKS[tool]
    if vague:                                        # the look-alike: nearly the same words, and no call is right
        lines += ["not similar:", f"user: {vague.format(**sample(rng, APPS[app](rng)))}", f"What is the {lacks}?"]
    else:
        phrase, calls = ask(rng, {app: APPS[app](rng)}, [other for other in DOCS[app] if other != tool])
        lines += ["not similar:", f"user: {phrase}", write_calls(calls, syntax)]
    return "\n".join(lines)


# Every fixed word of the hints and reflections: the embedded tokenizer takes its vocabulary from here.
WORDING = """Notes that may help: turn no call, but: is right not right: cause: fix: similar: not similar: user: assistant: result: right:
the turn was never reached a message is not a complete call and not a clean reply a call where no call is right no call where one is
right the tool must be the value of key must be a call is missing a call too many the state is not right Read each turn. Is it right?
Write the cause and the right call. The last turn is not right. Write the cause, the fix, similar turns, and one that is not similar."""
ASK_WHOLE = "Read each turn. Is it right? Write the cause and the right call."
ASK_ERROR = "The last turn is not right. Write the cause, the fix, similar turns, and one that is not similar."
# The same two questions for a language model as judge, with what the paper asks of it.
JUDGE_WHOLE = """Below is a conversation between a user and an assistant that calls tools. After each turn, "right" is the ground truth.
For every turn write: what the user wanted and what a correct answer does; whether the assistant's turn was correct, and if not, the
kind of mistake and its root cause; how to do better, with the corrected calls exactly as in the ground truth, in the same syntax."""
JUDGE_ERROR = """Below is a conversation between a user and an assistant that calls tools. Its LAST turn is wrong; "right" is the ground truth.
Write: the root cause, with two to four pieces of evidence from the log; the fix, with the corrected calls; three to five similar
scenarios of different kinds (a missing value, the wrong tool, a failed call, an ambiguous request), each with its request, the typical
mistake, the correct calls, and why; and one scenario that looks alike but needs another solution."""


def reflection_prompts(task, episode, syntax, model=False):
    """-> [(kind, prompt)]: always the whole interaction; the failing turn too, if a turn failed. model: asks a language model"""
    prompts = [("whole", f"{JUDGE_WHOLE if model else ASK_WHOLE}\n\n{dialogue(task, episode, syntax)}")]
    if episode.failed_turn is not None:
        log = dialogue(task, episode, syntax, episode.failed_turn)
        prompts.append(("error", f"{JUDGE_ERROR if model else ASK_ERROR}\n\n{log}"))
    return prompts


class Judge:
    """An OpenAI-compatible endpoint. Every answer is stored on disk under the hash of its question before it is used, so
    an interrupted run never pays twice; a server that fails in mid-run costs reflections, never the run."""

    def __init__(self, a):
        self.a, self.url, self.cache = a, a.judge_url.rstrip("/"), Path(a.judge_cache)
        self.key = os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"

    def _request(self, prompt, **options):
        body = {"model": self.a.judge_model, "messages": [{"role": "user", "content": prompt}]} | options
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), {
            "Content-Type": "application/json", "Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=self.a.judge_timeout) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]

    def check(self):
        """Before anything starts: is it there, does it know the model, does it take the key?"""
        try:
            self._request("Say yes.", max_tokens=4)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"the judge {self.a.judge_model!r} at {self.url} does not answer ({error}); check --judge_url, "
                            "--judge_model and the key in JUDGE_API_KEY.") from error

    def _answer(self, prompt):
        path = self.cache / (hashlib.sha256(json.dumps([self.a.judge_model, prompt]).encode()).hexdigest() + ".json")
        if path.exists():
            return json.loads(path.read_text())["answer"]
        for attempt in range(self.a.judge_retries + 1):
            try:
                answer = self._request(prompt, temperature=0.7)
                if not answer:                   # must not reach the cache, where it would stay for good
                    raise ValueError("an empty answer")
                break
            except (OSError, ValueError, KeyError, IndexError, TypeError):
                if attempt == self.a.judge_retries:
                    return None
                time.sleep(min(60, 2 ** attempt))
        tmp = path.with_suffix(f".{os.getpid()}.tmp")
        tmp.write_text(json.dumps({"model": self.a.judge_model, "prompt": prompt, "answer": answer}))
        os.replace(tmp, path)
        return answer

    def answers(self, prompts):
        """-> one answer per prompt, None where the server failed for good"""
        self.cache.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.a.judge_workers) as pool:
            return list(tqdm(pool.map(self._answer, prompts), total=len(prompts), desc="judge", leave=False, disable=None))


# ----------------------------------------------------------------------------------------------------------------------
# 4. The signals


class Signal:
    """none: vanilla GRPO. The base class of all others; see "Add your own signal" in README."""
    schedules = ("rl",)                          # with which it makes sense
    skipped = 0                                  # rows that the last call of rows() could not make
    note = ""                                    # what the person at the keyboard should read before the run starts

    def __init__(self, a, chat, tasks, limits):
        self.a, self.chat, self.limits = a, chat, limits
        self.tasks = {task.id: task for task in tasks}

    def source(self, k):
        """Who writes rollout k of a group: "policy" | "truth" | "hinted" """
        return "policy"

    def observe(self, step, episodes):
        """Called after every rollout with the step's Episodes of ALL processes, in order of (group, sample)."""

    def rows(self):
        """Episodes to train with cross-entropy now. Called on process 0 only; the others get a copy of the list."""
        return []

    def state(self):
        """What a checkpoint must hold (plain lists and dicts), for `load`."""
        return {}

    def load(self, state):
        vars(self).update(state)


class SFT(Signal):
    """Ground-truth demonstrations of all training tasks; or, with --sft_file, ToolACE's dialogues in their place."""
    schedules = ("sft", "sft_then_rl", "interleaved", "synchronous", "adaptive")

    def __init__(self, *args):
        super().__init__(*args)
        if self.a.sft_file:
            self.demos = self.read_dialogues(self.a.sft_file)
        else:
            self.demos = {id: demonstrate(self.chat, task, self.a, self.limits) for id, task in self.tasks.items()}

    def read_dialogues(self, path):
        """-> {0: Episode, 1: Episode, ...}; .note says how many rows of the file are not among them"""
        dialogues, unreadable = read_toolace(path, self.a.syntax)
        rows = [row for row in (dialogue_row(self.chat, f"{path}:{i}", d) for i, d in enumerate(dialogues))
                if len(row.ids) <= self.limits.total]
        self.note = (f"{path}: {len(rows)} dialogues; left out: {unreadable} that cannot be read, "
                     f"{len(dialogues) - len(rows)} longer than --max_total_tokens {self.limits.total}")
        if not rows:
            raise UserError(f"--sft_file has no usable row. {self.note}.")
        return dict(enumerate(rows))

    def rows(self):
        return list(self.demos.values())


class OPS(Signal):
    """Off-policy supervision: the first --ops_k rollouts of each group are the ground truth, played through the live
    environment; they take part in the group's advantage like any other. Ratio: --ops_ratio (rl_step.py)."""

    def source(self, k):
        return "truth" if k < self.a.ops_k else "policy"


class HBG(Signal):
    """Hint-based guidance: the first --hints rollouts of each group are sampled with the ground truth in the system message;
    the hint is removed before the update. So they were sampled in a context in which they are not trained, and the
    importance ratio pretends otherwise: metric hint_log_ratio; --hint_in_update keeps the hint."""

    def source(self, k):
        return "hinted" if k < self.a.hints else "policy"


class ETS(SFT):
    """Erroneous trajectory supervision: the ground truth of the tasks that failed in the last --ets_window RL steps.
    --ets_rule all: every rollout of the task in the window failed (the paper); any: one did (the paper's code)."""
    schedules = ("interleaved", "synchronous", "adaptive")

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []                           # [[step, task id, reward]] of the window

    def observe(self, step, episodes):
        self.seen += [[step, e.task_id, e.reward] for e in episodes if e.source == "policy"]
        self.seen = [s for s in self.seen if s[0] > step - self.a.ets_window]

    def failed(self):
        """-> task ids, in the order of their first appearance"""
        rewards = {}
        for _, task_id, reward in self.seen:
            rewards.setdefault(task_id, []).append(reward)
        test = all if self.a.ets_rule == "all" else any
        return [task_id for task_id, r in rewards.items() if test(x == 0 for x in r)]

    def rows(self):
        return [self.demos[task_id] for task_id in self.failed()]

    def state(self):
        return {"seen": self.seen}


class PRS(ETS):
    """Process reflection supervision: ETS's rows, plus a judge's reflections on one rollout of every prompt in the window
    (rollout 1 of the group, whatever its reward, as in the paper). A row is: judge prompt -> judge answer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.judge = Judge(self.a) if self.a.judge_url else None
        self.kept = []                           # [[step, kind, task id, judge's prompt, embedded judge's answer]] of the window

    def observe(self, step, episodes):
        super().observe(step, episodes)
        for e in episodes:
            task = self.tasks[e.task_id]
            for kind, prompt in reflection_prompts(task, e, self.a.syntax, model=bool(self.judge)) if e.sample == 1 else ():
                reflect = {"whole": reflect_whole, "error": reflect_error}[kind]
                self.kept.append([step, kind, task.id, prompt, None if self.judge else reflect(task, e, self.a.syntax)])
        self.kept = [k for k in self.kept if k[0] > step - self.a.ets_window]

    def rows(self):
        answers = self.judge.answers([k[3] for k in self.kept]) if self.judge else [k[4] for k in self.kept]
        talk = lambda prompt, answer: [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        rows = [dialogue_row(self.chat, f"{kind}:{task_id}", talk(prompt, answer))
                for (_, kind, task_id, prompt, _), answer in zip(self.kept, answers) if answer]
        rows = [row for row in rows if len(row.ids) <= self.limits.total]
        self.skipped = len(self.kept) - len(rows)
        return super().rows() + rows

    def state(self):
        return {"seen": self.seen, "kept": self.kept}


def dialogue_row(chat, name, messages):
    """[system,] user, assistant, user, assistant, ... -> an Episode whose assistant messages are trained"""
    first = [m["role"] for m in messages].index("assistant")
    row = Episode(name, -1, source="truth")
    row.append(chat.prompt(messages[:first]), "prompt", 0, text=messages[first - 1]["content"])
    for m in messages[first:]:
        said = m["role"] == "assistant"
        row.append((chat.message if said else chat.observation)(m["content"]), "model" if said else "user", 0, text=m["content"])
    return row


def roll_out(signal, engine, batch, mine, seed):
    """--group rollouts of each task batch[g], g in `mine`, by whomever the signal names -> Episodes in order (g, k)."""
    a, chat, limits, truth, begun, envs = signal.a, signal.chat, signal.limits, [], [], []
    for g in mine:
        for k in range(a.group):
            source = signal.source(k)
            if source == "truth":
                truth.append(demonstrate(chat, batch[g], a, limits, group_id=g, sample=k))
                continue
            envs.append(Env(batch[g], a.syntax, a.closing))
            begun.append(begin(chat, envs[-1], g, k, source, hint(batch[g], a.syntax) if source == "hinted" else None))
    done = rollout(engine, chat, envs, limits, begun, seed)
    if not a.hint_in_update:
        done = [without_hint(chat, e, env) if e.source == "hinted" else e for e, env in zip(done, envs)]
    return sorted(truth + done, key=lambda e: (e.group_id, e.sample))


SIGNALS = {"none": Signal, "sft": SFT, "ops": OPS, "hbg": HBG, "ets": ETS, "prs": PRS}


# ----------------------------------------------------------------------------------------------------------------------
# 5. The embedded base model (--model tiny): a tokenizer and a Qwen2 decoder made from nothing, pre-trained by supervision
#    alone, with the same demonstrations, environment and cross-entropy as every other SFT run here.
TEMPLATE = TEMPLATES["chatml"]


def tiny_tokenizer():
    """The real Qwen2 tokenizer class with a small vocabulary: every word of the world is one token, all other text falls
    apart into smaller pieces, at worst single bytes. Lossless; control tokens are one id each, as in Qwen2.5.
    '{"name": "read_file"}' -> ['{"', 'name', '":', ' "', 'read', '_file', '"}']

    (It must BE that class: AutoTokenizer and vLLM choose the class by the model's type, and any other would be rebuilt
    with Qwen2's splitting rule when the checkpoint is loaded, silently.)"""
    texts = ["system\nuser\nassistant\n", WORDING]
    for category in TRAIN_CATEGORIES:
        for task in make_tasks("train", category, 300) + make_tasks("train", category, 300, held_out=True):
            for syntax in "AB":
                texts += [m["content"] for m in Env(task, syntax).opening()] + [turn.user for turn in task.turns]
                texts += [hint(task, syntax), *sum(demonstration(task, syntax), [])]
    pre = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    words = set()
    for text in texts:
        for token in CONTROL:
            text = text.replace(token, "")
        words |= {word for word, _ in pre.pre_tokenize_str(text)}
    bpe = Tokenizer(models.BPE())
    bpe.train_from_iterator(sorted(words), trainers.BpeTrainer(           # no size limit in reach: merges until words are whole
        vocab_size=10_000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe = json.loads(bpe.to_str())["model"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [token for token in CONTROL if token not in special]          # not "special": they survive skip_special_tokens
    vocab = {token: i for i, token in enumerate([*special, *added, *bpe["vocab"]])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in bpe["merges"]], eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(vocab_size, a):
    torch.manual_seed(a.base_seed)
    heads = a.tiny_hidden // 32
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=a.tiny_hidden, intermediate_size=3 * a.tiny_hidden, num_hidden_layers=a.tiny_layers,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True, max_position_embeddings=4096,
        initializer_range=0.05, bos_token_id=None, eos_token_id=2, pad_token_id=0))


def noisy_demonstrations(chat, n, seed, wrong=0.0, malformed=0.0):
    """n Episodes in both syntaxes, played through the live world; wrong, malformed: shares of mistakes (tools.py)."""
    rng, limits, rows = random.Random(f"demonstrations {seed}"), Limits(20, 1024, 1024, 256), []
    stories = [task for c in TRAIN_CATEGORIES for task in make_tasks("train", c, -(-n // 3), seed=seed)]
    for i, task in enumerate(tqdm(rng.sample(stories, n), desc="demonstrations", leave=False, disable=None)):
        syntax = "AB"[i % 2]
        script = noisy_demonstration(task, syntax, rng, wrong, malformed)
        rows.append(play(chat, Env(task, syntax), script, limits))
    return rows


def pretrain_tiny(a):
    """-> model, tokenizer. An SFT run in three stages, about 3 minutes on two cores:

      short   clean demonstrations of at most 170 tokens: copying a value from the request into a call is learnt here,
              twice as fast as on the full mixture
      full    clean demonstrations of every length
      noisy   some calls wrong, a few messages malformed: sets the start success, and gives the malformed messages a small
              probability, as any real model does. Without them there is nothing for RL to (mis)credit."""
    tokenizer = tiny_tokenizer()
    chat, model = Chat(tokenizer), tiny_model(len(tokenizer), a)
    clean = noisy_demonstrations(chat, min(6000, 32 * a.base_steps), f"clean {a.base_seed}")
    noisy = noisy_demonstrations(chat, 32 * a.base_noisy_steps, f"noisy {a.base_seed}", a.base_wrong, a.base_malformed)
    short = [row for row in clean if len(row.ids) <= 170]
    total, batch, peak = a.base_steps + a.base_noisy_steps, 32, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    bar = tqdm(range(total), desc="pre-training the embedded model (once)", disable=None)
    for step in bar:
        rows = noisy if step >= a.base_steps else clean if step >= 0.7 * a.base_steps else short
        rows = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        for group in optimizer.param_groups:                         # warm-up over 50 steps, then cosine to 10 %
            group["lr"] = peak * min(1, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))
        metrics = sft_backward(model, rows, micro_tokens=8192)
        optimizer_step(model, optimizer, max_norm=1.0, loss=metrics["sft_loss"])
        bar.set_postfix(loss=f"{metrics['sft_loss']:.3f}")
    return model, tokenizer
