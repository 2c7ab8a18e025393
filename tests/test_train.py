"""The run: the real command line, resuming, checkpoints, mistakes, two processes."""
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import make_base
import measure_base
import plot
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, RUN, rows
from safetensors.torch import load_file
from test_losses import close, episodes
from transformers import AutoTokenizer

import analyze_tokens
import rl_step
import tools
import train
from analyze_tokens import collapse, read_records
from rl_step import advantages, assign_credit, rl_backward, set_old_logprobs
from rollout import STATES
from sft_step import optimizer_step, sft_backward, shuffled_passes


def weights(out):
    return load_file(train.newest_checkpoint(out) / "model.safetensors")


def command(*args, n=None, **kw):
    head = [sys.executable]
    if n:
        head += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "--"]
    return subprocess.run([*head, str(ROOT / "train.py"), *args], capture_output=True, text=True, timeout=240,
                          **kw)


def steps_of(out):
    """The records of the steps, without those of probe and evaluation"""
    return [r for r in rows(out) if "phase" in r]


def close_records(a, b):
    """Equal records, numbers up to rounding"""
    for one, other in zip(a, b, strict=True):
        assert one.pop("phase", "") == other.pop("phase", "")
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


# --- the command line --------------------------------------------------------------------------------------
def test_the_run_folder(folder):
    out = folder / "runs/first"
    records = rows(out)
    assert [r["step"] for r in records] == [0, 0, 0, 1, 2, 2]
    for probed, evaluated in (records[:2], records[-2:]):
        assert "p/open|text" in probed and "eval/average" in evaluated
    step = records[2]
    assert sum(step[f"state/{s}"] for s in STATES) == pytest.approx(1, abs=1e-4)
    assert step["gap"] < 1e-5 and step["tokens"] > 0 and 0 <= step["mixed_groups"] <= 1
    assert json.loads((out / "config.json").read_text())["steps"] == 2
    spoken = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert {e["step"] for e in spoken} == {0, 1} and "<|im_start|>" in spoken[0]["text"]
    names = {p.name for p in train.newest_checkpoint(out).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "state.pt",
            "MANIFEST.json"} <= names


def test_every_set_is_scored_clean_too(folder):
    record = rows("runs/first")[-1]
    sets = ("base", "miss_func", "miss_param", "long_context", "content_ood", "format_ood", "average")
    for name in sets:
        assert 0 <= record[f"eval/{name}_clean"] <= record[f"eval/{name}"] <= 1
    assert not any("strict" in name for name in record)              # that verdict is BFCL's


def test_command_line(folder):
    """The command of README (smaller): status 0, a table, and a second call that refuses to overwrite."""
    args = [*RUN, "--steps", "1", "--out", "runs/cli"]
    done = command(*args, cwd=folder)
    assert done.returncode == 0, done.stderr
    for words in ("before", "content_ood", "runs/cli/metrics.jsonl"):
        assert words in done.stdout
    before = (folder / "runs/cli/metrics.jsonl").read_bytes()
    again = command(*args, cwd=folder)
    assert again.returncode == 2 and again.stderr.strip().count("\n") == 0 and "--resume" in again.stderr
    assert (folder / "runs/cli/metrics.jsonl").read_bytes() == before


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--help"])
    out = capsys.readouterr().out
    assert not stop.value.code and all(f"--{name} " in out for name in vars(train.parse_args([])))


def test_the_world_brings_its_own_defaults():
    paper = train.parse_args(["--world", "bfcl", "--model", "x"])
    assert (paper.lr, paper.kl_weight, paper.steps, paper.group) == (1e-6, 1e-4, 300, 8)
    assert train.parse_args(["--world", "bfcl", "--model", "x", "--lr", "5e-4"]).lr == 5e-4
    assert (train.parse_args([]).lr, train.parse_args([]).kl_weight) == (1e-3, 0)


@pytest.mark.parametrize("schedule, phases", [("sft", ["sft_phase"]),
                                              ("sft_then_rl", ["sft_phase", "rl", "rl"])])
def test_sft_schedules(folder, schedule, phases):
    """12 conversations of 65 messages, three times: 9 updates of about 22 messages each"""
    out = f"runs/{schedule}"
    assert train.cli([*RUN, "--signal", "sft", "--schedule", schedule, "--steps", "2", "--sft_batch", "22",
                      "--out", out]) == 0
    steps = steps_of(out)
    assert [r["phase"] for r in steps] == phases
    assert [steps[0][name] for name in ("sft_rows", "sft_visits", "sft_updates")] == [12, 36, 9]
    assert steps[0]["sft_loss_last"] < steps[0]["sft_loss"] < steps[0]["sft_loss_first"]


