"""The run: the real command line, resuming, checkpoints, mistakes, two processes."""
import copy
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, RUN, rows
from safetensors.torch import load_file
from test_losses import close, episodes

import analyze_tokens
import train
from analyze_tokens import collapse
from rl_step import advantages, rl_backward
from sft_step import optimizer_step, sft_backward
from tools import STATES


def weights(out):
    return load_file(train.newest_checkpoint(out) / "model.safetensors")


def command(*args, n=None, **kw):
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "--"] if n else [
        sys.executable]
    return subprocess.run([*head, str(ROOT / "train.py"), *args], capture_output=True, text=True, timeout=240, **kw)


def test_the_run_folder(folder):
    out = folder / "runs/first"
    steps = rows(out)
    assert [r["step"] for r in steps] == [0, 0, 0, 1, 2, 2]
    assert "p/open|text" in steps[0] and "eval/average" in steps[1] and "p/open|text" in steps[-2] and "eval/average" in steps[-1]
    step = steps[2]
    assert sum(step[f"state/{s}"] for s in STATES) == pytest.approx(1, abs=1e-4)
    assert step["gap"] < 1e-5 and step["tokens"] > 0 and 0 <= step["mixed_groups"] <= 1
    assert json.loads((out / "config.json").read_text())["steps"] == 2
    spoken = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert {e["step"] for e in spoken} == {0, 1} and "<|im_start|>" in spoken[0]["text"]
    names = {p.name for p in train.newest_checkpoint(out).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "state.pt", "MANIFEST.json"} <= names


