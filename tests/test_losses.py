"""Every loss against an independent float64 reference written out by hand (plain Python loops, one token at a time), and
the invariances: chunks, micro-batches, processes."""
import copy
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rl_step import (LOSSES, advantages, kl_penalty, normaliser, policy_loss, pressure, recompute_logprobs, rl_backward,
                     sampler_correction)
from rollout import Episode
from sft_step import lay_out, micro_batches, optimizer_step, sft_backward, token_logprobs


def episodes(seed=0, n=8, vocab=500, groups=2):
    """Random rows of different lengths; masks with gaps, as multi-turn masks have."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        e = Episode(f"t{i}", i * groups // n, i)
        e.append(rng.integers(7, vocab, 5).tolist(), "prompt", 0)
        for turn in range(rng.integers(1, 4)):
            said = rng.integers(7, vocab, rng.integers(1, 9)).tolist()
            e.append(said, "model", turn, (-rng.random(len(said)) * 12).tolist())
            e.append(rng.integers(7, vocab, 3).tolist(), "tool", turn)
        e.reward = float(rng.random() < 0.5)
        rows.append(e)
    return rows


def gradients(model, run):
    model.zero_grad(set_to_none=True)
    out = run(model)
    return out, [p.grad.clone() for p in model.parameters()]


def close(a, b, tol=1e-5):
    return all(torch.allclose(x, y, atol=tol * max(1.0, y.abs().max().item())) for x, y in zip(a, b, strict=True))


# --- log-probabilities and cross-entropy -------------------------------------------------------------------------------
def reference_logprobs(model, rows):
    """Whole logits, row by row without padding, float64 from the logits on."""
    logp, entropy = [], []
    for r in rows:
        logits = model(torch.tensor([r.ids])).logits[0].double()
        table = torch.log_softmax(logits, -1)
        for t, m in enumerate(r.mask):
            if m:
                logp.append(table[t - 1, r.ids[t]])
                entropy.append(-(table[t - 1].exp() * table[t - 1]).sum())
    return torch.stack(logp), torch.stack(entropy)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunked_logprobs_values_and_gradients(model, chunk):
    rows = episodes()
    weights = torch.linspace(-1, 1, sum(sum(r.mask) for r in rows))
    expected, expected_entropy = reference_logprobs(model, rows)
    _, plain = gradients(model, lambda m: (reference_logprobs(m, rows)[0].float() * weights).sum().backward())
    logp, entropy, row, _ = token_logprobs(model, rows, chunk)
    assert torch.allclose(logp.double(), expected, atol=1e-5) and torch.allclose(entropy.double(), expected_entropy, atol=1e-4)
    assert row.tolist() == [i for i, r in enumerate(rows) for m in r.mask if m]
    _, ours = gradients(model, lambda m: (token_logprobs(m, rows, chunk)[0] * weights).sum().backward())
    assert close(ours, plain)


def test_cross_entropy(model):
    rows = episodes()
    n = sum(sum(r.mask) for r in rows)
    metrics, grads = gradients(model, lambda m: sft_backward(m, rows, weight=0.5, micro_tokens=60))
    expected, _ = reference_logprobs(model, rows)
    assert metrics["sft_tokens"] == n and math.isclose(metrics["sft_loss"], -0.5 * expected.sum().item() / n, rel_tol=1e-5)
    _, plain = gradients(model, lambda m: (-0.5 * reference_logprobs(m, rows)[0].sum() / n).backward())
    assert close(grads, plain)


def test_watched_probabilities(model):
    rows = episodes()
    *_, watched = token_logprobs(model, rows, 7, watch=[3, 9])
    expected = [torch.softmax(model(torch.tensor([r.ids])).logits[0].double(), -1)[t - 1, [3, 9]]
                for r in rows for t, m in enumerate(r.mask) if m]
    assert torch.allclose(watched.double(), torch.stack(expected), atol=1e-6) and not watched.requires_grad


def test_pressure_is_the_gradient_of_the_objective():
    """Autograd on free logits gives the same push, and the four parts add up to it."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=gen, dtype=torch.float64, requires_grad=True)
    target, adv = torch.randint(0, 7, (50,), generator=gen), torch.randn(50, generator=gen, dtype=torch.float64)
    malformed = torch.rand(50, generator=gen) < 0.4
    (adv * torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]).sum().backward()
    parts = pressure(adv, torch.softmax(logits.detach(), -1)[:, [2, 5]], target, malformed, [2, 5])
    assert torch.allclose(parts.sum(-1), logits.grad.sum(0)[[2, 5]])
    for k, column in ((0, 2), (1, 5)):
        hit = target == column
        for value, where in zip(parts[k], (hit & ~malformed, hit & malformed, ~hit & (adv > 0), ~hit & (adv < 0))):
            assert torch.allclose(value, logits.grad[where, column].sum())
    assert (parts[:, 2] <= 0).all() and (parts[:, 3] >= 0).all()     # others pushed up press it down, others pushed down raise it


