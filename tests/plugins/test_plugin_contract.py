"""The C++ tables are the contract's: generated from the YAML, compiled, and used to pick kernels."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hstu_compile.errors import PluginError
from hstu_compile.plugin_library import find_cuda_headers
from hstu_compile.plugins import generate_contract
from hstu_compile.plugins.kernels.hopper.variants import SPLITS, HopperVariant, chosen_split, resident_clusters, tile_of

ROOT = Path(generate_contract.__file__).parent
CONTRACT = ROOT / "hstuAttentionPlugin" / "HstuAttention_PluginConfig.yaml"
CONTRACTS = {"hstuAttention": CONTRACT, "hstuNorm": ROOT / "hstuNormPlugin" / "HstuNorm_PluginConfig.yaml"}
PROGRAMS = Path(__file__).parent / "conformance"
#: What of the attention's library needs no header of TensorRT.
CORE = ("Core", "Fields", "Hopper", "Kernel", "Shapes")
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def contract() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CONTRACT.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("Lq", ("Lq", 1, 0)), ("2*pos_table_len-1", ("pos_table_len", 2, -1)), ("num_buckets+1", ("num_buckets", 1, 1))],
)
def test_dimensions_are_parsed(text: str, parsed: tuple[str, int, int]) -> None:
    assert generate_contract.parse_dim(text) == parsed


def test_a_dimension_that_is_no_formula_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'Lq\*\*2' of the contract is not of the form"):
        generate_contract.parse_dim("Lq**2")


@pytest.mark.parametrize("operator", list(CONTRACTS))
def test_every_attribute_input_and_limit_is_in_the_header(operator: str) -> None:
    contract = yaml.safe_load(CONTRACTS[operator].read_text(encoding="utf-8"))
    header = generate_contract.header_from_contract(contract)
    for attribute in contract["attributes"]:
        assert f'{{"{attribute["name"]}", ' in header
    for tensor in [*contract["inputs"], *contract["outputs"]]:
        assert f'{{"{tensor["name"]}", TypeClass::' in header
    for name, limit in contract["limits"].items():
        assert f"kMax{generate_contract.pascal(name)} = {limit['max']};" in header
    assert f'kPluginVersion[] = "{contract["version"]}";' in header


def test_a_new_attribute_reaches_the_field_reader_by_itself(contract: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(contract)
    changed["attributes"].insert(0, {"name": "soft_cap", "type": "float", "min": 0.0, "max": 8.0, "doc": "test"})
    (tmp_path / "hstuAttentionContract.h").write_text(generate_contract.header_from_contract(changed))
    (tmp_path / "check.cpp").write_text(
        '#include "hstuAttentionFields.h"\n'
        "int main() { hstu::HstuAttentionAttributes a{}; a.softCap = 9.0F;\n"
        '  try { hstu::validateAttributes("n", a); } catch (std::exception const& e) {\n'
        "    return std::string(e.what()).find(\"'soft_cap' is 9; allowed: a finite float >= 0 and <= 8\") == "
        "std::string::npos; }\n  return 2; }\n"
    )
    includes = [f"-I{tmp_path}", f"-I{ROOT / 'common'}", f"-I{ROOT / 'hstuAttentionPlugin'}"]
    ours = ("hstuAttentionPlugin/hstuAttentionFields.cpp", "common/fieldReader.cpp")
    sources = [str(tmp_path / "check.cpp"), *(str(ROOT / source) for source in ours)]
    program = tmp_path / "check"
    subprocess.run(["g++", *WARNINGS, *includes, *sources, "-o", str(program)], check=True)
    assert subprocess.run([str(program)], check=False).returncode == 0


def test_an_attribute_with_a_default_comes_behind_those_without(contract: dict[str, Any]) -> None:
    changed = copy.deepcopy(contract)
    changed["attributes"].append({"name": "soft_cap", "type": "float", "min": 0.0, "max": 8.0, "doc": "test"})
    with pytest.raises(ValueError, match="an attribute without a default follows one that has one"):
        generate_contract.header_from_contract(changed)


@pytest.fixture(scope="module")
def includes(tmp_path_factory: pytest.TempPathFactory, contract: dict[str, Any]) -> list[str]:
    """Where the core finds its headers; no TensorRT header is among them."""
    try:
        cuda = find_cuda_headers()
    except PluginError as error:
        pytest.skip(f"no CUDA headers: {error.why}")
    generated = tmp_path_factory.mktemp("generated")
    (generated / "hstuAttentionContract.h").write_text(generate_contract.header_from_contract(contract))
    own = [generated, *(ROOT / name for name in ("common", "hstuAttentionPlugin", "kernels/hopper"))]
    return [*(f"-I{path}" for path in own), "-isystem", str(cuda)]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory, includes: list[str]) -> dict[str, str]:
    """The objects of the core by their sources' names, compiled once for both programs."""
    folder = tmp_path_factory.mktemp("core")
    parts = [ROOT / "hstuAttentionPlugin" / f"hstuAttention{name}.cpp" for name in CORE]
    sources = [*parts, *(ROOT / "common").glob("*.cpp")]
    subprocess.run(["g++", *WARNINGS, *includes, "-c", *map(str, sources)], cwd=folder, check=True)
    return {source.stem: str(folder / f"{source.stem}.o") for source in sources}


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory, includes: list[str], core: dict[str, str]) -> Path:
    """The program that picks kernel images from a table of its own."""
    program = tmp_path_factory.mktemp("selection") / "selection"
    # It links without what reads TensorRT's fields and tensors.
    objects = [core[name] for name in core if name not in ("hstuAttentionCore", "hstuAttentionFields")]
    command = ["g++", *WARNINGS, *includes, str(PROGRAMS / "selection.cpp"), *objects, "-o", str(program), "-ldl"]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module")
