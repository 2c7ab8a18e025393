import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only fight each other
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import pytest  # noqa: E402
import torch  # noqa: E402

import supervision  # noqa: E402
import train  # noqa: E402
from rollout import Chat  # noqa: E402

torch.set_num_threads(1)
SMALL = ["--tiny_hidden", "32", "--tiny_layers", "1", "--base_steps", "4", "--base_noisy_steps", "1"]


RUN = [*SMALL, "--prompts", "4", "--group", "4", "--updates", "2", "--eval_tasks", "2", "--train_tasks", "12",
       "--max_message_tokens", "24", "--max_messages", "16"]
TIMES = {"seconds", "rollout_s"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with the pre-trained (four steps...) base in runs/, shared by all tests here."""
    path = tmp_path_factory.mktemp("work")
    before = os.getcwd()
    os.chdir(path)
    assert train.cli([*RUN, "--steps", "2", "--out", "runs/first"]) == 0
    yield path
    os.chdir(before)


def rows(out):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tokenizer():
    return supervision.tiny_tokenizer()


@pytest.fixture(scope="session")
def chat(tokenizer):
    return Chat(tokenizer)


@pytest.fixture(scope="session")
def model(tokenizer):
    """A randomly initialised Qwen2 of two layers; sharp enough (initializer_range) that its samples differ."""
    a = train.parse_args(["--tiny_hidden", "64", "--tiny_layers", "2"])
    return supervision.tiny_model(len(tokenizer), a).eval()