def test_first_token_is_never_trained(model):
    with pytest.raises(AssertionError, match="first token"):
        token_logprobs(model, [SimpleNamespace(ids=[8, 9], mask=[1, 1])])


def test_micro_batches():
    rows = [SimpleNamespace(ids=[0] * n) for n in (9, 2, 3, 30)]
    assert [[len(r.ids) for r in b] for b in micro_batches(rows, 10)] == [[2, 3], [9], [30]]   # a long row goes alone
    assert micro_batches([], 10) == []
    assert [[len(r.ids) for r in b] for b in micro_batches(rows, 14, packed=True)] == [[2, 3, 9], [30]]      # padded: 27


def test_packed_rows_are_laid_out_one_behind_the_other():
    rows = [SimpleNamespace(ids=[7, 8, 9], mask=[0, 1, 1]), SimpleNamespace(ids=[7, 5], mask=[0, 1])]
    ids, mask, row, layout = lay_out(rows, True, "cpu")
    assert (ids.tolist(), mask.tolist(), row.tolist()) == ([[7, 8, 9, 7, 5]], [[False, True, True, False, True]], [[0, 0, 0, 1, 1]])
    assert {k: getattr(v, "tolist", lambda: v)() for k, v in layout.items()} == {
        "position_ids": [[0, 1, 2, 0, 1]], "cu_seq_lens_q": [0, 3, 5], "max_length_q": 3}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded(model, checkpointing):
    rows, adv = episodes(), [1.0, -0.5, 0.3, 0.0, 2.0, -1.0, 0.7, -0.1]
    packed = copy.deepcopy(model)
    packed.set_attn_implementation("packed")
    if checkpointing:
        packed.train().gradient_checkpointing_enable({"use_reentrant": False})
    for batch in (rows, rows[:1]):
        one, two = (token_logprobs(m, batch, watch=(3, 9)) for m in (model, packed))
        assert torch.equal(one[2], two[2]) and close([one[i] for i in (0, 1, 3)], [two[i] for i in (0, 1, 3)])
    for micro_tokens in (30, 10_000):
        (m1, g1), (m2, g2) = (gradients(m, lambda m: rl_backward(m, rows, adv, micro_tokens=micro_tokens)) for m in (model, packed))
        assert close(g2, g1) and m2 == pytest.approx(m1, rel=1e-4, abs=1e-6)
    before, _, row, _ = token_logprobs(packed, rows)
    rows[0].ids[0] += 1                                              # what stands in one row does not reach the next
    same = token_logprobs(packed, rows)[0] == before
    assert same[row > 0].all() and not same[row == 0].any()


