"""A small Hugging Face hub on this machine, for one model.

The library of the hub reads its address when it is imported, so programs that use
this one run in processes of their own.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from typing import Any

REVISION = "v1"
_COMMIT = "c" * 40


def _tag(content):
  return hashlib.sha1(content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
  """Answers as the hub does."""

  server: Any  # a Server
  protocol_version = "HTTP/1.1"

  def _send(self, content, status=200, **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _json(self, value, status=200):
    self._send(
      json.dumps(value).encode(), status, Content_Type="application/json"
    )

  def do_GET(self):
    path = self.path.partition("?")[0]
    if path == f"/api/models/lab/net/revision/{REVISION}":
      return self._json({"id": "lab/net", "sha": _COMMIT})
    if path == f"/api/models/lab/net/tree/{_COMMIT}":
      rows = [
        {"type": "file", "path": name, "size": len(x), "oid": _tag(x)}
        for name, x in self.server.files.items()
      ]
      return self._json(rows)
    content = self.server.files.get(path.rpartition("/")[2])
    if path.startswith("/lab/net/resolve/") and content is not None:
      tag = f'"{_tag(content)}"'
      return self._send(content, ETag=tag, X_Repo_Commit=_COMMIT)
    self._send(b"", 404)

  do_HEAD = do_GET

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    if self.path == "/api/repos/create":
      return self._json({"url": "https://huggingface.co/lab/net"})
    if self.path.endswith("/preupload/main"):
      names = [file["path"] for file in json.loads(body)["files"]]
      rows = [
        {"path": x, "uploadMode": "regular", "shouldIgnore": False}
        for x in names
      ]
      return self._json({"files": rows})
    if self.path == "/api/validate-yaml":
      return self._json({"errors": [], "warnings": []})
    if self.path.partition("?")[0].endswith("/commit/main"):
      for line in body.splitlines():
        row = json.loads(line)
        if row["key"] == "file":
          content = base64.b64decode(row["value"]["content"])
          self.server.pushed[row["value"]["path"]] = content
      url = "https://huggingface.co/lab/net/commit/" + _COMMIT
      return self._json({"commitUrl": url, "commitOid": _COMMIT})
    return self._send(b"", 404)

  def log_message(self, format, *args):
    pass


class Server(http.server.ThreadingHTTPServer):
  """The server: `files` of one revision, and what was `pushed`."""

  def __init__(self, files):
    super().__init__(("127.0.0.1", 0), Hub)
    self.files, self.pushed = files, {}


@contextlib.contextmanager
def served(files):
  """Yields a server of {name: content}, with what it was sent."""
  server = Server(files)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def run(server, home, program, **environment):
  """Runs a Python program that finds the server as the hub."""
  address = f"http://127.0.0.1:{server.server_address[1]}"
  keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
  settings = {"HF_ENDPOINT": address, "HF_HOME": str(home)}
  settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
  return subprocess.run(
    [sys.executable, "-c", program],
    cwd=home,
    env={**keep, **settings, **environment},
    capture_output=True,
    text=True,
    timeout=120,
  )
