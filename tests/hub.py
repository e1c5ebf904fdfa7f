"""A Hugging Face Hub on this machine, as far as its library needs one here."""

import base64
import hashlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for files of repositories, and takes new ones with a token."""

    token = "hf_secret"

    def __init__(self, files, private, *args):
        self.files, self.private = files, private
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            name = self.path.removeprefix("/api/models/")
            if name not in self.private:
                self._answer(404, {"error": "not found"}, "RepoNotFound")
                return
            self._answer(200, {"id": name, "private": self.private[name]})
            return
        content = self.files.get(self.path)
        if content is None:
            self._answer(404, {}, "EntryNotFound")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self._answer(401, {"error": f"{self.headers.get('Authorization')} is not valid"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
            status = 409 if name in self.private else 200
            self.private.setdefault(name, is_private)
            self._answer(status, {"url": f"http://{self.headers['Host']}/{name}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                for x in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"/{name}/resolve/main/{line['value']['path']}"] = content
            url = f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}"
            self._answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        else:  # the check of a model card
            self._answer(200, {"errors": [], "warnings": []})

    def _answer(self, status, content, code=""):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def serve_hub(library, cache, monkeypatch):
    """Have the library ask a local Hub. Gives its files, and which repositories are private."""
    files, private = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, files, private))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    download = partial(library.hf_hub_download, endpoint=endpoint, cache_dir=cache)
    monkeypatch.setattr(library, "hf_hub_download", download)
    monkeypatch.setattr(library, "HfApi", partial(library.HfApi, endpoint=endpoint))
    yield files, private
    server.shutdown()
    server.server_close()
