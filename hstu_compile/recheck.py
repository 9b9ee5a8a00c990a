"""Repeat a bundle's verification from its own files, without the checkpoint and without torch. Level 5."""

from __future__ import annotations

import dataclasses
from typing import Any

from hstu_compile import bundle as bundles
from hstu_compile.artifacts import Feed
from hstu_compile.errors import BundleError
from hstu_compile.polygraphy_files import PolygraphyCheck, load_feeds, load_outputs, run_polygraphy
from hstu_compile.runtime.session import Session, open_session
from hstu_compile.session_check import (
    Progress,
    Reference,
    RuntimeCheck,
    Status,
    VerifyReport,
    check_session,
    guarded_check,
    report_of,
)


@dataclasses.dataclass(frozen=True)
class Recheck:
    """What a repeated verification found."""

    status: Status
    verification: VerifyReport
    polygraphy: PolygraphyCheck

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "status": self.status,
            "verification": self.verification.to_dict(),
            "polygraphy": self.polygraphy.to_dict(),
        }


def recheck_bundle(files: bundles.BundleFiles, progress: Progress) -> Recheck:
    """Run the stored feeds again and compare with the stored float64 outputs, under the rule of the build.

    model.onnx runs in ONNX Runtime, model.engine on its backend where that can run; then the stored Polygraphy command
    is repeated, which also covers top-k scores.

    Args:
        files: an existing bundle whose hashes were checked.
        progress: called with (what, done, total).

    Raises:
        BundleError: HSTU-E803, if the bundle was built with --no-verify and holds nothing to compare with.
    """
    stored = files.manifest["verification"]
    if stored is None:
        raise BundleError(
            "HSTU-E803",
            f"{files.path} holds no reference",
            "it was built with --no-verify",
            "build it again without --no-verify",
        )
    names = stored["feeds"]
    feeds = [
        Feed(name, arrays) for name, arrays in zip(names, load_feeds(files.path / bundles.FEEDS_FILE), strict=True)
    ]
    exact = tuple(load_outputs(files.path / bundles.EXACT_FILE))
    reference = Reference(
        feeds=tuple(feeds),
        exact=exact,
        eager=tuple(load_outputs(files.path / bundles.EAGER_FILE)),
        eager_error=dict(stored["eager_error"]),
        item_vectors=None,
    )
    precision = files.manifest["precision"]["requested"]
    runtimes = ["onnxruntime", *([files.manifest["backend"]["name"]] if files.has_engine else [])]
    verification = report_of([_check(files, name, reference, progress) for name in runtimes], reference, precision)
    polygraphy = run_polygraphy(files.path, stored["polygraphy_arguments"])
    status: Status = "PASS" if verification.status == "PASS" and polygraphy.exit_code == 0 else "FAIL"
    return Recheck(status, verification, polygraphy)


def _check(files: bundles.BundleFiles, runtime: str, reference: Reference, progress: Progress) -> RuntimeCheck:
    artifact = bundles.ONNX_FILE if runtime == "onnxruntime" else bundles.ENGINE_FILE
    engine = files.path / bundles.ENGINE_FILE if files.has_engine else None

    def check(session: Session) -> RuntimeCheck:
        return check_session(session, artifact, reference, files.manifest["precision"]["requested"], progress)

    plugin = files.plugin_library if runtime == "tensorrt" else None
    return guarded_check(
        runtime,
        artifact,
        lambda: open_session(
            runtime,
            onnx=files.path / bundles.ONNX_FILE,
            engine=engine,
            plugin_library=plugin,
            allow_tf32=files.manifest["precision"]["requested"] != "fp32",
        ),
        check,
    )
