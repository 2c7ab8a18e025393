"""train.py -- the run: flags, schedule, main loop, evaluation, checkpoints.

    python train.py                                             vanilla GRPO on a laptop
    python train.py --signal ets --schedule interleaved         SFT on failed tasks between phases of RL
    python train.py --eval_only --model runs/NAME               evaluate the newest checkpoint of a run
    torchrun --nproc-per-node 2 -- train.py                     the same numbers from 2 processes

The algorithm is `train`, at the end: one pass through its loop is one step of the paper.
"""
import argparse
import gc
import json
import os
import shutil
import signal as os_signal
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as sharded_state
from tqdm import tqdm
from transformers.utils import logging as hf_logging

from analyze_tokens import (checksum, lock, log_line, mean, newest_checkpoint, one_line, pretrained, probe,
                            publish, read_json, read_records, record_episodes, rollout_metrics, saved_steps,
                            summary, table, truth_logprobs, verified, world_checksum, write_atomically)
from rl_step import KLS, LOSSES, advantages, assign_credit, policy_updates, set_old_logprobs
from rollout import (STATES, TEMPLATES, HFEngine, Limits, VLLMEngine, begin, conversations_that_fit,
                     demonstrate, import_vllm, is_clean, parse, reencoded, rollout)
from sft_step import (WHOLE, gather, gathered, is_sharded, my_share, rank, rank0_first, sft_phase, shard,
                      shuffled_passes, world_size)
from supervision import ETS, HBG, OPS, PRS, SFT, SIGNALS, Judge, sample_groups
from tools import BFCL_PACKAGES, CATEGORIES, WORLDS, UserError

SCHEDULES = ("rl", "sft", "sft_then_rl", "interleaved", "synchronous")
BASE = Path(__file__).resolve().parent / "results/base"             # --model tiny
WEIGHT_DECAY = 0.01                              # AdamW's
GAP_WARNING = 0.05  # mean |log p trainer - log p sampler| that is worth a warning

