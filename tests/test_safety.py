"""Nothing is lost, nothing is let in: runs that are killed anywhere, two writers, damaged files, wrong
weights, and a judge that does whatever a server can do."""
import builtins
import errno
import gzip
import json
import os
import random
import re
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
import train
from analyze_tokens import newest_checkpoint, saved_steps
from rollout import STATES
from supervision import SFT, Judge
from test_supervision import options
from tools import UserError

# A run of a second
SMALL = ["--model", "runs/tiny-base", "--prompts", "2", "--group", "2", "--updates", "1", "--eval_tasks", "1",
         "--train_tasks", "6", "--max_message_tokens", "12", "--max_messages", "16", "--probe_every", "1",
         "--reward", "random", "--threads", "1"]
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
        sys.stdout = sys.stderr = open("children.log", "a", buffering=1)
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

    def half_a_line(path, record, wandb=None):
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
    assert kill_at_writes([0, 9, 22, 31, 45], THREE, "runs/cut", whole) == 5


def test_killed_at_random_moments(folder):
    whole, seconds = whole_run(THREE, "runs/undisturbed")
    kill_at_moments(range(2), THREE, "runs/hit", whole, seconds)


@pytest.mark.slow
def test_killed_at_every_write_point(folder):
    whole, _ = whole_run(THREE, "runs/all-written")
    print(kill_at_writes(range(100), THREE, "runs/all-cut", whole), "write points")


SCHEDULES = {
    "rl": ["--signal", "hbg", "--hints", "1"],
    "sft": ["--signal", "sft", "--sft_epochs", "3"],
    "sft_then_rl": ["--signal", "sft", "--sft_epochs", "1"],
    "interleaved": ["--signal", "prs", "--phases", "1:1", "--ets_window", "2", "--as_released", "--kl_weight",
                    "0.01"],
    "synchronous": ["--signal", "prs", "--ets_window", "2"]}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_at_thirty_moments(folder, schedule, n):
    args = [*KILLED, "--schedule", schedule, *SCHEDULES[schedule], "--steps", "4", "--sft_batch", "4"]
    whole, seconds = whole_run(args, f"runs/{schedule}-{n}", n)
    kill_at_moments(range(30), args, f"runs/{schedule}-{n}-killed", whole, seconds, n)


# --- the judge ---------------------------------------------------------------------------------------------
ANSWER = json.dumps({"choices": [{"message": {"content": "because"}}]}).encode()


def reply(body, status=b"200 OK", head=b""):
    head += b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 %s\r\n%s\r\n%s" % (status, head, body)


def saying(content):
    return reply(json.dumps({"choices": [{"message": {"content": content}}]}).encode())


