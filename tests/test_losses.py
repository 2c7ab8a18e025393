"""Every loss against an independent float64 reference written out by hand (plain Python loops, one token at a
time), and the invariances: chunks, micro-batches, processes."""
import copy
import gc
import inspect
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import Qwen2Config, Qwen2ForCausalLM

import sft_step
from conftest import ROOT

from rl_step import (LOSSES, Tokens, advantages, clipped, kl_penalty, pressure, rl_backward, sampler_weight,
                     set_old_logprobs, update_of)
from rollout import Episode
from sft_step import (Layout, at_trained, message_batches, micro_batches, optimizer_step, phase_rate,
                      sft_backward, sft_phase, token_logprobs)


def episodes(seed=0, n=8, vocab=500, groups=2):
    """Random rows of different lengths, those of a group behind one prompt; masks with gaps, as multi-turn
    masks have. p_old is the sampler's."""
    rng, rows = np.random.default_rng(seed), []
    prompts = rng.integers(7, vocab, (groups, 5)).tolist()
    for i in range(n):
        e = Episode(f"t{i}", i * groups // n, i)
        e.append(prompts[e.group_id], "prompt", 0)
        for turn in range(rng.integers(1, 4)):
            said = rng.integers(7, vocab, rng.integers(1, 9)).tolist()
            e.append(said, "model", turn, (-rng.random(len(said)) * 12).tolist())
            e.append(rng.integers(7, vocab, 3).tolist(), "tool", turn)
        e.reward, e.logprobs_old = float(rng.random() < 0.5), e.logprobs
        rows.append(e)
    return rows


def gradients(model, run):
    model.zero_grad(set_to_none=True)
    out = run(model)
    return out, [p.grad.clone() for p in model.parameters()]


def close(a, b, tol=1e-5):
    """Two lists of tensors, the first within `tol` of the second's largest values?"""
    same = lambda x, y: torch.allclose(x, y, atol=tol * max(1.0, y.abs().max().item()))
    return all(same(x, y) for x, y in zip(a, b, strict=True))


# --- log-probabilities and cross-entropy --------------------------------------------------------------------
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
    scored = token_logprobs(model, rows, chunk)
    assert torch.allclose(scored.logp.double(), expected, atol=1e-5)
    assert torch.allclose(scored.entropy.double(), expected_entropy, atol=1e-4)
    assert scored.logp.requires_grad and not scored.entropy.requires_grad
    assert scored.owner.tolist() == [i for i, r in enumerate(rows) for m in r.mask if m]
    _, ours = gradients(model, lambda m: (token_logprobs(m, rows, chunk).logp * weights).sum().backward())
    assert close(ours, plain)
    with torch.no_grad():                        # nothing to compute again: another path
        assert torch.equal(token_logprobs(model, rows, chunk).logp, scored.logp)


def test_chunks_go_by_the_bytes_of_their_logits(model, monkeypatch):
    """Room for the logits of three tokens, float32: 3, 3, ..., and the rest; never less than one"""
    rows, sizes, real = episodes(), [], sft_step._logp_chunk
    monkeypatch.setattr(sft_step, "_logp_chunk", lambda h, *args: sizes.append(len(h)) or real(h, *args))
    n, vocab = sum(sum(r.mask) for r in rows), len(model.get_output_embeddings().weight)
    with torch.no_grad():
        for room, size in ((3 * 4 * vocab, 3), (4 * 4 * vocab - 1, 3), (1, 1)):
            monkeypatch.setitem(sft_step.CHUNK_BYTES, "cpu", room)
            token_logprobs(model, rows)
            assert set(sizes[:-1]) == {size} and sum(sizes) == n
            sizes.clear()


def test_cross_entropy(model):
    rows = episodes()
    n = sum(sum(r.mask) for r in rows)
    metrics, grads = gradients(model, lambda m: sft_backward(m, rows, weight=0.5, micro_tokens=60))
    expected, _ = reference_logprobs(model, rows)
    assert metrics["sft_tokens"] == n
    assert metrics["sft_loss"] == pytest.approx(-expected.sum().item() / n, rel=1e-5)       # without the weight
    _, plain = gradients(model, lambda m: (-0.5 * reference_logprobs(m, rows)[0].sum() / n).backward())
    assert close(grads, plain)
    for i, row in enumerate(rows):                                   # weights of their own, the same divisor
        row.weight = i / 4
    metrics, grads = gradients(model, lambda m: sft_backward(m, rows, micro_tokens=60))
    weights = -torch.tensor([r.weight for r in rows for m in r.mask if m]) / n
    _, plain = gradients(model, lambda m: (reference_logprobs(m, rows)[0] * weights).sum().backward())
    assert close(grads, plain)
    assert metrics["sft_loss"] == pytest.approx((expected * weights).sum().item(), rel=1e-5)


def test_watched_probabilities(model):
    rows = episodes()
    watched, expected = token_logprobs(model, rows, 7, watch=[3, 9]).watched, []
    for r in rows:
        p = torch.softmax(model(torch.tensor([r.ids])).logits[0].double(), -1)
        expected += [p[t - 1, [3, 9]] for t, m in enumerate(r.mask) if m]
    assert torch.allclose(watched.double(), torch.stack(expected), atol=1e-6) and not watched.requires_grad


def test_pressure_is_the_gradient_of_the_objective():
    """Autograd on free logits gives the same push, and the four parts add up to it."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=gen, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 7, (50,), generator=gen)
    adv = torch.randn(50, generator=gen, dtype=torch.float64)
    malformed = torch.rand(50, generator=gen) < 0.4
    (adv * torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]).sum().backward()
    parts = pressure(adv, torch.softmax(logits.detach(), -1)[:, [2, 5]], target, malformed, [2, 5])
    assert torch.allclose(parts.sum(-1), logits.grad.sum(0)[[2, 5]])
    for k, column in ((0, 2), (1, 5)):
        hit = target == column
        masks = (hit & ~malformed, hit & malformed, ~hit & (adv > 0), ~hit & (adv < 0))
        for value, where in zip(parts[k], masks, strict=True):
            assert torch.allclose(value, logits.grad[where, column].sum())
    assert (parts[:, 2] <= 0).all()                                  # others pushed up press it down,
    assert (parts[:, 3] >= 0).all()                                  # others pushed down raise it


def test_first_token_is_never_trained(model):
    with pytest.raises(AssertionError, match="first token"):
        token_logprobs(model, [SimpleNamespace(ids=[8, 9], mask=[1, 1])])


def test_trained_tokens():
    rows = [SimpleNamespace(ids=[7, 8, 9], mask=[0, 1, 1], logprobs=[0, -0.1, -0.2]),
            SimpleNamespace(ids=[7, 5], mask=[0, 1], logprobs=[0, -0.3])]
    assert at_trained(rows, "logprobs", "cpu").tolist() == pytest.approx([-0.1, -0.2, -0.3])
    assert at_trained(rows, "ids", "cpu").tolist() == [8, 9, 5]


# --- an SFT phase -------------------------------------------------------------------------------------------
def conversations(*lengths):
    """4, 3 -> two rows, of 4 and of 3 assistant messages"""
    return [SimpleNamespace(name=i, states=["reply"] * n) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("lengths, size, expected", [
    ((4, 3, 5, 4), 8, [[0, 1], [2, 3]]),         # size counts messages; conversations stay whole
    ((5, 5, 5, 5), 8, [[0, 1], [2, 3]]),         # 2.5 batches are 2
    ((1, 1, 1, 1, 1), 2, [[0, 1, 2], [3, 4]]),
    ((2, 2), 100, [[0, 1]]),                     # less than one batch
    ((9, 9), 2, [[0], [1]]),                     # longer than a batch
    ((), 8, [])])
def test_message_batches(lengths, size, expected):
    batches = message_batches(conversations(*lengths), size)
    assert [[row.name for row in batch] for batch in batches] == expected


def test_the_rate_of_a_phase_reaches_its_top():
    """Linear over 30 % of the updates, then a cosine from there to 0."""
    assert [phase_rate(u, 4, 0.3) for u in range(4)] == pytest.approx([1, 1, .75, .25])          # sum 3
    assert [round(phase_rate(u, 46, 0.3), 3) for u in range(46)] == [
        .077, .154, .231, .308, .385, .462, .538, .615, .692, .769, .846, .923, 1, 1, .998, .991, .980, .964,
        .944, .921, .893, .862, .827, .790, .750, .708, .664, .618, .571, .524, .476, .429, .382, .336, .292,
        .250, .210, .173, .138, .107, .079, .056, .036, .020, .009, .002]
    assert sum(phase_rate(u, 46, 0.3) for u in range(46)) == pytest.approx(24)
    assert [phase_rate(u, 1, 0.3) for u in range(1)] == [1]


def phase(monkeypatch, rows, schedule="interleaved", epochs=2, size=8):
    """-> the (names, rate) of the updates of an SFT phase, and its metrics"""
    updates = []

    def update(model, optimizer, some, lr, micro_tokens):
        updates.append(([row.name for row in some], lr))
        return {"sft_loss": 4.0 - len(updates), "grad_norm": 1.0, "skipped_updates": 0}
    monkeypatch.setattr(sft_step, "sft_update", update)
    args = SimpleNamespace(schedule=schedule, sft_epochs=epochs, sft_batch=size, sft_lr=0.01,
                           micro_tokens=100)
    return updates, sft_phase(None, None, rows, args, "seed")


def test_a_phase_passes_over_its_rows(monkeypatch):
    """Two passes, each cut into 16 / 8 updates and in an order of its own, at the rates above."""
    updates, metrics = phase(monkeypatch, conversations(4, 3, 5, 4))
    said = [names for names, _ in updates]
    assert sorted(said[0] + said[1]) == sorted(said[2] + said[3]) == [0, 1, 2, 3]
    assert [lr for _, lr in updates] == pytest.approx([.01, .01, .0075, .0025])
    assert metrics == {"sft_rows": 4, "sft_updates": 4, "sft_visits": 8, "skipped_updates": 0,
                       "sft_loss": 1.5, "sft_loss_first": 3.0, "sft_loss_last": 0.0, "grad_norm": 1.0}
    updates, _ = phase(monkeypatch, conversations(*[4] * 20), "sft", epochs=1)       # SFT first: 10 % warm-up
    assert [lr for _, lr in updates[:2]] == pytest.approx([.01, .01]) and len(updates) == 10
    assert phase(monkeypatch, []) == ([], {"sft_rows": 0, "sft_updates": 0, "sft_visits": 0,
                                           "skipped_updates": 0})


# --- the layout of a training pass --------------------------------------------------------------------------
EXAMPLE = [SimpleNamespace(ids=[1, 2, 3, 7, 8], mask=[0, 0, 0, 1, 1]),           # the docstring's
           SimpleNamespace(ids=[1, 2, 3, 9], mask=[0, 0, 0, 1]),
           SimpleNamespace(ids=[4, 5, 6], mask=[0, 0, 1])]


def uneven_rows(vocab=500):
    """A group of four (one says a single token, two say the same), a group of two behind a prompt of one
    token, two rows on their own, and two whose prompts only begin alike; shuffled."""
    rng = np.random.default_rng(3)
    say = lambda n: rng.integers(7, vocab, n).tolist()
    rows, long, short, alike = [], say(6), say(1), say(4)
    for prompt, masks in ((long, ([1], [1, 1, 0, 1], [1] * 9)), (short, ([1, 0, 0], [1, 1, 0, 1, 1])),
                          (say(2), ([1, 1],)), (say(11), ([1, 0, 1],)), (alike, ([1, 1, 1],)),
                          (alike[:3] + say(1), ([1, 1],))):
        for mask in masks:
            ids = prompt + say(len(mask))
            rows.append(SimpleNamespace(ids=ids, mask=[0] * len(prompt) + mask))
    rows.append(copy.deepcopy(rows[1]))
    random.Random(0).shuffle(rows)
    return rows


def test_layout_of_the_docstring():
    layout = Layout(EXAMPLE, "cpu")
    assert layout.ids.tolist() == [[1, 2, 3, 7, 8, 9, 4, 5, 6]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert layout.place == [[0, 1, 2, 3, 4], [0, 1, 2, 5], [6, 7, 8]]
    assert layout.families == [[3, 2, 1], [0, 3]]
    other = Layout([EXAMPLE[1], EXAMPLE[2], EXAMPLE[0]], "cpu")      # a prompt's rows need not stand together
    assert other.ids.tolist() == [[1, 2, 3, 9, 7, 8, 4, 5, 6]]
    assert other.positions.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    assert other.place == [[0, 1, 2, 3], [6, 7, 8], [0, 1, 2, 4, 5]]
    assert other.families == [[3, 1, 2], [0, 3]]


def test_segments_of_the_docstring():
    """prompt, two continuations behind it, a row of its own: as many queries each, and whose keys they
    see"""
    keys, cuts_q, cuts_k, longest_q, longest_k = Layout(EXAMPLE, "cpu").segments
    assert keys.tolist() == [0, 1, 2] + [0, 1, 2, 3, 4] + [0, 1, 2, 5] + [6, 7, 8]
    assert cuts_q.tolist() == [0, 3, 5, 6, 9] and cuts_k.tolist() == [0, 3, 8, 12, 15]
    assert (longest_q, longest_k) == (3, 5)
    assert cuts_q.dtype == cuts_k.dtype == torch.int32               # the kernel takes nothing else


def test_every_token_of_a_layout_is_where_it_says():
    for rows in (episodes(), uneven_rows()):
        layout = Layout(rows, "cpu")
        for row, place in zip(rows, layout.place, strict=True):
            assert layout.ids[0, place].tolist() == row.ids
            assert layout.positions[0, place].tolist() == list(range(len(row.ids)))
        used = {line for place in layout.place for line in place}
        assert used == set(range(layout.ids.shape[1]))               # and no token is there for nothing


def by_hand(q, k, v, scale):
    """q [n, heads, d], k and v [m, kv_heads, d], of whose last n tokens q asks -> [n, heads, d]"""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores, n, m = torch.einsum("nhd,mhd->hnm", q, k) * scale, len(q), len(k)
    for i in range(n):
        scores[:, i, m - n + i + 1:] = -torch.inf
    return torch.einsum("hnm,mhd->nhd", torch.softmax(scores, -1), v)


def varlen_by_hand(q, k, v, cuts_q, cuts_k, longest_q, longest_k, **options):
    """What the kernel, which needs a GPU, makes of the same arguments"""
    inspect.signature(varlen_attn).bind(q, k, v, cuts_q, cuts_k, longest_q, longest_k, **options)
    assert options.pop("window_size") == (-1, 0) and options.pop("enable_gqa")   # causal, aligned at the ends
    out = []
    for a, b, c, d in zip(cuts_q, cuts_q[1:], cuts_k, cuts_k[1:]):
        assert b - a <= longest_q and d - c <= longest_k
        out.append(by_hand(q[a:b], k[c:d], v[c:d], **options))
    return torch.cat(out)


@pytest.mark.parametrize("kernel", ["_attend_families", "_attend_varlen"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_in_a_layout_is_that_of_each_row_alone(monkeypatch, kernel, kv_heads):
    monkeypatch.setattr(sft_step, "varlen_attn", varlen_by_hand)
    gen = torch.Generator().manual_seed(0)
    for rows in (EXAMPLE, uneven_rows(), uneven_rows()[:1]):
        layout = Layout(rows, "cpu")
        length = layout.ids.shape[1]
        q, k, v = (torch.randn(length, heads, 8, generator=gen) for heads in (4, kv_heads, kv_heads))
        out = getattr(layout, kernel)(q, k, v, 0.3)
        assert out.shape == q.shape
        for place in layout.place:
            assert torch.allclose(out[place], by_hand(q[place], k[place], v[place], 0.3), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_varlen_kernel_on_a_gpu(kv_heads):
    """What no CPU can run: the kernel itself, forward and backward, in 16 bits, beside float32 by hand"""
    torch.manual_seed(0)
    layout = Layout(uneven_rows(), "cuda")
    length = layout.ids.shape[1]
    q, k, v = (torch.randn(length, heads, 64, device="cuda") for heads in (4, kv_heads, kv_heads))
    weights, found = torch.randn_like(q), {}
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        if dtype == torch.float32:
            out = torch.zeros_like(q)
            for place in layout.place:           # of a shared prompt each row gives the same
                out[place] = by_hand(*(x[place] for x in leaves), 0.125)
        else:
            out = layout._attend_varlen(*leaves, 0.125).float()
        (out * weights).sum().backward()
        found[dtype] = [out, *(x.grad.float() for x in leaves)]
    for ours, expected in zip(*found.values()):
        assert torch.allclose(ours, expected, atol=0.05, rtol=0.05), (ours - expected).abs().max()


def test_as_released_deals_each_group_out():
    """Hints and ground truth, the first rollouts of every group, are not all in the first update"""
    args = SimpleNamespace(as_released=True, updates=3, group=8, prompts=12)
    update = lambda group, sample: update_of(SimpleNamespace(group_id=group, sample=sample), args)
    assert [update(0, k) for k in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [update(3, k) for k in range(8)] == [1, 1, 1, 2, 2, 0, 0, 0]
    args.as_released = False
    assert [update(g, 5) for g in range(12)] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def grouped_model(tokenizer):
    """Two query heads per key head"""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)).eval()


@pytest.mark.parametrize("kernel", ["_attend_families", "_attend_varlen"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_layout_scores_and_trains_like_row_by_row(model, tokenizer, monkeypatch, grouped, checkpointing,
                                                    kernel):
    """Against the same weights in float64 and with another attention, every row alone; then the rows in
    another order."""
    monkeypatch.setattr(sft_step, "varlen_attn", varlen_by_hand)
    monkeypatch.setattr(Layout, "_attend_families", getattr(Layout, kernel))
    ours, passes = grouped_model(tokenizer) if grouped else copy.deepcopy(model), []
    reference = copy.deepcopy(ours).double()
    reference.set_attn_implementation("eager")
    if checkpointing:
        ours.train()                             # (no dropout in these models)
        ours.gradient_checkpointing_enable()
    ours.get_decoder().layers[1].self_attn.register_forward_hook(lambda *args: passes.append(args))
    rows = uneven_rows()
    weights = torch.linspace(-1, 1, sum(sum(r.mask) for r in rows), dtype=torch.float64)
    expected, _ = reference_logprobs(reference, rows)
    (expected * weights).sum().backward()
    scored = token_logprobs(ours, rows, 5)
    (scored.logp * weights.float()).sum().backward()
    assert torch.allclose(scored.logp.double(), expected, atol=1e-5)
    assert close([p.grad.double() for p in ours.parameters()], [p.grad for p in reference.parameters()])
    assert len(passes) == 1 + checkpointing      # one forward pass for all rows; another one in backward
    assert scored.owner.tolist() == [i for i, r in enumerate(rows) for m in r.mask if m]
    parts = expected.split([sum(r.mask) for r in rows])
    again = token_logprobs(ours, rows[::-1], 5).logp.double()
    assert torch.allclose(again, torch.cat(parts[::-1]), atol=1e-5)


def test_rows_do_not_see_each_other(model):
    """Another token in one continuation: its own row changes from there on, all other rows not at all."""
    rows = uneven_rows()
    with torch.no_grad():
        before = token_logprobs(model, rows)
        for i, row in enumerate(rows):
            changed = copy.deepcopy(rows)
            first = row.mask.index(1)
            changed[i].ids[first] = row.ids[first] + 1
            after = token_logprobs(model, changed)
            others = before.owner != i
            assert torch.equal(after.logp[others], before.logp[others])
            assert (after.logp[~others] != before.logp[~others]).all()


def test_without_a_layout_attention_is_plain(model):
    """The passes that know nothing of layouts: whole conversations by `model(ids)`, and a model that somebody
    loads again."""
    ours, other = copy.deepcopy(model), copy.deepcopy(model)
    token_logprobs(ours, EXAMPLE)                # switches the model to layouts
    other.set_attn_implementation("eager")
    ids = torch.arange(20, 60).view(2, 20)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, other(ids).logits, atol=1e-5)
    assert "layout" not in ours.config.to_json_string()


def test_micro_batches():
    """A prompt counts once where its rows stand together."""
    first, second = [SimpleNamespace(ids=[1] * 5 + [7] * n, mask=[0] * 5 + [1] * n) for n in (4, 3)]
    third = SimpleNamespace(ids=[9] * 9, mask=[1] * 9)
    assert micro_batches([first, second, third], 14) == [[second, first], [third]]   # the docstring's
    assert micro_batches([first, third, second], 14) == [[second, first], [third]]   # prompt, then length
    assert micro_batches([third, first, second], 17) == [[second, first], [third]]
    assert micro_batches([first, second, third], 21) == [[second, first, third]]     # 5 + 3 + 4 + 9
    assert micro_batches([first, second, third], 20) == [[second, first], [third]]
    assert micro_batches([first, second, third], 12) == [[second, first], [third]]   # 5 + 3 + 4
    assert micro_batches([first, second, third], 11) == [[second], [first], [third]]
    assert micro_batches([first, second, third], 1) == [[second], [first], [third]]  # a long row goes alone
    assert micro_batches([first, second, first, second], 16) == [[second, second, first], [first]]
    assert micro_batches([], 10) == []


@pytest.mark.parametrize("max_tokens", [1, 10, 25, 40, 1000])
def test_micro_batches_hold_every_row_once_and_keep_the_limit(max_tokens):
    for rows in (episodes(), uneven_rows()):
        batches = micro_batches(rows, max_tokens)
        ids = [id(row) for batch in batches for row in batch]
        assert sorted(ids) == sorted(map(id, rows))
        for batch in batches:
            assert Layout(batch, "cpu").ids.shape[1] <= max_tokens or len(batch) == 1


# --- advantages ---------------------------------------------------------------------------------------------
def test_advantages():
    a = advantages([1, 0, 0, 1, 1, 0.5], [7, 7, 7, 8, 8, 9])
    mean, std = 1 / 3, math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)
    up, down = (1 - mean) / (std + 1e-6), -mean / (std + 1e-6)
    assert a == pytest.approx([up, down, down, 0, 0, 0])
    assert advantages([1, 0, 0, 1], [7, 7, 7, 8], only="positive") == pytest.approx([up, 0, 0, 0])
    assert advantages([1, 0, 0, 1], [7, 7, 7, 8], only="negative") == pytest.approx([0, down, down, 0])
    # groups are named, not counted: the same rewards in another order
    mixed = advantages([0, 1, 1, 0, 0.5, 0], [7, 8, 7, 7, 9, 8])
    assert mixed == pytest.approx([down, 0.7071, up, down, 0, -0.7071], abs=1e-4)
    # one success in a group of 8, the paper's usual case
    assert advantages([1] + [0] * 7, [0] * 8) == pytest.approx([2.4749] + [-0.35355] * 7, abs=1e-4)


# --- policy losses ------------------------------------------------------------------------------------------
def gspo(t, low, high):
    """One ratio per rollout, the geometric mean of its tokens' ratios; every rollout weighs the same."""
    lengths = torch.bincount(t.owner).float()                                                        # [B]
    log_ratio = torch.zeros_like(lengths).index_add(0, t.owner, t.logp - t.logp_old) / lengths       # [B]
    loss = -clipped(log_ratio.exp()[t.owner], t.adv, low, high)                                      # [N]
    return loss * t.n_tokens / (t.n_rows * lengths[t.owner])


OURS = LOSSES | {"gspo": gspo}                   # one of our own beside them: README's example


def test_the_loss_of_readme():
    """The example that README gives of a loss of one's own is, letter for letter, the one tested here."""
    assert f"\n{inspect.getsource(gspo)}\nLOSSES[\"gspo\"] = gspo\n" in (ROOT / "README.md").read_text()


def tokens(logp, old, adv, owner=None):
    """Tokens of an update that is this one micro-batch"""
    owner = torch.zeros(len(logp), dtype=torch.long) if owner is None else owner
    ratio = (logp - old).clamp(-20, 20).exp()
    return Tokens([], owner, torch.zeros_like(owner), adv, logp, old, ratio, len(logp), int(owner.max()) + 1)


def reference_loss(kind, logp, old, adv, low, high):
    """One row (lists of floats) -> its loss in float64, each formula written out"""
    total, n = 0.0, len(logp)
    sequence_ratio = math.exp(sum(x - y for x, y in zip(logp, old)) / n)
    for x, y in zip(logp, old):
        ratio = sequence_ratio if kind == "gspo" else math.exp(min(max(x - y, -20), 20))
        value = min(ratio * adv, min(max(ratio, 1 - low), 1 + high) * adv)
        if kind == "grpo" and adv < 0:
            value = max(value, 3 * adv)
        total += -value
    return total / n


@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("adv", [1.7, -0.6])
def test_policy_loss_values(kind, adv, shift):
    """Ratios from e^-4 to e^4 around e^shift, so every branch (inside, clipped low, clipped high, dual clip)
    is taken, also by GSPO's one ratio."""
    old = torch.linspace(-5, -1, 41)
    logp = old + shift + torch.linspace(-4, 4, 41)
    t = tokens(logp, old, torch.full((41,), adv))
    expected = reference_loss(kind, logp.tolist(), old.tolist(), adv, 0.2, 0.28)
    loss = OURS[kind](t, 0.2, 0.28)
    assert loss.shape == (41,) and loss.double().sum().item() / 41 == pytest.approx(expected, rel=1e-5)


def test_policy_loss_gradients_by_hand():
    """d loss / d logp, token by token, at ratios 0.5, 1, 1.5, 10"""
    ratio = torch.tensor([0.5, 1.0, 1.5, 10.0])
    old = torch.tensor([-3.0, -3.0, -3.0, -3.0])

    def grad(kind, a):
        logp = (old + ratio.log()).requires_grad_()
        LOSSES[kind](tokens(logp, old, torch.full((4,), a)), 0.2, 0.2).sum().backward()
        return logp.grad.tolist()
    # positive: -rho A inside and below the band, nothing above it
    assert grad("grpo", 1.0) == pytest.approx([-0.5, -1.0, 0, 0])
    assert grad("dapo", 1.0) == pytest.approx([-0.5, -1.0, 0, 0])
    # negative: nothing below the band, and the dual clip cuts at rho > 3
    assert grad("grpo", -1.0) == pytest.approx([0, 1.0, 1.5, 0])
    assert grad("dapo", -1.0) == pytest.approx([0, 1.0, 1.5, 10.0])  # no dual clip


def test_gspo_uses_one_ratio_per_sequence():
    old = torch.tensor([-1.0, -1.0, -2.0])
    logp = torch.tensor([-1.0 + 0.3, -1.0 - 0.1, -2.0], requires_grad=True)
    t = tokens(logp, old, torch.ones(3), torch.tensor([0, 0, 1]))
    loss = gspo(t, 0.5, 0.5) / t.n_tokens        # as rl_backward does
    r0 = math.exp((0.3 - 0.1) / 2)
    assert loss.tolist() == pytest.approx([-r0 / 4, -r0 / 4, -1 / 2])        # each of the 2 rollouts: a half
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-r0 / 4, -r0 / 4, -1 / 2])   # the ratio's gradient, shared


