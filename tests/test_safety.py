"""Nothing is lost, nothing is let in: runs that are killed anywhere, two writers, damaged files, wrong weights,
and a judge that does whatever a server can do."""
import builtins
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rows
from safetensors.torch import load_file, save_file

import analyze_tokens
import plot
import supervision
import train
from analyze_tokens import newest_checkpoint, publish, read_records, saved_steps
from rollout import Chat
from supervision import SFT, Judge, usable
from test_supervision import options
from tools import UserError

# A run of a second
SMALL = ["--prompts", "2", "--group", "2", "--updates", "1", "--eval_tasks", "1", "--train_tasks", "6",
         "--max_message_tokens", "12", "--max_messages", "16", "--probe_every", "1", "--reward", "random",
         "--threads", "1"]
ETS = ["--signal", "ets", "--schedule", "synchronous", "--ets_window", "2"]


def everything(out):
    """What must be the same after an interruption: metrics (without times), conversations, weights"""
    episodes = (Path(out) / "episodes.jsonl").read_text()
    return rows(out), episodes, load_file(newest_checkpoint(out) / "model.safetensors")


def same(a, b):
    return a[:2] == b[:2] and a[2].keys() == b[2].keys() and all(torch.equal(a[2][k], b[2][k]) for k in a[2])


# --- kills -------------------------------------------------------------------------------------------------
def in_a_child(work):
    """Runs work() in a forked process, whose death is as sudden as that of a real run -> its pid"""
    pid = os.fork()
    if pid == 0:
        for stream in (1, 2):
            os.dup2(os.open("children.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        status = 1
        try:
            status = work()
        finally:
            os._exit(status)
    return pid


def ended(pids):
    """-> how they ended: 0, a status, or minus the signal"""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def start(args, n=1):
    """The command line, in n processes as torchrun starts them -> pids"""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]

    def rank(r):
        if n > 1:
            os.environ |= {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n),
                           "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        return train.cli(args)
    return [in_a_child(lambda r=r: rank(r)) for r in range(n)]


def die_at(n):
    """The n-th write of this process does half of its work, and then the process is dead."""
    left = [n]

    def patched(real, half=lambda *args: None):
        def write(*args, **kw):
            left[0] -= 1
            if left[0] < 0:
                half(*args)
                os._exit(9)
            return real(*args, **kw)
        return write

    def half_a_text(path, text):
        with builtins.open(path, "w") as f:
            f.write(text[:len(text) // 2])

    def half_a_line(path, record):
        with builtins.open(path, "a") as f:
            f.write('{"step": 1, "rew')

    def half_a_folder(path, **kw):
        for file in sorted(Path(path).glob("*"))[::2]:
            file.unlink()
    os.replace, os.fsync = patched(os.replace), patched(os.fsync)
    torch.save, Path.write_text = patched(torch.save), patched(Path.write_text, half_a_text)
    shutil.rmtree = patched(shutil.rmtree, half_a_folder)
    train.log_line = analyze_tokens.log_line = patched(train.log_line, half_a_line)


def finish(args, out, n=1):
    """Runs or resumes until the end, as a person would who reads the sentences"""
    begun = (Path(out) / "config.json").exists()
    assert ended(start([*args, "--out", out, *(["--resume"] if begun else [])], n)) == [0] * n


def kill_at_writes(points, args, out, whole):
    """-> at how many of these write points the run was killed (the others lie behind its end)"""
    killed = 0
    for point in points:
        shutil.rmtree(out, ignore_errors=True)
        killed += ended([in_a_child(lambda: die_at(point) or train.cli([*args, "--out", out]))]) == [9]
        finish(args, out)
        assert same(everything(out), whole), f"killed at write {point}"
    return killed


def kill_at_moments(seeds, args, out, whole, longest, n=1):
    """Each seed is a moment within `longest` seconds, and now and then the resumed run is killed too."""
    for seed in seeds:
        shutil.rmtree(out, ignore_errors=True)
        rng = random.Random(seed)
        for _ in range(rng.choice([1, 1, 2])):
            resume = ["--resume"] if (Path(out) / "config.json").exists() else []
            pids = start([*args, "--out", out, *resume], n)
            time.sleep(rng.uniform(0, longest))
            for pid in rng.sample(pids, n):
                os.kill(pid, signal.SIGKILL)
            ended(pids)
        finish(args, out, n)
        assert same(everything(out), whole), f"seed {seed}"


def whole_run(args, out, n=1):
    """-> all that an undisturbed run leaves, and its seconds"""
    began = time.time()
    finish(args, out, n)
    return everything(out), time.time() - began


KILLED = [*SMALL, "--eval_every", "-1", "--save_every", "1", "--keep", "1"]
THREE = [*KILLED, *ETS, "--steps", "3"]


def test_killed_at_write_points(folder):
    whole, _ = whole_run(THREE, "runs/written")
    assert kill_at_writes([0, 1, 9, 22, 31, 40, 49], THREE, "runs/cut", whole) == 7


def test_killed_at_random_moments(folder):
    whole, seconds = whole_run(THREE, "runs/undisturbed")
    kill_at_moments(range(3), THREE, "runs/hit", whole, seconds)


@pytest.mark.slow
def test_killed_at_every_write_point(folder):
    whole, _ = whole_run(THREE, "runs/all-written")
    print(kill_at_writes(range(100), THREE, "runs/all-cut", whole), "write points")


SCHEDULES = {
    "rl": ["--signal", "hbg", "--hints", "1"],
    "sft": ["--signal", "sft", "--sft_steps", "6"],
    "sft_then_rl": ["--signal", "sft", "--sft_steps", "2"],
    "interleaved": ["--signal", "prs", "--phases", "1:1", "--ets_window", "2", "--as_released", "--kl_weight",
                    "0.01"],
    "synchronous": ["--signal", "prs", "--ets_window", "2"],
    "adaptive": ["--signal", "ets", "--ets_window", "2", "--burst_rows", "2", "--sft_budget", "4"],
    "adaptive_random": ["--signal", "sft", "--burst_rows", "2", "--sft_budget", "4"]}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_at_thirty_moments(folder, schedule, n):
    args = [*KILLED, "--schedule", schedule, *SCHEDULES[schedule], "--steps", "4", "--sft_batch", "4"]
    whole, seconds = whole_run(args, f"runs/{schedule}-{n}", n)
    kill_at_moments(range(30), args, f"runs/{schedule}-{n}-killed", whole, seconds, n)
