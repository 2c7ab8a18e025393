"""rl_step.py -- credit, advantages, the policy loss, and the policy updates of a step (GRPO).

GRPO in one paragraph: sample G rollouts of one prompt, reward each, and take as advantage how much better
than its own group a rollout did. No value network. Every token that the rollout sampled is pushed up (A > 0)
or down (A < 0) alike:

    A_i = (r_i - mean(r)) / std(r)                                  one number per rollout
    L   = -sum_t min(rho_t A, clip(rho_t, 1 - e, 1 + e) A) / n      rho_t = p_new(token t) / p_old(token t)

p_old is the policy before the step's updates (set_old_logprobs).

Here the paper's account of the collapse begins: the reward says THAT the rollout was good, not WHICH token
was in its place, so an open tag at the end of a lucky rollout is pushed up as if it had earned the reward.
`pressure` measures whether that is so.

Shapes:  N = trained tokens of the micro-batch, flat;  B = its rows (Episodes);  K = watched token ids.
"""
import math
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rollout import is_clean
from sft_step import (at_trained, in_step, message_batches, micro_batches, my_share, optimizer_step,
                      over_ranks, set_lr, sft_backward, shuffled_passes, token_logprobs)

# ------------------------------------------------------------------------------------------------------------
# 1. From rewards to advantages


def assign_credit(episodes, kind, seed, step):
    """--reward -> what the advantages are made of, a number per episode; the metric `reward` is the task's.

      task      the episode's reward
      format    the same, + 0.5 if every message is clean
      random    a coin that shows 1 in 5 times
      shuffled  the group's own rewards, dealt out anew: as large advantages, but nothing to learn"""
    if kind == "random":
        coins = [random.Random(f"{seed} {step} {e.group_id} {e.sample}").random() for e in episodes]
        return [float(coin < 0.2) for coin in coins]
    if kind == "shuffled":
        groups = {e.group_id: [] for e in episodes}
        for e in episodes:
            groups[e.group_id].append(e.reward)
        for group_id, rewards in groups.items():
            random.Random(f"{seed} {step} {group_id}").shuffle(rewards)
        return [groups[e.group_id].pop() for e in episodes]
    bonus = 0.5 if kind == "format" else 0.0
    return [e.reward + bonus * is_clean(e.states) for e in episodes]


def advantages(credit, group_ids, only=None):
    """credit [1, 0, 0, 1, 1], group_ids [7, 7, 7, 8, 8] -> [1.15, -0.58, -0.58, 0, 0]

    std is the unbiased one (n - 1), as in the paper's code. A group whose credit is all equal says nothing:
    0. only: "positive" or "negative", the others become 0"""
    adv = [0.0] * len(credit)
    for group_id in set(group_ids):
        members = [i for i, g in enumerate(group_ids) if g == group_id]
        r = torch.tensor([credit[i] for i in members], dtype=torch.float64)          # [G]
        a = r - r.mean()
        if len(members) > 1:
            a = a / (r.std() + 1e-6)
        for i, value in zip(members, a.tolist()):
            adv[i] = value
    if only:
        adv = [x if (x > 0) == (only == "positive") else 0.0 for x in adv]
    return adv


# ------------------------------------------------------------------------------------------------------------
# 2. The loss of a token
DUAL_CLIP = 3.0
PRESSURES = ("clean", "malformed", "others_up", "others_down")       # as metrics: push/open|clean, ...


@dataclass
class Tokens:
    """The trained tokens of a micro-batch: all that a loss may look at. The counts are the whole update's."""
    rows: list                                   # the B Episodes
    owner: torch.Tensor                          # [N] which of them each token belongs to
    ids: torch.Tensor                            # [N]
    adv: torch.Tensor                            # [N] the advantage of its rollout
    logp: torch.Tensor                           # [N] log p_new, with gradient
    logp_old: torch.Tensor                       # [N] log p_old
    ratio: torch.Tensor  # [N] rho = p_new / p_old, or what the signal puts in its place
    n_tokens: float = 1.0                        # trained tokens of the update, over all ranks
    n_rows: float = 1.0                          # its rollouts

    def of_rows(self, values):
        """One value per row -> the same per token: [True, False] -> [True, True, True, False]"""
        return torch.tensor(values, device=self.logp.device)[self.owner]             # [B] -> [N]


