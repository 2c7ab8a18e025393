"""What each signal puts into the loss, by literal episodes: which rows, masks, ids and tasks."""
import json
import os
import random
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, RUN, rows
from make_base import noisy_script
from test_losses import close, gradients, reference_logprobs, tokens

import rl_step
import supervision
import train
from rl_step import LOSSES, advantages, rl_backward, set_old_logprobs
from rollout import (CONTROL, Episode, HFEngine, Limits, begin, demonstrate, play, rollout, truth_script,
                     write_calls)
from supervision import (ASK_WHOLE, EMBEDDED_JUDGE, ETS, HBG, OPS, PRS, SFT, SIGNALS, Judge, Signal, cause,
                         dialogue_row, log_of, reflection_prompts, sample_groups)
from tools import CATEGORIES, DOCS, Env, Task, Turn, UserError, make_tasks

LIMITS = Limits(16, 24, 1024, 256)
CHECK = write_calls([("check_balance", {})])
PAY = write_calls([("pay_money", {"to": "bob", "amount": 5})])
PAY_EVE = write_calls([("pay_money", {"to": "eve", "amount": 5})])
PAY_TEXT = write_calls([("pay_money", {"to": "bob", "amount": "5"})])            # a number as a text


def options(**kw):
    flags = []
    for name, value in kw.items():
        flags += [f"--{name}", str(value)]
    return train.parse_args([*RUN, *flags])


@pytest.fixture
def task():
    turns = [Turn('pay money to "bob", 5 coins', [("pay_money", {"to": "bob", "amount": 5})], "Done."),
             Turn("check the balance", [("check_balance", {})], "Done.")]
    return Task("t0", "base", dict(DOCS["bank"]), ["bank"], "seed", turns)


def model_text(chat, e):
    return [chat.text(e.ids[s.start:s.end]) for s in e.spans if s.who == "model"]


# --- demonstrations -----------------------------------------------------------------------------------------
TRUTH = [PAY + "<|im_end|>", "Done.<|im_end|>", CHECK + "<|im_end|>", "Done.<|im_end|>"]


def test_demonstration_rows(chat, task):
    e = demonstrate(chat, task, "A", LIMITS)
    assert (e.source, e.reward, e.status, e.as_sampled) == ("truth", 1, "finished", False)
    assert model_text(chat, e) == TRUTH
    trained = chat.text([t for t, m in zip(e.ids, e.mask) if m])
    assert trained == "".join(TRUTH)             # only what the assistant says, with its end tokens
    assert [s.text for s in e.spans if s.who == "tool"][0] == '<tool_response>\npaid "bob"\n</tool_response>'


def test_sft_rows_are_all_tasks(chat):
    tasks = make_tasks("train", "base", 5)
    demonstrations = SFT(options(signal="sft", schedule="sft"), chat, tasks, LIMITS).rows()
    assert [e.task_id for e in demonstrations] == [t.id for t in tasks]
    assert all(e.weight == 1 for e in demonstrations)


def test_a_row_of_dialogue(chat):
    """Two assistant messages behind a system message: both are trained, nothing else."""
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "read"},
            {"role": "assistant", "content": CHECK}, {"role": "user", "content": "a<|im_end|>b"},
            {"role": "assistant", "content": "Done."}]
    row = dialogue_row(chat, "file:1", talk)
    rendered = chat.tokenizer.apply_chat_template(talk, tokenize=False)
    assert chat.text(row.ids) + "\n" == rendered and (row.source, row.as_sampled) == ("truth", False)
    assert [s.who for s in row.spans] == ["prompt", "model", "user", "model"]
    assert model_text(chat, row) == [CHECK + "<|im_end|>", "Done.<|im_end|>"]
    assert row.mask == [int(s.who == "model") for s in row.spans for _ in range(s.start, s.end)]
    inside = row.ids[row.spans[2].start:row.spans[2].end]
    assert inside.count(chat.end_id) == 1        # the template's; what the user says closes nothing