# ------------------------------------------------------------------------------------------------------------
# 1. Flags: name, default (the laptop's), what is allowed (the least number, or choices), help
FLAGS = {
    "recipe": [
        ("signal", "none", SIGNALS, "supervision beside the reward (supervision.py); none = vanilla GRPO"),
        ("schedule", "rl", SCHEDULES, "when which update runs (see `plan`); an SFT phase is ONE step"),
        ("steps", 60, 0, "RL steps"),
        ("sft_epochs", 0, 0, "passes over the rows in an SFT phase; 0 = the paper's: 3, between RL phases 2"),
        ("seed", 0, 0, "seed of the task order and of all sampling")],
    "schedules interleaved, synchronous": [
        ("phases", "1:2:3", None, "interleaved: the RL phases' shares of --steps; SFT phases between"),
        ("sft_weight", 1.0, 0, "synchronous: weight of the cross-entropy in the RL update")],
    "signals": [
        ("sft_file", None, None, "sft: train on this file's dialogues (results/toolace.py)"),
        ("ops_k", 1, 1, "ops: ground-truth rollouts per group"),
        ("ops_ratio", "one", ("one", "shaped"), "ops: their ratio is 1 at first, or p / (p + 0.1)"),
        ("hints", 2, 1, "hbg: hinted rollouts per group"),
        ("hint_in_update", False, None, "hbg: keep the hint in the trained sequence too"),
        ("ets_window", 10, 1, "ets, prs: RL steps that are looked back upon"),
        ("ets_rule", "all", ("all", "any"), "ets, prs: a task failed if all rollouts did, or any"),
        ("judge_url", None, None, "prs: an OpenAI-compatible server; without one the embedded judge writes"),
        ("judge_model", "judge", None, "prs: model name at that server; key: environment JUDGE_API_KEY")],
    "ablations, each doing one thing": [
        ("as_released", False, None, "as the authors' code: messages are encoded again, groups spread over "
         "the updates, every phase begins with a new optimizer, one of RL also from rate 0 and a KL of 0"),
        ("only", None, ("positive", "negative"), "use only the advantages of one sign"),
        ("reward", "task", ("task", "random", "shuffled", "format"), "see rl_step.assign_credit"),
        ("mask_control", False, None, "a negative advantage does not push control tokens")],
    "model": [
        ("model", "tiny", None, "tiny = the embedded one; or a Hugging Face name or folder; or a run folder"),
        ("chat_template", None, None, f"instead of the model's: a Jinja file, or {' or '.join(TEMPLATES)}"),
        ("dtype", "float32", ("float32", "bfloat16"), "precision of the weights"),
        ("shard", False, None, "FSDP2: parameters, gradients and optimizer state in one piece per process"),
        ("compute_dtype", None, ("float32", "bfloat16"), "--shard: of the passes; masters keep --dtype"),
        ("grad_checkpointing", False, None, "keep only the layers' inputs for the backward pass")],
    "world": [
        ("world", "tiny", WORLDS, "tiny = the embedded one; bfcl = BFCL's multi-turn tasks (pip install "
         f"--no-deps {BFCL_PACKAGES}), with the paper's values as defaults: {WORLDS['bfcl'].defaults}"),
        ("validation", 20, 0, "bfcl: of 100 training stories, those set aside for evaluation"),
        ("syntax", "A", ("A", "B"), "A = <tool_call> JSON, B = [f(a='x')]; the other one is format-OOD"),
        ("closing", "lenient", ("lenient", "strict"), "lenient = a message without a complete call ends the "
         "user turn, whatever it holds (the paper); strict = a malformed one fails"),
        ("train_tasks", 300, 3, "training tasks over the three training categories"),
        ("eval_tasks", 50, 1, "test tasks per category and per OOD set")],
    "rollouts": [
        ("prompts", 12, 1, "prompts (groups) per step, over all processes"),
        ("group", 8, 2, "rollouts per prompt"),
        ("max_messages", 16, 1, "model messages per episode"),
        ("max_message_tokens", 64, 1, "tokens per model message"),
        ("max_total_tokens", 1024, 2, "tokens per episode"),
        ("max_observation_tokens", 256, 1, "tokens kept of the tool results of one message (the last ones)"),
        ("test_total_tokens", 0, 0, "test tasks: tokens per episode; 0 = --max_total_tokens"),
        ("test_observation_tokens", 0, 0, "test tasks: of tool results; 0 = --max_observation_tokens"),
        ("engine", "hf", ("hf", "vllm"), "sample from the trained model, or from a copy in vLLM"),
        ("kv_cache_gb", 2.0, 0.001, "the sampler's GiB for keys and values, per process (hf: up to 5/3 of "
         "it while they grow)")],
    "policy loss": [
        ("loss", "grpo", LOSSES, "rl_step.LOSSES"),
        ("updates", 3, 1, "optimizer updates per RL step, of whole groups (but --as_released)"),
        ("clip_low", 0.2, 0, "1 - clip_low bounds the ratio"),
        ("clip_high", 0.2, 0, "1 + clip_high bounds the ratio (DAPO: 0.28)"),
        ("kl", "k3", KLS, "estimator of the KL to the reference model"),
        ("kl_weight", 0.0, 0, "0 = no reference model at all (the paper: 1e-4)"),
        ("correction", 0.0, 0, "weigh tokens by min(CORRECTION, p trainer / p sampler); 2 is usual")],
    "optimizer": [
        ("lr", 1e-3, 0, "learning rate of RL updates: one at which RL alone collapses; 2e-4 holds"),
        ("sft_lr", 5e-4, 0, "learning rate of SFT updates (the paper: 1e-5 or 1e-6)"),
        ("sft_batch", 60, 1, "assistant messages per SFT update, in whole conversations (the paper: 128)"),
        ("warmup", 5, 1, "steps of linear warm-up; the first one has lr / warmup, not 0"),
        ("micro_tokens", 0, 0, "tokens per forward pass: memory and speed, never the result; 0 = by device")],
    "run": [
        ("out", None, None, "run folder; default runs/SIGNAL-SCHEDULE-CLOSING-seedN"),
        ("resume", False, None, "continue the run in --out from its newest checkpoint"),
        ("eval_only", False, None, "evaluate --model and stop; writes eval.json only if --out is given"),
        ("eval_every", 30, -1, "evaluate every so many steps (-1 = only first and last)"),
        ("probe_every", 5, -1, "measure the control tokens' probabilities every so many steps (-1 = never)"),
        ("save_every", 30, -1, "checkpoint every so many steps (-1 = only the last)"),
        ("keep", 2, -1, "newest checkpoints kept (-1 or 0 = all)"),
        ("wandb", None, None, "a project at Weights & Biases that gets the lines of metrics.jsonl, too"),
        ("threads", -1, -1, "CPU threads per process (-1 = PyTorch's choice; with vllm on a CPU, 1)")]}


