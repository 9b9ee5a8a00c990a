"""Every way in which hstu-compile refuses work. Level 0, standard library only.

A message answers, in this order: what failed, why (the value seen, the values allowed), how to fix it, and where to
read more (`hstu-compile explain CODE`). A user error never shows a traceback; an `InternalError` is a bug of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

EXIT_USAGE = 2
EXIT_CHECKPOINT = 3
EXIT_UNSUPPORTED = 4
EXIT_BUILD = 5
EXIT_VERIFICATION = 6
EXIT_REQUEST = 7
EXIT_BUNDLE = 8
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class HstuCompileError(Exception):
    """Base of every refusal.

    Args:
        code: documented code, `HSTU-Ennn`; one of `ERROR_CODES`.
        what: the stage and the object that failed.
        why: the value seen against the values allowed.
        fix: a command or a change that helps.
        context: the same facts for machines (`--json`).
    """

    stage = "hstu-compile"
    exit_code = EXIT_INTERNAL

    def __init__(self, code: str, what: str, why: str, fix: str, context: Mapping[str, Any] | None = None) -> None:
        if code not in ERROR_CODES:
            raise InternalError(f"error code {code} is not documented")
        self.code, self.what, self.why, self.fix = code, what, why, fix
        self.context = dict(context or {})
        super().__init__(str(self))

    def __str__(self) -> str:
        return (
            f"error[{self.code}] {self.stage}: {self.what}\n  Why: {self.why}\n  Fix: {self.fix}\n"
            f"  See: hstu-compile explain {self.code}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that `--json` prints."""
        return {
            "code": self.code,
            "stage": self.stage,
            "what": self.what,
            "why": self.why,
            "fix": self.fix,
            "exit_code": self.exit_code,
            "context": self.context,
        }


class UsageError(HstuCompileError):
    """Options that contradict each other or have no legal meaning."""

    stage, exit_code = "usage", EXIT_USAGE


class CheckpointError(HstuCompileError):
    """A checkpoint or configuration file that cannot be read as a trained HSTU."""

    stage, exit_code = "checkpoint", EXIT_CHECKPOINT


class UnsupportedModelError(HstuCompileError):
    """A model that is readable, and that hstu-compile does not compile."""

    stage, exit_code = "model", EXIT_UNSUPPORTED


class ExportError(HstuCompileError):
    """PyTorch to ONNX failed."""

    stage, exit_code = "export", EXIT_BUILD


class RewriteError(HstuCompileError):
    """A graph pass found something else than it was promised."""

    stage, exit_code = "rewrite", EXIT_BUILD


class EngineError(HstuCompileError):
    """ONNX to engine failed, or an engine cannot run here."""

    stage, exit_code = "engine", EXIT_BUILD


class PluginError(HstuCompileError):
    """The plugin library cannot be built, found or loaded."""

    stage, exit_code = "plugin", EXIT_BUILD


class VerifyError(HstuCompileError):
    """An artifact differs from the eager model by more than the bound."""

    stage, exit_code = "verify", EXIT_VERIFICATION


class RequestError(HstuCompileError):
    """Input data that the model must not be run on."""

    stage, exit_code = "request", EXIT_REQUEST


class BundleError(HstuCompileError):
    """A bundle that cannot be written or must not be trusted."""

    stage, exit_code = "bundle", EXIT_BUNDLE


class CalibrationError(HstuCompileError):
    """Calibration data, or a table of what was seen in it, that no scale must be taken from."""

    stage, exit_code = "calibration", EXIT_REQUEST


class InternalError(Exception):
    """A bug in hstu-compile: an invariant of ours does not hold."""


@dataclasses.dataclass(frozen=True)
class ErrorCode:
    """Documentation of one code, printed by `hstu-compile explain`."""

    title: str
    text: str


