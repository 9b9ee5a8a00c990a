"""What the attention benchmark runs: for a backend and a case, the functions that enqueue one forward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention_grid import CUDNN, DENSE_RAB, EAGER, META_TRITON, NUM_HEADS, OURS, OURS_ACCURATE, SOFTMAX, why_not
from attention_peers import NotOfferedError, PeerLibrary, dense_bias, meta_triton_caller, meta_triton_module
from attention_reference import Inputs
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Form:
    """One way in which a backend computes a case.

    Attributes:
        name: tells it from the backend's other ways; empty where there is one.
        run: enqueue one forward, without waiting; what it returns is kept alive by the caller alone.
        rows: what `run` returned, as [Lq, H, D].
    """

    name: str
    run: Callable[[], Tensor]
    rows: Callable[[Tensor], Tensor] = lambda output: output


class Backends:
    """Everything that is loaded once: libraries, modules and their versions.

    Args:
        libraries: shared library by backend, of those that come as one.
        meta_repo: checkout of Meta's generative-recommenders, or None.
    """

    def __init__(self, libraries: dict[str, Path], meta_repo: Path | None) -> None:
        self._paths, self._meta_repo = libraries, meta_repo
        self._loaded: dict[str, PeerLibrary] = {}
        self._meta: Any = None

    def forms(self, backend: str, inputs: Inputs) -> list[Form]:
        """Every form of a backend that a case can have, of which the fastest counts.

        Raises:
            NotOfferedError: there is none; why.
        """
        if reason := why_not(backend, inputs.case):
            raise NotOfferedError(reason)
        if backend in SOFTMAX:
            return [_softmax(backend, inputs)]
        if backend in META_TRITON:
            return [Form("", meta_triton_caller(self._meta_module(), inputs, has_tma=backend == META_TRITON[1]))]
        if backend == EAGER:
            return [_eager(inputs)]
        if backend in (OURS, OURS_ACCURATE):
            return [_ours(inputs, "accurate" if backend == OURS_ACCURATE else "fast")]
        if backend == "ours_triton":
            return [_ours_triton(inputs)]
        library = self._library(backend)
        if backend == DENSE_RAB:
            return [Form("", library.caller(inputs, is_dense=False, bias=dense_bias(inputs)))]
        forms = [Form("jagged", library.caller(inputs, is_dense=False))]
        if inputs.case.is_dense and not inputs.case.targets:
            forms.append(Form("dense", library.caller(inputs, is_dense=True)))
        return forms

    def versions(self, backend: str) -> str:
        """What ran; of a library what it says itself, of Meta's Triton kernels their commit."""
        parts = [f"torch {torch.__version__}"]
        if backend in ("ours_triton", *META_TRITON):
            import triton

            parts.append(f"triton {triton.__version__}")
        if backend in self._loaded:
            parts.append(self._loaded[backend].version)
        if backend in META_TRITON and self._meta_repo is not None and (self._meta_repo / "COMMIT").is_file():
            commit = (self._meta_repo / "COMMIT").read_text(encoding="utf-8").strip()
            parts.append(f"generative-recommenders {commit[:7]}")
        if backend == CUDNN:
            parts.append(f"cuDNN {torch.backends.cudnn.version()}")
        return ", ".join(parts)

    def _library(self, backend: str) -> PeerLibrary:
        if backend not in self._loaded:
            if backend not in self._paths:
                raise NotOfferedError("no library was given")
            self._loaded[backend] = PeerLibrary(self._paths[backend])
        return self._loaded[backend]

    def _meta_module(self) -> Any:
        if self._meta is None:
            if self._meta_repo is None:
                raise NotOfferedError("no checkout of generative-recommenders was given")
            self._meta = meta_triton_module(self._meta_repo)
        return self._meta


def _ours(inputs: Inputs, silu: str) -> Form:
    from hstu_compile.plugins.kernels.hopper.launch import hstu_attention_hopper

    return Form("", _operator(functools.partial(hstu_attention_hopper, silu=silu), inputs))


def _ours_triton(inputs: Inputs) -> Form:
    from hstu_compile.plugins.kernels.launch import hstu_attention_triton

    return Form("", _operator(hstu_attention_triton, inputs))


def _operator(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Tensor]:
    case, keywords = inputs.case, inputs.keywords()
    arguments = (inputs.q, inputs.k, inputs.v, inputs.q_offsets, inputs.k_offsets)
    return lambda: function(*arguments, **keywords, alpha=case.alpha, scaling_seq_len=float(case.max_len))


def _eager(inputs: Inputs) -> Form:
    from hstu_compile.model.attention import AttentionAttrs, hstu_attention

    case, keywords = inputs.case, inputs.keywords()
    attrs = AttentionAttrs(case.alpha, float(case.max_len), max(case.query_lengths), case.max_len)
    arguments = (inputs.q, inputs.k, inputs.v, inputs.q_offsets, inputs.k_offsets)
    return Form("", lambda: hstu_attention(*arguments, attrs=attrs, **keywords))


def _softmax(backend: str, inputs: Inputs) -> Form:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    case = inputs.case
    kernel = SDPBackend.CUDNN_ATTENTION if backend == CUDNN else SDPBackend.FLASH_ATTENTION
    shape = (len(case.lengths), case.max_len, NUM_HEADS, case.dim)
    q, k, v = (tensor.view(shape).transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))

    def run() -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.alpha)

    return Form("", run, lambda output: output.transpose(1, 2).reshape(-1, NUM_HEADS, case.dim))