def parse_args(argv=None):
    p = argparse.ArgumentParser(usage="python train.py [--flag value ...]     (--help explains every flag)",
                                description="Multi-turn tool-use RL, and what keeps it from collapsing.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, default, allowed, help in flags:
            how = {"type": type(default)}        # a number
            if default is False:
                how = {"action": "store_true"}
            elif default is None or isinstance(default, str):
                how = {"choices": allowed}
            group.add_argument(f"--{name}", default=default, help=help, **how)
    args = p.parse_args(argv)
    p.set_defaults(**WORLDS[args.world].defaults)
    args = p.parse_args(argv)
    args.compute_dtype = args.compute_dtype or args.dtype
    refuse_senseless(args, p.error)
    args.micro_tokens = args.micro_tokens or (16_384 if torch.cuda.is_available() else 4096)
    args.sft_epochs = args.sft_epochs or (2 if args.schedule == "interleaved" else 3)
    if not args.eval_only:
        args.out = args.out or f"runs/{args.signal}-{args.schedule}-{args.closing}-seed{args.seed}"
    return args


def refuse_senseless(args, error):
    """Flags that do not go together are refused before anything is built or written."""
    for flags in FLAGS.values():
        for name, default, least, help in flags:
            value = getattr(args, name)
            if isinstance(least, (int, float)) and not value >= least:           # nan neither
                error(f"--{name}: {value} must be at least {least}")
    if args.validation >= 100:
        error(f"--validation: {args.validation} must be less than the 100 training stories")
    signal = SIGNALS[args.signal]                # by its class, so that a fork's subclass is checked too
    if args.schedule not in signal.schedules and not args.eval_only:
        error(f"--signal {args.signal} does not go with --schedule {args.schedule}; it goes with "
              + ", ".join(f"--schedule {s}" for s in signal.schedules))
    spread = "group" if args.as_released else "prompts"              # over the updates
    if args.updates > getattr(args, spread):
        error(f"--updates {args.updates} is more than --{spread} {getattr(args, spread)}; lower it")
    for name, kind in (("ops_k", OPS), ("hints", HBG)):
        if issubclass(signal, kind) and getattr(args, name) >= args.group:
            error(f"--{name} {getattr(args, name)} leaves the policy nothing in a --group of {args.group}")
    if not all(part.isdigit() and int(part) > 0 for part in args.phases.split(":")):
        error(f"--phases {args.phases} must be shares such as 1:2:3")
    if args.schedule == "interleaved":
        lengths = phases(args)
        if len(lengths) < 2:
            error(f"--phases {args.phases} has no SFT phase between two of RL; name two shares or more")
        if min(lengths) < 1:
            error(f"--phases {args.phases} of --steps {args.steps} has a phase without a step; raise --steps")
        if issubclass(signal, ETS) and args.ets_window > min(lengths[:-1]):
            error(f"--ets_window {args.ets_window} is longer than the shortest RL phase before an SFT phase "
                  f"({min(lengths[:-1])} steps); lower it, or raise --steps")
    if args.world == "bfcl" and args.model == "tiny":
        error("--world bfcl needs a --model that can read, such as Qwen/Qwen2.5-1.5B-Instruct")
    if args.sft_file and not args.eval_only and (not issubclass(signal, SFT) or issubclass(signal, ETS)):
        error(f"--sft_file goes with --signal sft, not {args.signal}")
    if args.correction and (args.as_released or args.correction < 1):
        error("--correction is a cap of at least 1; and text that --as_released encodes again has no sampler")
    if args.resume and args.eval_only:
        error("--resume and --eval_only exclude each other; --eval_only --model RUN_FOLDER evaluates a run")
    if args.compute_dtype != args.dtype and not args.shard:
        error(f"--compute_dtype {args.compute_dtype} beside --dtype {args.dtype} needs --shard")
    if args.dtype == "bfloat16" and not args.eval_only:
        error("--dtype bfloat16 would round small updates away; train with --shard --compute_dtype bfloat16")


def phases(args):
    """--phases 1:2:3 --steps 100 -> [17, 33, 50]: the RL phases' lengths, which add up to --steps"""
    shares = [int(part) for part in args.phases.split(":")]
    ends = [round(args.steps * sum(shares[:i + 1]) / sum(shares)) for i in range(len(shares))]
    return [end - start for start, end in zip([0, *ends], ends)]


def plan(args):
    """The schedule -> what each step does:

      "rl"          rollouts and policy updates
      "rl+sft"      the same; cross-entropy on the signal's rows is one more term of the updates
      "sft_phase"   --sft_epochs passes over the rows that the signal has now"""
    if args.schedule == "interleaved":
        steps = []
        for length in phases(args):
            steps += ["rl"] * length + ["sft_phase"]
        return steps[:-1]
    rl_steps = ["rl+sft" if args.schedule == "synchronous" else "rl"] * args.steps
    first = ["sft_phase"] if args.schedule in ("sft", "sft_then_rl") else []
    return first if args.schedule == "sft" else first + rl_steps


# ------------------------------------------------------------------------------------------------------------
# 2. Processes: under torchrun each runs this script; rank r owns the groups g with g % world_size == r


def start_processes(args):
    """-> the device of this process"""
    on_gpu = torch.cuda.is_available()
    if args.engine == "vllm" and args.threads < 0 and not on_gpu:
        args.threads = 1  # vLLM's threads spin while they wait: 20 times slower if they compete
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)                 # what only a model with dropout draws from
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ or args.shard:       # FSDP needs a process group even for one process
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # So long may rank 0 wait for the judge; the default is 10 minutes.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=1), **alone)
    if args.prompts < world_size():
        raise UserError(f"--prompts {args.prompts} is less than the {world_size()} processes; raise it.")
    return device


