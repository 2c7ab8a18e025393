"""rl_step.py -- advantages and the policy loss (GRPO and its relatives). Floor 2.

GRPO in one paragraph: sample G rollouts of one prompt, reward each, and take as advantage how much better than its own
group a rollout did. No value network. Every token that the rollout sampled is pushed up (A > 0) or down (A < 0) alike:

    A_i = (r_i - mean(r)) / std(r)                                  one number per rollout
    L   = -sum_t min(rho_t A, clip(rho_t, 1 - e, 1 + e) A) / n      rho_t = p_new(token t) / p_old(token t)

p_old is the policy before the step's updates: the sampler's numbers, or with --correction the trainer's.

Here the paper's account of the collapse begins: the reward says THAT the rollout was good, not WHICH token was in its place, so
an open tag at the end of a lucky rollout is pushed up as if it had earned the reward. `pressure` measures whether that is so.

Shapes:  N = trained tokens of the micro-batch, flat;  row [N] tells which rollout each belongs to.
"""
import math

import torch
import torch.distributed as dist

from sft_step import in_step, is_packed, micro_batches, over_ranks, token_logprobs

KLS = ("k1", "k2", "k3")
CORRECTIONS = ("none", "token", "sequence")


def advantages(rewards, group_ids, normalise=True):
    """rewards [1, 0, 0, 1, 1], group_ids [7, 7, 7, 8, 8] -> [1.15, -0.58, -0.58, 0, 0]

    std is the unbiased one (n - 1), as in the paper's code. A group whose rewards are all equal says nothing: 0.
    normalise=False (Dr. GRPO): only the mean is subtracted; dividing by std weighs very easy and very hard prompts up."""
    out = [0.0] * len(rewards)
    for g in set(group_ids):
        members = [i for i, gid in enumerate(group_ids) if gid == g]
        r = torch.tensor([rewards[i] for i in members], dtype=torch.float64)
        a = r - r.mean()
        if normalise and len(members) > 1:
            a = a / (r.std() + 1e-6)
        for i, value in zip(members, a.tolist()):
            out[i] = value
    return out


def clipped(ratio, adv, low, high):
    """min(rho A, clip(rho) A): pessimistic, nothing is gained by leaving the trust region   [N]"""
    return torch.min(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)


def grpo(logp, ratio, adv, low, high, c):
    """Dual clip: for A < 0 and rho >> 1 the product rho A is unbounded, so it is capped at c A."""
    objective = clipped(ratio, adv, low, high)
    return -torch.where(adv < 0, torch.max(objective, c * adv), objective)


def plain(logp, ratio, adv, low, high, c):
    """PPO's clip. DAPO is this with clip-higher (train.py sets high = .28: rare tokens may grow faster)."""
    return -clipped(ratio, adv, low, high)


def cispo(logp, ratio, adv, low, high, c):
    """Clip the WEIGHT and keep the gradient, so that no token is ever dropped: -sg(min(rho, 1 + e)) A log p"""
    return -ratio.clamp(max=1 + high).detach() * adv * logp


# Loss per token [N] from logp, ratio, adv [N] and the clip constants. A new loss is one more function here. What also
# belongs to a variant: dr_grpo = advantages that are not divided by std, and a constant normaliser; gspo = one ratio per
# sequence, and the mean over sequences (see policy_loss and normaliser).
LOSSES = {"grpo": grpo, "dr_grpo": plain, "dapo": plain, "gspo": plain, "cispo": cispo}


def policy_loss(logp, old, adv, row, lengths, loss="grpo", clip=(0.2, 0.2), dual_clip=3.0, shaped=None):
    """logp, old, adv [N] (new and sampled log-probabilities; each token's advantage), lengths [B] trained tokens per row,
    shaped [N] bool: tokens of ground truth whose ratio is replaced by p / (p + 0.1) (OPS as the paper intends: there is no
    old policy to compare with, and unlikely tokens get the largest gradient)
    -> loss per token [N], was it clipped [N].   The caller sums and divides (see `normaliser`)."""
    low, high = clip
    log_ratio = (logp - old).clamp(-20, 20)                          # the clamp keeps exp finite
    if loss == "gspo":   # one ratio per SEQUENCE: the geometric mean of its tokens' ratios, so that length does not matter
        log_ratio = (torch.zeros_like(lengths).index_add(0, row, log_ratio) / lengths)[row]          # [B] -> [N]
    ratio = log_ratio.exp()                                          # rho = p_new / p_old
    if shaped is not None:
        ratio = torch.where(shaped, logp.exp() / (logp.exp() + 0.1), ratio)
    loss_t = LOSSES[loss](logp, ratio, adv, low, high, dual_clip)    # [N]
    if loss == "gspo":   # mean over the tokens of a sequence; the caller then averages over sequences
        loss_t = loss_t / lengths[row]
    outside = torch.where(adv > 0, ratio > 1 + high, (adv < 0) & (ratio < 1 - low))
    return loss_t, outside.float()


