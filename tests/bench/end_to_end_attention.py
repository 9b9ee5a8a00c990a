"""The attention of the end-to-end benchmark's baselines: kernels of others as one operator of torch.

The operator hstu_bench::attention is opaque to torch.compile and AOTInductor, so that each runs the same kernels; it
has a fake, allocates its output and nothing else, and enqueues on the current stream. What computes it is a provider:

  meta_cutlass, nvidia_cutlass    shared libraries behind the C function that attention_peers.py describes
  meta_triton                     Meta's Triton kernels from a checkout, without TMA
  plain                           our eager reference, for tests without a GPU
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from attention_peers import (
    ELEMENTS,
    NOT_OFFERED,
    VERSION,
    NotOfferedError,
    PeerArguments,
    PeerLibrary,
    current_stream,
    meta_triton_module,
    multiprocessors,
)
from torch import Tensor

from hstu_compile.model.attention import AttentionAttrs, hstu_attention

META_CUTLASS, NVIDIA_CUTLASS, META_TRITON, PLAIN = "meta_cutlass", "nvidia_cutlass", "meta_triton", "plain"
_WORKSPACE_BYTES = 1024


class Provider(Protocol):
    """What computes the operator."""

    version: str

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        k_offsets: Tensor,
        num_targets: Tensor,
        max_q_len: int,
        max_k_len: int,
        alpha: float,
    ) -> Tensor:
        """See `attention`."""


_PROVIDERS: dict[str, Provider] = {}


@torch.library.custom_op("hstu_bench::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    num_targets: Tensor,
    max_q_len: int,
    max_k_len: int,
    alpha: float,
    provider: str,
) -> Tensor:
    """HSTU attention of ragged sequences whose last rows are candidates, divided by max_k_len.

    Args:
        q: [Lq, H, dqk], the last rows of each sequence.
        k: [Lk, H, dqk].
        v: [Lk, H, dv].
        q_offsets: [B + 1] int32.
        k_offsets: [B + 1] int32.
        num_targets: [B] int32 candidates of each.
        max_q_len: most queries of a sequence.
        max_k_len: most keys of a sequence.
        alpha: multiplies the products.
        provider: who computes it.

    Returns:
        [Lq, H, dv].
    """
    return _PROVIDERS[provider](q, k, v, q_offsets, k_offsets, num_targets, max_q_len, max_k_len, alpha)


@attention.register_fake
def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


class LibraryProvider:
    """Kernels of a shared library.

    Args:
        path: of the library.
        offers_queries: whether it takes fewer queries than keys together with candidates.
    """

    def __init__(self, path: Path, *, offers_queries: bool) -> None:
        self._library = PeerLibrary(path)
        self.version, self._offers_queries = self._library.version, offers_queries
        self._workspaces: dict[torch.device, Tensor] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        k_offsets: Tensor,
        num_targets: Tensor,
        max_q_len: int,
        max_k_len: int,
        alpha: float,
    ) -> Tensor:
        if q.shape[0] != k.shape[0] and not self._offers_queries:
            raise NotOfferedError("it has no candidates where queries and keys differ")
        if q.device not in self._workspaces:
            self._workspaces[q.device] = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
        # All rows asking is told by one address of both.
        asked = k_offsets if q.shape[0] == k.shape[0] else q_offsets
        arguments = PeerArguments(
            version=VERSION,
            element=ELEMENTS[q.dtype],
            is_dense=0,
            batch=k_offsets.shape[0] - 1,
            num_heads=q.shape[1],
            head_dim=q.shape[2],
            total_q=q.shape[0],
            total_k=k.shape[0],
            max_q_len=max_q_len,
            max_k_len=max_k_len,
            scaling_seq_len=max_k_len,
            bias_heads=0,
            num_sms=multiprocessors(q.device),
            alpha=alpha,
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            out=out.data_ptr(),
            q_offsets=asked.data_ptr(),
            k_offsets=k_offsets.data_ptr(),
            num_targets=num_targets.data_ptr(),
            bias=None,
            workspace=self._workspaces[q.device].data_ptr(),
            stream=current_stream(q.device),
        )
        status = self._library.forward(ctypes.byref(arguments))
        if status == NOT_OFFERED:
            raise NotOfferedError("the library has no kernel for it")
        if status:
            raise RuntimeError(f"the library failed with CUDA error {status}")
        return out


class TritonProvider:
    """Meta's Triton kernels, without TMA, which is hstu_mha's default.

    Args:
        repository: checkout of generative-recommenders.
    """

    def __init__(self, repository: Path) -> None:
        self._module = meta_triton_module(repository)
        commit = repository / "COMMIT"
        self.version = "generative-recommenders"
        if commit.is_file():
            self.version += f" {commit.read_text(encoding='utf-8')[:7]}"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        k_offsets: Tensor,
        num_targets: Tensor,
        max_q_len: int,
        max_k_len: int,
        alpha: float,
    ) -> Tensor:
        is_delta = q.shape[0] != k.shape[0]
        function = self._module.triton_cached_hstu_mha if is_delta else self._module.triton_hstu_mha
        out: Tensor = function(max_k_len, alpha, q, k, v, k_offsets, num_targets=num_targets, enable_tma=False)
        return out


class PlainProvider:
    """Our eager reference: reads lengths on the host."""

    version = "plain PyTorch"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        k_offsets: Tensor,
        num_targets: Tensor,
        max_q_len: int,
        max_k_len: int,
        alpha: float,
    ) -> Tensor:
        attrs = AttentionAttrs(alpha, float(max_k_len), max_q_len, max_k_len)
        out: Tensor = hstu_attention(q, k, v, q_offsets, k_offsets, attrs, num_targets=num_targets)
        return out


def provide(
    meta_library: Path | None, nvidia_library: Path | None, meta_repo: Path | None, *, plain: bool
) -> list[str]:
    """Load what was given, under the providers' names; returns those.

    Raises:
        OSError, AttributeError: a library cannot be loaded.
        FileNotFoundError: the checkout is none.
    """
    if meta_library is not None:
        _PROVIDERS[META_CUTLASS] = LibraryProvider(meta_library, offers_queries=False)
    if nvidia_library is not None:
        _PROVIDERS[NVIDIA_CUTLASS] = LibraryProvider(nvidia_library, offers_queries=True)
    if meta_repo is not None:
        _PROVIDERS[META_TRITON] = TritonProvider(meta_repo)
    if plain:
        _PROVIDERS[PLAIN] = PlainProvider()
    return list(_PROVIDERS)


def provider_of(name: str) -> Provider:
    """A provider that was loaded."""
    return _PROVIDERS[name]


def version_of(provider: str) -> str:
    """What a provider says it was built from."""
    return _PROVIDERS[provider].version


def ranked_providers(call: Callable[[str], Tensor], names: Sequence[str], repeats: int = 10) -> list[str]:
    """The providers that offer a call, the fastest on the device first.

    Args:
        call: the attention, by provider.
        names: of the providers.
        repeats: calls that are timed.
    """
    times: dict[str, float] = {}
    for name in names:
        try:
            device = call(name).device
            if device.type != "cuda":
                times[name] = 0.0
                continue
            torch.cuda.synchronize()
            samples = []
            for _ in range(repeats):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call(name)
                end.record()
                end.synchronize()
                samples.append(start.elapsed_time(end))
            times[name] = statistics.median(samples)
        except NotOfferedError:
            continue
    return sorted(times, key=lambda name: times[name])
