"""What each signal puts into the loss, by literal episodes: which rows, which masks, which ids, which tasks."""
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, RUN, rows
from test_losses import close, gradients

import rl_step
import supervision
import train
from rl_step import advantages, policy_loss, recompute_logprobs, rl_backward
from rollout import Episode, HFEngine, Limits, begin, play, retokenized, rollout, without_hint
from supervision import ETS, HBG, OPS, PRS, SFT, SIGNALS, Judge, Signal, demonstrate, hint, roll_out
from tools import DOCS, Env, Task, Turn, UserError, demonstration, make_tasks, write_calls

LIMITS = Limits(16, 24, 1024, 256)
CHECK = write_calls([("check_balance", {})])
PAY = write_calls([("pay_money", {"to": "bob", "amount": 5})])


def options(**kw):
    return train.parse_args([*RUN, *[x for k, v in kw.items() for x in (f"--{k}", str(v))]])


@pytest.fixture
def task():
    return Task("t0", "base", dict(DOCS["bank"]), ["bank"], "seed", [
        Turn('pay money to "bob", 5 coins', [("pay_money", {"to": "bob", "amount": 5})], "Done."),
        Turn("check the balance", [("check_balance", {})], "Done.")])


def model_text(chat, e):
    return [chat.text(e.ids[s.start:s.end]) for s in e.spans if s.who == "model"]


# --- demonstrations ----------------------------------------------------------------------------------------------------
def test_demonstration_rows(chat, task):
    e = demonstrate(chat, task, options(), LIMITS)
    assert (e.source, e.reward, e.status) == ("truth", 1, "finished")
    assert model_text(chat, e) == [PAY + "<|im_end|>", "Done.<|im_end|>", CHECK + "<|im_end|>", "Done.<|im_end|>"]
    trained = chat.text([t for t, m in zip(e.ids, e.mask) if m])
    assert trained == "".join(model_text(chat, e))                # only what the assistant says, with its end tokens
    assert [s.text for s in e.spans if s.who == "tool"][0] == '<tool_response>\npaid "bob"\n</tool_response>'


def test_sft_rows_are_all_tasks(chat):
    tasks = make_tasks("train", "base", 5)
    signal = SFT(options(signal="sft", schedule="sft"), chat, tasks, LIMITS)
    assert [e.task_id for e in signal.rows()] == [t.id for t in tasks] and all(e.weight == 1 for e in signal.rows())


# --- OPS ---------------------------------------------------------------------------------------------------------------
def test_ops_group(model, chat, task):
    a = options(signal="ops", ops_k=2)
    group = roll_out(OPS(a, chat, [task], LIMITS), HFEngine(model, chat.stop_ids), [task], [0], seed=(0, 0))
    assert [e.source for e in group] == ["truth", "truth", "policy", "policy"] and [e.sample for e in group] == [0, 1, 2, 3]
    assert [e.reward for e in group] == [1, 1, 0, 0]              # the random model fails
    assert model_text(chat, group[0]) == [PAY + "<|im_end|>", "Done.<|im_end|>", CHECK + "<|im_end|>", "Done.<|im_end|>"]
    # it takes part in the group's advantage like any other rollout
    assert advantages([e.reward for e in group], [0] * 4) == pytest.approx([0.866, 0.866, -0.866, -0.866], abs=1e-3)
    # ratio "one": the trainer's own log-probability is the old one, so the first update is advantage-weighted likelihood
    assert group[0].logprobs == [0.0] * len(group[0].ids)
    recompute_logprobs(model, group[:2])
    metrics, _ = gradients(model, lambda m: rl_backward(m, group[:2], [1.0, 1.0]))
    assert metrics["gap"] < 1e-5 and metrics["clip_frac"] == 0