def test_command_line(folder):
    """The command of README (smaller): status 0, a table, and a second call that refuses to overwrite."""
    args = [*RUN, "--steps", "1", "--out", "runs/cli"]
    done = command(*args, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout and "content_ood" in done.stdout and "runs/cli/metrics.jsonl" in done.stdout
    before = (folder / "runs/cli/metrics.jsonl").read_bytes()
    again = command(*args, cwd=folder)
    assert again.returncode == 2 and again.stderr.strip().count("\n") == 0 and "--resume" in again.stderr
    assert (folder / "runs/cli/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("schedule, phases", [("sft", ["sft"] * 3), ("sft_then_rl", ["sft"] * 3 + ["rl"] * 2)])
def test_sft_schedules(folder, schedule, phases):
    out = f"runs/{schedule}"
    assert train.cli([*RUN, "--signal", "sft", "--schedule", schedule, "--sft_steps", "3", "--steps", "2", "--sft_batch", "4",
                      "--out", out]) == 0
    steps = [r for r in rows(out) if "phase" in r]
    assert [r["phase"] for r in steps] == phases
    assert steps[2]["sft_loss"] < steps[0]["sft_loss"]


def test_adaptive_fires_when_the_alarm_rings_and_keeps_to_its_budget(folder, monkeypatch):
    """The probe's values are scripted; the run is real: bursts at the probes after the alarm, none once the budget is spent, and
    the same from a checkpoint in the middle of the alarm."""
    values = [.01, .01, .01, .05, .05, .05, .05, .05, .001]              # rings at the fifth probe (two above .03)
    real = train.probe
    monkeypatch.setattr(train, "probe", lambda *a, **kw: real(*a, **kw) | {"p/open|text": values[next(count)]})
    args = [*RUN, "--signal", "sft", "--schedule", "adaptive", "--steps", "8", "--probe_every", "1", "--burst_rows", "6",
            "--sft_budget", "13", "--sft_batch", "4", "--eval_every", "-1", "--save_every", "6", "--threads", "1"]
    count = itertools.count()
    assert train.cli([*args, "--out", "runs/adaptive"]) == 0
    steps = [r for r in rows("runs/adaptive") if "phase" in r]
    assert [r["phase"] for r in steps] == ["rl"] * 4 + ["phase+rl"] * 2 + ["rl"] * 2           # 2 x 6 rows; 18 would exceed 13
    assert [(r["sft_visits"], r["sft_updates"]) for r in steps[4:6]] == [(6, 2)] * 2 and "reward" in steps[4]
    assert [r["alarm"] for r in rows("runs/adaptive") if "alarm" in r] == [0] * 4 + [1] * 5
    (folder / "runs/adaptive/checkpoints/latest").write_text("step-6")
    count = itertools.count(6)
    assert train.cli([*args, "--out", "runs/adaptive", "--resume"]) == 0
    assert [r for r in rows("runs/adaptive") if "phase" in r] == steps


def test_random_trigger_spends_the_same_budget():
    a = train.parse_args(["--signal", "ets", "--schedule", "adaptive", "--trigger", "random", "--steps", "100"])
    times = train.random_bursts(a)
    assert len(times) == a.sft_budget // a.burst_rows and all(0 < t < 100 and t % a.probe_every == 0 for t in times)
    a.seed = 1
    assert train.random_bursts(a) != times


def test_stop_on_alarm(folder, monkeypatch, capfd):
    values, count, real = [.01, .01, .01, .05, .05], itertools.count(), train.probe
    monkeypatch.setattr(train, "probe", lambda *a, **kw: real(*a, **kw) | {"p/open|text": values[next(count)]})
    assert train.cli([*RUN, "--steps", "9", "--probe_every", "1", "--eval_every", "-1", "--stop_on_alarm", "--out", "runs/stop"]) == 0
    assert [r["step"] for r in rows("runs/stop") if "phase" in r] == [0, 1, 2, 3]
    assert (folder / "runs/stop/checkpoints/latest").read_text() == "step-4" and "ALARM" in capfd.readouterr().out


def test_what_the_advantages_are_made_of():
    def credits(reward, step=0, seed=0):
        episodes = [SimpleNamespace(reward=float(k < 3), states=["call", "polluted" if k % 2 else "reply"], group_id=g, sample=k)
                    for k in range(8) for g in range(12)]
        made = train.credits(episodes, train.parse_args(["--reward", reward, "--seed", str(seed)]), step)
        return [[c for c, e in zip(made, episodes) if e.group_id == g] for g in range(12)]
    assert credits("task") == [[1, 1, 1, 0, 0, 0, 0, 0]] * 12
    assert credits("format") == [[1.5, 1, 1.5, 0, 0.5, 0, 0.5, 0]] * 12
    coins = [c for s in range(10) for g in credits("random", s) for c in g]
    assert set(coins) == {0.0, 1.0} and 0.15 < sum(coins) / len(coins) < 0.25
    dealt = credits("shuffled")
    assert all(sorted(g) == [0, 0, 0, 0, 0, 1, 1, 1] for g in dealt) and len(set(map(tuple, dealt))) > 6
    assert dealt == credits("shuffled") != credits("shuffled", step=1) and dealt != credits("shuffled", seed=1)


def test_killed_run_resumes_to_the_same_numbers(folder):
    """kill -9 in the middle, then --resume: metrics and weights equal those of a run that nobody interrupted, bit by bit."""
    args = [*RUN, "--signal", "sft", "--schedule", "sft_then_rl", "--sft_steps", "2", "--steps", "5", "--save_every", "2",
            "--kl_weight", "0.01", "--sft_batch", "4", "--threads", "1", "--eval_every", "2", "--probe_every", "3"]
    assert command(*args, "--out", "runs/whole", cwd=folder).returncode == 0
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args, "--out", "runs/killed"], cwd=folder,
                               stdout=subprocess.DEVNULL)
    metrics = folder / "runs/killed/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 9:   # step 3 is logged, the last checkpoint is step 2
        time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "runs/killed/checkpoints/latest").read_text() in ("step-2", "step-4")
    with open(metrics, "a") as f:
        f.write('{"step": 4, "rew')                                      # as if the kill had hit a write
    assert command(*args, "--out", "runs/killed", "--resume", cwd=folder).returncode == 0
    assert rows("runs/killed") == rows("runs/whole")
    a, b = weights("runs/killed"), weights("runs/whole")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_resume_before_the_first_checkpoint(folder):
    """A run killed before it saved anything starts over."""
    args = [*RUN, "--steps", "1", "--out", "runs/early"]
    assert train.cli(args) == 0
    whole = rows("runs/early")
    (folder / "runs/early/checkpoints/latest").unlink()
    assert train.cli([*args, "--resume"]) == 0 and rows("runs/early") == whole


