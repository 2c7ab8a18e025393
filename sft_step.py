"""sft_step.py -- what all losses stand on: processes, who attends to whom in a pass, token log-probabilities;
then cross-entropy, the optimizer step, the SFT phase, FSDP2.

Shapes:  B rows, T tokens, D hidden size, V vocabulary, N = number of trained tokens (mask 1) in the batch.
A row is an Episode (rollout.py) that is trained, whatever the loss.

Every loss of this project is  sum over tokens / count over ALL ranks and micro-batches of the update.  So the
result does not depend on how the batch was cut up. (Averaging per micro-batch, as many trainers do, gives
tokens in short batches more weight: the same data then train differently on another number of GPUs.) """
import math
import random
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType, SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tools import UserError

# ------------------------------------------------------------------------------------------------------------
# 1. Processes. Each rank trains its share of an update; only sums are exchanged.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def my_share(items):
    """["a", "b", "c"] on 2 ranks -> ["a", "c"] on rank 0, ["b"] on rank 1"""
    return items[rank()::world_size()]


def over_ranks(values, op=dist.ReduceOp.SUM):
    """[3.0, 1.0] on each of 2 ranks -> [6.0, 2.0] on both."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    if dist.is_initialized():
        dist.all_reduce(total, op)
    return total.tolist()


def gather(items):
    """[a, b] on rank 0, [c] on rank 1 -> [a, b, c] on both"""
    if not dist.is_initialized():
        return items
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def rank0_first(make):
    """Only rank 0 calls make(); all ranks get what it returns. A UserError there ends all of them."""
    outcome = [None, None]                       # result, mistake
    if rank() == 0:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    result, mistake = outcome
    if mistake:
        raise UserError(mistake)
    return result


def is_sharded(model):
    return isinstance(model, FSDPModule)


PADDING = SimpleNamespace(ids=[0, 0], mask=[0, 1])


def in_step(batches, *models):
    """Yields the batches. Under FSDP every pass gathers from all ranks, so all must make equally many: a rank
    that has fewer batches goes on with passes over PADDING, whose gradient is 0."""
    models = [m for m in models if is_sharded(m)]
    most, = over_ranks([len(batches)], dist.ReduceOp.MAX) if models else [0]
    yield from batches
    for _ in range(int(most) - len(batches)):
        # In a real batch's order: all forward passes, then the backward one. Else ranks would gather
        # different models at the same moment, and hang.
        total = sum(token_logprobs(model, [PADDING]).logp.sum() for model in models)
        if total.requires_grad:
            (0.0 * total).backward()


# ------------------------------------------------------------------------------------------------------------
# 2. Who attends to whom, without padding. Layout, in training: the prompt that several rows share is computed
#    once. SlotCache, in sampling (rollout.HFEngine): what a conversation has said is computed once.


class Layout:
    """Rows with .ids and .mask -> one line of T tokens. Two rollouts of one prompt, and a row of its own:

        rows       [1 2 3 | 7 8]  [1 2 3 | 9]  [4 5 | 6]     |: trained from here on; what stands before it,
        ids        [1 2 3   7 8   9   4 5 6]                     if it is equal, is the prompt that they share
        positions  [0 1 2   3 4   3   0 1 2]
        place[1]   [0 1 2   5]                                 where the tokens of row 1 stand
        families   [[3, 2, 1], [0, 3]]           lengths: a prompt (0: none is shared), then its continuations

    A token of a prompt sees the prompt so far; one of a continuation the prompt and its own row so far."""

    def __init__(self, rows, device):
        ids, positions, self.place, self.families = [], [], [None] * len(rows), []
        sharing = {prompt: members for prompt, members in by_prompt(rows).items() if len(members) > 1}
        shared = [i for members in sharing.values() for i in members]
        sharing[()] = [i for i in range(len(rows)) if i not in shared]       # who shares nothing: one family
        for prompt, members in sharing.items():
            prompt_place = list(range(len(ids), len(ids) + len(prompt)))
            ids += prompt
            positions += range(len(prompt))
            for i in members:
                own = rows[i].ids[len(prompt):]
                self.place[i] = prompt_place + list(range(len(ids), len(ids) + len(own)))
                ids += own
                positions += range(len(prompt), len(rows[i].ids))
            if members:
                self.families.append([len(prompt), *(len(rows[i].ids) - len(prompt) for i in members)])
        self.ids = torch.tensor([ids], device=device)                                                # [1, T]
        self.positions = torch.tensor([positions], device=device)                                    # [1, T]

    def attend(self, layer, q, k, v, scale):
        """q [1, heads, T, d], k and v [1, kv_heads, T, d] -> [1, T, heads, d]"""
        kernel = self._attend_varlen if q.is_cuda and q.dtype != torch.float32 else self._attend_families
        return kernel(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), scale)[None]

    def _attend_families(self, q, k, v, scale):
        """One call per prompt, one for all of its continuations: padded, for the time of the attention, to
        the longest; nobody looks ahead, so the padding needs no mask of its own.   q, k, v [T, heads, d]"""
        cuts, out = sum(self.families, []), []
        pieces = zip(q.split(cuts), k.split(cuts), v.split(cuts))    # of one split: cheap to differentiate
        for shared, *lengths in self.families:
            q_prompt, k_prompt, v_prompt = next(pieces)
            if shared:
                out.append(causal(q_prompt[None], k_prompt[None], v_prompt[None], scale)[0])
            own = [next(pieces) for _ in lengths]
            qs, ks, vs = (pad_sequence(x, batch_first=True) for x in zip(*own))  # [K, L, heads, d]
            ks = torch.cat([k_prompt.expand(len(ks), -1, -1, -1), ks], 1)  # [K, P + L, heads, d]
            vs = torch.cat([v_prompt.expand(len(vs), -1, -1, -1), vs], 1)
            answers = causal(qs, ks, vs, scale)  # [K, L, heads, d]
            out += [answer[:n] for answer, n in zip(answers, lengths)]
        return torch.cat(out)

    def _attend_varlen(self, q, k, v, scale):
        """One kernel for all segments (16 bits only); a prompt's keys are repeated for its continuations"""
        keys, cuts_q, cuts_k, longest_q, longest_k = self.segments
        return varlen_attn(q, k[keys], v[keys], cuts_q, cuts_k, longest_q, longest_k, scale=scale,
                           window_size=(-1, 0), enable_gqa=True)     # (-1, 0): causal, aligned at the ends

    @cached_property
    def segments(self):
        """-> whose keys each segment sees, where the segments begin, and how long the longest is"""
        keys, lengths_q, lengths_k, start = [], [], [], 0
        for shared, *lengths in self.families:
            prompt = range(start, start + shared)
            for n in ([shared] if shared else []) + lengths:
                own = range(start, start + n)
                seen = own if own == prompt else [*prompt, *own]
                keys += seen
                lengths_q.append(n)
                lengths_k.append(len(seen))
                start += n
        tensor = lambda values: torch.tensor(values, device=self.ids.device)
        cuts_q, cuts_k = (tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
        return tensor(keys), cuts_q, cuts_k, max(lengths_q), max(lengths_k)


def by_prompt(rows):
    """-> {what stands before the first trained token: [indices of the rows that begin so]}"""
    found = {}
    for i, row in enumerate(rows):
        found.setdefault(tuple(row.ids[:row.mask.index(1)]), []).append(i)
    return found


def causal(q, k, v, scale):
    """q [K, L, heads, d], k and v [K, P + L, kv_heads, d]: query i sees keys 0..P + i -> like q"""
    n, m = q.shape[1], k.shape[1]
    mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


class SlotCache:
    """Keys and values of N conversations, one slot each, with a length of its own:

        kv  [layers, 2, N, kv_heads, capacity, head_dim]

    The live conversations stand in slots 0..n-1, so attention reads the slice [:n] without copying. One pass
    feeds each of them one token in the middle of a message, a whole tool result at its beginning. The LAST
    tokens of all attend together; what stands before them attends slot by slot: no padding; only keys are
    masked, up to the longest conversation."""

    def __init__(self, n_layers, n_slots, longest):
        self.n_layers, self.n_slots, self.longest, self.kv = n_layers, n_slots, longest, None

    def next_pass(self, cached, fed, device):
        """cached: how many tokens of each live conversation are here; fed: {slot: its next tokens}
        cached [5, 8], fed {0: [7], 1: [3, 4, 9]} -> ids [7 3 4 9], positions [5 8 9 10], slots [0 1 1 1]"""
        ids, slots, positions, n = [], [], [], len(cached)
        last, self.ends = [0] * n, [0] * n       # who is not fed attends to something, and nobody looks
        self.before_last = {}                    # {slot: where in the pass its tokens before the last stand}
        for slot, new in fed.items():
            if len(new) > 1:
                self.before_last[slot] = slice(len(ids), len(ids) + len(new) - 1)
            ids += new
            slots += [slot] * len(new)
            positions += range(cached[slot], cached[slot] + len(new))
            last[slot], self.ends[slot] = len(ids) - 1, positions[-1]
        self.width = max(self.ends) + 1
        tensor = lambda values: torch.tensor(values, device=device)
        self.ids, self.positions = tensor([ids]), tensor([positions])                                # [1, T]
        self.slots, self.last, self.fed = tensor(slots), tensor(last), tensor(list(fed))     # [T], [n], [fed]
        seen = torch.arange(self.width, device=device) <= tensor(self.ends)[:, None]  # [n, width]
        self.seen = seen[:, None, None]

    def attend(self, layer, q, k, v, scale):
        """q [1, heads, T, d], k and v [1, kv_heads, T, d] of the new tokens -> [1, T, heads, d]"""
        if self.kv is None or self.width > self.kv.shape[4]:         # grows by half: amortised copies
            capacity = max(self.width, min(self.width + max(256, self.width // 2), self.longest))
            grown = k.new_zeros(self.n_layers, 2, self.n_slots, k.shape[1], capacity, k.shape[3])
            if self.kv is not None:
                grown[:, :, :, :, :self.kv.shape[4]] = self.kv
            self.kv = grown
        keys, values = self.kv[layer]            # [N, kv_heads, capacity, d]
        keys[self.slots, :, self.positions[0]] = k[0].transpose(0, 1)
        values[self.slots, :, self.positions[0]] = v[0].transpose(0, 1)
        n, every_slot = len(self.last), not self.before_last and len(self.fed) == len(self.last)
        last = q[0].transpose(0, 1) if every_slot else q[0].transpose(0, 1)[self.last]  # [n, heads, d]
        together = scaled_dot_product_attention(
            last[:, :, None], keys[:n, :, :self.width], values[:n, :, :self.width], self.seen, scale=scale,
            enable_gqa=True)[:, :, 0]
        if every_slot:                           # one token each, in the order of the slots
            return together[None]
        out = q.new_empty(q.shape[2], q.shape[1], q.shape[3])  # [T, heads, d]
        out[self.last[self.fed]] = together[self.fed]
        for slot, place in self.before_last.items():
            queries = q[:, :, place].transpose(1, 2)                 # [1, tokens, heads, d]
            own = self.kv[layer, :, slot, :, :self.ends[slot]].transpose(1, 2)   # [2, keys, kv_heads, d]
            out[place] = causal(queries, own[0][None], own[1][None], scale)[0]
        return out[None]

    def copy(self, source, target, length):
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]


def layout_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kw):
    """What the model's layers call: the layout (or cache) of the pass knows who sees whom. Without: plain."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kw)
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("layout", layout_attention)
# and it needs no mask of Hugging Face's
AttentionMaskInterface.register("layout", lambda *a, attention_mask=None, **kw: attention_mask)


def trunk(model, layout):
    """-> hidden states [1, T, D]: the model without its logits"""
    if model.config._attn_implementation != "layout":
        model.set_attn_implementation("layout")
    return model.get_decoder()(input_ids=layout.ids, position_ids=layout.positions, use_cache=False,
                               layout=layout).last_hidden_state


def micro_batches(rows, max_tokens):
    """Cut rows into batches of at most max_tokens tokens, those of one prompt together, where it counts once:
    prompts of 5, 5 and 0 tokens with 4, 3 and 9 behind them, max_tokens 14 -> [[second, first], [third]]"""
    batches, room = [], 0
    rows = sorted(rows, key=lambda row: len(row.ids))                # so that attention pads little
    for prompt, members in by_prompt(rows).items():
        inside = False                           # is the prompt in this batch?
        for i in members:
            length = len(rows[i].ids)
            cost = length - len(prompt) if inside else length
            if cost > room:
                batches.append([])
                cost, room = length, max_tokens
            batches[-1].append(rows[i])
            room, inside = room - cost, True
    return batches


# ------------------------------------------------------------------------------------------------------------
# 3. Log-probabilities of the trained tokens
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}      # of one chunk's logits; a handful of them live at a time


@dataclass
class Scored:
    """What one forward pass says about the trained tokens of its rows"""
    logp: torch.Tensor                           # [N] log p(token | everything before it)
    entropy: torch.Tensor                        # [N] of the model's distribution there, no gradient
    owner: torch.Tensor                          # [N] the row that each token belongs to
    watched: torch.Tensor  # [N, K] probabilities of the token ids `watch` there, no gradient
    first_choice: torch.Tensor                   # [N] is it the most probable token there?


def token_logprobs(model, rows, chunk=None, watch=()):
    """rows with .ids and .mask (Episodes) -> Scored

    ids   [[7, 8, 9], [7, 5]]          the log-probability of token t comes from the hidden state at t - 1,
    mask  [[0, 1, 1], [0, 1]]    ->    logp = [log p(8 | 7), log p(9 | 7 8), log p(5 | 7)], owner = [0, 0, 1]

    [T, V] logits never exist: the projection runs only at trained positions, `chunk` of them at a time, and
    each chunk's logits are computed again in the backward pass, else autograd would keep every chunk."""
    assert not any(r.mask[0] for r in rows), "the first token of a row has nothing before it"
    layout, device = Layout(rows, model.device), model.device
    hidden = model.trunk(layout) if is_sharded(model) else trunk(model, layout)  # [1, T, D]
    before, owner = [], []
    for i, (row, place) in enumerate(zip(rows, layout.place)):
        before += [place[t - 1] for t, trained in enumerate(row.mask) if trained]
        owner += [i] * sum(row.mask)
    hidden = hidden[0].index_select(0, torch.tensor(before, dtype=torch.long, device=device))  # [N, D]
    target = at_trained(rows, "ids", device)                                                         # [N]
    weight = model.get_output_embeddings().weight                                                    # [V, D]
    chunk = chunk or max(1, CHUNK_BYTES[device.type] // (4 * len(weight)))
    watch = torch.tensor(list(watch), dtype=torch.long, device=device)
    parts = []
    for h, t in zip(hidden.split(chunk), target.split(chunk)):       # without gradients checkpoint only calls
        parts.append(checkpoint(_logp_chunk, h, weight, t, watch, use_reentrant=False))
    logp, entropy, watched, first_choice = (torch.cat(column) for column in zip(*parts))
    owner = torch.tensor(owner, dtype=torch.long, device=device)
    return Scored(logp, entropy, owner, watched, first_choice)


def _logp_chunk(hidden, weight, target, watch):
    """hidden [n, D], weight [V, D], target [n], watch [K]
    -> log p [n], entropy [n], p(watch) [n, K], is it the first choice? [n]"""
    logits = (hidden @ weight.T).float()         # [n, V], softmax in fp32 whatever the dtype
    log_z = torch.logsumexp(logits, -1)                              # [n]
    logp = logits.gather(1, target[:, None])[:, 0] - log_z           # log softmax(logits)[target]
    with torch.no_grad():                        # H = -sum p log p = log Z - sum p * logit
        entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
        watched = (logits[:, watch] - log_z[:, None]).exp()
        first_choice = logits.argmax(-1) == target
    return logp, entropy, watched, first_choice


def at_trained(rows, name, device):
    """Rows with .mask and a list of one value per token -> the values at the trained tokens, row after row
    [N] mask [[0, 1, 1], [0, 1]], logprobs [[0, -.1, -.2], [0, -.3]] -> [-.1, -.2, -.3]"""
    values = []
    for row in rows:
        values += [value for value, trained in zip(getattr(row, name), row.mask) if trained]
    return torch.tensor(values, device=device)


# ------------------------------------------------------------------------------------------------------------
# 4. Cross-entropy, the optimizer step, the SFT phase


def sft_backward(model, rows, weight=1.0, micro_tokens=16_384):
    """Adds the gradient of  weight * -sum row_weight log p(token) / n  to .grad; n = trained tokens (global).
    Cross-entropy on the masked tokens only: the model learns what it should say, not what others say."""
    n, = over_ranks([sum(sum(r.mask) for r in rows)])
    total = 0.0
    for batch in in_step(micro_batches(rows, micro_tokens), model):
        scored = token_logprobs(model, batch)
        row_weight = torch.tensor([r.weight for r in batch], device=model.device)[scored.owner]      # [N]
        loss = -(row_weight * scored.logp).sum() / n
        (weight * loss).backward()
        total += loss.item()
    return {"sft_loss": over_ranks([total])[0], "sft_tokens": n}


def optimizer_step(model, optimizer, loss=0.0, max_norm=1.0):
    """Sum the gradients of all ranks (the losses are divided by GLOBAL counts, so they add up), clip, step.

    A non-finite loss or gradient skips the update: the norm is that of the sum, so every rank takes the same
    decision, and one bad micro-batch cannot leave the ranks with different weights."""
    if is_sharded(model):
        model.reshard()                          # else the root's parameters are still whole
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        if p.grad is None:                       # this rank had nothing to train: it adds zero
            p.grad = torch.zeros_like(p)
        if isinstance(p.grad, DTensor):          # FSDP reduced it, but to the MEAN over ranks
            p.grad.mul_(dist.get_world_size())
        elif dist.is_initialized():
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = math.isfinite(norm.item()) and math.isfinite(loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm.item(), "skipped_updates": int(not finite)}


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def sft_update(model, optimizer, rows, lr, micro_tokens):
    """One cross-entropy update on `rows`, of which every rank trains its share -> metrics"""
    set_lr(optimizer, lr)
    model.train()
    metrics = sft_backward(model, my_share(rows), micro_tokens=micro_tokens)
    return metrics | optimizer_step(model, optimizer, metrics["sft_loss"])


def sft_phase(model, optimizer, rows, args, seed):
    """A whole SFT phase: --sft_epochs shuffled passes over rows -> metrics"""
    if not rows:
        return {"sft_rows": 0, "sft_updates": 0, "sft_visits": 0, "skipped_updates": 0}
    batches, done = [], []
    for epoch in range(args.sft_epochs):
        shuffled = random.Random(f"{seed} {epoch}").sample(rows, len(rows))
        batches += message_batches(shuffled, args.sft_batch)
    rising = 0.1 if args.schedule in ("sft", "sft_then_rl") else 0.3             # the paper's
    quiet = None if rank() == 0 else True
    for u, some in enumerate(tqdm(batches, desc="SFT phase", leave=False, disable=quiet)):
        rate = args.sft_lr * phase_rate(u, len(batches), rising)
        done.append(sft_update(model, optimizer, some, rate, args.micro_tokens))
    means = {name: sum(m[name] for m in done) / len(done) for name in ("sft_loss", "grad_norm")}
    return means | {"sft_rows": len(rows), "sft_visits": args.sft_epochs * len(rows),
                    "sft_updates": len(done), "skipped_updates": sum(m["skipped_updates"] for m in done),
                    "sft_loss_first": done[0]["sft_loss"], "sft_loss_last": done[-1]["sft_loss"]}


def phase_rate(u, total, rising):
    """Share of the rate that update u of a phase gets: linear to 1 over the share `rising` of the updates,
    then a cosine to 0.   4 updates, rising .3 -> 1, 1, .75, .25"""
    first = int(rising * total)
    if u < first:
        return (u + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (u - first) / (total - first)))


def message_batches(rows, size):
    """Cuts rows into batches of about `size` assistant messages each: the paper's unit. (It trains a message
    per row, with all that was said before it; here a conversation's messages are trained in one pass.) A row
    stands in the batch in which its last message falls:   rows of 4, 3, 5, 4 messages, size 8 ->
    [[4, 3], [5, 4]].   So 297 or 300 conversations of BFCL are 23 updates of 128, as in the paper."""
    total = sum(len(row.states) for row in rows)
    n, end, batches = max(1, round(total / size)), 0, {}
    for row in rows:
        end += len(row.states)
        nth = (end - 1) * n // total             # of n equal parts, the one that its last message falls into
        batches.setdefault(nth, []).append(row)
    return list(batches.values())


def shuffled_passes(items, start, n, seed):
    """n items from position `start` of an endless stream of shuffled passes: a pure function, so resuming
    needs no more than that.   ("abc", 2, 3, seed) -> the last of one pass, the first two of the next"""
    stream = []
    for lap in range(start // len(items), -(-(start + n) // len(items))):  # the passes that it touches
        stream += random.Random(f"{seed} {lap}").sample(items, len(items))
    return stream[start % len(items):][:n]


# ------------------------------------------------------------------------------------------------------------
# 5. FSDP2 (train.py: --shard). Parameters, gradients and Adam's state are cut into one piece per rank; during
#    an update a layer is whole only while it computes. Per rank: 16 bytes per parameter / ranks (fp32 master,
#    gradient, two moments), and in the update one layer and the embedding in compute_dtype; while sampling
#    with --engine hf, and while probing, the whole model.


def shard(model, device, compute_dtype):
    """Cuts the model up in place, from the CPU to the device layer by layer, so that no GPU has to hold all
    of it. The masters keep their dtype (float32); forward and backward run in compute_dtype."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # what is left: embedding, last norm, output layer
    model.trunk = MethodType(trunk, model)       # our forward pass is not model.forward, so FSDP
    register_fsdp_forward_method(model, "trunk")  # must be told to gather parameters around it
    with torch.no_grad():                        # the first pass fixes that `model` is the root;
        model.trunk(Layout([PADDING], device))   # else every layer would take itself for one
    model.reshard()


@contextmanager
def gathered(model):
    """Inside, the parameters are whole on every rank, in compute_dtype: for sampling and probing, where each
    rank makes as many passes as its own conversations need. (A gather inside such a pass would wait forever
    for ranks that are done.)"""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    if parts:
        # Reshards; and forgets passes that other ranks did not make: backward gathers in the order of the
        # passes before it, and ranks with different memories would wait for one another.
        model.reset_iter_state()
    for m in parts:  # the root stays whole until its backward: token_logprobs uses the
        m.set_reshard_after_forward(m is not model, recurse=False)   # output weights after the forward pass


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)     # tensor by tensor onto rank 0's CPU
