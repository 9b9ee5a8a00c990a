"""Requests to a tritonserver on loopback over the standard library: the machine that serves may lack tritonclient."""

from __future__ import annotations

import dataclasses
import http.client
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.triton.raw_http import HEADER_LENGTH, binary_request, encoded

Arrays = dict[str, NDArray[Any]]

#: Of one request: far longer than any takes, so that a server that hangs is a failure with a name.
SECONDS = 20.0
_DTYPES = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An answer without outputs.

    Attributes:
        status: of HTTP.
        message: the server's or the model's.
    """

    status: int
    message: str


@dataclasses.dataclass(frozen=True)
class Body:
    """A request as it is sent, made once."""

    content: bytes
    headers: Mapping[str, str]


def body_of(sample: Mapping[str, NDArray[Any]], users: int = 1) -> Body:
    """A request in Triton's binary form.

    Args:
        sample: input name to array, without the batch axis.
        users: how often the sample is in it; the models take one user.
    """
    head, tail = binary_request({name: np.stack([array] * users) for name, array in sample.items()})
    for entry in head["inputs"]:
        # What binary_request puts in front of every shape is the axis of the batch.
        entry["shape"] = entry["shape"][1:]
    return Body(*encoded(head, tail))


class Client:
    """One kept connection; nothing is sent twice, so that a lost answer is seen.

    Args:
        port: of the server's HTTP service.
    """

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)

    def ask(self, model: str, body: Body) -> Arrays | Refusal:
        """The outputs by name, texts as objects; or the refusal.

        Raises:
            OSError: if the connection breaks.
            http.client.HTTPException: likewise.
        """
        self._connection.request("POST", f"/v2/models/{model}/infer", body.content, dict(body.headers))
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != http.client.OK:
            return Refusal(answer.status, _message(content))
        return outputs_of(content, int(answer.headers.get(HEADER_LENGTH, len(content))))

    def get(self, path: str) -> Any:
        """JSON of a path below /v2; None for an answer without a body.

        Raises:
            RuntimeError: for a status other than 200.
        """
        self._connection.request("GET", f"/v2{path}")
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != http.client.OK:
            raise RuntimeError(f"GET /v2{path}: {answer.status} {content[:300]!r}")
        return json.loads(content) if content else None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def outputs_of(content: bytes, header_length: int) -> Arrays:
    """Arrays of an answer in binary form; a text is a bytes object in an array."""
    tail, found = content[header_length:], {}
    for entry in json.loads(content[:header_length])["outputs"]:
        size = entry["parameters"]["binary_data_size"]
        part, tail = tail[:size], tail[size:]
        if entry["datatype"] == "BYTES":
            found[entry["name"]] = np.array(_texts(part), np.object_).reshape(entry["shape"])
        else:
            found[entry["name"]] = np.frombuffer(part, _DTYPES[entry["datatype"]]).reshape(entry["shape"])
    if tail:
        raise ValueError(f"{len(tail)} bytes of the answer belong to no output")
    return found


def statistics(client: Client, model: str) -> dict[str, int]:
    """The server's own counts since the model was loaded."""
    (stats,) = client.get(f"/models/{model}/stats")["model_stats"]
    counted = stats["inference_stats"]
    return {
        "requests": int(stats["inference_count"]),
        "passes": int(stats["execution_count"]),
        "successes": int(counted["success"]["count"]),
        "failures": int(counted["fail"]["count"]),
    }


def _texts(part: bytes) -> list[bytes]:
    found = []
    while part:
        (size,) = struct.unpack_from("<I", part)
        found.append(part[4 : 4 + size])
        part = part[4 + size :]
    return found


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content[:500].decode(errors="replace")