@pytest.mark.parametrize("flags, expected", [
    (["--schedule", "rl"], ["rl"] * 4),
    (["--schedule", "sft"], ["sft_phase"]),
    (["--schedule", "sft_then_rl"], ["sft_phase"] + ["rl"] * 4),
    (["--schedule", "synchronous"], ["rl+sft"] * 4),
    (["--schedule", "interleaved", "--phases", "1:1"], ["rl", "rl", "sft_phase", "rl", "rl"]),
    (["--schedule", "interleaved", "--phases", "1:3"], ["rl", "sft_phase", "rl", "rl", "rl"]),
])
def test_plan(flags, expected):
    args = train.parse_args(["--signal", "none" if "rl" in flags else "sft", *flags, "--steps", "4"])
    assert train.plan(args) == expected


def test_synchronous_supervision_counts_messages(folder, monkeypatch):
    """2 updates a step, each on whole conversations of about 22 messages, in shuffled passes over all 12."""
    trained = []

    def spy(model, rows, weight, micro_tokens):
        trained.append(rows)
        return sft_backward(model, rows, weight, micro_tokens)
    monkeypatch.setattr(rl_step, "sft_backward", spy)
    assert train.cli([*RUN, "--signal", "sft", "--schedule", "synchronous", "--steps", "4", "--sft_batch",
                      "22", "--eval_every", "-1", "--out", "runs/sync"]) == 0
    messages = [sum(len(row.states) for row in rows) for rows in trained]
    assert len(messages) == 8 and 20 < sum(messages) / 8 < 24 and max(messages) - min(messages) < 16
    visits = [r["sft_visits"] for r in steps_of("runs/sync")]
    assert visits == [len(a) + len(b) for a, b in zip(trained[::2], trained[1::2])]
    in_order = [row.task_id for rows in trained for row in rows]
    assert len(set(in_order[:12])) == len(set(in_order[12:24])) == 12


def test_what_the_advantages_are_made_of():
    def credits(kind, step=0, seed=0):
        batch = [SimpleNamespace(reward=float(k < 3), states=["call", "polluted" if k % 2 else "reply"],
                                 group_id=g, sample=k) for k in range(8) for g in range(12)]
        groups = {g: [] for g in range(12)}
        for e, c in zip(batch, assign_credit(batch, kind, seed, step), strict=True):
            groups[e.group_id].append(c)
        return list(groups.values())
    assert credits("task") == [[1, 1, 1, 0, 0, 0, 0, 0]] * 12
    assert credits("format") == [[1.5, 1, 1.5, 0, 0.5, 0, 0.5, 0]] * 12
    coins = [c for s in range(10) for group in credits("random", s) for c in group]
    assert set(coins) == {0.0, 1.0} and 0.15 < sum(coins) / len(coins) < 0.25
    dealt = credits("shuffled")
    assert all(sorted(group) == [0, 0, 0, 0, 0, 1, 1, 1] for group in dealt)
    assert len(set(map(tuple, dealt))) > 6 and dealt == credits("shuffled")
    assert dealt not in (credits("shuffled", step=1), credits("shuffled", seed=1))


def test_as_released_restarts_in_every_phase(folder):
    """Warm-up from 0 over 5 steps of each phase, and a KL that is 0 where a phase begins, although the policy
    has moved since the run's start."""
    args = [*RUN, "--signal", "sft", "--schedule", "interleaved", "--phases", "1:1", "--steps", "6",
            "--sft_batch", "22", "--sft_epochs", "1", "--kl_weight", "0.1", "--updates", "1",
            "--reward", "random", "--lr", "0.01", "--warmup", "1", "--eval_every", "-1",
            "--probe_every", "-1"]
    assert train.cli([*args, "--as_released", "--out", "runs/released"]) == 0
    released = steps_of("runs/released")
    assert [r["phase"] for r in released] == ["rl"] * 3 + ["sft_phase"] + ["rl"] * 3
    first, second = released[:3], released[4:]
    for rl in (first, second):
        assert [r["lr"] for r in rl] == pytest.approx([0, 0.002, 0.004])
        assert rl[0]["kl_ref"] < 1e-6 and rl[1]["kl_ref"] < 1e-6 < rl[2]["kl_ref"]
    assert train.cli([*args, "--out", "runs/unreleased"]) == 0
    plain = steps_of("runs/unreleased")
    rl = plain[:3] + plain[4:]
    assert [r["lr"] for r in rl] == [0.01] * 6
    assert rl[0]["kl_ref"] < 1e-6 and all(r["kl_ref"] > 1e-6 for r in rl[1:])


