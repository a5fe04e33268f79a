"""Photographs as people have them: edited anywhere and at any depth, and segmented, with one exported file."""

from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

import sisma_jax
from sisma_jax import cli
from sisma_jax.data import photos
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.data.masks import read_mask_file
from sisma_jax.data.photo_files import Photo, read_photo, save_photo
from tests.data.test_location_prior import in_order_of
from tests.edits import write_edit
from tests.export_tiny import export_tiny


@pytest.fixture(scope="module")
def weights_with_prior(tmp_path_factory) -> Path:
    prior = LocationPrior.fit([draw_face((0, i), 64)[1] for i in range(100)], CELEBAMASK_HQ)
    file = tmp_path_factory.mktemp("weights") / "faces.safetensors"
    export_tiny(file, prior)
    return file


@pytest.fixture
def edit(tmp_path):
    return write_edit(tmp_path)


def command(weights: Path, *arguments: object) -> None:
    cli.main([*map(str, arguments), "--weights", str(weights)])


def refused(capsys, weights: Path, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        command(weights, *arguments)
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return " ".join(errors.split())


@pytest.mark.parametrize("given", ["before", "region"])
def test_an_edit_keeps_every_pixel_beyond_the_margin(weights, edit, tmp_path, given):
    files, photo, changed = edit
    option = {"before": "--image_mask", "region": "--region"}[given]
    arguments = ("sample", "--image", files["photo"], "--mask", files["edited"], option, files[given], "--num", 2)
    command(weights, *arguments, "--out", tmp_path / "strict", "--margin", 0)
    command(weights, *arguments, "--out", tmp_path / "blended", "--margin", 1)
    for number in range(2):
        strict, blended = (
            photos.read_image_file(tmp_path / name / f"edited_{number}.png") for name in ("strict", "blended")
        )
        np.testing.assert_array_equal(strict[~changed], photo[~changed])
        assert (strict[changed] != photo[changed]).mean() > 0.5
        # A pixel of the model is four of the photograph.
        near = cv2.dilate(changed.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=8).astype(bool)
        np.testing.assert_array_equal(blended[~near], photo[~near])
        assert (blended[near & ~changed] != photo[near & ~changed]).any()
    assert (tmp_path / "strict/grid.png").exists()


@pytest.mark.parametrize("place", [(0, 0), (20, 40), (0, 60)])
def test_an_edit_may_be_anywhere_in_a_photograph(weights, tmp_path, place, capsys):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (48, 96, 3), np.uint8)
    top, left = place
    region = np.zeros((48, 96), np.uint8)
    region[top : top + 20, left : left + 24] = 255
    for name, picture in {"photo": photo, "mask": region // 255, "region": region}.items():
        (tmp_path / f"{name}.png").write_bytes(photos.encode_png(picture))
    edit = ("--image", tmp_path / "photo.png", "--region", tmp_path / "region.png", "--margin", 0)
    command(weights, "sample", "--mask", tmp_path / "mask.png", "--num", 1, *edit, "--out", tmp_path / "out")
    assert "outside" not in capsys.readouterr().err
    edited = photos.read_image_file(tmp_path / "out/mask_0.png")
    np.testing.assert_array_equal(edited[region == 0], photo[region == 0])
    assert (edited[region > 0] != photo[region > 0]).mean() > 0.5


def test_an_edit_keeps_alpha_depth_and_profile(weights, edit, tmp_path):
    files, photo, changed = edit
    rng = np.random.default_rng(0)
    deep = photo.astype(np.uint16) * 257 + rng.integers(0, 100, photo.shape, np.uint16) * (photo < 255)
    alpha = rng.integers(0, 65536, photo.shape[:2], np.uint16)
    before = Photo(deep, alpha, b"sixteen bytes 16RGB and more")
    save_photo(tmp_path / "deep.png", before)
    edit = ("--image", tmp_path / "deep.png", "--region", files["region"], "--margin", 0)
    command(weights, "sample", "--mask", files["edited"], "--num", 1, *edit, "--out", tmp_path / "out")
    after = read_photo(tmp_path / "out/edited_0.png")
    assert after.icc_profile == before.icc_profile
    np.testing.assert_array_equal(after.alpha, alpha)
    np.testing.assert_array_equal(after.pixels[~changed], deep[~changed])
    assert (after.pixels[changed] != deep[changed]).mean() > 0.5
    assert (after.pixels[changed] % 257 == 0).all()  # 8 bits were generated


def test_masks_of_photographs_are_written_and_accepted(weights, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    scene = np.random.default_rng(0).integers(90, 110, (300, 400, 3), np.uint8)
    scene[60:260, 150:350] = draw_face((0, 1), 200)[0]
    (folder / "holiday.png").write_bytes(photos.encode_png(scene))
    (folder / "portrait.jpg").write_bytes(photos.encode_jpeg(draw_face((0, 2), 64)[0]))
    (folder / "notes.txt").write_text("no photograph")
    command(weights, "segment", "--image", folder, "--out", tmp_path / "masks")
    printed = capsys.readouterr()
    assert "1 entries are left out, which are no photograph files: notes.txt" in printed.err
    assert f"Masks of 2 faces: {tmp_path / 'masks'}" in printed.out
    masks = {path.stem: path for path in (tmp_path / "masks").iterdir()}
    assert sorted(masks) == ["grid", "holiday", "holiday_photo", "portrait"]
    square, whole, portrait = (
        read_mask_file(masks[n], CELEBAMASK_HQ) for n in ("holiday", "holiday_photo", "portrait")
    )
    assert square.shape[0] == square.shape[1] < 300
    assert whole.shape == (300, 400)
    assert portrait.shape == (64, 64)
    pipeline = sisma_jax.load(weights)
    np.testing.assert_array_equal(pipeline.segment(scene), square)
    np.testing.assert_array_equal(pipeline.segment(scene, whole=True), whole)
    assert pipeline(square, key=jax.random.key(0), classes="celebamask_hq").shape == (1, 16, 16, 3)
    edited = np.where(whole > 0, (whole + 1) % 19, 0).astype(np.uint8)
    (tmp_path / "edited.png").write_bytes(photos.encode_png(edited))
    edit = ("--image", folder / "holiday.png", "--image_mask", masks["holiday_photo"], "--num", 1)
    named = ("--mask_classes", "celebamask_hq")  # an untrained parser's masks have the classes anywhere
    command(weights, "sample", "--mask", tmp_path / "edited.png", *edit, *named, "--out", tmp_path / "edit")
    assert photos.read_image_file(tmp_path / "edit/edited_0.png").shape == scene.shape
    assert "exists already" in refused(capsys, weights, "segment", "--image", folder, "--out", tmp_path / "masks")


def test_an_edit_of_a_picture_that_is_not_square(weights):
    pipeline = sisma_jax.load(weights)
    photo = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    region = np.zeros((10, 14), bool)
    region[3:6, 5:9] = True
    mask = np.zeros((10, 14), int)
    edits = pipeline.edit(photo, np.stack([mask, mask + 1]), key=jax.random.key(0), region=region, margin=0)
    kept = ~np.kron(region, np.ones((4, 4), bool))
    assert edits.shape == (2, 40, 56, 3)
    np.testing.assert_array_equal(edits[:, kept], np.stack([photo[kept]] * 2))
    assert (edits[0][~kept] != edits[1][~kept]).any()


def test_edits_that_cannot_be_made_are_refused(capsys, weights, edit):
    files, *_ = edit
    sample = ("sample", "--mask", files["edited"])
    assert "name the photograph with --image" in refused(capsys, weights, *sample, "--region", files["region"])
    editing = (*sample, "--image", files["photo"])
    nothing = refused(capsys, weights, *editing, "--image_mask", files["edited"])
    assert "nothing to generate" in nothing
    assert f"Error: {files['edited']}: " in nothing
    both = ("--image_mask", files["before"], "--region", files["region"])
    assert "either image_mask" in refused(capsys, weights, *editing, *both)
    assert "margin must be" in refused(capsys, weights, *editing, *both[:2], "--margin", -1)
    assert "absent.png cannot be read" in refused(capsys, weights, *sample, "--image", "absent.png")
    pipeline, mask = sisma_jax.load(weights), np.zeros((8, 8), int)
    with pytest.raises(sisma_jax.InputError, match="image_mask \\(4, 4\\); they must have one size"):
        pipeline.edit(np.zeros((8, 8, 3), np.uint8), mask, key=jax.random.key(0), image_mask=mask[:4, :4])
    with pytest.raises(sisma_jax.InputError, match="image must be uint8 or uint16"):
        pipeline.edit(np.zeros((8, 8, 3)), mask, key=jax.random.key(0), image_mask=mask)
    with pytest.raises(sisma_jax.InputError, match="give one key, or 2 keys, one for each face"):
        pipeline(np.stack([mask] * 2), key=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        pipeline(mask, key=jax.random.key(0), step=3)


def test_an_edit_may_be_in_another_order_of_classes(weights_with_prior, edit, tmp_path):
    """Both masks are converted alike, left and right included, so that only the change is generated."""
    files, photo, changed = edit
    lapa = ClassSet.load("lapa")
    for name in ("before", "edited"):
        mask = read_mask_file(files[name], CELEBAMASK_HQ)
        viewers = in_order_of(CELEBAMASK_HQ.exchange_sides(mask), lapa)  # left is the viewer's
        files[name].write_bytes(photos.encode_png(viewers))
    given = ("--image", files["photo"], "--image_mask", files["before"], "--mask_classes", "lapa", "--margin", 0)
    command(weights_with_prior, "sample", "--mask", files["edited"], "--num", 1, *given, "--out", tmp_path / "out")
    edited = photos.read_image_file(tmp_path / "out/edited_0.png")
    np.testing.assert_array_equal(edited[~changed], photo[~changed])


def test_a_mask_of_a_whole_photograph_is_judged_where_its_face_is(weights_with_prior, caplog):
    """In the central square of this photograph, the face would lie where no face does."""
    scene = np.random.default_rng(0).integers(90, 110, (256, 640, 3), np.uint8)
    mask = np.zeros((256, 640), np.uint8)
    scene[28:228, 420:620], mask[28:228, 420:620] = draw_face((0, 1), 200)
    edited = mask.copy()
    edited[60:80, 480:560] = CELEBAMASK_HQ.index["hair"]
    pipe = sisma_jax.load(weights_with_prior)
    result = pipe.edit(scene, edited, image_mask=mask, key=jax.random.key(0), margin=0)[0]
    assert not caplog.text
    np.testing.assert_array_equal(result[mask == edited], scene[mask == edited])
    other = in_order_of(np.stack([edited, mask]), ClassSet.load("face_parsing_pytorch"))
    with pytest.raises(sisma_jax.InputError, match="its classes lie where those of"):
        pipe.edit(scene, other[0], image_mask=other[1], key=jax.random.key(0))
