"""tests/bench.py -- how fast is this project: beside TRL, at other sizes, beside an older checkout of itself?

    python tests/bench.py                             all but `step`: about 20 minutes on two quiet cores
    python tests/bench.py --only tools sft            some works (WORKS below)
    python tests/bench.py --checkout FOLDER           also `step`: train.py's own step, here and in FOLDER
    python tests/bench.py --quick                     one repeat of tiny sizes: does everything run?

Each side of a work is a process of its own, which loads, warms up, and then does one repeat whenever it is
asked to: the sides alternate, and start-up is not measured. All have the same weights (random, float32),
tokens and number of threads. TRL gets a virtual environment at first use, runs/bench-trl.
Every repeat is appended to bench.csv in --out; a work that has its repeats there is not measured again.
bench.md is the table of that file. Compare ratios, not times, and none from a busy machine."""
import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

# Nothing above is large, and it must stay so (the workers import torch): a child's ru_maxrss begins with the
# memory of the process that it was forked from.
ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "results/base"                      # the model of `step`
TRL = ROOT / "runs/bench-trl"
TRL_PACKAGES = ["trl==1.16.0", "datasets", "accelerate", "jmespath"]

# ------------------------------------------------------------------------------------------------------------
# 1. The works: {name: (what it is, {side: (whose, job, variant)})}. Ratios are to the first side.
WORKS = {
    "sft": ("one pass of cross-entropy over 512 rows of 50 to 250 tokens, 32 an update",
            {"ours": ("ours", "sft", ""), "TRL, grouped by length": ("trl", "sft", "sequential"),
             "TRL, padded": ("trl", "sft", "random")}),
    "single": ("a whole RL step: 12 prompts x 8 rollouts of one message, 3 updates",
               {"ours": ("ours", "rl", "single"), "TRL": ("trl", "rl", "single")}),
    "tools": ("a whole RL step: 12 x 8 rollouts of 3 messages with tool results between them, 3 updates",
              {"ours": ("ours", "rl", "tools"), "TRL": ("trl", "rl", "tools")}),
    "turns": ("whole RL steps of 1 and of 10 messages an episode; tokens: the new ones, without the prompt",
              {f"{n} message(s)": ("ours", "rl", f"turns-{n}") for n in (1, 10)}),
    "growth": ("the same 64k tokens, in RL updates of so many",
               {f"{k}k tokens": ("ours", "growth", str(k)) for k in (1, 4, 16, 64)}),
    "logprobs": ("log-probabilities of 16 x 1,024 tokens at 151,936 words, forward and backward",
                 {"ours": ("ours", "logprobs", "default"), "ours, one batch": ("ours", "logprobs", "one"),
                  "TRL, one batch": ("trl", "logprobs", "one")}),
    "step": ("the last 5 of 6 steps of train.py's default recipe", {"this": ("ours", "step", str(ROOT))})}
FRESH = ("logprobs", "step")                     # jobs whose every repeat is a new process, without warm-up

# small, wide: hidden size and layers of the models; sft, wide_rows: rows, shortest, longest; thousand, row:
# of `growth`; shapes: tokens of the prompt, messages, tokens of each, tokens of a result with its template
FULL = SimpleNamespace(
    folder=ROOT / "runs/bench-model", small=(96, 3), wide=(64, 2), words=151_936, wide_rows=(16, 1024, 1024),
    prompts=12, group=8, updates=3, sft=(512, 50, 250), sft_batch=32, thousand=1024, row=256,
    shapes={"single": (60, 1, 48, 0), "tools": (242, 3, 32, 16), "turns-1": (60, 1, 32, 0),
            "turns-10": (60, 10, 32, 16)})
QUICK = SimpleNamespace(
    folder=ROOT / "runs/bench-quick-model", small=(32, 1), wide=(32, 1), words=5000, wide_rows=(4, 64, 64),
    prompts=3, group=2, updates=3, sft=(16, 10, 30), sft_batch=8, thousand=16, row=16,
    shapes={"single": (30, 1, 6, 0), "tools": (40, 3, 6, 16), "turns-1": (30, 1, 6, 0),
            "turns-10": (30, 10, 6, 16)})

