"""A server that answers completions as vLLM's does, with tokens of no model: `max_tokens` events, then the usage. What it was asked is
appended to the file that REQUESTS names, a line of JSON each. Like vLLM's it takes `--port` among other options."""

import asyncio
import json
import os
import sys
from pathlib import Path


async def answer(reader, writer):
    while line := await reader.readline():
        path, length = line.split()[1].decode(), 0
        while (header := await reader.readline()) not in (b"\r\n", b""):
            name, _, value = header.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        body = await reader.readexactly(length)
        if path == "/v1/completions":
            await complete(json.loads(body), writer)
        else:
            found = json.dumps({"version": "1.2.3"}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(found), found))
        await writer.drain()
    writer.close()


async def complete(asked, writer):
    if "REQUESTS" in os.environ:
        with Path(os.environ["REQUESTS"]).open("a") as file:
            file.write(json.dumps({**asked, "arguments": sys.argv}) + "\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for n in range(asked["max_tokens"]):
        choice = {"index": 0, "text": "t3 ", "logprobs": None, "finish_reason": None, "stop_reason": None}
        if asked.get("return_token_ids"):
            choice["token_ids"] = [n % 5]
        write_event(writer, {"id": "cmpl-0", "object": "text_completion", "choices": [choice], "usage": None})
        await writer.drain()
        await asyncio.sleep(0)
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
    write_event(writer, {"id": "cmpl-0", "object": "text_completion", "choices": [], "usage": usage})
    for part in (b"data: [DONE]\n\n", b""):
        writer.write(b"%x\r\n%s\r\n" % (len(part), part))


def write_event(writer, event):
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
