"""The command line from end to end, and what it says to wrong input: one message, exit code 2, no traceback."""

import json
import shutil
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

import run
import sisma_jax
from sisma_jax.data import images
from sisma_jax.data.drawing import draw_face

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A configuration file, and the folder of the run that the whole job made of it."""
    folder = tmp_path_factory.mktemp("finished")
    file = folder / "tiny.py"
    file.write_text(
        "from pathlib import Path\nfrom tests.tiny import tiny_config\n\n\n"
        f"def get_config():\n    return tiny_config(Path({str(folder / 'data')!r}))\n"
    )
    run.main(["--config", str(file), "--workdir", str(folder / "run")])
    return file, folder / "run"


@pytest.fixture
def mask_file(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(images.encode_png(draw_face(np.random.default_rng(3), 32)[1]))
    return path


def command(finished, *arguments, workdir=None):
    file, folder = finished
    run.main(["--config", str(file), "--workdir", str(workdir or folder), *map(str, arguments)])


def refused(capsys, finished, *arguments, workdir=None) -> str:
    """Returns what is printed when the command is refused."""
    with pytest.raises(SystemExit) as exit_info:
        command(finished, *arguments, workdir=workdir)
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return " ".join(errors.replace("│", " ").split())


def test_the_whole_job_leaves_all_that_it_promises(finished):
    _, folder = finished
    for name in ("config.json", "metrics.jsonl", "loss.png", "evaluation.json", "samples/grid_0000004.png"):
        assert (folder / name).stat().st_size > 0
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["step"] == 4
    assert np.isfinite(report["held_out_loss"])
    assert {"samples", "ceiling", "floor"} <= set(report["mask_agreement"])
    # 6 held-out masks, each with 4 samples and its original.
    grid = cv2.imread(str(folder / "samples/grid_0000004.png"))
    assert grid.shape[0] >= 6 * 128
    assert grid.shape[1] >= 6 * 128


def test_sample_paints_a_file(finished, mask_file, tmp_path, capsys):
    command(finished, "sample", "--mask", mask_file, "--out", tmp_path / "out", "--num", 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "grid.png",
        "mask_0.png",
        "mask_1.png",
        "mask_2.png",
    ]
    assert cv2.imread(str(tmp_path / "out/mask_1.png")).shape == (16, 16, 3)
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_sample_paints_a_folder_and_repeats_itself(finished, mask_file, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(mask_file, folder / name)
    arguments = ("sample", "--mask", folder, "--num", 2, "--steps", 3, "--seed", 5, "--guidance", 2.0)
    command(finished, *arguments, "--out", tmp_path / "one")
    command(finished, *arguments, "--out", tmp_path / "two")
    for name in ("a_0.png", "a_1.png", "b_0.png", "b_1.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one/a_0.png").read_bytes() != (tmp_path / "one/a_1.png").read_bytes()


def test_python_paints_what_the_command_paints(finished, mask_file, tmp_path):
    command(finished, "sample", "--mask", mask_file, "--out", tmp_path, "--num", 2, "--seed", 5)
    pipeline = sisma_jax.load(finished[1])
    faces = pipeline(images.read_mask_file(mask_file), key=jax.random.key(5), num_samples=2)
    assert faces.shape == (2, 16, 16, 3)
    assert faces.dtype == np.uint8
    for number, face in enumerate(faces):
        np.testing.assert_array_equal(images.read_image_file(tmp_path / f"mask_{number}.png"), face)


def test_a_face_does_not_depend_on_how_many_are_painted(finished):
    pipeline = sisma_jax.load(finished[1])
    mask = draw_face(np.random.default_rng(0), 16)[1]
    many = pipeline(np.stack([mask] * 3), key=jax.random.key(0), num_samples=2).astype(int)  # two batches of four
    few = pipeline(mask, key=jax.random.key(0), num_samples=2).astype(int)
    assert np.abs(many[:2] - few).max() <= 1  # rounding in another order


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be positive"),
        ({"steps": 0}, "steps must be positive"),
        ({"guidance": -1.0}, "guidance must be non-negative"),
        ({"solver": "rk4"}, "solver must be one of 'euler'"),
        ({"shift": 0.0}, "shift must be in"),
        ({"guidance_low": 0.7, "guidance_high": 0.2}, "guidance_high must be in"),
        ({"guidance_rescale": -1.0}, "guidance_rescale must be in"),
        ({"mask": np.full((16, 16), 23)}, "label 23 is outside 0..18"),
        ({"mask": np.zeros((16, 16, 16, 16), int)}, r"want \(H, W\) or \(B, H, W\)"),
        ({"mask": np.zeros((16, 16))}, "a mask holds integer class indices"),
    ],
)
def test_the_pipeline_refuses_nonsense(finished, arguments, message):
    pipeline = sisma_jax.load(finished[1])
    with pytest.raises(sisma_jax.InputError, match=message):
        pipeline(**({"mask": np.zeros((16, 16), int), "key": jax.random.key(0)} | arguments))


def test_an_unknown_key_is_refused_with_the_nearest(capsys, finished):
    assert "--model.d_state" in refused(capsys, finished, "--model.dstate=3")


def test_a_wrong_type_is_refused(capsys, finished):
    assert "--model.d_state" in refused(capsys, finished, "--model.d_state=many")


def test_a_value_out_of_range_is_refused(capsys, finished):
    assert "--train.batch_size must be positive, got -1" in refused(capsys, finished, "--train.batch_size=-1")


def test_an_unknown_command_is_refused(capsys, finished):
    assert "Expected one of" in refused(capsys, finished, "trian")


def test_a_missing_configuration_is_refused(capsys, finished, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        run.main(["--config", str(tmp_path / "none.py")])
    assert exit_info.value.code == 2
    assert "none.py is not a Python file" in capsys.readouterr().err


def test_a_label_outside_the_classes_is_refused(capsys, finished, tmp_path):
    path = tmp_path / "odd.png"
    path.write_bytes(images.encode_png(np.full((16, 16), 23, np.uint8)))
    message = refused(capsys, finished, "sample", "--mask", path)
    assert "odd.png" in message
    assert "label 23 is outside 0..18" in message


@pytest.mark.parametrize("keep", [0, 40])
def test_a_truncated_mask_is_refused(capsys, finished, mask_file, keep):
    mask_file.write_bytes(mask_file.read_bytes()[:keep])
    assert "mask.png" in refused(capsys, finished, "sample", "--mask", mask_file)


def test_a_missing_mask_and_an_empty_folder_are_refused(capsys, finished, tmp_path):
    assert "absent.png does not exist" in refused(capsys, finished, "sample", "--mask", tmp_path / "absent.png")
    assert "holds no image" in refused(capsys, finished, "sample", "--mask", tmp_path)


def test_sampling_without_a_run_is_refused_and_makes_none(capsys, finished, mask_file, tmp_path):
    message = refused(capsys, finished, "sample", "--mask", mask_file, workdir=tmp_path / "none")
    assert "holds no run" in message
    assert not (tmp_path / "none").exists()


def test_the_workdir_of_another_configuration_is_refused(capsys, finished):
    for name in ("all", "evaluate"):
        message = refused(capsys, finished, name, "--model.d_state=2")
        assert "--model.d_state: the run has 4, given 2" in message


def test_damaged_checkpoints_are_stepped_over_and_all_damaged_is_refused(capsys, finished, mask_file, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[1], workdir)

    def damage(step):
        files = [path for path in (workdir / "checkpoints" / step / "ema").rglob("*") if path.is_file()]
        for path in files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    damage("4")
    command(finished, "sample", "--mask", mask_file, "--out", tmp_path / "out", workdir=workdir)
    assert "checkpoint of step 4 is damaged" in capsys.readouterr().err
    assert (tmp_path / "out/mask_0.png").exists()
    damage("2")
    message = refused(capsys, finished, "sample", "--mask", mask_file, workdir=workdir)
    assert "None of the checkpoints" in message


def test_a_missing_data_folder_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        run.main(
            [
                "--config",
                str(ROOT / "configs/celebamask_sample.py"),
                "prepare",
                f"--data.root={tmp_path / 'nowhere'}",
                f"--data.cache_dir={tmp_path}",
            ]
        )
    assert exit_info.value.code == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused(capsys, finished, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, finished, "train", workdir=tmp_path / "file" / "run")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_every_configuration_of_the_project_loads(path):
    assert run.parse(["--config", str(path)]).command == "all"