# --- resuming ----------------------------------------------------------------------------------------------
def test_killed_run_resumes_to_the_same_numbers(folder):
    """kill -9 in the middle, then --resume: metrics and weights equal those of a run that nobody interrupted,
    bit by bit."""
    args = [*RUN, "--signal", "sft", "--schedule", "sft_then_rl", "--sft_epochs", "1", "--steps", "6",
            "--save_every", "2", "--kl_weight", "0.01", "--sft_batch", "22", "--threads", "1",
            "--eval_every", "2", "--probe_every", "3"]
    assert command(*args, "--out", "runs/whole", cwd=folder).returncode == 0
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args, "--out", "runs/killed"],
                               cwd=folder, stdout=subprocess.DEVNULL)
    metrics = folder / "runs/killed/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 9:           # step 3 is logged, the
        time.sleep(0.02)                                                         # checkpoint is of step 2
        assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "runs/killed/checkpoints/latest").read_text() in ("step-2", "step-4")
    with open(metrics, "a") as f:
        f.write('{"step": 4, "rew')                                  # as if the kill had hit a write
    assert command(*args, "--out", "runs/killed", "--resume", cwd=folder).returncode == 0
    assert rows("runs/killed") == rows("runs/whole")
    a, b = weights("runs/killed"), weights("runs/whole")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_resume_before_the_first_checkpoint(folder):
    """A run killed before it saved anything starts over."""
    args = [*RUN, "--steps", "1", "--out", "runs/early"]
    assert train.cli(args) == 0
    whole = rows("runs/early")
    shutil.rmtree(folder / "runs/early/checkpoints")
    assert train.cli([*args, "--resume"]) == 0 and rows("runs/early") == whole


def test_resume_when_the_run_that_it_began_with_has_gone_on(folder, capfd):
    """--model runs/parent1: a resumption begins with the checkpoint of then, not with the newest one."""
    grow = [*RUN, "--seed", "5", "--steps", "2", "--save_every", "1", "--keep", "-1", "--eval_every", "-1"]
    assert train.cli([*grow, "--out", "runs/parent1"]) == 0
    (folder / "runs/parent1/checkpoints/latest").write_text("step-1")
    args = [*grow, "--model", "runs/parent1", "--out", "runs/child1"]
    assert train.cli(args) == 0
    whole = rows("runs/child1")
    (folder / "runs/parent1/checkpoints/latest").write_text("step-2")
    (folder / "runs/child1/checkpoints/latest").write_text("step-1")
    assert train.cli([*args, "--resume"]) == 0 and rows("runs/child1") == whole
    assert train.cli([*args[:-1], "runs/child2"]) == 0 and rows("runs/child2") != whole
    shutil.rmtree(folder / "runs/parent1/checkpoints/step-1")
    assert train.cli([*args, "--resume"]) == 2
    assert "cannot load the model runs/parent1/checkpoints/step-1" in capfd.readouterr().err


def test_a_damaged_log_is_refused_and_kept(folder, capfd):
    """Half a last line is normal after a kill; a damaged line in the middle is not, and must not cost the
    lines behind it."""
    args = [*RUN, "--steps", "1", "--out", "runs/log"]
    assert train.cli(args) == 0
    log = folder / "runs/log/metrics.jsonl"
    text = "x" + log.read_text()
    log.write_text(text)
    assert train.cli([*args, "--resume"]) == 2
    assert "line 1 of runs/log/metrics.jsonl is damaged" in capfd.readouterr().err
    assert log.read_text() == text


def test_keep(folder):
    """--keep 1 leaves the newest checkpoint alone."""
    assert train.cli([*RUN, "--steps", "3", "--save_every", "1", "--keep", "1", "--eval_every", "-1",
                      "--out", "runs/keep"]) == 0
    names = sorted(p.name for p in (folder / "runs/keep/checkpoints").iterdir())
    assert names == ["latest", "step-3"]


def test_log_lines_are_rounded(tmp_path):
    train.log_line(tmp_path / "log", {"step": 1, "a": 0.123456789, "b": "x"})
    train.log_line(tmp_path / "log", {"step": 2, "a": 1.0})
    assert (tmp_path / "log").read_text() == '{"step": 1, "a": 0.123457, "b": "x"}\n{"step": 2, "a": 1.0}\n'


def test_eval_only(folder, capsys):
    capsys.readouterr()
    assert train.cli([*RUN, "--eval_only", "--model", "runs/first", "--out", "runs/scores"]) == 0
    assert "format_ood" in capsys.readouterr().out
    scores = json.loads((folder / "runs/scores/eval.json").read_text())
    assert scores["average"] == pytest.approx(rows("runs/first")[-1]["eval/average"], abs=1e-6)
    assert [p.name for p in (folder / "runs/scores").iterdir()] == ["eval.json"]
    hf_folder = str(train.newest_checkpoint("runs/first"))
    assert train.cli([*RUN, "--eval_only", "--model", hf_folder]) == 0


