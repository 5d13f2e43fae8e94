"""The tiny model loads offline with plain transformers, is reproducible to the byte and chats like its family."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from firebox.modeling.tiny import make_tiny

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Reverse 4071"},
    {"role": "assistant", "content": "1704"},
]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path):
    return AutoTokenizer.from_pretrained(tiny_dir, local_files_only=True)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_loads_with_plain_transformers(tiny_dir: Path, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, local_files_only=True)
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert 2e6 < sum(weight.numel() for weight in model.parameters()) < 5e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]


def test_same_seed_same_bytes_even_in_another_process(tiny_dir: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib; from firebox.modeling.tiny import make_tiny; make_tiny(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "again"], check=True, env=environment, timeout=120)
    assert digests(tmp_path / "again") == digests(tiny_dir)


def test_another_seed_changes_the_weights_and_nothing_else(tiny_dir: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    make_tiny(tmp_path, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = digests(tmp_path), digests(tiny_dir)
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} == {"model.safetensors"}


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"])
def test_special_tokens_are_single_tokens(tokenizer, token: str) -> None:
    assert len(tokenizer.encode(f"x{token}y", add_special_tokens=False)) == 3
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(token)) == [token]


def test_control_tokens_are_skipped_and_markup_is_kept(tokenizer) -> None:
    ids = tokenizer.encode("<think>so</think> 42<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>so</think> 42"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_every_digit_and_every_spaced_letter_is_one_token(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("4071")) == list("4071")
    assert len(tokenizer.encode(" q w z")) == 3


@pytest.mark.parametrize("text", ["Ünïcode – 你好 🔥\n\ttabs", "SELECT a FROM b;", "don't  double  space", ""])
def test_text_survives_the_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_canonical_forms_of_one_character_are_the_same_tokens(tokenizer) -> None:
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_chat_template_marks_what_the_assistant_emits(tokenizer) -> None:
    chat = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    emitted = [i for i, mine in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(emitted) == "1704<|im_end|>"
    assert tokenizer.decode(chat["input_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nReverse 4071<|im_end|>\n"
        "<|im_start|>assistant\n1704<|im_end|>\n"
    )


def test_generation_prompt_is_the_prefix_of_the_answered_chat(tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert whole[: len(prompt)] == prompt


def test_import_loads_no_heavy_library() -> None:
    code = "import sys, firebox.modeling.tiny; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
