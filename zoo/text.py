"""The tokenizer and small CLIP text encoders of emoji64."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from zoo import data

MAX_LENGTH = 20
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format: the reference's, or trained on all prompts.

    Training breaks ties differently from machine to machine: it gave five names other tokens than the shipped one does.
    """
    if (data.OUT / "reference/tokenizer").is_dir():
        return CLIPTokenizer.from_pretrained(data.OUT / "reference/tokenizer")
    world = data.load()
    corpus = [data.prompt(name, colour) for name in world.names for colour in data.COLOURS]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        (" ".join(line.split()) for line in corpus),
        trainers.BpeTrainer(
            vocab_size=1200, special_tokens=[START, END], initial_alphabet=alphabet, end_of_word_suffix="</w>"
        ),
    )
    import json

    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    # CLIP marks word ends, not word starts: rebuild the vocabulary over words without the byte-level space.
    merges = [(a.lstrip("Ġ"), b.lstrip("Ġ")) for a, b in merges]
    merges = list(dict.fromkeys(m for m in merges if all(m)))
    vocab: dict[str, int] = {}
    for token in [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), START, END]:
        vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH, pad_token=END)


def encoder(width: int, vocabulary: int, end: int, start: int, projection: bool) -> CLIPTextModel:
    """A text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, projection_dim=width, hidden_act="gelu",
        bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
