#!/usr/bin/env bash
# gguf 0.19.0 (gguf-py): the vocabulary of a SentencePiece model with chat tokens.
#
# Guess: `gguf.SentencePieceVocab(folder)`, which llama.cpp's converter builds GGUF vocabularies from, gives the tokens that
#   the tokenizer in that folder has: the pieces of `tokenizer.model`, and those that were added to it.
# Behaviour: it reads added tokens from `added_tokens.json` alone, a file that many model repositories lack. Those that
#   `tokenizer.json` and `tokenizer_config.json` name are not there, and nothing says so: a writer that fills up to the
#   embeddings puts [PAD..] in the place of <|user|>, and llama.cpp splits the marker into letters.
# Seen: 64 pieces and 2 chat tokens in both JSON files give 64 tokens; with `added_tokens.json` as well, 66.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q gguf==0.19.0 sentencepiece==0.2.1
"$dir/venv/bin/python" - "$dir" <<'PY'
import json, pathlib, sys
import gguf, sentencepiece

folder = pathlib.Path(sys.argv[1]) / "tokenizer"
folder.mkdir()
(folder / "corpus.txt").write_text("\n".join(" ".join(f"w{i} cat dog sleeps" for i in range(100)) for _ in range(20)))
sentencepiece.SentencePieceTrainer.train(
    input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=64, model_type="bpe",
    bos_id=1, eos_id=2, unk_id=0, pad_id=-1, minloglevel=2,
)
chat = {64: "<|user|>", 65: "<|end|>"}
added = [{"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": False} for i, text in chat.items()]
(folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": {}}))
(folder / "tokenizer_config.json").write_text(json.dumps(
    {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {str(t["id"]): t for t in added}}))
without = [bytes(text).decode() for text, _, _ in gguf.SentencePieceVocab(folder).all_tokens()]
(folder / "added_tokens.json").write_text(json.dumps({text: i for i, text in chat.items()}))
beside = [bytes(text).decode() for text, _, _ in gguf.SentencePieceVocab(folder).all_tokens()]
print(f"named in tokenizer.json and tokenizer_config.json: {len(without)} tokens, <|user|> among them: {'<|user|>' in without}")
print(f"and in added_tokens.json: {len(beside)} tokens, <|user|> among them: {'<|user|>' in beside}")
sys.exit((len(without), "<|user|>" in without, len(beside), "<|user|>" in beside) != (64, False, 66, True))
PY
echo "as described: tokens that added_tokens.json does not name are lost without a word"
