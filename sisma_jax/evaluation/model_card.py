"""The model card of an evaluated model, in the form of the Hugging Face Hub: Markdown with a YAML header.

All results are those of the evaluation, and all settings are those of the configuration. What neither knows, such as
the licence of the weights, is left to the author.
"""

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from sisma_jax.config import Config
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.evaluation.results import Evaluation
from sisma_jax.evaluation.tables import (
    LINK,
    format_number,
    interval_title,
    label_of,
    metric_groups,
    protocol_rows,
    provenance_rows,
)
from sisma_jax.files import AnyPath, write_atomically

_TAGS = ("jax", "flax", "mamba", "flow-matching", "semantic-image-synthesis", "face-generation", "arxiv:2509.17651")
_TASK = "image-to-image"
_EXPORTED = "faces.safetensors"
_ARROWS = {"higher": " ↑", "lower": " ↓", "near 1": " → 1", "": ""}

_USE = """\
## Intended use and limits

The model generates a face from a semantic mask, for research on conditional image synthesis. What it generates follows
its training data:

- It must not be used to impersonate people, to deceive, or to judge anyone by a face.
- People, poses, ages, skin tones and accessories that are rare in the training data are generated rarely or badly.
- A generated face may resemble a person in the training data. The memorization ratio of the evaluation says how near
  samples are to training images.
- Masks that differ from those of the training data, in their classes or in their framing of the face, give poor faces.
"""

_CITATION = """\
## Citation

The architecture is that of SISMA. This model was trained with an independent implementation of it, sisma_jax.

```bibtex
@article{sisma2025,
  author  = {Botti, Filippo and Ergasti, Alex and Fontanini, Tomaso and Ferrari, Claudio and Bertozzi, Massimo and
             Prati, Andrea},
  title   = {SISMA: Semantic Face Image Synthesis with Mamba},
  journal = {arXiv preprint arXiv:2509.17651},
  year    = {2025}
}
```
"""


def write_model_card(path: AnyPath, evaluation: Evaluation, config: Config) -> None:
    """Writes the model card of an evaluated model as a Markdown file, atomically.

    Args:
      path: of the file, on the disk or in a bucket.
      evaluation: of a run or of an exported file.
      config: of the model.

    Raises:
      ValueError: the evaluation is that of two folders, which have no model.
      OSError: the file cannot be written.
    """
    if evaluation["subject"]["kind"] == "folders":
        raise ValueError("evaluation is a comparison of two folders, and a model card describes a model.")
    parts = (
        _header(evaluation),
        _description(evaluation, config),
        _USE,
        _training_data(config),
        _training_procedure(config),
        _results(evaluation),
        _example(evaluation),
        _CITATION,
    )
    write_atomically(path, "\n".join(parts).encode("utf-8", "replace"))


def _name(evaluation: Evaluation) -> str:
    path = PurePosixPath(evaluation["subject"]["path"])
    return path.stem if evaluation["subject"]["kind"] == "exported" else path.name


def _quoted(text: str) -> str:
    """Returns a string as a double-quoted scalar of YAML."""

    def escaped(character: str) -> str:
        if character in '"\\':
            return f"\\{character}"
        return character if character.isprintable() else f"\\U{ord(character):08x}"

    return f'"{"".join(map(escaped, text))}"'


def _number(value: float) -> str:
    """Returns a number that every reader of YAML takes for one: version 1.1 needs a point before an exponent."""
    mantissa, exponent, rest = repr(float(value)).partition("e")
    return mantissa if not exponent else f"{mantissa if '.' in mantissa else f'{mantissa}.0'}e{rest}"


def _code(text: str) -> str:
    """Returns a text as it stands, in a code span of Markdown that may be in a table."""
    line = re.sub(r"\s+", " ", text).strip().replace("|", "\\|")
    if not line:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def _plain(text: str) -> str:
    """Returns a text in which Markdown finds no markup and no HTML."""
    line = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", line)


def _linked(text: str) -> str:
    """Returns a text without markup, in which addresses are links."""
    return "".join(f"<{part}>" if i % 2 else _plain(part) for i, part in enumerate(LINK.split(text)))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _header(evaluation: Evaluation) -> str:
    protocol = evaluation["protocol"]
    rows = [row for group in metric_groups(evaluation) for row in group.rows]
    lines = [
        "---",
        "library_name: sisma_jax",
        "# Add the licence of the weights, such as `license: cc-by-nc-4.0`, as the terms of the training data allow.",
        f"pipeline_tag: {_TASK}",
        "tags:",
        *(f"- {_quoted(tag)}" for tag in _TAGS),
    ]
    if rows:
        lines += [
            "model-index:",
            f"- name: {_quoted(_name(evaluation))}",
            "  results:",
            "  - task:",
            f"      type: {_TASK}",
            "      name: Semantic face image synthesis",
            "    dataset:",
            f"      name: {_quoted(protocol['data'])}",
            f"      type: {_quoted(protocol['data'])}",
            "      split: test",
            "    metrics:",
        ]
        for row in rows:
            lines += [
                f"    - type: {_quoted(row.name)}",
                f"      name: {_quoted(row.full_label)}",
                f"      value: {_number(row.number)}",
            ]
    return "\n".join([*lines, "---", ""])


