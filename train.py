"""train.py -- the run: flags, schedule, main loop, evaluation, checkpoints. Floor 4; the only script to start.

    python train.py                                             vanilla GRPO on a laptop
    python train.py --signal ets --schedule interleaved         GRPO with SFT on failed tasks between its phases
    python train.py --eval_only --model runs/NAME               evaluate the newest checkpoint of a run
    torchrun --nproc-per-node 2 -- train.py                     the same numbers from 2 processes

One pass through the main loop is the paper's algorithm:

    pick prompts -> roll out G conversations each -> reward -> group advantages -> a few policy updates
    and, as the schedule says: pick rows of the signal -> cross-entropy updates
"""
import argparse
import copy
import gc
import inspect
import json
import math
import os
import random
import shutil
import sys
import time
import traceback
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
                                                       set_optimizer_state_dict)
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

import supervision
import tools
from analyze_tokens import (PROBED, Alarm, is_clean, mean, one_line, probe, read_rows, rollout_metrics, summary, table,
                            token_classes, truth_logprobs)
from rl_step import CORRECTIONS, KLS, LOSSES, advantages, recompute_logprobs, rl_backward
from rollout import TEMPLATES, Chat, HFEngine, Limits, VLLMEngine, begin, import_vllm, retokenized, rollout, transcript
from sft_step import WHOLE, gathered, is_sharded, optimizer_step, sft_backward, shard
from supervision import SIGNALS, TRAIN_CATEGORIES, Judge, demonstrate, pretrain_tiny, roll_out
from tools import (BFCL_PACKAGES, CATEGORIES, CONTROL, STATES, BfclTask, Env, UserError, acebench_tasks, bfcl_tasks, make_env,
                   make_tasks, parse, verdicts)

SCHEDULES = ("rl", "sft", "sft_then_rl", "interleaved", "synchronous", "adaptive")
# The defaults of --world bfcl: the paper's numbers (its restarts are flags of their own, see --fresh_optimizer), all test tasks.
BFCL_DEFAULTS = dict(steps=300, prompts=60, lr=1e-6, sft_lr=1e-5, kl_weight=1e-4, warmup=10, sft_batch=128, max_messages=30,
                     max_message_tokens=2048, max_total_tokens=16_384, max_observation_tokens=1024, eval_tasks=1000)

# ----------------------------------------------------------------------------------------------------------------------
# 1. Flags. Flag name = variable name; the defaults are the laptop recipe.


