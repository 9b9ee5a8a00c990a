"""Score 100 films for one user in a running Triton Inference Server: the model of samples/02_ranking, behind HTTP.

Needs tritonclient[http], and neither hstu-compile nor torch.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

Tensors = dict[str, NDArray[np.int32] | NDArray[np.int64]]


def request_of(user: int, asked_at: int) -> Tensors:
    """What a client sends: histories and candidates as they are, no padding, no offsets."""
    return {
        # The history, oldest event first: films, times in seconds, and ratings as action bits.
        "movie_id": np.array([50, 181, 172], np.int32),
        "action_timestamp": np.array([880_000_000, 880_000_040, 880_000_100], np.int64),
        "item_weights": np.array([16, 8, 16], np.int32),
        # The context: one value here.
        "user_id": np.array([user], np.int32),
        # The candidates, and when they are asked about.
        "item_movie_id": np.arange(1, 101, dtype=np.int32),
        "item_query_time": np.full(100, asked_at, np.int64),
        # Under which key the server may keep the history's keys and values; leave it out for no cache.
        "user_key": np.array([user], np.int64),
    }


def ask(client: InferenceServerClient, model: str, tensors: Tensors) -> tuple[NDArray[np.float32], str]:
    """Probabilities [100] of the model's first task, and what the cache did."""
    inputs = []
    for name, values in tensors.items():
        row = values[None]  # one request is one user: the first axis is 1
        tensor = InferInput(name, list(row.shape), np_to_triton_dtype(row.dtype))
        tensor.set_data_from_numpy(row)
        inputs.append(tensor)
    result = client.infer(model, inputs)
    return result.as_numpy("preds")[0, :, 0], result.as_numpy("cache")[0, 0].decode()


def wait_until_ready(client: InferenceServerClient, model: str, seconds: float) -> bool:
    """Whether the model serves before the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if client.is_model_ready(model):
                return True
        except OSError:  # nobody listens yet
            pass
        time.sleep(0.2)
    return False


def main() -> int:
    """Ask twice; the second answer comes from the cached history."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8000", help="host and port of the server")
    parser.add_argument("--model", default="ranking", help="name of the model in the repository")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for the server")
    arguments = parser.parse_args()
    client = InferenceServerClient(arguments.url)
    if not wait_until_ready(client, arguments.model, arguments.wait):
        print(f"no model {arguments.model} at {arguments.url} after {arguments.wait:.0f} s", file=sys.stderr)
        return 1
    for _ in range(2):
        started = time.perf_counter()
        preds, cache = ask(client, arguments.model, request_of(user=7, asked_at=880_000_160))
        milliseconds = (time.perf_counter() - started) * 1e3
        best = np.argsort(-preds)[:3] + 1
        shown = ", ".join(f"film {film} {preds[film - 1]:.3f}" for film in best)
        print(f"{milliseconds:6.1f} ms  history: {cache:4}  best: {shown}")
    try:
        ask(
            client,
            arguments.model,
            {**request_of(7, 880_000_160), "item_movie_id": np.arange(100_001, 100_101, dtype=np.int32)},
        )
    except InferenceServerException as error:
        print(f"films that do not exist: {error.message()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