def sampler_correction(old, sampler, row, n_rows, kind, cap):
    """Truncated importance sampling (TIS). Another engine, or another precision, samples from a slightly different policy
    than the one that is trained. Then rho_t = p_new / p_old, with p_old of the TRAINER before its update, is the ratio of the
    clip, and the weight w makes up for the tokens having come from p_sampler; no gradient flows through w:

        L = -sum_t w_t min(rho_t A, clip(rho_t) A) / n          token     w_t = min(C, p_old(t) / p_sampler(t))
                                                                sequence  w_t = min(C, prod_s p_old(s) / p_sampler(s))

    token is low in variance, and ignores that the contexts came from the sampler too; sequence, over all trained tokens of
    the rollout, has no bias but that of the cap, and its variance grows with the length.
    old, sampler [N] log-probabilities (equal where nothing is to be corrected: w = 1), row [N] < n_rows   -> w [N]"""
    log_w = old - sampler                                            # [N]
    if kind == "sequence":
        log_w = log_w.new_zeros(n_rows).index_add(0, row, log_w)[row]                                # [B] -> [N]
    return log_w.clamp(max=math.log(cap)).exp()                      # = min(C, exp(log_w)), and exp never overflows


def normaliser(loss, n_tokens, n_rows, max_tokens):
    """What the sum of per-token losses is divided by; all counts are global.
      grpo, dapo, cispo   tokens                     every token weighs the same (the paper's aggregation)
      gspo                rollouts                   every sequence weighs the same
      dr_grpo             rollouts x max_tokens      a constant: long wrong answers get no discount"""
    return {"gspo": n_rows, "dr_grpo": n_rows * max_tokens}.get(loss, n_tokens)


def kl_penalty(logp, ref, kind="k3"):
    """Per-token estimate of KL(new || reference) from tokens of the new policy; d = log p_ref - log p_new   [N]
      k1  -d                 unbiased, high variance, may be negative
      k2  d^2 / 2            biased, always positive; its GRADIENT is the KL's
      k3  exp(d) - d - 1     unbiased, always positive (the paper's)"""
    d = (ref - logp).clamp(-20, 20)
    return {"k1": -d, "k2": d * d / 2, "k3": (d.exp() - d - 1).clamp(-10, 10)}[kind]


def pressure(adv, p, target, malformed, ids):
    """Where does the push on a control token's logit come from? The policy gradient (at ratio 1 and without clipping: exactly
    that of a step's first update) moves logit k at place t by

        d/dlogit_k  A_t log p(x_t)  =  A_t (1[x_t = k] - p_t(k))

    so a token is pushed where it was sampled, by A (1 - p), and where something else was sampled, by -A p: a NEGATIVE
    advantage on other tokens raises it too. The sums run over ALL places, right and wrong ones: what stood there in the
    ground truth is not known of a rollout. adv, target [N], malformed [N] (the token's message is not clean), p [N, K]
    -> [K, 4] sums over the tokens:   sampled in a clean message | sampled in a malformed one | not sampled, A > 0 | A < 0"""
    k = target[:, None] == torch.tensor(ids, device=target.device)                                   # [N, K]
    g, a = adv[:, None] * (k.float() - p), adv[:, None]                                              # [N, K], [N, 1]
    bad = malformed[:, None]
    return torch.stack([(g * part).sum(0) for part in (k & ~bad, k & bad, ~k & (a > 0), ~k & (a < 0))], -1)


PRESSURES = ("clean", "malformed", "others_up", "others_down")       # the four columns, as metrics: push/open|clean, ...


@torch.no_grad()
def recompute_logprobs(model, rows, micro_tokens=16_384, corrected=()):
    """Replace .logprobs by the trainer's own, where nobody sampled the row as it is trained (ground truth, removed hints,
    re-encoded text). The ratio then starts at 1. -> of the hinted rows, the mean over all ranks' tokens of (old value - new
    value): the log ratio p(token | hint) / p(token | no hint) that the update ignores.
    Rows of the sources `corrected` keep .logprobs, and the trainer's own become .old (see sampler_correction)."""
    gap, n = 0.0, 0
    for batch in in_step(micro_batches(rows, micro_tokens, packed=is_packed(model)), model):
        logp, *_ = token_logprobs(model, batch)
        values = iter(logp.tolist())
        for r in batch:
            own = [next(values) if m else 0.0 for m in r.mask]
            if r.source == "hinted":
                gap, n = gap + sum(r.logprobs) - sum(own), n + sum(r.mask)
            setattr(r, "old" if r.source in corrected else "logprobs", own)
    gap, n = over_ranks([gap, n], model.device)
    return gap / max(n, 1)


