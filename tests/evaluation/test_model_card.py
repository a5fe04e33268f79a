import dataclasses
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from sisma_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.evaluation.model_card import write_model_card
from sisma_jax.evaluation.tables import metric_groups
from tests.evaluation.example_evaluation import example_evaluation, folders_evaluation, score

HOSTILE = "<script>`a|b`</script> \"x\": 'é名' # \\ {y}\n\x85\u2028- z"


def card(tmp_path, evaluation=None, config=None) -> tuple[dict, str]:
    """Returns the header and the Markdown of the card."""
    path = tmp_path / "model_card.md"
    write_model_card(path, example_evaluation() if evaluation is None else evaluation, config or Config())
    empty, header, body = re.split(r"^---\n", path.read_text(encoding="utf-8"), maxsplit=2, flags=re.M)
    assert empty == ""
    return yaml.safe_load(header), body


def tokens(body):
    """Returns all tokens of Markdown, those inside of paragraphs and cells included."""
    blocks = MarkdownIt("commonmark").enable("table").parse(body)
    return [token for block in blocks for token in (block, *(block.children or []))]


def headings(body):
    found = tokens(body)
    return [found[i + 1].content for i, token in enumerate(found) if token.type == "heading_open"]


def test_a_card_has_the_parts_of_the_hub(tmp_path):
    header, body = card(tmp_path)
    assert header["library_name"] == "sisma_jax"
    assert header["pipeline_tag"] == "image-to-image"
    assert "license" not in header  # the author's to state
    assert "arxiv:2509.17651" in header["tags"]
    assert headings(body) == [
        "celebamask\\_sample",
        "Intended use and limits",
        "Training data",
        "Training procedure",
        "Evaluation",
        "Intersection over union by class",
        "Not computed",
        "Protocol",
        "How to use",
        "Citation",
    ]
    for text in ("impersonate", "2509.17651", "33,412,611 parameters", "step 40,000", "`crc32:9f1c2a77`"):
        assert text in body
    assert "<https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-" in body


def test_results_are_those_of_the_evaluation(tmp_path):
    evaluation = example_evaluation()
    header, body = card(tmp_path, evaluation)
    (model,) = header["model-index"]
    (result,) = model["results"]
    assert model["name"] == "celebamask_sample"
    assert result["task"]["type"] == "image-to-image"
    assert result["dataset"] == {"name": "celebamask_hq", "type": "celebamask_hq", "split": "test"}
    rows = [row for group in metric_groups(evaluation) for row in group.rows]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        (row.name, row.number) for row in rows
    ]
    table = body.split("## Evaluation\n")[1].split("###")[0]
    lines = [line.split(" | ") for line in table.splitlines() if re.match(r"\| (?!Metric|---)", line)]
    assert [(value, interval.strip()) for _, value, interval, _ in lines] == [(row.value, row.interval) for row in rows]


@pytest.mark.parametrize("value", [1e-05, 2.5e-07, 1e16, 1.5e300, 0.0, -3.0])
def test_numbers_are_numbers_in_yaml(tmp_path, value):
    header, _ = card(tmp_path, example_evaluation(diversity={"lpips_diversity": score(value, 0.0)}))
    metrics = {metric["type"]: metric["value"] for metric in header["model-index"][0]["results"][0]["metrics"]}
    assert type(metrics["lpips_diversity"]) is float
    assert metrics["lpips_diversity"] == value


def test_names_of_users_are_text_in_yaml_and_markdown(tmp_path):
    plain = example_evaluation()
    classes = dataclasses.replace(CELEBAMASK_HQ, title=HOSTILE, names=(HOSTILE, *CELEBAMASK_HQ.names[1:]))
    config = Config(data=DataConfig(name="celebamask_hq", root="faces", classes=classes))
    for scores in ("samples", "ceiling", "floor"):
        plain["mask_agreement"][scores]["iou_per_class"] = {HOSTILE: score(0.5, 0.1)}
    evaluation = plain | {
        "subject": plain["subject"] | {"kind": "exported", "path": HOSTILE},
        "protocol": plain["protocol"] | {"data": HOSTILE, "references": HOSTILE, "sampling": {HOSTILE: HOSTILE}},
        "networks": {HOSTILE: HOSTILE},
        "diversity": {HOSTILE: score(0.5, 0.1)},
        "not_computed": {HOSTILE: HOSTILE},
    }
    header, body = card(tmp_path, evaluation, config)
    result = header["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == HOSTILE
    assert HOSTILE in {metric["name"] for metric in result["metrics"]}
    found = tokens(body)
    assert not {token.type for token in found} & {"html_block", "html_inline"}
    _, plain_body = card(tmp_path)
    assert len(headings(body)) == len(headings(plain_body))
    codes = [token.content for token in found if token.type == "code_inline"]
    assert any("<script>`a|b`</script>" in code for code in codes)
    (program,) = [token.content for token in found if token.type == "fence" and token.info == "python"]
    compile(program, "card", "exec")


def test_settings_are_those_of_the_configuration(tmp_path):
    config = Config(model=ModelConfig(depth=7, d_model=96), optim=OptimConfig(learning_rate=3e-4, decay_steps=999))
    _, body = card(tmp_path, config=config)
    for line in ("| Blocks | `7` |", "| Width (d_model) | `96` |", "| Learning rate | `0.0003` |"):
        assert line in body
    assert "| Cosine decay ends at step | `999` |" in body
    assert "Cosine decay" not in card(tmp_path)[1]
    assert "show no real people" in body
    real = Config(data=DataConfig(name="celebamask_hq", root="faces"))
    assert "non-commercial research only" in card(tmp_path, config=real)[1]


def test_what_was_not_computed_is_left_out(tmp_path):
    nothing = {"mask_agreement": None, "memorization": None, "distances": [], "diversity": {}, "paired": {}}
    evaluation = example_evaluation(**nothing, reconstruction={}, held_out_loss=None, not_computed={})
    header, body = card(tmp_path, evaluation)
    assert "model-index" not in header
    assert not {"Not computed", "Intersection over union by class"} & set(headings(body))
    evaluation = example_evaluation()
    evaluation["mask_agreement"]["floor"] = None
    assert "| Class | Samples | Ceiling |\n" in card(tmp_path, evaluation)[1]


def test_the_example_loads_the_exported_file(tmp_path):
    exported = example_evaluation()["subject"] | {"kind": "exported", "path": "models/small faces.safetensors"}
    header, body = card(tmp_path, example_evaluation(subject=exported))
    assert 'sisma_jax.load("small faces.safetensors")' in body
    assert header["model-index"][0]["name"] == "small faces"


def test_two_folders_have_no_model_card(tmp_path):
    with pytest.raises(ValueError, match="two folders"):
        card(tmp_path, folders_evaluation())
