"""The probe, by hand: literal slots, and probabilities from a plain forward pass."""
import pytest
import torch

from analyze_tokens import probe
from rollout import Limits, play
from tools import Env, demonstration, make_tasks


def test_probe_slots_and_values(model, chat):
    rows = [play(chat, Env(t), demonstration(t), Limits(16, 64, 1024, 256)) for t in make_tasks("test", "miss_param", 3)]
    out = probe(model, chat, rows, max_tokens=600, chunk=7)
    open_id, expected = chat.tokenizer.convert_tokens_to_ids("<tool_call>"), {}
    exact, likelihood = [], []
    for r in rows:
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([r.ids])).logits[0].double(), -1)
        for s in r.spans:
            if s.who != "model":
                continue
            is_call = s.text.startswith("<tool_call>")
            for t in range(s.start, s.end):
                first, second, last = t == s.start, t == s.start + 1, t == s.end - 1
                slot = ("call" if is_call else "text") if first else "last" if last else "open" if second and is_call else "inside"
                expected.setdefault(f"p/open|{slot}", []).append(logp[t - 1, open_id].exp().item())
                expected.setdefault(f"p/end|{slot}", []).append(logp[t - 1, chat.end_id].exp().item())
                likelihood.append(logp[t - 1, r.ids[t]].item())
            if is_call:
                exact.append(all(logp[t - 1].argmax() == r.ids[t] for t in range(s.start + 1, s.end)))
    mean = lambda values: sum(values) / len(values)
    assert len(out) == 9
    for name in ("p/open|call", "p/open|text", "p/open|inside", "p/end|open", "p/end|last", "p/end|inside"):
        assert out[name] == pytest.approx(mean(expected[name]), rel=1e-4), name
    assert out["p/short_circuit"] == pytest.approx(out["p/open|text"] * out["p/end|open"])
    assert out["p/calls_exact"] == mean(exact) and out["p/log_likelihood"] == pytest.approx(mean(likelihood), rel=1e-4)


def test_probe_knows_a_perfect_and_a_collapsed_model(model, chat):
    """A model whose output layer is rigged to say <tool_call> everywhere: p/open|text is 1, no call is exact."""
    rows = [play(chat, Env(t), demonstration(t), Limits(16, 64, 1024, 256)) for t in make_tasks("test", "base", 2)]
    open_id = chat.tokenizer.convert_tokens_to_ids("<tool_call>")

    class Rigged(torch.nn.Module):
        def forward(self, h):
            return torch.nn.functional.one_hot(torch.full((len(h),), open_id), len(chat.tokenizer)) * 50.0
    real = model.get_output_embeddings
    try:
        model.get_output_embeddings = lambda: Rigged()
        out = probe(model, chat, rows)
    finally:
        model.get_output_embeddings = real
    assert out["p/open|text"] == pytest.approx(1) and out["p/end|open"] < 1e-6 and out["p/calls_exact"] == 0
