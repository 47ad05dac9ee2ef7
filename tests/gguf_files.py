"""Small GGUF files with a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from vllm_models import decoder

from surgery.export import export

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 272


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of GPT-2's splits with chat marks, a mark that is plain text, and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("c", "a"), ("ca", "t")]
    words = [*MARKS, *alphabet, *(a + b for a, b in merges), "<think>"]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=MARKS[1], eos_token=MARKS[2], unk_token=MARKS[0], pad_token=MARKS[2]
    )
    made.add_tokens([AddedToken("<think>", normalized=False)])
    made.chat_template = TEMPLATE
    return made


def small(family: str = "Llama", **changes) -> PreTrainedModel:
    """Two layers with the vocabulary of `byte_tokenizer`."""
    return decoder(family, **{"vocab_size": VOCABULARY, "num_hidden_layers": 2, **changes})


def write_gguf(model: PreTrainedModel, folder: Path, tokenizer: bool = True) -> Path:
    """Save a model in `folder`/parent, export that, and put the GGUF alone into `folder`/only."""
    model.save_pretrained(folder / "parent")
    if tokenizer:
        byte_tokenizer().save_pretrained(folder / "parent")
    export(folder / "parent", folder / "written", to="gguf", overwrite=True)
    (folder / "only").mkdir(exist_ok=True)
    return (folder / "written" / "model.gguf").rename(folder / "only" / "model.gguf")
