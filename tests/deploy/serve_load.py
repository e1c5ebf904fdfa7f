"""Many clients at once, on this machine: is each answer there, the right one, and memory flat?

A bounded load test: `python tests/deploy/serve_load.py MODEL` starts `freeanchor serve MODEL` on a
free port, sends 50 x 20 pictures and prints what it found.
"""

import argparse
import http.client
import io
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image


def make_picture(seed, side=64):
    """A PNG of smooth noise whose size and content are the client's own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    size = side + seed % 13, side + seed % 7
    Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(content, "PNG")
    return content.getvalue()


def ask(port, method, path, body=None, headers=(), seconds=120):
    """Status, headers and content of an answer of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def detect(port, picture, tries=200):
    """The answer to a picture, and how often it was asked again because the queue was full."""
    for again in range(tries):
        status, headers, content = ask(
            port, "POST", "/api/detect", picture, {"Content-Type": "image/png"}
        )
        if status != 503:
            assert status == 200, content
            return json.loads(content), again
        time.sleep(min(1.0, float(headers["Retry-After"])))
    raise AssertionError("the queue was full all the time")


def memory(port):
    """Resident bytes of the server, as it says itself."""
    text = ask(port, "GET", "/metrics")[2].decode()
    return float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1])


def load(port, clients, requests):
    """Have clients send their own picture again and again, all at once.

    Returns:
        The number of answers, of repetitions because the queue was full, and bytes of memory after
        a quarter of the answers and at the end.
    """
    pictures = [make_picture(seed) for seed in range(clients)]
    expected = [detect(port, picture)[0] for picture in pictures]
    answers, repeated, memories = 0, 0, []

    def client(i):
        again = 0
        for _ in range(requests // 4 or 1):
            answer, times = detect(port, pictures[i])
            assert answer == expected[i], f"client {i} got the answer of another one"
            again += times
        return again

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(4 if requests >= 4 else requests):
            repeated += sum(pool.map(client, range(clients)))
            answers += clients * (requests // 4 or 1)
            memories.append(memory(port))
    return answers, repeated, memories[0], memories[-1]


def main():
    """Start a server, and print what the load did to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=20, help="of each client")
    args = parser.parse_args()
    command = [sys.executable, "-m", "freeanchor", "serve", args.model, "--port", "0"]
    with subprocess.Popen([*command, "--rate", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(re.search(r":(\d+)/", server.stdout.readline())[1])
            for _ in range(120):  # until the model is loaded
                try:
                    ask(port, "GET", "/health", seconds=5)
                    break
                except OSError:
                    time.sleep(1)
            start = time.monotonic()
            answers, repeated, before, after = load(port, args.clients, args.requests)
            seconds = time.monotonic() - start
        finally:
            server.terminate()
    print(
        f"{answers} answers to {args.clients} clients in {seconds:.0f} s, none lost or mixed up; "
        f"{repeated} repetitions after 503; memory {before / 1e6:.0f} MB after a quarter, "
        f"{after / 1e6:.0f} MB at the end"
    )


if __name__ == "__main__":
    main()