def clipped(ratio, adv, low, high):
    """min(rho A, clip(rho) A): pessimistic, nothing is gained by leaving the trust region   [N]"""
    return torch.min(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)


def grpo(t, low, high):
    """The paper's: PPO's clip, and a dual clip: for A < 0 and rho >> 1 the product rho A is unbounded, so it
    is capped at DUAL_CLIP A.   -> loss per token [N]; the caller takes the sum / n_tokens"""
    objective = clipped(t.ratio, t.adv, low, high)
    return -torch.where(t.adv < 0, torch.max(objective, DUAL_CLIP * t.adv), objective)


def dapo(t, low, high):
    """PPO's clip alone; with --clip_high 0.28 DAPO's "clip higher": rare tokens may grow faster"""
    return -clipped(t.ratio, t.adv, low, high)


KLS = ("k2", "k3")
# A new loss is one more function of Tokens here, and its name. README shows GSPO that way.
LOSSES = {"grpo": grpo, "dapo": dapo}


def kl_penalty(logp, ref, kind="k3"):
    """Per-token estimate of KL(new || reference) from tokens of the new policy [N]; d = log p_ref - log p_new
      k2  d^2 / 2            biased, always positive; its GRADIENT is the KL's
      k3  exp(d) - d - 1     unbiased, always positive (the paper's)"""
    d = (ref - logp).clamp(-20, 20)
    return {"k2": d * d / 2, "k3": (d.exp() - d - 1).clamp(-10, 10)}[kind]


def sampler_weight(logp_old, sampler, cap):
    """Truncated importance sampling (TIS). Another engine, or another precision, samples from a slightly
    different policy than the one that is trained. So p_old is the TRAINER's, and a weight w, without
    gradient, makes up for the tokens having come from p_sampler:

        L = -sum_t w_t min(rho_t A, clip(rho_t) A) / n       w_t = min(cap, p_old(t) / p_sampler(t))   [N]"""
    return (logp_old - sampler).clamp(max=math.log(cap)).exp()       # exp never overflows


def pressure(adv, p, target, malformed, ids):
    """Where does the push on a control token's logit come from? The policy gradient (at ratio 1 and without
    clipping: exactly that of a step's first update) moves logit k at place t by

        d/dlogit_k  A_t log p(x_t)  =  A_t (1[x_t = k] - p_t(k))

    so a token is pushed where it was sampled, by A (1 - p), and where something else was sampled, by -A p: a
    NEGATIVE advantage on other tokens raises it too. (Over ALL places: of a rollout nobody knows what would
    have been right there.) adv, target [N], malformed [N] (the token's message is not clean), p [N, K]
    -> [K, 4] sums:   sampled in a clean message | sampled in a malformed one | not sampled, A > 0 | A < 0"""
    hit = target[:, None] == torch.tensor(ids, device=target.device)                 # [N, K]
    a, bad = adv[:, None], malformed[:, None]                                        # [N, 1]
    push = a * (hit.float() - p)                                                     # [N, K]
    parts = (hit & ~bad, hit & bad, ~hit & (a > 0), ~hit & (a < 0))
    return torch.stack([(push * part).sum(0) for part in parts], -1)


# ------------------------------------------------------------------------------------------------------------
# 3. The gradient of one update


