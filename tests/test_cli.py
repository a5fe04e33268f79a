"""The command line from end to end, and what it says to wrong input: one message, exit code 2, no traceback."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

import sisma_jax
from sisma_jax import cli
from sisma_jax.commands.train import All, Train
from sisma_jax.data import photos
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.masks import read_mask_file
from sisma_jax.models.factory import init_params
from sisma_jax.runs.metrics import read_metrics
from tests.command_line import command, refused
from tests.edits import write_edit

ROOT = Path(__file__).parents[1]


def test_the_whole_job_leaves_all_that_it_promises(finished):
    _, folder = finished
    for name in ("config.json", "metrics.jsonl", "loss.png", "evaluation.json", "samples/grid_0000004.png"):
        assert (folder / name).stat().st_size > 0
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["subject"]["step"] == 4
    assert np.isfinite(report["held_out_loss"]["value"])
    assert {"samples", "ceiling", "floor"} <= set(report["mask_agreement"])
    (distances,) = report["distances"]
    assert distances["num_samples"] == distances["num_references"] == 6
    assert report["memorization"]["num_training_images"] == 24
    # 6 held-out masks, each with 4 samples and its original.
    grid = cv2.imread(str(folder / "samples/grid_0000004.png"))
    assert grid.shape[0] >= 6 * 128
    assert grid.shape[1] >= 6 * 128


def test_the_whole_latent_way_is_one_command(tmp_path, mask_file, capsys):
    file = tmp_path / "latent.py"
    file.write_text(
        "from pathlib import Path\nfrom tests.tiny import tiny_latent_config\n\n\n"
        f"def get_config():\n    return tiny_latent_config(Path({str(tmp_path / 'data')!r}))\n"
    )
    latent = file, tmp_path / "run"
    command(latent)
    printed = capsys.readouterr().out
    for wanted in ("PSNR of reconstructed test images", "Latents: ", "Sample grid"):
        assert wanted in printed
    for name in ("autoencoder/config.json", "samples/reconstructions.png", "samples/grid_0000004.png"):
        assert (latent[1] / name).stat().st_size > 0
    command(latent, "sample", "--mask", mask_file, "--num", 2)
    assert cv2.imread(str(latent[1] / "samples/0001/mask_1.png")).shape == (16, 16, 3)
    # An edit goes through the encoder too, and keeps what it must.
    photo = tmp_path / "photo.png"
    photo.write_bytes(photos.encode_png(draw_face(np.random.default_rng(3), 32)[0]))
    region = np.zeros((32, 32), np.uint8)
    region[8:16, 8:16] = 255
    (tmp_path / "region.png").write_bytes(photos.encode_png(region))
    edit = ("--image", photo, "--region", tmp_path / "region.png", "--margin", 0)
    command(latent, "sample", "--mask", mask_file, "--num", 1, *edit)
    edited = photos.read_image_file(latent[1] / "samples/0002/mask_0.png")
    np.testing.assert_array_equal(edited[region == 0], photos.read_image_file(photo)[region == 0])


def test_there_is_no_autoencoder_of_pixels_to_prepare(finished, capsys):
    assert "--autoencoder.kind is identity" in refused(capsys, finished, "autoencoder")


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
    faces = pipeline(read_mask_file(mask_file, CELEBAMASK_HQ), key=jax.random.key(5), num_samples=2)
    assert faces.shape == (2, 16, 16, 3)
    assert faces.dtype == np.uint8
    for number, face in enumerate(faces):
        np.testing.assert_array_equal(photos.read_image_file(tmp_path / f"mask_{number}.png"), face)


def test_a_face_does_not_depend_on_how_many_are_painted(finished):
    pipeline = sisma_jax.load(finished[1])
    mask = draw_face(np.random.default_rng(0), 16)[1]
    many = pipeline(np.stack([mask] * 3), key=jax.random.key(0), num_samples=2).astype(int)  # two batches of four
    few = pipeline(mask, key=jax.random.key(0), num_samples=2).astype(int)
    assert np.abs(many[:2] - few).max() <= 1  # rounding in another order


def test_a_seed_gives_a_mask_the_same_face_alone_and_in_a_folder(finished, mask_file, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    shutil.copy(mask_file, folder / "b.png")
    (folder / "a.png").write_bytes(photos.encode_png(np.zeros((48, 32), np.uint8)))  # another size
    command(finished, "sample", "--mask", folder, "--num", 2, "--out", tmp_path / "many")
    command(finished, "sample", "--mask", mask_file, "--num", 2, "--out", tmp_path / "one")
    for number in range(2):
        together, alone = (
            photos.read_image_file(tmp_path / name).astype(int)
            for name in (f"many/b_{number}.png", f"one/mask_{number}.png")
        )
        assert np.abs(together - alone).max() <= 1  # rounding in another order


def test_photographs_that_cannot_be_segmented_are_refused(capsys, finished, tmp_path, mask_file):
    missing = refused(capsys, finished, "segment", "--image", tmp_path / "absent.jpg")
    assert "absent.jpg does not exist; name a file or a folder of photographs" in missing
    (tmp_path / "text.jpg").write_text("text")
    assert "text.jpg cannot be" in refused(capsys, finished, "segment", "--image", tmp_path / "text.jpg")
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    (run / "parser.safetensors").unlink()
    no_parser = refused(capsys, finished, "segment", "--image", mask_file, workdir=run)
    assert "has no face parser; the command `parser` trains one" in no_parser
    with pytest.raises(sisma_jax.InputError, match="there is no face parser; train one"):
        sisma_jax.load(run).segment(np.zeros((8, 8, 3), np.uint8))
    weights = ("--parser.weights", finished[1] / "parser.safetensors", "--out", tmp_path / "out")
    command(finished, "segment", "--image", mask_file, *weights, workdir=run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
        ({"steps": 0}, "steps must be positive"),
        ({"guidance": -1.0}, r"guidance must be in \[0, 100\]"),
        ({"solver": "rk4"}, "solver must be one of 'euler'"),
        ({"shift": 0.0}, "shift must be in"),
        ({"guidance_low": 0.7, "guidance_high": 0.2}, "guidance_high must be in"),
        ({"guidance_rescale": -1.0}, "guidance_rescale must be in"),
        ({"mask": np.full((16, 16), 23)}, "label 23 is outside 0..18"),
        ({"mask": np.zeros((16, 16, 16, 16), int)}, r"mask has shape \(16, 16, 16, 16\); wanted is"),
        ({"mask": np.zeros((16, 16))}, "mask has dtype float64"),
    ],
)
def test_the_pipeline_refuses_nonsense(finished, arguments, message):
    pipeline = sisma_jax.load(finished[1])
    with pytest.raises(sisma_jax.InputError, match=message):
        pipeline(**({"mask": np.zeros((16, 16), int), "key": jax.random.key(0)} | arguments))


def test_an_edit_without_the_images_mask_guesses_it(finished, tmp_path, capsys):
    files, photo, _ = write_edit(tmp_path)
    sample = ("sample", "--image", files["photo"], "--mask", files["edited"], "--num", 1)
    command(finished, *sample, "--out", tmp_path / "run")
    assert "a rough guess" in capsys.readouterr().err
    assert photos.read_image_file(tmp_path / "run/edited_0.png").shape == photo.shape
    command(finished, "export", "--out", tmp_path / "tiny.safetensors")  # has the face parser, too
    cli.main([*map(str, (*sample, "--weights", tmp_path / "tiny.safetensors", "--out", tmp_path / "file"))])
    assert (tmp_path / "file/edited_0.png").read_bytes() == (tmp_path / "run/edited_0.png").read_bytes()


def test_an_exported_file_paints_what_the_run_paints(finished, mask_file, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    command(finished, "export", "--out", file)
    assert f"Parameters of step 4: {file}" in capsys.readouterr().out
    sample = ("sample", "--mask", mask_file, "--num", 1)
    command(finished, *sample, "--out", tmp_path / "run")
    command(finished, *sample, "--out", tmp_path / "file", "--weights", file, workdir=tmp_path / "absent")
    names = [tmp_path / name / "mask_0.png" for name in ("run", "file")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert not (tmp_path / "absent").exists()
    assert "must end in .safetensors" in refused(capsys, finished, "export", "--out", tmp_path / "model.bin")


def test_a_checkpoint_is_named_by_its_step_or_as_the_best(finished, mask_file, tmp_path, capsys):
    command(finished, "export", "--checkpoint", 2, "--out", tmp_path / "two.safetensors")
    assert sisma_jax.load(tmp_path / "two.safetensors").step == 2
    held_out = {line["step"]: line["held_out_loss"] for line in read_metrics(finished[1] / "metrics.jsonl")[1::2]}
    assert sisma_jax.load(finished[1], checkpoint="best").step == min(held_out, key=held_out.get)
    message = refused(capsys, finished, "sample", "--mask", mask_file, "--checkpoint", 3)
    assert "no checkpoint of step 3" in message
    assert "it has the steps 2, 4" in message


def test_a_plan_is_printed_and_written_and_needs_no_run(finished, tmp_path, capsys):
    command(finished, "plan", "--topology", "cpu:8", "--memory_gib", 1, "--no-search", workdir=tmp_path / "plan")
    printed = capsys.readouterr().out
    assert f"Plan: {tmp_path / 'plan' / 'plan_cpu-8.json'}" in printed
    report = json.loads((tmp_path / "plan" / "plan_cpu-8.json").read_text())
    assert report["num_devices"] == 8
    assert report["train"]["fits"]
    assert f"{report['num_parameters']:,}" in printed
    assert not (tmp_path / "plan" / "config.json").exists()
    assert "pluto" in refused(capsys, finished, "plan", "--topology", "pluto:2x2", workdir=tmp_path / "plan")


def test_an_unknown_key_is_refused_with_the_nearest(capsys, finished):
    assert "--model.d_state" in refused(capsys, finished, "--model.dstate=3")


def test_a_wrong_type_is_refused(capsys, finished):
    assert "--model.d_state" in refused(capsys, finished, "--model.d_state=many")


def test_a_value_out_of_range_is_refused(capsys, finished):
    assert "--train.batch_size must be positive, got -1" in refused(capsys, finished, "--train.batch_size=-1")


def test_an_unknown_command_is_refused(capsys, finished):
    assert "Available subcommands: all, prepare" in refused(capsys, finished, "trian")


def test_a_missing_configuration_is_refused(capsys, finished, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--config", str(tmp_path / "none.py")])
    assert exit_info.value.code == 2
    assert "none.py is not a Python file" in capsys.readouterr().err


def test_a_label_outside_the_classes_is_refused(capsys, finished, tmp_path):
    path = tmp_path / "odd.png"
    path.write_bytes(photos.encode_png(np.full((16, 16), 23, np.uint8)))
    message = refused(capsys, finished, "sample", "--mask", path)
    assert "odd.png" in message
    assert "label 23 is outside 0..18" in message


@pytest.mark.parametrize("keep", [0, 40])
def test_a_truncated_mask_is_refused(capsys, finished, mask_file, keep):
    mask_file.write_bytes(mask_file.read_bytes()[:keep])
    assert "mask.png" in refused(capsys, finished, "sample", "--mask", mask_file)


def test_a_missing_mask_and_an_empty_folder_are_refused(capsys, finished, tmp_path):
    assert "absent.png does not exist" in refused(capsys, finished, "sample", "--mask", tmp_path / "absent.png")
    assert "holds no mask" in refused(capsys, finished, "sample", "--mask", tmp_path)


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
        cli.main(
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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--mesh.fsdp=3", "does not divide the 8 devices"),
        ("--train.batch_size=12", "--train.batch_size 12 is not a multiple of the 8 devices"),
        ("--train.init_from=absent.safetensors", "There is no file absent.safetensors"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_data_are_prepared(capsys, finished, tmp_path, argument, message):
    arguments = ("train", argument, f"--data.cache_dir={tmp_path / 'data'}")
    assert message in refused(capsys, finished, *arguments, workdir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(capsys, finished, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, finished, "train", workdir=tmp_path / "file" / "run")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_every_configuration_of_the_project_loads_and_is_a_model(path):
    parsed = cli.parse(["--config", str(path)])
    assert parsed.command == All()
    shapes = jax.eval_shape(functools.partial(init_params, parsed.settings), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) > 100_000


def contents(folder) -> dict[str, tuple[int, bytes]]:
    """Returns the time of the last change and the bytes of every file of a folder, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_commands_that_read_leave_the_run_as_it_is_and_their_values_count(finished, mask_file, tmp_path):
    before = contents(finished[1])
    sample = ("sample", "--mask", mask_file, "--num", 1)
    command(finished, *sample, "--out", tmp_path / "default")
    command(finished, *sample, "--out", tmp_path / "long", "--sample.seed=9")
    command(finished, *sample, "--out", tmp_path / "short", "--seed", 9)
    command(finished, "evaluate", "--out", tmp_path / "evaluation", "--sample.seed=9")
    command(finished, "export", "--out", tmp_path / "model.safetensors", "--sample.seed=9")
    assert contents(finished[1]) == before
    images = {name: (tmp_path / name / "mask_0.png").read_bytes() for name in ("default", "long", "short")}
    assert images["long"] == images["short"] != images["default"]
    assert sisma_jax.load(tmp_path / "model.safetensors").config.sample.seed == 9
    assert json.loads((tmp_path / "evaluation/evaluation.json").read_text())["subject"]["step"] == 4
    assert (tmp_path / "evaluation/samples/grid_0000004.png").exists()


