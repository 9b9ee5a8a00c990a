"""Requests to a real server over both protocols."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from hstu_compile.serving.samples import Sample
from hstu_compile.serving.tensors import DATATYPES
from tests.triton.server import TritonServer, grpc_client, http_client

Protocol = Literal["http", "grpc"]
PROTOCOLS: tuple[Protocol, ...] = ("http", "grpc")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request as tritonclient takes it, made once and sent any number of times.

    Attributes:
        inputs: of the protocol's own class.
    """

    inputs: list[Any]


def prepared(protocol: Protocol, sample: Mapping[str, Any]) -> Prepared:
    """A request of one user, whose arrays get the batch axis."""
    if protocol == "http":
        from tritonclient.http import InferInput
    else:
        from tritonclient.grpc import InferInput
    inputs = []
    for name, array in sample.items():
        row = np.ascontiguousarray(array)[None]
        tensor = InferInput(name, list(row.shape), DATATYPES[str(row.dtype)])
        tensor.set_data_from_numpy(row)
        inputs.append(tensor)
    return Prepared(inputs)


def send(client: Any, protocol: Protocol, model: str, request: Prepared, **options: Any) -> dict[str, Any]:
    """One request; the outputs as arrays.

    Raises:
        tritonclient.utils.InferenceServerException: with the server's message.
    """
    result = client.infer(model, request.inputs, **options)
    response = result.get_response()
    outputs = response["outputs"] if protocol == "http" else response.outputs
    names = [each["name"] if protocol == "http" else each.name for each in outputs]
    return {name: result.as_numpy(name) for name in names}


def ask(client: Any, protocol: Protocol, model: str, sample: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """`send` of a request that is prepared now."""
    return send(client, protocol, model, prepared(protocol, sample), **options)


def ask_all(
    server: TritonServer, protocol: Protocol, model: str, samples: list[Sample], threads: int = 8
) -> list[dict[str, Any] | Exception]:
    """All requests from several threads at once; for each its outputs, or what was raised."""
    from tritonclient.utils import InferenceServerException

    opened = http_client if protocol == "http" else grpc_client
    # All are connected before anyone asks: otherwise the first thread may be done when the last one begins.
    together = threading.Barrier(threads, timeout=60)

    def one_thread(mine: list[int]) -> list[tuple[int, dict[str, Any] | Exception]]:
        answers: list[tuple[int, dict[str, Any] | Exception]] = []
        with opened(server) as client:
            client.is_server_live()
            together.wait()
            for index in mine:
                try:
                    answers.append((index, ask(client, protocol, model, samples[index])))
                except InferenceServerException as error:
                    answers.append((index, error))
        return answers

    shares = [list(range(start, len(samples), threads)) for start in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        found = dict(answer for answers in pool.map(one_thread, shares) for answer in answers)
    return [found[index] for index in range(len(samples))]