def rl_backward(model, rows, adv, *, loss="grpo", clip=(0.2, 0.2), kl="k3", kl_weight=0.0, reference=None,
                signal_ratio=None, masked_ids=(), watch=None, correction=0.0, micro_tokens=16_384):
    """Adds the gradient of  sum(policy loss) / n_tokens + kl_weight * sum(KL) / n_tokens  to .grad -> metrics

    rows: Episodes of this rank, adv: their advantages. Rollouts with advantage 0 have no policy gradient:
    they are left out of the forward pass (unless a KL term needs them) but stay in the count, otherwise the
    step size would depend on how many groups happened to be mixed. signal_ratio: supervision.Signal.ratio.
    masked_ids: what a NEGATIVE advantage does not push. watch: {"open": id, "end": id}, whose pressure is
    measured. correction: cap of sampler_weight, 0 = none."""
    assert all(row.logprobs_old is not None for row in rows), "set_old_logprobs comes first"
    device, watch = model.device, watch or {}
    n_tokens, n_rows = over_ranks([sum(sum(r.mask) for r in rows), len(rows)])
    adv_of = {id(row): a for row, a in zip(rows, adv, strict=True)}
    batches = micro_batches([row for row in rows if adv_of[id(row)] != 0.0 or kl_weight > 0], micro_tokens)
    names = ["loss", "clip_frac", "entropy", "kl_sampler", "kl_ref", "rl_tokens", "gap", "sampled"]
    pushes = [f"push/{name}|{part}" for name in watch for part in PRESSURES]
    sums, gap_max = dict.fromkeys(names + pushes, 0.0), 0.0          # on all ranks, even one without a batch
    for batch in in_step(batches, model, reference):
        scored = token_logprobs(model, batch, watch=watch.values())
        logp_old, ids = at_trained(batch, "logprobs_old", device), at_trained(batch, "ids", device)  # [N]
        a = torch.tensor([adv_of[id(row)] for row in batch], device=device)[scored.owner]  # [B] -> [N]
        if masked_ids:
            a = torch.where((a < 0) & torch.isin(ids, torch.tensor(masked_ids, device=device)), 0.0, a)
        # logp_old: of the policy that rho compares with. sampler: of who drew the token, or logp_old where
        # nobody drew it as it is trained: there the gap is 0 and sampler_weight 1.
        ratio = (scored.logp - logp_old).clamp(-20, 20).exp()  # rho = p_new / p_old; never infinite
        t = Tokens(batch, scored.owner, ids, a, scored.logp, logp_old, ratio, n_tokens, n_rows)
        if signal_ratio:                         # OPS: another one where nobody sampled
            t.ratio = signal_ratio(t)
        as_sampled = t.of_rows([row.as_sampled for row in batch])  # [N] bool
        sampler = torch.where(as_sampled, at_trained(batch, "logprobs", device), t.logp_old)    # [N]
        loss_t = LOSSES[loss](t, *clip)                                                              # [N]
        if correction:
            loss_t = loss_t * sampler_weight(t.logp_old, sampler, correction)                        # [N]
        total = loss_t.sum() / n_tokens
        kl_t = torch.zeros_like(t.logp)
        if kl_weight > 0:
            with torch.no_grad():
                ref = token_logprobs(reference, batch).logp                                     # [N]
            kl_t = kl_penalty(t.logp, ref, kl)
            total = total + kl_weight * kl_t.sum() / n_tokens
        total.backward()
        with torch.no_grad():                    # from here on: what is logged
            low, high = clip
            outside = torch.where(t.adv > 0, t.ratio > 1 + high, (t.adv < 0) & (t.ratio < 1 - low))
            gap = (t.logp - sampler).abs() * as_sampled
            gap_max = max(gap_max, gap.max().item())
            found = {"loss": total, "clip_frac": outside.float().sum(), "entropy": scored.entropy.sum(),
                     "kl_sampler": kl_penalty(sampler, t.logp).sum(), "kl_ref": kl_t.sum(),
                     "rl_tokens": torch.ones_like(t.logp).sum(),
                     "gap": gap.sum(), "sampled": as_sampled.sum()}
            if watch:
                malformed = in_malformed(batch, device)                                              # [N]
                parts = pressure(t.adv, scored.watched, t.ids, malformed, list(watch.values()))      # [K, 4]
                found |= dict(zip(pushes, parts.flatten()))
            for name, value in found.items():
                sums[name] += value.item()
    sums = dict(zip(sums, over_ranks(list(sums.values()))))
    metrics = {"loss": sums["loss"], "rl_tokens": sums["rl_tokens"], "tokens": n_tokens,
               "gap": sums["gap"] / max(sums["sampled"], 1.0),
               "gap_max": over_ranks([gap_max], dist.ReduceOp.MAX)[0]}
    for name in ("clip_frac", "entropy", "kl_sampler", "kl_ref"):
        metrics[name] = sums[name] / max(sums["rl_tokens"], 1.0)
    return metrics | {name: sums[name] / n_tokens for name in pushes}