def test_a_damaged_log_is_refused_and_kept(folder, capfd):
    """Half a last line is normal after a kill; a damaged line in the middle is not, and must not cost the lines behind it."""
    args = [*RUN, "--steps", "1", "--out", "runs/log"]
    assert train.cli(args) == 0
    log = folder / "runs/log/metrics.jsonl"
    text = "x" + log.read_text()
    log.write_text(text)
    assert train.cli([*args, "--resume"]) == 2 and "line 1 of runs/log/metrics.jsonl is damaged" in capfd.readouterr().err
    assert log.read_text() == text


def test_eval_only(folder, capsys):
    capsys.readouterr()
    assert train.cli([*RUN, "--eval_only", "--model", "runs/first", "--out", "runs/scores"]) == 0
    assert "format_ood" in capsys.readouterr().out
    scores = json.loads((folder / "runs/scores/eval.json").read_text())
    assert scores["average"] == pytest.approx(rows("runs/first")[-1]["eval/average"], abs=1e-6)
    assert [p.name for p in (folder / "runs/scores").iterdir()] == ["eval.json"]
    assert train.cli([*RUN, "--eval_only", "--model", str(train.newest_checkpoint("runs/first"))]) == 0   # an HF folder


@pytest.mark.parametrize("args, words", [
    (["--steps", "-1"], "--steps -1"),
    (["--lr", "nan"], "--lr nan"),
    (["--group", "1"], "--group 1"),
    (["--updates", "9"], "--updates 9"),
    (["--save_every", "0"], "--save_every 0"),
    (["--base_wrong", "1.5"], "--base_wrong 1.5"),
    (["--tiny_hidden", "33"], "--tiny_hidden 33"),
    (["--loss", "ppo"], "invalid choice: 'ppo'"),
    (["--correction_cap", "0.5"], "--correction_cap 0.5"),
    (["--correction", "token", "--retokenize"], "--retokenize has none"),
    (["--compute_dtype", "bfloat16"], "--compute_dtype bfloat16 beside --dtype float32 needs --shard"),
    (["--alarm", "p/nothing"], "--alarm p/nothing is not one of the probe's probabilities"),
    (["--alarm", "p/calls_exact"], "--alarm p/calls_exact is not one"),
    (["--signal", "ets", "--schedule", "adaptive", "--sft_budget", "5"], "--sft_budget 5 does not pay for one burst"),
    (["--signal", "ets", "--schedule", "adaptive", "--probe_every", "-1"], "the alarm listens to the probe"),
    (["--signal", "sft"], "--signal sft does not go with --schedule rl"),
    (["--schedule", "sft"], "--signal none does not go with --schedule sft"),
    (["--resume", "--eval_only"], "exclude each other"),
    (["--model", "no/such/model"], "cannot load the model no/such/model"),
    (["--model", "."], "cannot load the model ."),
    (["--chat_template", "missing.jinja"], "missing.jinja is not a file"),
    (["--out", "runs/first"], "runs/first exists"),
    (["--out", "runs/nowhere", "--resume"], "no run in runs/nowhere"),
    (["--out", "runs/first", "--resume", "--steps", "3"], "started with --steps 2, not 3"),
    (["--max_total_tokens", "30"], "--max_total_tokens 30"),
    (["--signal", "sft", "--schedule", "sft", "--max_messages", "1"], "does not fit into the limits"),
])
def test_mistakes_are_one_sentence(folder, capfd, args, words):
    before = sorted(p for p in folder.rglob("*"))
    argv = [*RUN, "--steps", "2", "--eval_tasks", "2", *([] if "--out" in args else ["--out", "runs/new"]), *args]
    try:
        status = train.cli(argv)
    except SystemExit as error:
        status = error.code
    err = capfd.readouterr().err.strip().splitlines()
    assert status == 2 and words in err[-1] and "Traceback" not in "\n".join(err)
    written = {p for p in folder.rglob("*")} - set(before)
    assert not written, "a mistake must not leave anything behind"


