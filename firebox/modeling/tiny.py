"""Make a tiny random model of the Qwen3 family, with a tokenizer trained on the spot.

Owns the sizes of that model, the text its tokenizer is trained on and its chat template. Does not know where models
are registered or what the model will be trained to do.

Invariant: the same seed writes the same bytes, and plain `transformers` loads the directory offline. The tokenizer
does not depend on the seed, so that all tiny models share one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3Config

_BPE_VOCAB: Final = 1254  # with the special tokens below 1280, a multiple of 64
_CORPUS_LINES: Final = 6000
_CONTEXT_LENGTH: Final = 4096

_CONTROL_TOKENS: Final = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Single tokens too, but part of what a model says: `skip_special_tokens` keeps them in the text.
_MARKUP_TOKENS: Final = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# The generation tags mark what the assistant itself emits, its stop token included.
_CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message.content + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_WORDS: Final = """
the of and to in is that it for was on are as with they be at one have this from or had by but what some we can out
other were all there when up use your how said an each she which do their time if will way about many then them write
would like so these her long make thing see him two has look more day could go come did number sound no most people my
over know water than call first who may down side been now find any new work part take get place made live where after
back little only round man year came show every good me give our under name very through just form sentence great
think say help low line differ turn cause much mean before move right boy old too same tell does set three want air
well also play small end put home read hand port large spell add even land here must big high such follow act why ask
men change went light kind off need house picture try us again animal point mother world near build self earth father
user assistant system question answer please reverse flip mirror invert swap around order digits letters list sum total
count table column row query value text database average minimum maximum greater less between equal model train token
reward
""".split()  # noqa: SIM905 - prose is easier to read and to extend than a list of quoted words
_TABLES: Final = "orders users products employees cities albums students flights matches".split()  # noqa: SIM905
_COLUMNS: Final = "id name price year country salary rating age date amount city status title".split()  # noqa: SIM905
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


def make_tiny(out_dir: Path, *, seed: int = 0) -> None:
    """Write a random Qwen3-style model of about 2.3 million float32 parameters, with its tokenizer, to `out_dir`.

    The directory is made when it is missing; files of the same names in it are replaced. Takes a few seconds on one
    core and needs no network.
    """
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one small file
    tokenizer = _train_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_config(tokenizer)).float()
    stop = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **stop)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=_CONTEXT_LENGTH,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's own normalizer and pre-tokenizer: every digit is a token of its own."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    family = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = family.normalizer, family.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_BPE_VOCAB, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_corpus(), trainer)
    learned = json.loads(bpe.to_str())["model"]

    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _MARKUP_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.model_max_length = _CONTEXT_LENGTH
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _corpus() -> Iterator[str]:
    """English-like, SQL-like, arithmetic and chat lines; frequent enough that each word and letter gets its token."""
    rng = random.Random(0)
    for _ in range(_CORPUS_LINES):
        words = rng.choices(_WORDS, k=8)
        yield " ".join(words).capitalize() + "."
        yield "\n".join(rng.choices(_WORDS, k=3))
        yield " ".join(rng.choices(_LETTERS, k=6))
        table, (one, two) = rng.choice(_TABLES), rng.sample(_COLUMNS, 2)
        yield f"SELECT {one}, COUNT({two}) FROM {table} WHERE {two} >= {rng.randrange(100)} GROUP BY {one};"
        yield f"{rng.randrange(100)} + {rng.randrange(100)} * ({rng.randrange(9)} - {rng.randrange(9)}) = ?"