def test_ops_shaped_ratio():
    """p / (p + 0.1) on ground-truth tokens only. A > 0: never clipped. A < 0: no gradient while p/(p + .1) < .8 (p < .4)."""
    logp = torch.tensor([0.05, 0.3, 0.9, 0.9]).log().requires_grad_()
    old = torch.tensor([0.9, 0.9, 0.9, 0.45]).log()
    shaped = torch.tensor([True, True, True, False])

    def run(sign):
        logp.grad = None
        loss, _ = policy_loss(logp, old, torch.full((4,), sign), torch.zeros(4, dtype=torch.long), torch.tensor([4.0]),
                              "grpo", (0.2, 0.2), 3.0, shaped)
        loss.sum().backward()
        return loss.tolist(), logp.grad.tolist()
    f = [p / (p + 0.1) for p in (0.05, 0.3, 0.9)]
    slope = [0.1 * p / (p + 0.1) ** 2 for p in (0.05, 0.3, 0.9)]  # d f / d log p
    loss, grad = run(1.0)
    assert loss == pytest.approx([-x for x in f] + [-1.2]) and grad == pytest.approx([-x for x in slope] + [0.0])
    loss, grad = run(-1.0)
    assert loss == pytest.approx([0.8, 0.8, f[2], 2.0]) and grad == pytest.approx([0, 0, slope[2], 2.0])


# --- HBG ---------------------------------------------------------------------------------------------------------------
def test_hint_is_sampled_with_and_trained_without(model, chat, task):
    a = options(signal="hbg", hints=1)
    assert "pay_money" in hint(task, "A") and "no call is right" in hint(make_tasks("train", "miss_func", 1)[0], "A")
    engine, seen = HFEngine(model, chat.stop_ids), []
    generate = engine.generate
    engine.generate = lambda requests, temperature: seen.append([list(r.ids) for r in requests]) or generate(requests, temperature)
    group = roll_out(HBG(a, chat, [task], LIMITS), engine, [task], [0], seed=(0, 0))
    plain = chat.prompt(Env(task).opening())
    hinted, other = seen[0][0], seen[0][1]
    assert other == plain and hint(task, "A") in chat.text(hinted) and hint(task, "A") not in chat.text(plain)
    e = group[0]
    assert e.source == "hinted" and e.ids[:len(plain)] == plain and e.spans[0].end == len(plain)   # the ids are hint-free
    assert e.spans[1].start == len(plain) and len(e.ids) == len(e.mask) == len(e.logprobs)
    sampled = [lp for lp, m in zip(e.logprobs, e.mask) if m]
    assert e.ids[e.spans[1].start:e.spans[1].end] and all(lp < 0 for lp in sampled)
    before = sum(sampled)                                                          # the hinted sampler's values
    gap = recompute_logprobs(model, [e])
    after = sum(e.logprobs)
    assert gap == pytest.approx((before - after) / sum(e.mask)) and gap != 0
    a.hint_in_update = True
    kept = roll_out(HBG(a, chat, [task], LIMITS), HFEngine(model, chat.stop_ids), [task], [0], seed=(0, 0))[0]
    assert kept.ids[:len(hinted)] == hinted
    assert kept.ids[kept.spans[1].start:] == e.ids[e.spans[1].start:]              # the same sample behind either prompt


# --- ETS ---------------------------------------------------------------------------------------------------------------
def rolled(task_id, rewards, source="policy"):
    return [Episode(task_id, 0, k, source, reward=r) for k, r in enumerate(rewards)]


def test_ets_selection(chat):
    tasks = make_tasks("train", "base", 4)
    a, b, c, d = (t.id for t in tasks)
    make = lambda rule: ETS(options(signal="ets", schedule="synchronous", ets_window=2, ets_rule=rule), chat, tasks, LIMITS)
    for rule, expected in (("all", [[a], [a, c], [c]]), ("any", [[a, b], [a, b, c], [c]])):
        signal = make(rule)
        signal.observe(0, rolled(a, [0, 0]) + rolled(b, [1, 0]))
        assert signal.failed() == expected[0]
        signal.observe(1, rolled(c, [0, 0]) + rolled(d, [1, 1]) + rolled(d, [0], source="truth"))   # only the policy counts
        assert signal.failed() == expected[1]
        signal.observe(2, rolled(d, [1, 1]))                       # step 0 has left the window
        assert signal.failed() == expected[2]
        assert [e.task_id for e in signal.rows()] == expected[2] and signal.rows()[0].source == "truth"
        restored = make(rule)
        restored.load(json.loads(json.dumps(signal.state())))      # what a checkpoint keeps
        assert restored.failed() == signal.failed()
    signal = make("all")                                           # a task that succeeded once in the window is not hopeless
    signal.observe(0, rolled(a, [0, 0]))
    signal.observe(1, rolled(a, [0, 1]))
    assert signal.failed() == []


