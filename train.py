"""train.py -- the run: flags, model, schedule, main loop, evaluation, checkpoints. Floor 4; the only script to start.

    python train.py                                             the default: vanilla GRPO on a laptop, about N minutes
    python train.py --signal sft --schedule sft_then_rl         SFT on demonstrations, then GRPO
    python train.py --eval_only --model runs/NAME               evaluate the newest checkpoint of a run
    torchrun --nproc-per-node 2 train.py                        the same numbers from 2 processes

One pass through the main loop is the paper's algorithm:

    pick prompts -> roll out G conversations each -> reward -> group advantages -> a few policy updates
    (or, as the schedule says: pick demonstrations -> one cross-entropy update)
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging as hf_logging

import tools
from rl_step import KLS, LOSSES, advantages, rl_backward
from rollout import Chat, HFEngine, Limits, play, rollout, transcript
from sft_step import optimizer_step, sft_backward
from tools import CATEGORIES, CONTROL, STATES, Env, UserError, demonstration, make_tasks, noisy_demonstration

TRAIN_CATEGORIES = [c for c in CATEGORIES if c != "long_context"]    # long_context is for evaluation only, as in the paper
SCHEDULES = ("rl", "sft", "sft_then_rl")

# ----------------------------------------------------------------------------------------------------------------------
# 1. Flags. Flag name = variable name; the defaults are the laptop recipe.


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Multi-turn tool-use RL and the signals that keep it from collapsing.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("recipe")
    g.add_argument("--signal", choices=("none", "sft"), default="none",
                   help="supervision beside the reward: none = vanilla GRPO; sft = ground-truth demonstrations")
    g.add_argument("--schedule", choices=SCHEDULES, default="rl", help="when which update runs (see `what`)")
    g.add_argument("--steps", type=int, default=100, help="RL steps")
    g.add_argument("--sft_steps", type=int, default=30, help="SFT steps of the schedules sft and sft_then_rl")
    g.add_argument("--seed", type=int, default=0, help="seed of the task order and of all sampling")
    g = p.add_argument_group("model")
    g.add_argument("--model", default="tiny", help="tiny = the embedded model (built and pre-trained at first use, then "
                   "cached); or a Hugging Face name or folder; or a run folder (its newest checkpoint)")
    g.add_argument("--chat_template", default=None, metavar="FILE", help="Jinja file that replaces the model's chat template")
    g.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the weights")
    g.add_argument("--device", default="auto", help="auto = cuda if there is one, else cpu")
    g = p.add_argument_group("world")
    g.add_argument("--syntax", choices=("A", "B"), default="A", help="call syntax of training: A = <tool_call> JSON, "
                   "B = [f(a='x')]; the other one is the format-OOD evaluation")
    g.add_argument("--closing", choices=("lenient", "strict"), default="lenient", help="what a message without a complete "
                   "call does: lenient = ends the user turn whatever it holds (the paper); strict = a malformed one fails")
    g.add_argument("--train_tasks", type=int, default=300, help="training tasks over the three training categories")
    g.add_argument("--eval_tasks", type=int, default=50, help="test tasks per category and per OOD set")
    g = p.add_argument_group("rollouts")
    g.add_argument("--prompts", type=int, default=12, help="prompts (groups) per step, over all processes")
    g.add_argument("--group", type=int, default=8, help="rollouts per prompt")
    g.add_argument("--max_messages", type=int, default=16, help="model messages per episode")
    g.add_argument("--max_message_tokens", type=int, default=64, help="tokens per model message")
    g.add_argument("--max_total_tokens", type=int, default=1024, help="tokens per episode")
    g.add_argument("--max_observation_tokens", type=int, default=256, help="tokens kept of one tool result (the last ones)")
    g = p.add_argument_group("policy loss")
    g.add_argument("--loss", choices=LOSSES, default="grpo", help="variant of the policy loss (see rl_step.py)")
    g.add_argument("--advantage", choices=("std", "mean"), default=None, help="divide a group's advantages by their std, or "
                   "only subtract the mean; default: mean for dr_grpo, else std")
    g.add_argument("--updates", type=int, default=3, help="optimizer updates per RL step; a group is never split")
    g.add_argument("--clip_low", type=float, default=None, help="1 - clip_low bounds the ratio; default .2 (gspo: 3e-4)")
    g.add_argument("--clip_high", type=float, default=None, help="default .2 (dapo: .28, gspo: 4e-4)")
    g.add_argument("--dual_clip", type=float, default=3.0, help="cap of the loss for negative advantages (grpo)")
    g.add_argument("--kl", choices=KLS, default="k3", help="estimator of the KL to the reference model")
    g.add_argument("--kl_weight", type=float, default=0.0, help="0 = no reference model at all (the paper: 1e-4)")
    g = p.add_argument_group("optimizer")
    g.add_argument("--lr", type=float, default=5e-4, help="learning rate of RL updates (the paper, 1.5 B: 1e-6)")
    g.add_argument("--sft_lr", type=float, default=5e-4, help="learning rate of SFT updates (the paper: 1e-5 or 1e-6)")
    g.add_argument("--sft_batch", type=int, default=32, help="demonstrations per SFT step, over all processes")
    g.add_argument("--warmup", type=int, default=5, help="steps of linear warm-up; the first one has lr / warmup, not 0")
    g.add_argument("--weight_decay", type=float, default=0.01, help="AdamW weight decay")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    g.add_argument("--micro_tokens", type=int, default=16_384, help="padded tokens per forward pass; changes memory and "
                   "speed, never the result")
    g = p.add_argument_group("embedded model (--model tiny)")
    g.add_argument("--tiny_hidden", type=int, default=128, help="hidden size, a multiple of 32 (heads have 32 dimensions)")
    g.add_argument("--tiny_layers", type=int, default=3, help="decoder layers")
    g.add_argument("--base_steps", type=int, default=400, help="pre-training steps on clean demonstrations")
    g.add_argument("--base_noisy_steps", type=int, default=100, help="then steps on demonstrations with mistakes")
    g.add_argument("--base_wrong", type=float, default=0.4, help="there: probability that a call is wrong")
    g.add_argument("--base_malformed", type=float, default=0.04, help="there: probability that a message is malformed")
    g.add_argument("--base_seed", type=int, default=0, help="seed of initialisation and pre-training")
    g = p.add_argument_group("run")
    g.add_argument("--out", default=None, help="run folder; default runs/SIGNAL-SCHEDULE-CLOSING-seedN")
    g.add_argument("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    g.add_argument("--eval_only", action="store_true", help="evaluate --model and stop; writes eval.json only if --out is given")
    g.add_argument("--eval_every", type=int, default=25, help="evaluate every so many steps (-1 = only first and last)")
    g.add_argument("--save_every", type=int, default=25, help="checkpoint every so many steps (-1 = only the last)")
    g.add_argument("--keep", type=int, default=2, help="newest checkpoints kept (-1 = all)")
    g.add_argument("--threads", type=int, default=-1, help="CPU threads per process (-1 = PyTorch's choice)")
    a = p.parse_args(argv)

    # Flags that cannot work are refused here, before anything is built or written.
    for name, least in dict(prompts=1, group=2, updates=1, train_tasks=3, eval_tasks=1, max_messages=1, max_message_tokens=1,
                            max_total_tokens=2, max_observation_tokens=1, sft_batch=1, micro_tokens=1, warmup=1, tiny_layers=1,
                            steps=0, sft_steps=0, base_steps=1, base_noisy_steps=0, kl_weight=0, weight_decay=0, lr=0,
                            sft_lr=0).items():
        if not getattr(a, name) >= least:                            # `not >=` also refuses nan
            p.error(f"--{name} {getattr(a, name)} must be at least {least}")
    for name in ("eval_every", "save_every", "keep", "threads"):
        if getattr(a, name) == 0 or getattr(a, name) < -1:
            p.error(f"--{name} {getattr(a, name)} must be -1 or at least 1")
    for name in ("base_wrong", "base_malformed"):
        if not 0 <= getattr(a, name) <= 1:
            p.error(f"--{name} {getattr(a, name)} must lie between 0 and 1")
    if a.tiny_hidden < 32 or a.tiny_hidden % 32:
        p.error(f"--tiny_hidden {a.tiny_hidden} must be a multiple of 32")
    if a.updates > a.prompts:
        p.error(f"--updates {a.updates} is more than --prompts {a.prompts}, and a group is never split; lower --updates")
    if (a.signal == "sft") != (a.schedule in ("sft", "sft_then_rl")):
        p.error(f"--signal {a.signal} does not go with --schedule {a.schedule}; use --signal none --schedule rl, or "
                "--signal sft with --schedule sft or sft_then_rl")
    if a.resume and a.eval_only:
        p.error("--resume and --eval_only exclude each other; --eval_only --model RUN_FOLDER evaluates a run")
    a.advantage = a.advantage or ("mean" if a.loss == "dr_grpo" else "std")
    a.clip_low = a.clip_low if a.clip_low is not None else {"gspo": 3e-4}.get(a.loss, 0.2)
    a.clip_high = a.clip_high if a.clip_high is not None else {"gspo": 4e-4, "dapo": 0.28}.get(a.loss, 0.2)
    if not a.eval_only:
        a.out = a.out or f"runs/{a.signal}-{a.schedule}-{a.closing}-seed{a.seed}"
    return a


def what(step, a):
    """The schedule, a function of the step: which parts does step number `step` (from 0) have?"""
    return {"rl": ("rl",), "sft": ("sft",), "sft_then_rl": ("sft",) if step < a.sft_steps else ("rl",)}[a.schedule]


def total_steps(a):
    return {"rl": a.steps, "sft": a.sft_steps, "sft_then_rl": a.sft_steps + a.steps}[a.schedule]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Processes. Under torchrun every process runs this same script; rank r owns the groups g with g % world == r.


def start_processes(a):
    """-> rank, world size, device"""
    if a.threads > 0:
        torch.set_num_threads(a.threads)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = a.device if a.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
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
# 3. The embedded model: a tokenizer and a Qwen2 decoder made from nothing, pre-trained with sft_step.
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_tokenizer():
    """The real Qwen2 tokenizer class with a small vocabulary: every word of the world is one token, all other text falls
    apart into smaller pieces, at worst single bytes. Lossless; control tokens are one id each, as in Qwen2.5.
    '{"name": "read_file"}' -> ['{"', 'name', '":', ' "', 'read', '_file', '"}']

    (It must BE that class: AutoTokenizer and vLLM choose the class by the model's type, and any other would be rebuilt
    with Qwen2's splitting rule when the checkpoint is loaded, silently.)"""
    texts = ["system\nuser\nassistant\n"]
    for category in TRAIN_CATEGORIES:
        for task in make_tasks("train", category, 300) + make_tasks("train", category, 300, held_out=True):
            for syntax in "AB":
                texts += [m["content"] for m in Env(task, syntax).opening()] + [turn.user for turn in task.turns]
                texts += sum(demonstration(task, syntax), [])
    pre = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    words = set()
    for text in texts:
        for token in CONTROL:
            text = text.replace(token, "")
        words |= {word for word, _ in pre.pre_tokenize_str(text)}
    bpe = Tokenizer(models.BPE())
    bpe.train_from_iterator(sorted(words), trainers.BpeTrainer(           # no size limit in reach: merges until words are whole
        vocab_size=10_000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe = json.loads(bpe.to_str())["model"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [token for token in CONTROL if token not in special]          # not "special": they survive skip_special_tokens
    vocab = {token: i for i, token in enumerate([*special, *added, *bpe["vocab"]])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in bpe["merges"]], eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(vocab_size, a):
    torch.manual_seed(a.base_seed)
    heads = a.tiny_hidden // 32
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=a.tiny_hidden, intermediate_size=3 * a.tiny_hidden, num_hidden_layers=a.tiny_layers,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True, max_position_embeddings=4096,
        initializer_range=0.05, bos_token_id=None, eos_token_id=2, pad_token_id=0))


def demonstrations(chat, n, seed, wrong=0.0, malformed=0.0):
    """n Episodes in both syntaxes, played through the live world; wrong, malformed: shares of mistakes (tools.py)."""
    rng, limits, rows = random.Random(f"demonstrations {seed}"), Limits(20, 1024, 1024, 256), []
    stories = [task for c in TRAIN_CATEGORIES for task in make_tasks("train", c, -(-n // 3), seed=seed)]
    for i, task in enumerate(tqdm(rng.sample(stories, n), desc="demonstrations", leave=False, disable=None)):
        syntax = "AB"[i % 2]
        script = noisy_demonstration(task, syntax, rng, wrong, malformed)
        rows.append(play(chat, Env(task, syntax), script, limits))
    return rows


def build_base(a, path):
    """Pre-train the embedded model: an ordinary SFT run in three stages, about 3 minutes on two cores.

      short   clean demonstrations of at most 170 tokens: copying a value from the request into a call is learnt here,
              twice as fast as on the full mixture
      full    clean demonstrations of every length
      noisy   some calls wrong, a few messages malformed: sets the start success, and gives the malformed messages a small
              probability, as any real model does. Without them there is nothing for RL to (mis)credit."""
    tokenizer = tiny_tokenizer()
    chat, model = Chat(tokenizer), tiny_model(len(tokenizer), a)
    clean = demonstrations(chat, min(6000, 32 * a.base_steps), f"clean {a.base_seed}")
    noisy = demonstrations(chat, 32 * a.base_noisy_steps, f"noisy {a.base_seed}", a.base_wrong, a.base_malformed)
    short = [row for row in clean if len(row.ids) <= 170]
    total, batch, peak = a.base_steps + a.base_noisy_steps, 32, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    bar = tqdm(range(total), desc=f"pre-training the embedded model (once; kept in {path})", disable=None)
    for step in bar:
        rows = noisy if step >= a.base_steps else clean if step >= 0.7 * a.base_steps else short
        rows = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        for group in optimizer.param_groups:                         # warm-up over 50 steps, then cosine to 10 %
            group["lr"] = peak * min(1, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))
        metrics = sft_backward(model, rows, micro_tokens=8192)
        optimizer_step(model, optimizer, max_norm=1.0, loss=metrics["sft_loss"])
        bar.set_postfix(loss=f"{metrics['sft_loss']:.3f}")
    publish(path, lambda tmp: (model.save_pretrained(tmp), tokenizer.save_pretrained(tmp)))


def load_policy(a, rank, device):
    """--model -> model, Chat, the folder or name that it came from"""
    name = a.model
    if name == "tiny":
        recipe = {k: v for k, v in vars(a).items() if k.startswith(("tiny_", "base_"))}
        key = json.dumps(recipe, sort_keys=True) + Path(tools.__file__).read_text()    # another world needs another base
        name = f"runs/tiny-base-{zlib.crc32(key.encode()):08x}"
        rank0_first(rank, lambda: None if Path(name).exists() else build_base(a, name))
    elif (Path(name) / "checkpoints" / "latest").exists():
        name = str(newest_checkpoint(name))
    return *load_model(name, a, device), name


def load_model(name, a, device):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, a.dtype)).to(device)
    except Exception as error:                                       # every library below has its own exception types here
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load the model {name}: {reason}; check --model (a folder with config.json, weights and "
                        "tokenizer files, or a Hugging Face name that this machine can download).") from error
    if a.chat_template:
        if not Path(a.chat_template).is_file():
            raise UserError(f"--chat_template {a.chat_template} is not a file.")
        tokenizer.chat_template = Path(a.chat_template).read_text()
    return model, Chat(tokenizer)


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


def save_checkpoint(out, step, model, tokenizer, optimizer, counters, keep):
    folder = Path(out) / "checkpoints"

    def write(tmp):
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        torch.save({"step": step, "counters": counters, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
                   tmp / "state.pt")
    publish(folder / f"step-{step}", write)
    write_atomically(folder / "latest", f"step-{step}")
    steps = sorted((int(p.name[5:]) for p in folder.glob("step-*")), reverse=True)
    for old in steps[keep:] if keep > 0 else []:
        shutil.rmtree(folder / f"step-{old}")


# What may differ between a run and its resumption: nothing that changes a number.
FREE_ON_RESUME = {"resume", "out", "eval_every", "save_every", "keep", "threads", "device", "micro_tokens", "eval_only"}


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
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    write_atomically(path, "".join(kept))


# ----------------------------------------------------------------------------------------------------------------------
# 5. Evaluation: greedy, on test tasks; all four categories, another app (content-OOD), the other syntax (format-OOD).


def evaluation_sets(a):
    """{"base": [(task, "A"), ...], ..., "content_ood": [...], "format_ood": [(task, "B"), ...]}"""
    sets = {c: [(t, a.syntax) for t in make_tasks("test", c, a.eval_tasks)] for c in CATEGORIES}
    sets["content_ood"] = [(t, a.syntax) for t in make_tasks("test", "base", a.eval_tasks, held_out=True)]
    mixed = [t for c in TRAIN_CATEGORIES for t in make_tasks("test", c, -(-a.eval_tasks // 3))]
    sets["format_ood"] = [(t, "B" if a.syntax == "A" else "A") for t in mixed[:a.eval_tasks]]
    return sets


def evaluate(model, chat, sets, a, rank, world):
    """-> {"base": .12, ..., "average": .10, "content_ood": .02, "format_ood": .2, "state/call": .5, ...}"""
    work = [(name, Env(task, syntax, a.closing)) for name, pairs in sets.items() for task, syntax in pairs][rank::world]
    episodes = rollout(HFEngine(model, chat.stop_ids), chat, [env for _, env in work], limits_of(a),
                       range(len(work)), [0] * len(work), temperature=0.0)
    done = gather([(name, e.reward, e.states) for (name, _), e in zip(work, episodes)])
    result = {name: mean(r for n, r, _ in done if n == name) for name in sets}
    result["average"] = mean(result[c] for c in CATEGORIES)
    states = Counter(s for name, _, states in done if name in CATEGORIES for s in states)
    return result | {f"state/{s}": states[s] / max(states.total(), 1) for s in STATES}


def limits_of(a):
    return Limits(a.max_messages, a.max_message_tokens, a.max_total_tokens, a.max_observation_tokens)


def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def collapse(rows, window=5):
    """Did the reward collapse, and what had the messages become? From the rows of metrics.jsonl that have a reward.
    -> {"step": 65, "peak": .31, "peak_step": 40, "before": {state: share at the peak}, "after": {state: share at the end}}
    Collapse = the mean reward over `window` steps falls below 10 % of its peak and stays there to the end."""
    rows = [r for r in rows if "reward" in r]
    smooth = [mean(r["reward"] for r in rows[max(0, i + 1 - window):i + 1]) for i in range(len(rows))]
    if len(rows) < 2 * window:
        return None
    top = max(range(window - 1, len(rows)), key=smooth.__getitem__)
    low = [i for i in range(top, len(rows)) if smooth[i] < 0.1 * smooth[top]]
    if not low or low[-1] - low[0] != len(rows) - 1 - low[0] or len(low) != len(rows) - low[0]:
        return None
    at = lambda i: {s: mean(r[f"state/{s}"] for r in rows[max(0, i + 1 - window):i + 1]) for s in STATES}
    return {"step": rows[low[0]]["step"], "peak": smooth[top], "peak_step": rows[top]["step"], "before": at(top),
            "after": at(len(rows) - 1)}


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
    checkpoint = None if a.eval_only else rank0_first(rank, lambda: check_run(a))
    if a.model == "tiny":
        say("model: the embedded one (the first run pre-trains it and keeps it under runs/)")
    model, chat, start_from = load_policy(a, rank, device)
    n_params = sum(p.numel() for p in model.parameters())
    say(f"model: {start_from}, {n_params / 1e6:.2f} M parameters, {world} process(es) on {device}")
    sets = evaluation_sets(a)
    if a.eval_only:
        scores = evaluate(model, chat, sets, a, rank, world)
        say(table({"score": scores}))
        if a.out and rank == 0:
            Path(a.out).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(a.out) / "eval.json", json.dumps(scores, indent=1))
        return
    reference = load_model(start_from, a, device)[0].eval().requires_grad_(False) if a.kl_weight > 0 else None
    if checkpoint:
        model, chat = load_model(checkpoint, a, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=a.weight_decay)

    # ---- data -------------------------------------------------------------------------------------------------------
    limits = limits_of(a)
    tasks = [t for c in TRAIN_CATEGORIES for t in make_tasks("train", c, -(-a.train_tasks // 3))][:a.train_tasks]
    for task, syntax in [(t, a.syntax) for t in tasks] + sum(sets.values(), []):
        if (n := len(chat.prompt(Env(task, syntax).opening()))) >= a.max_total_tokens:
            raise UserError(f"the prompt of {task.id} has {n} tokens, which leaves no room for an answer within "
                            f"--max_total_tokens {a.max_total_tokens}; raise it.")
    demos = []
    if a.signal == "sft":
        demos = [play(chat, Env(t, a.syntax, a.closing), demonstration(t, a.syntax), limits) for t in tasks]
        for row in demos:
            if row.reward != 1:
                raise UserError(f"the ground truth of {row.task_id} does not fit into the limits ({row.status}); raise "
                                "--max_total_tokens or --max_messages.")

    # ---- run folder -------------------------------------------------------------------------------------------------
    out, counters, start = Path(a.out), {"rl_steps": 0, "sft_steps": 0, "prompts": 0, "demos": 0, "skipped": 0}, 0
    if checkpoint:
        state = torch.load(Path(checkpoint) / "state.pt", map_location=device, weights_only=True)
        start, counters = state["step"], state["counters"]
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.json", json.dumps(run_config(a), indent=1))
        for name in ("metrics.jsonl", "episodes.jsonl"):
            cut_log(out / name, start)
    say(f"run folder: {out}, steps {start} to {total_steps(a)}")

    engine = HFEngine(model, chat.stop_ids)
    bar = tqdm(total=total_steps(a), initial=start, desc=a.out, disable=None if rank == 0 else True)   # None: only on a terminal
    for step in range(start, total_steps(a) + 1):
        last = step == total_steps(a)

        # ---- evaluation and checkpoint: the state BEFORE step number `step` -------------------------------------------
        if step == 0 or last or (a.eval_every > 0 and step % a.eval_every == 0 and step > start):
            scores = evaluate(model, chat, sets, a, rank, world)
            say(f"step {step:4d}  eval " + "  ".join(f"{k} {scores[k]:.3f}" for k in (*CATEGORIES, "content_ood", "format_ood")))
            append_line(out / "metrics.jsonl", {"step": step} | {f"eval/{k}": v for k, v in scores.items()}, rank)
        if step > start and rank == 0 and (last or (a.save_every > 0 and step % a.save_every == 0)):
            save_checkpoint(out, step, model, chat.tokenizer, optimizer, counters, a.keep)
        if last:
            break
        began, row = time.time(), {"step": step, "phase": "+".join(what(step, a))}

        if "rl" in what(step, a):
            # ---- roll out: G conversations per prompt, all of them together ---------------------------------------------
            batch = endless(tasks, counters["prompts"], a.prompts, f"{a.seed} prompts")
            mine = [g for g in range(a.prompts) if g % world == rank]        # whole groups stay on one rank
            envs = [Env(batch[g], a.syntax, a.closing) for g in mine for _ in range(a.group)]
            episodes = rollout(engine, chat, envs, limits, [g for g in mine for _ in range(a.group)],
                               [k for _ in mine for k in range(a.group)], seed=(a.seed, step))
            row |= rollout_metrics(gather([(e.group_id, e.reward, e.states, e.status, sum(e.mask)) for e in episodes]))
            row["rollout_s"] = time.time() - began
            record_episodes(out / "episodes.jsonl", step, chat, episodes, rank)

            # ---- advantages: compared with the own group ----------------------------------------------------------------
            adv = advantages([e.reward for e in episodes], [e.group_id for e in episodes], a.advantage == "std")

            # ---- policy updates: the groups in `updates` mini-batches ---------------------------------------------------
            set_lr(optimizer, a.lr * min(1, (counters["rl_steps"] + 1) / a.warmup))
            model.train()
            parts = []
            for u in range(a.updates):
                pick = [i for i, e in enumerate(episodes) if e.group_id * a.updates // a.prompts == u]
                m = rl_backward(model, [episodes[i] for i in pick], [adv[i] for i in pick], loss=a.loss,
                                clip=(a.clip_low, a.clip_high), dual_clip=a.dual_clip, kl=a.kl, kl_weight=a.kl_weight,
                                reference=reference, micro_tokens=a.micro_tokens, max_tokens=a.max_total_tokens)
                parts.append(m | optimizer_step(model, optimizer, a.max_grad_norm, m["loss"]))
            row |= {k: mean(m[k] for m in parts) for k in parts[0]}
            row |= {k: sum(m[k] for m in parts) for k in ("tokens", "rl_tokens", "skipped_updates")}
            row["gap"] = parts[0]["gap"]         # |log p trainer - log p sampler| before any update: must be about 0
            counters["rl_steps"] += 1
            counters["prompts"] += a.prompts

        if "sft" in what(step, a):
            # ---- cross-entropy on demonstrations ------------------------------------------------------------------------
            rows = endless(demos, counters["demos"], a.sft_batch, f"{a.seed} demos")
            set_lr(optimizer, a.sft_lr * min(1, (counters["sft_steps"] + 1) / a.warmup))
            model.train()
            m = sft_backward(model, rows[rank::world], micro_tokens=a.micro_tokens)
            row |= m | optimizer_step(model, optimizer, a.max_grad_norm, m["sft_loss"])
            counters["sft_steps"] += 1
            counters["demos"] += a.sft_batch

        # ---- log ------------------------------------------------------------------------------------------------------
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": time.time() - began}
        counters["skipped"] += row["skipped_updates"]
        if row["skipped_updates"]:
            say(f"step {step:4d}  WARNING: {row['skipped_updates']} update(s) skipped, loss or gradient not finite")
        append_line(out / "metrics.jsonl", row, rank)
        say(one_line(row))
        bar.update()
    bar.close()

    # ---- summary ------------------------------------------------------------------------------------------------------
    if rank == 0:
        say(summary(out, counters))


def endless(items, start, n, seed):
    """n items from position `start` of an endless stream of shuffled passes: a pure function, so resuming needs no more
    than the position."""
    order, out = {}, []
    for i in range(start, start + n):
        lap, k = divmod(i, len(items))
        if lap not in order:
            order[lap] = random.Random(f"{seed} {lap}").sample(range(len(items)), len(items))
        out.append(items[order[lap][k]])
    return out


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def rollout_metrics(done):
    """[(group id, reward, states, status, sampled tokens)] of all ranks -> the metrics of one batch of rollouts"""
    groups = {}
    for group, reward, *_ in done:
        groups.setdefault(group, []).append(reward)
    states = Counter(s for _, _, states, _, _ in done for s in states)
    status = Counter(s for *_, s, _ in done)
    return {"reward": mean(r for _, r, *_ in done),
            "mixed_groups": mean(len(set(rewards)) > 1 for rewards in groups.values()),  # the others teach nothing
            **{f"state/{s}": states[s] / max(states.total(), 1) for s in STATES},
            "no_call": mean("call" not in states for _, _, states, _, _ in done),
            "messages": states.total() / len(done),
            "message_tokens": sum(n for *_, n in done) / max(states.total(), 1),
            **{f"status/{s}": n / len(done) for s, n in sorted(status.items())}}


def one_line(row):
    line = f"step {row['step']:4d}  {row['phase']:3s}"
    if "reward" in row:
        line += f"  reward {row['reward']:.3f}  mixed {row['mixed_groups']:.2f}  |  " + \
            "  ".join(f"{s} {row[f'state/{s}']:.2f}" for s in STATES) + f"  |  entropy {row['entropy']:.3f}"
    if "sft_loss" in row:
        line += f"  sft_loss {row['sft_loss']:.3f}"
    return line + f"  grad {row['grad_norm']:.2f}  {row['seconds']:.1f} s"


def append_line(path, row, rank):
    if rank == 0:
        with open(path, "a") as f:
            f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def record_episodes(path, step, chat, episodes, rank):
    """Of rank 0's episodes keep what one wants to read: the best, the worst, and one with a malformed message."""
    by_reward = sorted(episodes, key=lambda e: e.reward)
    odd = [e for e in episodes if set(e.states) - {"call", "reply"}]
    picks = {id(e): e for e in [by_reward[-1], by_reward[0], *odd[:1]]}
    for e in picks.values():
        append_line(path, {"step": step, "task": e.task_id, "group": e.group_id, "sample": e.sample, "reward": e.reward,
                   "status": e.status, "failed_turn": e.failed_turn, "states": e.states, "text": transcript(chat, e)}, rank)


def table(columns):
    """{"before": {"base": .1}, "after": {"base": .3}} -> a text table, one line per score"""
    names = list(next(iter(columns.values())))
    lines = [" " * 18 + "".join(f"{c:>10s}" for c in columns)]
    return "\n".join(lines + [f"{name:18s}" + "".join(f"{100 * col[name]:9.1f}%" for col in columns.values()) for name in names])


def summary(out, counters):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evals = [{k[5:]: v for k, v in r.items() if k.startswith("eval/")} for r in rows if "eval/average" in r]
    text = ["", table({"before": evals[0], "after": evals[-1]})]
    if found := collapse(rows):
        shift = ", ".join(f"{s} {found['before'][s]:.2f} -> {found['after'][s]:.2f}" for s in STATES)
        text.append(f"\nCOLLAPSE at step {found['step']}: the reward fell below a tenth of its peak ({found['peak']:.2f} at step "
                    f"{found['peak_step']}) and stayed there.\nWhat the messages became: {shift}.")
    elif any("reward" in r for r in rows):
        text.append("\nNo collapse: the reward never fell below a tenth of its peak for good.")
    if counters["skipped"]:
        text.append(f"{counters['skipped']} update(s) were skipped because a loss or gradient was not finite.")
    text.append(f"\n{out}/metrics.jsonl    a line per step       {out}/episodes.jsonl   conversations to read\n"
                f"{out}/checkpoints/     Hugging Face format")
    return "\n".join(text)


def cli(argv=None):
    """main, with user mistakes as one sentence and exit status 2"""
    try:
        main(argv)
        return 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(cli())
