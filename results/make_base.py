"""results/make_base.py -- the embedded base model: a tokenizer and a Qwen2 decoder made from nothing,
pre-trained by supervision alone, with the same demonstrations, environment and cross-entropy as every other
SFT run here.

    python results/make_base.py                          runs/tiny-base, about 4 minutes on two cores
    python results/make_base.py --malformed 0.005 --out runs/rare-base     (then: train.py --model runs/rare-base)

train.py starts it by itself, once, where --model tiny is asked for and is not there yet.
"""
import argparse
import json
import math
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: E402

from rollout import (CLOSE, CONTROL, OPEN, TEMPLATES, Chat, Limits, play, truth_script,  # noqa: E402
                     write_calls)
from sft_step import optimizer_step, set_lr, sft_backward  # noqa: E402
from supervision import HBG  # noqa: E402
from tools import PEOPLE, TRAIN_CATEGORIES, WORDS, make_tasks  # noqa: E402
from train import publish  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# 1. The tokenizer


# Every fixed word of the hints and reflections (supervision.py); a test looks whether one is missing.
WORDING = """Notes that may help: turn no call, but: is right not right: cause: fix: similar: not similar: user: assistant: result: right:
the turn was never reached a message is not a complete call and not a clean reply a call where no call is right no call where one is
right the tool must be the value of key must be a call is missing a call too many the state is not right Read each turn. Is it right?
Write the cause and the right call. The last turn is not right. Write the cause, the fix, similar turns, and one that is not similar."""