def test_one_value_per_row():
    t = tokens(torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.tensor([0, 0, 0, 1]))
    assert t.of_rows([True, False]).tolist() == [True, True, True, False]


def test_kl_estimators():
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    d = [-0.5, 1.0]
    assert kl_penalty(logp, ref, "k2").tolist() == pytest.approx([x * x / 2 for x in d])
    assert kl_penalty(logp, ref, "k3").tolist() == pytest.approx([math.exp(x) - x - 1 for x in d])
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()            # k3's expectation is KL(p || q); of k2 the gradient's is:
    assert (p * kl_penalty(p.log(), q.log(), "k3")).sum() == pytest.approx(exact.item(), rel=1e-5)
    logits = p.log().requires_grad_()
    now = torch.log_softmax(logits, -1)
    expected, = torch.autograd.grad((now.exp() * (now - q.log())).sum(), logits, retain_graph=True)
    ours, = torch.autograd.grad((p * kl_penalty(now, q.log(), "k2")).sum(), logits)
    assert torch.allclose(ours, expected, atol=1e-6)


# --- the whole update ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("kl, kl_weight", [("k3", 0.0), ("k3", 0.1), ("k2", 0.1)])
def test_rl_backward_equals_reference(model, monkeypatch, kind, kl, kl_weight):
    monkeypatch.setitem(LOSSES, kind, OURS[kind])
    rows, reference = episodes(1), copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        for row in rows:                                             # near on-policy: the model's own + noise
            logp, _ = reference_logprobs(model, [row])
            noise = np.random.default_rng(len(row.ids)).normal(0, 0.3, len(logp))
            values = iter((logp + torch.tensor(noise)).tolist())
            row.logprobs = row.logprobs_old = [next(values) if m else 0.0 for m in row.mask]
    adv = advantages([r.reward for r in rows], [r.group_id for r in rows])
    assert 0 < sum(a != 0 for a in adv)

    def plain(m):
        n_tokens, loss = sum(sum(r.mask) for r in rows), 0.0
        for r, a in zip(rows, adv):
            logp, _ = reference_logprobs(m, [r])
            old = torch.tensor([lp for lp, on in zip(r.logprobs, r.mask) if on], dtype=torch.float64)
            ratio = (logp - old).exp() if kind != "gspo" else (logp - old).mean().exp().expand(len(old))
            term = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            if kind == "grpo" and a < 0:
                term = torch.maximum(term, torch.tensor(3.0 * a))
            loss = loss - (term.mean() / len(rows) if kind == "gspo" else term.sum() / n_tokens)
            if kl_weight:
                d = reference_logprobs(reference, [r])[0].detach() - logp
                loss = loss + kl_weight * (d.exp() - d - 1 if kl == "k3" else d * d / 2).sum() / n_tokens
        loss.backward()
        return loss.item()

    expected, grads = gradients(model, plain)
    options = dict(loss=kind, kl=kl, kl_weight=kl_weight, reference=reference)
    for micro_tokens in (1, 60, 10_000):         # every row alone, groups cut in two, all rows together
        options["micro_tokens"] = micro_tokens
        metrics, ours = gradients(model, lambda m: rl_backward(m, rows, adv, **options))
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert close(ours, grads)


