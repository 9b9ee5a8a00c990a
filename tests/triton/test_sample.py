"""samples/03_triton: its README's commands, one after the other, on a bundle of the demo's ranker."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_compile.serving.local_server import Installation
from tests.e2e.test_ranking_sample import built_ranker
from tests.triton.server import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "samples" / "03_triton" / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    (block,) = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return block.splitlines()


@pytest.fixture
def workplace(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks to the commands like the repository after the ranking demo, its ranker trained less."""
    bundle = built_ranker(tmp_path_factory)
    (tmp_path / "build").mkdir()
    shutil.copytree(bundle, tmp_path / "build" / "ranking.hstu")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "hstu-compile"):
        program = shutil.which(name, path=str(Path(sys.executable).parent))
        assert program is not None
        # Not a link: an interpreter finds its environment by the path that it is started with.
        script = tmp_path / ".venv" / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(program)} "$@"\n')
        script.chmod(0o755)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    return tmp_path


def test_the_repositorys_readme_has_the_same_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(commands()) in readme


def test_three_commands_lead_from_a_bundle_to_a_scored_request(
    triton_installation: Installation, workplace: Path
) -> None:
    write, serve, score = commands()
    written = subprocess.run(shlex.split(write), cwd=workplace, capture_output=True, text=True, check=False)
    assert written.returncode == 0, written.stderr
    assert serve.endswith(" &")
    # As the README says, options behind the repository are tritonserver's own; here they keep tests apart.
    http_port = free_port()
    ports = [f"--http-port={http_port}", f"--grpc-port={free_port()}", f"--metrics-port={free_port()}"]
    with (workplace / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*shlex.split(serve.removesuffix(" &")), *ports], cwd=workplace, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        url = ["--url", f"127.0.0.1:{http_port}"]
        scored = subprocess.run([*shlex.split(score), *url], cwd=workplace, capture_output=True, text=True, check=False)
        assert scored.returncode == 0, scored.stderr + (workplace / "server.log").read_text()[-3000:]
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    first, second, refused = scored.stdout.split("\n", 2)
    assert [line.split()[3] for line in (first, second)] == ["miss", "hit"]
    assert first.split("best:")[1] == second.split("best:")[1]
    assert refused.startswith("films that do not exist: error[HSTU-E703]")
    assert "item_movie_id outside 0.." in refused
    assert code == 0, (workplace / "server.log").read_text()[-3000:]
    # Both examples that the repository carries, against a server that is gone, say so and do not hang.
    client = workplace / "build" / "model_repository" / "ranking" / "client_http.py"
    gone = subprocess.run([sys.executable, client, *url], capture_output=True, text=True, check=False, timeout=60)
    assert gone.returncode != 0
    assert "refused" in gone.stderr