def say(text):
    if rank() == 0:
        tqdm.write(text)


# ------------------------------------------------------------------------------------------------------------
# 3. The model and its sampler


def starting_point(args):
    """--model -> the folder or name to load"""
    if args.model == "tiny":
        if read_json(BASE / "recipe.json")["world"] != world_checksum():
            raise UserError(f"{BASE} learned another world than the one in tools.py; make a model of "
                            "this one with python results/make_base.py.")
        return str(verified(BASE))
    config = Path(args.out or "", "config.json")
    if args.resume and config.exists():          # another run's checkpoint: the one that this run began with
        begun = Path(str(read_json(config).get("model")))
        if begun.parent == Path(args.model, "checkpoints"):
            return str(verified(begun))
    return str(newest_checkpoint(args.model) or verified(args.model))


def load_model(name, args, device):
    """-> model, Chat"""
    model, chat = pretrained(name, getattr(torch, args.dtype), args.chat_template)
    if args.grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.shard:
        shard(model, device, getattr(torch, args.compute_dtype))
    else:
        model.to(device)
    return model, chat


def make_engine(args, model, chat):
    longest = max(args.max_total_tokens, args.test_total_tokens) + len(chat.sampler_only)
    if args.engine == "hf":
        slots = conversations_that_fit(model.config, longest, args.kv_cache_gb, args.compute_dtype)
        return HFEngine(model, chat.stop_ids, slots, longest)
    engine = VLLMEngine(model, chat.stop_ids, longest, args.kv_cache_gb, args.compute_dtype)
    engine.sleep()  # until `sampling` wakes it: the probe and the trainer come first
    return engine


@contextmanager
def sampling(engine, model):
    """Inside, the engine samples from the weights of this moment, never from older ones: vLLM from its own
    copy (outside it sleeps), HFEngine from the model itself, which must then be whole on every rank."""
    engine.load(model)
    with gathered(model) if isinstance(engine, HFEngine) else nullcontext():
        yield
    engine.sleep()


# ------------------------------------------------------------------------------------------------------------
# 4. Evaluation: greedy, on held-out tasks; unseen tools (content-OOD), the other syntax (format-OOD)


def evaluation_sets(world, args, split):
    """{"base": [(task, "A"), ...], ..., "content_ood": [...], "format_ood": [(task, "B"), ...]}"""
    sets = {}
    for category in world.categories(split):
        if tasks := world.tasks(split, category, args.eval_tasks):
            sets[category] = [(task, args.syntax) for task in tasks]
    other = "B" if args.syntax == "A" else "A"
    sets |= world.unseen(split, args.eval_tasks, args.syntax)
    tasks = world.mixed(split, len(sets.get("base", [])))            # --validation 0: none
    return sets | ({"format_ood": [(task, other) for task in tasks]} if tasks else {})


def evaluate(engine, chat, sets, world, args, split="test"):
    """-> {"base": .12, "base_clean": .10 (solved, and every message clean), ..., "average": .10 (of the
    categories in `sets`), "average_clean": .08, "state/call": .5, ...}; and a world's further verdicts, such
    as "base_strict" """
    work = []
    for name, pairs in sets.items():
        work += [(name, task.env(syntax, world.eval_closing or args.closing)) for task, syntax in pairs]
    work, judged = my_share(work), []
    envs = [env for _, env in work]
    begun = [begin(chat, env) for env in envs]
    done = rollout(engine, chat, envs, limits_of(args, split), begun, temperature=0.0)
    for (name, env), e in zip(work, done, strict=True):
        messages = [parse(s.text, env.syntax, s.state != "cut") for s in e.spans if s.who == "model"]
        verdicts = env.task.verdicts(env.syntax, messages, e.reward)
        judged.append((name, verdicts | {"_clean": e.reward * is_clean(e.states)}, e.states))
    judged, scores, states = gather(judged), {}, Counter()
    for name, verdicts, of_one in judged:
        for ending, score in verdicts.items():
            scores.setdefault(name + ending, []).append(score)
        states.update(of_one if name in CATEGORIES else [])
    scores = {name: mean(values) for name, values in scores.items()}
    for ending in judged[0][1]:
        scores[f"average{ending}"] = mean(scores[c + ending] for c in CATEGORIES if c + ending in scores)
    return scores | {f"state/{s}": states[s] / max(states.total(), 1) for s in STATES}


