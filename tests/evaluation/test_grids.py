import cv2
import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.evaluation import grids
from sisma_jax.evaluation.grids import HEADER_HEIGHT, SEPARATOR

COUNT, SAMPLES, HEIGHT, WIDTH = 3, 2, 10, 16


def sample_grid(*images, **options):
    return grids.sample_grid(*images, classes=CELEBAMASK_HQ, **options)


@pytest.fixture
def faces():
    generator = np.random.default_rng(0)
    masks = generator.integers(0, len(CELEBAMASK_HQ), (COUNT, HEIGHT, WIDTH)).astype(np.uint8)
    samples = generator.integers(0, 255, (COUNT, SAMPLES, HEIGHT, WIDTH, 3)).astype(np.uint8)
    originals = generator.integers(0, 255, (COUNT, HEIGHT, WIDTH, 3)).astype(np.uint8)
    return masks, samples, originals


def cell(grid, row, column, scale):
    top = HEADER_HEIGHT + SEPARATOR + row * (scale * HEIGHT + SEPARATOR)
    left = SEPARATOR + column * (scale * WIDTH + SEPARATOR)
    return grid[top : top + scale * HEIGHT, left : left + scale * WIDTH]


@pytest.mark.parametrize("scale", [1, 3])
def test_cells_are_mask_samples_original(faces, scale):
    masks, samples, originals = faces
    grid = sample_grid(masks, samples, originals, scale=scale)
    assert grid.dtype == np.uint8
    for row in range(COUNT):
        expected = [CELEBAMASK_HQ.colorize(masks[row]), *samples[row], originals[row]]
        for column, image in enumerate(expected):
            shown = cell(grid, row, column, scale)
            for offset in range(scale):
                np.testing.assert_array_equal(shown[offset::scale, offset::scale], image)


def test_everything_between_the_cells_is_white(faces):
    masks, samples, originals = faces
    grid = sample_grid(masks, samples, originals, scale=2)
    for row in range(COUNT):
        for column in range(SAMPLES + 2):
            cell(grid, row, column, 2)[:] = 255
    assert (grid[HEADER_HEIGHT:] == 255).all()
    assert grid.shape == (
        HEADER_HEIGHT + SEPARATOR + COUNT * (2 * HEIGHT + SEPARATOR),
        SEPARATOR + (SAMPLES + 2) * (2 * WIDTH + SEPARATOR),
        3,
    )


def test_the_header_titles_the_mask_the_samples_and_the_original(faces):
    grid = sample_grid(*faces, scale=4)
    column_step = 4 * WIDTH + SEPARATOR
    has_ink = [(grid[:HEADER_HEIGHT, j * column_step : (j + 1) * column_step] < 128).any() for j in range(SAMPLES + 2)]
    assert has_ink == [True, True, False, True]


def test_without_originals_there_is_no_column_for_them(faces):
    masks, samples, originals = faces
    narrow = sample_grid(masks, samples, None, scale=2)
    wide = sample_grid(masks, samples, originals, scale=2)
    np.testing.assert_array_equal(narrow, wide[:, : narrow.shape[1]])
    assert wide.shape[1] - narrow.shape[1] == 2 * WIDTH + SEPARATOR


def test_images_that_do_not_belong_to_the_masks_are_refused(faces):
    masks, samples, originals = faces
    with pytest.raises(ValueError, match="samples must be"):
        sample_grid(masks, samples[:1], originals)
    with pytest.raises(ValueError, match="samples must be"):
        sample_grid(masks, samples[:, :0], originals)
    with pytest.raises(ValueError, match="originals must be"):
        sample_grid(masks, samples, originals[:, :-1])
    with pytest.raises(ValueError, match="scale"):
        sample_grid(masks, samples, originals, scale=0)


def test_a_saved_picture_reads_back_the_same(faces, tmp_path):
    _, _, originals = faces
    path = tmp_path / "face.png"
    grids.save_png(path, originals[1])
    grids.save_png(path, originals[0])
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], originals[0])
    assert list(tmp_path.iterdir()) == [path]


def curve(path, metrics):
    grids.loss_curve(metrics, path)
    picture = cv2.imread(str(path))
    assert picture is not None
    return picture


def test_the_loss_curve_is_a_picture_with_both_losses(tmp_path):
    steps = range(0, 1000, 10)
    metrics = [{"step": step, "loss": 1.0 / (1 + step)} for step in steps]
    alone = curve(tmp_path / "loss.png", metrics)
    both = curve(tmp_path / "both.png", [*metrics, {"step": 500, "held_out_loss": 0.5}])
    assert alone.shape == both.shape
    assert (alone != both).any()


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 10, "images_per_sec": 5.0}],
        [{"step": 10, "loss": 1.0}],
        [{"step": 10, "loss": float("nan")}, {"step": 20, "loss": float("inf")}],
        [{"step": step, "loss": float("nan") if step == 30 else 1.0} for step in range(100)],
    ],
    ids=["empty", "no_loss", "one_point", "nothing_finite", "one_nan"],
)
def test_the_loss_curve_can_be_drawn_from_any_metrics(tmp_path, metrics):
    assert curve(tmp_path / "loss.png", metrics).shape[2] == 3
