"""A report of an artifact that returned NaN is still strict JSON."""

import json
import math

from hstu_compile.session_check import RuntimeCheck, TensorCheck, VerifyReport


def test_errors_that_are_not_finite_become_null():
    check = TensorCheck("user_embeddings", "one event", math.inf, 1e-5, math.nan, "FAIL")
    run = RuntimeCheck("some runtime", "model.onnx", "FAIL", None, (check,))
    report = VerifyReport("FAIL", "rule", math.inf, 1e-5, "there", 1e-7, (), (run,))
    facts = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert facts["worst_error"] is None
    assert facts["runs"][0]["tensors"][0]["error"] is None
    assert facts["runs"][0]["tensors"][0]["bound"] == 1e-5