# --- advantages --------------------------------------------------------------------------------------------------------
def test_advantages():
    a = advantages([1, 0, 0, 1, 1, 0.5], [7, 7, 7, 8, 8, 9])
    mean, std = 1 / 3, math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)
    assert a == pytest.approx([(1 - mean) / (std + 1e-6), -mean / (std + 1e-6), -mean / (std + 1e-6), 0, 0, 0])
    assert advantages([1, 0, 0], [7, 7, 7], normalise=False) == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    # one success in a group of 8, the paper's usual case
    assert advantages([1] + [0] * 7, [0] * 8) == pytest.approx([2.4749] + [-0.35355] * 7, abs=1e-4)


# --- policy losses -----------------------------------------------------------------------------------------------------
def reference_loss(kind, logp, old, adv, low, high, c):
    """One row (lists of floats) -> its summed loss in float64, each formula written out."""
    total, n = 0.0, len(logp)
    sequence_ratio = math.exp(sum(x - y for x, y in zip(logp, old)) / n)
    for x, y in zip(logp, old):
        ratio = sequence_ratio if kind == "gspo" else math.exp(min(max(x - y, -20), 20))
        if kind == "cispo":
            total += -min(ratio, 1 + high) * adv * x
            continue
        value = min(ratio * adv, min(max(ratio, 1 - low), 1 + high) * adv)
        if kind == "grpo" and adv < 0:
            value = max(value, c * adv)
        total += -value / (n if kind == "gspo" else 1)
    return total


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("adv", [1.7, -0.6])
def test_policy_loss_values(kind, adv):
    """Ratios from e^-4 to e^4 around 1, so every branch (inside, clipped low, clipped high, dual clip) is taken."""
    old = torch.linspace(-5, -1, 41)
    logp = old + torch.linspace(-4, 4, 41)
    low, high = 0.2, 0.28
    out, _ = policy_loss(logp, old, torch.full((41,), adv), torch.zeros(41, dtype=torch.long), torch.tensor([41.0]), kind,
                         (low, high), 3.0)
    expected = reference_loss(kind, logp.tolist(), old.tolist(), adv, low, high, 3.0)
    assert out.double().sum().item() == pytest.approx(expected, rel=1e-5)


def test_policy_loss_gradients_by_hand():
    """d loss / d logp, token by token, at ratios 0.5, 1, 1.5, 10."""
    ratio = torch.tensor([0.5, 1.0, 1.5, 10.0])
    old = torch.tensor([-3.0, -3.0, -3.0, -3.0])

    def grad(kind, a):
        logp = (old + ratio.log()).requires_grad_()
        loss, _ = policy_loss(logp, old, torch.full((4,), a), torch.arange(4), torch.ones(4), kind, (0.2, 0.2), 3.0)
        loss.sum().backward()
        return logp.grad.tolist()
    # positive: -rho A inside and below the band, nothing above it.   negative: nothing below, and dual clip cuts at rho > 3
    assert grad("grpo", 1.0) == pytest.approx([-0.5, -1.0, 0, 0])
    assert grad("grpo", -1.0) == pytest.approx([0, 1.0, 1.5, 0])
    assert grad("dapo", -1.0) == pytest.approx([0, 1.0, 1.5, 10.0])              # no dual clip
    assert grad("cispo", 1.0) == pytest.approx([-0.5, -1.0, -1.2, -1.2])         # clipped weight, never a lost gradient


def test_gspo_uses_one_ratio_per_sequence():
    old = torch.tensor([-1.0, -1.0, -2.0])
    logp = torch.tensor([-1.0 + 0.3, -1.0 - 0.1, -2.0], requires_grad=True)
    row, lengths = torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0])
    loss, _ = policy_loss(logp, old, torch.tensor([1.0, 1.0, 1.0]), row, lengths, "gspo", (0.5, 0.5))
    r0 = math.exp((0.3 - 0.1) / 2)
    assert loss.tolist() == pytest.approx([-r0 / 2, -r0 / 2, -1.0])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-r0 / 2, -r0 / 2, -1.0])         # the ratio's gradient is shared evenly