# --- PRS ---------------------------------------------------------------------------------------------------------------
def failed_episode(chat, task):
    wrong = write_calls([("pay_money", {"to": "eve", "amount": 5})])
    return play(chat, Env(task), [[wrong, "Done."], [CHECK, "Done."]], LIMITS, group_id=0, sample=1)


def test_reflections(chat, task):
    signal = PRS(options(signal="prs", schedule="synchronous", ets_window=2), chat, [task], LIMITS)
    e = failed_episode(chat, task)
    e.source = "policy"
    signal.observe(0, [Episode("t0", 0, 0), e])
    demo, whole, error = signal.rows()
    assert demo.task_id == "t0" and (whole.task_id, error.task_id) == ("whole:t0", "error:t0")
    prompt, answer = whole.spans[0].text, whole.spans[1].text
    # the judge sees the step that failed, the tool's answer, and the ground truth with its arguments of every type
    assert '"arguments": {"to": "eve", "amount": 5}' in prompt and 'paid "eve"' in prompt
    assert '"arguments": {"to": "bob", "amount": 5}' in prompt and '"name": "check_balance"' in prompt
    assert answer == f"turn 1 is not right: the value of to must be bob\nright: {PAY}\nturn 2 is right"
    prompt, answer = error.spans[0].text, error.spans[1].text
    assert "turn 1" in prompt and "turn 2" not in prompt           # turn 1 is the one that failed
    assert answer.startswith(f"cause: the value of to must be bob\nfix: {PAY}\nsimilar:\n")
    assert answer.count("user: ") == 4 and "not similar:" in answer and "What is the amount?" in answer
    # trained through the chat template as prompt -> answer
    for row in (whole, error):
        rendered = chat.tokenizer.apply_chat_template([{"role": "user", "content": row.spans[0].text}], tokenize=False,
                                                      add_generation_prompt=True)
        assert chat.text(row.ids) == rendered + row.spans[1].text + "<|im_end|>"
        assert chat.text([t for t, m in zip(row.ids, row.mask) if m]) == row.spans[1].text + "<|im_end|>"
    restored = PRS(signal.a, chat, [task], LIMITS)
    restored.load(json.loads(json.dumps(signal.state())))
    assert [r.ids for r in restored.rows()] == [r.ids for r in signal.rows()]


@pytest.mark.parametrize("script, phrase", [
    ([[write_calls([("check_balance", {})]), "Done."], [CHECK, "Done."]], "the tool must be pay_money"),
    ([["Done."], [CHECK, "Done."]], "no call where one is right"),
    ([["<tool_call>"], [CHECK, "Done."]], "not a complete call"),
    ([[PAY, PAY, "Done."], [CHECK, "Done."]], "a call too many"),
    ([[write_calls([("pay_money", {"to": "bob", "amount": "5"})]), "Done."], [CHECK, "Done."]], "the value of amount must be 5"),
])
def test_causes(chat, task, script, phrase):
    e = play(chat, Env(task), script, LIMITS)
    assert e.failed_turn == 0 and phrase in supervision.cause(task, e, 0, "A")
    assert supervision.cause(task, e, 1, "A") is None


def test_reflection_sees_the_format_that_the_reward_does_not(chat, task):
    e = play(chat, Env(task), [[PAY, "<tool_call>"], [CHECK, "Done."]], LIMITS)
    assert e.reward == 1                                           # lenient closing: worth as much as a reply
    assert supervision.reflect_whole(task, e, "A").startswith("turn 1 is not right: a message is not a complete call")


