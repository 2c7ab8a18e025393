"""The probe, by hand: literal slots, and probabilities from a plain forward pass. The autopsy, the pictures,
the study."""
import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import RUN

import autopsy
import make_base
import plot
import story
import study
import train
from analyze_tokens import collapse, main, mean, probe, read_records, timeline, truth_logprobs
from autopsy import Swapped, knows, repaired, risers, two_rules
from rollout import STATES, HFEngine, Limits, begin, demonstrate, play, rollout
from tools import make_tasks

LIMITS = Limits(16, 48, 1024, 256)


def truths(chat, tasks, syntax="A"):
    return [demonstrate(chat, task, syntax, LIMITS) for task in tasks]


# --- the probe ---------------------------------------------------------------------------------------------


def test_probe_slots_and_values(model, chat):
    tasks = make_tasks("test", "miss_param", 3)
    rows = truths(chat, tasks)
    rows.append(play(chat, tasks[0].env(), [["Done."]] * len(tasks[0].turns), LIMITS))   # behind a prompt
    assert rows[3].ids[:rows[0].spans[0].end] == rows[0].ids[:rows[0].spans[0].end]      # that it shares
    out = probe(model, chat, rows, micro_tokens=600, start=truth_logprobs(model, rows, 600))
    tokens = {"open": "<tool_call>", "close": "</tool_call>", "end": "<|im_end|>", "start": "<|im_start|>"}
    ids = {c: chat.tokenizer.convert_tokens_to_ids(token) for c, token in tokens.items()}
    expected, exact, likelihood = {}, [], []
    for r in rows:
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([r.ids])).logits[0].double(), -1)
        for s in r.spans:
            if s.who != "model":
                continue
            words = [chat.text([i]) for i in r.ids[s.start:s.end]]
            # each kind of message is spelled by hand: <tool_call> \n {" ... "}} \n </tool_call> <|im_end|>
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
    for name in expected:
        assert out[name] == pytest.approx(mean(expected[name]), rel=1e-4), name
    assert out["p/moved"] == pytest.approx(0, abs=1e-6)              # the model has not moved
    assert out["p/short_circuit"] == pytest.approx(out["p/open|text"] * out["p/end|open"])
    assert out["p/calls_exact"] == mean(exact)
    assert out["p/log_likelihood"] == pytest.approx(mean(likelihood), rel=1e-4)


def test_json_class_is_punctuation_only(chat):
    spelled = {chat.text([i]) for i in autopsy.punctuation_ids(chat)}
    assert {'{"', '":', '",'} <= {s.strip() for s in spelled}
    assert not any(c.isalnum() for c in "".join(spelled))


def test_probe_knows_a_perfect_and_a_collapsed_model(model, chat):
    """A model that is rigged to say <tool_call> everywhere: no call is exact."""
    rows = truths(chat, make_tasks("test", "base", 2))
    open_id = chat.tokenizer.convert_tokens_to_ids("<tool_call>")
    rigged = copy.deepcopy(model)
    rigged.get_decoder().norm.register_forward_hook(lambda layer, args, out: torch.ones_like(out))
    with torch.no_grad():
        weight = rigged.get_output_embeddings().weight.zero_()                                   # [V, D]
        weight[open_id] = 50 / weight.shape[1]   # the logit of <tool_call> is 50, all others are 0
    out = probe(rigged, chat, rows)
    assert out["p/open|text"] == pytest.approx(1) and out["p/end|open"] < 1e-6 and out["p/calls_exact"] == 0


def test_probe_of_any_checkpoint(folder, capsys):
    assert main(["--probe", "runs/first", "runs/tiny-base", "runs/first/checkpoints/step-2"]) == 0
    run, base, checkpoint = capsys.readouterr().out.split("== ")[1:]
    assert run.splitlines()[1:] == checkpoint.splitlines()[1:]
    assert len(base.splitlines()) == len(checkpoint.splitlines())
    assert "in_call" in run and "short_circuit" in run