# ------------------------------------------------------------------------------------------------------------
# 2. What both sides read: models, the embedded tokenizer (664 words), texts of exactly so many tokens. The
#    template shows a call's name and arguments because TRL insists, and a tool result as a user's words.
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ 'user' if m['role'] == 'tool' else m['role'] }}\n"
            "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_inputs(sizes):
    """Fills sizes.folder; texts.json: {"tools": {"prompts": [12 texts], "ours": result, "trl": result}}"""
    from make_base import tiny_model, tiny_tokenizer
    from rollout import Chat
    tokenizer, texts = tiny_tokenizer(), {}
    tokenizer.chat_template = TEMPLATE
    chat = Chat(tokenizer)
    prompt, observation = lambda text: chat.prompt(opening(text)), chat.observation

    def fit(length, encode):                     # every digit is a token
        text = "".join(random.choices("0123456789", k=length - len(encode(""))))
        assert len(encode(text)) == length, text
        return text
    for name, (length, _, _, result) in sizes.shapes.items():
        texts[name] = {"prompts": [fit(length, prompt) for _ in range(sizes.prompts)]}
        if result:  # our loop adds the end token to a message that the limit cut, TRL does not: a digit less
            texts[name] |= {"ours": fit(result - 1, observation), "trl": fit(result, observation)}
    for name, words, size in (("small", len(tokenizer), sizes.small), ("wide", sizes.words, sizes.wide)):
        tiny_model(words, *size).save_pretrained(sizes.folder / name)
        tokenizer.save_pretrained(sizes.folder / name)
    (sizes.folder / "texts.json").write_text(json.dumps(texts))


def opening(text):
    return [{"role": "user", "content": text}]


