"""Models of runs, looked at (analyze_tokens.py --probe, --spike, --kl, --tokens), in both worlds; and the
paper's comparison (results/paper.py) from its command line to its tables."""
import json
import re
import shutil
from types import SimpleNamespace

import checkpoints
import pytest
import paper
import study
import torch
from checkpoints import Cell, Score, beginnings, colour, episode_of, kl_to, own_tokens
from conftest import RUN
from test_bfcl import RUN as BFCL_RUN
from test_bfcl import needs_bfcl, small_model                        # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

import train
from analyze_tokens import main, mean, read_records, summary, timeline
from rollout import STATES, Episode, Span, play
from tools import UserError, make_tasks

# --- recorded rollouts, and places in them -----------------------------------------------------------------


def two_messages(chat):
    """<tool_call> \\n {" <|im_end|>, a tool's answer, Done . <|im_end|>"""
    episode = Episode("t", 0)
    episode.append([1, 44], "prompt", 0)
    episode.append(chat.message('<tool_call>\n{"'), "model", 0, [-1.0, -2.0, -3.0, -4.0], state="polluted")
    episode.append([9, 9], "tool", 0)
    episode.append(chat.message("Done."), "model", 0, [-5.0, -6.0, -7.0], state="reply")
    return episode


def test_a_recorded_rollout_is_the_rollout(chat, tmp_path):
    episode = two_messages(chat)
    train.record_episodes(tmp_path / "e.jsonl", 3, chat, [episode])
    record, = read_records(tmp_path / "e.jsonl")
    assert (record["step"], record["source"], record["states"]) == (3, "policy", ["polluted", "reply"])
    again = episode_of(record)
    assert (again.ids, again.mask, again.logprobs) == (episode.ids, episode.mask, episode.logprobs)
    assert [(s.start, s.end, s.who, s.state) for s in again.spans] == [
        (0, 2, "prompt", ""), (2, 6, "model", "polluted"), (6, 8, "tool", ""), (8, 11, "model", "reply")]


def test_beginnings_by_hand(chat):
    episode = two_messages(chat)
    assert beginnings(chat, episode) == {2: "start", 3: "tag", 4: "newline", 8: "start"}
    tasks = make_tasks("test", "base", 1)
    bare = play(chat, tasks[0].env(), [["<tool_call>"]] * len(tasks[0].turns), train.Limits())
    start = bare.spans[1].start                  # the collapsed message: its end token is behind the tag
    assert bare.states[0] == "collapsed" and beginnings(chat, bare)[start + 1] == "tag"
    assert set(beginnings(chat, bare).values()) == {"start", "tag"}


def test_own_tokens_are_means_over_such_places(chat):
    episode = two_messages(chat)
    found = [Score(episode, t, -1.0, [t / 100, 0.5, 0.0]) for t in (2, 3, 4, 5, 8, 9, 10)]
    assert list(checkpoints.watched_tokens(chat)) == ["<tool_call>", "<|im_end|>", '{"']
    table = own_tokens(chat, found)
    assert table["start"] == {"n": 2, "<tool_call>": 0.05, "<|im_end|>": 0.5, '{"': 0.0}     # (2 + 8) / 2
    assert table["tag"]["<tool_call>"] == 0.03 and table["newline"] == {
        "n": 1, "<tool_call>": 0.04, "<|im_end|>": 0.5, '{"': 0.0}
    assert own_tokens(chat, found[:1])["tag"]["n"] == 0


def test_kl_is_k3_of_the_sampled_tokens(chat):
    episode = two_messages(chat)                 # sampled at -1, -2, ...
    found = [Score(episode, 2, -1.5, []), Score(episode, 3, -2.0, [])]
    assert kl_to(found) == pytest.approx((0.60653 - (-0.5) - 1) / 2, abs=1e-5)   # d = -.5 and 0


# --- the views ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(folder):
    """A run whose rate is large enough to move the model"""
    assert train.cli([*RUN, "--lr", "0.02", "--warmup", "1", "--reward", "random", "--steps", "3",
                      "--out", "runs/moved"]) == 0
    return "runs/moved"