def test_what_a_loss_may_look_at(model, monkeypatch):
    """A loss of one's own gets the trained tokens of the micro-batch, and the counts of the whole update."""
    rows, adv, seen = episodes(1), [1.0, -1.0, 0.5, 0.0, 2.0, -0.5, 1.0, -1.0], []
    monkeypatch.setitem(LOSSES, "looks", lambda t, low, high: seen.append((t, low, high)) or -t.adv * t.logp)
    rl_backward(model, rows, adv, loss="looks", clip=(0.1, 0.3), micro_tokens=60)
    assert len(seen) > 1 and sum(len(t.rows) for t, *_ in seen) == 7         # without the row of advantage 0
    for t, low, high in seen:
        assert (low, high) == (0.1, 0.3) and (t.n_tokens, t.n_rows) == (sum(sum(r.mask) for r in rows), 8)
        assert torch.equal(t.ids, at_trained(t.rows, "ids", "cpu"))
        assert torch.equal(t.logp_old, at_trained(t.rows, "logprobs_old", "cpu"))
        assert t.adv.tolist() == pytest.approx([adv[rows.index(r)] for r in t.rows for m in r.mask if m])
        assert torch.equal(t.adv, t.of_rows([adv[rows.index(r)] for r in t.rows]))
        assert torch.allclose(t.ratio, (t.logp - t.logp_old).clamp(-20, 20).exp())
        assert t.logp.requires_grad and not t.logp_old.requires_grad