def test_kl_estimators():
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    d = [-0.5, 1.0]
    assert kl_penalty(logp, ref, "k1").tolist() == pytest.approx([0.5, -1.0])
    assert kl_penalty(logp, ref, "k2").tolist() == pytest.approx([x * x / 2 for x in d])
    assert kl_penalty(logp, ref, "k3").tolist() == pytest.approx([math.exp(x) - x - 1 for x in d])
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])         # in expectation: KL(p || q)
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        assert (p * kl_penalty(p.log(), q.log(), kind)).sum() == pytest.approx(exact.item(), rel=1e-5)


# --- the whole update --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_rl_backward_equals_reference(model, kind, kl_weight):
    rows = episodes(1)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        for r, start in zip(rows, [0] * len(rows)):                  # near on-policy: sampled log-probabilities + noise
            logp, _ = reference_logprobs(model, [r])
            noise, it = np.random.default_rng(len(r.ids)).normal(0, 0.3, len(logp)), iter(logp.tolist())
            spread = iter(noise.tolist())
            r.logprobs = [next(it) + next(spread) if m else 0.0 for m in r.mask]
    adv = advantages([r.reward for r in rows], [r.group_id for r in rows], normalise=kind != "dr_grpo")
    assert 0 < sum(a != 0 for a in adv)

    def plain(m):
        n_tokens, loss = sum(sum(r.mask) for r in rows), 0.0
        n = normaliser(kind, n_tokens, len(rows), 64)
        for r, a in zip(rows, adv):
            logp, _ = reference_logprobs(m, [r])
            old = torch.tensor([lp for lp, on in zip(r.logprobs, r.mask) if on], dtype=torch.float64)
            ratio = (logp - old).exp() if kind != "gspo" else (logp - old).mean().exp().expand(len(old))
            if kind == "cispo":
                term = -(ratio.clamp(max=1.2).detach() * a * logp).sum()
            else:
                term = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
                term = torch.maximum(term, torch.tensor(3.0 * a)) if kind == "grpo" and a < 0 else term
                term = -(term.mean() if kind == "gspo" else term.sum())
            loss = loss + term / n
            if kl_weight:
                d = reference_logprobs(reference, [r])[0].detach() - logp
                loss = loss + kl_weight * (d.exp() - d - 1).sum() / n_tokens
        loss.backward()
        return loss.item()

    expected, grads = gradients(model, plain)
    options = dict(loss=kind, kl_weight=kl_weight, reference=reference, max_tokens=64)
    for micro_tokens in (1, 100, 10_000):                            # 8 micro-batches of 1, some of 3, 1 of 8
        metrics, ours = gradients(model, lambda m: rl_backward(m, rows, adv, micro_tokens=micro_tokens, **options))
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert close(ours, grads)


def test_zero_advantage_rows_are_skipped_but_counted(model):
    rows, seen = episodes(2), []
    adv = [1.0, -1.0] + [0.0] * 6
    hook = model.get_decoder().register_forward_hook(lambda *a, **k: seen.append(k or a), with_kwargs=True)
    metrics, grads = gradients(model, lambda m: rl_backward(m, rows, adv))
    hook.remove()
    assert len(seen) == 1 and metrics["tokens"] == sum(sum(r.mask) for r in rows)
    assert metrics["rl_tokens"] == sum(sum(r.mask) for r in rows[:2])
    n_two, n_all = metrics["rl_tokens"], metrics["tokens"]
    _, only_two = gradients(model, lambda m: rl_backward(m, rows[:2], adv[:2]))
    assert close(grads, [g * n_two / n_all for g in only_two])


def test_entropy_metric_is_exact(model):
    rows = episodes(3)
    metrics, _ = gradients(model, lambda m: rl_backward(m, rows, [1.0] * len(rows)))
    assert metrics["entropy"] == pytest.approx(reference_logprobs(model, rows)[1].mean().item(), rel=1e-5)