def test_kl_over_training_without_a_kl_loss(moved, folder, capsys):
    """Against a plain forward pass of the starting model, row by row"""
    assert main(["--kl", moved]) == 0
    assert "kl_start" in capsys.readouterr().out
    found = {r["step"]: r["kl_start"] for r in read_records(folder / moved / "kl.jsonl")}
    assert found[0] == pytest.approx(0, abs=1e-4) and found[2] > 0.01            # log p has four digits
    start, values = AutoModelForCausalLM.from_pretrained("runs/tiny-base"), []
    for record in [r for r in read_records(folder / moved / "episodes.jsonl") if r["step"] == 2]:
        with torch.no_grad():
            logp = torch.log_softmax(start(torch.tensor([record["ids"]])).logits[0], -1)
        said = [t for begin, end, who, _, _ in record["spans"] if who == "model" for t in range(begin, end)]
        for t, now in zip(said, record["logprobs"], strict=True):
            d = logp[t - 1, record["ids"][t]].item() - now
            values.append(torch.tensor(d).exp().item() - d - 1)
    assert found[2] == pytest.approx(mean(values), rel=1e-3)
    merged = [r for r in read_records(moved) if "kl_start" in r]     # the run's records have it from now on
    assert [r["step"] for r in merged] == [0, 1, 2]
    assert timeline(read_records(moved)).splitlines()[0].split()[-1] == "kl_start"


def test_spike_before_and_after(moved, capsys):
    assert main(["--spike", moved, "--tasks", "1"]) == 0
    text = capsys.readouterr().out
    assert "3 test tasks" in text and text.count("P(<tool_call>)") == 3 and text.count('P({")') == 3
    messages, = re.findall(r"where a message begins \((\d+) -> \d+ times\)", text)
    kl, = re.findall(r"([\d.]+) nats per token", text)
    assert int(messages) >= 3 and float(kl) > 0.01
    with pytest.raises(UserError, match="--chat_template qwen3-think-mismatch .* use --probe"):
        checkpoints.as_trained(SimpleNamespace(chat=SimpleNamespace(sampler_only=[5]), args=SimpleNamespace(
            chat_template="qwen3-think-mismatch")))
    assert main(["--spike", str(train.BASE)]) == 2                   # a model that is no run has no start
    assert "only a run folder" in capsys.readouterr().err


def test_tokens_in_the_terminal_and_as_a_page(moved, folder, capsys):
    assert main(["--tokens", moved]) == 0
    assert "-test-0-0, ground truth" in capsys.readouterr().out
    assert main(["--tokens", moved, "--step", "2"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[2].startswith("step 2: ") and "\033[30;48;2;" in text
    said = lambda who: [re.sub(r"\033\[[\d;]*m", "", line).split("]  ", 1)[1]
                        for line in text.splitlines() if line.startswith(f"{who:5s} [")]
    record = [r for r in read_records(folder / moved / "episodes.jsonl") if r["step"] == 2]
    assert said("start") == said("now") and len(said("now")) in [len(r["states"]) for r in record]
    assert main(["--tokens", moved, "--html", "page.html", "--step", "0"]) == 0
    page = (folder / "page.html").read_text()
    assert "<title>step 0: " in page and page.count('class="t"') % 2 == 0 and "P(&lt;tool_call&gt;)" in page
    assert not re.search(r"(src|href)=", page)                       # nothing is fetched
    assert main(["--tokens", str(train.BASE), "--html", "truth.html"]) == 0      # ground truth, one model
    truth = (folder / "truth.html").read_text()
    assert "ground truth" in truth and "now [call]" in truth and "start [call]" not in truth
    assert main(["--tokens", moved, "--step", "9"]) == 2
    assert "--step 9 has no recorded rollout" in capsys.readouterr().err
    assert main(["--tokens", str(train.BASE), "--step", "0"]) == 2
    assert "is no run" in capsys.readouterr().err
    assert main(["--tokens", moved, "--html", "missing/page.html"]) == 2
    assert "No such file or directory: 'missing/page.html'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--tokens", moved, moved, "--html", "page.html"])
    shutil.copytree(moved, "runs/mine")
    config = json.loads((folder / "runs/mine/config.json").read_text()) | {"world": "mine"}
    (folder / "runs/mine/config.json").write_text(json.dumps(config))
    assert main(["--tokens", "runs/mine"]) == 2
    assert "plays --world mine, which this program does not know" in capsys.readouterr().err


def test_where_a_control_token_became_likely():
    """Likely now, not before, and another token is right"""
    start = {5: Cell("Done", -1, .28, 0), 6: Cell(".", -1, .6, 0), 7: Cell("<|im_end|>", -1, 0, .1)}
    now = {5: Cell("Done", -1, .85, 0), 6: Cell(".", -1, .9, .26), 7: Cell("<|im_end|>", -1, 0, .9)}
    assert checkpoints.misplaced({"start": start, "now": now}, Span(5, 8, "model", 0), "<|im_end|>") == [
        "      P(<tool_call>) 0.28 -> 0.85 in the place of 'Done'",
        "      P(<|im_end|>) 0 -> 0.26 in the place of '.'"]
    assert checkpoints.misplaced({"now": now}, Span(5, 8, "model", 0), "<|im_end|>") == []       # nothing became