def hopper_launch(tmp_path_factory: pytest.TempPathFactory, includes: list[str], core: dict[str, str]) -> Path:
    """The program that launches Hopper images on a driver without a GPU, which lies beside it."""
    folder = tmp_path_factory.mktemp("launch")
    driver = ["-shared", "-fPIC", str(PROGRAMS / "fakeDriver.cpp"), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(["g++", *WARNINGS, *includes, *driver], check=True)
    sources = [str(PROGRAMS / "hopperLaunch.cpp"), *core.values()]
    command = ["g++", *WARNINGS, *includes, *sources, "-o", str(folder / "hopperLaunch"), "-ldl"]
    subprocess.run(command, check=True)
    return folder / "hopperLaunch"


def launched(program: Path, *arguments: str, driver_version: str = "13000") -> subprocess.CompletedProcess[str]:
    environment = {"LD_LIBRARY_PATH": str(program.parent), "FAKE_CUDA_VERSION": driver_version}
    return subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, check=False)


def test_a_hopper_launch_passes_what_the_kernel_reads(hopper_launch: Path) -> None:
    done = launched(hopper_launch)
    assert done.returncode == 0, done.stdout


def test_a_driver_older_than_the_compiler_gets_the_portable_kernels(hopper_launch: Path) -> None:
    assert launched(hopper_launch, "tactics").stdout.split() == ["64", "1"]
    assert launched(hopper_launch, "tactics", driver_version="11080").stdout.split() == ["1"]


def test_the_core_needs_no_tensorrt_header_and_picks_the_right_image(selection: Path) -> None:
    done = subprocess.run([str(selection)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("multiprocessors", [132, 78])
@pytest.mark.parametrize("block_dim", [64, 256])
def test_the_library_splits_the_launches_that_pytorch_splits(
    selection: Path, block_dim: int, multiprocessors: int
) -> None:
    tile = tile_of(HopperVariant("float16", block_dim, True))
    block = (block_dim, 64 * tile.warpgroups, tile.block_n)
    found = set()
    for tiles in (1, *(n for split in SPLITS for n in (resident_clusters(split, multiprocessors) + i for i in (0, 1)))):
        for lq, heads in (((tiles - 1) * block[1] + 1, 1), (block[1], tiles)):
            for lk, batch in ((0, 0), (0, 1), (1024, 1), (4 * 1024 - 1, 4), (4096, 1), (lq, 1), (9 * 4352, 9)):
                sizes = (lq, lk, batch, heads)
                for most in (1 << 20, 4352 // 2):
                    arguments = ["split", *map(str, (*sizes, *block, multiprocessors, most))]
                    done = subprocess.run([str(selection), *arguments], capture_output=True, text=True, check=True)
                    assert int(done.stdout) == chosen_split(block_dim, *sizes, multiprocessors, most), sizes
                    found.add(int(done.stdout))
    assert found == set(SPLITS)