def _description(evaluation: Evaluation, config: Config) -> str:
    subject, model = evaluation["subject"], config.model
    mixers = {"sisma": "Mamba blocks (Self-Mamba and Cross-Mamba)", "dit": "transformer blocks"}[model.backbone]
    space = "pixels" if config.autoencoder.kind == "identity" else "the latents of a KL autoencoder"
    size = config.data.image_size
    sentences = [
        f"A flow-matching model that generates a face of {size} × {size} pixels from a semantic mask of "
        f"{len(config.data.classes)} classes.",
        f"Its denoiser consists of {mixers} and works on {space}.",
        f"It has {subject['parameters']:,} parameters." if "parameters" in subject else "",
        f"These are the EMA parameters of step {subject['step']:,}." if "step" in subject else "",
        "It was trained with sisma_jax, an implementation of SISMA "
        "([arXiv 2509.17651](https://arxiv.org/abs/2509.17651)) in JAX.",
    ]
    return f"# {_plain(_name(evaluation))}\n\n{' '.join(filter(None, sentences))}\n"


def _training_data(config: Config) -> str:
    data = config.data
    if data.name == "synthetic_faces":
        text = (
            f"{data.num_train:,} drawn faces with exact masks. They show no real people, and the model generates drawn "
            "faces only."
        )
    elif data.classes == CELEBAMASK_HQ:
        text = (
            "Photographs of faces with masks of the classes of CelebAMask-HQ. CelebAMask-HQ itself "
            "([arXiv 1907.11922](https://arxiv.org/abs/1907.11922)) is for non-commercial research only, and so are "
            "models trained on it. It shows celebrities, so ages, skin tones and styles are represented unevenly."
        )
    else:
        text = (
            f"Photographs of faces with masks of {len(data.classes)} classes: "
            f"{', '.join(map(_code, data.classes.names))}. The terms of these photographs hold for the model too."
        )
    flipped = " Examples are mirrored at random." if data.flip else ""
    return f"## Training data\n\n{text}{flipped}\n"


def _training_procedure(config: Config) -> str:
    rows = [(label, _code(value)) for label, value in _settings(config) if value]
    return f"## Training procedure\n\n{_table(('Setting', 'Value'), rows)}\n"


def _settings(config: Config) -> Iterator[tuple[str, str]]:
    model, optim, train, flow = config.model, config.optim, config.train, config.flow
    yield "Blocks", str(model.depth)
    yield "Blocks per level of the U", ", ".join(map(str, model.level_depths))
    yield "Width (d_model)", str(model.d_model)
    yield "State dimension (d_state)", str(model.d_state) if model.backbone == "sisma" else ""
    yield "State-space model (mixer)", model.mixer if model.backbone == "sisma" else ""
    yield "Patch size", str(model.patch_size)
    yield "Conditioning on the mask", model.mask_conditioning
    if config.autoencoder.kind == "kl":
        yield "Autoencoder", config.autoencoder.weights or "trained by the run"
    yield "Prediction", flow.prediction
    yield "Mask dropout", f"{flow.mask_dropout:g}"
    yield "Training steps", f"{train.num_steps:,}"
    yield "Batch size", f"{train.batch_size:,}"
    yield "Optimizer", optim.name
    yield "Learning rate", f"{config.learning_rate:g}"
    yield "Warm-up steps", f"{optim.warmup_steps:,}"
    yield "Cosine decay ends at step", f"{optim.decay_steps:,}" if optim.decay_steps else ""
    yield "Weight decay", f"{optim.weight_decay:g}"
    yield "EMA decay", f"{optim.ema_decay:g}"
    yield "Compute dtype", train.compute_dtype
    yield "Seed", str(train.seed)


def _results(evaluation: Evaluation) -> str:
    groups = metric_groups(evaluation)
    rows = [
        (_plain(row.full_label) + _ARROWS[row.better], row.value, row.interval, _plain(row.meaning))
        for group in groups
        for row in group.rows
    ]
    parts = ["## Evaluation\n"]
    if rows:
        parts += ["Arrows point to better values.\n"]
        parts += [_table(("Metric", "Value", interval_title(evaluation), "Meaning"), rows) + "\n"]
    parts += _per_class(evaluation)
    if evaluation["not_computed"]:
        missing = [(_plain(label_of(name)), _linked(reason)) for name, reason in evaluation["not_computed"].items()]
        parts += ["### Not computed\n", _table(("Metric", "Reason"), missing) + "\n"]
    parts += ["### Protocol\n", "Evaluations with different protocols are not comparable.\n"]
    protocol = [
        (_plain(label), _code(value)) for label, value in (*protocol_rows(evaluation), *provenance_rows(evaluation))
    ]
    parts += [_table(("", ""), protocol) + "\n"]
    return "\n".join(parts)


def _per_class(evaluation: Evaluation) -> Iterator[str]:
    agreement = evaluation["mask_agreement"]
    if agreement is None:
        return
    named = {"Samples": agreement["samples"], "Ceiling": agreement["ceiling"], "Floor": agreement["floor"]}
    columns = {title: scores for title, scores in named.items() if scores is not None}
    rows = []
    for name in agreement["samples"]["iou_per_class"]:
        values = [scores["iou_per_class"].get(name) for scores in columns.values()]
        rows.append(
            (_code(name), *("–" if value is None else format_number(value["value"], like=1.0) for value in values))
        )
    yield "### Intersection over union by class\n"
    yield "Ceiling: the original photographs. Floor: samples with the masks of other faces.\n"
    yield _table(("Class", *columns), rows) + "\n"


def _example(evaluation: Evaluation) -> str:
    subject = evaluation["subject"]
    file = PurePosixPath(subject["path"]).name if subject["kind"] == "exported" else _EXPORTED
    return f"""\
## How to use

```python
import jax
import sisma_jax

pipe = sisma_jax.load({json.dumps(file, ensure_ascii=False)})  # the file that the command `export` wrote
faces = pipe(mask, key=jax.random.key(0), num_samples=4)  # mask: (H, W) class indices; faces: uint8 (4, S, S, 3)
```
"""