def limits_of(args, split="train"):
    total, observation = args.max_total_tokens, args.max_observation_tokens
    if split == "test":
        total, observation = args.test_total_tokens or total, args.test_observation_tokens or observation
    return Limits(args.max_messages, args.max_message_tokens, total, observation)


# ------------------------------------------------------------------------------------------------------------
# 5. Checkpoints: HF format + optimizer + RNG + counters. A folder gets its name only when it is complete, and
#    `latest` is written after that, so a run killed at ANY moment leaves the previous checkpoint in force.


def save_checkpoint(run, step):
    """All ranks call it; rank 0 writes."""
    model, weights = run.model, None             # None: save_pretrained finds them itself
    moments = run.optimizer.state_dict()
    if is_sharded(model):
        weights = sharded_state.get_model_state_dict(model, options=WHOLE)
        moments = sharded_state.get_optimizer_state_dict(model, run.optimizer, options=WHOLE)
        if model.config.tie_word_embeddings:     # one tensor under two names would be stored twice
            weights = {k: v for k, v in weights.items() if k not in model._tied_weights_keys}
    reference = None                             # it is the model that the run started from
    if run.args.as_released and run.reference:   # or has moved
        reference = sharded_state.get_model_state_dict(run.reference, options=WHOLE)
    if rank() != 0:
        return
    state = {"progress": vars(run.progress) | {"step": step}, "signal": run.signal.state(),
             "optimizer": moments, "rng": torch.get_rng_state(), "reference": reference}

    def write(tmp):
        model.save_pretrained(tmp, state_dict=weights)
        run.chat.tokenizer.save_pretrained(tmp)
        torch.save(state, tmp / "state.pt")
    folder = Path(run.args.out) / "checkpoints"
    publish(folder / f"step-{step}", write)
    write_atomically(folder / "latest", f"step-{step}")
    for stale in saved_steps(run.args.out)[:-run.args.keep] if run.args.keep > 0 else []:
        shutil.rmtree(folder / f"step-{stale}")


def restore(run, checkpoint):
    """The state of everything but the weights, as save_checkpoint wrote it"""
    state = torch.load(Path(checkpoint) / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    run.progress = Progress(**state["progress"])
    if run.args.shard:
        sharded_state.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=WHOLE)
    else:
        run.optimizer.load_state_dict(state["optimizer"])
    run.signal.load(state["signal"])
    torch.set_rng_state(state["rng"])
    if state["reference"]:
        sharded_state.set_model_state_dict(run.reference, state["reference"], options=WHOLE)


def run_config(args):
    """The flags that a resumption must share: all that change what is trained. Of a file its checksum too"""
    free = {"resume", "out", "eval_every", "save_every", "keep", "threads", "micro_tokens", "eval_only",
            "kv_cache_gb", "wandb", "probe_every"}
    config = {name: value for name, value in vars(args).items() if name not in free}
    for name in ("chat_template", "sft_file"):
        if config[name] and Path(config[name]).is_file():
            config[name] += f" (checksum {checksum(config[name])})"
    return config


def check_run(args):
    """Can the run folder be made, or continued? -> its checkpoint, or None. Writes nothing but a lock."""
    out = Path(args.out)
    if not args.resume:
        begun = {path.name for path in out.glob("*")} - {"lock", "config.json.tmp"}  # those a kill can leave
        if begun or out.is_file():
            raise UserError(f"the run folder {out} exists; continue it with --resume, or name another --out.")
        return None
    if not (out / "config.json").exists():
        raise UserError(f"there is no run in {out} to resume; drop --resume, or name its folder with --out.")
    lock(out)
    before, config = read_json(out / "config.json"), run_config(args)
    for name in sorted(config.keys() | before.keys()):
        if config.get(name) != before.get(name):
            raise UserError(f"the run in {out} was started with --{name} {before.get(name)}, not "
                            f"{config.get(name)}; resume it with the same flags (and version), or start "
                            "another --out.")
    return newest_checkpoint(out)


