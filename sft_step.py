"""sft_step.py -- token log-probabilities, cross-entropy, and the optimizer step. Floor 1. At its end, for real runs: rows without
padding, and FSDP2.

Shapes:  B rows, T tokens, D hidden size, V vocabulary, N = number of trained tokens (mask 1) in the batch.

Every loss of this project is  sum over tokens / count over ALL ranks and micro-batches of the update.  So the result does
not depend on how the batch was cut up. (Averaging per micro-batch, as many trainers do, gives tokens in short batches
more weight: the same data then train differently on another number of GPUs.)
"""
import math
from contextlib import contextmanager
from types import MethodType

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def over_ranks(values, device="cpu", op=dist.ReduceOp.SUM):
    """[3.0, 1.0] on each of 2 ranks -> [6.0, 2.0] on both."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total, op)
    return total.tolist()


def micro_batches(rows, max_tokens, length=lambda row: len(row.ids), packed=False):
    """Cut rows into batches of at most max_tokens, padding included, similar lengths together (little padding):
    lengths [9, 2, 3], max_tokens 10 -> [[2, 3], [9]]"""
    batches, total = [], 0
    for row in sorted(rows, key=length):
        total = total + length(row) if packed else (len(batches[-1]) + 1 if batches else 1) * length(row)
        if not batches or total > max_tokens:
            batches.append([])
            total = length(row)
        batches[-1].append(row)
    return batches


def _logp_chunk(hidden, weight, target, watch):
    """hidden [n, D], weight [V, D], target [n], watch [K] ids -> log p(target) [n], entropy [n], p(watch) [n, K]"""
    logits = (hidden @ weight.T).float()                             # [n, V], softmax in fp32 whatever the model's dtype
    log_z = torch.logsumexp(logits, -1)                              # [n]
    logp = logits.gather(1, target[:, None])[:, 0] - log_z           # log softmax(logits)[target]
    with torch.no_grad():                                            # H = -sum p log p = log Z - sum p * logit
        entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
        watched = (logits[:, watch] - log_z[:, None]).exp()
    return logp, entropy, watched


def trunk(model, ids, **layout):
    """ids [B, T] -> hidden states [B, T, D]: the model without its logits"""
    return model.get_decoder()(input_ids=ids, use_cache=False, **layout).last_hidden_state


def lay_out(rows, packed, device):
    """Rows with .ids and .mask, here of 3 and 2 tokens -> ids, mask, row [B, T], and what else the model must know

    padded    ids [[7, 8, 9], [7, 5, 0]]    row [[0, 0, 0], [1, 1, 1]]    nothing: causal attention never looks at padding behind
    packed    ids [[7, 8, 9, 7, 5]]         row [[0, 0, 0, 1, 1]]         positions [[0, 1, 2, 0, 1]], starts [0, 3, 5]"""
    lengths = torch.tensor([len(r.ids) for r in rows], device=device)
    width, index = int(lengths.max()), torch.arange(len(rows), device=device)
    if not packed:
        ids, mask = (torch.tensor([x + [0] * (width - len(x)) for x in lists], device=device)
                     for lists in ([r.ids for r in rows], [r.mask for r in rows]))
        return ids, mask.bool(), index[:, None].expand_as(ids), {}
    ids, mask = (torch.tensor([[x for part in lists for x in part]], device=device)
                 for lists in ([r.ids for r in rows], [r.mask for r in rows]))
    starts, row = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), index.repeat_interleave(lengths)
    positions = torch.arange(len(row), device=device) - starts[row]
    return ids, mask.bool(), row[None], dict(position_ids=positions[None], cu_seq_lens_q=starts.int(), max_length_q=width)


def token_logprobs(model, rows, chunk=2048, watch=()):
    """rows with .ids and .mask (Episodes) -> logp [N], entropy [N], row [N] = which row each trained token belongs to, and
    watched [N, K] = the probabilities of the K token ids `watch` at the same places (no gradient; see rl_step.pressure).

    ids   [[7, 8, 9], [7, 5]]          the log-probability of token t comes from the hidden state at t - 1,
    mask  [[0, 1, 1], [0, 1]]    ->    logp = [log p(8 | 7), log p(9 | 7 8), log p(5 | 7)], row = [0, 0, 1]

    [B, T, V] logits never exist: the projection runs only at trained positions, `chunk` of them at a time, and each
    chunk's logits are computed again in the backward pass. (A loop over chunks WITHOUT recomputation saves nothing:
    autograd keeps every chunk.) At 16k tokens x 152k vocabulary that is 10 GB less."""
    assert not any(r.mask[0] for r in rows), "the first token of a row has nothing before it to be predicted from"
    ids, mask, row, layout = lay_out(rows, is_packed(model), model.device)                           # [B, T]
    hidden = model.trunk(ids, **layout) if is_sharded(model) else trunk(model, ids, **layout)        # [B, T, D]
    weight = model.get_output_embeddings().weight                                                    # [V, D]
    hidden = hidden[:, :-1][mask[:, 1:]]                                                             # [N, D]
    target, row = ids[:, 1:][mask[:, 1:]], row[:, 1:][mask[:, 1:]]                                   # [N]
    watch = torch.tensor(list(watch), dtype=torch.long, device=model.device)
    parts = [checkpoint(_logp_chunk, h, weight, t, watch, use_reentrant=False) if torch.is_grad_enabled()
             else _logp_chunk(h, weight, t, watch) for h, t in zip(hidden.split(chunk), target.split(chunk))]
    logp, entropy, watched = (torch.cat(column) for column in zip(*parts))
    return logp, entropy, row, watched


def sft_backward(model, rows, weight=1.0, micro_tokens=16_384):
    """Adds the gradient of  weight * -sum row_weight log p(token) / n  to .grad; n = trained tokens over all ranks.
    Cross-entropy on the masked tokens only: the model learns what it should say, not what the user or a tool says."""
    n, = over_ranks([sum(sum(r.mask) for r in rows)], model.device)
    total = 0.0
    for batch in in_step(micro_batches(rows, micro_tokens, packed=is_packed(model)), model):
        logp, _, row, _ = token_logprobs(model, batch)               # [N]
        row_weight = torch.tensor([r.weight for r in batch], device=model.device)[row]               # [N]
        loss = -weight * (row_weight * logp).sum() / n
        loss.backward()
        total += loss.item()
    return {"sft_loss": over_ranks([total], model.device)[0], "sft_tokens": n}


def optimizer_step(model, optimizer, max_norm, loss=0.0):
    """Sum the gradients of all ranks, clip, step. -> the gradient norm before clipping.

    The losses are divided by GLOBAL counts, so ranks add up (not average). A non-finite loss or gradient skips the
    update: the norm is computed after the sum, so every rank sees the same number and takes the same decision, and one
    bad micro-batch cannot leave the ranks with different weights."""
    if is_sharded(model):
        model.reshard()                                              # else the root's parameters are still the whole copies
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        if p.grad is None:                                           # this rank had nothing to train on: it adds zero
            p.grad = torch.zeros_like(p)
        if isinstance(p.grad, DTensor):                              # FSDP reduced it already, but to the MEAN over ranks
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


# ----------------------------------------------------------------------------------------------------------------------
# Without padding (train.py: --packed): the rows of a batch stand one behind the other, and attention is told where each begins.


def packed_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kw):
    """query [1, heads, T, d], key and value [1, kv_heads, T, d], cu_seq_lens_q [rows + 1] = [0, 3, 5] for rows of 3 and 2 tokens
    -> [1, T, heads, d]; every token attends to the earlier ones of its own row. Where nothing is packed: plain SDPA."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kw)
    if query.is_cuda:                                                # one kernel for all rows; it knows bf16 and fp16 only
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))                                # [T, heads, d]
        return varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                           window_size=(-1, 0), enable_gqa=True)[None], None                         # (-1, 0): causal
    cuts = cu_seq_lens_q.diff().tolist()                             # CPU: row by row
    rows = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            for q, k, v in zip(*(x.split(cuts, dim=2) for x in (query, key, value)))]
    return torch.cat(rows, 2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *a, attention_mask=None, **kw: attention_mask)      # never a [T, T] mask


