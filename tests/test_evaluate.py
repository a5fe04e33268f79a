"""The command `evaluate`: of runs, of exported files, of folders of images, and of evaluations side by side."""

import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest

from sisma_jax.commands import evaluate
from sisma_jax.data import photos
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face
from sisma_jax.evaluation import results
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs import parser_file
from sisma_jax.runs.folder import EvaluationFolder
from sisma_jax.runs.metrics import read_metrics
from tests.command_line import command, refused


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_result_names_all_that_the_values_depend_on(finished):
    out = EvaluationFolder(finished[1])
    evaluation = results.read(out.result)
    protocol = evaluation["protocol"]
    assert evaluation["subject"]["kind"] == "run"
    assert evaluation["subject"]["parameters"] > 0
    assert (protocol["num_masks"], protocol["diversity_masks"], protocol["samples_per_mask"]) == (6, 6, 4)
    assert protocol["sampling"]["seed"] == 0
    assert protocol["resize"] == {"parser": "area-16"}
    assert set(evaluation["networks"]) == {"parser"}
    assert {"jax", "numpy", "python", "platform"} <= set(evaluation["versions"])
    assert set(evaluation["not_computed"]) == {"fid", "fd_vgg16", "lpips_distance"}
    assert "pt_inception-2015-12-05-6726825d.pth" in evaluation["not_computed"]["fid"]
    scores = results.flat_scores(evaluation)
    assert {"miou", "pixel_accuracy", "fd_parser", "parser_precision", "pixel_diversity"} <= set(scores)
    assert all(score["low"] <= score["value"] <= score["high"] for score in scores.values())
    terms = results.read_terms(out.terms)
    assert len(terms["ids"]) == len(terms["confusion"]) == len(terms["features_parser"]) == 6
    assert b"<html" in out.report.read_bytes()
    (faces,) = [folder for folder in out.cache.glob("faces_*") if len(list(folder.iterdir())) == 6][:1]
    assert photos.read_image_file(faces / f"{terms['ids'][0]}.png").shape == (16, 16, 3)


def test_an_exported_file_is_measured_like_its_run(finished, tmp_path):
    file = tmp_path / "model.safetensors"
    command(finished, "export", "--out", file)
    command(finished, "evaluate", "--weights", file, "--out", tmp_path / "out")
    of_file, of_run = (results.read(EvaluationFolder(path).result) for path in (tmp_path / "out", finished[1]))
    assert of_file["subject"]["kind"] == "exported"
    assert of_file["subject"]["checksum"] == of_run["subject"]["checksum"]
    assert of_file["held_out_loss"] is None
    for part in ("mask_agreement", "distances", "diversity", "memorization", "protocol"):
        assert of_file[part] == of_run[part]


def test_an_interrupted_evaluation_continues_in_its_folder(finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    sampled, paint = [], Pipeline.__call__

    def count(trained, mask, **options):
        sampled.append(len(mask))
        return paint(trained, mask, **options)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "__call__", count)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure_faces", interrupt)
        with pytest.raises(SystemExit):
            command(finished, "evaluate", workdir=run)
    assert sum(sampled) == 6 * 4
    # A face that is gone is sampled again, alone with its batch, and the others are not.
    faces = next((run / "evaluations/0001/evaluation_cache").glob("faces_*"))
    gone = sorted(faces.iterdir())[0]
    before = gone.read_bytes()
    gone.unlink()
    command(finished, "evaluate", workdir=run)
    assert sum(sampled) <= 6 * 4 + 6
    assert gone.read_bytes() == before
    assert sorted(os.listdir(run / "evaluations")) == ["0001"]
    again, whole = (results.read(EvaluationFolder(path).result) for path in (run / "evaluations/0001", finished[1]))
    assert again == whole | {"subject": again["subject"]}
    command(finished, "evaluate", workdir=run)
    assert sorted(os.listdir(run / "evaluations")) == ["0001", "0002"]


def test_the_faces_do_not_depend_on_the_size_of_batches(finished, tmp_path):
    command(finished, "evaluate", "--out", tmp_path / "out", "--sample.batch_size=24")
    one, other = (results.read_terms(EvaluationFolder(path).terms) for path in (tmp_path / "out", finished[1]))
    np.testing.assert_allclose(one["features_parser"], other["features_parser"], atol=1e-3)