def rl_backward(model, rows, adv, *, loss="grpo", clip=(0.2, 0.2), dual_clip=3.0, kl="k3", kl_weight=0.0, reference=None,
                shaped=False, masked_ids=(), watch=None, correction="none", cap=2.0, micro_tokens=16_384, max_tokens=2048):
    """Adds the gradient of  sum(policy loss) / n + kl_weight * sum(KL) / n_tokens  to .grad.

    rows: Episodes of this rank, adv: their advantages (list of floats). Rollouts with advantage 0 have no policy
    gradient: they are left out of the forward pass (unless a KL term needs them) but stay in the count n, otherwise the
    step size would depend on how many groups happened to be mixed.
    shaped: ground-truth rows use the shaped ratio. masked_ids: tokens that a NEGATIVE advantage does not push.
    watch: {"open": id, "end": id}, whose pressure (see above) is measured on the way, per trained token.
    correction, cap: of the gap between trainer and sampler, for rows that have .old (see sampler_correction)."""
    device = model.device
    n_tokens, n_rows = over_ranks([sum(sum(r.mask) for r in rows), len(rows)], device)
    n = normaliser(loss, n_tokens, n_rows, max_tokens)
    pairs = [(r, a) for r, a in zip(rows, adv, strict=True) if a != 0.0 or kl_weight > 0]
    watch, sums, gap_max = watch or {}, torch.zeros(8, dtype=torch.float64), 0.0
    push = torch.zeros(len(watch), len(PRESSURES), dtype=torch.float64)
    batches = micro_batches(pairs, micro_tokens, length=lambda pair: len(pair[0].ids), packed=is_packed(model))
    for batch in in_step(batches, model, reference):
        batch_rows = [r for r, _ in batch]
        logp, entropy, row, watched = token_logprobs(model, batch_rows, watch=watch.values())        # [N] each, [N, K]
        trained = lambda of: torch.tensor([x for r in batch_rows for x, m in zip(of(r), r.mask) if m], device=device)
        sampler, old, target = trained(lambda r: r.logprobs), trained(lambda r: r.old or r.logprobs), trained(lambda r: r.ids)  # [N]
        a = torch.tensor([a for _, a in batch], device=device)[row]                                  # [N]
        if masked_ids:
            a = torch.where((a < 0) & torch.isin(target, torch.tensor(masked_ids, device=device)), 0.0, a)
        truth = torch.tensor([r.source == "truth" for r in batch_rows], device=device)[row] if shaped else None  # [N]
        lengths = torch.tensor([float(sum(r.mask)) for r in batch_rows], device=device)              # [B]
        loss_t, was_clipped = policy_loss(logp, old, a, row, lengths, loss, clip, dual_clip, truth)  # [N]
        if correction != "none":
            loss_t = loss_t * sampler_correction(old, sampler, row, len(batch_rows), correction, cap)            # [N]
        total = loss_t.sum() / n
        kl_t = torch.zeros_like(logp)
        if kl_weight > 0:
            with torch.no_grad():
                ref, *_ = token_logprobs(reference, batch_rows)
            kl_t = kl_penalty(logp, ref, kl)
            total = total + kl_weight * kl_t.sum() / n_tokens
        total.backward()
        if watch:
            malformed = torch.tensor([s.state not in ("call", "reply") for r in batch_rows for s in r.spans
                                      if s.who == "model" for _ in range(s.start, s.end)], device=device)       # [N]
            push += pressure(a, watched, target, malformed, list(watch.values())).double().cpu()
        with torch.no_grad():
            sampled = torch.tensor([float(r.source == "policy") for r in batch_rows], device=device)[row]        # [N]
            gap = (logp - sampler).abs() * sampled                   # [N], of hinted and ground-truth rows it says nothing
            gap_max = max(gap_max, gap.max().item())
            sums += torch.stack([total, was_clipped.sum(), entropy.sum(), gap.sum(), sampled.sum(), kl_penalty(logp, sampler).sum(),
                                 kl_t.sum(), torch.tensor(float(len(logp)), device=device)]).double().cpu()
    total, was_clipped, entropy, gap, sampled, kl_sampler, kl_ref, tokens, *push = over_ranks(
        [*sums.tolist(), *push.flatten().tolist()], device)
    m, names = max(tokens, 1.0), [f"push/{name}|{part}" for name in watch for part in PRESSURES]
    return {"loss": total, "clip_frac": was_clipped / m, "entropy": entropy / m, "gap": gap / max(sampled, 1.0),
            "gap_max": over_ranks([gap_max], device, dist.ReduceOp.MAX)[0], "kl_sampler": kl_sampler / m,
            "kl_ref": kl_ref / m, "rl_tokens": tokens, "tokens": n_tokens} | {k: v / n_tokens for k, v in zip(names, push)}
