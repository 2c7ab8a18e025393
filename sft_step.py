"""sft_step.py -- token log-probabilities, cross-entropy, and the optimizer step. Floor 1.

Shapes:  B rows, T tokens, D hidden size, V vocabulary, N = number of trained tokens (mask 1) in the batch.

Every loss of this project is  sum over tokens / count over ALL ranks and micro-batches of the update.  So the result does
not depend on how the batch was cut up. (Averaging per micro-batch, as many trainers do, gives tokens in short batches
more weight: the same data then train differently on another number of GPUs.)
"""
import math

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint


def reduce_sum(values, device="cpu"):
    """[3.0, 1.0] on each of 2 ranks -> [6.0, 2.0] on both."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def reduce_max(value, device="cpu"):
    """3.0 on rank 0, 1.0 on rank 1 -> 3.0 on both."""
    top = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top.item()


def micro_batches(rows, max_tokens, length=lambda row: len(row.ids)):
    """Cut rows into batches whose PADDED size is at most max_tokens, similar lengths together (little padding):
    lengths [9, 2, 3], max_tokens 10 -> [[2, 3], [9]]"""
    batches, width = [], 0
    for row in sorted(rows, key=length):
        width = max(width, length(row))
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = length(row)
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


def token_logprobs(model, rows, chunk=2048, watch=()):
    """rows with .ids and .mask (Episodes) -> logp [N], entropy [N], row [N] = which row each trained token belongs to, and
    watched [N, K] = the probabilities of the K token ids `watch` at the same places (no gradient; see rl_step.pressure).

    ids   [[7, 8, 9], [7, 5]]          the log-probability of token t comes from the hidden state at t - 1,
    mask  [[0, 1, 1], [0, 1]]    ->    logp = [log p(8 | 7), log p(9 | 7 8), log p(5 | 7)], row = [0, 0, 1]

    [B, T, V] logits never exist: the projection runs only at trained positions, `chunk` of them at a time, and each
    chunk's logits are computed again in the backward pass. (A loop over chunks WITHOUT recomputation saves nothing:
    autograd keeps every chunk.) At 16k tokens x 152k vocabulary that is 10 GB less."""
    device, width = model.device, max(len(r.ids) for r in rows)
    # Right-padding needs no attention mask: with causal attention no real token ever looks at the padding behind it.
    ids = torch.tensor([r.ids + [0] * (width - len(r.ids)) for r in rows], device=device)            # [B, T]
    mask = torch.tensor([r.mask + [0] * (width - len(r.mask)) for r in rows], device=device).bool()  # [B, T]
    assert not mask[:, 0].any(), "the first token of a row has nothing before it to be predicted from"
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state                   # [B, T, D]
    hidden = hidden[:, :-1][mask[:, 1:]]                                                             # [N, D]
    target = ids[:, 1:][mask[:, 1:]]                                                                 # [N]
    row = torch.arange(len(rows), device=device)[:, None].expand(-1, width - 1)[mask[:, 1:]]         # [N]
    weight = model.get_output_embeddings().weight                                                    # [V, D]
    watch = torch.tensor(list(watch), dtype=torch.long, device=device)
    parts = [checkpoint(_logp_chunk, h, weight, t, watch, use_reentrant=False) if torch.is_grad_enabled()
             else _logp_chunk(h, weight, t, watch) for h, t in zip(hidden.split(chunk), target.split(chunk))]
    logp, entropy, watched = (torch.cat(column) for column in zip(*parts))
    return logp, entropy, row, watched


def sft_backward(model, rows, weight=1.0, micro_tokens=16_384):
    """Adds the gradient of  weight * -sum row_weight log p(token) / n  to .grad; n = trained tokens over all ranks.
    Cross-entropy on the masked tokens only: the model learns what it should say, not what the user or a tool says."""
    n, = reduce_sum([sum(sum(r.mask) for r in rows)], model.device)
    total = 0.0
    for batch in micro_batches(rows, micro_tokens):
        logp, _, row, _ = token_logprobs(model, batch)               # [N]
        row_weight = torch.tensor([r.weight for r in batch], device=model.device)[row]               # [N]
        loss = -weight * (row_weight * logp).sum() / n
        loss.backward()
        total += loss.item()
    return {"sft_loss": reduce_sum([total], model.device)[0], "sft_tokens": n}


def optimizer_step(model, optimizer, max_norm, loss=0.0):
    """Sum the gradients of all ranks, clip, step. -> the gradient norm before clipping.

    The losses are divided by GLOBAL counts, so ranks add up (not average). A non-finite loss or gradient skips the
    update: the norm is computed after the sum, so every rank sees the same number and takes the same decision, and one
    bad micro-batch cannot leave the ranks with different weights."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        if p.grad is None:                                           # this rank had nothing to train on: it adds zero
            p.grad = torch.zeros_like(p)
        if dist.is_initialized():
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    finite = math.isfinite(norm.item()) and math.isfinite(loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm.item(), "skipped_updates": int(not finite)}