def parse_args(argv=None):
    p = argparse.ArgumentParser(usage="python train.py [--flag value ...]     (--help explains every flag)",
                                description="Multi-turn tool-use RL and the signals that keep it from collapsing.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    bounds = {}

    def flag(name, default, help, least=-math.inf, most=math.inf, **kw):     # its type is the default's; False makes a switch
        bounds[name] = least, most
        kw |= {"action": "store_true"} if default is False else {"type": str if default is None else type(default)} | kw
        g.add_argument(f"--{name}", default=default, help=help, **kw)

    g = p.add_argument_group("recipe")
    flag("signal", "none", "supervision beside the reward (see supervision.py): none = vanilla GRPO, sft = demonstrations, ops = "
         "ground truth in the group, hbg = hints, ets = ground truth of failed tasks, prs = ets + reflections", choices=SIGNALS)
    flag("schedule", "rl", "when which update runs (see `plan`)", choices=SCHEDULES)
    flag("steps", 100, "RL steps", least=0)
    flag("sft_steps", 30, "SFT steps of the schedules sft and sft_then_rl", least=0)
    flag("seed", 0, "seed of the task order and of all sampling")
    g = p.add_argument_group("schedules interleaved and synchronous")
    flag("phases", "1:2:3", "interleaved: the RL phases' shares of --steps; an SFT phase stands between each two (the paper: 50, "
         "100, 150 steps; Qwen3: 1:1:2)")
    flag("sft_epochs", 2, "interleaved: passes over the rows in each SFT phase", least=1)
    flag("sft_warmup", 0.3, "interleaved: share of an SFT phase that warms up; then cosine", least=0, most=1)
    flag("sft_weight", 1.0, "synchronous: weight of the cross-entropy in the RL update", least=0)
    flag("fresh_optimizer", False, "forget Adam's state at every change of phase (the paper)")
    flag("reanchor_kl", False, "each RL phase measures its KL from its own start (the paper)")
    flag("rewarm", False, "warm up again after every change of phase (the paper)")
    g = p.add_argument_group("alarm, and the schedule adaptive")
    flag("alarm", "p/open|text", "the probe's metric that is watched")
    flag("alarm_factor", 3.0, "the alarm rings above so many times the first probes' mean", least=1)
    flag("alarm_checks", 2, "... for so many probes in a row, and is silent after as many below half of that", least=1)
    flag("stop_on_alarm", False, "stop the run when the alarm rings, with a checkpoint")
    flag("trigger", "alarm", "adaptive: a burst of SFT at every probe while the alarm rings, or (the control) at random probes",
         choices=("alarm", "random"))
    flag("burst_rows", 64, "adaptive: rows trained in a burst", least=1)
    flag("sft_budget", 384, "adaptive: rows trained in all bursts together", least=0)
    g = p.add_argument_group("signals")
    flag("sft_file", None, "sft: train on the dialogues of this ToolACE JSON file, not on the training tasks", metavar="FILE")
    flag("ops_k", 1, "ops: ground-truth rollouts per group", least=1)
    flag("ops_ratio", "one", "ops: their ratio is 1 before the first update (as released), or p / (p + 0.1) (as the paper intends)",
         choices=("one", "shaped"))
    flag("hints", 2, "hbg: hinted rollouts per group", least=1)
    flag("hint_in_update", False, "hbg: keep the hint in the trained sequence too")
    flag("ets_window", 10, "ets, prs: RL steps that are looked back upon", least=1)
    flag("ets_rule", "all", "ets, prs: a task failed if all its rollouts in the window did (the paper), or any (the paper's code)",
         choices=("all", "any"))
    flag("judge_url", None, "prs: base URL of an OpenAI-compatible server, such as http://localhost:8000/v1; without it the "
         "embedded judge writes the reflections from the ground truth")
    flag("judge_model", "judge", "prs: model name at that server; key: environment JUDGE_API_KEY")
    flag("judge_workers", 16, "prs: concurrent requests", least=1)
    flag("judge_timeout", 120.0, "prs: seconds per request", least=0)
    flag("judge_retries", 4, "prs: further attempts per request, with growing pauses", least=0)
    flag("judge_cache", "runs/judge-cache", "prs: where answers are kept; nothing is asked twice")
    g = p.add_argument_group("ablations, each doing one thing")
    flag("retokenize", False, "train on decoded and re-encoded messages, each with an end token added (the paper's release)")
    flag("split_groups", False, "spread each group over the mini-batches of a step (as released)")
    flag("only", None, "use only the advantages of one sign", choices=("positive", "negative"))
    flag("reward", "task", "what the advantages are made of: random = a coin that shows 1 in 5 times, shuffled = the task's, dealt "
         "out anew within each group, format = task + 0.5 if every message is clean",
         choices=("task", "random", "shuffled", "format"))
    flag("mask_control", False, "a negative advantage does not push control tokens")
    g = p.add_argument_group("model")
    flag("model", "tiny", "tiny = the embedded model (built and pre-trained at first use, then cached); or a Hugging Face name "
         "or folder; or a run folder (its newest checkpoint)")
    flag("chat_template", None, "replaces the model's chat template: a Jinja file, or one of " + ", ".join(TEMPLATES), metavar="FILE")
    flag("dtype", "float32", "precision of the weights", choices=("float32", "bfloat16"))
    flag("shard", False, "FSDP2: cut parameters, gradients and optimizer state into one piece per process")
    flag("compute_dtype", None, "with --shard: precision of forward and backward passes, while the masters keep --dtype; "
         "default: --dtype", choices=("float32", "bfloat16"))
    flag("grad_checkpointing", False, "keep only each layer's input for the backward pass and compute the rest again: less "
         "memory, about a third more time")
    flag("packed", False, "updates without padding: the rows of a forward pass stand one behind the other. On a GPU this needs "
         "16 bits (--compute_dtype bfloat16); on a CPU attention goes row by row")
    flag("device", "auto", "auto = cuda if there is one, else cpu")
    g = p.add_argument_group("world")
    flag("world", "tiny", f"tiny = the embedded world; bfcl = BFCL's multi-turn tasks (pip install --no-deps {BFCL_PACKAGES}), with "
         "the paper's values as defaults: " + ", ".join(f"--{k} {v}" for k, v in BFCL_DEFAULTS.items()), choices=("tiny", "bfcl"))
    flag("validation", 20, "bfcl: stories of the 100 training ones that are set aside for the evaluation during training; test "
         "tasks are used only at the end and by --eval_only", least=1, most=99)
    flag("acebench", None, "bfcl: evaluate on ACEBench's `normal` entries in this folder as well (ace_brackets = format- and "
         "content-OOD, ace_tags = content-OOD)", metavar="DIR")
    flag("syntax", "A", "call syntax of training: A = <tool_call> JSON, B = [f(a='x')]; the other one: format-OOD evaluation",
         choices=("A", "B"))
    flag("closing", "lenient", "what a message without a complete call does: lenient = ends the user turn whatever it holds (the "
         "paper); strict = a malformed one fails", choices=("lenient", "strict"))
    flag("train_tasks", 300, "training tasks over the three training categories", least=3)
    flag("eval_tasks", 50, "test tasks per category and per OOD set", least=1)
    g = p.add_argument_group("rollouts")
    flag("prompts", 12, "prompts (groups) per step, over all processes", least=1)
    flag("group", 8, "rollouts per prompt", least=2)
    flag("max_messages", 16, "model messages per episode", least=1)
    flag("max_message_tokens", 64, "tokens per model message", least=1)
    flag("max_total_tokens", 1024, "tokens per episode", least=2)
    flag("max_observation_tokens", 256, "tokens kept of one tool result (the last ones)", least=1)
    g = p.add_argument_group("sampler")
    flag("engine", "hf", "hf = sample from the trained model itself, vllm = from a copy in vLLM, which gets the new weights "
         "before every rollout and evaluation", choices=("hf", "vllm"))
    flag("kv_cache_gb", 0.25, "vllm: GiB for keys and values, per process", least=0.001)
    flag("engine_dtype", None, "vllm: precision of its copy; default: --compute_dtype", choices=("float32", "bfloat16", "float16"))
    flag("gap_alarm", 0.05, "warn above this `gap`: mean |log p trainer - log p sampler| before the first update", least=0)
    flag("correction", "none", "weigh the policy loss by min(cap, p trainer / p sampler) per token, or by the product over the "
         "rollout (see rl_step.sampler_correction)", choices=CORRECTIONS)
    flag("correction_cap", 2.0, "the cap", least=1)
    flag("correct", ["policy"], "whose rollouts are corrected. hinted: p(token) / p(token | hint); truth: p(token), as if its "
         "sampler were certain of each", type=str, nargs="+", choices=("policy", "hinted", "truth"))
    g = p.add_argument_group("policy loss")
    flag("loss", "grpo", "variant of the policy loss (see rl_step.py)", choices=LOSSES)
    flag("advantage", None, "divide a group's advantages by their std, or only subtract the mean; default: mean for dr_grpo, "
         "else std", choices=("std", "mean"))
    flag("updates", 3, "optimizer updates per RL step; a group is never split", least=1)
    flag("clip_low", None, "1 - clip_low bounds the ratio; default .2 (gspo: 3e-4)", least=0, type=float)
    flag("clip_high", None, "default .2 (dapo: .28, gspo: 4e-4)", least=0, type=float)
    flag("dual_clip", 3.0, "cap of the loss for negative advantages (grpo)", least=1)
    flag("kl", "k3", "estimator of the KL to the reference model", choices=KLS)
    flag("kl_weight", 0.0, "0 = no reference model at all (the paper: 1e-4)", least=0)
    g = p.add_argument_group("optimizer")
    flag("lr", 5e-4, "learning rate of RL updates (the paper, 1.5 B: 1e-6)", least=0)
    flag("sft_lr", 5e-4, "learning rate of SFT updates (the paper: 1e-5 or 1e-6)", least=0)
    flag("sft_batch", 32, "demonstrations per SFT step, over all processes", least=1)
    flag("warmup", 5, "steps of linear warm-up; the first one has lr / warmup, not 0", least=1)
    flag("weight_decay", 0.01, "AdamW weight decay", least=0)
    flag("max_grad_norm", 1.0, "gradients are clipped to this norm", least=0)
    flag("micro_tokens", 16_384, "tokens per forward pass, padding included; changes memory and speed, never the result", least=1)
    g = p.add_argument_group("embedded model (--model tiny)")
    flag("tiny_hidden", 128, "hidden size, a multiple of 32 (heads have 32 dimensions)", least=32)
    flag("tiny_layers", 3, "decoder layers", least=1)
    flag("base_steps", 450, "pre-training steps on clean demonstrations", least=1)
    flag("base_noisy_steps", 200, "then steps on demonstrations with mistakes", least=0)
    flag("base_wrong", 0.9, "there: probability that a call is wrong", least=0, most=1)
    flag("base_malformed", 0.06, "there: probability that a message is malformed", least=0, most=1)
    flag("base_seed", 0, "seed of initialisation and pre-training")
    g = p.add_argument_group("run")
    flag("out", None, "run folder; default runs/SIGNAL-SCHEDULE-CLOSING-seedN")
    flag("resume", False, "continue the run in --out from its newest checkpoint")
    flag("eval_only", False, "evaluate --model and stop; writes eval.json only if --out is given")
    flag("eval_every", 25, "evaluate every so many steps (-1 = only first and last)", least=-1)
    flag("probe_every", 5, "measure the control tokens' probabilities every so many steps (analyze_tokens.py; -1 = never)", least=-1)
    flag("probe_tasks", 30, "ground-truth conversations in the probe (held-out tasks)", least=1)
    flag("save_every", 25, "checkpoint every so many steps (-1 = only the last)", least=-1)
    flag("keep", 2, "newest checkpoints kept (-1 = all)", least=-1)
    flag("threads", -1, "CPU threads per process (-1 = PyTorch's choice; with --engine vllm on a CPU, 1)", least=-1)
    a = p.parse_args(argv)
    if a.world == "bfcl":
        p.set_defaults(**BFCL_DEFAULTS)
        a = p.parse_args(argv)

    # Flags that cannot work are refused here, before anything is built or written.
    for name, (least, most) in bounds.items():
        value = getattr(a, name)
        if isinstance(value, (int, float)) and not least <= value <= most:       # `not` also refuses nan
            p.error(f"--{name} {value} must be at least {least}" if most == math.inf else
                    f"--{name} {value} must lie between {least} and {most}")
    for name in ("eval_every", "save_every", "probe_every", "keep", "threads"):
        if getattr(a, name) == 0:
            p.error(f"--{name} 0 must be -1 or at least 1")
    if a.tiny_hidden % 32:
        p.error(f"--tiny_hidden {a.tiny_hidden} must be a multiple of 32")
    if a.updates > (a.group if a.split_groups else a.prompts):
        p.error(f"--updates {a.updates} is more than " + (f"--group {a.group}" if a.split_groups else f"--prompts {a.prompts}, "
                "and a group is never split") + "; lower --updates")
    if a.schedule not in SIGNALS[a.signal].schedules and not a.eval_only:
        p.error(f"--signal {a.signal} does not go with --schedule {a.schedule}; it goes with "
                + ", ".join(f"--schedule {s}" for s in SIGNALS[a.signal].schedules))
    for name, signal in (("ops_k", "ops"), ("hints", "hbg")):
        if a.signal == signal and getattr(a, name) >= a.group:
            p.error(f"--{name} {getattr(a, name)} leaves no rollout of the policy in a --group of {a.group}; lower it")
    if not all(part.isdigit() and int(part) > 0 for part in a.phases.split(":")):
        p.error(f"--phases {a.phases} must be shares such as 1:2:3")
    if a.schedule == "interleaved" and min(phases(a)) < 1:
        p.error(f"--phases {a.phases} of --steps {a.steps} has a phase without a step; raise --steps")
    if a.schedule == "interleaved" and a.signal in ("ets", "prs") and a.ets_window > min(phases(a)[:-1], default=a.ets_window):
        p.error(f"--ets_window {a.ets_window} is longer than the shortest RL phase before an SFT phase "
                f"({min(phases(a)[:-1])} steps); lower it, or raise --steps")
    if a.alarm not in PROBED or a.alarm.endswith(("calls_exact", "log_likelihood", "moved")):
        p.error(f"--alarm {a.alarm} is not one of the probe's probabilities: "
                + ", ".join(name for name in PROBED if "|" in name or name.endswith("circuit")))
    if a.schedule == "adaptive" and a.sft_budget < a.burst_rows:
        p.error(f"--sft_budget {a.sft_budget} does not pay for one burst of --burst_rows {a.burst_rows}; raise it")
    if a.probe_every < 0 and (a.stop_on_alarm or a.schedule == "adaptive"):
        p.error("the alarm listens to the probe, so --stop_on_alarm and --schedule adaptive need --probe_every")
    if a.world == "bfcl" and a.model == "tiny":
        p.error("--world bfcl needs a --model that can read, such as Qwen/Qwen2.5-1.5B-Instruct; tiny knows only its own world")
    if a.acebench and a.world != "bfcl":
        p.error("--acebench goes with --world bfcl")
    if a.sft_file and a.signal != "sft":
        p.error(f"--sft_file goes with --signal sft, not {a.signal}")
    if a.correction != "none" and a.retokenize:
        p.error("--correction compares with the sampler's log-probabilities, and --retokenize has none; drop one of them")
    if a.reanchor_kl and not a.kl_weight:
        p.error("--reanchor_kl needs a --kl_weight above 0")
    if a.resume and a.eval_only:
        p.error("--resume and --eval_only exclude each other; --eval_only --model RUN_FOLDER evaluates a run")
    a.compute_dtype = a.compute_dtype or a.dtype
    a.engine_dtype = a.engine_dtype or a.compute_dtype
    if a.compute_dtype != a.dtype and not a.shard:
        p.error(f"--compute_dtype {a.compute_dtype} beside --dtype {a.dtype} needs --shard, which keeps both copies")
    a.advantage = a.advantage or ("mean" if a.loss == "dr_grpo" else "std")
    a.clip_low = a.clip_low if a.clip_low is not None else {"gspo": 3e-4}.get(a.loss, 0.2)
    a.clip_high = a.clip_high if a.clip_high is not None else {"gspo": 4e-4, "dapo": 0.28}.get(a.loss, 0.2)
    if not a.eval_only:
        a.out = a.out or f"runs/{a.signal}-{a.schedule}-{a.closing}-seed{a.seed}"
    return a


def phases(a):
    """--phases 1:2:3 --steps 100 -> [17, 33, 50]: the RL phases' lengths, which add up to --steps"""
    shares = [int(part) for part in a.phases.split(":")]
    ends = [round(a.steps * sum(shares[:i + 1]) / sum(shares)) for i in range(len(shares))]
    return [end - start for start, end in zip([0, *ends], ends)]


def plan(a):
    """The schedule: the parts of every step, in order.

      "rl"      rollouts and policy updates
      "sft"     cross-entropy on a batch of the signal's rows; beside "rl" it is one more term of the same updates
      "phase"   a whole SFT phase: --sft_epochs passes over the rows that the signal has now (adaptive: --burst_rows of them)"""
    rl, sft, phase = ("rl",), ("sft",), ("phase",)
    return {"rl": [rl] * a.steps, "sft": [sft] * a.sft_steps, "sft_then_rl": [sft] * a.sft_steps + [rl] * a.steps,
            "interleaved": [part for length in phases(a) for part in [rl] * length + [phase]][:-1],
            "synchronous": [("rl", "sft")] * a.steps, "adaptive": [rl] * a.steps}[a.schedule]


def what(step, a, fire=False):
    """The parts of step number `step`; fire (adaptive): a phase comes first"""
    return ("phase", "rl") if fire else plan(a)[step]


def random_bursts(a):
    """--trigger random: the control for the alarm. As many bursts as the budget pays for, at probes drawn by the seed."""
    probes = range(a.probe_every, a.steps, a.probe_every)
    return set(random.Random(f"{a.seed} bursts").sample(probes, min(len(probes), a.sft_budget // a.burst_rows)))


def total_steps(a):
    return len(plan(a))


# ----------------------------------------------------------------------------------------------------------------------
# 2. Processes. Under torchrun every process runs this same script; rank r owns the groups g with g % world == r.


def start_processes(a):
    """-> rank, world size, device"""
    if a.engine == "vllm" and a.threads < 0 and not torch.cuda.is_available():
        a.threads = 1                            # vLLM's threads spin while they wait; where they compete: 20 times slower
    if a.threads > 0:
        torch.set_num_threads(a.threads)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = a.device if a.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:"):
        raise UserError(f"--device {device} is not supported; use --device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {a.device}, but PyTorch sees no CUDA device here; use --device cpu.")
    if device == "cuda" and a.packed and a.compute_dtype == "float32":
        raise UserError("--packed on a GPU needs 16 bits, its kernel knows no others; add --shard --compute_dtype bfloat16.")
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ or a.shard:                              # FSDP needs a process group even for one process
        if os.environ.get("RANK", "0") == "0" and a.model == "tiny" and not Path(tiny_folder(a)).exists():
            build_tiny(a, tiny_folder(a))        # before there is a group: it sums over ranks, and the others do not take part
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", **alone,
                                timeout=timedelta(hours=1))          # so long may rank 0 wait for the judge; else 10 minutes
        return dist.get_rank(), dist.get_world_size(), device
    return 0, 1, device


def gather(items):
    """[a, b] on rank 0, [c] on rank 1 -> [a, b, c] on both."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [x for part in lists for x in part]


def rank0_first(rank, make):
    """Only rank 0 calls make(); all ranks get what it returns. A UserError there ends all ranks with the same message."""
    outcome = [None, None]
    if rank == 0:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


# ----------------------------------------------------------------------------------------------------------------------
# 3. The model


def tiny_folder(a):
    """Where the embedded base is kept: the name changes with its recipe, and with the source that it is made of"""
    recipe = {k: v for k, v in vars(a).items() if k.startswith(("tiny_", "base_"))}
    world = inspect.getsource(tools).partition("\n# 5. BFCL.")[0].rpartition("\n# ---")[0]       # another world, another base
    source = world + "".join(inspect.getsource(f) for f in (
        supervision.tiny_tokenizer, supervision.tiny_model, supervision.noisy_demonstrations, pretrain_tiny))
    return f"runs/tiny-base-{zlib.crc32((json.dumps(recipe, sort_keys=True) + source).encode()):08x}"


def load_policy(a, rank, device):
    """--model -> model, Chat, the folder or name that it came from"""
    name = a.model
    if name == "tiny":
        name = tiny_folder(a)
        rank0_first(rank, lambda: None if Path(name).exists() else build_tiny(a, name))
    elif (Path(name) / "checkpoints" / "latest").exists():
        name = str(newest_checkpoint(name))
    return *load_model(name, a, device), name


def build_tiny(a, path):
    print(f"pre-training the embedded model: {a.base_steps + a.base_noisy_steps} steps, once; it stays in {path}", flush=True)
    model, tokenizer = pretrain_tiny(a)
    publish(path, lambda tmp: (model.save_pretrained(tmp), tokenizer.save_pretrained(tmp)))


def load_model(name, a, device):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, a.dtype), attn_implementation="packed" if a.packed
                                                     else None).to("cpu" if a.shard else device)
    except Exception as error:                                       # every library below has its own exception types here
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load the model {name}: {reason}; check --model (a folder with config.json, weights and "
                        "tokenizer files, or a Hugging Face name that this machine can download).") from error
    if a.chat_template:
        if a.chat_template not in TEMPLATES and not Path(a.chat_template).is_file():
            raise UserError(f"--chat_template {a.chat_template} is not a file, nor one of {', '.join(TEMPLATES)}.")
        tokenizer.chat_template = TEMPLATES.get(a.chat_template) or Path(a.chat_template).read_text()
    if a.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if a.shard:
        shard(model, device, getattr(torch, a.compute_dtype))
    return model, Chat(tokenizer)


def make_engine(a, model, chat):
    if a.engine == "hf":
        return HFEngine(model, chat.stop_ids)
    engine = VLLMEngine(model, chat.stop_ids, a.max_total_tokens, a.kv_cache_gb, a.engine_dtype)
    engine.sleep()                               # until `sampling` wakes it: the probe and the trainer come first
    return engine


@contextmanager
def sampling(engine, model):
    """Inside, the engine samples from the weights of this moment, never from older ones: vLLM from its own copy of them (and
    outside it sleeps), HFEngine from the model itself, which must then be whole on every rank."""
    engine.load(model)
    with gathered(model) if isinstance(engine, HFEngine) else nullcontext():
        yield
    engine.sleep()


# ----------------------------------------------------------------------------------------------------------------------
# 4. Checkpoints: HF format + optimizer + RNG + counters. A folder gets its name only when it is complete, and `latest` is
#    written after that, so a run killed at ANY moment leaves the previous checkpoint in force.


def publish(path, write):
    """write(tmp) fills a temporary folder; then MANIFEST.json (sizes and checksums), fsync, and one atomic rename."""
    path = Path(path)
    tmp = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    write(tmp)
    manifest = {f.name: [f.stat().st_size, checksum(f)] for f in sorted(tmp.iterdir())}
    (tmp / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    for f in [*tmp.iterdir(), tmp]:
        fd = os.open(f, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(tmp, path)


def checksum(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def write_atomically(path, text):
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def newest_checkpoint(out):
    """runs/x -> runs/x/checkpoints/step-50, verified file by file"""
    path = Path(out) / "checkpoints" / (Path(out) / "checkpoints" / "latest").read_text().strip()
    if not (path / "MANIFEST.json").exists():
        raise UserError(f"the checkpoint {path} is missing; point {path.parent / 'latest'} to an older step-N folder.")
    for name, (size, crc) in json.loads((path / "MANIFEST.json").read_text()).items():
        if not (path / name).exists() or (path / name).stat().st_size != size or checksum(path / name) != crc:
            raise UserError(f"the checkpoint file {path / name} is damaged; point {path.parent / 'latest'} to an older "
                            "step-N folder.")
    return path


def whole_state(model, optimizer):
    """-> weights (None: save_pretrained finds them itself) and optimizer state, as rank 0 can write them. All ranks call it."""
    if not is_sharded(model):
        return None, optimizer.state_dict()
    weights = get_model_state_dict(model, options=WHOLE)
    if model.config.tie_word_embeddings:         # one tensor under two names; save_pretrained would store it twice
        weights = {k: v for k, v in weights.items() if k not in model._tied_weights_keys}
    return weights, get_optimizer_state_dict(model, optimizer, options=WHOLE)


def save_checkpoint(out, step, model, tokenizer, weights, state, keep):
    folder = Path(out) / "checkpoints"

    def write(tmp):
        model.save_pretrained(tmp, state_dict=weights)
        tokenizer.save_pretrained(tmp)
        torch.save(state, tmp / "state.pt")
    publish(folder / f"step-{step}", write)
    write_atomically(folder / "latest", f"step-{step}")
    steps = sorted((int(p.name[5:]) for p in folder.glob("step-*")), reverse=True)
    for old in steps[keep:] if keep > 0 else []:
        shutil.rmtree(folder / f"step-{old}")


# What may differ between a run and its resumption: nothing that changes what is trained.
FREE_ON_RESUME = {"resume", "out", "eval_every", "save_every", "keep", "threads", "device",
                  "micro_tokens", "packed", "eval_only", "judge_url", "judge_workers", "judge_timeout", "judge_retries", "judge_cache",
                  "gap_alarm", "kv_cache_gb"}


def check_run(a):
    """Can the run folder be made, or continued? -> the checkpoint to continue from, or None. Writes nothing."""
    out = Path(a.out)
    if not a.resume:
        if out.exists():
            raise UserError(f"the run folder {out} exists; continue it with --resume, or choose another --out.")
        return None
    if not (out / "config.json").exists():
        raise UserError(f"there is no run in {out} to resume; drop --resume, or name the run's folder with --out.")
    before, config = json.loads((out / "config.json").read_text()), run_config(a)
    for flag in sorted(config.keys() | before.keys()):
        if config.get(flag) != before.get(flag):
            raise UserError(f"the run in {out} was started with --{flag} {before.get(flag)}, not {config.get(flag)}; resume "
                            "it with the same flags, or start another run with another --out.")
    return str(newest_checkpoint(out)) if (out / "checkpoints" / "latest").exists() else None


def run_config(a):
    return {k: v for k, v in vars(a).items() if k not in FREE_ON_RESUME}


def cut_log(path, step):
    """Drop the lines of steps that the resumed run will do again (and a last line that was cut in the middle)."""
    rows = read_rows(path) if path.exists() else []
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] < step))


# ----------------------------------------------------------------------------------------------------------------------
# 5. Evaluation: greedy, on test tasks; all four categories, another app (content-OOD), the other syntax (format-OOD).


def tasks_of(a, split, category, n):
    """The first n tasks of the chosen world. tiny has no validation split: its test tasks serve as both."""
    if a.world == "bfcl":
        return bfcl_tasks(split, category, n, a.validation)
    return make_tasks("train" if split == "train" else "test", category, n)


def mixed_tasks(a, split, n):
    """n tasks, a third of each training category"""
    return [t for c in TRAIN_CATEGORIES for t in tasks_of(a, split, c, -(-n // 3))][:n]


def evaluation_sets(a, split):
    """{"base": [(task, "A"), ...], ..., "content_ood": [...], "format_ood": [(task, "B"), ...]}; of bfcl, long_context and
    ACEBench (two sets in place of content_ood) exist only in the test split"""
    other = "B" if a.syntax == "A" else "A"
    categories = TRAIN_CATEGORIES if a.world == "bfcl" and split != "test" else CATEGORIES
    sets = {c: [(t, a.syntax) for t in tasks_of(a, split, c, a.eval_tasks)] for c in categories}
    if a.world == "tiny":
        sets["content_ood"] = [(t, a.syntax) for t in make_tasks("test", "base", a.eval_tasks, held_out=True)]
    sets["format_ood"] = [(t, other) for t in mixed_tasks(a, split, len(sets["base"]))]
    if a.acebench and split == "test":
        entries = acebench_tasks(a.acebench, a.eval_tasks)
        sets |= {"ace_brackets": [(t, "B") for t in entries], "ace_tags": [(t, "A") for t in entries]}
    return sets


def evaluate(engine, chat, sets, a, rank, world):
    """-> {"base": .12, ..., "content_ood": .02, "format_ood": .2, "average": .10 (of the four categories), "average_clean": .08
    (solved, and every message clean), "format_ood_clean": .15, ..., "state/call": .5, ...}; of bfcl also "base_strict": .11, ...,
    "average_strict": .09 (tools.verdicts)"""
    closing = "lenient" if a.world == "bfcl" else a.closing          # both verdicts need the conversation to its end
    work = [(name, make_env(task, syntax, closing)) for name, pairs in sets.items() for task, syntax in pairs][rank::world]
    # as many conversations at a time as a training step has: the keys and values of all of bfcl's would fit nowhere
    size, episodes = max(1, a.prompts * a.group // world) if a.world == "bfcl" else max(1, len(work)), []
    for envs in ([env for _, env in work[i:i + size]] for i in range(0, len(work), size)):
        episodes += rollout(engine, chat, envs, limits_of(a), [begin(chat, env) for env in envs], temperature=0.0)
    done = gather([score for (name, env), e in zip(work, episodes) for score in judged(name, env, e)])
    names = dict.fromkeys([*sets, *(name for name, _, _ in done)])
    result = {name: mean(r for n, r, _ in done if n == name) for name in names}
    clean = {name: mean(r * is_clean(states) for n, r, states in done if n == name) for name in sets}
    for ending, scores in (("", result), ("_clean", clean)):
        result[f"average{ending}"] = mean(scores[c] for c in CATEGORIES if c in sets)
    if a.world == "bfcl":
        result["average_strict"] = mean(result[f"{c}_strict"] for c in CATEGORIES if c in sets)
    result |= {f"{name}_clean": clean[name] for name in ("content_ood", "format_ood") if name in sets}
    states = Counter(s for name, _, states in done if name in CATEGORIES for s in states)
    return result | {f"state/{s}": states[s] / max(states.total(), 1) for s in STATES}


def judged(name, env, e):
    """One finished conversation -> [("base", 1.0, states)]; of bfcl [("base", 1.0, states), ("base_strict", 0.0, states)]"""
    if not isinstance(env.task, BfclTask):
        return [(name, e.reward, e.states)]
    messages = [parse(s.text, env.syntax, s.state != "cut") for s in e.spans if s.who == "model"]
    return [(name + suffix, reward, e.states) for suffix, reward in verdicts(env.task, env.syntax, messages).items()]


def limits_of(a):
    return Limits(a.max_messages, a.max_message_tokens, a.max_total_tokens, a.max_observation_tokens)


# ----------------------------------------------------------------------------------------------------------------------
# 6. The run


def main(argv=None):
    a = parse_args(argv)
    rank, world, device = start_processes(a)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    say = tqdm.write if rank == 0 else lambda text: None
    if a.prompts < world:
        raise UserError(f"--prompts {a.prompts} is less than the {world} processes; raise it.")

    # ---- model ------------------------------------------------------------------------------------------------------
    if a.engine == "vllm":
        import_vllm()                            # if it is missing, say so before anything is built
    checkpoint = None if a.eval_only else rank0_first(rank, lambda: check_run(a))
    model, chat, start_from = load_policy(a, rank, device)
    n_params = sum(p.numel() for p in model.parameters())
    control_ids = [i for token, i in chat.tokenizer.get_added_vocab().items() if token in CONTROL]
    say(f"model: {start_from}, {n_params / 1e6:.2f} M parameters, {world} process(es) on {device}")
    sets = evaluation_sets(a, "test" if a.eval_only else "validation")
    if a.eval_only:
        with sampling(engine := make_engine(a, model, chat), model):
            scores = evaluate(engine, chat, sets, a, rank, world)
        say(table({"score": scores}))
        if a.out and rank == 0:
            Path(a.out).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(a.out) / "eval.json", json.dumps(scores, indent=1))
        return
    if a.judge_url and a.signal == "prs":
        rank0_first(rank, lambda: Judge(a).check())
    reference = load_model(start_from, a, device)[0].eval().requires_grad_(False) if a.kl_weight > 0 else None

    # ---- data and signal --------------------------------------------------------------------------------------------
    tasks = mixed_tasks(a, "train", a.train_tasks)
    test_sets = evaluation_sets(a, "test") if a.world == "bfcl" else {}       # looked at once, at the end of the run
    for task, syntax in [(t, a.syntax) for t in tasks] + sum([*sets.values(), *test_sets.values()], []):
        if (length := len(chat.prompt(Env(task, syntax).opening()))) >= a.max_total_tokens:
            raise UserError(f"the prompt of {task.id} has {length} tokens, which leaves no room for an answer within "
                            f"--max_total_tokens {a.max_total_tokens}; raise it.")
    signal = SIGNALS[a.signal](a, chat, tasks, limits_of(a))
    if signal.note:
        say(signal.note)
    wide = Limits(10**3, 10**6, 10**6, a.max_observation_tokens)         # the probe samples nothing, so no limit need cut it
    shown = mixed_tasks(a, "validation", a.probe_tasks) if rank == 0 and a.probe_every > 0 else []
    probe_rows = [demonstrate(chat, t, a, wide) for t in shown]
    with gathered(model):
        at_start, classes = truth_logprobs(model, probe_rows, a.micro_tokens), token_classes(chat)
    alarm = Alarm(a.alarm_factor, a.alarm_checks)
    if checkpoint:
        model, chat = load_model(checkpoint, a, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=a.weight_decay)
    engine = make_engine(a, model, chat)

    # ---- run folder -------------------------------------------------------------------------------------------------
    # Besides weights and optimizer a run has no state but these numbers: every random choice is a function of the seed,
    # the step and the place where it is made. (PyTorch's generator is saved for models with dropout.)
    n = {"step": 0, "rl_steps": 0, "sft_steps": 0, "rows": 0, "since_switch": 0, "phase": ""}
    if checkpoint:
        state = torch.load(Path(checkpoint) / "state.pt", map_location="cpu", weights_only=True, mmap=True)      # the ranks share its pages
        n = state["counters"]
        if a.shard:
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
        else:
            optimizer.load_state_dict(state["optimizer"])
        signal.load(state["signal"])
        vars(alarm).update(n["alarm"])
        torch.set_rng_state(state["rng"])
        if state["reference"]:
            set_model_state_dict(reference, state["reference"], options=WHOLE)
    out, start, last = Path(a.out), n["step"], total_steps(a)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.json", json.dumps(run_config(a), indent=1))
        for name in ("metrics.jsonl", "episodes.jsonl"):
            cut_log(out / name, start)
    say(f"run folder: {out}, steps {start} to {last}")

    for step in tqdm(       # disable=None: a bar only where the output is a terminal
            range(start, last + 1), str(out), total=last, initial=start, disable=None if rank == 0 else True):

        # ---- the probe, and the alarm that listens to it --------------------------------------------------------------
        probed = a.probe_every > 0 and (step == last or step % a.probe_every == 0)
        n["alarm"] = copy.deepcopy(vars(alarm))  # as a checkpoint of this step must hold it: before this probe
        if probed:
            with gathered(model):
                row = rank0_first(rank, lambda: probe(model, chat, probe_rows, a.micro_tokens, classes=classes, start=at_start))
            if a.alarm not in row:
                raise UserError(f"--alarm {a.alarm} is about a place that --syntax {a.syntax} does not have; choose another.")
            rang = alarm.on
            if alarm.update(row[a.alarm]) and not rang:
                say(f"step {step:4d}  ALARM: {a.alarm} is {row[a.alarm]:.3g}, at first {mean(alarm.first):.3g}")
                if a.stop_on_alarm:
                    last = step
            append_line(out / "metrics.jsonl", {"step": step, "alarm": int(alarm.on)} | row, rank)

        # ---- evaluation and checkpoint: the state BEFORE step number `step` -------------------------------------------
        due = step in (0, last) or (a.eval_every > 0 and step % a.eval_every == 0)
        for name, chosen in (("eval", sets if due else {}), ("test", test_sets if step == last else {})):
            if chosen:
                with sampling(engine, model):
                    scores = evaluate(engine, chat, chosen, a, rank, world)
                say(f"step {step:4d}  {name} " + "  ".join(f"{k} {scores[k]:.3f}" for k in chosen))
                append_line(out / "metrics.jsonl", {"step": step} | {f"{name}/{k}": v for k, v in scores.items()}, rank)
        if step > start and (step == last or (a.save_every > 0 and step % a.save_every == 0)):
            weights, moments = whole_state(model, optimizer)
            anchor = get_model_state_dict(reference, options=WHOLE) if a.reanchor_kl else None
            if rank == 0:
                save_checkpoint(out, step, model, chat.tokenizer, weights, {
                    "counters": n | {"step": step}, "optimizer": moments, "signal": signal.state(), "rng": torch.get_rng_state(),
                    "reference": anchor}, a.keep)
        if step == last:
            break

        # ---- the schedule: which parts has this step, and did the phase just change? ------------------------------------
        began, fire = time.time(), False
        if a.schedule == "adaptive" and probed and n["rows"] + a.burst_rows <= a.sft_budget:
            fire = alarm.on if a.trigger == "alarm" else step in random_bursts(a)
        parts = what(step, a, fire)
        row = {"step": step, "phase": "+".join(parts), "skipped_updates": 0}
        if row["phase"] != n["phase"]:
            if a.fresh_optimizer:
                optimizer.state.clear()
            if a.reanchor_kl and "rl" in parts:
                reference.load_state_dict(model.state_dict())
            n["phase"], n["since_switch"] = row["phase"], 0
        updated = n["since_switch"] if a.rewarm else n["rl_steps"] if "rl" in parts else n["sft_steps"]
        warm = min(1.0, (updated + 1) / a.warmup)

        if "phase" in parts:
            # ---- a whole SFT phase: epochs over the rows that the signal has now, warm-up, then cosine ------------------
            rows, done = rank0_first(rank, signal.rows), []
            visits = (a.burst_rows if a.schedule == "adaptive" else len(rows) * a.sft_epochs) if rows else 0
            total = -(-visits // a.sft_batch)
            model.train()
            for u in tqdm(range(total), desc="SFT phase", leave=False, disable=None if rank == 0 else True):
                up, decay = (u + 1) / max(1, a.sft_warmup * total), 0.5 * (1 + math.cos(math.pi * u / total))
                set_lr(optimizer, a.sft_lr * min(1.0, up) * decay)
                some = endless(rows, u * a.sft_batch, min(a.sft_batch, visits - u * a.sft_batch), f"{a.seed} phase {step}")
                m = sft_backward(model, some[rank::world], micro_tokens=a.micro_tokens)
                done.append(m | optimizer_step(model, optimizer, a.max_grad_norm, m["sft_loss"]))
            if signal.skipped:
                say(f"step {step:4d}  WARNING: {signal.skipped} row(s) left out: the judge failed, or the text was too long")
            row |= {"sft_rows": len(rows), "sft_rows_left_out": signal.skipped, "sft_updates": total, "sft_visits": visits,
                    "skipped_updates": sum(m["skipped_updates"] for m in done)}
            row |= {k: mean(m[k] for m in done) for k in ("sft_loss", "grad_norm")} if done else {}
            n["sft_steps"] += total
            n["rows"] += visits

        if "rl" in parts:
            # ---- roll out: G conversations per prompt, all of them together ---------------------------------------------
            batch = endless(tasks, n["rl_steps"] * a.prompts, a.prompts, f"{a.seed} prompts")
            mine = [g for g in range(a.prompts) if g % world == rank]        # whole groups stay on one rank
            with sampling(engine, model):
                episodes = roll_out(signal, engine, batch, mine, seed=(a.seed, step))
            credit = credits(episodes, a, step)
            record_episodes(out / "episodes.jsonl", step, chat, episodes, rank)
            everyones = gather(list(zip(episodes, credit)))
            row |= rollout_metrics(everyones)
            signal.observe(step, sorted((e for e, _ in everyones), key=lambda e: (e.group_id, e.sample)))
            row["rollout_s"] = time.time() - began

            # ---- rows that were not sampled as they are trained get the trainer's own log-probabilities ----------------
            model.train()
            if a.retokenize:
                episodes = [retokenized(chat, e) for e in episodes]
            unhinted = a.signal == "hbg" and not a.hint_in_update
            corrected = a.correct if a.correction != "none" else ()
            foreign = [e for e in episodes if a.retokenize or e.source == "truth" or (e.source == "hinted" and unhinted)
                       or e.source in corrected]
            ratio = recompute_logprobs(model, foreign, a.micro_tokens, corrected)
            if unhinted and not a.retokenize:
                row["hint_log_ratio"] = ratio            # mean of log p(token | hint) - log p(token | no hint)

            # ---- advantages: compared with the own group ----------------------------------------------------------------
            adv = advantages(credit, [e.group_id for e in episodes], a.advantage == "std")
            if a.only:
                adv = [x if (x > 0) == (a.only == "positive") else 0.0 for x in adv]

            # ---- policy updates: the groups in `updates` mini-batches ---------------------------------------------------
            set_lr(optimizer, a.lr * warm)
            rows = rank0_first(rank, signal.rows) if "sft" in parts else []
            done = []
            for u in range(a.updates):
                pick = [i for i, e in enumerate(episodes) if
                        (e.sample * a.updates // a.group if a.split_groups else e.group_id * a.updates // a.prompts) == u]
                m = rl_backward(model, [episodes[i] for i in pick], [adv[i] for i in pick], loss=a.loss,
                                clip=(a.clip_low, a.clip_high), dual_clip=a.dual_clip, kl=a.kl, kl_weight=a.kl_weight,
                                reference=reference, shaped=a.signal == "ops" and a.ops_ratio == "shaped",
                                masked_ids=control_ids if a.mask_control else (), micro_tokens=a.micro_tokens,
                                correction=a.correction, cap=a.correction_cap,
                                max_tokens=a.max_total_tokens, watch={k: classes[k][0] for k in ("open", "end")})
                if rows:                         # synchronous: the cross-entropy is one more term, with its own normaliser
                    some = endless(rows, n["rows"], a.sft_batch, f"{a.seed} rows")
                    m |= sft_backward(model, some[rank::world], a.sft_weight, a.micro_tokens)
                    n["rows"] += a.sft_batch
                done.append(m | optimizer_step(model, optimizer, a.max_grad_norm, m["loss"] + m.get("sft_loss", 0.0)))
            skipped = row["skipped_updates"] + sum(m["skipped_updates"] for m in done)
            row |= {k: mean(m[k] for m in done) for k in done[0]}
            row |= {k: sum(m[k] for m in done) for k in ("tokens", "rl_tokens")} | {"skipped_updates": skipped}
            row |= {"sft_visits": a.updates * a.sft_batch} if rows else {}
            row |= {k: done[0][k] for k in ("gap", "gap_max")}   # |log p trainer - log p sampler| before any update: about 0
            if not row["gap"] <= a.gap_alarm:    # so that nan warns too
                say(f"step {step:4d}  WARNING: trainer and sampler differ by {row['gap']:.3g} per token (--gap_alarm "
                    f"{a.gap_alarm:g}), at most by {row['gap_max']:.3g}; --correction token weighs the loss accordingly")
            n["rl_steps"] += 1

        elif "sft" in parts:
            # ---- one cross-entropy update on a batch of the signal's rows -----------------------------------------------
            rows = rank0_first(rank, signal.rows)
            if not rows:
                raise UserError(f"--signal {a.signal} has no rows at step {step}, and this step trains nothing else; use a "
                                "schedule that begins with RL.")
            rows = endless(rows, n["rows"], a.sft_batch, f"{a.seed} rows")
            set_lr(optimizer, a.sft_lr * warm)
            model.train()
            m = sft_backward(model, rows[rank::world], micro_tokens=a.micro_tokens)
            row |= m | optimizer_step(model, optimizer, a.max_grad_norm, m["sft_loss"]) | {"sft_visits": a.sft_batch}
            n["sft_steps"] += 1
            n["rows"] += a.sft_batch

        # ---- log ------------------------------------------------------------------------------------------------------
        n["since_switch"] += 1
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": time.time() - began}
        if row["skipped_updates"]:
            say(f"step {step:4d}  WARNING: {row['skipped_updates']} update(s) skipped, loss or gradient not finite")
        append_line(out / "metrics.jsonl", row, rank)
        say(one_line(row))

    # ---- summary ------------------------------------------------------------------------------------------------------
    if rank == 0:
        say(f"\n{summary(out)}\n\n{out}/metrics.jsonl   a line per step        {out}/episodes.jsonl   conversations to read\n"
            f"{out}/checkpoints/   Hugging Face format    python analyze_tokens.py {out}   this summary, and the states over time")


def credits(episodes, a, step):
    """The numbers that the advantages are made of, one per episode; the metric `reward` stays the task's (--reward)."""
    if a.reward == "random":
        return [float(random.Random(f"{a.seed} {step} {e.group_id} {e.sample}").random() < 0.2) for e in episodes]
    if a.reward == "shuffled":                   # as many mixed groups and as large advantages, but nothing to be learnt
        groups = {e.group_id: [] for e in episodes}
        for e in episodes:
            groups[e.group_id].append(e.reward)
        for g, rewards in groups.items():
            random.Random(f"{a.seed} {step} {g}").shuffle(rewards)
        return [groups[e.group_id].pop() for e in episodes]
    return [e.reward + 0.5 * (a.reward == "format" and is_clean(e.states)) for e in episodes]


def endless(items, start, n, seed):
    """n items from position `start` of an endless stream of shuffled passes: a pure function, so resuming needs no more
    than the position."""
    laps = range(start // len(items), -(-(start + n) // len(items)))                 # the passes that it touches
    stream = [item for lap in laps for item in random.Random(f"{seed} {lap}").sample(items, len(items))]
    return stream[start % len(items):][:n]


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def append_line(path, row, rank):
    if rank == 0:
        with open(path, "a") as f:
            f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def record_episodes(path, step, chat, episodes, rank):
    """Of rank 0's episodes keep what one wants to read: the best, the worst, and one with a malformed message."""
    by_reward = sorted(episodes, key=lambda e: e.reward)
    odd = [e for e in episodes if not is_clean(e.states)]
    picks = {id(e): e for e in [by_reward[-1], by_reward[0], *odd[:1]]}
    for e in picks.values():
        append_line(path, {"step": step, "task": e.task_id, "group": e.group_id, "sample": e.sample, "reward": e.reward,
                   "status": e.status, "failed_turn": e.failed_turn, "states": e.states, "text": transcript(chat, e)}, rank)


def cli(argv=None):
    """main, with user mistakes as one sentence and exit status 2, Ctrl-C as 130"""
    status, alone, rank = 0, int(os.environ.get("WORLD_SIZE", 1)) == 1, int(os.environ.get("RANK", 0))
    try:
        main(argv)
    except UserError as error:
        time.sleep(5 if rank else 0)             # mostly all ranks fail alike: then rank 0 has said it, and this one is dead by now
        print(f"train.py: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        status = 130
    except Exception:
        if alone:
            raise
        traceback.print_exc()
        status = 1
    if status and not alone:                     # die at once, so that torchrun ends the others: an orderly exit would wait, in
        sys.stdout.flush()                       # the process group's destructor, for ranks that wait for this one
        sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized() and "vllm" not in sys.modules:          # vLLM's engine leaves the group itself, at exit
        gc.collect()                             # FSDP's modules are cycles that hold the group; if it lives on until the
        dist.destroy_process_group()             # interpreter ends, its threads end the process with an abort, now and then
    return status


if __name__ == "__main__":
    sys.exit(cli())