# --- mistakes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("args, words", [
    (["--steps", "-1"], "--steps: -1 must be at least 0"),
    (["--steps", "1.5"], "--steps: invalid int value"),
    (["--lr", "nan"], "--lr: nan must be at least 0"),
    (["--group", "1"], "--group: 1 must be at least 2"),
    (["--validation", "100"], "--validation: 100 must"),
    (["--updates", "9"], "--updates 9 is more than"),
    (["--updates", "5", "--as_released"], "--updates 5 is more than"),
    (["--save_every", "-2"], "--save_every: -2 must be at least -1"),
    (["--signal", "ops", "--ops_k", "4"], "--ops_k 4 leaves"),
    (["--signal", "hbg", "--hints", "4"], "--hints 4 leaves"),
    (["--loss", "ppo"], "invalid choice: 'ppo'"),
    (["--correction", "0.5"], "--correction is a cap of at least 1"),
    (["--correction", "2", "--as_released"], "--correction"),
    (["--compute_dtype", "bfloat16"], "--compute_dtype bfloat16 beside --dtype float32 needs --shard"),
    (["--signal", "ets", "--schedule", "interleaved", "--phases", "60"], "--phases 60 has no SFT phase"),
    (["--signal", "ets", "--schedule", "interleaved", "--phases", "1:0"], "--phases 1:0 must be shares"),
    (["--signal", "ets", "--schedule", "interleaved"], "has a phase without a step"),
    (["--signal", "ets", "--schedule", "interleaved", "--phases", "1:1"], "--ets_window 10 is longer than"),
    (["--signal", "sft"], "--signal sft does not go with --schedule rl"),
    (["--schedule", "sft"], "--signal none does not go with --schedule sft"),
    (["--sft_file", "x.jsonl"], "--sft_file goes with --signal sft"),
    (["--signal", "sft", "--schedule", "sft", "--sft_file", "x.jsonl"], "--sft_file x.jsonl cannot be read"),
    (["--resume", "--eval_only"], "exclude each other"),
    (["--model", "no/such/model"], "cannot load the model no/such/model"),
    (["--model", "."], "cannot load the model ."),
    (["--chat_template", "missing.jinja"], "--chat_template missing.jinja"),
    (["--out", "runs/first"], "runs/first exists"),
    (["--out", "runs/nowhere", "--resume"], "no run in runs/nowhere"),
    (["--out", "runs/first", "--resume", "--steps", "3"], "started with --steps 2, not 3"),
    (["--max_total_tokens", "30"], "within 30; raise --max_total_tokens"),
    (["--seed", "-1"], "--seed: -1 must be at least 0"),
    (["--dtype", "bfloat16"], "train with --shard --compute_dtype bfloat16"),
    (["--dtype", "bfloat16", "--shard"], "train with --shard --compute_dtype bfloat16"),
    (["--signal", "sft", "--schedule", "sft", "--max_messages", "1"], "does not fit into the limits"),
    (["--signal", "ops", "--max_messages", "1"], "does not fit into the limits"),
    (["--signal", "hbg", "--max_total_tokens", "190"], "within 190; raise --max_total_tokens"),
])
def test_mistakes_are_one_sentence(folder, capfd, args, words):
    before = set(folder.rglob("*"))
    argv = [*RUN, "--steps", "2", *([] if "--out" in args else ["--out", f"runs/new-{words}"]), *args]
    try:
        status = train.cli(argv)
    except SystemExit as error:
        status = error.code
    err = capfd.readouterr().err.strip().splitlines()
    assert status == 2 and words in err[-1] and "Traceback" not in "\n".join(err)
    assert set(folder.rglob("*")) == before, "a mistake must not leave anything behind"


@pytest.mark.parametrize("args, words", [(["--size", "huge"], "invalid choice: 'huge'"),
                                         (["--out", "runs/first"], "--out runs/first exists")])