def load(sizes, job):
    """-> model, tokenizer, texts"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = sizes.folder / ("wide" if job == "logprobs" else "small")
    return (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            AutoTokenizer.from_pretrained(folder, padding_side="left"),
            json.loads((sizes.folder / "texts.json").read_text()))


def random_rows(sizes, job, variant):
    """-> lists of ids. No two begin alike, else our side would compute what they share only once."""
    n, shortest, longest = {"sft": sizes.sft, "logprobs": sizes.wide_rows}.get(job) or (
        int(variant) * sizes.thousand // sizes.row, sizes.row, sizes.row)
    words = range(7, sizes.words if job == "logprobs" else 512)
    return [[i, *random.choices(words, k=random.randint(shortest, longest) - 1)] for i in range(n)]


# ------------------------------------------------------------------------------------------------------------
# 3. Our side: train.py's own functions, with the defaults of its flags. A job returns run(), which does one
#    repeat -> [(part, seconds, tokens)].


def ours(sizes, job):
    """-> model, optimizer, tokenizer, texts, flags"""
    import torch
    import train
    model, tokenizer, texts = load(sizes, job)
    flags = f"--model - --prompts {sizes.prompts} --group {sizes.group} --updates {sizes.updates}"
    train.start_processes(args := train.parse_args(flags.split()))   # it fills in --micro_tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=train.WEIGHT_DECAY)
    return model, optimizer, tokenizer, texts, args


def our_passes(sizes, job, variant):
    """sft, growth, logprobs: training passes over fixed rows"""
    from rl_step import rl_backward
    from rollout import Episode
    from sft_step import micro_batches, optimizer_step, sft_update, shuffled_passes, token_logprobs
    (model, optimizer, _, _, args), rows, batch = ours(sizes, job), [], sizes.sft_batch
    for i, ids in enumerate(random_rows(sizes, job, variant)):
        prompt, zeros = len(ids) // 2 if job == "growth" else 1, [0.0] * len(ids)
        mask = [0] * prompt + [1] * (len(ids) - prompt)
        rows.append(Episode("row", i, ids=ids, mask=mask, logprobs=zeros, logprobs_old=zeros))
    repeats, tokens = 64 // int(variant) if job == "growth" else 1, sum(len(row.ids) for row in rows)
    adv, limit = [1.0 - 2 * (i % 2) for i in range(len(rows))], args.micro_tokens

    def run():
        began = time.perf_counter()
        if job == "sft":
            for start in range(0, len(rows), batch):
                sft_update(model, optimizer, shuffled_passes(rows, start, batch, "bench"), 1e-6, limit)
        elif job == "growth":
            for _ in range(repeats):
                rl_backward(model, rows, adv, micro_tokens=limit)
                optimizer_step(model, optimizer)
        else:
            for some in micro_batches(rows, limit if variant == "default" else tokens):
                token_logprobs(model, some).logp.sum().backward()
        return [("", time.perf_counter() - began, repeats * tokens)]
    return run


class World:
    """Stands for tools.Env: the same tool result answers every message but the last, whatever they say; half
    of each group is rewarded, so that the update leaves none out."""
    syntax, turn, failed_turn, status = "A", 0, None, None

    def __init__(self, prompt, result, messages, reward):
        self.result, self.left, self.reward = result, messages, reward
        self.task = SimpleNamespace(id="bench", opening=lambda syntax: opening(prompt))

    def step(self, message):
        self.left -= 1
        return self.result if self.left else self.stop("finished")

    def stop(self, status):
        self.status = status

    def grade(self):
        return self.reward


def our_rl(sizes, job, variant):
    import train
    from rl_step import advantages, policy_updates, set_old_logprobs
    from rollout import Chat, Limits, begin, rollout
    model, optimizer, tokenizer, texts, args = ours(sizes, job)
    (prompt, messages, message, _), chat, texts = sizes.shapes[variant], Chat(tokenizer), texts[variant]
    limits = Limits(message_tokens=message, total_tokens=args.max_total_tokens)
    signal = train.SIGNALS["none"](args, chat, [], limits)
    # Messages of exactly so many tokens: the end token cannot be sampled, on TRL's side neither.
    engine = train.make_engine(args, model, chat)
    engine.stop_ids = set()
    engine.rule = lambda logits, said: logits.index_fill(1, logits.new_tensor([chat.end_id]).long(), -1e9)
    members = [(g, k) for g in range(sizes.prompts) for k in range(sizes.group)]

    def run():
        began = time.perf_counter()
        envs = [World(texts["prompts"][g], texts.get("ours"), messages, float(k % 2)) for g, k in members]
        begun = [begin(chat, env, g, k) for env, (g, k) in zip(envs, members)]
        episodes = rollout(engine, chat, envs, limits, begun)
        rolled = time.perf_counter()
        set_old_logprobs(model.train(), episodes, args.correction, args.micro_tokens)
        adv = advantages([e.reward for e in episodes], [e.group_id for e in episodes])
        policy_updates(model, optimizer, episodes, adv, args, lr=1e-6, signal=signal, reference=None,
                       chat=chat, rows=[], position=0)
        seconds, total = time.perf_counter() - began, sum(len(e.ids) for e in episodes)
        return rl_parts(variant, seconds, rolled - began, prompt * len(episodes), total)
    return run


def rl_parts(variant, seconds, rollout, prompts, total):
    """Seconds and tokens -> the parts. The update is all that is no rollout: TRL's pass for old
    log-probabilities too, which our side has from its sampler."""
    new = total - prompts
    total = new if variant.startswith("turns") else total
    return [("", seconds, total), ("rollout", rollout, new), ("update", seconds - rollout, total)]


def train_steps(args, checkout):
    """step: a whole process of a checkout's train.py; what counts is its own clock, after the first step"""
    flags = "--steps 6 --eval_tasks 1 --eval_every -1 --probe_every -1 --save_every -1"
    tiny = "--prompts 4 --group 4 --train_tasks 12 --max_message_tokens 24" if args.quick else ""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "train.py", "--model", BASE, "--threads", str(args.threads),
                 "--out", f"{folder}/run", *flags.split(), *tiny.split()],
                cwd=checkout, stdout=sys.stderr, check=True)
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        steps = [step for step in map(json.loads, lines) if "seconds" in step][1:]
        return [("", sum(step["seconds"] for step in steps), int(sum(step["tokens"] for step in steps)))]
    return run


# ------------------------------------------------------------------------------------------------------------
# 4. TRL's side: unmodified trainers, in one long run that a callback stops between repeats. Its defaults
#    bfloat16 and gradient checkpointing are off: on a CPU they only cost time.
TRL_FLAGS = dict(
    output_dir=str(ROOT / "runs/bench-logs"), use_cpu=True, bf16=False, gradient_checkpointing=False,
    max_steps=10**6, learning_rate=1e-6, gradient_accumulation_steps=1, logging_strategy="no",
    report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)


