"""What an installed wheel holds: configuration and reference model, found from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_runs_away_from_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("moe_winnow-*.whl")
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1"}

    def run(module: str, *arguments: str) -> str:
        command = [sys.executable, "-c", f"from {module} import main; main()", *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert "hc_smoe, importance_product, m_smoe" in run("harness.cli", "--help")
    output = run("harness.cli", "method=weight_norm", "ratio=0.5", "suite=none", "output_dir=out", "progress=false")
    assert "routed-expert parameters removed: 50.0 %" in output
    assert (elsewhere / "out" / "checkpoint" / "model.safetensors").stat().st_size > 1_000_000
    run("reports.cli", "out")
    assert "weight_norm" in (elsewhere / "out" / "report" / "page.html").read_text()
    assert "humaneval" in run("harness.data.stage", "list")