def test_mistakes_with_the_base(folder, capfd, args, words):
    before = set(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        make_base.main(["--out", "runs/new-base", *args])
    assert stop.value.code == 2 and words in capfd.readouterr().err and set(folder.rglob("*")) == before


def test_a_missing_vllm_is_one_sentence(folder, capfd, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())            # its settings are not for other tests
    monkeypatch.setitem(sys.modules, "vllm", None)                   # import vllm now raises ImportError
    before = set(folder.rglob("*"))
    assert train.cli([*RUN, "--engine", "vllm", "--out", "runs/new"]) == 2
    assert set(folder.rglob("*")) == before
    err = capfd.readouterr().err.strip()
    assert "\n" not in err and "pip install" in err and "--engine hf" in err


def test_a_missing_wandb_is_one_sentence(folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)                  # import wandb now raises ImportError
    before = set(folder.rglob("*"))
    assert train.cli([*RUN, "--wandb", "p", "--out", "runs/new"]) == 2 and set(folder.rglob("*")) == before
    err = capfd.readouterr().err.strip()
    assert "\n" not in err and "--wandb" in err and "pip install wandb" in err

    def init(**kw):
        raise RuntimeError("no API key")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert train.cli([*RUN, "--wandb", "p", "--out", "runs/new"]) == 2 and set(folder.rglob("*")) == before
    assert "--wandb: no API key" in capfd.readouterr().err
    assert train.cli([*RUN, "--out", "/dev/null/new"]) == 2
    assert "the run folder cannot be made" in capfd.readouterr().err


def test_wandb_gets_the_lines_of_metrics(folder, monkeypatch):
    begun, logged = [], []

    def init(**kw):
        begun.append(kw)
        return SimpleNamespace(log=lambda record, step: logged.append((record, step)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert train.cli([*RUN, "--steps", "1", "--wandb", "collapse", "--out", "runs/wandb"]) == 0
    lines = [json.loads(line) for line in (folder / "runs/wandb/metrics.jsonl").read_text().splitlines()]
    assert logged == [(line, line["step"]) for line in lines] and len(lines) == 5
    config = json.loads((folder / "runs/wandb/config.json").read_text())
    assert begun == [{"project": "collapse", "name": "runs/wandb", "config": config}]


def test_pytorchs_generator_is_seeded():
    """It decides what dropout drops."""
    for seed in (3, 4):
        torch.manual_seed(99)
        train.start_processes(train.parse_args(["--seed", str(seed)]))
        assert torch.initial_seed() == seed


def test_the_limits_of_test_tasks():
    """As in training; on bfcl the paper's."""
    args = train.parse_args(["--max_total_tokens", "900"])
    assert train.limits_of(args, "test") == train.limits_of(args) and train.limits_of(args).total_tokens == 900
    args = train.parse_args(["--world", "bfcl", "--model", "x"])
    limits = train.limits_of(args), train.limits_of(args, "validation"), train.limits_of(args, "test")
    assert [(x.observation_tokens, x.total_tokens) for x in limits] == [(1024, 16_384), (1024, 16_384), (4096, 24_576)]


def test_passes_of_an_sft_phase():
    """The paper's: 3 where SFT comes first, 2 between RL phases"""
    for schedule, epochs in (("sft", 3), ("sft_then_rl", 3), ("interleaved", 2)):
        assert train.parse_args(["--signal", "sft", "--schedule", schedule]).sft_epochs == epochs
    assert train.parse_args(["--sft_epochs", "5"]).sft_epochs == 5


def test_correction(folder):
    """HBG, corrected: the sampler is the trained model itself, so the policy's rollouts have next to no
    gap."""
    assert train.cli([*RUN, "--signal", "hbg", "--correction", "2", "--steps", "1", "--reward", "random",
                      "--out", "runs/corrected"]) == 0
    step, = steps_of("runs/corrected")
    assert 0 < step["gap"] < 1e-5 and step["gap"] < step["gap_max"] < 1e-4
    assert step["grad_norm"] > 0 and step["hint_log_ratio"] != 0


def test_a_gap_is_said(capsys):
    """Above 0.05, and when it is not a number"""
    log = {"step": 3, "phase": "rl", "seconds": 1.0, "skipped_updates": 0, "gap_max": 9.0}
    for gap, words in ((0.049, ""), (0.051, "trainer and sampler differ"), (float("nan"), "differ by nan")):
        train.say_step(log | {"gap": gap})
        out = capsys.readouterr().out
        assert words in out and ("WARNING" in out) == bool(words)


def flip_first_byte(path):
    path.write_bytes(b"x" + path.read_bytes()[1:])


@pytest.mark.parametrize("damage, words", [
    (lambda path: flip_first_byte(path / "model.safetensors"), "is damaged"),
    (lambda path: (path / "state.pt").unlink(), "is damaged"),
    (lambda path: path.rename(path.with_name("elsewhere")), "is missing"),
])
def test_damaged_checkpoints_are_refused(folder, capfd, damage, words):
    out = f"runs/damaged-{len(list((folder / 'runs').iterdir()))}"
    args = [*RUN, "--steps", "1", "--out", out]
    assert train.cli(args) == 0
    damage(train.newest_checkpoint(out))
    metrics = (folder / out / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert train.cli([*args, "--resume"]) == 2 and words in capfd.readouterr().err
    assert (folder / out / "metrics.jsonl").read_bytes() == metrics


def test_publish_is_atomic(tmp_path):
    def fail(tmp):
        (tmp / "half").write_text("x")
        raise KeyboardInterrupt
    train.publish(tmp_path / "step-1", lambda tmp: (tmp / "file").write_text("good"))
    with pytest.raises(KeyboardInterrupt):
        train.publish(tmp_path / "step-1", fail)
    assert (tmp_path / "step-1/file").read_text() == "good" and not (tmp_path / "step-1/half").exists()


def test_shuffled_passes():
    items = list(range(5))
    stream = shuffled_passes(items, 0, 20, "s")
    assert all(sorted(stream[i:i + 5]) == items for i in range(0, 20, 5)) and stream[:5] != stream[5:10]
    assert stream[7:13] == shuffled_passes(items, 7, 6, "s")         # position in, same items out


# --- what is read from runs --------------------------------------------------------------------------------
def test_collapse_is_named():
    def records(rewards):
        return [{"step": i, "reward": r} | {f"state/{s}": 0.0 for s in STATES}
                | {"state/call": r, "state/polluted": 1 - r} for i, r in enumerate(rewards)]
    curve = [0.1] * 10 + [0.4] * 20
    assert collapse(records(curve)) is None
    assert collapse(records(curve + [0.0] * 6 + [0.4] * 10)) is None             # it recovered
    found = collapse(records(curve + [0.01] * 10))
    assert 30 < found["step"] <= 35 and found["peak"] == pytest.approx(0.4)
    assert found["before"]["polluted"] == pytest.approx(0.6)
    assert found["after"]["polluted"] == pytest.approx(0.99)


@pytest.fixture(scope="module")
def half_and_bad(folder):
    """runs/half: its last line was cut in the middle; runs/bad: its first line is damaged"""
    lines = (folder / "runs/first/metrics.jsonl").read_text()
    for name, text in (("half", lines[:-20]), ("bad", "x\n" + lines)):
        (folder / "runs" / name).mkdir()
        (folder / "runs" / name / "metrics.jsonl").write_text(text)


def test_analyze_reads_runs(folder, half_and_bad, capsys):
    """Whole, half-written and damaged run folders: what can be read is printed, what cannot is said."""
    capsys.readouterr()
    assert analyze_tokens.main(["runs/first", "runs/half"]) == 0
    out = capsys.readouterr().out
    assert out.count("Too short to tell") == 2 and "before     after" in out and "polluted" in out
    assert analyze_tokens.main(["runs/bad", "runs/not-there", "runs/first"]) == 2
    seen = capsys.readouterr()
    assert "line 1 of runs/bad/metrics.jsonl is damaged" in seen.err
    assert "runs/not-there/metrics.jsonl does not exist" in seen.err
    assert "== runs/first" in seen.out and "Too short to tell" in seen.out


def test_plot_draws_what_can_be_read(folder, half_and_bad, capsys):
    assert plot.main(["runs/picture.png", "runs/first", "runs/bad", "runs/half"]) == 2
    assert (folder / "runs/picture.png").read_bytes().startswith(b"\x89PNG")
    assert "runs/bad" in capsys.readouterr().err


# --- two processes -----------------------------------------------------------------------------------------
def worker(rank, world, model, parts, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world)
    torch.save(both_updates(model, parts[rank]), f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


def both_updates(model, part):
    """-> loss and gradient (after the sum over ranks) of one RL and one SFT update on this rank's (rows,
    advantages)"""
    out, (data, adv) = [], part
    set_old_logprobs(model, data, 0.0, 16_384)
    for kind in ("rl", "sft"):
        m, kept = copy.deepcopy(model), []
        loss = rl_backward(m, data, adv)["loss"] if kind == "rl" else sft_backward(m, data)["sft_loss"]
        optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
        optimizer.register_step_pre_hook(lambda *a: kept.extend(p.grad.clone() for p in m.parameters()))
        optimizer_step(m, optimizer, max_norm=1e9)
        out.append((loss, kept))
    return out


@pytest.mark.parametrize("split", [4, 6, 8])     # 4 + 4, 6 + 2, 8 + 0 rows: also a rank with nothing
def test_two_processes_equal_one(model, tmp_path, split):
    data = episodes(4)
    adv = advantages([float(i % 2) for i in range(8)], [r.group_id for r in data])
    parts = [(data[:split], adv[:split]), (data[split:], adv[split:])]
    mp.spawn(worker, (2, model, parts, tmp_path), nprocs=2)
    of_ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1)]
    for one, *ranks in zip(both_updates(model, (data, adv)), *of_ranks):
        for loss, grads in ranks:
            assert loss == pytest.approx(one[0], rel=1e-6) and close(grads, one[1])
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][1], ranks[1][1]))