def test_non_finite_gradient_skips_the_update(model):
    m = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(m.parameters(), lr=1.0)
    before = copy.deepcopy(m.state_dict())
    sft_backward(m, episodes())
    next(m.parameters()).grad[0, 0] = float("nan")
    out = optimizer_step(m, optimizer, 1.0)
    assert out["skipped_updates"] == 1 and all(torch.equal(before[k], v) for k, v in m.state_dict().items())
    sft_backward(m, episodes())
    assert optimizer_step(m, optimizer, 1.0, loss=float("inf"))["skipped_updates"] == 1
    sft_backward(m, episodes())
    assert optimizer_step(m, optimizer, 1.0)["skipped_updates"] == 0
    assert not torch.equal(before["model.norm.weight"], m.state_dict()["model.norm.weight"])


# --- the gap between trainer and sampler ---------------------------------------------------------------------------------
def test_sampler_correction():
    """Against plain Python in float64; a ratio of e^100 is capped, one of e^-100 is 0, and equal log-probabilities weigh 1."""
    rng, row = np.random.default_rng(0), torch.tensor([0, 0, 0, 1, 1, 2])
    old, sampler = (torch.tensor(-rng.random(6) * 3) for _ in range(2))
    old[5], sampler[5] = -0.5, -0.5
    ratio = [math.exp(o - s) for o, s in zip(old.tolist(), sampler.tolist())]
    product = [math.prod(r for r, k in zip(ratio, row.tolist()) if k == i) for i in row.tolist()]
    for kind, expected in (("token", ratio), ("sequence", product)):
        w = sampler_correction(old, sampler, row, 3, kind, 1.5)
        assert w.tolist() == pytest.approx([min(1.5, x) for x in expected], rel=1e-12) and w[5] == 1
        assert max(expected) > 1.5 > min(expected)
    far = sampler_correction(torch.tensor([0.0, -100.0]), torch.tensor([-100.0, 0.0]), torch.tensor([0, 1]), 2, "token", 2.0)
    assert far.tolist() == pytest.approx([2, 0], abs=1e-30)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_only_the_rows_that_were_asked_for_are_corrected(model, kind):
    """The gradient of rl_backward = that of the sum written out, row by row, in which a ground-truth row has the weight 1."""
    data, adv = episodes(), [0.5, -1.0, 1.0, -0.5, 2.0, -2.0, 1.0, -1.0]
    for e in data[::3]:
        e.source = "truth"
    recompute_logprobs(model, [e for e in data if e.source == "truth"], corrected=["policy"])
    recompute_logprobs(model, [e for e in data if e.source == "policy"], corrected=["policy"])
    assert [e.old is None for e in data] == [e.source == "truth" for e in data]

    def reference(m):
        total, n = 0.0, sum(sum(e.mask) for e in data)
        for e, a in zip(data, adv):
            logp = reference_logprobs(m, [e])[0]                         # first update: rho = exp(logp - old) = 1, gradient 1
            old = logp.detach()
            sampler = torch.tensor([lp for lp, k in zip(e.logprobs, e.mask) if k], dtype=torch.float64)
            w = (old - sampler).exp() if kind == "token" else (old - sampler).sum().exp().expand(len(old))
            w = w.clamp(max=2.0) if e.source == "policy" else torch.ones_like(old)
            total = total - (w * a * (logp - old).exp()).sum() / n
        total.backward()
        return total.item()
    expected, plain = gradients(model, reference)
    m, ours = gradients(model, lambda m: rl_backward(m, data, adv, correction=kind, cap=2.0, dual_clip=9.0))
    assert m["loss"] == pytest.approx(expected, rel=1e-4) and close(ours, plain, 1e-4)
    _, without = gradients(model, lambda m: rl_backward(m, data, adv, dual_clip=9.0))
    assert not close(without, plain, 1e-2)


