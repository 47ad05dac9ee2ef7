#!/usr/bin/env bash
# huggingface_hub 2.4.0: files that are added to a commit by name, in a repository whose `.gitignore` names them.
#
# Guess: `.gitignore` says what `upload_folder` should not pick up, as `git add .` does. A file that is added by name
#   (`CommitOperationAdd`, `upload_file`) is committed, as `git add -f` would, or the call says that it is not: git
#   refuses such a path by an error. Weights under `*.bin` or `*.safetensors` in some early `.gitignore` are at stake.
# Behaviour: the server answers for each file whether the repository's `.gitignore` names it, and the client leaves such
#   files out, large ones before they are uploaded. The commit is made with what is left, a CommitInfo comes back, and
#   neither a warning nor a field of it tells; one line of level INFO gives their number, which is below the default.
#   An answer with nothing left still makes a commit, of no file.
# Seen: two files added; the commit that the server got holds `config.json` alone; warnings 0, output of the default log
#   level empty. `upload_file("model.bin")`: returns the commit's address, and the commit holds no file.
# The server here answers as the Hub's `preupload` and `commit` do, and decides by one pattern.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q huggingface_hub==2.4.0
HF_HUB_DISABLE_XET=1 HF_HOME="$dir/home" "$dir/venv/bin/python" - <<'PY'
import contextlib
import io
import json
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

commits = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": f["path"].endswith(".bin")}
                for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            commits.append([line["value"]["path"] for line in lines if line["key"] == "file"])
            url = f"http://127.0.0.1:{self.server.server_port}/me/model/commit/{'0' * 40}"
            answer = {"commitUrl": url, "commitOid": "0" * 40}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()

from huggingface_hub import CommitOperationAdd, HfApi

api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_example")
said = io.StringIO()
with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(said):
    warnings.simplefilter("always")
    both = api.create_commit(
        "me/model",
        [CommitOperationAdd("config.json", b"{}"), CommitOperationAdd("model.bin", b"weights")],
        commit_message="both",
    )
    alone = api.upload_file(path_or_fileobj=b"weights", path_in_repo="model.bin", repo_id="me/model")
print("commits:", commits)
print("returned:", type(both).__name__, both.oid[:8], "|", type(alone).__name__, alone.oid[:8])
print("warnings:", len(caught), "| said:", repr(said.getvalue()))
sys.exit(not (commits == [["config.json"], []] and both.oid and alone.oid and not caught and not said.getvalue().strip()))
PY
echo "as described: files that .gitignore names are left out, and nothing is said"
