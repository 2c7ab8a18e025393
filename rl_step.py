"""rl_step.py -- advantages and the policy loss (GRPO and its relatives). Floor 2.

GRPO in one paragraph: sample G rollouts of one prompt, reward each, and take as advantage how much better than its own
group a rollout did. No value network. Every token that the rollout sampled is pushed up (A > 0) or down (A < 0) alike:

    A_i = (r_i - mean(r)) / std(r)                                  one number per rollout
    L   = -sum_t min(rho_t A, clip(rho_t, 1 - e, 1 + e) A) / n      rho_t = p_new(token t) / p_sampled(token t)

This is where the paper's collapse enters: the reward says THAT the rollout was good, not WHICH token was in its place, so
an open tag at the end of a lucky rollout is pushed up as if it had earned the reward.

Shapes:  N = trained tokens of the micro-batch, flat;  row [N] tells which rollout each belongs to.
"""
import torch

from sft_step import micro_batches, reduce_sum, token_logprobs

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
KLS = ("k1", "k2", "k3")


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


def policy_loss(logp, old, adv, row, lengths, loss="grpo", clip=(0.2, 0.2), dual_clip=3.0):
    """logp, old, adv [N] (new and sampled log-probabilities; each token's advantage), lengths [B] trained tokens per row
    -> loss per token [N], share of clipped tokens [N].   The caller sums and divides (see `normaliser`)."""
    low, high = clip
    log_ratio = (logp - old).clamp(-20, 20)
    if loss == "gspo":   # one ratio per SEQUENCE: the geometric mean of its tokens' ratios, so that length does not matter
        log_ratio = torch.zeros_like(lengths).index_add(0, row, log_ratio) / lengths                 # [B]
        log_ratio = log_ratio[row]                                                                   # [N]
    ratio = log_ratio.exp()                                          # rho = p_new / p_old
    clipped = ratio.clamp(1 - low, 1 + high)
    if loss == "cispo":  # clip the WEIGHT, keep the gradient: no token is ever dropped   -sg(min(rho, 1 + e)) A log p
        return -ratio.clamp(max=1 + high).detach() * adv * logp, (ratio > 1 + high).float()
    surrogate = torch.min(ratio * adv, clipped * adv)                # pessimistic: no gain from leaving the trust region
    if loss == "grpo":   # dual clip: for A < 0 and rho >> 1 the product is unbounded; cap it at c A
        surrogate = torch.where(adv < 0, torch.max(surrogate, dual_clip * adv), surrogate)
    loss_t = -surrogate                                              # [N]
    if loss == "gspo":   # mean over tokens within a sequence; the caller then averages over sequences
        loss_t = loss_t / lengths[row]
    return loss_t, (surrogate != ratio * adv).float()


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
    if kind == "k1":
        return -d
    if kind == "k2":
        return d * d / 2
    return (d.exp() - d - 1).clamp(-10, 10)


def rl_backward(model, rows, adv, *, loss="grpo", clip=(0.2, 0.2), dual_clip=3.0, kl="k3", kl_weight=0.0, reference=None,
                weight=1.0, micro_tokens=16_384, max_tokens=2048):
    """Adds the gradient of  weight * sum(policy loss) / n + kl_weight * sum(KL) / n_tokens  to .grad.

    rows: Episodes of this rank, adv: their advantages (list of floats). Rollouts with advantage 0 have no policy
    gradient: they are left out of the forward pass (unless a KL term needs them) but stay in the count n, otherwise the
    step size would depend on how many groups happened to be mixed."""
    device = model.device
    n_tokens, n_rows = reduce_sum([sum(sum(r.mask) for r in rows), len(rows)], device)
    n = normaliser(loss, n_tokens, n_rows, max_tokens)
    pairs = [(r, a) for r, a in zip(rows, adv, strict=True) if a != 0.0 or kl_weight > 0]
    # sums over tokens:   loss, clipped, entropy, |log-prob gap|, approx. KL to the sampler, KL to the reference, tokens
    sums = torch.zeros(7, dtype=torch.float64)
    for batch in micro_batches(pairs, micro_tokens, length=lambda pair: len(pair[0].ids)):
        batch_rows = [r for r, _ in batch]
        logp, entropy, row = token_logprobs(model, batch_rows)                                       # [N] each
        old = torch.tensor([lp for r in batch_rows for lp, m in zip(r.logprobs, r.mask) if m], device=device)   # [N]
        a = torch.tensor([a for _, a in batch], device=device)[row]                                  # [N]
        lengths = torch.tensor([float(sum(r.mask)) for r in batch_rows], device=device)              # [B]
        loss_t, was_clipped = policy_loss(logp, old, a, row, lengths, loss, clip, dual_clip)         # [N]
        total = weight * loss_t.sum() / n
        kl_t = torch.zeros_like(logp)
        if kl_weight > 0:
            with torch.no_grad():
                ref, _, _ = token_logprobs(reference, batch_rows)
            kl_t = kl_penalty(logp, ref, kl)
            total = total + kl_weight * kl_t.sum() / n_tokens
        total.backward()
        with torch.no_grad():
            sums += torch.stack([total, was_clipped.sum(), entropy.sum(), (logp - old).abs().sum(),
                                 kl_penalty(logp, old).sum(), kl_t.sum(), torch.tensor(float(len(logp)), device=device)]
                                ).double().cpu()
    sums = reduce_sum(sums.tolist(), device)
    m = max(sums[6], 1.0)
    return {"loss": sums[0], "clip_frac": sums[1] / m, "entropy": sums[2] / m, "gap": sums[3] / m, "kl_sampler": sums[4] / m,
            "kl_ref": sums[5] / m, "rl_tokens": sums[6], "tokens": n_tokens}