@pytest.fixture
def judge(openai, tmp_path, monkeypatch):
    """judge(behaviour) -> a Judge whose server calls behaviour(connection, request) each time"""
    values = {"cache": tmp_path / "cache", "timeout": 0.5, "retries": 0, "patience": 3.0, "workers": 4}
    for name, value in values.items():
        monkeypatch.setattr(Judge, name, value)
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key")
    listeners = []

    def make(behaviour):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        seen = []

        def serve(connection):
            with connection:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65_536)
                head, _, body = request.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)         # a GET has none
                while length and len(body) < int(length[1]):
                    body += connection.recv(65_536)
                seen.append((head, body))
                try:
                    behaviour(connection, len(seen))
                except OSError:                  # the judge has hung up
                    pass

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:                  # the test is over
                    return
                threading.Thread(target=serve, args=[connection], daemon=True).start()
        threading.Thread(target=accept, daemon=True).start()
        made = Judge(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m")
        made.seen = seen
        return made
    yield make
    for listener in listeners:
        listener.close()


def endless(connection, n, status=b"200 OK"):
    connection.sendall(b"HTTP/1.1 " + status + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")


def drip(head):
    def behaviour(connection, n):
        for byte in head + b"x" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    return behaviour


def sends(data, before=b"", calls=0):
    """The data; but `before` in the first calls"""
    return lambda connection, n: connection.sendall(before if n <= calls else data)


BEHAVIOURS = {
    "hangs": lambda connection, n: time.sleep(10),
    "endless": endless,
    "drips its body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"),
    "drips its head": drip(b"HTTP/1.1 200 OK\r\nX-Head: "),
    "says nothing": lambda connection, n: None,
    "bad status line": sends(b"BANANA\r\n\r\n"),
    "truncated": sends(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + ANSWER[:20]),
    "truncated chunks": sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\nabc"),
    "500": sends(reply(b"busy", b"500 Oh")),
    "429": sends(reply(b"slow down", b"429 Too many")),
    "400": sends(reply(b'{"error": "too long"}', b"400 Bad")),
    "endless 500": lambda connection, n: endless(connection, n, b"500 Oh"),
    "html": sends(reply(b"<html>busy</html>")),
    "not UTF-8": sends(reply(b'{"choices": [{"message": {"content": "\xff"}}]}')),
    "gzip": sends(reply(b"\x1f\x8b" + bytes(50), head=b"Content-Encoding: gzip\r\n")),
    "a bomb": sends(reply(gzip.compress(ANSWER + b" " * 9_000_000), head=b"Content-Encoding: gzip\r\n")),
    "nothing": sends(reply(b"", b"204 None")),
    "text": sends(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nbusy"),
    "wait an hour": sends(reply(b"", b"503 Oh", b"Retry-After: 3600\r\n")),
    "deeply nested": sends(reply(b"[" * 100_000)),
    "an error with 200": sends(reply(b'{"error": "busy"}')),
    "no choices": sends(reply(b'{"choices": []}')),
    "choices of a wrong type": sends(reply(b'{"choices": 5}')),
    "a list": sends(reply(b"[1, 2]")),
    "null": sends(saying(None)),
    "empty": sends(saying("")),
    "blank": sends(saying(" \n")),
    "a list of parts": sends(saying([{"type": "text", "text": "hm"}])),
    "a number": sends(saying(3)),
    "a dict": sends(saying({"a": 1})),
    "a lone surrogate": sends(saying("x\ud800")),
}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_whatever_the_judge_does_costs_rows_and_nothing_else(judge, capfd, name):
    """No exception, nothing in the cache, the number and the reason said, in time, without the key."""
    bad, began = judge(BEHAVIOURS[name]), time.time()
    assert bad.answers([f"question {i}" for i in range(8)]) == [None] * 8
    assert time.time() - began < 6 and not list(Judge.cache.glob("*"))
    out = capfd.readouterr()
    assert "8 of 8 questions unanswered" in out.out and "secret-key" not in out.out + out.err


def test_the_judge_is_given_up_and_taken_back(judge):
    """Five failures in a row: the rest is not asked. Later a first answer makes it whole again."""
    Judge.workers = 1
    moody, questions = judge(sends(reply(ANSWER), reply(b"", b"500 Oh"), 9)), [str(i) for i in range(40)]
    calls = []
    while "because" not in moody.answers(questions):
        calls.append(len(moody.seen))
    assert 5 <= calls[0] <= 6 and 6 <= calls[1] <= 8     # still down: one question, and one that was begun
    assert moody.answers(questions) == ["because"] * 40 and len(moody.seen) <= 60


def test_questions_that_are_refused_do_not_stop_the_others(judge):
    """The first seven are too long for it (400): that is no sign of a server that is down."""
    Judge.workers, Judge.retries = 1, 3
    strict = judge(sends(reply(ANSWER), reply(b"too long", b"400 Bad"), 7))
    assert strict.answers([str(i) for i in range(10)]).count("because") == 3 and len(strict.seen) == 10


def test_an_attempt_more_heals_a_failure(judge):
    Judge.retries = 1
    once = judge(sends(reply(ANSWER), reply(b"", b"503 Oh"), 1))
    assert once.answers(["q"]) == ["because"] and len(once.seen) == 2


def test_equal_questions_are_asked_once(judge):
    calm = judge(sends(reply(ANSWER)))
    assert calm.answers(["q", "q", "p", "q"]) == ["because"] * 4 and len(calm.seen) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'"x"', b'{"answer": 5}', b'{"answer": ""}', b"null",
                                    b'{"answer": "\\ud800"}', b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_cache_is_asked_again(judge, damage):
    calm = judge(sends(reply(ANSWER)))
    calm.answers(["q"])
    file, = Judge.cache.iterdir()
    file.write_bytes(damage)
    assert calm.answers(["q"]) == ["because"] and len(calm.seen) == 2
    assert json.loads(file.read_text())["answer"] == "because"


def test_a_full_disk_costs_the_cache_only(judge, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    calm = judge(sends(reply(ANSWER)))
    monkeypatch.setattr(os, "replace", full)
    assert calm.answers(["q"]) == ["because"]
    Judge.cache.rename(Judge.cache.with_name("elsewhere"))
    Judge.cache.write_text("a file where the folder should be")
    assert calm.answers(["q"]) == ["because"]


def test_processes_share_the_cache(judge):
    """Eight judges write the same answers at the same time: no reader ever sees half of one."""
    Judge.timeout = Judge.patience = 60
    calm, errors = judge(sends(reply(ANSWER))), []

    def one():
        errors.extend(a for a in Judge(calm.url, "m").answers([str(i) for i in range(20)]) if a != "because")
    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and {file.suffix for file in Judge.cache.iterdir()} == {".json"}


def test_another_judge_has_another_cache(judge):
    one, other = judge(sends(saying("one"))), judge(sends(saying("other")))
    assert (one.answers(["q"]), other.answers(["q"])) == (["one"], ["other"])


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"303 See", b"307 For now", b"308 For good"])
def test_the_key_goes_to_no_other_host(judge, status):
    elsewhere = judge(sends(reply(ANSWER)))
    lure = judge(sends(reply(b"", status, f"Location: {elsewhere.url}/chat/completions\r\n".encode())))
    assert lure.answers(["q"]) == [None] and not list(Judge.cache.glob("*"))
    assert b"Bearer secret-key" in lure.seen[0][0]
    assert not any(b"secret" in head or body for head, body in elsewhere.seen)


@pytest.mark.parametrize("url, judges, openais, sent", [
    ("http://127.0.0.1:1/v1", "j", "o", "j"), ("http://127.0.0.1:1/v1", None, "o", ""),
    ("https://api.openai.com/v1", None, "o", "o"), ("https://api.openai.com/v1", "j", "o", "j"),
    ("http://api.openai.com/v1", None, "o", ""), ("https://api.openai.com.evil.org/v1", None, "o", ""),
    ("https://api.openai.com@evil.org/v1", None, "o", ""), ("http://h/v1", "  j\n", None, "j")])
def test_which_key_is_sent(openai, monkeypatch, url, judges, openais, sent):
    for name, value in (("JUDGE_API_KEY", judges), ("OPENAI_API_KEY", openais)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert Judge(url, "m").key == sent


@pytest.mark.parametrize("key", ["secret\nkey", "secret\u20ac", "secret\x01key"])
def test_a_damaged_key_is_not_shown(openai, monkeypatch, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pytest.raises(UserError, match="JUDGE_API_KEY") as error:
        Judge("http://127.0.0.1:1/v1", "m")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("keys", [{}, {"JUDGE_API_KEY": "j"}])
def test_the_environment_of_openais_client_goes_nowhere(judge, monkeypatch, keys):
    """What its variables hold is for api.openai.com, and this is another host."""
    calm = judge(sends(reply(ANSWER)))
    monkeypatch.delenv("JUDGE_API_KEY")
    custom = "X-Private: hidden\nAuthorization: Bearer hidden\nCookie: hidden"
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET", "CUSTOM_HEADERS", "BASE_URL"):
        value = {"CUSTOM_HEADERS": custom, "BASE_URL": "http://127.0.0.1:9/hidden"}.get(name, "hidden")
        monkeypatch.setenv(f"OPENAI_{name}", value)
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    Judge(calm.url, "m").check()
    (head, _), = calm.seen
    assert b"hidden" not in head and b"Bearer " + (b"j" if keys else b"none") in head.splitlines()[-1]
    names = {line.split(b":")[0].lower() for line in head.splitlines()[1:]}
    assert names == {b"host", b"user-agent", b"content-type", b"content-length", b"authorization"}


def test_a_server_that_says_when_to_come_again_is_not_waited_for(judge):
    """Retry-After (the client obeys it up to a minute) does not stretch the phase, or the check."""
    Judge.retries, Judge.patience = 5, 1.0
    busy, began = judge(sends(reply(b"", b"503 Oh", b"Retry-After: 50\r\n"))), time.time()
    assert busy.answers(["q"]) == [None] and len(busy.seen) == 1
    with pytest.raises(UserError, match="503"):
        busy.check()
    assert time.time() - began < 8 and len(busy.seen) == 2


@pytest.mark.parametrize("url", ["http://h:port/v1", "http://[::1/v1", "h:1/v1", "", "nonsense"])
def test_what_is_no_url_is_one_sentence(openai, url):
    with pytest.raises(UserError, match="--judge_url"):
        Judge(url, "m").check()


def test_without_the_client_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="--judge_url http://h/v1: .*`pip install openai`"):
        Judge("http://h/v1", "m")


def test_the_servers_reason_is_said_without_the_key(judge):
    refuses = judge(sends(reply(b"max_tokens is not supported, secret-key", b"400 Bad")))
    with pytest.raises(UserError, match="max_tokens is not supported") as error:
        refuses.check()
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    sent = {"model": "m", "messages": [{"role": "user", "content": "Say yes."}]}
    assert json.loads(refuses.seen[0][1]) == sent                    # and nothing that some models refuse


def test_ctrl_c_does_not_wait_for_the_judge(judge):
    Judge.patience, Judge.timeout = 100, 100
    bad = judge(lambda connection, n: time.sleep(100))
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from supervision import Judge
try:
    Judge({bad.url!r}, "m").answers([str(i) for i in range(40)])
except KeyboardInterrupt:
    print("left", flush=True)"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while len(bad.seen) < 16:
        time.sleep(0.05)
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    began = time.time()
    assert child.stdout.readline() == b"left\n" and time.time() - began < 3         # 0.1 s, not 120
    child.wait(timeout=15)                       # 2 to 6 s on a busy machine: Python takes PyTorch down


PRS = ["--signal", "prs", "--ets_window", "2", "--judge_model", "m", "--eval_every", "-1", "--steps", "2"]


@pytest.mark.parametrize("schedule", ["synchronous", "interleaved"])
def test_every_schedule_says_what_the_judge_left_out(folder, judge, capfd, schedule):
    """It answers the check at the start, and nothing after that; the run goes on to its end."""
    gone = judge(sends(reply(b"gone", b"500 Oh"), reply(ANSWER), 1))
    args = [*SMALL, *PRS, "--schedule", schedule, "--phases", "1:1", "--ets_window", "1",
            "--judge_url", gone.url, "--out", f"runs/judged-{schedule}"]
    assert train.cli(args) == 0
    out = capfd.readouterr().out
    left_out = [r["sft_rows_left_out"] for r in rows(f"runs/judged-{schedule}") if r.get("sft_rows_left_out")]
    assert left_out and out.count("left out: the judge failed") == len(left_out) and "500: gone" in out


# --- checkpoints -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(folder):
    """A finished run with three checkpoints; each test works on a copy"""
    assert train.cli([*THREE, "--keep", "-1", "--out", "runs/saved"]) == 0
    return folder / "runs/saved"


@pytest.fixture
def copy_of(saved):
    def make(name):
        shutil.rmtree(f"runs/{name}", ignore_errors=True)
        return shutil.copytree(saved, Path("runs") / name)
    return make


def test_pointing_back_by_hand(saved, copy_of):
    """With --keep 1: the new checkpoint stays, those of the abandoned future go, the numbers are the same."""
    out = copy_of("back")
    (out / "checkpoints/latest").write_text("step-1\n")
    assert train.cli([*THREE, "--keep", "1", "--out", str(out), "--resume"]) == 0
    assert same(everything(out), everything(saved)) and saved_steps(out) == [3]
    assert (out / "metrics.jsonl.old").read_bytes() == (saved / "metrics.jsonl").read_bytes()


def test_latest_is_lost(saved, copy_of, capfd):
    """The newest complete checkpoint is taken; nothing begins at 0."""
    out = copy_of("lost")
    (out / "checkpoints/latest").unlink()
    assert train.cli([*THREE, "--keep", "1", "--out", str(out), "--resume"]) == 0
    assert "steps 3 to 3" in capfd.readouterr().out and same(everything(out), everything(saved))
    (out / "checkpoints/latest").write_text("step-3")
    shutil.rmtree(out / "checkpoints/step-3")
    assert train.cli([*THREE, "--keep", "1", "--out", str(out), "--resume"]) == 2
    assert "step-3 is missing; write an older step-N into" in capfd.readouterr().err


def cut_file(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file, damage, words", [
    ("checkpoints/latest", b"", "is missing"), ("checkpoints/latest", b"step-9", "step-9 is missing"),
    ("checkpoints/latest", b"\xff\x00", "is missing"), ("checkpoints/latest", b"../..", "is missing"),
    ("checkpoints/step-3/MANIFEST.json", b"", "MANIFEST.json is damaged"),
    ("checkpoints/step-3/MANIFEST.json", b"[1]", "MANIFEST.json is damaged"),
    ("checkpoints/step-3/MANIFEST.json", b'{"state.pt": 5}', "state.pt is damaged"),
    ("checkpoints/step-3/MANIFEST.json", b'{"": [1, 2]}', "is damaged"),
    ("checkpoints/step-3/state.pt", None, "state.pt is damaged"),
    ("checkpoints/step-3/tokenizer.json", None, "tokenizer.json is damaged"),
    ("config.json", b"", "config.json is damaged"), ("config.json", b"\xff\xfe", "config.json is damaged"),
    ("config.json", b"[]", "config.json is damaged"), ("config.json", b"{}", "was started with --"),
    ("config.json", b"[" * 100_000, "config.json is damaged"),
    ("metrics.jsonl", b'{"step": 0}\n[]\n{"step": 1}\n', "line 2 of runs/hurt/metrics.jsonl is damaged"),
    ("metrics.jsonl", b'{"step": "0"}\n', "line 1 of runs/hurt/metrics.jsonl is damaged"),
    ("metrics.jsonl", b'{"loss": 1}\n', "line 1 of runs/hurt/metrics.jsonl is damaged"),
    ("metrics.jsonl", '{"step": 0}\n'.encode("utf-16") * 2, "line 1 of runs/hurt/metrics.jsonl is damaged"),
    ("episodes.jsonl", b"[" * 100_000 + b"\n1\n", "line 1 of runs/hurt/episodes.jsonl is damaged"),
])
def test_damaged_run_files_are_one_sentence(copy_of, capfd, file, damage, words):
    out = copy_of("hurt")
    cut_file(out / file) if damage is None else (out / file).write_bytes(damage)
    before = (out / "metrics.jsonl").read_bytes()
    assert train.cli([*THREE, "--keep", "-1", "--out", str(out), "--resume"]) == 2
    err = capfd.readouterr().err.strip().splitlines()
    assert words in err[-1] and "Traceback" not in "\n".join(err)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_folder_that_holds_nothing_is_new(folder, capfd):
    """Made beforehand; or left by a kill between the folder and its config.json"""
    for name, files in (("empty", []), ("just-begun", ["lock", "config.json.tmp"])):
        out = folder / "runs" / name
        out.mkdir()
        for file in files:
            (out / file).write_text('{"half')
        assert train.cli([*SMALL, "--steps", "0", "--out", str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["steps"] == 0
    (folder / "runs/other").mkdir()
    (folder / "runs/other/thesis.tex").write_text("x")
    assert train.cli([*SMALL, "--steps", "0", "--out", "runs/other"]) == 2
    assert "runs/other exists" in capfd.readouterr().err


@pytest.mark.parametrize("before, after", [
    pytest.param(["--signal", "prs", "--judge_url", "URL"], ["--signal", "prs"], marks=pytest.mark.judge),
    (["--chat_template", "t.jinja"], ["--chat_template", "t.jinja"])])
def test_a_resumption_notices_what_has_changed(folder, request, chat, capfd, before, after):
    """A judge that was forgotten, another text in the template's file"""
    schedule = ["--schedule", "synchronous"] if "prs" in before else []
    if "prs" in before:
        url = request.getfixturevalue("judge")(sends(reply(ANSWER))).url
        before = [url if flag == "URL" else flag for flag in before]
    Path("t.jinja").write_text(chat.tokenizer.chat_template)
    shutil.rmtree("runs/child", ignore_errors=True)
    args = [*SMALL, "--steps", "0", "--out", "runs/child", *schedule]
    assert train.cli([*args, *before]) == 0
    Path("t.jinja").write_text(chat.tokenizer.chat_template + "{# another #}")
    assert train.cli([*args, *after, "--resume"]) == 2
    err = capfd.readouterr().err.strip().splitlines()[-1]
    assert "the run in runs/child was started with --" in err
    if "--model" in before:                      # its advice works
        named = "runs/parent/checkpoints/step-2"
        assert named in err and train.cli([*args, "--model", named, "--resume"]) == 0


# --- one writer --------------------------------------------------------------------------------------------
def test_one_writer(folder, saved, copy_of, capfd):
    """--resume beside a live run is refused; the lock dies with its run."""
    out = copy_of("shared")
    held, go = os.pipe()

    def hold():
        analyze_tokens.lock(out)
        os.write(go, b"x")
        time.sleep(60)
    pid = in_a_child(hold)
    os.read(held, 1)
    before = (out / "metrics.jsonl").read_bytes()
    assert train.cli([*THREE, "--keep", "-1", "--out", str(out), "--resume"]) == 2
    assert "another process is writing the run in runs/shared" in capfd.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before
    os.kill(pid, signal.SIGKILL)
    ended([pid])
    assert train.cli([*THREE, "--keep", "-1", "--out", str(out), "--resume"]) == 0


def test_a_folder_without_locks(tmp_path, monkeypatch, capsys):
    """Some network file systems have none: a warning, no refusal"""
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(analyze_tokens.fcntl, "lockf", refuse)
    analyze_tokens.lock(tmp_path)
    assert "cannot be locked ([Errno" in capsys.readouterr().out


def test_two_first_starts(folder):
    """At the same time, into the same folder: one trains, the other says why it does not."""
    args = [*THREE, "--out", "runs/twice"]
    assert sorted(ended([*start(args), *start(args)])) == [0, 2]
    whole_run(THREE, "runs/once")
    assert same(everything("runs/twice"), everything("runs/once"))


# --- signals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_with_a_sentence(folder, number, status):
    """At any time: while the model is loaded, in the first steps, later"""
    for i, moment in enumerate((0.1, 0.5, 1.2)):
        out, log = folder / f"runs/signal-{number}-{i}", folder / "children.log"
        log.unlink(missing_ok=True)
        pids = start([*KILLED, "--steps", "1000", "--out", str(out)])
        time.sleep(moment)
        os.kill(pids[0], number)
        assert ended(pids) == [status]
        said = log.read_text()
        assert "train.py: stopped; " in said and "Traceback" not in said
        begun = (out / "config.json").exists()
        assert (f"--resume continues {out}" if begun else "no run was begun") in said


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_a_library_drops_comes_again(folder, monkeypatch, number, status):
    def deaf(args):
        try:
            time.sleep(20)
        except KeyboardInterrupt:
            pass
        time.sleep(20)
    monkeypatch.setattr(train, "main", deaf)
    pid = in_a_child(lambda: train.cli([*SMALL]))
    time.sleep(0.5)
    os.kill(pid, number)
    began = time.time()
    assert ended([pid]) == [status] and time.time() - began < 5


def test_sigterm_under_torchrun(folder):
    """torchrun passes it on; the run says where it can be continued, once, and can be."""
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    args = [str(ROOT / "train.py"), *KILLED, "--out", "runs/torchrun", "--steps", "1000"]
    process = subprocess.Popen([*head, *args], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not Path("runs/torchrun/checkpoints/latest").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert said.count("--resume continues runs/torchrun") == 1 and process.returncode
    pids = start([*args[1:], "--resume"], 2)
    time.sleep(3)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert ended(pids) == [143, 143]


# --- what is loaded ----------------------------------------------------------------------------------------
def base_copy(name, change):
    """The base with other weights: change(weights)"""
    out = Path("runs") / name
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(train.BASE, out)
    (out / "MANIFEST.json").unlink(missing_ok=True)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


def renamed(tensors):
    for name in list(tensors):
        tensors[f"old.{name}"] = tensors.pop(name)


LAYER = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("name, change, words", [
    ("gone", lambda tensors: tensors.pop(LAYER), f"has missing weights.*{LAYER}"),
    ("prefixed", renamed, "has missing weights"),
    ("more", lambda tensors: tensors.update(extra=torch.zeros(3)), "has unexpected weights.*extra"),
    ("shape", lambda tensors: tensors.update({LAYER: torch.zeros(3)}), "cannot load the model")])
def test_other_weights_than_named_are_refused(folder, capfd, name, change, words):
    model = base_copy(f"base-{name}", change)
    for load in (lambda: train.cli([*SMALL, "--steps", "0", "--model", model, "--out", "runs/none"]),
                 lambda: analyze_tokens.main(["--probe", model])):
        assert load() == 2
        assert re.search(words, capfd.readouterr().err.strip().splitlines()[-1])
    assert not Path("runs/none").exists()


def test_a_tied_output_layer_is_not_missing(folder):
    assert not any("lm_head" in name for name in load_file(train.BASE / "model.safetensors"))
    analyze_tokens.pretrained(train.BASE)


def test_a_damaged_base_is_refused(folder, capfd):
    shutil.copytree(newest_checkpoint("runs/first"), "runs/damaged-base")
    cut_file(Path("runs/damaged-base/model.safetensors"))
    assert train.cli([*SMALL, "--steps", "0", "--model", "runs/damaged-base", "--out", "runs/none"]) == 2
    assert "model.safetensors is damaged" in capfd.readouterr().err


def test_no_code_of_the_models_own_is_run(folder, capfd, monkeypatch):
    """Neither asked for at the terminal nor run"""
    out = Path(base_copy("base-coded", lambda tensors: None))
    config = json.loads((out / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (out / "config.json").write_text(json.dumps(config))
    (out / "code.py").write_text("open('was-run', 'w')")
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked at the terminal"))
    assert train.cli([*SMALL, "--steps", "0", "--model", str(out), "--out", "runs/none"]) == 2
    assert "cannot load the model" in capfd.readouterr().err and not Path("was-run").exists()


# --- what is read ------------------------------------------------------------------------------------------
TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize("text", [
    "x", "5", "[]", "{}", '{"messages": 5}', '{"messages": {}}', '{"messages": [5]}', '{"messages": ["a"]}',
    '{"messages": [{"role": "user"}]}', TALK.replace('"b"', "5"), TALK.replace('"b"', "null"),
    TALK.replace('"b"', '["b"]'), TALK.replace('"b"', '{"text": "b"}'),
    TALK.replace('"a"', '[{"type": "text", "text": "a"}]'),
    TALK.replace('"user"', '"tool"'), TALK.replace('"user"', "[]"), "[" * 100_000,
    TALK.encode("utf-16"), TALK.encode() + b"\xff", b"\x00\x01", TALK.replace("}]}", "")])
def test_a_damaged_sft_file_is_one_sentence(chat, tmp_path, text):
    path = tmp_path / "talk.jsonl"
    damaged = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(TALK.encode() + b"\n" + damaged + b"\n")
    with pytest.raises(UserError, match="cannot be read .line [12]: "):
        SFT(options(signal="sft", schedule="sft", sft_file=path), chat, [], train.limits_of(options()))


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("text, words", [
    ("", "has no chat template"), ("{% for", "cannot render"), ("{{ 1 / 0 }}", "cannot be used"),
    ("{{ 'a' + 1 }}", "cannot be used"), ("{{ messages[7].x.y }}", "cannot render"),
    ("{{ raise_exception('no') }}", "cannot render"), ("{{ range(10**9) | list }}", "cannot be used"),
    ("{{ ''.__class__.__mro__ }}", "cannot render"), ("hello", "leaves out the system or user message"),
    (LOOP.replace("messages", "messages[1:]"), "leaves out the system or user message"),
    ("{% if messages | length > 2 %}{{ 1 / 0 }}{% endif %}" + LOOP, "cannot be used"),
    (b"\xff\xfe" + LOOP.encode("utf-16"), "cannot be used"), (b"\xff", "cannot be used")])
def test_a_damaged_template_is_one_sentence(folder, capfd, text, words):
    Path("bad.jinja").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert train.cli([*SMALL, "--chat_template", "bad.jinja", "--out", "runs/none"]) == 2
    err = capfd.readouterr().err.strip().splitlines()
    assert words in err[-1] and "Traceback" not in "\n".join(err) and not Path("runs/none").exists()


STEP = {"step": 0, "phase": "rl", "reward": 0.5, "seconds": 1.0, **{f"state/{s}": 0.1 for s in STATES}}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


DAMAGED = {
    "x.jsonl": [
        "x\n{}\n", "[]\n", "5\n", "null\n", "{}\n", '{"step": null}\n', '{"step": "0"}\n', '{"step": 1.5}\n',
        '{"step": true}\n', b"\xff\n\xff\n", "[" * 100_000 + "\n", lines(STEP).encode("utf-16") * 2,
        lines(*[STEP | {"step": i, "reward": "much"} for i in range(12)]),
        lines(*[STEP | {"step": i, "reward": None} for i in range(12)]),
        lines(*[STEP | {"step": i, "reward_clean": [1]} for i in range(12)]),
        lines(*[STEP | {"step": i, "state/call": {}} for i in range(12)]),
        lines(STEP, {"step": 0, "eval/average": "x"}, {"step": 1, "eval/average": .1}),
        lines({"step": 0, "eval/average": .1, "eval/base": .1}, {"step": 1, "eval/average": .1}),
        lines({"step": 0, "p/open|text": .1}, {"step": 1, "p/open|text": "x"}),
        lines(STEP | {"skipped_updates": "x"}), lines(STEP | {"reward": 10**400}, STEP | {"step": 1})],
    "x.csv": [
        "a,b\n1,2\n", "step,reward\nx,1\n", "step,reward\n1,x\n", "step\n1,2,3\n", "step,reward\n,1\n",
        b"step,reward\n\xff,1\n", "step,reward\n1\u00b2,1\n", "step,reward\n" + "1" * 5000 + ",1\n",
        "step,reward\n1," + "x" * 200_000 + "\n", "step,reward\n1.5,2\n"]}


@pytest.mark.parametrize("name, text", [(name, text) for name in DAMAGED for text in DAMAGED[name]])
def test_a_damaged_run_does_not_hide_the_others(folder, saved, capfd, name, text):
    """One sentence for it, the other run in full, status 2"""
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert analyze_tokens.main([name, "runs/saved"]) == 2
    said = capfd.readouterr()
    assert name in said.err and said.err.count("\n") == 1 and "== runs/saved" in said.out


@pytest.mark.parametrize("name, n", [("x.jsonl", 6), ("x.jsonl", 12), ("x.jsonl", 14), ("x.csv", 3)])
def test_a_damaged_run_is_not_drawn_and_the_others_are(folder, saved, capfd, name, n):
    Path(name).write_text(DAMAGED[name][n])
    Path("damaged.png").unlink(missing_ok=True)
    assert plot.main(["damaged.png", name, "runs/saved"]) == 2
    assert name in capfd.readouterr().err and Path("damaged.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", [
    "{}\n", lines({"step": 0}), lines({"step": 0, "states": []}), lines({"step": 0, "states": 5}),
    lines({"step": 0, "states": ["call"], "text": 5}), lines({"step": 0, "states": ["call"], "text": "x"}),
    lines({"step": 0, "states": ["call"], "text": "x", "task": "t", "reward": "x"})])
def test_damaged_conversations(copy_of, capfd, text):
    out = copy_of("spoken")
    (out / "episodes.jsonl").write_text(text)
    assert analyze_tokens.main(["--transcripts", str(out), "runs/saved"]) == 2
    said = capfd.readouterr()
    assert str(out) in said.err and said.err.count("\n") == 1 and "# saved" in said.out


@pytest.mark.parametrize("file, damage", [("config.json", b"{"), ("config.json", b"[]"),
                                          ("checkpoints/step-3/config.json", None)])
def test_a_probe_of_a_damaged_run(copy_of, capfd, file, damage):
    out = copy_of("probed")
    cut_file(out / file) if damage is None else (out / file).write_bytes(damage)
    assert analyze_tokens.main(["--probe", str(out)]) == 2
    assert capfd.readouterr().err.count("\n") == 1