def is_packed(model):
    return model.config._attn_implementation == "packed"


# ----------------------------------------------------------------------------------------------------------------------
# FSDP2 (train.py: --shard). Parameters, gradients and Adam's state are cut into one piece per rank; during an update a layer
# is whole only while it computes. Per rank: 16 bytes per parameter / ranks (fp32 master, gradient, two moments), and in the
# update one layer and the embedding in compute_dtype; while sampling with --engine hf, and while probing, the whole model.


def shard(model, device, compute_dtype):
    """Cuts the model up in place, from the CPU to the device layer by layer, so that no GPU has to hold all of it. The masters keep
    their dtype (float32); forward and backward run in compute_dtype."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)                  # what is left: embedding, last norm, output layer
    model.trunk = MethodType(trunk, model)                           # our forward pass is not model.forward, so FSDP must be
    register_fsdp_forward_method(model, "trunk")                     # told to gather parameters around it
    with torch.no_grad():                                            # the first pass fixes that `model` is the root; without
        model.trunk(torch.zeros(1, 1, dtype=torch.long, device=device))             # it every layer would take itself for one
    model.reshard()


def is_sharded(model):
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model):
    """Inside, the parameters are whole on every rank, in compute_dtype: for sampling and probing, where each rank makes as many
    passes as its own conversations need. (A gather inside such a pass would wait forever for ranks that are done.)"""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    if parts:                                                        # reshards; and forgets passes that other ranks did not make:
        model.reset_iter_state()                                     # backward gathers in the order of the passes before it, and
    for m in parts:                                                  # ranks with different memories would wait for one another
        m.set_reshard_after_forward(m is not model, recurse=False)   # the root stays whole until its backward: token_logprobs
                                                                     # uses the output weights after the forward pass


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)     # gathered tensor by tensor onto rank 0's CPU


class Padding:                                                       # the dummy row of in_step
    ids, mask = [0, 0], [0, 1]


def in_step(batches, *models):
    """Yields the batches. Under FSDP every pass gathers from all ranks, so all must make equally many: a rank that has fewer
    batches goes on with passes over a dummy row whose gradient is 0."""
    models = [m for m in models if m is not None and is_sharded(m)]
    most, = over_ranks([len(batches)], models[0].device, dist.ReduceOp.MAX) if models else [0]
    yield from batches
    for _ in range(int(most) - len(batches)):
        logps = [token_logprobs(model, [Padding])[0] for model in models]    # in a real batch's order: all forward passes,
        for logp in logps:                                                   # then the backward one; else ranks would gather
            if logp.requires_grad:                                           # different models at the same moment, and hang
                (0.0 * logp.sum()).backward()