def test_a_missing_vllm_is_one_sentence(folder, capfd, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())                # its settings for vLLM are not for the other tests
    monkeypatch.setitem(sys.modules, "vllm", None)                       # import vllm now raises ImportError
    before = set(folder.rglob("*"))
    assert train.cli([*RUN, "--engine", "vllm", "--out", "runs/new"]) == 2 and set(folder.rglob("*")) == before
    err = capfd.readouterr().err.strip()
    assert "\n" not in err and "pip install" in err and "--engine hf" in err


def test_correction_flags(folder):
    """HBG with all corrected: the sampler is the trained model itself, so the policy's rollouts have no gap."""
    assert train.cli([*RUN, "--signal", "hbg", "--correction", "sequence", "--correct", "policy", "hinted", "--steps", "1",
                      "--reward", "random", "--out", "runs/corrected"]) == 0
    step = next(r for r in rows("runs/corrected") if "phase" in r)
    assert 0 < step["gap"] < 1e-5 and step["gap"] < step["gap_max"] < 1e-4
    assert step["grad_norm"] > 0 and step["hint_log_ratio"] != 0


@pytest.mark.parametrize("damage, words", [
    (lambda path: (path / "model.safetensors").write_bytes(b"x" + (path / "model.safetensors").read_bytes()[1:]), "is damaged"),
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


def test_endless_stream():
    items = list(range(5))
    stream = train.endless(items, 0, 20, "s")
    assert all(sorted(stream[i:i + 5]) == items for i in range(0, 20, 5)) and stream[:5] != stream[5:10]
    assert stream[7:13] == train.endless(items, 7, 6, "s")               # position in, same items out


def test_collapse_is_named():
    state = lambda call: {f"state/{s}": 0.0 for s in STATES} | {"state/call": call, "state/polluted": 1 - call}
    curve = [0.1] * 10 + [0.4] * 20
    fallen = curve + [0.01] * 10
    as_rows = lambda rewards: [{"step": i, "reward": r, **state(r)} for i, r in enumerate(rewards)]
    assert collapse(as_rows(curve)) is None
    assert collapse(as_rows(curve + [0.0] * 6 + [0.4] * 10)) is None       # it recovered
    found = collapse(as_rows(fallen))
    assert 30 < found["step"] <= 35 and found["peak"] == pytest.approx(0.4)
    assert found["before"]["polluted"] == pytest.approx(0.6) and found["after"]["polluted"] == pytest.approx(0.99)


def test_analyze_reads_runs(folder, capsys):
    """Whole, half-written and damaged run folders: what can be read is printed, what cannot is said."""
    half = folder / "runs/half"
    half.mkdir()
    lines = (folder / "runs/first/metrics.jsonl").read_text()
    (half / "metrics.jsonl").write_text(lines[:-20])
    (folder / "runs/bad").mkdir(exist_ok=True)
    (folder / "runs/bad/metrics.jsonl").write_text("x\n" + lines)
    capsys.readouterr()
    assert analyze_tokens.main(["runs/first", "runs/half"]) == 0
    out = capsys.readouterr().out
    assert out.count("No collapse") == 2 and "before     after" in out and "polluted" in out
    assert analyze_tokens.main(["runs/bad", "runs/nothing", "runs/first"]) == 2
    seen = capsys.readouterr()
    assert "line 1 of runs/bad/metrics.jsonl is damaged" in seen.err and "runs/nothing/metrics.jsonl does not exist" in seen.err
    assert "== runs/first" in seen.out and "No collapse" in seen.out
    assert analyze_tokens.main(["--plot", "runs/picture.png", "runs/first", "runs/bad", "runs/half"]) == 2   # draws the rest
    assert (folder / "runs/picture.png").read_bytes().startswith(b"\x89PNG")
    assert "runs/bad" in capsys.readouterr().err


# --- two processes -----------------------------------------------------------------------------------------------------
def worker(rank, world, model, parts, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world)
    torch.save(both_updates(model, parts[rank]), f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


def both_updates(model, part):
    """-> loss and gradient (after the sum over ranks) of one RL and one SFT update on this rank's (rows, advantages)"""
    out, rows, adv = [], *part
    for backward in (lambda m: rl_backward(m, rows, adv)["loss"], lambda m: sft_backward(m, rows)["sft_loss"]):
        m, kept = copy.deepcopy(model), []
        loss = backward(m)
        optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
        optimizer.register_step_pre_hook(lambda *a: kept.extend(p.grad.clone() for p in m.parameters()))
        optimizer_step(m, optimizer, max_norm=1e9)
        out.append((loss, kept))
    return out


@pytest.mark.parametrize("split", [4, 6, 8])                             # 4 + 4, 6 + 2, 8 + 0 rows: also a rank with nothing
def test_two_processes_equal_one(model, tmp_path, split):
    data = episodes(4)
    adv = advantages([float(i % 2) for i in range(8)], [r.group_id for r in data])
    parts = [(data[:split], adv[:split]), (data[split:], adv[split:])]
    mp.spawn(worker, (2, model, parts, tmp_path), nprocs=2)
    for one, *ranks in zip(both_updates(model, (data, adv)), *(torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))):
        for loss, grads in ranks:
            assert loss == pytest.approx(one[0], rel=1e-6) and close(grads, one[1])
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][1], ranks[1][1]))