def test_dialogues_of_a_file(chat, tmp_path):
    path, limits = tmp_path / "talk.jsonl", Limits(16, 24, 60, 256)
    talk = [{"role": "user", "content": "read"}, {"role": "assistant", "content": "Done."}]
    long = [{"role": "user", "content": "read " * 60}, *talk[1:]]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (talk, long, talk)))
    args = options(signal="sft", schedule="sft", sft_file=path)
    signal = SFT(args, chat, make_tasks("train", "base", 5), limits)
    assert [row.task_id for row in signal.rows()] == [f"{path}:1", f"{path}:3"]
    assert signal.note == f"{path}: 2 dialogues; left out: 1 longer than --max_total_tokens 60"
    for text, words in (("", "has no usable row"), ('{"messages": []}', r"cannot be read \(line 1"),
                        (json.dumps({"messages": talk}) + "\nx", r"cannot be read \(line 2"),
                        (json.dumps({"messages": [talk[0], talk[1] | {"content": 5}]}), "must be a text")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            SFT(args, chat, [], limits)
    args.sft_file = tmp_path / "none"
    with pytest.raises(UserError, match="cannot be read"):
        SFT(args, chat, [], limits)


# --- OPS ----------------------------------------------------------------------------------------------------
def test_ops_group(model, chat, task):
    signal = OPS(options(signal="ops", ops_k=2), chat, [task], LIMITS)
    group = sample_groups(signal, HFEngine(model, chat.stop_ids), [task], [0], seed=(0, 0))
    assert [e.source for e in group] == ["truth", "truth", "policy", "policy"]
    assert [e.sample for e in group] == [0, 1, 2, 3]
    assert [e.as_sampled for e in group] == [False, False, True, True]
    assert [e.reward for e in group] == [1, 1, 0, 0]                 # the random model fails
    assert model_text(chat, group[0]) == TRUTH
    # it takes part in the group's advantage like any other rollout
    a = advantages([e.reward for e in group], [0] * 4)
    assert a == pytest.approx([0.866, 0.866, -0.866, -0.866], abs=1e-3)
    # ratio "one": p_old is the trainer's own, so the first update is advantage-weighted likelihood
    assert group[0].logprobs == [0.0] * len(group[0].ids) and signal.before_update(group) is group
    set_old_logprobs(model, group, 0.0, 16_384)
    truth, n = group[:2], sum(sum(e.mask) for e in group[:2])
    metrics, ours = gradients(model, lambda m: rl_backward(m, truth, [1.0, 1.0], signal_ratio=signal.ratio))
    assert metrics["clip_frac"] == 0 and metrics["gap"] == 0         # nobody sampled them: there is no gap
    _, likelihood = gradients(model, lambda m: (-reference_logprobs(m, truth)[0].sum() / n).backward())
    assert close(ours, likelihood)


def test_ops_shaped_ratio(chat):
    """p / (p + 0.1) on ground-truth tokens only. A > 0: never clipped. A < 0: no gradient while it is below
    .8 (p < .4)."""
    signal = OPS(options(signal="ops", ops_ratio="shaped"), chat, [], LIMITS)
    logp = torch.tensor([0.05, 0.3, 0.9, 0.9]).log().requires_grad_()
    old = torch.tensor([0.9, 0.9, 0.9, 0.45]).log()

    def run(sign):
        logp.grad = None
        t = tokens(logp, old, torch.full((4,), sign), torch.tensor([0, 0, 0, 1]))
        t.rows = [Episode("t", 0, 0, "truth"), Episode("t", 0, 1, "policy")]
        t.ratio = signal.ratio(t)
        loss = LOSSES["grpo"](t, 0.2, 0.2)
        loss.sum().backward()
        return loss.tolist(), logp.grad.tolist()
    f = [p / (p + 0.1) for p in (0.05, 0.3, 0.9)]
    slope = [0.1 * p / (p + 0.1) ** 2 for p in (0.05, 0.3, 0.9)]     # d f / d log p
    loss, grad = run(1.0)
    assert loss == pytest.approx([-f[0], -f[1], -f[2], -1.2])
    assert grad == pytest.approx([-slope[0], -slope[1], -slope[2], 0.0])
    loss, grad = run(-1.0)
    assert loss == pytest.approx([0.8, 0.8, f[2], 2.0]) and grad == pytest.approx([0, 0, slope[2], 2.0])


def test_the_shaped_ratio_enters_the_update(model, chat, task):
    """rl_backward with it = the sum written out: -A p / (p + 0.1) over the ground truth's tokens."""
    signal = OPS(options(signal="ops", ops_ratio="shaped"), chat, [task], LIMITS)
    e = demonstrate(chat, task, "A", LIMITS)
    set_old_logprobs(model, [e], 0.0, 16_384)

    def plain(m):
        p = reference_logprobs(m, [e])[0].exp()
        (-(p / (p + 0.1)).sum() / sum(e.mask)).backward()
    _, expected = gradients(model, plain)
    _, ours = gradients(model, lambda m: rl_backward(m, [e], [1.0], signal_ratio=signal.ratio))
    assert close(ours, expected)
    _, without = gradients(model, lambda m: rl_backward(m, [e], [1.0]))
    assert not close(without, expected, 1e-2)


# --- HBG ----------------------------------------------------------------------------------------------------
def test_hint_text(task):
    assert HBG.hint_text(task, "A") == f"Notes that may help:\nturn 1: {PAY}\nturn 2: {CHECK}"
    brackets = "turn 1: [pay_money(to='bob', amount=5)]\nturn 2: [check_balance()]"
    assert HBG.hint_text(task, "B") == f"Notes that may help:\n{brackets}"
    task.turns[0].calls = []
    assert HBG.hint_text(task, "A") == f"Notes that may help:\nturn 1: no call is right\nturn 2: {CHECK}"


def test_hint_is_sampled_with_and_trained_without(model, chat, task):
    signal = HBG(options(signal="hbg", hints=1), chat, [task], LIMITS)
    hint, engine, seen = HBG.hint_text(task, "A"), HFEngine(model, chat.stop_ids), []
    add = engine.add

    def watched(request):
        seen.append(list(request.ids))
        add(request)
    engine.add = watched
    group = sample_groups(signal, engine, [task], [0], seed=(0, 0))
    plain = chat.prompt(task.opening("A"))
    hinted, other = seen[:2]                     # the first messages of the group
    assert other == plain and hint in chat.text(hinted) and hint not in chat.text(plain)
    assert [e.source for e in group] == ["hinted"] + ["policy"] * 3 and all(e.as_sampled for e in group)
    before = group[0]
    assert before.ids[:len(hinted)] == hinted                        # sampled behind the hint ...
    trained = signal.before_update(group)
    e = trained[0]
    assert all(x is y for x, y in zip(trained[1:], group[1:]))
    assert e.ids[:len(plain)] == plain and e.spans[0].end == len(plain)          # ... trained without it
    assert e.ids[len(plain):] == before.ids[len(hinted):] and e.mask[len(plain):] == before.mask[len(hinted):]
    assert e.logprobs[len(plain):] == before.logprobs[len(hinted):] and not e.as_sampled
    assert e.mask[:len(plain)] == [0] * len(plain) and len(e.ids) == len(e.mask) == len(e.logprobs)
    # p_old becomes the trainer's own p(token); .logprobs stay log p(token | hint); the metric compares them
    set_old_logprobs(model, trained, 0.0, 16_384)
    own = reference_logprobs(model, [e])[0].sum().item()
    assert sum(e.logprobs_old) == pytest.approx(own, rel=1e-4)
    assert e.logprobs[len(plain):] == before.logprobs[len(hinted):]
    log_ratio = (sum(before.logprobs) - own) / sum(e.mask)
    assert signal.metrics(trained) == {"hint_log_ratio": pytest.approx(log_ratio, abs=1e-4)}
    ours = [abs(a - b) for a, b, m in zip(e.logprobs, e.logprobs_old, e.mask) if m]
    assert max(ours) > 1e-3                      # the hint is heard
    # ablations: the hint stays; the authors' code knows no log p(token | hint)
    signal.args.as_released = True
    assert signal.metrics(trained) == {}
    signal.args.as_released, signal.args.hint_in_update = False, True
    assert signal.before_update(group) is group and signal.metrics(group) == {}


def test_without_hint_keeps_everything_else(chat, task):
    signal = HBG(options(signal="hbg", hints=1), chat, [task], LIMITS)
    e = begin(chat, Env(task), 3, 1, "hinted", "Notes")
    e.append([9, 2], "model", 0, [-0.1, -0.2], "x", "reply")
    e.reward, e.status = 1.0, "finished"
    new, = signal.before_update([e])
    assert (new.group_id, new.sample, new.source, new.reward, new.status) == (3, 1, "hinted", 1.0, "finished")
    assert new.ids[-2:] == [9, 2] and new.logprobs[-2:] == [-0.1, -0.2] and len(new.ids) < len(e.ids)
    assert new.states == ["reply"] and not new.as_sampled


# --- ETS ----------------------------------------------------------------------------------------------------
def rolled(task_id, rewards, source="policy"):
    return [Episode(task_id, 0, k, source, reward=r) for k, r in enumerate(rewards)]


def test_ets_selection(chat):
    tasks = make_tasks("train", "base", 4)
    a, b, c, d = (t.id for t in tasks)

    def make(rule):
        args = options(signal="ets", schedule="synchronous", ets_window=2, ets_rule=rule)
        return ETS(args, chat, tasks, LIMITS)
    for rule, expected in (("all", [[a], [a, c], [c]]), ("any", [[a, b], [a, b, c], [c]])):
        signal = make(rule)
        signal.observe(0, rolled(a, [0, 0]) + rolled(b, [1, 0]))
        assert signal.failed() == expected[0]
        others = rolled(d, [0], source="truth") + rolled(d, [0], source="hinted")            # only the policy
        signal.observe(1, rolled(c, [0, 0]) + rolled(d, [1, 1]) + others)                    # counts
        assert signal.failed() == expected[1]
        signal.observe(2, rolled(d, [1, 1]))                       # step 0 has left the window
        assert signal.failed() == expected[2]
        assert [e.task_id for e in signal.rows()] == expected[2] and signal.rows()[0].source == "truth"
        assert signal.outcomes[0] == {"step": 1, "task_id": c, "reward": 0} and len(signal.outcomes) == 6
        restored = make(rule)
        restored.load(json.loads(json.dumps(signal.state())))      # what a checkpoint keeps
        assert restored.failed() == signal.failed() and restored.outcomes == signal.outcomes
    signal = make("all")                         # a task that succeeded once in the window is not hopeless
    signal.observe(0, rolled(a, [0, 0]))
    signal.observe(1, rolled(a, [0, 1]))
    assert signal.failed() == []


# --- PRS ----------------------------------------------------------------------------------------------------
def failed_episode(chat, task):
    return play(chat, Env(task), [[PAY_EVE, "Done."], [CHECK, "Done."]], LIMITS, group_id=0, sample=1)


def test_reflections(chat, task):
    signal = PRS(options(signal="prs", schedule="synchronous", ets_window=2), chat, [task], LIMITS)
    e = failed_episode(chat, task)
    e.source = "policy"
    signal.observe(0, [Episode("t0", 0, 0), e])
    demo, whole, error = signal.rows()
    assert demo.task_id == "t0" and (whole.task_id, error.task_id) == ("whole:t0", "error:t0")
    prompt, answer = whole.spans[0].text, whole.spans[1].text
    # the judge sees the step that failed, the tool's answer, and the ground truth with all its arguments
    assert '"arguments": {"to": "eve", "amount": 5}' in prompt and 'paid "eve"' in prompt
    assert '"arguments": {"to": "bob", "amount": 5}' in prompt and '"name": "check_balance"' in prompt
    assert answer == f"turn 1 is not right: the value of to must be bob\nright: {PAY}\nturn 2 is right"
    prompt, answer = error.spans[0].text, error.spans[1].text
    assert "turn 1" in prompt and "turn 2" not in prompt             # turn 1 is the one that failed
    assert answer.startswith(f"cause: the value of to must be bob\nfix: {PAY}\nsimilar:\n")
    assert answer.count("user: ") == 4 and "not similar:" in answer and "What is the amount?" in answer
    # trained through the chat template as prompt -> answer
    for row in (whole, error):
        rendered = chat._render([{"role": "user", "content": row.spans[0].text}])
        assert chat.text(row.ids) == rendered + row.spans[1].text + "<|im_end|>"
        assert chat.text([t for t, m in zip(row.ids, row.mask) if m]) == row.spans[1].text + "<|im_end|>"
    restored = PRS(signal.args, chat, [task], LIMITS)
    restored.load(json.loads(json.dumps(signal.state())))
    assert restored.reflections == signal.reflections and restored.outcomes == signal.outcomes
    assert [row.ids for row in restored.rows()] == [row.ids for row in signal.rows()]
    signal.limits = Limits(16, 24, max(len(whole.ids), len(error.ids)) - 1, 256)
    assert len(signal.rows()) == 2 and signal.left_out == 1          # too long: left out, and counted
    signal.observe(2, [])                                            # step 0 has left the window
    assert signal.reflections == [] and signal.rows() == []


def test_reflections_hold_no_control_token_but_call_tags(chat, task):
    """The model said <|im_start|>, the tool's answer stands between its tags, the judge quotes an <|im_end|>:
    in the row they are text, and only the template's own are tokens. Ids: <|im_start|> 1, <|im_end|> 2,
    <tool_call> 3, </tool_call> 4, <tool_response> 5, </tool_response> 6."""
    signal = PRS(options(signal="prs", schedule="synchronous", ets_window=2), chat, [task], LIMITS)
    script = [[PAY_EVE, "Done.<|im_start|>"], [CHECK, "Done."]]
    e = play(chat, Env(task), script, LIMITS, group_id=0, sample=1)
    signal.observe(0, [e])
    signal.limits = Limits(16, 24, 4096, 256)
    asked = signal.reflections[0]
    for token in ("<|im_start|>", "<tool_response>"):
        assert token in asked["prompt"]
    asked["answer"] = f"<|endoftext|> says <|im_end|>, not <tool_response>\nright: {PAY}"
    whole = signal.rows()[0]
    control = [[i for i in whole.ids[span.start:span.end] if i < 7] for span in whole.spans]
    calls = whole.spans[0].text.count("<tool_call>")
    assert control == [[1] + [3, 4] * calls + [2, 1], [3, 4, 2]] and calls == 4
    assert chat.text(whole.ids[whole.spans[1].start:]) == asked["answer"] + "<|im_end|>"


@pytest.mark.parametrize("first, phrase", [
    ([CHECK, "Done."], "the tool must be pay_money"),
    (["Done."], "no call where one is right"),
    (["<tool_call>"], "a message is not a complete call and not a clean reply"),
    ([PAY, PAY, "Done."], "a call too many"),
    ([PAY_EVE, "Done."], "the value of to must be bob"),
    ([PAY_TEXT, "Done."], "the value of amount must be 5"),
])
def test_causes(chat, task, first, phrase):
    e = play(chat, Env(task), [first, [CHECK, "Done."]], LIMITS)
    assert e.failed_turn == 0 and cause(task, e, 0, "A") == phrase
    assert cause(task, e, 1, "A") is None


def test_causes_of_turns_without_calls_and_never_reached(chat, task):
    task.turns[0].calls = []                                         # no call is right here
    e = play(chat, Env(task, closing="strict"), [[PAY, "Done."], [CHECK, "Done."]], LIMITS)
    assert cause(task, e, 0, "A") == "a call where no call is right"
    e = play(chat, Env(task), [[PAY], []], Limits(1, 64, 1024, 256))
    assert cause(task, e, 1, "A") == "the turn was never reached"
    task.turns[0].calls = [("pay_money", {"to": "bob", "amount": 5}), ("check_balance", {})]
    e = play(chat, Env(task), [[PAY, "Done."], [CHECK, "Done."]], LIMITS)
    assert cause(task, e, 0, "A") == "a call is missing"


def test_reflection_sees_the_format_that_the_reward_does_not(chat, task):
    e = play(chat, Env(task), [[PAY, "<tool_call>"], [CHECK, "Done."]], LIMITS)
    assert e.reward == 1                         # lenient closing: worth as much as a reply
    said = EMBEDDED_JUDGE["whole"](task, e, "A")
    assert said.startswith("turn 1 is not right: a message is not a complete call and not a clean reply\n")


def test_a_success_has_no_error_reflection(chat, task):
    signal = PRS(options(signal="prs", schedule="synchronous", ets_window=2), chat, [task], LIMITS)
    e = play(chat, Env(task), truth_script(task), LIMITS, group_id=0, sample=1)
    signal.observe(0, [e])
    whole, = signal.rows()                       # "truth" rows do not count as failures either
    assert whole.task_id == "whole:t0" and whole.spans[1].text == "turn 1 is right\nturn 2 is right"
    prompt = f"{ASK_WHOLE}\n\n{log_of(task, e, 'A')}"
    assert signal.reflections == [{"step": 0, "kind": "whole", "task_id": "t0", "prompt": prompt,
                                   "answer": "turn 1 is right\nturn 2 is right"}]


# make_base.WORDING lists the fixed words of hints and reflections. One that is missing there falls apart into
# letters, and the embedded model would have to learn its spelling before anything else.
def words(chat, text):
    """"fix: Done." -> {"fix", ":", " Done", "."}: as the tokenizer cuts text before it looks for tokens"""
    split, found = chat.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str, set()
    for part in re.split("|".join(map(re.escape, CONTROL)), text):
        found |= {part[start:end] for _, (start, end) in split(part)}
    return found


def is_token(chat, text):
    return len(chat._encode(text)) == 1


def some_tasks(n):
    tasks = []
    for category in CATEGORIES:
        tasks += make_tasks("test", category, n) + make_tasks("test", category, n, held_out=True)
    return tasks


def test_every_word_of_a_hint_is_one_token(chat):
    found = set()
    for task in some_tasks(50):
        found |= words(chat, HBG.hint_text(task, "A")) | words(chat, HBG.hint_text(task, "B"))
    assert len(found) > 120 and {"Notes", " help", " call", "pay", "_money"} <= found
    assert [word for word in found if not is_token(chat, word)] == []


def failing_scripts(task, syntax, rng):
    """Scripts for `play`, each with another kind of mistake"""
    truth = truth_script(task, syntax)
    call = next(messages[0] for messages in truth if len(messages) > 1)
    yield noisy_script(task, syntax, rng, wrong=0.5, malformed=0)
    yield noisy_script(task, syntax, rng, wrong=0.2, malformed=0.5)
    yield [messages[-1:] for messages in truth]                      # only the replies
    yield [[messages[0], messages[-1]] for messages in truth]        # only the first call of each turn
    yield [[call, *messages] for messages in truth]                  # one call too many in every turn
    yield [[call, *messages] if len(messages) == 1 else messages for messages in truth]      # where none is


def test_every_word_of_a_reflection_has_a_token(chat):
    """The judge's prompts without what model and tools said, and the embedded judge's answers. A word counts
    as known with or without the space before it: a value may stand behind a space (two tokens), and a line
    may begin with a word that is one token only behind a space."""
    rng, limits, found, texts = random.Random(0), Limits(16, 512, 4096, 256), set(), ["assistant: result:"]
    for task in some_tasks(8):
        for syntax, closing in (("A", "lenient"), ("A", "strict"), ("B", "strict")):
            for script in failing_scripts(task, syntax, rng):
                e = play(chat, task.env(syntax, closing), script, limits)
                for kind, prompt in reflection_prompts(task, replace(e, spans=[]), syntax):
                    texts += [prompt, EMBEDDED_JUDGE[kind](task, e, syntax)]
    for text in set(texts):
        found |= words(chat, text)
    for why in ("the turn was never reached", "a message is not a complete call and not a clean reply",
                "a call where no call is right", "no call where one is right", "the tool must be ",
                "the value of amount must be ", "a call is missing", "a call too many",
                "the state is not right"):
        assert any(f": {why}" in text for text in texts), why
    assert len(found) > 200 and {"turn", " never", " cause", "similar", "Read"} <= found
    forms = lambda word: (word, word.strip(), f" {word.strip()}")
    assert [word for word in found if not any(is_token(chat, form) for form in forms(word))] == []


# --- the judge server ---------------------------------------------------------------------------------------
@pytest.fixture
def server(openai):
    """A local OpenAI-compatible server that can fail on demand."""
    state = SimpleNamespace(calls=[], fail=0, body=None)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.calls.append((self.path, self.headers["Authorization"], body))
            answer = {"choices": [{"message": {"content": "because " + body["messages"][0]["content"][:9]}}]}
            out = json.dumps(answer).encode() if state.body is None else state.body
            self.send_response(500 if state.fail else 200)
            state.fail -= bool(state.fail)
            self.send_header("Content-Type", "application/json" if out.startswith(b"{") else "text/html")
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
    http.server_close()


def test_judge(server, tmp_path, chat, task, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    for name, value in (("cache", tmp_path / "cache"), ("retries", 1), ("workers", 2), ("timeout", 10.0)):
        monkeypatch.setattr(Judge, name, value)
    args = options(signal="prs", schedule="synchronous", ets_window=2, judge_url=server.url, judge_model="m")
    Judge(server.url, "m").check()
    path, key, body = server.calls[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {"model": "m", "messages": [{"role": "user", "content": "Say yes."}]}     # nothing more
    signal = PRS(args, chat, [task], LIMITS)
    signal.observe(0, [failed_episode(chat, task)])
    assert [(r["kind"], r["answer"]) for r in signal.reflections] == [("whole", None), ("error", None)]
    server.calls.clear()
    server.fail = 1                              # one more attempt heals one failure
    out = [row.spans[1].text for row in signal.rows()]
    assert out == ["because Below is "] * 2 and len(server.calls) == 3 and signal.left_out == 0
    signal.rows()
    assert len(server.calls) == 3                # nothing is paid for twice, also after an interruption
    restored = PRS(args, chat, [task], LIMITS)
    restored.load(json.loads(json.dumps(signal.state())))
    assert [row.spans[1].text for row in restored.rows()] == out and len(server.calls) == 3
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    empty = b'{"choices": [{"message": {"content": null}}]}'
    for server.body in (empty, b'{"choices": [{"message": {"content": ""}}]}', b'{"choices": []}',
                        b'{"error": "busy"}', b"<html>busy</html>"):
        assert signal.rows() == [] and signal.left_out == 2          # such an answer is a failure,
        assert not list((tmp_path / "cache").iterdir())              # and is not kept
    server.body = None
    server.fail = 100                            # down in mid-run: the rows are lost, the run is not
    assert signal.rows() == [] and signal.left_out == 2
    with pytest.raises(UserError, match=f"the judge 'm' at {server.url} does not answer .*JUDGE_API_KEY"):
        Judge(server.url, "m").check()
    server.fail = 0
    assert [row.spans[1].text for row in signal.rows()] == out       # it is back, and so are the reflections


def test_judge_that_is_down_is_one_sentence(folder, openai, capfd):
    status = train.cli([*RUN, "--signal", "prs", "--schedule", "synchronous", "--steps", "1", "--judge_url",
                        "http://127.0.0.1:9/v1", "--out", "runs/judge"])
    err = capfd.readouterr().err.strip().splitlines()
    assert status == 2 and "--judge_url" in err[-1] and not (folder / "runs/judge").exists()


# --- schedules ----------------------------------------------------------------------------------------------
def test_phases_are_the_papers():
    args = train.parse_args([*RUN, "--steps", "300", "--signal", "ets", "--schedule", "interleaved"])
    assert train.phases(args) == [50, 100, 150]


PAIRS = [(name, schedule) for name, signal in SIGNALS.items() for schedule in signal.schedules]


@pytest.mark.parametrize("signal, schedule", PAIRS)
def test_every_signal_runs_with_every_schedule_it_names(folder, signal, schedule):
    out = f"runs/all-{signal}-{schedule}"
    args = [*RUN, "--signal", signal, "--schedule", schedule, "--steps", "3", "--phases", "1:2",
            "--sft_batch", "22", "--ets_window", "1", "--hints", "1", "--out", out]
    assert train.cli(args) == 0
    steps = [r for r in rows(out) if "phase" in r]
    assert [r["phase"] for r in steps] == train.plan(train.parse_args(args))
    assert all(r["skipped_updates"] == 0 for r in steps)
    for r in steps:
        assert ("sft_loss" in r) == ("sft" in r["phase"]) or r.get("sft_rows") == 0
        assert ("reward" in r) == ("rl" in r["phase"])
        assert r.get("sft_rows_left_out", 0) == 0
    assert all(("hint_log_ratio" in r) == (signal == "hbg") for r in steps)


@pytest.mark.parametrize("flags", [
    ["--as_released"], ["--as_released", "--signal", "hbg", "--hints", "1"], ["--only", "positive"],
    ["--only", "negative"], ["--mask_control"], ["--hint_in_update", "--signal", "hbg", "--hints", "1"],
    ["--signal", "ops", "--ops_ratio", "shaped"], ["--closing", "strict"], ["--correction", "2"],
    ["--correction", "2", "--signal", "ops"], ["--loss", "dapo", "--clip_high", "0.28"],
    ["--kl", "k2", "--kl_weight", "0.01"]])
def test_ablations_run(folder, flags):
    out = "runs/ablation" + "-".join(flags).replace("--", "-")
    assert train.cli([*RUN, "--steps", "2", "--out", out, *flags]) == 0
    steps = [r for r in rows(out) if "phase" in r]
    assert len(steps) == 2 and all(r["skipped_updates"] == 0 for r in steps)
    assert all("hint_log_ratio" not in r for r in steps)


def test_interleaved_resumes_to_the_same_numbers(folder, monkeypatch):
    """Signal state, re-anchored reference and phase position survive an interruption."""
    args = [*RUN, "--signal", "prs", "--schedule", "interleaved", "--phases", "1:1", "--steps", "4",
            "--ets_window", "2", "--save_every", "1", "--kl_weight", "0.01", "--as_released", "--sft_batch",
            "8"]
    assert train.cli([*args, "--out", "runs/i-whole"]) == 0
    real = train.log_line
    for stop in (2, 4):                          # interrupted in the SFT phase and in the second RL phase

        def stumble(path, record, wandb=None):
            if record["step"] == stop and "phase" in record:
                raise KeyboardInterrupt
            real(path, record)
        monkeypatch.setattr(train, "log_line", stumble)
        assert train.cli([*args, "--out", "runs/i-cut", *(["--resume"] if stop == 4 else [])]) == 130
    monkeypatch.setattr(train, "log_line", real)
    assert train.cli([*args, "--out", "runs/i-cut", "--resume"]) == 0
    assert rows("runs/i-cut") == rows("runs/i-whole")


# --- an ablation, by literal tokens -------------------------------------------------------------------------
def test_mask_control(model):
    """No push on control tokens where A < 0; where A > 0 nothing changes."""
    e = Episode("t", 0)
    e.append([7, 8], "prompt", 0)
    e.append([3, 50, 2], "model", 0, [-1.0, -1.0, -1.0])             # <tool_call>, a word, <|im_end|>
    e.as_sampled = False
    set_old_logprobs(model, [e], 0.0, 100)
    only_word, n = replace(e, mask=[0, 0, 0, 1, 0]), 3
    _, masked = gradients(model, lambda m: rl_backward(m, [e], [-1.0], masked_ids=[2, 3]))
    _, word = gradients(model, lambda m: rl_backward(m, [only_word], [-1.0]))
    assert close(masked, [g / n for g in word])
    _, positive = gradients(model, lambda m: rl_backward(m, [e], [1.0], masked_ids=[2, 3]))
    _, plain = gradients(model, lambda m: rl_backward(m, [e], [1.0]))
    assert close(positive, plain)


@pytest.mark.parametrize("flags, words", [
    ("--signal ops --schedule interleaved", "--signal ops does not go with --schedule interleaved"),
    ("--signal ets", "it goes with --schedule interleaved, --schedule synchronous"),
    ("--signal ops --ops_k 4", "--ops_k 4 leaves"),
    ("--signal hbg --hints 5", "--hints 5 leaves"),
    ("--signal ets --schedule interleaved --steps 30", "--ets_window 10 is longer than the shortest RL"),
    ("--signal ets --schedule interleaved --steps 1", "a phase without a step"),
    ("--phases 1:x", "--phases 1:x"),
    ("--sft_weight -1", "must be at least 0"),
    ("--updates 5", "--updates 5 is more than --prompts 4"),
    ("--updates 5 --as_released", "--updates 5 is more than --group 4"),
    ("--correction 0.5", "--correction is a cap of at least 1"),
    ("--correction 2 --as_released", "--as_released"),
    ("--sft_file x --signal ets --schedule synchronous", "--sft_file goes with --signal sft"),
])
def test_senseless_flags(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        train.parse_args([*RUN, *flags.split()])
    assert error.value.code == 2 and words in capsys.readouterr().err


# --- forking ------------------------------------------------------------------------------------------------
class BestOf(Signal):
    """The example of README: cross-entropy on the model's own successes."""
    schedules = ("synchronous",)

    def __init__(self, *args):
        super().__init__(*args)
        self.best = []

    def observe(self, step, episodes):
        best = [e for e in episodes if e.reward == 1 or e.sample == 0]           # (a random model has none)
        self.best = (self.best + best)[-64:]

    def rows(self):
        return self.best


def test_a_signal_without_rows_is_one_sentence(folder, monkeypatch, capfd):
    class Nothing(Signal):
        schedules = ("sft",)
    monkeypatch.setitem(supervision.SIGNALS, "nothing", Nothing)
    assert train.cli([*RUN, "--signal", "nothing", "--schedule", "sft", "--out", "runs/nothing"]) == 2
    assert "--signal nothing has no rows at step 0" in capfd.readouterr().err


def test_a_signal_and_a_loss_from_outside(folder, monkeypatch):
    monkeypatch.setitem(supervision.SIGNALS, "best_of", BestOf)
    monkeypatch.setitem(rl_step.LOSSES, "reinforce", lambda t, low, high: -t.adv * t.logp)
    assert train.cli([*RUN, "--signal", "best_of", "--schedule", "synchronous", "--loss", "reinforce",
                      "--steps", "2", "--out", "runs/outside"]) == 0
    steps = [r for r in rows("runs/outside") if "phase" in r]
    assert all(r["sft_tokens"] > 0 for r in steps)


def test_the_example_of_readme_runs(folder):
    """The code block of "Add your own signal", copied out of README and started as README says."""
    code = (ROOT / "README.md").read_text().split("```python\n# my_signal.py\n")[1].split("```")[0]
    assert code.count("\n") <= 30
    (folder / "my_signal.py").write_text(code)
    command = [sys.executable, "my_signal.py", "--signal", "best_of", "--schedule", "synchronous", *RUN,
               "--steps", "1", "--out", "runs/readme"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "rl+sft" in done.stdout, done.stderr


def test_rollout_is_reachable_without_a_signal(model, chat, task):
    e, = rollout(HFEngine(model, chat.stop_ids), chat, [env := Env(task)], LIMITS, [begin(chat, env)])
    assert e.status in ("finished", "message_tokens_limit", "messages_limit", "total_tokens_limit")