def open_folder(run):
    """Rank 0: makes the run folder, or takes away what a resumed run will do again"""
    out, step = Path(run.args.out), run.progress.step
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder cannot be made ({error}); name another --out.") from error
    if not run.args.resume:
        lock(out)
        check_run(run.args)                      # again: another process may have been faster
    write_atomically(out / "config.json", json.dumps(run_config(run.args), indent=1))
    kept = {}                                    # all are read before one is written: each may be damaged
    for path in (out / "metrics.jsonl", out / "episodes.jsonl", out / "kl.jsonl"):
        if path.exists():
            kept[path] = [r for r in read_records(path) if r["step"] < step]
    for path, records in kept.items():
        shutil.copy(path, f"{path}.old")         # should the step be the wrong one
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
    for name in ("metrics.jsonl", "episodes.jsonl"):
        (out / name).touch()                     # there from the start, if empty: this is a run
    folder = out / "checkpoints"
    for path in [*folder.glob(".tmp-*"), *(folder / f"step-{s}" for s in saved_steps(out) if s > step)]:
        shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------------------
# 6. The run


@dataclass
class Progress:
    """Besides weights and optimizer a run has no state but these numbers: every random choice is a function
    of the seed, the step and the place where it is made."""
    step: int = 0                                # where this process began; a checkpoint has its own
    rl_steps: int = 0
    rows: int = 0  # supervised rows trained; the position in the stream of "rl+sft"
    phase: str = ""                              # of the last step, see `plan`
    since_switch: int = 0                        # steps since it changed


def build(args, device):
    """Everything that the main loop needs. With --eval_only: prints the scores, -> None"""
    world = WORLDS[args.world](args)
    start_from = rank0_first(lambda: starting_point(args))
    if args.model != "tiny":                     # another run's newest checkpoint may move on: stay with this
        args.model = start_from
    checkpoint = None if args.eval_only else rank0_first(lambda: check_run(args))
    model, chat = load_model(start_from, args, device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"model: {start_from}, {millions:.2f} M parameters, {world_size()} process(es) on {device}")
    sets = evaluation_sets(world, args, "test" if args.eval_only else "validation")
    if args.eval_only:
        refuse_long_prompts(chat, limits_of(args, "test"), *sets.values())
        with sampling(engine := make_engine(args, model, chat), model):
            scores = evaluate(engine, chat, sets, world, args)
        say(table({"score": scores}))
        if args.out and rank() == 0:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(args.out) / "eval.json", json.dumps(scores, indent=1))
        return None
    if args.judge_url and issubclass(SIGNALS[args.signal], PRS):
        rank0_first(lambda: Judge(args.judge_url, args.judge_model).check())
    tasks = world.mixed("train", args.train_tasks)
    test_sets = evaluation_sets(world, args, "test") if world.has_test else {}       # played once, at the end
    refuse_long_prompts(chat, limits_of(args), *sets.values())
    refuse_long_prompts(chat, limits_of(args, "test"), *test_sets.values())
    signal = SIGNALS[args.signal](args, chat, tasks, limits_of(args))
    refuse_long_prompts(chat, limits_of(args), [(task, args.syntax) for task in tasks], hint=signal.hint)
    if signal.note:
        say(signal.note)
    reference = None                             # of the KL term
    if args.kl_weight > 0:
        reference = load_model(start_from, args, device)[0].eval().requires_grad_(False)
    # The probe: ground truth of held-out tasks, on rank 0. It samples nothing, so no limit need cut it.
    wide = Limits(10**3, 10**6, 10**6, args.max_observation_tokens)
    held_out = world.mixed("validation", 30) or world.mixed("train", 30)         # --validation 0: no others
    shown = held_out if rank() == 0 and args.probe_every > 0 else []
    probe_rows = [demonstrate(chat, task, args.syntax, wide, args.closing) for task in shown]
    with gathered(model):
        at_start = truth_logprobs(model, probe_rows, args.micro_tokens)
    if checkpoint:  # only now: `at_start` is of the model that the run STARTED from
        model, chat = load_model(checkpoint, args, device)
    run = SimpleNamespace(
        args=args, world=world, tasks=tasks, sets=sets, test_sets=test_sets, signal=signal, model=model,
        chat=chat, engine=make_engine(args, model, chat), reference=reference,
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY),
        probe_rows=probe_rows, at_start=at_start, progress=Progress(), wandb=None)
    if checkpoint:
        restore(run, checkpoint)
    return run


