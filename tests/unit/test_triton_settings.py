"""What the options of `hstu-compile triton` say, and what a config.pbtxt that was edited may say."""

from __future__ import annotations

import pytest

from hstu_compile.errors import UsageError
from hstu_compile.runtime.ladder import Buckets
from hstu_compile.serving.settings import RuntimeSettings, Scheduling, Shapes


def test_settings_come_back_from_the_parameters_of_a_configuration():
    settings = RuntimeSettings("tensorrt", "cpu", 12, "keep_last", "clamp", "stop_server", "fine")
    parameters = {**settings.to_parameters(), "EXECUTION_ENV_PATH": "/env"}
    assert RuntimeSettings.from_parameters(parameters) == settings
    assert RuntimeSettings.from_parameters({}) == RuntimeSettings()
    assert settings.kv_budget_bytes == 12 * 2**20


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"hstu_truncate": "refuse"}, "hstu_truncate.*ours are hstu_device"),
        ({"hstu_truncation": "newest"}, "there is no truncation 'newest'.*refuse, keep_last"),
        ({"hstu_unknown_ids": "drop"}, "there is no unknown_ids 'drop'.*--unknown-ids"),
        ({"hstu_runtime": "torch"}, "there is no runtime 'torch'.*onnxruntime"),
        ({"hstu_device": "tpu"}, "there is no device 'tpu'"),
        ({"hstu_lost_process": "ignore"}, "there is no lost_process 'ignore'.*report, stop_server.*--lost-process"),
        ({"hstu_shapes": "few"}, "there is no shapes 'few'.*auto, exact, fine, coarse.*--shapes"),
        ({"hstu_kv_budget_mib": "a lot"}, "hstu_kv_budget_mib 'a lot' is no number"),
        ({"hstu_kv_budget_mib": "-1"}, "hstu_kv_budget_mib '-1' is no number"),
    ],
)
def test_parameters_without_meaning_are_refused(parameters: dict[str, str], message: str):
    with pytest.raises(UsageError, match=f"(?s)HSTU-E901.*{message}"):
        RuntimeSettings.from_parameters(parameters)


@pytest.mark.parametrize(
    ("runtime", "shapes", "buckets"),
    [
        ("onnxruntime", "auto", None),
        ("tensorrt", "auto", None),
        ("tensorrt-rtx", "auto", Buckets.coarse()),
        ("tensorrt-rtx", "exact", None),
        ("onnxruntime", "fine", Buckets()),
        ("tensorrt", "coarse", Buckets.coarse()),
    ],
)
def test_passes_are_padded_where_the_runtime_compiles_for_each_shape_or_as_told(
    runtime: str, shapes: Shapes, buckets: Buckets | None
):
    assert RuntimeSettings(runtime=runtime, shapes=shapes).buckets == buckets


@pytest.mark.parametrize("wrong", [{"max_queue_delay_us": -1}, {"instances": 0}])
def test_schedules_without_meaning_are_refused(wrong: dict[str, int]):
    (option,) = wrong
    with pytest.raises(UsageError, match=f"(?s)HSTU-E901.*--{option.replace('_', '-')} {wrong[option]}"):
        Scheduling(**wrong)


@pytest.mark.parametrize(
    ("settings", "on_gpu"),
    [
        (RuntimeSettings(), False),
        (RuntimeSettings(device="gpu"), True),
        (RuntimeSettings(runtime="tensorrt"), True),
        (RuntimeSettings(runtime="tensorrt-rtx"), True),
    ],
)
def test_instances_are_on_the_device_that_computes(settings: RuntimeSettings, on_gpu: bool):
    assert settings.on_gpu is on_gpu