def test_colours_by_hand():
    assert colour(Cell("Done", -1.0, open=0.001, end=0.0)) == (255, 255, 255)
    assert colour(Cell("Done", -1.0, open=1.0, end=0.001)) == (255, 64, 64)
    assert colour(Cell("Done", -1.0, open=0.001, end=1.0)) == (64, 64, 255)
    assert colour(Cell("Done", -1.0, open=1.0, end=1.0)) == (64, 64, 64)
    assert colour(Cell("Done", -1.0, open=10**-1.5, end=0.0)) == (255, 159, 159)


def test_a_run_that_recorded_no_ids_says_so(moved, folder, capsys):
    shutil.copytree(folder / moved, folder / "runs/old")
    lines = [json.loads(line) for line in (folder / "runs/old/episodes.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in line.items() if k not in ("ids", "logprobs", "spans")} for line in lines]
    (folder / "runs/old/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert main(["--kl", "runs/old"]) == 2 and "has no rollouts with token ids" in capsys.readouterr().err
    assert main(["--transcripts", "runs/old"]) == 0


def test_collapse_by_both_measures(tmp_path):
    """The clean reward goes, the task reward stays: two verdicts, side by side"""
    lines = []
    for step in range(20):
        record = {"step": step, "reward": 0.4, "reward_clean": 0.4 if step < 8 else 0.0}
        lines.append(json.dumps(record | {f"state/{s}": 0.5 for s in STATES}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    text = summary(tmp_path)
    assert "by the task reward (the paper's measure): no; last 5 steps 0.40" in text
    assert "by the clean reward" in text and "at step 12, peak 0.40 at step 4; last 5 steps 0.00" in text
    assert "The task reward does not see it" in text


def test_collapse_of_the_test_tasks_alone(tmp_path):
    """A reward that has always been low may stay where it was, while the greedy answers are lost"""
    shares = {f"state/{s}": .5 for s in STATES}
    steps = [{"step": step, "reward": .1, "reward_clean": .1} | shares for step in range(20)]
    for first, last, verdict in ((.04, .0, "No collapse"), (.46, .12, "No collapse"), (.46, .11, "COLLAPSE")):
        before, after = ({"eval/average": .5, "eval/average_clean": value} for value in (first, last))
        lines = [json.dumps(record) for record in ({"step": 0} | before, *steps, {"step": 20} | after)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        text = summary(tmp_path)
        assert verdict in text
    assert "by the task reward (the paper's measure): no; last 5 steps 0.10" in text
    assert "by the test tasks, solved with clean messages: 46.0% -> 11.0%" in text
    assert "What the messages became" not in text and "does not see it" not in text
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], lines[-1]]))    # SFT alone has no reward
    assert "46.0% -> 11.0%" in (text := summary(tmp_path)) and "by the task reward" not in text


def test_the_timeline_leaves_no_record_out():
    """Stretches of two RL steps; a probe at an SFT phase between them (step 2), and one behind the last"""
    shares = {f"state/{s}": .5 for s in STATES}
    records = [{"step": step, "reward": .5, "reward_clean": .5} | shares for step in (0, 1, 3)]
    records += [{"step": s, "p/open|text": p} for s, p in ((0, .1), (2, .9), (4, .4))]
    first, second = timeline(records, points=2).splitlines()[1:]
    assert first.split()[:2] == ["0-2", "0.5000"] and first.split()[-1] == "0.5000"      # of .1 and .9
    assert second.split()[0] == "3-4" and second.split()[-1] == "0.4000"


# --- the paper's comparison --------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """The study's scripts run in this process -> the list of their command lines"""
    lines = []

    def call(self, log, argv, script="train.py"):
        lines.append(argv)
        return train.cli(argv)
    monkeypatch.setattr(study.Study, "call", call)
    monkeypatch.setattr(train.os_signal, "signal", lambda *handler: None)        # runs are threads here
    return lines


def cells(text, title):
    """A table of paper.md -> {"grpo": ["1", "0.0 (0.0 to 0.0)", ...]}, the header under "method" """
    rows = {}
    for line in text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines():
        if line.startswith("| "):
            name, *rest = [cell.strip(" `") for cell in line.strip("|").split("|")]
            rows[name] = rest
    return rows


def test_papers_comparison_on_the_laptop(folder, called, capsys):
    flags = " ".join([*RUN, "--steps 2 --eval_every -1 --sft_batch 2"])
    command = ["--only", "grpo", "ets-synchronous", "--seeds", "0", "--parallel", "1",
               "--flags", flags, "--out", "runs/paper"]
    assert paper.main([*command, "--list"]) == 0 and not called
    plan = capsys.readouterr().out
    assert plan.count("to do") == 2 and "2 RL steps, 32 rollouts, at most 3.28e+04 tokens, 4 updates" in plan
    assert paper.main(command) == 0
    assert len(called) == 5                      # the base's evaluation; two runs, each evaluated once more
    out = folder / "runs/paper"
    written = (out / "paper.md").read_text()
    main_table = cells(written, "Main table")
    assert main_table["method"][:8] == ["seeds", "base", "miss_func", "miss_param", "long_context", "average",
                                        "... clean", "task reward collapsed"]
    assert main_table.keys() == {"method", "untrained", "grpo", "ets-synchronous"}
    assert main_table["grpo"][0] == "1" and main_table["grpo"][-2:] == ["0 of 1", "0.0"]
    scores = json.loads((out / "grpo-seed0/eval.json").read_text())
    assert main_table["grpo"][5] == f"{100 * scores['average']:.1f}"
    assert cells(written, "Out of distribution")["method"][1:] == ["format (the other syntax)",
                                                                   "content (unseen tools)"]
    assert cells(written, "Learning rates").keys() == {"method", "grpo"}
    assert all((out / png).read_bytes()[:4] == b"\x89PNG" for png in ("curves.png", "rates.png"))
    trained = [r for r in read_records(out / "grpo-seed0.csv") if "kl_ref" in r]
    assert trained and trained[0]["kl_ref"] >= 0                     # the paper's weight is set
    capsys.readouterr()
    assert paper.main(command) == 0 and len(called) == 5             # nothing is left to do
    assert "measured: " in capsys.readouterr().out


def test_a_rate_is_one_more_recipe():
    recipes = paper.recipes_of("tiny", 3)
    assert recipes["grpo-lr5e-4"].flags == "--lr 5e-4"
    assert recipes["ets-interleaved-sft_lr5e-5"].flags == "--signal ets --schedule interleaved --sft_lr 5e-5"
    assert paper.PAPER.keys() - {"untrained"} <= paper.recipes_of("bfcl", 1).keys()
    for world, model in (("tiny", "tiny"), ("bfcl", "x")):
        for name, recipe in paper.recipes_of(world, 1).items():
            train.parse_args(["--world", world, "--model", model, *recipe.flags.split()])


@needs_bfcl
def test_papers_comparison_on_bfcl(small_model, tmp_path, monkeypatch, called, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    flags = " ".join([*BFCL_RUN[2:], "--steps 1 --kl_weight 1e-4 --max_message_tokens 30"])
    command = ["--world", "bfcl", "--model", str(small_model[0]), "--only", "grpo",
               "ets-synchronous", "--flags", flags, "--out", "p"]
    assert paper.main(command) == 0
    assert len(called) == 3                      # a run plays the test tasks itself, at its end
    plan = capsys.readouterr().out
    assert "1 RL steps, 2 rollouts, at most 2.4e+04 tokens, 1 updates, at most " in plan
    assert "GPU-hours, at most: 12 P T" in plan
    table = cells((tmp_path / "p/paper.md").read_text(), "Main table")
    test = next(r for r in read_records("p/grpo-seed0") if "test/average" in r)
    assert table["grpo"][5] == f"{100 * test['test/average']:.1f}"
    assert paper.main(command) == 0 and len(called) == 3
    # The views take the run's own world
    for view, seen in (("--probe", "calls_exact"), ("--spike", "3 test tasks"), ("--kl", "kl_start"),
                       ("--tokens", "multi_turn_")):
        assert main([view, "p/grpo-seed0", "--tasks", "1"]) == 0, view
        assert seen in capsys.readouterr().out, view
    found = checkpoints.load("p/grpo-seed0")
    world = checkpoints.world_of(found, 2)
    assert [task.id.rsplit("_", 1)[0] for task in world.test[::2]] == [
        "multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param"]
    assert world.limits.observation_tokens == 64        # the run's flag
    with pytest.raises(UserError, match="only a run folder"):
        checkpoints.load(small_model[0], "bfcl").start()