def test_probe_in_the_other_syntax(model, chat):
    """Syntax B has no tags: <tool_call> is wrong everywhere, and no slots are behind it or for its end."""
    rows = truths(chat, make_tasks("test", "base", 2), "B")
    out = probe(model, chat, rows)
    assert not {"p/open|open", "p/end|open", "p/close|close"} & out.keys() and out["p/short_circuit"] == 0
    p = []
    for r in rows:
        with torch.no_grad():
            of_tag = torch.softmax(model(torch.tensor([r.ids])).logits[0], -1)[:, 3].tolist()
        for s in r.spans:
            p += of_tag[s.start - 1:s.end - 1] if s.who == "model" else []
    assert chat.text([3]) == "<tool_call>" and out["p/open|off"] == pytest.approx(mean(p), rel=1e-3)


# --- the autopsy -------------------------------------------------------------------------------------------


def said(model, chat, tasks, rule=None, temperature=1.0):
    """All ids that the model says over these tasks"""
    engine, envs = HFEngine(model, chat.stop_ids), [task.env() for task in tasks]
    engine.rule = rule
    begun = [begin(chat, env, g) for g, env in enumerate(envs)]
    done = rollout(engine, chat, envs, LIMITS, begun, (1,), temperature)
    return [e.ids[s.start:s.end] for e in done for s in e.spans if s.who == "model"]


def test_two_rules_hold(model, chat):
    open_id = chat.tokenizer.convert_tokens_to_ids("<tool_call>")
    tasks = make_tasks("test", "base", 12)

    def loud(logits, _):                         # a model that wants to break both rules everywhere
        logits[:, open_id] += 8
        logits[:, chat.end_id] += 8
        return logits

    def breaks(ids):
        ends_at_once = (open_id, chat.end_id) in zip(ids, ids[1:])
        return ends_at_once or (open_id in ids[1:] and ids[0] != open_id)
    rule = two_rules(chat)
    assert any(map(breaks, said(model, chat, tasks, loud)))
    assert not any(map(breaks, said(model, chat, tasks, lambda logits, s: rule(loud(logits, s), s))))


