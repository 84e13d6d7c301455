"""middleware: between the HTTP server and vLLM: a request that names the bare base's model is marked so. Knows ASGI,
nothing of vLLM.
"""

from __future__ import annotations

import json

from adafuse.integrations.vllm.names import BARE, SALTS

MARKED = ("/v1/completions", "/v1/chat/completions")  # whose requests can say what the base alone is to answer
ALIKE = ("/tokenize", "/detokenize")  # the same for both models


class ModelNames:
    """An ASGI middleware, for vLLM's `--middleware`. The server's first model name is the adapted model, the second
    the bare base.

    A completion of the base gets the mark that `requests.Requests` looks for. The cache salts of both are kept apart,
    whatever clients send and wherever, so that neither reads what the other has cached. Everything else passes as it
    came.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = await _whole(receive)
        if body is None:  # the client is gone
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        refusal, body = rewrite(path, body, _bare_name(scope))
        if refusal:
            await _refuse(send, refusal)
            return
        await self.app(_with_length(scope, len(body)), _Replay(body, receive), send)


def rewrite(path: str, body: bytes, bare_name: str | None) -> tuple[str | None, bytes]:
    """(a refusal or None, the body as vLLM is to see it) of a POST to `path`."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None, body  # not ours to complain about
    if not isinstance(request, dict):
        return None, body
    bare = bare_name is not None and request.get("model") == bare_name
    if path not in MARKED:
        text = json.dumps(request)
        if (bare and path not in ALIKE) or f'"{BARE}"' in text:
            return f"the base without adapter answers at {' and '.join(MARKED)} only", body
        return None, json.dumps(_salted(request)).encode() if '"cache_salt"' in text else body
    if bare and request.get("use_beam_search"):
        # vLLM makes requests of its own for the beams, and these lose the mark.
        return "the base without adapter answers no beam searches", body
    extra = request.get("vllm_xargs")
    if isinstance(extra, dict):
        extra = {key: value for key, value in extra.items() if key != BARE}
    if bare and (extra is None or isinstance(extra, dict)):
        extra = {**(extra or {}), BARE: 1}
    if extra is not None:
        request["vllm_xargs"] = extra
    salt = request.get("cache_salt")
    if isinstance(salt, str) and salt:
        request["cache_salt"] = SALTS[bare] + salt
    elif bare and salt is None:
        request["cache_salt"] = SALTS[bare]
    return None, json.dumps(request).encode()


def _salted(value):
    """With the adapted model's prefix in front of every cache salt, however deep."""
    if isinstance(value, list):
        return [_salted(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: SALTS[False] + each if key == "cache_salt" and isinstance(each, str) and each else _salted(each)
        for key, each in value.items()
    }


def _bare_name(scope):
    names = getattr(scope["app"].state.args, "served_model_name", None) or []
    return names[1] if len(names) > 1 else None


async def _whole(receive):
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _with_length(scope, length):
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name.lower() not in (b"content-length", b"transfer-encoding")
    ]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


class _Replay:
    """`receive` that hands out a body once, then what the client sends (that it has hung up)."""

    def __init__(self, body, receive):
        self._body, self._receive = body, receive

    async def __call__(self):
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _refuse(send, message):
    error = {"error": {"message": message, "type": "BadRequestError", "param": "model", "code": 400}}
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
