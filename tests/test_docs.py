"""The commands of the documentation, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from sisma_jax.data import photos
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig
from sisma_jax.runs.metrics import read_metrics
from tests.processes import ROOT, free_port

BLOCK = re.compile(r"```bash tested\n(.*?)```", re.S)

# `gcloud storage cp -r A B` with folders in place of buckets: into B if it exists or several are copied.
GCLOUD = """#!/bin/sh
[ "$1 $2 $3" = "storage cp -r" ] || exit 1
shift 3
for target; do :; done
mkdir -p "$target"
cp -r "$@"
"""


def blocks() -> list[str]:
    return BLOCK.findall((ROOT / "docs/tpu_vm.md").read_text())


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.slow
def test_the_way_to_a_pod_is_passable(tmp_path):
    """All blocks in turn, in one folder: from the plan to a painted mask."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin/gcloud", GCLOUD)
    executable(tmp_path / "bin/python", f'#!/bin/sh\nshift\nexec "{sys.executable}" "{ROOT / "run.py"}" "$@"\n')
    sizes = KlConfig(block_channels=(4, 8), layers_per_block=1, norm_groups=4)
    kl_weights.save(KlAutoencoder(sizes, rngs=nnx.Rngs(0)), tmp_path / "vae")
    (tmp_path / "tiny.py").write_text(
        "from pathlib import Path\nfrom tests.tiny import tiny_latent_config\n\n\n"
        "def get_config():\n    return tiny_latent_config(Path('data'))\n"
    )
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/one.png").write_bytes(photos.encode_png(np.zeros((16, 16), np.uint8)))
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "CONFIG": "tiny.py",
        "FLAGS": "--data.root=raw --autoencoder.weights=vae --train.num_steps=16",
        "BUCKET": str(tmp_path / "bucket"),
        "TOPOLOGY": "cpu:2",
        "MASK": "masks",
    }
    port = str(free_port())
    for block in blocks():
        command = ["bash", "-e", "-c", block.replace("8476", port)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/faces/plan_cpu-2.json").exists() or list(tmp_path.glob("runs/*/plan_cpu-2.json"))
    for run in ("bucket/runs/faces", "runs/two", "runs/profiled"):
        assert read_metrics(tmp_path / run / "metrics.jsonl")[-1]["step"] == 16
    assert list((tmp_path / "runs/profiled/profile").rglob("*.xplane.pb"))
    assert photos.read_image_file(tmp_path / "painted/one_0.png").shape == (16, 16, 3)


def test_a_run_is_started_again_until_it_is_done_or_wrong(tmp_path):
    (block,) = [block for block in blocks() if "for attempt" in block]

    def attempts(*codes: int) -> tuple[int, int]:
        """Exit code of the block, and how often it started a run that ends with these codes in turn."""
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        executable(tmp_path / "python", 'read code < codes\nsed -i 1d codes\nexit "$code"\n')
        executable(tmp_path / "sleep", "exit 0\n")
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", block], cwd=tmp_path, env=environment, check=False)
        return done.returncode, len(codes) - len((tmp_path / "codes").read_text().split())

    assert attempts(75, 134, 0, 0) == (0, 3)
    assert attempts(75, 2, 0) == (2, 2)


def test_links_of_the_documentation_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "kernels/README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
