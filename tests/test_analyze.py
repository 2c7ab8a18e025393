"""The probe, by hand: literal slots, and probabilities from a plain forward pass."""
import pytest
import torch

from analyze_tokens import Alarm, probe, token_classes, truth_logprobs
from rollout import Limits, play
from tools import Env, demonstration, make_tasks


def test_probe_slots_and_values(model, chat):
    rows = [play(chat, Env(t), demonstration(t), Limits(16, 64, 1024, 256)) for t in make_tasks("test", "miss_param", 3)]
    out = probe(model, chat, rows, max_tokens=600, chunk=7, start=truth_logprobs(model, rows, 600))
    ids = {c: chat.tokenizer.convert_tokens_to_ids(t) for c, t in
           {"open": "<tool_call>", "close": "</tool_call>", "end": "<|im_end|>", "start": "<|im_start|>"}.items()}
    expected, exact, likelihood = {}, [], []
    for r in rows:
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([r.ids])).logits[0].double(), -1)
        for s in r.spans:
            if s.who != "model":
                continue
            words = [chat.text([i]) for i in r.ids[s.start:s.end]]
            # the spelling of each kind of message, by hand: <tool_call> \n {" ... "}} \n </tool_call> <|im_end|>
            assert words[-1] == "<|im_end|>"
            if is_call := words[0] == "<tool_call>":
                assert words[-2] == "</tool_call>"
                names = ["call", "open"] + ["in_call"] * (len(words) - 4) + ["close", "last"]
            else:
                names = ["text"] + ["in_text"] * (len(words) - 2) + ["last"]
            for t, slot in zip(range(s.start, s.end), names, strict=True):
                for c, i in ids.items():
                    expected.setdefault(f"p/{c}|{slot}", []).append(p := logp[t - 1, i].exp().item())
                    if (c, slot) not in {("open", "call"), ("close", "close"), ("end", "last")}:
                        expected.setdefault(f"p/{c}|off", []).append(p)
                likelihood.append(logp[t - 1, r.ids[t]].item())
            if is_call:
                exact.append(all(logp[t - 1].argmax() == r.ids[t] for t in range(s.start + 1, s.end)))
    mean = lambda values: sum(values) / len(values)
    for name in expected:
        assert out[name] == pytest.approx(mean(expected[name]), rel=1e-4), name
    for slot in ("call", "text", "open", "in_call", "in_text", "close", "last"):     # the six classes cover the vocabulary
        assert sum(out[f"p/{c}|{slot}"] for c in ("open", "close", "end", "start", "json", "content")) == pytest.approx(1, abs=1e-5)
    assert out["p/kl"] == pytest.approx(0, abs=1e-6)                                 # the model has not moved
    assert out["p/short_circuit"] == pytest.approx(out["p/open|text"] * out["p/end|open"])
    assert out["p/calls_exact"] == mean(exact) and out["p/log_likelihood"] == pytest.approx(mean(likelihood), rel=1e-4)


def test_json_class_is_punctuation_only(chat):
    spelled = {chat.text([i]) for i in token_classes(chat)["json"]}
    assert {'{"', '":', '",'} <= {s.strip() for s in spelled} and not any(c.isalnum() for s in spelled for c in s)


def test_alarm_rings_and_falls_silent_with_hysteresis():
    alarm = Alarm(3, 2)
    heard = [alarm.update(v) for v in (.02, .02, .02, .07, .05, .07, .08, .04, .02, .02, .07)]
    assert heard == [False] * 6 + [True] * 3 + [False] * 2
    assert not any(Alarm(3, 2).update(v) for v in [.02] * 20)


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
