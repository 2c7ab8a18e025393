import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")    # small models: more threads only fight each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")     # no test loads from there; a wrong name is not looked up
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

# A shell's background job ignores Ctrl-C, and so would all children that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402

import make_base  # noqa: E402
import train  # noqa: E402
from rollout import Chat  # noqa: E402

torch.set_num_threads(1)
RUN = ["--model", "runs/tiny-base", "--prompts", "4", "--group", "4", "--updates", "2", "--eval_tasks", "2",
       "--train_tasks", "12", "--max_message_tokens", "24", "--max_messages", "16"]
TIMES = {"seconds", "rollout_s"}
make_base.SIZES["for tests"] = dict(hidden=32, layers=2, steps=4, noisy_steps=1, lr=3e-3)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: an hour of kills; only with `python -m pytest tests -m slow`")
    config.addinivalue_line("markers", "judge: a real judge is asked, by the openai client")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "openai" in item.fixturenames:
            item.add_marker("judge")
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):  # not "slow" in keywords: a parameter may have that name
                item.add_marker(pytest.mark.skip(reason="slow; -m slow runs it"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a small base (pre-trained for five steps...) and a first run, shared by all tests."""
    path = tmp_path_factory.mktemp("work")
    before = os.getcwd()
    os.chdir(path)
    make_base.main(["--size", "for tests", "--eval_tasks", "0", "--out", "runs/tiny-base"])
    assert train.cli([*RUN, "--steps", "2", "--out", "runs/first"]) == 0
    yield path
    os.chdir(before)


@pytest.fixture
def openai():
    """The client that asks a real judge: `pip install openai`, or the test is skipped"""
    return pytest.importorskip("openai", reason="a real judge needs the openai client")


def rows(out):
    """The records of a run's metrics.jsonl, without what differs between two equal runs"""
    records = []
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.append({k: v for k, v in record.items() if k not in TIMES})
    return records


@pytest.fixture(scope="session")
def tokenizer():
    return make_base.tiny_tokenizer()


@pytest.fixture(scope="session")
def chat(tokenizer):
    return Chat(tokenizer)


@pytest.fixture(scope="session")
def model(tokenizer):
    """A randomly initialised Qwen2 of two layers, sharp enough (initializer_range) that its samples
    differ."""
    return make_base.tiny_model(len(tokenizer), 64, 2).eval()