def test_p_old_must_be_set_first(model):
    rows = episodes()
    rows[3].logprobs_old = None
    with pytest.raises(AssertionError, match="set_old_logprobs comes first"):
        rl_backward(model, rows, [1.0] * 8)


def test_zero_advantage_rows_are_skipped_but_counted(model):
    rows, seen = episodes(2), []
    adv = [1.0, -1.0] + [0.0] * 6
    hook = model.get_decoder().register_forward_hook(lambda *a: seen.append(a), with_kwargs=True)
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
    out = optimizer_step(m, optimizer)
    assert out["skipped_updates"] == 1 and math.isnan(out["grad_norm"])
    assert all(p.grad is None for p in m.parameters())               # nothing of it is left for the next one
    sft_backward(m, episodes())
    assert optimizer_step(m, optimizer, float("inf"))["skipped_updates"] == 1
    assert all(torch.equal(before[k], v) for k, v in m.state_dict().items())
    sft_backward(m, episodes())
    assert optimizer_step(m, optimizer)["skipped_updates"] == 0
    assert not torch.equal(before["model.norm.weight"], m.state_dict()["model.norm.weight"])


def test_the_gradient_is_clipped(model):
    """-> the norm before clipping; the step is the one of the clipped gradient"""
    for max_norm, scale in ((1.0, 0.1), (100.0, 1.0)):
        m = torch.nn.Linear(2, 1, bias=False)
        before = m.weight.detach().clone()
        m.weight.grad = torch.tensor([[6.0, 8.0]])
        out = optimizer_step(m, torch.optim.SGD(m.parameters(), lr=1.0), max_norm=max_norm)
        assert out["grad_norm"] == pytest.approx(10)
        assert torch.allclose(before - m.weight, scale * torch.tensor([[6.0, 8.0]]), atol=1e-4)