@pytest.mark.parametrize("name, flags", [
    ("none", []),
    ("prs", ["--signal", "prs", "--schedule", "interleaved", "--phases", "1:1", "--ets_window", "1",
             "--sft_batch", "22"])])
def test_torchrun_equals_one_process(folder, name, flags):
    """The whole script: rollouts, signal, updates, evaluation. Episodes are seeded one by one, so even the
    samples agree."""
    args = [*RUN, *flags, "--steps", "2", "--threads", "1"]
    two = command(*args, "--out", f"runs/two-{name}", n=2, cwd=folder)
    assert two.returncode == 0, two.stderr
    assert train.cli([*args, "--out", f"runs/one-{name}"]) == 0
    close_records(rows(f"runs/two-{name}"), rows(f"runs/one-{name}"))
    of_both = [read_records(f"runs/{n}-{name}/episodes.jsonl") for n in ("two", "one")]
    two, one = [[(e["step"], e["group"], e["sample"], e["ids"]) for e in episodes] for episodes in of_both]
    assert two == one                            # the best and the worst of all processes, not of the first


def test_torchrun_mistake(folder):
    done = command(*RUN, "--steps", "1", "--out", "runs/first", n=2, cwd=folder)
    assert done.returncode != 0
    assert done.stderr.count("train.py: error: the run folder runs/first exists") == 1