def test_results_without_a_folder_of_their_own_are_numbered(finished, mask_file, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[1], workdir)
    before = contents(workdir)
    for seed in (1, 2):
        command(finished, "sample", "--mask", mask_file, "--num", 1, "--seed", seed, workdir=workdir)
    command(finished, "evaluate", workdir=workdir)
    first, second = (workdir / f"samples/000{number}/mask_0.png" for number in (1, 2))
    assert first.read_bytes() != second.read_bytes()
    assert (workdir / "evaluations/0001/evaluation.json").exists()
    assert contents(workdir).items() >= before.items()


def test_images_that_exist_are_kept_until_told_otherwise(capsys, finished, mask_file, tmp_path):
    out = mask_file.parent
    theirs = out / "mask_0.png"
    theirs.write_bytes(b"somebody's own")
    sample = ("sample", "--mask", mask_file, "--out", out, "--num", 1)
    message = refused(capsys, finished, *sample)
    assert f"{theirs} exists already" in message
    assert "--overwrite" in message
    assert theirs.read_bytes() == b"somebody's own"
    assert not (out / "grid.png").exists()
    command(finished, *sample, "--overwrite")
    assert photos.read_image_file(theirs).shape == (16, 16, 3)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"somebody's own")
    assert f"{file} exists already" in refused(capsys, finished, "export", "--out", file)
    assert file.read_bytes() == b"somebody's own"