ERROR_CODES: dict[str, ErrorCode] = {
    "HSTU-E101": ErrorCode(
        "The checkpoint cannot be read",
        "The file is missing, empty, truncated, or not something torch.save wrote. hstu-compile reads checkpoints with "
        "weights_only=True. Check that the file was copied whole and that torch.load(path, weights_only=True) "
        "reads it. A folder is read if torch.distributed.checkpoint wrote it (.metadata and *.distcp), or Meta's "
        "DLRMv3 training (non_sparse.ckpt and the folder sparse): every chunk of every tensor that the model needs "
        "must lie in its file, once. What the writer compressed or changed otherwise is not read.",
    ),
    "HSTU-E102": ErrorCode(
        "The checkpoint wants to run code",
        "The pickle in the file names a class or function outside the few that tensors need. Loading it could execute "
        "arbitrary code, so it is refused. Save only tensors and plain containers: torch.save({'model_state_dict': "
        "model.state_dict()}, path). The .metadata of a folder is a pickle as well, which "
        "torch.distributed.checkpoint loads as it is; hstu-compile reads it as data, and refuses what names anything "
        "but torch.distributed.checkpoint's own records.",
    ),
    "HSTU-E103": ErrorCode(
        "No state_dict in the checkpoint",
        "The checkpoint loads, but holds no mapping from names to tensors. Accepted: a bare state_dict, or a dict that "
        "has one under model_state_dict, state_dict or model; in a folder of shards these may lie deeper. The folder "
        "sparse of Meta's DLRMv3 training holds tables alone: pass the folder above it.",
    ),
    "HSTU-E104": ErrorCode(
        "Unknown checkpoint family",
        "No family recognises the parameter names, or the file says to be in a format of hstu-compile that this "
        "version does not know. See the table of supported models in README; --dialect NAME skips detection.",
    ),
    "HSTU-E105": ErrorCode(
        "Missing or unexpected parameters",
        "Every parameter of the model must be in the checkpoint and every one in the checkpoint must belong to "
        "the model: "
        "a weight that is silently dropped or left at its initial value gives a model that runs and recommends "
        "wrongly. "
        "All names are listed, with the nearest name offered. In Meta's DLRMv3 training non_sparse.ckpt names the "
        "tensors that are in the folder sparse; both must be of one step. With --embeddings external no tables are "
        "needed.",
    ),
    "HSTU-E106": ErrorCode(
        "Shapes contradict the configuration",
        "A tensor's shape is not the one that the configuration asks for. Pass the configuration of the training run.",
    ),
    "HSTU-E107": ErrorCode(
        "The number of heads cannot be inferred",
        "Projections store all heads side by side, so their shapes are the same for 1 head of 64 and 2 heads of 32. "
        "Pass --config FILE with at least num_heads.",
    ),
    "HSTU-E108": ErrorCode(
        "Weights are not finite",
        "Some weights are NaN or infinite: training diverged or the file is damaged. Every affected tensor is listed.",
    ),
    "HSTU-E109": ErrorCode(
        "The configuration file is not usable",
        "--config takes a JSON object with the family's own field names, for instance the one saved beside the "
        "weights.",
    ),
    "HSTU-E110": ErrorCode(
        "This model is not supported",
        "The model is an HSTU of a kind that hstu-compile does not compile. The message names the setting.",
    ),
    "HSTU-E111": ErrorCode(
        "The weights overflow the chosen precision",
        "float16 holds values up to 65504. Build with --bf16 or --fp32.",
    ),
    "HSTU-E201": ErrorCode(
        "Export to ONNX failed",
        "torch.onnx.export raised; its message follows. This is a bug in hstu-compile unless the installed torch or "
        "onnxscript is outside the versions in README.",
    ),
    "HSTU-E301": ErrorCode(
        "A graph pass changed fewer places than the model has",
        "Passes state how many layers they must find. A smaller count would leave a graph that is slower or wrong "
        "without anybody noticing, so it is an error.",
    ),
    "HSTU-E302": ErrorCode(
        "The graph holds what a runtime cannot take",
        "After all passes the graph still has an operator, type or attribute that the target cannot run.",
    ),
    "HSTU-E303": ErrorCode(
        "A graph cannot be cut at its attentions",
        "A graph is cut at every attention so that a kernel can run between engines. Tensors cross from one engine "
        "to the next. Each needs a recorded type and a shape whose axes are named; this one has none.",
    ),
    "HSTU-E401": ErrorCode(
        "The backend is not available",
        "The runtime that --backend or --runtime names is not installed, cannot be imported, or sees no GPU.",
    ),
    "HSTU-E402": ErrorCode(
        "The engine builder refused the graph",
        "TensorRT's parser or builder failed; its own messages follow, with node names.",
    ),
    "HSTU-E403": ErrorCode(
        "The engine is not what was asked for",
        "The engine was built, and its inspector shows another precision or another number of plugin layers than "
        "asked.",
    ),
    "HSTU-E404": ErrorCode(
        "The engine cannot run here",
        "An engine is tied to its TensorRT version and GPU architecture. Rebuild it on this machine with "
        "`hstu-compile engine model.onnx`.",
    ),
    "HSTU-E405": ErrorCode(
        "A shape or profile option cannot be used",
        "Shape options are written as in trtexec: --minShapes name:1x2,name2:3, with min <= opt <= max in every "
        "dimension.",
    ),
    "HSTU-E406": ErrorCode(
        "The kernels cannot be traced",
        "`hstu-compile profile` records kernels by torch.profiler, which sees all that runs on the GPU in its process. "
        "That needs torch with CUDA for the installed driver, and no other profiler in the process. With --no-timeline "
        "the latencies alone are measured, without torch.",
    ),
    "HSTU-E501": ErrorCode(
        "The plugin library cannot be built",
        "CMake, g++, the TensorRT headers or the CUDA headers are missing, or the compiler failed; its output follows.",
    ),
    "HSTU-E502": ErrorCode(
        "Headers and runtime are different TensorRT versions",
        "The plugin must be compiled with headers of the same major version as the library that loads it.",
    ),
    "HSTU-E503": ErrorCode(
        "The plugin is not registered",
        "The engine or the ONNX file asks for hstu::HstuAttention or hstu::HstuNorm, and no creator with that name, "
        "version and namespace is "
        "registered. `hstu-compile doctor BUNDLE` tells which library which loader needs.",
    ),
    "HSTU-E504": ErrorCode(
        "The plugin library cannot be loaded",
        "The dynamic loader refused the file; its message follows.",
    ),
    "HSTU-E505": ErrorCode(
        "An attention kernel could not run",
        "The library of attention kernels has none that fits the attention's attributes, types or shapes on this GPU, "
        "or the driver refused a launch. The message is the library's own.",
    ),
    "HSTU-E601": ErrorCode(
        "The artifact differs from the eager model",
        "The error against the float64 reference is larger than the bound: twice the error that the eager model in the "
        "same precision makes. Or that bound is so wide that 0.9 of the right output would keep it. The bundle is "
        "written with status FAIL so that the report can be read.",
    ),
    "HSTU-E602": ErrorCode(
        "Verification could not run",
        "A runtime failed while verifying; its message follows.",
    ),
    "HSTU-E701": ErrorCode(
        "An input is missing, unknown, or has the wrong type or rank",
        "`hstu-compile inspect BUNDLE` lists the inputs with dtype and shape. Integers are converted when no "
        "value changes.",
    ),
    "HSTU-E702": ErrorCode(
        "Illegal sequence offsets",
        "seq_offsets has B + 1 entries, starts at 0, never descends and ends at the number of events L.",
    ),
    "HSTU-E703": ErrorCode(
        "An id is outside the vocabulary",
        "The engine clamps ids into the table because a GPU kernel must not read outside it, but an id the model "
        "never saw "
        "has no meaningful embedding, so `run` refuses it. Map unknown items to 0 (padding) or drop them.",
    ),
    "HSTU-E704": ErrorCode(
        "A request is larger than the profile",
        "The engine was built for up to --max-batch sequences of up to --max-seq-len events.",
    ),
    "HSTU-E705": ErrorCode(
        "Timestamps are not in order",
        "Within a sequence timestamps ascend, oldest first, and the request time is not before the last event.",
    ),
    "HSTU-E706": ErrorCode(
        "The feeds file cannot be read",
        "--inputs takes an .npz of plain arrays (no pickles), one per model input.",
    ),
    "HSTU-E707": ErrorCode(
        "The KV cache is too small for one user",
        "The cached keys and values of one user, every layer of its history and context, must fit the cache's budget. "
        "The message says how many bytes the user takes.",
    ),
    "HSTU-E708": ErrorCode(
        "The KV cache belongs to another model",
        "Cached keys and values mean something only to the model whose prefill computed them. A cache is made for one "
        "model version, which is the sha256 of the bundle's model files.",
    ),
    "HSTU-E709": ErrorCode(
        "A cached history cannot be extended",
        "New events may be encoded against cached keys and values only if these do not depend on what comes later. "
        "Where positions count back from the query and time buckets are anchored at it, every new event changes the "
        "whole history, which has to be encoded again.",
    ),
    "HSTU-E801": ErrorCode(
        "The output exists",
        "hstu-compile never overwrites what it wrote, such as a bundle, unless --force is given, and never anything "
        "that it did not write.",
    ),
    "HSTU-E802": ErrorCode(
        "The output cannot be written",
        "The folder is not writable or the disk is full. Nothing was left behind.",
    ),
    "HSTU-E803": ErrorCode(
        "Not a bundle, or a damaged one",
        "A bundle has a manifest.json of a known format version, and every file in it has the sha256 that the manifest "
        "records.",
    ),
    "HSTU-E804": ErrorCode(
        "Triton Inference Server cannot serve this graph",
        "Triton's TensorRT backend joins requests of different lengths value by value and makes offsets of int32, so a "
        "graph's inputs have one axis, of events, candidates or users. Rows of embeddings and cached keys and values "
        "are no such inputs. The Python backend (`hstu-compile triton --backend python`) runs hstu_compile's own "
        "sessions and takes all but a feature named as its own inputs are.",
    ),
    "HSTU-E810": ErrorCode(
        "The calibration data cannot be used",
        "--data takes .npz files of recorded requests in the form of `hstu-compile run --inputs`, with at least two "
        "requests. Arrays must be the inputs of this model: a file recorded for another family or another feature set "
        "has other names.",
    ),
    "HSTU-E811": ErrorCode(
        "An activation is not finite",
        "On one of the calibration requests the float32 model computed NaN or infinity in front of the product that "
        "the message names. No scale can be taken from it. The weights are finite, so either they are extreme or the "
        "request is; the message names the first site in the order of computation.",
    ),
    "HSTU-E812": ErrorCode(
        "The calibration table cannot be read",
        "The file is missing, truncated, of another format version, or was changed after hstu-compile wrote it: its "
        "numbers contradict each other or its own sha256. A scale from such a table would be wrong without anybody "
        "noticing. Run `hstu-compile calibrate` again.",
    ),
    "HSTU-E813": ErrorCode(
        "The calibration table belongs to another checkpoint or configuration",
        "A table holds what one checkpoint's activations were. After more training they are others, with another "
        "--config they may be, and in another family the sites are. Run `hstu-compile calibrate` on the checkpoint "
        "that is built, with the --config that it is built with.",
    ),
    "HSTU-E814": ErrorCode(
        "The calibration table and the model have different products",
        "Every product of activations with a weight is a site of the table, with the weight's size. Sites that are "
        "missing, that the model does not have, or that are of another size mean that the table was made of another "
        "model or by another version.",
    ),
    "HSTU-E815": ErrorCode(
        "Calibration tables cannot be merged",
        "Tables are merged when they are of one checkpoint and of different data. Statistics of the same file twice "
        "would count its requests twice.",
    ),
    "HSTU-E816": ErrorCode(
        "The calibration cannot be resumed",
        "--resume continues from the partial table beside the output, which must be of the same checkpoint, data, "
        "number of samples and seed, and whole.",
    ),
    "HSTU-E831": ErrorCode(
        "The labelled requests cannot be used",
        "build --data takes an .npz of requests in the form of `hstu-compile run --inputs` with one more array, what "
        "really happened: target_ids [B] for a retrieval model, the item that each user chose next, or labels [T] for "
        "a ranking model, 0 or 1 for each candidate and binary task.",
    ),
    "HSTU-E832": ErrorCode(
        "No mix of quantised and float16 products keeps the quality",
        "--mixed auto left product after product in float16, the most harmful first, and even with one product "
        "quantised the quality on the labelled requests differed from the float32 model by more than --budget. With n "
        "requests one more or one fewer hit is 1 / n: a budget below that asks for no change at all.",
    ),
    "HSTU-E833": ErrorCode(
        "The quality of the artifact is outside the budget",
        "The bundle's graph was run on the labelled requests, and its quality differs from that of the float32 model "
        "by more than --budget. The bundle is written with status FAIL so that the report can be read.",
    ),
    "HSTU-E901": ErrorCode(
        "Options contradict each other",
        "For instance two precisions, or an opt shape outside min and max.",
    ),
    "HSTU-E902": ErrorCode("Unknown error code", "`hstu-compile explain` without a code lists all of them."),
    "HSTU-E904": ErrorCode(
        "The model's history cannot be encoded in parts",
        "--incremental keeps the keys and values of a history and encodes only new events later. That is exact where a "
        "row depends on nothing behind the next event: in the research family, and in native retrieval models whose "
        "rows do not see the whole history. Elsewhere it would be an approximation, and is refused.",
    ),
    "HSTU-E905": ErrorCode(
        "--keep-fp16 names no product of the model",
        "A product of activations with a weight has the name of its place in the model, such as layers.0.uvqk or "
        "item_mlp.hidden. `hstu-compile build CKPT --int8 --calib FILE --dry-run` lists all of them.",
    ),
    "HSTU-E906": ErrorCode(
        "The target does not have this precision",
        "FP8 needs TensorRT 10 or TensorRT-RTX, and a GPU of compute capability 8.9 or newer; TensorRT 8 has no type "
        "for it. INT8 runs on all of them.",
    ),
    "HSTU-E907": ErrorCode(
        "A quantised build needs a calibration table",
        "--int8 and --fp8 take the scales of activations from the file that `hstu-compile calibrate` wrote of the same "
        "checkpoint: --calib FILE. Without one there is nothing to say how large activations get.",
    ),
    "HSTU-E903": ErrorCode(
        "A package that this command needs is not installed",
        "The base installation serves and builds engines. Reading checkpoints and exporting need "
        "pip install 'hstu-compile[export]', running on the CPU 'hstu-compile[cpu]', on a GPU 'hstu-compile[gpu]'.",
    ),
}
