"""Qwen's own vocabulary and chat templates, without a download: the package qwen-agent carries the byte-pair
ranks, trl the templates.

    pip install --no-deps qwen-agent==0.0.34 trl==1.16.0 && python -m pytest tests/test_qwen.py"""
import base64
import importlib.metadata
import json

import pytest
import torch
from conftest import RUN, rows
from transformers import (AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3Config,
                          Qwen3ForCausalLM)

import rollout
import train
from rollout import Chat, Limits, play, truth_script
from tools import Env, UserError, make_tasks


def packaged(package, path):
    try:
        return importlib.metadata.distribution(package).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {package} is not installed (pip install --no-deps qwen-agent trl)",
                    allow_module_level=True)


RANKS = packaged("qwen-agent", "qwen_agent/utils/qwen.tiktoken")
TEMPLATES = packaged("trl", "trl/chat_templates")
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>
<|video_pad|>""".split()                         # 151643 and on
ADDED = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
<|file_sep|>""".split()
ADDED3 = "<tool_response> </tool_response> <think> </think>".split()             # Qwen3 only
NO_THINK = [151667, 271, 151668, 271]            # <think> \n\n </think> \n\n
LIMITS = Limits(16, 200, 4096, 512)


def halves(token, ranks):
    """The merge that makes a token: apply all merges of lower rank to its bytes; two parts remain."""
    parts = [bytes([b]) for b in token]
    while True:
        pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        rank, i = min(pairs)
        if rank >= ranks[token]:
            return parts
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def vocabulary():
    """-> {"Ġthe": 279, ...}, [("Ġ", "t"), ...]"""
    lines = [line.split() for line in RANKS.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]            # GPT-2's way to write bytes
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    text = lambda token: "".join(letter[b] for b in token)
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    merges = [tuple(map(text, halves(token, ranks))) for token in longer]
    assert len(ranks) == 151_643 and all(len(pair) == 2 for pair in merges)
    return {text(token): rank for token, rank in ranks.items()}, merges


@pytest.fixture(scope="module")
def make(vocabulary):
    """make("qwen3", "qwen3") -> the tokenizer of Qwen3, with the template trl/chat_templates/qwen3.jinja"""
    def build(kind, template):
        words, merges = vocabulary
        vocab = words | {token: len(words) + i for i, token in enumerate(SPECIAL)}
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=list(merges), eos_token="<|im_end|>")
        added = ADDED + ADDED3 if kind == "qwen3" else ADDED
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
        ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<tool_call>", "</tool_call>")]
        assert ids == [151645, 151657, 151658]
        return tokenizer
    return build


def structured(env, episode):
    """The same conversation as Qwen's template wants it: calls as dictionaries, results with the role
    "tool"."""
    messages = env.task.opening(env.syntax)
    for span in episode.spans[1:]:
        if span.who == "model" and span.state == "call":
            calls = [json.loads(line) for line in span.text.splitlines() if line.startswith("{")]
            messages.append({"role": "assistant", "content": "",
                             "tool_calls": [{"type": "function", "function": call} for call in calls]})
        elif span.who == "model":
            messages.append({"role": "assistant", "content": span.text})
        elif span.who == "tool":
            for part in span.text.split("<tool_response>\n")[1:]:
                result = part.rstrip("\n").removesuffix("\n</tool_response>")
                messages.append({"role": "tool", "content": result})
        else:
            messages.append({"role": "user", "content": span.text})
    return messages


def test_a_conversation_is_what_qwen25s_own_template_makes_of_it(make):
    """Our ids, appended message by message, against the template's rendering of the whole conversation,
    encoded in one go."""
    tokenizer = make("qwen2.5", "qwen2_5")
    chat, compared = Chat(tokenizer), 0
    for task in [task for c in ("base", "miss_func", "miss_param") for task in make_tasks("train", c, 8)]:
        episode = play(chat, Env(task), truth_script(task, "A"), LIMITS)
        whole = tokenizer.apply_chat_template(structured(Env(task), episode), tokenize=False)
        assert episode.reward == 1 and chat.text(episode.ids) + "\n" == whole
        assert episode.ids == chat._encode(whole)[:-1]
        compared += len(episode.ids)
    assert compared > 5000


def test_qwen3_is_refused_with_its_own_template_and_right_with_ours(make):
    tokenizer = make("qwen3", "qwen3")
    with pytest.raises(UserError, match="rewrites earlier assistant messages .* qwen3-no-think"):
        Chat(tokenizer)
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    own = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True,
                                        enable_thinking=False)
    tokenizer.chat_template = rollout.TEMPLATES["qwen3-no-think"]
    chat = Chat(tokenizer)
    assert chat._render(talk) == own and chat.prompt(talk)[-4:] == NO_THINK
    task = make_tasks("train", "base", 1)[0]
    episode = play(chat, Env(task), truth_script(task, "A"), LIMITS)
    said = [span for span in episode.spans if span.who == "model"]
    assert all(episode.ids[s.start - 4:s.start] == NO_THINK for s in said)
    assert all(episode.mask[s.start - 1] == 0 and episode.ids[s.end - 1] == 151645 for s in said)


def test_qwen3_mismatch_hides_the_block_from_the_trained_ids(make):
    tokenizer = make("qwen3", "qwen3")
    tokenizer.chat_template = rollout.TEMPLATES["qwen3-think-mismatch"]
    chat, talk = Chat(tokenizer), [{"role": "user", "content": "Hi"}]
    assert chat.sampler_only == NO_THINK
    assert chat.prompt(talk) == [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198]
    talk += [{"role": "assistant", "content": "Hi"}]
    assert chat.prompt(talk)[9:] == [13048, 151645, 198, 151644, 77091, 198]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen2_5_training", "qwen3_instruct_2507"])
def test_templates_that_only_append_are_taken_as_they_are(make, template):
    assert Chat(make("qwen3", template)).end_id == 151645


@pytest.mark.parametrize("template, says", [("llama3", "cannot render .*'bos_token' is undefined"),
                                            ("gemma", "cannot render")])
def test_templates_that_cannot_be_rendered_say_so(make, template, says):
    with pytest.raises(UserError, match=says):
        Chat(make("qwen3", template))


@pytest.mark.parametrize("kind, template, config, model, flags", [
    ("qwen2.5", "qwen2_5", Qwen2Config, Qwen2ForCausalLM, []),
    ("qwen3", "qwen3", Qwen3Config, Qwen3ForCausalLM, ["--chat_template", "qwen3-no-think"])])
def test_training_with_the_real_tokenizer(make, folder, kind, template, config, model, flags):
    """Saved, loaded by AutoTokenizer, trained for a step with both losses, with the model's real number of
    output rows."""
    torch.manual_seed(0)
    model(config(vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
                 eos_token_id=151645, bos_token_id=None)).save_pretrained(folder / kind)
    make(kind, template).save_pretrained(folder / kind)
    args = [*RUN, "--model", kind, *flags, "--prompts", "2", "--group", "2", "--updates", "1",
            "--max_message_tokens", "8", "--max_total_tokens", "2048", "--signal", "sft",
            "--schedule", "synchronous", "--sft_batch", "2", "--steps", "1", "--reward", "random",
            "--eval_every", "-1"]
    assert train.cli([*args, "--out", f"runs/{kind}"]) == 0
    step, = [r for r in rows(f"runs/{kind}") if "phase" in r]
    assert step["gap"] < 1e-5 and step["skipped_updates"] == 0
    assert step["sft_loss"] == pytest.approx(11.9, abs=0.5)          # log 151,936