def test_a_run_without_a_face_parser_is_evaluated_without_agreement(capsys, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    (run / "parser.safetensors").unlink()
    command(finished, "evaluate", "--out", tmp_path / "out", workdir=run)
    assert "Not computed: miou. There is no face parser" in capsys.readouterr().out
    evaluation = results.read(tmp_path / "out/evaluation.json")
    assert evaluation["mask_agreement"] is None
    assert evaluation["distances"] == []
    assert evaluation["diversity"]["pixel_diversity"]["value"] > 0
    command(finished, "parser", workdir=run)
    assert "Face parser, held-out images" in capsys.readouterr().out
    trained, before = (parser_file.load(folder / "parser.safetensors", CELEBAMASK_HQ) for folder in (run, finished[1]))
    jax.tree.map(np.testing.assert_array_equal, trained.params, before.params)


@pytest.fixture
def folders(tmp_path):
    """Two folders of eight images of 16 and 17 px, and the masks of the first."""
    for name, first in (("samples", 0), ("references", 100)):
        (tmp_path / name).mkdir()
        for number in range(8):
            image, mask = draw_face((0, first + number), 16 + number % 2)
            (tmp_path / name / f"{number}.png").write_bytes(photos.encode_png(image))
            if name == "samples":
                (tmp_path / "masks").mkdir(exist_ok=True)
                (tmp_path / f"masks/{number}.png").write_bytes(photos.encode_png(mask))
    return "--samples", tmp_path / "samples", "--references", tmp_path / "references"


def test_two_folders_of_images_are_compared(finished, folders, tmp_path, capsys):
    command(finished, "evaluate", *folders, "--out", tmp_path / "out")
    assert "8 samples and 8 real images, by the features of the network parser" in capsys.readouterr().out
    evaluation = results.read(tmp_path / "out/evaluation.json")
    (distances,) = evaluation["distances"]
    score = distances["scores"]["fd_parser"]
    assert 0 < score["low"] <= score["value"] <= score["high"]
    assert evaluation["subject"]["path"] == str(tmp_path / "samples")
    assert evaluation["mask_agreement"] is None
    assert b"<html" in (tmp_path / "out/report.html").read_bytes()
    assert "exists already" in refused(capsys, finished, "evaluate", *folders, "--out", tmp_path / "out")
    assert "Give both --samples and --references" in refused(capsys, finished, "evaluate", *folders[:2])
    assert "--masks and --paired apply to two folders" in refused(capsys, finished, "evaluate", "--paired")
    (tmp_path / "inception.pth").write_text("text")
    named = ("--evaluate.inception", tmp_path / "inception.pth")
    assert "inception.pth cannot be read as weights of PyTorch" in refused(
        capsys, finished, "evaluate", *folders, *named
    )
    # No run is needed where the file of a face parser is named.
    weights = ("--parser.weights", finished[1] / "parser.safetensors", "--out", tmp_path / "again")
    command(finished, "evaluate", *folders, *weights, workdir=tmp_path / "no_run")
    assert results.read(tmp_path / "again/evaluation.json")["distances"] == evaluation["distances"]


def test_folders_with_masks_and_pairs_have_agreement_and_reconstruction(finished, folders, tmp_path, capsys):
    named = ("--masks", tmp_path / "masks", "--paired", "--out", tmp_path / "out")
    command(finished, "evaluate", *folders, *named)
    evaluation = results.read(tmp_path / "out/evaluation.json")
    assert 0 <= evaluation["mask_agreement"]["samples"]["pixel_accuracy"]["value"] <= 1
    assert evaluation["mask_agreement"]["ceiling"] is None
    assert set(evaluation["reconstruction"]) == {"psnr", "ssim"}
    shutil.copytree(tmp_path / "samples", tmp_path / "copies")
    command(
        finished, "evaluate", *folders[:2], "--references", tmp_path / "copies", "--paired", "--out", tmp_path / "same"
    )
    same = results.read(tmp_path / "same/evaluation.json")["reconstruction"]
    assert same["psnr"]["value"] == 100
    assert same["ssim"]["value"] == pytest.approx(1)
    (tmp_path / "references/3.png").unlink()
    assert "has no image for 1 of 8 images" in refused(capsys, finished, "evaluate", *folders, "--paired")
    (tmp_path / "masks/3.png").unlink()
    assert "has no mask for 1 of 8 images" in refused(capsys, finished, "evaluate", *folders, *named[:2])


def test_a_users_own_features_give_a_distance_of_their_name(finished, folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "def colors(images):\n    return images.mean(axis=(1, 2))\n\n\ndef wrong(images):\n    return images\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ("--evaluate.extractors", "mine:colors")
    command(finished, "evaluate", *folders, *own, "--out", tmp_path / "out", workdir=tmp_path / "no_run")
    evaluation = results.read(tmp_path / "out/evaluation.json")
    assert [one["network"] for one in evaluation["distances"]] == ["colors"]
    assert "fd_colors" in results.flat_scores(evaluation)
    assert len(evaluation["networks"]["colors"]) == 16
    for name, message in (
        ("mine", "is not of the form PACKAGE.MODULE:FUNCTION"),
        ("absent_module:f", "absent_module cannot be imported"),
        ("mine:absent", "mine has no function absent"),
        ("mine:wrong", "mine:wrong returned shape"),
    ):
        assert message in refused(capsys, finished, "evaluate", *folders, "--evaluate.extractors", name)
    sys.modules.pop("mine")


def test_runs_are_shown_side_by_side_with_paired_tests(finished, tmp_path, capsys):
    other = tmp_path / "other"
    command(finished, "evaluate", "--sample.seed=5", "--out", other)
    capsys.readouterr()
    command(finished, "evaluate", "--runs", finished[1], other)
    shown = capsys.readouterr().out
    first, second = (results.flat_scores(results.read(EvaluationFolder(path).result)) for path in (finished[1], other))
    for name in ("miou", "fd_parser", "pixel_diversity"):
        row = next(line for line in shown.splitlines() if line.startswith(name))
        assert f"{first[name]['value']:.4f} [" in row
        assert f"{second[name]['value']:.4f} [" in row
    tests = shown[shown.index("minus") :]
    # mIoU, accuracy, fd_parser, precision, recall, density, coverage, held-out loss and diversity
    assert tests.count("p = ") == 9
    command(finished, "evaluate", "--runs", finished[1], finished[1])
    same = capsys.readouterr().out
    assert same.count("+0.0000 [+0.0000, +0.0000]  p = 1.0000") == 9


def test_what_cannot_be_compared_is_refused(finished, tmp_path, capsys):
    assert "--runs needs at least two folders" in refused(capsys, finished, "evaluate", "--runs", finished[1])
    assert "has no evaluation" in refused(capsys, finished, "evaluate", "--runs", finished[1], tmp_path)
    command(finished, "evaluate", "--evaluate.num_samples=7", "--out", tmp_path / "more")
    message = refused(capsys, finished, "evaluate", "--runs", finished[1], tmp_path / "more")
    assert "were evaluated on different images: num_masks: 6 | 7" in message
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "more", damaged)
    (damaged / "evaluation.json").write_text(json.dumps({"step": 4}))
    assert "has format 1, not 2" in refused(capsys, finished, "evaluate", "--runs", finished[1], damaged)


def test_a_protocol_that_does_not_fit_is_refused_before_sampling(finished, capsys):
    message = refused(capsys, finished, "evaluate", "--evaluate.protocol=sdm")
    assert "--evaluate.protocol sdm needs 2000 test masks, and the test split has 8" in message


def test_what_evaluation_needs_is_checked_before_training(capsys, finished, tmp_path):
    gone = tmp_path / "gone.pth"
    for name in ("parser.weights", "evaluate.inception", "evaluate.vgg16", "evaluate.lpips"):
        assert "gone.pth" in refused(capsys, finished, f"--{name}", gone, workdir=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_evaluation_during_training_ranks_checkpoints(finished, tmp_path, capsys):
    run = tmp_path / "run"
    ranked = ("--evaluate.every_steps=2", "--train.best=fd_parser")
    command(finished, "train", *ranked, workdir=run)
    measured = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if "miou" in line}
    assert set(measured) == {2, 4}
    assert all(np.isfinite([line["miou"], line["fd_parser"]]).all() for line in measured.values())
    command(finished, "evaluate", "--checkpoint=best", *ranked, "--out", tmp_path / "out", workdir=run)
    evaluation = results.read(tmp_path / "out/evaluation.json")
    best = min(measured, key=lambda step: measured[step]["fd_parser"])
    assert evaluation["subject"]["step"] == best
    # The same faces as those of the command.
    assert evaluation["distances"][0]["scores"]["fd_parser"]["value"] == pytest.approx(
        measured[best]["fd_parser"], rel=1e-3
    )
    assert "--evaluate.every_steps 3 is not a multiple" in refused(
        capsys, finished, "train", "--evaluate.every_steps=3", workdir=run
    )
    assert "--train.best miou needs evaluations during training" in refused(
        capsys, finished, "train", "--train.best=miou", workdir=run
    )