def test_a_failure_on_one_of_two_nodes_ends_both(folder):
    """Two torchrun agents, as on two machines; a signal of one's own that fails on rank 1 while rank 0 waits
    in a collective."""
    (folder / "fork.py").write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import supervision, train

class Failing(supervision.Signal):
    def observe(self, step, episodes):
        if step == 1 and os.environ["RANK"] == "1":
            raise RuntimeError("the disk is full")

supervision.SIGNALS["failing"] = Failing
sys.exit(train.cli())""")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--", "fork.py", *RUN,
             "--signal", "failing", "--steps", "3", "--eval_every", "-1", "--out", "runs/failing"]
    nodes = []
    for _ in range(2):
        nodes.append(subprocess.Popen(agent, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      text=True))
    said, first = [], time.time()
    for node in nodes:
        said.append(node.communicate(timeout=240)[1])
        first = first if said[1:] else time.time()
    assert time.time() - first < 60 and all(node.returncode for node in nodes)
    assert "RuntimeError: the disk is full" in "".join(said)
    assert [r["step"] for r in steps_of("runs/failing")] == [0]


def test_two_processes_start_from_the_shipped_base(tmp_path):
    """python train.py in an empty folder: nothing is made first. The base has seen the control tokens where
    they belong, and calls tools."""
    done = command(*RUN, "--model", "tiny", "--steps", "1", "--out", "fresh", cwd=tmp_path, n=2)
    assert done.returncode == 0, done.stderr
    assert "results/base, 0.7" in done.stdout and (tmp_path / "fresh/checkpoints/latest").exists()
    probed, = [r for r in rows(tmp_path / "fresh") if r["step"] == 0 and "p/open|call" in r]
    assert probed["p/open|call"] > 0.8 and 0 < probed["p/open|text"] < 0.1
    assert list(tmp_path.iterdir()) == [tmp_path / "fresh"]


def test_the_shipped_base_fits_the_world():
    """Its tokenizer is the one that make_base.py makes of today's texts, and every word of a task is a
    token; its file stays small."""
    shipped = AutoTokenizer.from_pretrained(train.BASE)
    made = make_base.tiny_tokenizer()
    assert shipped.get_vocab() == made.get_vocab() and shipped.chat_template == made.chat_template
    assert (train.BASE / "model.safetensors").stat().st_size < 3_000_000
    recipe = json.loads((train.BASE / "recipe.json").read_text())
    assert recipe["world"] == train.world_checksum() and recipe["malformed"] == 0.005


def test_a_world_that_the_shipped_base_does_not_know(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(tools.CALL_HELP, "A", "A call is written\n<call tool>")
    assert train.cli(["--steps", "1", "--out", str(tmp_path / "r")]) == 2
    err = capfd.readouterr().err.strip()
    assert "\n" not in err and "another world" in err and "make_base.py" in err
    assert not (tmp_path / "r").exists()


def test_a_base_is_measured(tmp_path, capsys, monkeypatch):
    """make_base.py adds what it reached to its page; a row of the same name is replaced."""
    page = tmp_path / "README.md"
    page.write_text("| base | ... |\n| for tests, seed 3 | old |\n| main, seed 0 | kept |\n")
    monkeypatch.setattr(make_base, "PAGE", page)
    monkeypatch.setattr(measure_base, "PAGE", page)
    make_base.main(["--size", "for tests", "--seed", "3", "--eval_tasks", "2", "--out", str(tmp_path / "b")])
    first, kept, row = page.read_text().splitlines()
    assert kept == "| main, seed 0 | kept |" and row.startswith("| for tests, seed 3 | 0.0")
    assert row == capsys.readouterr().out.strip().splitlines()[-1] and row.count("|") == 9
    assert json.loads((tmp_path / "b/recipe.json").read_text())["seed"] == 3


# --- shards ------------------------------------------------------------------------------------------------
def near(a, b):
    """Equal records; numbers up to rounding"""
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            expected = pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value
            assert other[name] == expected, name


def test_sharded_over_two_processes_is_one_process(folder):
    """FSDP2 over two processes, unequal work (5 rows, micro-batches of one or two): metrics and weights of
    one plain process; and its checkpoint continues on ONE process to the same numbers."""
    args = [*RUN, "--signal", "sft", "--schedule", "synchronous", "--sft_batch", "27",
            "--kl_weight", "0.01", "--micro_tokens", "600", "--steps", "3", "--save_every", "2",
            "--probe_every", "2", "--eval_every", "-1", "--threads", "1"]
    assert train.cli([*args, "--out", "runs/plain"]) == 0
    done = command(*args, "--shard", "--out", "runs/sharded", cwd=folder, n=2)
    assert done.returncode == 0, done.stderr
    config = json.loads((train.newest_checkpoint("runs/sharded") / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    near(rows("runs/plain"), rows("runs/sharded"))
    a, b = weights("runs/plain"), weights("runs/sharded")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    (folder / "runs/sharded/checkpoints/latest").write_text("step-2")
    assert command(*args, "--shard", "--out", "runs/sharded", "--resume", cwd=folder).returncode == 0
    near(rows("runs/plain"), rows("runs/sharded"))


def test_a_probe_on_one_rank_leaves_the_sharded_ranks_in_step(folder):
    """Rank 0 alone runs the model in the probe; the backward pass right after it must gather the same layers
    on both."""
    args = [*RUN, "--signal", "sft", "--schedule", "sft", "--sft_batch", "22", "--probe_every",
            "1", "--eval_every", "-1", "--shard"]
    done = command(*args, "--out", "runs/instep", cwd=folder, n=2)
    assert done.returncode == 0, done.stderr
    assert [(r["sft_updates"], r["skipped_updates"]) for r in steps_of("runs/instep")] == [(9, 0)]


def test_a_sharded_update_without_any_mixed_group(folder):
    """The trainer's log-probabilities were just measured, so the root's weights are whole; and there is no
    backward pass to cut them."""
    args = [*RUN, "--shard", "--compute_dtype", "bfloat16", "--correction", "2", "--steps", "1",
            "--eval_every", "-1"]
    done = command(*args, "--out", "runs/unmixed", cwd=folder)
    assert done.returncode == 0, done.stderr
    step, = steps_of("runs/unmixed")
    assert step["mixed_groups"] == step["grad_norm"] == step["skipped_updates"] == 0 and step["tokens"] > 0


def test_bfloat16_compute_keeps_float32_masters(folder):
    args = [*RUN, "--signal", "sft", "--schedule", "sft", "--sft_epochs", "1", "--sft_batch", "22",
            "--eval_every", "-1"]
    sharded = ["--shard", "--compute_dtype", "bfloat16", "--grad_checkpointing", "--out", "runs/bf16"]
    assert command(*args, *sharded, cwd=folder).returncode == 0
    assert train.cli([*args, "--out", "runs/full"]) == 0
    short, full = ([r["sft_loss"] for r in steps_of(out)] for out in ("runs/bf16", "runs/full"))
    assert short == pytest.approx(full, rel=0.02) and short != full
    assert all(v.dtype == torch.float32 for v in weights("runs/bf16").values())


# --- other models ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, options, words", [
    ("Granite", {"logits_scaling": 8}, "Granite scales, bounds or shifts its logits"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
     "Qwen2 has full_attention, sliding_attention layers")])
def test_models_that_the_passes_here_would_compute_wrongly(folder, tokenizer, capfd, kind, options, words):
    """Granite divides its logits behind the output layer; a window is no full attention"""
    import transformers
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, **options)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder / f"odd/{kind}")
    tokenizer.save_pretrained(folder / f"odd/{kind}")
    assert train.cli([*RUN, "--model", f"odd/{kind}", "--out", "runs/odd"]) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize("kind, flags", [("Qwen2", []), ("Qwen3", ["--chat_template", "qwen3-no-think"])])
def test_real_vocabulary_size_and_qwen3(folder, tokenizer, kind, flags):
    """Random models with the 151,936 output rows of Qwen2.5 and Qwen3, most of which no tokenizer entry
    stands behind: sampling, both losses, the probe, a checkpoint that loads again."""
    import transformers
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, max_position_embeddings=4096,
        eos_token_id=2, bos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    args = [*RUN, "--model", kind, *flags, "--prompts", "2", "--group", "2", "--updates", "1",
            "--max_message_tokens", "12", "--signal", "sft", "--schedule", "synchronous", "--sft_batch", "2",
            "--steps", "1", "--reward", "random", "--out", f"runs/{kind}"]
    assert train.cli(args) == 0
    step, = steps_of(f"runs/{kind}")
    assert step["gap"] < 1e-5 and step["skipped_updates"] == 0
    assert step["sft_loss"] == pytest.approx(11.9, abs=0.5)          # log 151,936
    assert train.cli([*RUN, "--eval_only", "--model", f"runs/{kind}", *flags,
                      "--max_message_tokens", "12"]) == 0