def refuse_long_prompts(chat, limits, *sets, hint=lambda task: None):
    for task, syntax in [pair for pairs in sets for pair in pairs]:
        length = len(chat.prompt(task.opening(syntax, hint(task))))
        if length >= limits.total_tokens:
            raise UserError(f"the prompt of {task.id} has {length} tokens: no room for an answer within "
                            f"{limits.total_tokens}; raise --max_total_tokens, or --test_total_tokens.")


def look(run, step, last):
    """The state BEFORE step number `step`: probe, evaluation, checkpoint, each when it is due"""
    args, metrics = run.args, Path(run.args.out) / "metrics.jsonl"
    due = lambda every: every > 0 and step % every == 0
    if args.probe_every > 0 and (step == last or due(args.probe_every)):
        with gathered(run.model):
            found = rank0_first(lambda: probe(run.model, run.chat, run.probe_rows, args.micro_tokens,
                                              start=run.at_start))
        log_line(metrics, {"step": step} | found, run.wandb)
    due_now = {"eval": run.sets} if step in (0, last) or due(args.eval_every) else {}
    if step == last:
        due_now["test"] = run.test_sets
    for name, sets in due_now.items():
        if sets:
            with sampling(run.engine, run.model):
                scores = evaluate(run.engine, run.chat, sets, run.world, args, name)
            say(f"step {step:4d}  {name} " + "  ".join(f"{k} {scores[k]:.3f}" for k in sets))
            log_line(metrics, {"step": step} | {f"{name}/{k}": v for k, v in scores.items()}, run.wandb)
    if step > run.progress.step and (step == last or due(args.save_every)):
        save_checkpoint(run, step)


def enter_phase(run, phase):
    """Has the phase changed? --as_released restarts there. -> the factor of RL's warm-up"""
    args, progress = run.args, run.progress
    if phase != progress.phase:
        if args.as_released:
            run.optimizer.state.clear()
            if run.reference and phase != "sft_phase":
                run.reference.load_state_dict(run.model.state_dict())
        progress.phase, progress.since_switch = phase, 0
    if args.as_released:
        later = 5                                # the release's, in the phases behind an SFT phase
        return min(1.0, progress.since_switch / (later if args.schedule == "interleaved" else args.warmup))
    return min(1.0, (progress.rl_steps + 1) / args.warmup)


def supervised_rows(run, log):
    """The signal's rows of this moment, on all ranks"""
    rows, log["sft_rows_left_out"] = rank0_first(lambda: (run.signal.rows(), run.signal.left_out))
    if not rows and run.args.schedule in ("sft", "sft_then_rl"):
        raise UserError(f"--signal {run.args.signal} has no rows at step {log['step']}, and this step trains "
                        "nothing else; use a schedule that begins with RL.")
    return rows


def say_step(log):
    warn = lambda text: say(f"step {log['step']:4d}  WARNING: {text}")
    if log.get("sft_rows_left_out"):
        warn(f"{log['sft_rows_left_out']} row(s) left out: the judge failed, or the text was too long")
    if not log.get("gap", 0.0) <= GAP_WARNING:   # so that nan warns too
        warn(f"trainer and sampler differ by {log['gap']:.3g} per token, at most by {log['gap_max']:.3g}; "
             "--correction 2 weighs the loss accordingly")
    if log["skipped_updates"]:
        warn(f"{log['skipped_updates']} update(s) skipped, loss or gradient not finite")
    say(one_line(log))


