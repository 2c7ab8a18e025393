"""results/make_base.py -- the embedded base model: a tokenizer and a Qwen2 decoder made from nothing,
pre-trained by supervision alone, with the same demonstrations, environment and cross-entropy as every SFT.

    python results/make_base.py                                  results/base, which we ship; 8 minutes
    python results/make_base.py --seed 1 --out runs/base-seed1   then: train.py --model runs/base-seed1

It measures what the model can do and writes a row into results/base/README.md (measure_base.py)."""
import argparse
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: E402

from analyze_tokens import publish, world_checksum  # noqa: E402
from measure_base import PAGE, write_row  # noqa: E402
from renamed import POOLS, renamed  # noqa: E402
from rollout import (CLOSE, CONTROL, OPEN, TEMPLATES, Chat, Limits, play, truth_script,  # noqa: E402
                     write_calls)
from sft_step import optimizer_step, set_lr, sft_backward  # noqa: E402
from supervision import HBG  # noqa: E402
from tools import PEOPLE, TRAIN_CATEGORIES, WORDS, make_tasks  # noqa: E402
from train import BASE  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# 1. The tokenizer


# Every fixed word of the hints and reflections (supervision.py); a test looks whether one is missing.
WORDING = """Notes that may help: turn no call, but: is right not right: cause: fix: similar: not similar:
user: assistant: result: right: the turn was never reached a message is not a complete call and not a clean
reply a call where no call is right no call where one is right the tool must be the value of key must be a
call is missing a call too many the state is not right Read each turn. Is it right? Write the cause and the
right call. The last turn is not right. The fix, similar turns, and one that is not similar."""


def tiny_tokenizer(more_text=""):
    """The real Qwen2 tokenizer class with a small vocabulary: every word of the world is one token, all other
    text falls apart into smaller pieces, at worst single bytes. Lossless; control tokens are one id each, as
    in Qwen2.5. '{"name": "read_file"}' -> ['{"', 'name', '":', ' "', 'read', '_file', '"}']

    (It must BE that class: AutoTokenizer and vLLM choose the class by the model's type, and any other would
    be rebuilt with Qwen2's splitting rule when the checkpoint is loaded, silently.)"""
    texts = ["system\nuser\nassistant\n", WORDING, more_text]
    for own, others in POOLS:
        texts += [f"{word} {word}\n[{word}\n({word}\n_{word}" for word in own + others]
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
    """n Episodes in both syntaxes, played through the live world; seven of ten under other names"""
    rng, limits, rows = random.Random(f"demonstrations {seed}"), Limits(20, 1024, 1024, 256), []
    stories = [task for c in TRAIN_CATEGORIES for task in make_tasks("train", c, -(-n // 3), seed=seed)]
    for i, task in enumerate(tqdm(rng.sample(stories, n), desc="demonstrations", leave=False, disable=None)):
        syntax = "AB"[i % 2]
        task = renamed(task, rng) if rng.random() < 0.7 else task
        rows.append(play(chat, task.env(syntax), noisy_script(task, syntax, rng, wrong, malformed), limits))
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


SIZES = {"small": dict(hidden=64, layers=3, steps=900, noisy_steps=200, lr=5e-3),
         "main": dict(hidden=128, layers=3, steps=600, noisy_steps=200, lr=3e-3),
         "large": dict(hidden=224, layers=3, steps=600, noisy_steps=200, lr=2e-3)}


def pretrain(chat, recipe):
    """-> the model. Three stages:

      short   clean demonstrations of at most 170 tokens: copying a value from the request into a call is
              learnt here, twice as fast as on the full mixture
      full    clean demonstrations of every length
      noisy   most calls wrong, a few messages malformed: sets the start success, and gives malformed messages
              a small probability, as any real model does. Without them RL has nothing to miscredit."""
    clean = noisy_demonstrations(chat, 32 * recipe.steps, f"clean {recipe.seed}")
    noisy = noisy_demonstrations(chat, 32 * recipe.noisy_steps, f"noisy {recipe.seed}", recipe.wrong,
                                 recipe.malformed)
    model = tiny_model(len(chat.tokenizer), recipe.hidden, recipe.layers, recipe.seed)
    short = [row for row in clean if len(row.ids) <= 170]
    total = recipe.steps + recipe.noisy_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in (bar := tqdm(range(total), desc="pre-training", disable=None)):
        rows = noisy if step >= recipe.steps else clean if step >= 0.7 * recipe.steps else short
        rows = [rows[(32 * step + i) % len(rows)] for i in range(32)]
        warm, decay = min(1, (step + 1) / 50), 0.1 + 0.45 * (1 + math.cos(math.pi * step / total))  # to 10 %
        set_lr(optimizer, recipe.lr * warm * decay)
        metrics = sft_backward(model, rows, micro_tokens=2048)
        optimizer_step(model, optimizer, metrics["sft_loss"])
        bar.set_postfix(loss=f"{metrics['sft_loss']:.3f}")
    return model.bfloat16()                      # half the megabytes; every run starts from these weights


def main(argv=None):
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="main", help="of the model; see SIZES")
    p.add_argument("--seed", type=int, default=0, help="of initialisation and demonstrations")
    p.add_argument("--wrong", type=float, default=0.9, help="noisy stage: probability of a wrong call")
    p.add_argument("--malformed", type=float, default=0.005, help="and of a malformed message")
    p.add_argument("--eval_tasks", type=int, default=50, help="measure on so many per category; 0 = do not")
    p.add_argument("--out", type=Path, default=BASE, help="its folder")
    args = p.parse_args(argv)
    if args.out.exists() and args.out != BASE:
        p.error(f"--out {args.out} exists")
    recipe = SIZES[args.size] | {"seed": args.seed, "wrong": args.wrong, "malformed": args.malformed,
                                 "world": world_checksum()}
    chat = Chat(tiny_tokenizer())
    model = pretrain(chat, SimpleNamespace(**recipe))
    page = PAGE.read_text()                      # it may stand in the folder that is replaced now

    def write(tmp):
        model.save_pretrained(tmp)
        chat.tokenizer.save_pretrained(tmp)
        (tmp / "recipe.json").write_text(json.dumps(recipe, indent=1))
    publish(args.out, write)
    PAGE.write_text(page)
    if args.eval_tasks:
        write_row(args.out, f"{args.size}, seed {args.seed}", args.eval_tasks)


if __name__ == "__main__":
    main()
