"""Programs that run apart from `surgery`: in copies of one process that has imported torch and transformers already.

Importing these takes ten seconds of processor time, more than most programs that tests run. The process knows nothing
of `surgery`; it is copied (fork) for each program, so that none sees what another one did.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any


def run(
    command: list[Any], *, check: bool = False, cwd: Any = None, env: dict[str, str] | None = None, **_: Any
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text, for `[python, "-c", code, ...]` and `[python, "-P", script, ...]`."""
    words = [str(word) for word in command]
    assert words[0] == sys.executable and words[1] in ("-c", "-P"), words
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in ("stdout", "stderr")]
        request = {
            "words": words[1:],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "files": list(map(str, files)),
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        done = subprocess.CompletedProcess(
            command, int(server.stdout.readline()), *(file.read_text() for file in files)
        )
    if check:
        done.check_returncode()
    return done


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def _program(words: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Become that program, up to the end of this process."""
    for descriptor, file in enumerate((os.devnull, *files)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        if modules := env.get("HF_MODULES_CACHE"):  # which transformers has read already
            for name in ("transformers.utils.hub", "transformers.dynamic_module_utils"):
                vars(sys.modules[name])["HF_MODULES_CACHE"] = modules
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        if words[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *words[2:]], [""]
            text = words[1]
        else:
            sys.argv, text = words[1:], Path(words[1]).read_text()
            main.__file__ = words[1]
        exec(compile(text, main.__dict__.get("__file__", "<string>"), "exec"), vars(main))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    import safetensors.torch
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert torch and safetensors and AutoModelForCausalLM and AutoTokenizer and "surgery" not in sys.modules
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _program(**json.loads(line))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