# --- p_old, and the gap between trainer and sampler ---------------------------------------------------------
def own_logprobs(model, row):
    values = iter(reference_logprobs(model, [row])[0].tolist())
    return [next(values) if m else 0.0 for m in row.mask]


@pytest.mark.parametrize("correction", [0.0, 2.0])
def test_old_logprobs(model, correction):
    """p_old: the sampler's numbers where it sampled the row as it is trained, else the trainer's own; with
    --correction the trainer's own of all rows. The sampler's stay what they are."""
    rows = episodes()
    kinds = [("policy", True), ("policy", False), ("truth", False), ("hinted", False), ("hinted", True)]
    for row, (source, as_sampled) in zip(rows, kinds):
        row.source, row.as_sampled, row.logprobs_old = source, as_sampled, None
    before = copy.deepcopy(rows)
    set_old_logprobs(model, rows, correction, 60)
    own = [correction > 0, True, True, True, *[correction > 0] * 4]
    for row, old, is_own in zip(rows, before, own):
        expected = own_logprobs(model, row) if is_own else old.logprobs
        assert row.logprobs_old == pytest.approx(expected, abs=1e-5) and row.logprobs == old.logprobs
        assert [x for x, m in zip(row.logprobs_old, row.mask) if not m] == [0.0] * row.mask.count(0)