def test_the_gap_is_that_of_the_sampled_rows(model):
    data = episodes()
    for e in data[:4]:
        e.source = "truth"                                               # nobody sampled them: their distance says nothing
    own, _ = reference_logprobs(model, data[4:])
    gap = (own.detach() - torch.tensor([lp for e in data[4:] for lp, m in zip(e.logprobs, e.mask) if m])).abs()
    for corrected in ((), ["policy"]):                                   # also where .old hides it from the ratio
        if corrected:
            recompute_logprobs(model, data[4:], corrected=corrected)
        m = rl_backward(model, data, [1.0] * 8, correction="token" if corrected else "none", micro_tokens=40)
        assert m["gap"] == pytest.approx(gap.mean().item(), rel=1e-5)
        assert m["gap_max"] == pytest.approx(gap.max().item(), rel=1e-5)


# --- the pressure that rl_backward measures, and padding under FSDP ----------------------------------------------------------
def test_rl_backward_measures_the_pressure(model):
    """Two rollouts, one message of the second malformed; the same sums by hand, per trained token of ALL rows."""
    rows, adv = episodes(n=3, groups=1), [1.5, -0.5, 0.0]
    for r in rows:
        for s in r.spans:
            s.state = "call" if s.who == "model" else ""
    last = [s for s in rows[1].spans if s.who == "model"][-1]
    last.state, rows[1].ids[last.start] = "polluted", 3
    got = rl_backward(copy.deepcopy(model), rows, adv, watch={"open": 3}, micro_tokens=40)
    want = dict.fromkeys(("clean", "malformed", "others_up", "others_down"), 0.0)
    for r, a in zip(rows, adv):
        p = torch.softmax(model(torch.tensor([r.ids])).logits[0].double(), -1)[:, 3]
        for s in r.spans:
            for t in range(s.start, s.end) if s.who == "model" else ():
                hit = r.ids[t] == 3
                part = ("clean" if s.state == "call" else "malformed") if hit else "others_up" if a > 0 else "others_down"
                want[part] += a * (hit - p[t - 1].item()) if a else 0.0
    n = sum(sum(r.mask) for r in rows)
    assert want["malformed"] < 0
    for part, value in want.items():
        assert got[f"push/open|{part}"] == pytest.approx(value / n, rel=1e-3, abs=1e-9), part


def uneven(rank, folder):
    """7 rows on rank 0, 1 on rank 1, a KL term: rank 1 has fewer micro-batches and must not hang, nor change the gradient."""
    import torch.distributed as dist

    from sft_step import shard
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, reference = torch.load(f"{folder}/models.pt", weights_only=False)
    for m in (model, reference):
        shard(m, "cpu", torch.float32)
    rows, adv = episodes(n=8, groups=2), [1.0, -1.0, 0.5, -0.5, 1.0, -1.0, 0.5, -0.5]
    mine = slice(0, 7) if rank == 0 else slice(7, 8)
    for _ in range(3):
        rl_backward(model, rows[mine], adv[mine], kl_weight=0.1, reference=reference.requires_grad_(False), micro_tokens=60)
    grads = {k: 2 * p.grad.full_tensor() for k, p in model.named_parameters()}       # FSDP averages over the two ranks
    hooks = len(model.get_output_embeddings().weight._backward_hooks or ())
    if rank == 0:
        torch.save((grads, hooks), f"{folder}/grads.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_uneven_ranks_under_fsdp(model, tmp_path):
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.01)
    torch.save((plain, reference), tmp_path / "models.pt")
    rows, adv = episodes(n=8, groups=2), [1.0, -1.0, 0.5, -0.5, 1.0, -1.0, 0.5, -0.5]
    for _ in range(3):
        rl_backward(plain, rows, adv, kl_weight=0.1, reference=reference, micro_tokens=60)
    context = torch.multiprocessing.spawn(uneven, args=(str(tmp_path),), nprocs=2, join=False)
    deadline = time.time() + 100
    while not context.join(timeout=1):
        if time.time() > deadline:
            [p.kill() for p in context.processes]
            pytest.fail("the ranks wait for each other forever")
    grads, hooks = torch.load(tmp_path / "grads.pt")
    assert close([grads[k] for k, _ in plain.named_parameters()], [p.grad for p in plain.parameters()]) and hooks <= 1