def tiny_tokenizer(more_text=""):
    """The real Qwen2 tokenizer class with a small vocabulary: every word of the world is one token, all other
    text falls apart into smaller pieces, at worst single bytes. Lossless; control tokens are one id each, as
    in Qwen2.5. '{"name": "read_file"}' -> ['{"', 'name', '":', ' "', 'read', '_file', '"}']

    (It must BE that class: AutoTokenizer and vLLM choose the class by the model's type, and any other would
    be rebuilt with Qwen2's splitting rule when the checkpoint is loaded, silently.)"""
    texts = ["system\nuser\nassistant\n", WORDING, more_text]
    for category in TRAIN_CATEGORIES:
        for task in make_tasks("train", category, 300) + make_tasks("train", category, 300, held_out=True):
            for syntax in "AB":
                texts += [m["content"] for m in task.opening(syntax)] + [turn.user for turn in task.turns]
                texts += [HBG.hint_text(task, syntax), *sum(truth_script(task, syntax), [])]
    pre = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    words = set()
    for text in texts:
        for token in CONTROL:
            text = text.replace(token, "")
        words |= {word for word, _ in pre.pre_tokenize_str(text)}
    bpe = Tokenizer(models.BPE())
    bpe.train_from_iterator(sorted(words), trainers.BpeTrainer(      # no limit in reach: words become whole
        vocab_size=10_000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe = json.loads(bpe.to_str())["model"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [token for token in CONTROL if token not in special]     # they survive skip_special_tokens
    vocab = {token: i for i, token in enumerate([*special, *added, *bpe["vocab"]])}
    merges = [tuple(pair) for pair in bpe["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.chat_template = TEMPLATES["chatml"]
    return tokenizer


# ------------------------------------------------------------------------------------------------------------
# 2. Demonstrations, with mistakes. Without wrong calls every rollout of a group succeeds, and there is
#    nothing to compare; without malformed messages no control token ever has a wrong place to spike in.


def noisy_script(task, syntax, rng, wrong, malformed):
    """truth_script with mistakes: each call gets a wrong value or tool with probability `wrong`, each message
    is malformed with probability `malformed`"""
    script = []
    for turn in task.turns:
        calls = [wrong_call(call, task, rng) if rng.random() < wrong else call for call in turn.calls]
        messages = [write_calls([call], syntax) for call in calls] + [turn.reply]
        script.append([malform(m, syntax, rng) if rng.random() < malformed else m for m in messages])
    return script


def wrong_call(call, task, rng):
    name, args = call
    if not args or rng.random() < 0.2:
        return rng.choice(sorted(task.docs)), args
    spoiled = rng.choice(sorted(args))
    value = rng.randint(1, 9) if isinstance(args[spoiled], int) else rng.choice(WORDS + PEOPLE)
    return name, args | {spoiled: value}


def malform(text, syntax, rng):
    if syntax == "B":
        unclosed = text.removesuffix(")]") if text.startswith("[") else f"[tool({text}"
        return rng.choice(["", "[", f"[{text}", unclosed])
    if text.startswith(OPEN):
        without_end, without_start = text.removesuffix(f"\n{CLOSE}"), text.removeprefix(f"{OPEN}\n")
        return rng.choice(["", OPEN, without_end, without_start, f"{OPEN}\n{text}"])
    return rng.choice(["", OPEN, f"{text}\n{OPEN}", f"{OPEN}\n{text}", f"{text}\n{CLOSE}"])


def noisy_demonstrations(chat, n, seed, wrong=0.0, malformed=0.0):
    """n Episodes in both syntaxes, played through the live world"""
    rng, limits, rows = random.Random(f"demonstrations {seed}"), Limits(20, 1024, 1024, 256), []
    stories = [task for c in TRAIN_CATEGORIES for task in make_tasks("train", c, -(-n // 3), seed=seed)]
    for i, task in enumerate(tqdm(rng.sample(stories, n), desc="demonstrations", leave=False, disable=None)):
        syntax = "AB"[i % 2]
        script = noisy_script(task, syntax, rng, wrong, malformed)
        rows.append(play(chat, task.env(syntax), script, limits))
    return rows


# ------------------------------------------------------------------------------------------------------------
# 3. The model


def tiny_model(vocab_size, hidden=128, layers=3, seed=0):
    torch.manual_seed(seed)
    heads = hidden // 32
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=4096, initializer_range=0.05, bos_token_id=None, eos_token_id=2,
        pad_token_id=0))


def pretrain(chat, model, steps, noisy_steps, wrong, malformed, seed):
    """Three stages:

      short   clean demonstrations of at most 170 tokens: copying a value from the request into a call is
              learnt here, twice as fast as on the full mixture
      full    clean demonstrations of every length
      noisy   some calls wrong, a few messages malformed: sets the start success, and gives the malformed
              messages a small probability, as any real model does. Without them RL has nothing to miscredit."""
    clean = noisy_demonstrations(chat, min(6000, 32 * steps), f"clean {seed}")
    noisy = noisy_demonstrations(chat, 32 * noisy_steps, f"noisy {seed}", wrong, malformed)
    short = [row for row in clean if len(row.ids) <= 170]
    total, batch, peak = steps + noisy_steps, 32, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    bar = tqdm(range(total), desc="pre-training the embedded model (once)", disable=None)
    for step in bar:
        rows = noisy if step >= steps else clean if step >= 0.7 * steps else short
        rows = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        warm, decay = min(1, (step + 1) / 50), 0.1 + 0.45 * (1 + math.cos(math.pi * step / total))  # to 10 %
        set_lr(optimizer, peak * warm * decay)
        metrics = sft_backward(model, rows, micro_tokens=8192)
        optimizer_step(model, optimizer, metrics["sft_loss"])
        bar.set_postfix(loss=f"{metrics['sft_loss']:.3f}")


def main(argv=None):
    p = argparse.ArgumentParser(description="Make the embedded base model.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="runs/tiny-base", help="its folder")
    p.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 32 (a head has 32)")
    p.add_argument("--layers", type=int, default=3, help="decoder layers")
    p.add_argument("--steps", type=int, default=450, help="pre-training steps on clean demonstrations")
    p.add_argument("--noisy_steps", type=int, default=200, help="then steps on demonstrations with mistakes")
    p.add_argument("--wrong", type=float, default=0.9, help="there: probability that a call is wrong")
    p.add_argument("--malformed", type=float, default=0.06, help="there: probability of a malformed message")
    p.add_argument("--seed", type=int, default=0, help="of initialisation and demonstrations")
    args = p.parse_args(argv)
    if args.hidden % 32 or args.hidden < 32:
        p.error(f"--hidden {args.hidden} must be a multiple of 32")
    if not (0 <= args.wrong <= 1 and 0 <= args.malformed <= 1 and args.steps >= 1 and args.noisy_steps >= 0):
        p.error("--wrong and --malformed are probabilities, --steps at least 1, --noisy_steps at least 0")
    if Path(args.out).exists():
        p.error(f"--out {args.out} exists")
    total = args.steps + args.noisy_steps
    print(f"pre-training the embedded model: {total} steps, once; it stays in {args.out}", flush=True)
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer), args.hidden, args.layers, args.seed)
    pretrain(Chat(tokenizer), model, args.steps, args.noisy_steps, args.wrong, args.malformed, args.seed)
    publish(args.out, lambda tmp: (model.save_pretrained(tmp), tokenizer.save_pretrained(tmp)))


if __name__ == "__main__":
    main()