def test_sampler_weight():
    """Against plain Python in float64; a ratio of e^100 is capped, one of e^-100 is 0, and equal
    log-probabilities weigh 1."""
    rng = np.random.default_rng(0)
    old, sampler = (torch.tensor(-rng.random(6) * 3) for _ in range(2))
    old[5], sampler[5] = -0.5, -0.5
    ratio = [math.exp(o - s) for o, s in zip(old.tolist(), sampler.tolist())]
    w = sampler_weight(old, sampler, 1.5)
    assert w.tolist() == pytest.approx([min(1.5, x) for x in ratio], rel=1e-12) and w[5] == 1
    assert max(ratio) > 1.5 > min(ratio)
    far = sampler_weight(torch.tensor([0.0, -100.0]), torch.tensor([-100.0, 0.0]), 2.0)
    assert far.tolist() == pytest.approx([2, 0], abs=1e-30)


def test_only_what_the_policy_sampled_is_corrected(model):
    """The gradient of rl_backward = that of the sum written out, row by row, in which a ground-truth row has
    the weight 1."""
    data, adv = episodes(), [0.5, -1.0, 1.0, -0.5, 2.0, -2.0, 1.0, -1.0]
    for e in data[::3]:
        e.source, e.as_sampled = "truth", False
    set_old_logprobs(model, data, 2.0, 16_384)

    def reference(m):
        total, n = 0.0, sum(sum(e.mask) for e in data)
        for e, a in zip(data, adv):
            logp, _ = reference_logprobs(m, [e])                     # first update: rho = 1, with a gradient
            old = logp.detach()
            sampler = torch.tensor([lp for lp, k in zip(e.logprobs, e.mask) if k], dtype=torch.float64)
            w = (old - sampler).exp().clamp(max=2.0) if e.source == "policy" else torch.ones_like(old)
            total = total - (w * a * (logp - old).exp()).sum() / n
        total.backward()
        return total.item()
    expected, plain = gradients(model, reference)
    for micro_tokens in (40, 10_000):
        options = dict(correction=2.0, micro_tokens=micro_tokens)
        metrics, ours = gradients(model, lambda m: rl_backward(m, data, adv, **options))
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4) and close(ours, plain, 1e-4)
    _, without = gradients(model, lambda m: rl_backward(m, data, adv))
    assert not close(without, plain, 1e-2)