def test_swapped_models(model, chat, tokenizer):
    """Swapping nothing, or a model with itself, changes nothing; swapping everything is the donor. In
    between: the formula."""
    donor = make_base.tiny_model(len(tokenizer), 64, 2, seed=5).eval()
    tasks, control = make_tasks("test", "miss_func", 4), [2, 3, 4]
    alone = said(model, chat, tasks)
    assert said(Swapped(model, donor, []), chat, tasks) == alone
    assert said(Swapped(model, model, control), chat, tasks) == alone
    everything = list(range(len(tokenizer)))
    assert said(Swapped(model, donor, everything), chat, tasks) == said(donor, chat, tasks) != alone
    deep = make_base.tiny_model(len(tokenizer), 64, 3, seed=6).eval()    # its layers stand behind the host's
    assert said(Swapped(model, deep, everything), chat, tasks) == said(deep, chat, tasks)
    assert said(Swapped(deep, model, []), chat, tasks) == said(deep, chat, tasks)
    h, g = torch.randn(5, 64), torch.randn(5, 64)
    p, q = (torch.softmax(m.get_output_embeddings()(x).double(), -1) for m, x in ((model, h), (donor, g)))
    mixed = Swapped(model, donor, control).get_output_embeddings()(torch.cat([h, g], -1)).exp()
    expected = p * ((1 - q[:, control].sum(-1)) / (1 - p[:, control].sum(-1)))[:, None]
    expected[:, control] = q[:, control]
    assert torch.allclose(mixed, expected)
    assert torch.allclose(mixed.sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("syntax, first", [("A", "<tool_call>"), ("B", "[create")])
def test_knows_by_hand(model, chat, syntax, first):
    """A rigged model: right everywhere in a call except at ONE token; the three points tell where it is."""
    task = next(t for t in make_tasks("test", "base", 50) if t.turns[0].calls[0][0] == "create_file")
    row = demonstrate(chat, task, syntax, LIMITS)
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
        return knows(Rigged(), chat, [row], syntax)
    rest = (len(calls) - 1) / len(calls)
    assert score([]) == [1, 1, 1]
    assert score([len(words) - 1]) == [1, 1, 1]  # the end token is not part of the call
    assert score([value]) == [rest] * 3 and score([name]) == [rest, rest, 1]
    assert score([0]) == ([1, 1, 1] if syntax == "A" else [rest, rest, 1])       # A: the tag is given


def test_risers_names_the_risen_token(model, chat):
    rows = truths(chat, make_tasks("test", "base", 2))
    risen = copy.deepcopy(model)
    with torch.no_grad():                        # an output row that agrees with the mean hidden state
        hidden = model.get_decoder()(input_ids=torch.tensor([rows[0].ids])).last_hidden_state[0].mean(0)
        risen.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        risen.lm_head.weight[3] += hidden
    most = risers(risen, model, chat, rows)[0]
    assert most.token == "<tool_call>" and most.after > most.before
    same = risers(model, model, chat, rows)[0]
    assert same.before == same.after


def test_repair_teaches_and_leaves_the_patient_alone(model, chat):
    before = copy.deepcopy(model.state_dict())
    rows = truths(chat, make_tasks("train", "base", 4))
    masks = [list(row.mask) for row in rows]
    likelihood = lambda m: mean(truth_logprobs(m, rows))
    assert likelihood(repaired(model, rows, 6, 1e-3)) > likelihood(model) + 0.5
    tags = repaired(model, rows, 6, 1e-3, only={3})
    assert probe(tags, chat, rows)["p/open|text"] > 5 * probe(model, chat, rows)["p/open|text"]
    assert sum(autopsy.with_mask(rows[0], {3}).mask) == rows[0].states.count("call")
    assert [row.mask for row in rows] == masks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_autopsy_command(folder, capsys):
    """The command line on the run that the fixture trained: every line of the report, as a file too."""
    assert autopsy.main(["--base", "runs/tiny-base", "--tasks", "2", "--json", "report.json",
                         "runs/none-here", "runs/first"]) == 2
    printed = capsys.readouterr()
    reports = json.loads((folder / "report.json").read_text())
    report = reports.pop("runs/first")
    assert "runs/none-here" in printed.err and not reports and len(report) > 30
    assert len(report.pop("risers")) == 5
    assert all(name in printed.out for name in report)
    assert all(isinstance(value, float) for value in report.values())
    kept = json.loads((story.DATA / "autopsy.json").read_text())     # of the study's checkpoints
    assert all(list(of_run) == [*report, "risers"] for of_run in kept.values())  # the same lines


# --- pictures, pages, records ------------------------------------------------------------------------------


def is_drawn(path):
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


def test_pictures_and_pages_of_a_run(folder, capsys):
    """Two runs side by side, one of them broken: it is reported, the other one is drawn."""
    (folder / "runs/damaged").mkdir(exist_ok=True)
    (folder / "runs/damaged/metrics.jsonl").write_text('{"step": 0, "rew\n{"step": 1}\n')
    assert plot.main(["side.png", "runs/first", "runs/damaged"]) == 2 and is_drawn(folder / "side.png")
    assert "line 1 of runs/damaged/metrics.jsonl is damaged" in capsys.readouterr().err
    assert main(["--transcripts", "runs/first"]) == 0
    page = capsys.readouterr().out
    assert "## step 0: " in page and "## step 1: " in page and "<|im_start|>" in page


def test_a_run_without_probes_is_drawn_too(folder):
    assert train.cli([*RUN, "--steps", "1", "--probe_every", "-1", "--out", "runs/unprobed"]) == 0
    assert not any("p/open|text" in r for r in read_records("runs/unprobed"))
    assert plot.main(["unprobed.png", "runs/unprobed"]) == 0 and is_drawn(folder / "unprobed.png")


def test_a_run_of_sft_only_says_what_it_lacks(folder, capsys):
    assert train.cli([*RUN, "--signal", "sft", "--schedule", "sft", "--sft_epochs", "1", "--sft_batch", "22",
                      "--out", "runs/only"]) == 0
    assert plot.main(["only.png", "runs/only"]) == 2 and "has no RL steps" in capsys.readouterr().err
    assert main(["--transcripts", "runs/only"]) == 2 and "is empty" in capsys.readouterr().err
    assert main(["runs/only"]) == 0


# --- the study ---------------------------------------------------------------------------------------------


def test_the_studys_pictures(tmp_path, monkeypatch):
    for name in ("base.json", *(f"{recipe}-seed0.csv" for recipe in ("lr1e-3", "lr1e-3+ets"))):
        shutil.copy(story.DATA / name, tmp_path)
    monkeypatch.setattr(story, "STORY", replace(story.STORY, data=tmp_path))
    story.runs.cache_clear()                     # one seed of each
    story.picture(tmp_path / "story.png", story.PICTURES["story.png"])
    story.runs.cache_clear()
    assert is_drawn(tmp_path / "story.png")


def test_csv_records_are_the_records(folder, tmp_path):
    """pack: merged by step, rounded to four digits, nothing else lost; and the readers cannot tell the
    difference."""
    study.pack("runs/first", tmp_path / "first-seed0.csv")
    packed, plain = read_records(tmp_path / "first-seed0.csv"), read_records("runs/first")
    assert [r["step"] for r in packed] == [0, 1, 2]
    for record in plain:
        merged = packed[record["step"]]
        for name, value in record.items():
            if name.startswith(study.KEEP):
                close = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
                assert merged[name] == close, name
    assert timeline(packed).splitlines()[0] == timeline(plain).splitlines()[0]
    assert len(timeline(packed).splitlines()) == 3


def test_study_runs_resumes_and_packs(folder, tmp_path):
    """The real command line of a recipe, once; then nothing is left to do; an interrupted run goes on."""
    common = " ".join([*RUN, "--steps 2 --eval_every -1 --save_every 1 --threads 1"])
    recipes = {"strict": study.Recipe("--closing strict"), "wrong": study.Recipe("--lr nan", 1)}
    small = study.Study(recipes, common, " ".join([*RUN, story.FINAL]), "runs/study", tmp_path)
    small.evaluate_base()
    assert "average_clean" in json.loads((tmp_path / "base.json").read_text())
    assert small.run_one("strict", 0) is None
    records = read_records(tmp_path / "strict-seed0.csv")
    assert len(records) == 3 and 0 <= records[-1]["final/format_ood_clean"] <= 1
    run = folder / "runs/study/strict-seed0"
    assert json.loads((run / "config.json").read_text())["closing"] == "strict"
    log = run.with_name("strict-seed0.log")
    before = log.read_bytes()
    assert small.run_one("strict", 0) is None and log.read_bytes() == before
    (tmp_path / "strict-seed0.csv").unlink()     # as if killed after its first step
    (run / "checkpoints/latest").write_text("step-1")
    text = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(text[:4]) + "\n")
    assert not study.finished(run) and small.run_one("strict", 0) is None
    assert read_records(tmp_path / "strict-seed0.csv") == records
    assert "wrong-seed0 failed with status 2" in small.run_one("wrong", 0)


def made(rewards):
    states = {f"state/{s}": 0.5 for s in STATES}
    return [{"step": i, "reward": r, "reward_clean": r} | states for i, r in enumerate(rewards)]


def test_collapse_and_cells_on_made_up_records():
    records, quiet = made([.4] * 20 + [.0] * 20), made([.4] * 40)
    assert collapse(records)["step"] == 24 and collapse(records, share=0.5)["step"] == 22
    assert collapse(quiet) is None
    assert study.falls([records, quiet], "reward_clean") == "1 of 2 (24)"
    assert study.late(records, "reward", n=30) == pytest.approx(.4 / 3)
    assert study.late(records, "reward", "state/call", n=30) == pytest.approx(.5 + .4 / 3)
    assert study.spread([.3, .1, .2]) == "0.20 (0.10 to 0.30)"
    assert study.spread([None]) == "–" and study.spread([None, .3]) == "0.30"