def test_a_success_has_no_error_reflection(chat, task):
    signal = PRS(options(signal="prs", schedule="synchronous", ets_window=2), chat, [task], LIMITS)
    e = play(chat, Env(task), demonstration(task), LIMITS, group_id=0, sample=1)
    signal.observe(0, [e])
    assert [r.task_id for r in signal.rows()] == ["whole:t0"]      # "truth" rows do not count as failures either


# --- the judge server --------------------------------------------------------------------------------------------------
@pytest.fixture
def server():
    """A local OpenAI-compatible server that can fail on demand."""
    state = SimpleNamespace(calls=[], fail=0, empty=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.calls.append((self.path, self.headers["Authorization"], body))
            if state.fail:
                state.fail -= 1
                self.send_error(500)
                return
            out = json.dumps({"choices": [{"message": {"content": None if state.empty else "because " + body["messages"][0]["content"][:9]}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *args):
            pass
    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()


def test_judge(server, tmp_path, chat, task, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    monkeypatch.setattr(supervision.time, "sleep", lambda s: None)
    a = options(signal="prs", schedule="synchronous", ets_window=2, judge_url=server.url, judge_model="m",
                judge_cache=tmp_path / "cache", judge_retries=1, judge_workers=2)
    Judge(a).check()
    path, key, body = server.calls[-1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    signal = PRS(a, chat, [task], LIMITS)
    signal.observe(0, [failed_episode(chat, task)])
    server.calls.clear()
    server.fail = 1                                                # one retry heals one failure
    out = [r.spans[1].text for r in signal.rows()]
    assert out == ["because Below is "] * 2 and len(server.calls) == 3
    signal.rows()
    assert len(server.calls) == 3                                  # nothing is paid for twice, also after an interruption
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    server.empty = True                                            # an empty answer is a failure, and is not kept
    assert signal.rows() == [] and not list((tmp_path / "cache").iterdir())
    server.empty = False
    server.fail = 100                                              # down in mid-run: the rows are lost, the run is not
    assert signal.rows() == [] and signal.skipped == 2
    server.fail = 100
    with pytest.raises(UserError, match="does not answer"):
        Judge(a).check()


def test_judge_that_is_down_is_one_sentence(folder, capfd):
    status = train.cli([*RUN, "--signal", "prs", "--schedule", "synchronous", "--steps", "1", "--out", "runs/judge", "--judge_url",
                        "http://127.0.0.1:9/v1", "--judge_timeout", "2"])
    err = capfd.readouterr().err.strip().splitlines()
    assert status == 2 and "--judge_url" in err[-1] and not (folder / "runs/judge").exists()


# --- schedules ---------------------------------------------------------------------------------------------------------
def test_schedules():
    plan = lambda *args: ["+".join(train.what(s, a)) for a in [train.parse_args([*RUN, *args])] for s in range(train.total_steps(a))]
    assert plan("--steps", "3") == ["rl"] * 3
    assert plan("--steps", "2", "--sft_steps", "2", "--signal", "sft", "--schedule", "sft_then_rl") == ["sft", "sft", "rl", "rl"]
    assert plan("--steps", "6", "--signal", "ets", "--schedule", "interleaved", "--ets_window", "1") == [
        "rl", "phase", "rl", "rl", "phase", "rl", "rl", "rl"]
    assert plan("--steps", "2", "--signal", "sft", "--schedule", "synchronous") == ["rl+sft"] * 2
    a = train.parse_args([*RUN, "--steps", "300", "--signal", "ets", "--schedule", "interleaved"])
    assert train.phases(a) == [50, 100, 150]                       # the paper's


@pytest.mark.parametrize("signal, schedule", [(s, schedule) for s, cls in SIGNALS.items() for schedule in cls.schedules])
def test_every_signal_runs_with_every_schedule_it_names(folder, signal, schedule):
    out = f"runs/all-{signal}-{schedule}"
    args = [*RUN, "--signal", signal, "--schedule", schedule, "--steps", "3", "--sft_steps", "2", "--sft_batch", "4", "--phases",
            "1:2", "--ets_window", "1", "--hints", "1", "--out", out]
    assert train.cli(args) == 0
    steps = [r for r in rows(out) if "phase" in r]
    assert len(steps) == train.total_steps(train.parse_args(args)) and all(r["skipped_updates"] == 0 for r in steps)
    for r in steps:
        assert ("sft_loss" in r) == ("sft" in r["phase"] or "phase" == r["phase"]) or r.get("sft_rows") == 0
        assert ("reward" in r) == ("rl" in r["phase"])
    if signal == "hbg":
        assert all("hint_log_ratio" in r for r in steps)


@pytest.mark.parametrize("flags", [["--retokenize"], ["--split_groups"], ["--only", "positive"], ["--only", "negative"],
                                   ["--mask_control"], ["--hint_in_update", "--signal", "hbg", "--hints", "1"],
                                   ["--signal", "ops", "--ops_ratio", "shaped"], ["--closing", "strict"]])
def test_ablations_run(folder, flags):
    out = "runs/ablation" + "-".join(flags).replace("--", "-")
    assert train.cli([*RUN, "--steps", "2", "--out", out, *flags]) == 0
    assert all(r["skipped_updates"] == 0 for r in rows(out) if "phase" in r)


def test_interleaved_resumes_to_the_same_numbers(folder, monkeypatch):
    """Signal state, re-anchored reference and phase position survive an interruption."""
    args = [*RUN, "--signal", "prs", "--schedule", "interleaved", "--phases", "1:1", "--steps", "4", "--ets_window", "2",
            "--save_every", "1", "--kl_weight", "0.01", "--reanchor_kl", "--fresh_optimizer", "--rewarm", "--sft_batch", "8"]
    assert train.cli([*args, "--out", "runs/i-whole"]) == 0
    real = train.append_line
    for stop in (2, 4):                                            # interrupted in the SFT phase and in the second RL phase

        def stumble(path, row, rank):
            if row["step"] == stop and "phase" in row:
                raise KeyboardInterrupt
            real(path, row, rank)
        monkeypatch.setattr(train, "append_line", stumble)
        assert train.cli([*args, "--out", "runs/i-cut", *(["--resume"] if stop == 4 else [])]) == 130
    monkeypatch.setattr(train, "append_line", real)
    assert train.cli([*args, "--out", "runs/i-cut", "--resume"]) == 0
    assert rows("runs/i-cut") == rows("runs/i-whole")


# --- ablations, by literal tokens --------------------------------------------------------------------------------------
def test_retokenize_trains_an_end_token_that_nobody_sampled(chat, task):
    env = Env(task)
    e = begin(chat, env)
    said = chat.message("Done.")[:-1] + [chat.tokenizer.convert_tokens_to_ids("<|im_start|>")]
    e.append(said, "model", 0, [-1.0] * len(said), "Done.<|im_start|>", "cut")
    new = retokenized(chat, e)
    assert new.ids[new.spans[1].start:] == chat.message("Done.")   # the stray <|im_start|> is gone, an end token is there
    assert new.mask[new.spans[1].start:] == [1] * len(chat.message("Done.")) and e.ids[-len(said):] == said


def test_mask_control_and_only(model, chat):
    """mask_control: no push on control tokens where A < 0; where A > 0 nothing changes."""
    e = Episode("t", 0)
    e.append([7, 8], "prompt", 0)
    e.append([3, 50, 2], "model", 0, [-1.0, -1.0, -1.0])           # <tool_call>, a word, <|im_end|>
    f = Episode("t", 0)
    f.append([7, 8], "prompt", 0)
    f.append([3, 50, 2], "model", 0, [-1.0, -1.0, -1.0])
    recompute_logprobs(model, [e, f])
    f.mask, n = [0, 0, 0, 1, 0], 3                                 # only the word is trained
    _, masked = gradients(model, lambda m: rl_backward(m, [e], [-1.0], masked_ids=[2, 3]))
    _, word = gradients(model, lambda m: rl_backward(m, [f], [-1.0]))
    assert close(masked, [g / n for g in word])
    _, positive = gradients(model, lambda m: rl_backward(m, [e], [1.0], masked_ids=[2, 3]))
    _, plain = gradients(model, lambda m: rl_backward(m, [e], [1.0]))
    assert close(positive, plain)


@pytest.mark.parametrize("args, words", [
    (["--signal", "ops", "--schedule", "interleaved"], "--signal ops does not go with --schedule interleaved"),
    (["--signal", "ets"], "it goes with --schedule interleaved, --schedule synchronous"),
    (["--signal", "ops", "--ops_k", "4"], "--ops_k 4 leaves no rollout of the policy in a --group of 4"),
    (["--signal", "hbg", "--hints", "5"], "--hints 5 leaves no rollout"),
    (["--signal", "ets", "--schedule", "interleaved", "--steps", "30"], "--ets_window 10 is longer than the shortest RL phase"),
    (["--signal", "ets", "--schedule", "interleaved", "--steps", "1"], "a phase without a step"),
    (["--phases", "1:x"], "--phases 1:x"),
    (["--sft_weight", "-1"], "--sft_weight -1.0 must be at least 0"),
    (["--reanchor_kl"], "--reanchor_kl needs a --kl_weight above 0"),
])
def test_senseless_flags(capsys, args, words):
    with pytest.raises(SystemExit) as error:
        train.parse_args([*RUN, *args])
    assert error.value.code == 2 and words in capsys.readouterr().err


# --- forking -----------------------------------------------------------------------------------------------------------
class BestOf(Signal):
    """The example of README: cross-entropy on the model's own successes."""
    schedules = ("synchronous",)

    def __init__(self, *args):
        super().__init__(*args)
        self.best = []

    def observe(self, step, episodes):
        self.best = (self.best + [e for e in episodes if e.reward == 1 or e.sample == 0])[-64:]   # (a random model has none)

    def rows(self):
        return self.best


def test_a_signal_without_rows_is_one_sentence(folder, monkeypatch, capfd):
    class Nothing(Signal):
        schedules = ("sft",)
    monkeypatch.setitem(supervision.SIGNALS, "nothing", Nothing)
    assert train.cli([*RUN, "--signal", "nothing", "--schedule", "sft", "--out", "runs/nothing-to-train"]) == 2
    assert "--signal nothing has no rows at step 0" in capfd.readouterr().err


def test_a_signal_and_a_loss_from_outside(folder, monkeypatch):
    monkeypatch.setitem(supervision.SIGNALS, "best_of", BestOf)
    monkeypatch.setitem(rl_step.LOSSES, "reinforce", lambda logp, ratio, adv, low, high, c: -adv * logp)
    assert train.cli([*RUN, "--signal", "best_of", "--schedule", "synchronous", "--loss", "reinforce", "--steps", "2", "--out",
                      "runs/outside"]) == 0
    steps = [r for r in rows("runs/outside") if "phase" in r]
    assert all(r["sft_tokens"] > 0 for r in steps)


def test_the_example_of_readme_runs(folder):
    """The code block of "Add your own signal", copied out of README and started as README says."""
    code = (ROOT / "README.md").read_text().split("```python\n# my_signal.py\n")[1].split("```")[0]
    assert code.count("\n") <= 30
    (folder / "my_signal.py").write_text(code)
    done = subprocess.run([sys.executable, "my_signal.py", "--signal", "best_of", "--schedule", "synchronous", *RUN, "--steps", "1",
                           "--out", "runs/readme"], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "rl+sft" in done.stdout, done.stderr


def test_without_hint_keeps_everything_else(chat, task):
    env = Env(task)
    e = begin(chat, env, 3, 1, "hinted", "Notes")
    e.append([9, 2], "model", 0, [-0.1, -0.2], "x", "reply")
    e.reward, e.status = 1.0, "finished"
    new = without_hint(chat, e, env)
    assert (new.group_id, new.sample, new.source, new.reward, new.status) == (3, 1, "hinted", 1.0, "finished")
    assert new.ids[-2:] == [9, 2] and new.logprobs[-2:] == [-0.1, -0.2] and len(new.ids) < len(e.ids)


def test_rollout_is_reachable_without_a_signal(model, chat, task):
    e, = rollout(HFEngine(model, chat.stop_ids), chat, [env := Env(task)], LIMITS, [begin(chat, env)])
    assert e.status in ("finished", "message_limit", "step_limit", "length_limit")