def in_malformed(rows, device):
    """-> [N] bool: is the token's message neither a call nor a reply?"""
    flags = []
    for span in [span for row in rows for span in row.spans if span.who == "model"]:
        flags += [not is_clean([span.state])] * (span.end - span.start)
    return torch.tensor(flags, device=device)


# ------------------------------------------------------------------------------------------------------------
# 4. The policy updates of a step


@torch.no_grad()
def set_old_logprobs(model, rows, correction, micro_tokens):
    """p_old of every row: the sampler's numbers; but the trainer's own where nobody sampled the row as it is
    trained (ground truth, a removed hint, re-encoded text), so that the ratio starts at 1, and, with
    --correction, of all rows: the sampler then stands beside it (sampler_weight)."""
    unsampled = [row for row in rows if correction or not row.as_sampled]
    for row in rows:
        row.logprobs_old = row.logprobs
    for batch in in_step(micro_batches(unsampled, micro_tokens), model):
        values = iter(token_logprobs(model, batch).logp.tolist())
        for row in batch:
            row.logprobs_old = [next(values) if trained else 0.0 for trained in row.mask]


def policy_updates(model, optimizer, episodes, adv, args, *, lr, signal, reference, chat, sft_rows, position):
    """--updates optimizer updates on this rank's episodes, some of the groups each -> metrics

    sft_rows: the signal's, if the schedule is synchronous: their cross-entropy is one more term of each
    update, with its own normaliser. They are drawn in shuffled passes, from `position` on (rows that change
    from step to step, as ETS's, are another shuffled draw each time)."""
    model.train()
    set_lr(optimizer, lr)
    masked_ids = [*chat.control_ids().values(), chat.end_id] if args.mask_control else []
    done, batches = [], []
    if sft_rows:
        enough = args.updates * args.sft_batch   # rows: each has at least one message
        stream = shuffled_passes(sft_rows, position, enough, f"{args.seed} rows")
        batches = message_batches(stream, args.sft_batch)[:args.updates]
    for u in range(args.updates):
        mine = [i for i, e in enumerate(episodes) if update_of(e, args) == u]
        metrics = rl_backward(
            model, [episodes[i] for i in mine], [adv[i] for i in mine],
            loss=args.loss, clip=(args.clip_low, args.clip_high), signal_ratio=signal.ratio,
            masked_ids=masked_ids, kl=args.kl, kl_weight=args.kl_weight, reference=reference,
            correction=args.correction, micro_tokens=args.micro_tokens,
            watch={"open": chat.open_id, "end": chat.end_id})
        if sft_rows:
            metrics |= sft_backward(model, my_share(batches[u]), args.sft_weight, args.micro_tokens)
        loss = metrics["loss"] + metrics.get("sft_loss", 0.0)        # finite?
        done.append(metrics | optimizer_step(model, optimizer, loss))
    step = {name: sum(m[name] for m in done) / len(done) for name in done[0]}
    step |= {name: sum(m[name] for m in done) for name in ("tokens", "rl_tokens", "skipped_updates")}
    step |= {name: done[0][name] for name in ("gap", "gap_max")}     # before any update: about 0
    if sft_rows:
        step["sft_visits"] = sum(len(batch) for batch in batches)
    return step


def update_of(episode, args):
    """-> the number of the update that an episode belongs to. A group stays together: its advantages are
    compared with each other. (The paper's release spreads it over the updates.)"""
    if args.as_released:
        k = (episode.sample + episode.group_id) % args.group         # else hints would meet in one update
        return k * args.updates // args.group
    return episode.group_id * args.updates // args.prompts
