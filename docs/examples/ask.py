"""Ask a model in a folder, with stock transformers alone.

    python docs/examples/ask.py FOLDER "What is the capital of France?"

FOLDER is what `surgery export --to hub` wrote, or any other model that transformers loads. It needs no
surgery.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, question: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        asked = tokenizer(question, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=40, do_sample=False)[0, asked["input_ids"].shape[1] :]
    print(tokenizer.decode(answer, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
