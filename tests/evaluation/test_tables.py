import pytest

from sisma_jax.evaluation.explanations import explain
from sisma_jax.evaluation.results import flat_scores
from sisma_jax.evaluation.tables import format_number, interval_title, metric_groups, protocol_rows, provenance_rows
from tests.evaluation.example_evaluation import example_evaluation, folders_evaluation, score


def rows(evaluation):
    return {row.name: row for group in metric_groups(evaluation) for row in group.rows}


def test_every_value_of_an_evaluation_is_a_row_with_its_interval():
    evaluation = example_evaluation()
    found = rows(evaluation)
    scores = flat_scores(evaluation)
    assert set(found) == set(scores) | {"memorization_ratio"}
    for name, expected in scores.items():
        assert found[name].number == expected["value"]
        limits = [format_number(expected[limit], expected["value"]) for limit in ("low", "high")]
        assert found[name].interval == " – ".join(limits)
    assert "standard deviation over subsets of images is 0.00038" in found["vgg16_kernel_distance"].meaning
    assert "photographs reach 0.613, samples of other masks 0.232" in found["miou"].meaning


def test_every_metric_is_explained():
    for row in rows(example_evaluation()).values():
        assert row.meaning.endswith(".")
        assert row.better in ("higher", "lower", "near 1")
    assert explain("fid").label == "FID"
    assert explain("fd_dino").full_label == "Fréchet distance (dino)"
    assert explain("loss") is explain("images_per_sec") is None


def test_an_unknown_metric_keeps_its_name():
    row = rows(example_evaluation(diversity={"novelty": score(0.2, 0.1)}))["novelty"]
    assert (row.label, row.meaning, row.better) == ("novelty", "", "")


def test_parts_that_were_not_computed_have_no_rows():
    assert {group.title for group in metric_groups(folders_evaluation())} == {
        "Distance to real images in the features of the face parser",
        "Distance to real images in the features of VGG16",
    }
    assert metric_groups(folders_evaluation() | {"distances": []}) == []
    labels = dict(protocol_rows(folders_evaluation()) + provenance_rows(folders_evaluation()))
    assert not {"Step", "Parameters", "Image size", "Sampling", "Held-out masks, one sample each"} & set(labels)


def test_intervals_of_different_levels_state_their_level():
    evaluation = example_evaluation(diversity={"lpips_diversity": score(0.2, 0.1) | {"level": 0.9}})
    assert interval_title(evaluation) == "Interval"
    assert rows(evaluation)["lpips_diversity"].interval == "0.100 – 0.300 (90%)"
    assert interval_title(example_evaluation()) == "95 % interval"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (0.09996, "0.100"),
        (0.0412, "0.0412"),
        (-0.000123, "-0.000123"),
        (0.5, "0.500"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (12345.6, "12,346"),
        (1e-12, "0.000000000"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_about_three_digits(value, text):
    assert format_number(value) == text


def test_a_limit_has_the_decimals_of_its_value():
    assert format_number(9.5, like=10.2) == "9.50"