@pytest.mark.parametrize("other", ["mask.PNG", "mask.webp", "Mask.png"])
def test_masks_whose_images_would_have_one_name_have_one_each(capsys, finished, mask_file, tmp_path, other):
    folder = tmp_path / "masks"
    folder.mkdir()
    Image.open(mask_file).save(folder / other, "WEBP" if other.endswith("webp") else "PNG", lossless=True)
    shutil.copy(mask_file, folder / "mask.png")
    command(finished, "sample", "--mask", folder, "--num", 1, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*_0.png"))) == 2


def test_a_folder_that_a_failed_command_made_is_removed(capsys, finished, mask_file, tmp_path):
    refused(capsys, finished, "sample", "--mask", mask_file, "--checkpoint", 3, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    message = refused(capsys, finished, "sample", "--mask", mask_file, "--out", tmp_path / "file/out")
    assert "name another with --out" in message


def test_an_exported_file_is_sampled_with_the_settings_that_are_given(capsys, finished, mask_file, tmp_path):
    file = tmp_path / "model.safetensors"
    command(finished, "export", "--out", file)

    def sampled(name, *arguments):
        given = ("sample", "--weights", file, "--mask", mask_file, "--num", 1, "--out", tmp_path / name)
        cli.main(list(map(str, (*given, *arguments))))
        return (tmp_path / name / "mask_0.png").read_bytes()

    default = sampled("default")
    assert sampled("seed", "--sample.seed=9") == sampled("short", "--seed", 9) != default
    assert sampled("steps", "--sample.steps=7") == sampled("short_steps", "--steps=7") != default
    message = refused(capsys, finished, "sample", "--weights", file, "--mask", mask_file, "--model.depth=9")
    assert "--model.depth: the run has 1, given 9" in message


def test_a_run_can_be_used_without_its_configuration_file(capsys, finished, mask_file, tmp_path):
    cli.main(["sample", "--workdir", str(finished[1]), "--mask", str(mask_file), "--num=1", f"--out={tmp_path / 'a'}"])
    command(finished, "sample", "--mask", mask_file, "--num", 1, "--out", tmp_path / "b")
    assert (tmp_path / "a/mask_0.png").read_bytes() == (tmp_path / "b/mask_0.png").read_bytes()
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train"])
    assert exit_info.value.code == 2
    assert "name one with --config, or the folder of a run with --workdir" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_refused_in_one_line(capsys, finished, mask_file, tmp_path):
    values = json.loads((finished[1] / "config.json").read_text())
    del values["version"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    for name in ("sample", "train"):
        arguments = ("--mask", mask_file) if name == "sample" else ()
        with pytest.raises(SystemExit) as exit_info:
            command(finished, name, *arguments, workdir=tmp_path / "run")
        assert exit_info.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is of version 1 of the configuration" in line


def test_the_value_of_an_option_is_no_command(finished):
    for arguments in (["train", "--workdir", "sample"], ["--workdir", "sample", "train"]):
        parsed = cli.parse(["--config", str(finished[0]), *arguments])
        assert parsed.command == Train()
        assert parsed.run_folder == Path("sample")


def test_a_configuration_file_that_cannot_be_run_is_refused_by_its_line(capsys, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("from sisma_jax.config import *\nx = (\n")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--config", str(path)])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"Error: {path}, line 2: '(' was never closed.\n"


def test_the_home_is_expanded_in_every_path(finished, mask_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(finished[1], tmp_path / "run")
    shutil.copy(finished[0], tmp_path / "tiny.py")
    arguments = ["--config=~/tiny.py", "sample", "--workdir=~/run", "--mask=~/mask.png", "--num=1", "--out=~/o"]
    cli.main(arguments)
    assert (tmp_path / "o/mask_0.png").exists()
    assert sisma_jax.load("~/run").step == 4
    cli.main(["--workdir=~/run", "export", "--out=~/m.safetensors"])
    assert sisma_jax.load("~/m.safetensors").step == 4


@pytest.mark.parametrize("reader", ["true", "head -1"])
def test_a_reader_that_leaves_early_is_no_error(reader):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} run.py --help | {reader}; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")  # as it was done, or had more to write


def test_flags_stand_where_the_library_names_arguments():
    message = "data.num_test 5 and `image_mask` of run/data.root/x, `nothing`, --data.root"
    assert cli.with_flags(message) == "--data.num_test 5 and --image_mask of run/data.root/x, `nothing`, --data.root"


def test_only_the_command_line_speaks_of_flags():
    for path in (ROOT / "sisma_jax").rglob("*.py"):
        if path.name != "cli.py":
            # Flags of XLA, and custom properties of CSS (--name: value), are no flags of the command line.
            assert not re.search(r"(?<![\w-])--(?!xla)[a-z][\w-]*(?![\w-]|:)", path.read_text()), path


def test_x64_changes_neither_parameters_nor_faces(finished, mask_file, tmp_path):
    """A process of its own, in which JAX starts with 64 bits."""
    command(finished, "sample", "--mask", mask_file, "--num", 1, "--out", tmp_path / "float32")
    program = (
        "import sys, jax, numpy as np, sisma_jax\n"
        "from sisma_jax.data import photos\n"
        "from sisma_jax.data.masks import read_mask_file\n"
        "pipe = sisma_jax.load(sys.argv[1])\n"
        "assert jax.config.jax_enable_x64\n"
        "assert {x.dtype.name for x in jax.tree.leaves(pipe.params)} == {'float32'}\n"
        "mask = read_mask_file(sys.argv[2], pipe.config.data.classes)\n"
        "(face,) = pipe(mask, key=jax.random.key(0))\n"
        "wanted = photos.read_image_file(sys.argv[3])\n"
        "print(np.abs(face.astype(int) - wanted).max())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, finished[1], mask_file, tmp_path / "float32/mask_0.png"],
        cwd=ROOT,
        env=os.environ | {"JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1  # rounding in another order


def test_a_face_parser_that_is_gone_does_not_keep_a_run_from_sampling(capsys, finished, mask_file, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    gone = ("--parser.weights", tmp_path / "gone.safetensors")
    command(finished, "sample", "--mask", mask_file, "--num", 1, "--out", tmp_path / "out", *gone, workdir=run)
    assert (tmp_path / "out/mask_0.png").exists()
    assert "gone.safetensors: no such file" in refused(capsys, finished, "segment", "--image", mask_file, *gone)