@pytest.mark.parametrize("name, flags", [
    ("none", []), ("prs", ["--signal", "prs", "--schedule", "interleaved", "--phases", "1:1", "--ets_window", "1", "--sft_batch", "8"])])
def test_torchrun_equals_one_process(folder, name, flags):
    """The whole script: rollouts, signal, updates, evaluation. Episodes are seeded one by one, so even the samples agree."""
    args = [*RUN, *flags, "--steps", "2", "--threads", "1"]
    two = command(*args, "--out", f"runs/two-{name}", n=2, cwd=folder)
    assert two.returncode == 0, two.stderr
    assert train.cli([*args, "--out", f"runs/one-{name}"]) == 0
    a, b = rows(f"runs/two-{name}"), rows(f"runs/one-{name}")
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert one.pop("phase", "") == other.pop("phase", "")
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_torchrun_mistake(folder):
    done = command(*RUN, "--steps", "1", "--out", "runs/first", n=2, cwd=folder)
    assert done.returncode != 0 and done.stderr.count("train.py: error: the run folder runs/first exists") == 1


def test_a_failure_on_one_of_two_nodes_ends_both(folder):
    """Two torchrun agents, as on two machines; a signal of one's own that fails on rank 1 while rank 0 waits in a collective."""
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
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"localhost:{port}", "--", "fork.py", *RUN, "--signal", "failing", "--steps", "3", "--eval_every", "-1",
               "--out", "runs/failing"]
    nodes = [subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said, first = [], time.time()
    for node in nodes:
        said.append(node.communicate(timeout=240)[1])
        first = first if said[1:] else time.time()
    assert time.time() - first < 60 and all(node.returncode for node in nodes)
    assert "RuntimeError: the disk is full" in "".join(said)
    assert [r["step"] for r in rows("runs/failing") if "phase" in r] == [0]


def test_sharded_over_two_processes_is_one_process(folder):
    """FSDP2 over two processes, unequal work (5 rows, micro-batches of one or two): metrics and weights of one plain process;
    and its checkpoint continues on ONE process, without padding, to the same numbers."""
    args = [*RUN, "--tiny_layers", "2", "--signal", "sft", "--schedule", "synchronous", "--sft_batch", "5", "--kl_weight", "0.01",
            "--micro_tokens", "600", "--steps", "3", "--save_every", "2", "--probe_every", "2", "--eval_every", "-1", "--threads", "1"]
    assert train.cli([*args, "--out", "runs/plain"]) == 0
    done = command(*args, "--shard", "--out", "runs/sharded", cwd=folder, n=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((train.newest_checkpoint("runs/sharded") / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    near = lambda a, b: all(r.keys() == q.keys() and all(
        q[k] == (pytest.approx(v, rel=1e-3, abs=1e-6) if isinstance(v, float) else v) for k, v in r.items()) for r, q in zip(a, b, strict=True))
    assert near(rows("runs/plain"), rows("runs/sharded"))
    a, b = weights("runs/plain"), weights("runs/sharded")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    (folder / "runs/sharded/checkpoints/latest").write_text("step-2")
    assert command(*args, "--shard", "--packed", "--out", "runs/sharded", "--resume", cwd=folder).returncode == 0
    assert near(rows("runs/plain"), rows("runs/sharded"))


def test_a_probe_on_one_rank_leaves_the_sharded_ranks_in_step(folder):
    """Rank 0 alone runs the model in the probe; the backward pass right after it must gather the same layers on both."""
    args = [*RUN, "--tiny_layers", "2", "--signal", "sft", "--schedule", "sft", "--sft_steps", "3", "--sft_batch", "4", "--probe_every", "1",
            "--eval_every", "-1", "--shard"]
    done = command(*args, "--out", "runs/instep", cwd=folder, n=2)
    assert done.returncode == 0, done.stderr
    assert [r["skipped_updates"] for r in rows("runs/instep") if "phase" in r] == [0, 0, 0]


def test_a_sharded_update_without_any_mixed_group(folder):
    """The trainer's log-probabilities were just measured, so the root's weights are whole; and there is no backward pass to cut them."""
    args = [*RUN, "--tiny_layers", "2", "--shard", "--compute_dtype", "bfloat16", "--correction", "token", "--steps", "1", "--eval_every", "-1"]
    assert command(*args, "--out", "runs/unmixed", cwd=folder).returncode == 0
    step = next(r for r in rows("runs/unmixed") if "phase" in r)
    assert step["mixed_groups"] == step["grad_norm"] == step["skipped_updates"] == 0 and step["tokens"] > 0


def test_bfloat16_compute_keeps_float32_masters(folder):
    args = [*RUN, "--signal", "sft", "--schedule", "sft", "--sft_steps", "3", "--sft_batch", "4", "--eval_every", "-1"]
    assert command(*args, "--shard", "--compute_dtype", "bfloat16", "--grad_checkpointing", "--out", "runs/bf16", cwd=folder).returncode == 0
    assert train.cli([*args, "--out", "runs/full"]) == 0
    losses = [[r["sft_loss"] for r in rows(out) if "sft_loss" in r] for out in ("runs/bf16", "runs/full")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    assert all(v.dtype == torch.float32 for v in weights("runs/bf16").values())


@pytest.mark.parametrize("kind, flags", [("Qwen2", []), ("Qwen3", ["--chat_template", "qwen3-no-think"])])
def test_real_vocabulary_size_and_qwen3(folder, tokenizer, kind, flags):
    """Random models with the 151,936 output rows of Qwen2.5 and Qwen3, most of which no tokenizer entry stands behind: sampling,
    both losses, the probe, a checkpoint that loads again."""
    import transformers
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, tie_word_embeddings=True, max_position_embeddings=4096, eos_token_id=2, bos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    args = [*RUN, "--model", kind, *flags, "--prompts", "2", "--group", "2", "--updates", "1", "--max_message_tokens", "12", "--signal", "sft",
            "--schedule", "synchronous", "--sft_batch", "2", "--steps", "1", "--reward", "random", "--out", f"runs/{kind}"]
    assert train.cli(args) == 0
    step = next(r for r in rows(f"runs/{kind}") if "phase" in r)
    assert step["gap"] < 1e-5 and step["sft_loss"] == pytest.approx(11.9, abs=0.5) and step["skipped_updates"] == 0      # log 151,936
    assert train.cli([*RUN, "--eval_only", "--model", f"runs/{kind}", *flags, "--max_message_tokens", "12"]) == 0


def test_two_processes_make_the_base_model_first(tmp_path):
    """torchrun in an empty folder: rank 0 pre-trains alone, and nobody waits for the others inside it."""
    done = command(*RUN, "--steps", "1", "--eval_every", "-1", "--out", "runs/fresh", cwd=tmp_path, n=2)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("tiny-base-*"))) == 1 and (tmp_path / "runs/fresh/checkpoints/latest").exists()
