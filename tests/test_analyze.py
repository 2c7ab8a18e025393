"""The probe, by hand: literal slots, and probabilities from a plain forward pass."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch

import study
import supervision
import train
from conftest import RUN

from analyze_tokens import (Alarm, Swapped, collapse, knows, main, mean, probe, read_rows, repaired, risers, timeline,
                            token_classes, truth_logprobs, two_rules)
from rollout import HFEngine, Limits, begin, play, rollout
from tools import STATES, Env, demonstration, make_tasks


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
    assert out["p/moved"] == pytest.approx(0, abs=1e-6)                                 # the model has not moved
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


# --- the autopsy -------------------------------------------------------------------------------------------------------
LIMITS = Limits(16, 48, 1024, 256)


def said(model, chat, tasks, rule=None, temperature=1.0):
    """All ids that the model says over these tasks"""
    engine, envs = HFEngine(model, chat.stop_ids), [Env(t) for t in tasks]
    engine.rule = rule
    done = rollout(engine, chat, envs, LIMITS, [begin(chat, e, g) for g, e in enumerate(envs)], (1,), temperature)
    return [e.ids[s.start:s.end] for e in done for s in e.spans if s.who == "model"]


def test_two_rules_hold(model, chat):
    open_id = chat.tokenizer.convert_tokens_to_ids("<tool_call>")
    tasks = make_tasks("test", "base", 12)

    def loud(logits, _):                         # a model that wants to break both rules everywhere
        logits[:, open_id] += 8
        logits[:, chat.end_id] += 8
        return logits
    rule = two_rules(chat)
    breaks = lambda ids: open_id in ids[1:] and ids[0] != open_id or any(
        a == open_id and b == chat.end_id for a, b in zip(ids, ids[1:]))
    assert any(map(breaks, said(model, chat, tasks, loud)))
    assert not any(map(breaks, said(model, chat, tasks, lambda logits, s: rule(loud(logits, s), s))))


def test_swapped_models(model, chat, tokenizer):
    """Swapping nothing, or a model with itself, changes nothing; swapping everything is the donor. In between: the formula."""
    donor = supervision.tiny_model(len(tokenizer), train.parse_args(["--tiny_hidden", "64", "--tiny_layers", "2", "--base_seed", "5"])).eval()
    tasks, control = make_tasks("test", "miss_func", 4), [2, 3, 4]
    alone = said(model, chat, tasks)
    assert said(Swapped(model, donor, []), chat, tasks) == alone == said(Swapped(model, model, control), chat, tasks)
    everything = list(range(len(tokenizer)))
    assert said(Swapped(model, donor, everything), chat, tasks) == said(donor, chat, tasks) != alone
    h, g = torch.randn(5, 64), torch.randn(5, 64)
    p, q = (torch.softmax(m.get_output_embeddings()(x).double(), -1) for m, x in ((model, h), (donor, g)))
    mixed = Swapped(model, donor, control).get_output_embeddings()(torch.cat([h, g], -1)).exp()
    expected = p * ((1 - q[:, control].sum(-1)) / (1 - p[:, control].sum(-1)))[:, None]
    expected[:, control] = q[:, control]
    assert torch.allclose(mixed, expected) and torch.allclose(mixed.sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("syntax, first", [("A", "<tool_call>"), ("B", "[create")])
def test_knows_by_hand(model, chat, syntax, first):
    """A rigged model: right everywhere in a call except at ONE token; the three depths tell where it stands."""
    task = next(t for t in make_tasks("test", "base", 50) if t.turns[0].calls[0][0] == "create_file")
    row = play(chat, Env(task, syntax), demonstration(task, syntax), LIMITS)
    calls = [s for s in row.spans if s.state == "call"]
    words = [chat.text([i]) for i in row.ids[calls[0].start:calls[0].end]]
    assert words[0] == first
    name, value = next(i for i, w in enumerate(words) if w.endswith("_file")), len(words) - 6

    def score(wrong):
        class Rigged:
            device = "cpu"

            def __call__(self, ids):
                logits = torch.nn.functional.one_hot(ids[0].roll(-1), len(chat.tokenizer)).float()[None]
                logits[0, [calls[0].start + w - 1 for w in wrong]] *= -1
                return SimpleNamespace(logits=logits)
        return knows(Rigged(), chat, [task], syntax, LIMITS)
    rest = (len(calls) - 1) / len(calls)
    assert score([]) == [1, 1, 1] and score([len(words) - 1]) == [1, 1, 1]      # the end token is not part of the call
    assert score([value]) == [rest] * 3 and score([name]) == [rest, rest, 1]
    assert score([0]) == ([1, 1, 1] if syntax == "A" else [rest, rest, 1])      # A: the tag is given; B: "[create" is not


def test_risers_names_the_risen_token(model, chat):
    rows = [play(chat, Env(t), demonstration(t), LIMITS) for t in make_tasks("test", "base", 2)]
    risen = copy.deepcopy(model)
    with torch.no_grad():                        # an output row that agrees with the mean hidden state
        hidden = model.get_decoder()(input_ids=torch.tensor([rows[0].ids])).last_hidden_state[0].mean(0)
        risen.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        risen.lm_head.weight[3] += hidden
    (token, before, after), *_ = risers(risen, model, chat, rows)
    assert token == "<tool_call>" and after > before
    assert risers(model, model, chat, rows)[0][1] == risers(model, model, chat, rows)[0][2]


def test_repair_teaches_and_leaves_the_patient_alone(model, chat):
    before = copy.deepcopy(model.state_dict())
    tasks = make_tasks("train", "base", 4)
    rows = [play(chat, Env(t), demonstration(t), LIMITS) for t in tasks]
    likelihood = lambda m: mean(truth_logprobs(m, rows))
    assert repaired(model, chat, tasks, "A", LIMITS, 6, 1e-3, likelihood) > likelihood(model) + 0.5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_probe_of_any_checkpoint(folder, capsys):
    base = str(next(p for p in (folder / "runs").glob("tiny-base-*")))
    assert main(["--probe", "runs/first", base, "runs/first/checkpoints/step-2"]) == 0
    run, model, checkpoint = capsys.readouterr().out.split("== ")[1:]
    assert run.splitlines()[1:] == checkpoint.splitlines()[1:] and len(model.splitlines()) == len(checkpoint.splitlines())
    assert "in_call" in run and "short_circuit" in run


def test_autopsy_command(folder, capsys):
    """The command line on the run that the fixture trained: every line of the report, as a file too."""
    base = next(p for p in (folder / "runs").glob("tiny-base-*"))
    assert main(["--autopsy", str(base), "--autopsy_tasks", "2", "--json", "report.json", "runs/first", "runs/none-here"]) == 2
    printed = capsys.readouterr()
    report = json.loads((folder / "report.json").read_text())["runs/first"]
    assert "runs/none-here" in printed.err and len(report) > 30
    assert len(report.pop("risers")) == 5
    assert all(name in printed.out for name in report) and all(isinstance(v, float) for v in report.values())


# --- pictures, pages, rows ---------------------------------------------------------------------------------------------
def test_pictures_and_pages_of_a_run(folder, capsys):
    """Two runs side by side, one of them broken: it is reported, the other one is drawn."""
    (folder / "runs/damaged").mkdir(exist_ok=True)
    (folder / "runs/damaged/metrics.jsonl").write_text('{"step": 0, "rew\n{"step": 1}\n')
    assert main(["--plot", "side.png", "--heat", "heat.png", "runs/first", "runs/damaged"]) == 2
    assert "line 1 of runs/damaged/metrics.jsonl is damaged" in capsys.readouterr().err
    for png in ("side.png", "heat.png"):
        assert (folder / png).read_bytes()[:4] == b"\x89PNG" and (folder / png).stat().st_size > 10_000
    assert main(["--transcripts", "runs/first"]) == 0
    page = capsys.readouterr().out
    assert "## step 0: " in page and "## step 1: " in page and "<|im_start|>" in page


def test_a_run_without_probes_is_drawn_too(folder, capsys):
    assert train.cli([*RUN, "--steps", "1", "--probe_every", "-1", "--out", "runs/unprobed"]) == 0
    assert main(["--heat", "no.png", "runs/unprobed"]) == 2 and "has no probes" in capsys.readouterr().err
    assert main(["--plot", "unprobed.png", "runs/unprobed"]) == 0 and (folder / "unprobed.png").exists()


def test_csv_rows_are_the_rows(folder, tmp_path):
    """pack: merged by step, rounded to four digits, nothing else lost; and the readers cannot tell the difference."""
    study.pack("runs/first", tmp_path / "first-seed0.csv")
    packed, plain = read_rows(tmp_path / "first-seed0.csv"), read_rows("runs/first")
    assert [r["step"] for r in packed] == [0, 1, 2]
    for row in plain:
        merged = packed[row["step"]]
        for name, value in row.items():
            if name.startswith(study.KEEP):
                assert merged[name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
    assert timeline(packed).splitlines()[0] == timeline(plain).splitlines()[0] and len(timeline(packed).splitlines()) == 3


def test_study_runs_resumes_and_packs(folder, tmp_path, monkeypatch):
    """The real command line of a recipe, once; then nothing is left to do; an interrupted run goes on."""
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "COMMON", " ".join([*RUN, "--steps 2 --eval_every -1 --save_every 1"]))
    monkeypatch.setattr(study, "FINAL", " ".join([*RUN, study.FINAL]))
    (tmp_path / "study").mkdir()
    assert study.run_one("strict", 0) is None
    rows = read_rows(tmp_path / "study/strict-seed0.csv")
    assert len(rows) == 3 and 0 <= rows[-1]["final/format_ood_clean"] <= 1
    assert json.loads((folder / "runs/study/strict-seed0/config.json").read_text())["closing"] == "strict"
    before = (folder / "runs/study/strict-seed0.log").read_bytes()
    assert study.run_one("strict", 0) is None and (folder / "runs/study/strict-seed0.log").read_bytes() == before
    (tmp_path / "study/strict-seed0.csv").unlink()                   # as if killed after its first step
    (folder / "runs/study/strict-seed0/checkpoints/latest").write_text("step-1")
    text = (folder / "runs/study/strict-seed0/metrics.jsonl").read_text().splitlines()
    (folder / "runs/study/strict-seed0/metrics.jsonl").write_text("\n".join(text[:4]) + "\n")
    assert not study.finished("runs/study/strict-seed0") and study.run_one("strict", 0) is None
    assert read_rows(tmp_path / "study/strict-seed0.csv") == rows
    monkeypatch.setitem(study.RECIPES, "wrong", ("--lr nan", 1))
    assert "wrong-seed0 failed with status 2" in study.run_one("wrong", 0)


def made(rewards, **columns):
    return [{"step": i, "reward": r, "reward_clean": r, "p/open|text": .01, **{f"state/{s}": 0.5 for s in STATES},
             **{k: v[i] for k, v in columns.items()}} for i, r in enumerate(rewards)]


def test_alarm_and_fall_on_made_up_rows():
    rows = made([.4] * 20 + [.0] * 20, **{"p/moved": [.1] * 10 + [.5] * 30})
    assert collapse(rows)["step"] == 24 and collapse(rows, share=0.5)["step"] == 22 and collapse(made([.4] * 40)) is None
    assert study.rings(rows, "p/moved", 3) == 10 and study.rings(rows, "p/moved", 6) is None
    assert study.fall(rows) == 22 and study.fall(rows[:30]) is None                  # too near its end to say "for good"
    assert study.heard([rows, made([.4] * 40, **{"p/moved": [.1] * 10 + [.5] * 30})], "p/moved", 3) == ([12], 1)
    assert study.welch([1, 2, 3], [1, 2, 3]) == (0, pytest.approx(2.78 * (2 / 3) ** .5))
    assert study.permutation([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20) and study.permutation([1, 2], [1, 2]) == 1
    assert study.points([.2, .2, .2], [.1, .1, .1]) == "+10 (+10 to +10)"
    assert study.supervised("ops", rows) == 40 * 12 and study.supervised("ets", [*rows, {"sft_visits": 7}]) == 7
    assert study.falls([rows, made([.4] * 40)], "reward") == "1 of 2 (24)"
    assert study.spread([.3, .1, .2]) == "0.20 (0.10 to 0.30)" and study.late(rows, "reward", n=30) == pytest.approx(.4 / 3)


def test_a_run_of_sft_only_says_what_it_lacks(folder, capsys):
    assert train.cli([*RUN, "--signal", "sft", "--schedule", "sft", "--sft_steps", "2", "--sft_batch", "4", "--out", "runs/only"]) == 0
    assert main(["--plot", "only.png", "runs/only"]) == 2 and "has no RL steps" in capsys.readouterr().err
    assert main(["--transcripts", "runs/only"]) == 2 and "is empty" in capsys.readouterr().err
    assert main(["--heat", "only.png", "runs/only"]) == 0 and main(["runs/only"]) == 0


def test_probe_in_the_other_syntax(model, chat):
    """Syntax B has no tags: <tool_call> is wrong everywhere, and there are no slots behind it or for its end."""
    rows = [play(chat, Env(t, "B"), demonstration(t, "B"), LIMITS) for t in make_tasks("test", "base", 2)]
    out = probe(model, chat, rows)
    assert not {"p/open|open", "p/end|open", "p/close|close"} & out.keys() and out["p/short_circuit"] == 0
    places = [(r, t) for r in rows for s in r.spans if s.who == "model" for t in range(s.start, s.end)]
    with torch.no_grad():
        p = [torch.softmax(model(torch.tensor([r.ids])).logits[0, t - 1], -1)[3].item() for r, t in places]
    assert chat.text([3]) == "<tool_call>" and out["p/open|off"] == pytest.approx(mean(p), rel=1e-3)
