"""Requests that no client library would send: bytes on a connection to a real server."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from hstu_compile.serving.tensors import DATATYPES
from tests.triton.server import TritonServer

HEADER_LENGTH = "Inference-Header-Content-Length"
SECONDS = 20.0


def binary_request(sample: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A request of one user in Triton's binary form: its JSON part, and the tensors' bytes behind it."""
    inputs, tail = [], b""
    for name, array in sample.items():
        content = np.ascontiguousarray(array).tobytes()
        datatype = DATATYPES[str(array.dtype)]
        entry = {"name": name, "shape": [1, *array.shape], "datatype": datatype}
        inputs.append({**entry, "parameters": {"binary_data_size": len(content)}})
        tail += content
    return {"inputs": inputs, "parameters": {"binary_data_output": True}}, tail


def encoded(head: Any, tail: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers."""
    text = json.dumps(head).encode()
    return text + tail, {HEADER_LENGTH: str(len(text))}


def outputs_of(body: bytes, header_length: int) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of an answer in binary form; texts are left out."""
    head, tail, found = json.loads(body[:header_length]), body[header_length:], {}
    dtypes = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}
    for entry in head["outputs"]:
        size = entry["parameters"]["binary_data_size"]
        if entry["datatype"] in dtypes:
            found[entry["name"]] = np.frombuffer(tail[:size], dtypes[entry["datatype"]]).reshape(entry["shape"])
        tail = tail[size:]
    assert not tail
    return found


def json_outputs(body: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of an answer that is JSON alone: a request whose wish for binary outputs was damaged gets it."""
    return {entry["name"]: np.array(entry["data"]) for entry in json.loads(body)["outputs"]}


class RawHttp:
    """One kept connection that posts anything; it is opened again if the server closes it.

    Args:
        server: running.
    """

    def __init__(self, server: TritonServer) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=SECONDS)

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes, int]:
        """Status, body, and the length of the JSON in front of binary outputs (0 without)."""
        for attempt in range(2):
            try:
                self._connection.request("POST", path, body, dict(headers))
                answer = self._connection.getresponse()
                return answer.status, answer.read(), int(answer.headers.get(HEADER_LENGTH, "0"))
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                # A server may close a connection after an answer; a new one must be answered.
                self._connection.close()
                if attempt:
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def cut_off(server: TritonServer, path: str, body: bytes, headers: Mapping[str, str], sent: int, reset: bool) -> None:
    """Send the first bytes of a request that promises more, and go away.

    Args:
        server: running.
        path: of the request.
        body: of which `sent` bytes are sent.
        headers: of the request.
        sent: how many.
        reset: end the connection with a reset, as a client that crashes does; else close it.
    """
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=SECONDS) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[:sent])
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