def test_the_gap_is_that_of_the_sampled_rows(model):
    data = episodes()
    for e in data[:4]:
        e.as_sampled = False                     # nobody sampled them there: their distance says nothing
    own, _ = reference_logprobs(model, data[4:])
    d = own.detach() - at_trained(data[4:], "logprobs", "cpu")       # log p_new / p_sampler, of sampled tokens
    gap, k3 = d.abs(), (d.exp() - d - 1).clamp(-10, 10)              # KL(sampler || new)
    n = sum(sum(e.mask) for e in data)
    for correction in (0.0, 2.0):                # also where p_old hides it from the ratio
        set_old_logprobs(model, data, correction, 16_384)
        m = rl_backward(model, data, [1.0] * 8, correction=correction, micro_tokens=40)
        assert m["gap"] == pytest.approx(gap.mean().item(), rel=1e-5)
        assert m["gap_max"] == pytest.approx(gap.max().item(), rel=1e-5)
        assert m["kl_sampler"] == pytest.approx(k3.sum().item() / n, rel=1e-4)


# --- the pressure that rl_backward measures, and padding under FSDP -----------------------------------------
def test_rl_backward_measures_the_pressure(model):
    """Two rollouts, one message of the second malformed; the same sums by hand, per trained token of ALL
    rows."""
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
                part = "others_up" if a > 0 else "others_down"
                if hit:
                    part = "clean" if s.state == "call" else "malformed"
                want[part] += a * (hit - p[t - 1].item()) if a else 0.0
    n = sum(sum(r.mask) for r in rows)
    assert want["malformed"] < 0
    for part, value in want.items():
        assert got[f"push/open|{part}"] == pytest.approx(value / n, rel=1e-3, abs=1e-9), part