def train(run):
    """The main loop: one pass is one step of the paper."""
    args, model, optimizer, signal, progress = run.args, run.model, run.optimizer, run.signal, run.progress
    schedule, start = plan(args), progress.step
    quiet = None if rank() == 0 else True        # None: a bar where the output is a terminal
    for step in tqdm(range(start, len(schedule)), args.out, len(schedule), initial=start, disable=quiet):
        look(run, step, len(schedule))
        began = time.time()
        phase = schedule[step]
        warm = enter_phase(run, phase)
        log = {"step": step, "phase": phase}

        if phase == "sft_phase":
            # ---- a whole SFT phase, on the rows that the signal has now
            rows = supervised_rows(run, log)
            log |= sft_phase(model, optimizer, rows, args, seed=f"{args.seed} phase {step}")
        else:
            # ---- roll out: G conversations for each prompt; whole groups stay on one rank
            position, mine = progress.rl_steps * args.prompts, my_share(range(args.prompts))
            batch = shuffled_passes(run.tasks, position, args.prompts, f"{args.seed} prompts")
            with sampling(run.engine, model):
                episodes = sample_groups(signal, run.engine, batch, mine, seed=(args.seed, step))
            # ---- credit: what was each of them worth?
            credit = assign_credit(episodes, args.reward, args.seed, step)
            everyones = gather(episodes)         # all ranks see all rollouts
            log |= rollout_metrics(everyones, gather(credit)) | {"rollout_s": time.time() - began}
            everyones = sorted(everyones, key=lambda e: (e.group_id, e.sample))
            record_episodes(Path(args.out) / "episodes.jsonl", step, run.chat, everyones)
            signal.observe(step, everyones)
            del everyones                        # hundreds of megabytes of a real run
            # ---- what the signal does before the update; p_old of what nobody sampled as it is trained
            episodes = signal.before_update(episodes)
            assert len(episodes) == len(credit), "before_update must keep every episode, in order"
            if args.as_released:
                episodes = [reencoded(run.chat, e) for e in episodes]
            set_old_logprobs(model.train(), episodes, args.correction, args.micro_tokens)
            log |= signal.metrics(episodes)
            # ---- advantages: compared with the own group
            adv = advantages(credit, [e.group_id for e in episodes], args.only)
            # ---- policy updates; synchronous supervision is one more term of their loss
            sft_rows = supervised_rows(run, log) if phase == "rl+sft" else []
            log |= policy_updates(
                model, optimizer, episodes, adv, args, lr=args.lr * warm, signal=signal, chat=run.chat,
                reference=run.reference, sft_rows=sft_rows, position=progress.rows)
            progress.rl_steps += 1

        # ---- log
        progress.rows += log.get("sft_visits", 0)
        progress.since_switch += 1
        log |= {"lr": optimizer.param_groups[0]["lr"], "seconds": time.time() - began}
        log_line(Path(args.out) / "metrics.jsonl", log, run.wandb)
        say_step(log)
    look(run, len(schedule), len(schedule))


def main(args):
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if args.engine == "vllm":
        import_vllm()                            # if it is missing, say so before anything is built
    run = build(args, start_processes(args))
    if run is None:
        return
    out = args.out
    if args.wandb and rank() == 0:
        try:
            import wandb
            run.wandb = wandb.init(project=args.wandb, name=out, config=run_config(args))
        except Exception as error:               # not installed, no login, no network: the folder is not made
            raise UserError(f"--wandb: {error} (pip install wandb; wandb login)") from error
    rank0_first(lambda: open_folder(run))
    say(f"run folder: {out}, steps {run.progress.step} to {len(plan(args))}")
    train(run)
    if rank() == 0:
        say(f"\n{summary(out)}\n\n{out}/metrics.jsonl: a line per step; episodes.jsonl: conversations; "
            f"checkpoints/: Hugging Face format.\npython analyze_tokens.py {out}: all this over time; with "
            "--tokens: where the control tokens have become likely")


def cli(argv=None):
    """main, with user mistakes as one sentence and exit status 2, Ctrl-C as 130, SIGTERM as 143"""
    def stop(number, frame):
        # Some C code drops any exception (to ask whether an object has an attribute): then it comes again.
        os_signal.signal(os_signal.SIGALRM, lambda *_: stop(number, frame))
        os_signal.alarm(2)
        raise KeyboardInterrupt(number)
    for number in (os_signal.SIGTERM, os_signal.SIGINT):
        if os_signal.getsignal(number) != os_signal.SIG_IGN:
            os_signal.signal(number, stop)
    args, status, first = None, 0, os.environ.get("RANK", "0") == "0"
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    try:
        args = parse_args(argv)
        main(args)
    except UserError as error:  # mostly all ranks fail alike: rank 0 says it, the others are dead then
        time.sleep(0 if first else 5)
        print(f"train.py: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as error:
        os_signal.alarm(0)
        begun = args and not args.eval_only and (Path(args.out) / "config.json").exists()
        where = f"the same command with --resume continues {args.out}" if begun else "no run was begun"
        print(f"\ntrain.py: stopped; {where}" if first else "", file=sys.stderr)
        status = 128 + (error.args or [os_signal.SIGINT])[0]
    except Exception:                            # a bug: nothing hides it
        if alone:
            raise
        traceback.print_exc()                    # and below this process dies, so that all others end
        status = 1
    if status and not alone:
        # Die at once, so that torchrun ends the others: an orderly exit would wait for them, and they for us.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized() and "vllm" not in sys.modules:  # vLLM's engine leaves the group itself, at exit
        # FSDP's modules are cycles that hold the group; if it lives on until the interpreter ends, its
        # threads abort the process, now and then.
        gc.collect()
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(cli())
