from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What is built from; the rest of the checkout (environments, caches, build trees) must not matter.
INPUTS = ("hstu_compile", "model", "calibration", "plugins", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist, built offline from a copy of the sources; the wheel from the sdist, as an index would."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    tree.mkdir()
    for name in INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
        elif source.exists():
            shutil.copy(source, tree / name)
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder=tree)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def packaged_sources() -> Iterator[str]:
    """Every file of the package that must be in both distributions, under its installed name."""
    patterns = {"hstu_compile": "hstu_compile"} | {
        name: f"hstu_compile/{name}" for name in ("model", "calibration", "plugins")
    }
    for folder, installed in patterns.items():
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT / folder)
            is_source = (
                path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".map", ".yaml", ".css")
                or path.name == "CMakeLists.txt"
            )
            if is_source and path.is_file() and not {"__pycache__", "build"} & set(inside.parts):
                yield f"{installed}/{inside}"


def test_wheel_holds_every_source_and_nothing_at_the_top_but_the_package(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
    assert not set(packaged_sources()) - names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hstu_compile"}
    for name in (
        *("plugins/hstuAttentionPlugin/HstuAttention_PluginConfig.yaml", "templates/report.css", "py.typed"),
        *("templates/triton/launch.sh", "templates/triton/client.py.txt"),
    ):
        assert f"hstu_compile/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_every_source_where_the_repository_has_it(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    outside = [name.removeprefix("hstu_compile/") for name in packaged_sources()]
    expected = {
        name if name.split("/")[0] in ("model", "calibration", "plugins") else f"hstu_compile/{name}"
        for name in outside
    }
    assert not expected - names
    assert {"README.md", "LICENSE", "pyproject.toml"} <= names


def installed(folder: Path, wheel: Path, with_site_packages: bool) -> Path:
    """A new environment with the wheel and, of everything else, only click or the test environment's packages."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    done = run(
        sys.executable, "-m", "pip", "--python", folder / "venv" / "bin" / "python", "install", "--no-deps",
        "--no-index", "--quiet", wheel, folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    here = Path(sysconfig.get_paths()["purelib"])
    if with_site_packages:
        # Behind the wheel on the path, so that an editable install of the repository is not what runs.
        (site / "zz_others.pth").write_text(f"{here}\n")
    else:
        shutil.copytree(here / "click", site / "click")
    return folder / "venv" / "bin"


def test_empty_environment_with_click_alone_shows_help(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    binaries = installed(tmp_path, distributions[0], with_site_packages=False)
    for arguments in (["-h"], ["--version"], ["build", "-h"], ["explain"], ["explain", "HSTU-E101"], ["env"]):
        done = run(binaries / "hstu-compile", *arguments, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert done.stdout
    code = "import hstu_compile, sys; print(hstu_compile.__file__); assert 'click' not in sys.modules"
    done = run(binaries / "python", "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    done = run(binaries / "hstu-compile", "verify", "x", folder=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "HSTU-E903" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_installed_wheel_inspects_and_builds_outside_the_repository(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    import json

    import torch

    from tests.research_reference import ResearchForm, research_state_dict

    binaries = installed(tmp_path, distributions[0], with_site_packages=True)
    work = tmp_path / "work"
    work.mkdir()
    # The trap of a checkout beside the checkpoint: a user's own module of this name must not be imported.
    (work / "model.py").write_text("raise SystemExit('imported the wrong one')")
    form = ResearchForm(num_items=30, num_blocks=1)
    torch.save({"model_state_dict": research_state_dict(form)}, work / "ckpt.pt")
    (work / "config.json").write_text(json.dumps(form.user_config()))
    where = run(binaries / "python", "-c", "import hstu_compile.model as m; print(m.__file__)", folder=tmp_path)
    assert where.stdout.startswith(str(tmp_path)), where.stdout + where.stderr
    arguments = ("ckpt.pt", "--config", "config.json")
    done = run(binaries / "hstu-compile", "inspect", *arguments, folder=work)
    assert done.returncode == 0, done.stderr
    # polygraphy's own program is not in the new environment; it is found as any installed program is.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = run(binaries / "hstu-compile", "build", *arguments, "--backend", "onnx", folder=work, PATH=path)
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout
    assert (work / "ckpt.hstu" / "manifest.json").is_file()