def uneven(rank, folder):
    """7 rows on rank 0, 1 on rank 1, a KL term: rank 1 has fewer micro-batches and must not hang, nor change
    the gradient."""
    import torch.distributed as dist

    from sft_step import shard
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, reference = torch.load(f"{folder}/models.pt", weights_only=False)
    for m in (model, reference):
        shard(m, "cpu", torch.float32)
    rows, adv = episodes(n=8, groups=2), [1.0, -1.0, 0.5, -0.5] * 2
    mine = slice(0, 7) if rank == 0 else slice(7, 8)
    reference.requires_grad_(False)
    for _ in range(3):
        rl_backward(model, rows[mine], adv[mine], kl_weight=0.1, reference=reference, micro_tokens=60)
    grads = {k: 2 * p.grad.full_tensor() for k, p in model.named_parameters()}   # FSDP: the mean over ranks
    hooks = len(model.get_output_embeddings().weight._backward_hooks or ())
    if rank == 0:
        torch.save((grads, hooks), f"{folder}/grads.pt")
    dist.barrier()
    del m, model, reference, grads               # FSDP's modules hold the group: as in train.cli
    gc.collect()
    dist.destroy_process_group()


def test_uneven_ranks_under_fsdp(model, tmp_path):
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.01)
    torch.save((plain, reference), tmp_path / "models.pt")
    rows, adv = episodes(n=8, groups=2), [1.0, -1.0, 0.5, -0.5] * 2
    for _ in range(3):
        rl_backward(plain, rows, adv, kl_weight=0.1, reference=reference, micro_tokens=60)
    context = torch.multiprocessing.spawn(uneven, args=(str(tmp_path),), nprocs=2, join=False)
    deadline = time.time() + 100
    while not context.join(timeout=1):
        if time.time() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks wait for each other forever")
    grads, hooks = torch.load(tmp_path / "grads.pt")
    names = [name for name, _ in plain.named_parameters()]
    assert close([grads[name] for name in names], [p.grad for p in plain.parameters()]) and hooks <= 1