def serve(trainer, pipe, period, parts):
    """Trains on and on, `period` updates a repeat; parts(seconds) -> [(part, seconds, tokens)]. Not on the
    clock, in TRL's favour: fetching the first batch, and whatever the trainer does between two repeats."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step % period == 0:
                if state.global_step:            # else it is the warm-up
                    pipe.wait()
                self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kw):
            if state.global_step % period == 0:  # the first is the warm-up's: it says "I am ready"
                pipe.send(parts(time.perf_counter() - self.began))
    trainer.add_callback(Clock())
    pipe.loaded = peak_mb()
    trainer.train()


def trl_sft(sizes, job, variant, pipe):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    model, tokenizer, _ = load(sizes, job)
    rows = random_rows(sizes, job, variant)
    if variant == "sequential":
        # Grouped by length is its best mode: packing and padding-free need a varlen kernel, which no CPU has.
        # Sorted rows are what its group_by_length would reach with thousands of them; with few it mixes more.
        rows.sort(key=len)
    flags = SFTConfig(**TRL_FLAGS, per_device_train_batch_size=sizes.sft_batch,
                      train_sampling_strategy=variant)
    data = Dataset.from_dict({"input_ids": rows})
    trainer = SFTTrainer(model, flags, train_dataset=data, processing_class=tokenizer)
    tokens = sum(len(ids) for ids in rows)
    serve(trainer, pipe, len(rows) // sizes.sft_batch, lambda seconds: [("", seconds, tokens)])


def trl_rl(sizes, job, variant, pipe):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_template
    from trl.trainer import grpo_trainer
    model, tokenizer, texts = load(sizes, job)
    (_, messages, message, result), texts = sizes.shapes[variant], texts[variant]

    def look() -> str:
        """Look."""
        return texts["trl"]

    def reward(completions, **kw):
        return [float(i % 2) for i in range(len(completions))]
    # A random model's messages hold no calls, so its tool loop would never turn: each message is parsed as
    # always, and a call is put into what was found. This spares TRL the JSON of that call, nothing else.
    parse = grpo_trainer.parse_response
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    grpo_trainer.parse_response = lambda *a, **kw: parse(*a, **kw) | {"tool_calls": [call]}
    tokenizer.response_template = qwen3_template
    flags = GRPOConfig(
        **TRL_FLAGS, steps_per_generation=sizes.updates, num_iterations=1, temperature=1.0, beta=0.0,
        per_device_train_batch_size=sizes.prompts * sizes.group // sizes.updates, num_generations=sizes.group,
        max_completion_length=messages * message + (messages - 1) * result,
        max_tool_calling_iterations=messages - 1,
        # the limit of one message; and no end token, as on our side
        generation_kwargs={"max_new_tokens": message, "suppress_tokens": [tokenizer.eos_token_id]})
    data = Dataset.from_dict({"prompt": [opening(text) for text in texts["prompts"]]})
    trainer = GRPOTrainer(model, reward, flags, train_dataset=data, processing_class=tokenizer,
                          tools=[look] if messages > 1 else None)
    generate, last = trainer._generate, []

    def timed(prompts):
        began, found = time.perf_counter(), generate(prompts)
        prompts, completions = (sum(len(ids) for ids in column) for column in found[:2])
        last[:] = time.perf_counter() - began, prompts, prompts + completions
        return found
    trainer._generate = timed
    serve(trainer, pipe, sizes.updates, lambda seconds: rl_parts(variant, seconds, *last))


def trl_logprobs(sizes, job, variant, pipe):
    """As GRPOTrainer computes them: its head works in tiles"""
    import torch
    from trl.trainer.utils import add_fused_lm_head
    model, ids = load(sizes, job)[0], torch.tensor(random_rows(sizes, job, variant))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))

    def run():
        began, ones = time.perf_counter(), torch.ones_like(ids)
        model(input_ids=ids, attention_mask=ones, labels=ids, fused_lm_head=True).log_probs.sum().backward()
        return [("", time.perf_counter() - began, ids.numel())]
    pipe.answer(run, job)


# ------------------------------------------------------------------------------------------------------------
# 5. Workers, from inside and from outside


def peak_mb():
    """Of this process, or of the train.py that it started. Linux counts KiB."""
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return max(resource.getrusage(who).ru_maxrss for who in both) / 1024


class Pipe:
    """Inside: a line of JSON for each line that comes in. What libraries print goes to stderr."""

    def __init__(self):
        self.out, self.loaded = os.fdopen(os.dup(1), "w"), 0.0
        os.dup2(2, 1)

    def wait(self):
        if not sys.stdin.readline():
            os._exit(0)                          # the benchmark needs this worker no more

    def send(self, parts):
        print(json.dumps([parts, peak_mb(), peak_mb() - self.loaded]), file=self.out, flush=True)

    def answer(self, run, job):
        self.loaded = peak_mb()
        self.send([] if job in FRESH else run())     # "I am ready"
        while True:
            self.wait()
            self.send(run())


def work(whose, job, variant, args):
    sizes, pipe = QUICK if args.quick else FULL, Pipe()
    random.seed(0)
    if job == "step":
        return pipe.answer(train_steps(args, variant), job)
    import torch
    torch.set_num_threads(args.threads)
    if whose == "trl":
        return {"sft": trl_sft, "rl": trl_rl, "logprobs": trl_logprobs}[job](sizes, job, variant, pipe)
    sys.path[:0] = [str(ROOT), str(ROOT / "results")]
    if job == "inputs":
        return make_inputs(sizes) or pipe.send([])
    pipe.answer((our_rl if job == "rl" else our_passes)(sizes, job, variant), job)


class Worker:
    """Outside. ask() -> [[part, seconds, tokens], ...], peak MB, MB above what it was when all was loaded"""

    def __init__(self, whose, job, variant, args):
        self.job, self.process = job, None
        self.log = ROOT / "runs/bench-logs" / f"{whose}-{job}-{Path(variant).name}.txt"
        self.command = [TRL / "bin/python" if whose == "trl" else sys.executable, __file__, "--threads",
                        str(args.threads), *["--quick"] * args.quick, "--worker", whose, job, variant]
        self.env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads),
                                 "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # all on the CPU

    def start(self):
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=log, text=True, env=self.env)
        self.read()                              # it is ready

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text().strip().splitlines() or ["nothing"]
            fail(f"the worker {self.log.stem} ended early: {said[-1]} (the rest is in {self.log})")
        return json.loads(line)

    def ask(self):
        if self.process is None:
            self.start()
        print("go", file=self.process.stdin, flush=True)
        answer = self.read()
        if self.job in FRESH:
            self.stop()
        return answer

    def stop(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def fail(sentence):
    sys.exit(f"bench.py: error: {sentence}")


def install_trl():
    """runs/bench-trl, with our versions of what both need; its file `installed` says that pip finished"""
    if not (TRL / "installed").exists():
        same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
        print(f"installing {' '.join(same + TRL_PACKAGES)} in runs/bench-trl, once: minutes", flush=True)
        venv.create(TRL, with_pip=True, clear=True)
        pip = [TRL / "bin/python", "-m", "pip", "install", "-q", *same, *TRL_PACKAGES]
        if subprocess.run(pip).returncode:
            fail("pip could not install TRL (see above); what needs no TRL: --only turns growth step.")
        (TRL / "installed").touch()


# ------------------------------------------------------------------------------------------------------------
# 6. The measurement and the table
COLUMNS = ["work", "side", "repeat", "seconds", "tokens", "peak_mb", "above_mb"]


def read_csv(file):
    """-> {work: {side: {repeat: {"seconds": 1.2, "tokens": 35520.0, "peak_mb": 500.0, "above_mb": 90.0}}}}"""
    found = {}
    for row in csv.DictReader(file.read_text().splitlines()) if file.exists() else []:
        values = {name: float(row[name]) for name in COLUMNS[3:]}
        found.setdefault(row["work"], {}).setdefault(row["side"], {})[int(row["repeat"])] = values
    return found


def measure(name, sides, args):
    """sides {"ours": Worker, "TRL": Worker}: one after the other, until each has its repeats in bench.csv"""
    file = args.out / "bench.csv"
    before = read_csv(file).get(name, {})
    for repeat in range(min(len(before.get(side, {})) for side in sides), args.repeats):
        counts = {}
        for side, worker in sides.items():
            parts, peak, above = worker.ask()
            rows = [[f"{name} {part}".strip(), side, repeat, f"{seconds:.5f}", tokens, round(peak),
                     round(above)] for part, seconds, tokens in parts]
            header = [] if file.exists() else [COLUMNS]
            with open(file, "a", newline="") as f:
                csv.writer(f).writerows(header + rows)
            for row in rows:
                print(f"{row[0]}, {side}, repeat {repeat}: {row[3]} s, {row[4]} tokens", flush=True)
            counts[side] = [tokens for _, _, tokens in parts]
            if side.startswith("TRL"):           # they did the same work
                for n, m in zip(counts[side], counts["ours"], strict=True):
                    assert abs(n - m) <= 0.02 * m, f"{name}: {counts} tokens"
    for worker in sides.values():
        worker.stop()


def table(found):
    """read_csv's dict -> Markdown. Ratios compare what was measured side by side: repeat by repeat."""
    def spread(values, form):                    # [1.21, 1.2, 1.3] -> "1.21 (1.20 to 1.30)"
        return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
    lines = [["work", "side", "seconds", "tokens", "tokens/s", "time / first side's",
              "per token / first side's", "peak MB (above loaded)", "repeats"]]
    lines.append(["---"] * len(lines[0]))
    for name, sides in found.items():
        first = next(iter(sides.values()))
        for side, repeats in sides.items():
            column = lambda key: [values[key] for values in repeats.values()]
            tokens, pairs = median(column("tokens")), [(repeats[r], first[r]) for r in repeats if r in first]
            time_ratio = [a["seconds"] / b["seconds"] for a, b in pairs]
            per_token = [ratio * b["tokens"] / a["tokens"] for ratio, (a, b) in zip(time_ratio, pairs)]
            lines.append([
                name, side, spread(column("seconds"), ".3g"), f"{tokens:,.0f}",
                f"{tokens / median(column('seconds')):,.0f}", spread(time_ratio, ".2f"),
                spread(per_token, ".2f"), f"{max(column('peak_mb')):,.0f} ({max(column('above_mb')):,.0f})",
                str(len(repeats))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main():
    p = argparse.ArgumentParser(description="Times of this project, of TRL, and of an older checkout.")
    p.add_argument("--out", type=Path, help="results folder (results/speed; with --quick runs/bench-quick)")
    p.add_argument("--repeats", type=int, default=5, help="of every side (5)")
    p.add_argument("--threads", type=int, default=2, help="of every process (2)")
    p.add_argument("--only", nargs="+", choices=WORKS, metavar="NAME", help=f"some of: {', '.join(WORKS)}")
    p.add_argument("--checkout", type=Path, help="folder of another checkout, for the work `step`")
    p.add_argument("--quick", action="store_true", help="one repeat of tiny sizes: these times mean nothing")
    p.add_argument("--worker", nargs=3, metavar=("WHOSE", "JOB", "VARIANT"), help="for the script itself")
    args = p.parse_args()
    if args.worker:
        return work(*args.worker, args)
    args.out = args.out or ROOT / ("runs/bench-quick" if args.quick else "results/speed")
    args.repeats = 1 if args.quick else args.repeats
    names = args.only or [name for name in WORKS if name != "step" or args.checkout]
    if "step" in names:
        if not (args.checkout and (args.checkout / "train.py").exists()):
            fail("`step` needs --checkout FOLDER with another train.py (git worktree add FOLDER COMMIT).")
        if not BASE.exists():
            fail(f"`step` needs the embedded model in {BASE}; python results/make_base.py makes it.")
        there = args.checkout.resolve()
        WORKS["step"][1][f"the other ({there.name})"] = ("ours", "step", str(there))
    if not args.quick and os.getloadavg()[0] > 0.3:
        print(f"WARNING: the machine is busy (load {os.getloadavg()[0]:.1f}): wait, or believe no number.")
    if any(whose == "trl" for name in names for whose, _, _ in WORKS[name][1].values()):
        install_trl()
    args.out.mkdir(parents=True, exist_ok=True)
    Worker("ours", "inputs", "", args).start()   # has made them when it is ready
    for name in names:
        measure(name, {side: Worker(*how, args) for side, how in WORKS[name][1].items()}, args)
        found = read_csv(args.out / "bench.csv")
        text = (f"Median (least to most). {args.threads} threads of {os.cpu_count()} cores, torch "
                f"{version('torch')}, transformers {version('transformers')}, {TRL_PACKAGES[0]}.\n\n")
        text += table(found) + "\n\n"
        text += "".join(f"- {name}: {what}\n" for name, (what, _) in WORKS.items() if name in found)
        (args.out / "bench.md").write_text(text)
    print(f"\n{text}\nEvery repeat is in bench.csv, this table in bench.md, both in {args.out}.")


if __name__ == "__main__":
    main()
