"""An evaluation with every part, and images of drawn faces, for tests of what is made from it."""

from typing import Any

import cv2
import numpy as np

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face
from sisma_jax.evaluation.report import Pictures
from sisma_jax.evaluation.results import FORMAT, Evaluation, Score


def score(value: float, reach: float) -> Score:
    return {"value": value, "low": value - reach, "high": value + reach, "level": 0.95}


def example_evaluation(**parts: Any) -> Evaluation:
    """Returns an evaluation of a run; `parts` replace its own."""
    generator = np.random.default_rng(0)
    ious = {
        name: float(value) for name, value in zip(CELEBAMASK_HQ.names, generator.uniform(0.2, 0.9, 19), strict=True)
    }
    absent = {"necklace": None, "ear_ring": None}

    def agreement(miou: float, accuracy: float, factor: float) -> dict[str, Any]:
        of_classes = {name: min(1.0, iou * factor) for name, iou in ious.items()}
        return {
            "miou": score(miou, 0.012),
            "pixel_accuracy": score(accuracy, 0.006),
            "iou_per_class": {name: score(iou, 0.02) for name, iou in of_classes.items()} | absent,
        }

    evaluation = {
        "format": FORMAT,
        "subject": {
            "kind": "run",
            "path": "runs/celebamask_sample",
            "step": 40_000,
            "parameters": 33_412_611,
            "checksum": "crc32:9f1c2a77",
        },
        "protocol": {
            "name": "sdm",
            "data": "celebamask_hq",
            "data_fingerprint": "0c5d1f2e88",
            "num_masks": 2000,
            "num_references": 2000,
            "references": "the originals of the masks",
            "image_size": 64,
            "diversity_masks": 100,
            "samples_per_mask": 10,
            "sampling": {"steps": 25, "solver": "euler", "guidance": 1.5, "shift": 1.0, "seed": 0},
            "resize": {"inception": "pytorch-fid"},
        },
        "networks": {"parser": "crc32:1b2c3d4e", "vgg16": "sha256:9b50f1c2"},
        "versions": {"python": "3.11.9", "platform": "cpu", "sisma_jax": "0.1.0", "jax": "0.10.2", "numpy": "2.4.6"},
        "held_out_loss": score(0.1874, 0.002),
        "mask_agreement": {
            "num_images": 2000,
            "samples": agreement(0.5231, 0.9012, 1.0),
            "ceiling": agreement(0.6127, 0.9384, 1.2),
            "floor": agreement(0.2318, 0.7406, 0.4),
        },
        "distances": [
            {
                "network": network,
                "num_samples": 2000,
                "num_references": 2000,
                "scores": {
                    f"fd_{network}": score(frechet, 0.4),
                    "kernel_distance": score(0.00412, 0.0004),
                    "precision": score(0.713, 0.02),
                    "recall": score(0.482, 0.02),
                    "density": score(0.934, 0.03),
                    "coverage": score(0.801, 0.02),
                },
                "kernel_spread": 0.00038,
            }
            for network, frechet in (("parser", 8.713), ("vgg16", 21.42))
        ],
        "diversity": {"lpips_diversity": score(0.2874, 0.004)},
        "paired": {"lpips_distance": score(0.4312, 0.005)},
        "reconstruction": {"psnr": score(27.31, 0.1), "ssim": score(0.8412, 0.003)},
        "memorization": {
            "samples": score(12.41, 0.2),
            "held_out": score(12.93, 0.2),
            "ratio": score(0.9598, 0.02),
            "num_training_images": 5000,
        },
        "not_computed": {
            "fid": "evaluate.inception names no weights of Inception-v3; download "
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth."
        },
    }
    return evaluation | parts  # pyright: ignore[reportReturnType] the keys are those of an Evaluation


def folders_evaluation() -> Evaluation:
    """Returns a comparison of two folders, which has neither masks nor a model."""
    protocol = example_evaluation()["protocol"] | {
        "name": "",
        "data": "photos/real",
        "num_masks": 0,
        "image_size": 0,
        "diversity_masks": 0,
        "samples_per_mask": 0,
        "sampling": {},
    }
    return example_evaluation(
        subject={"kind": "folders", "path": "photos/sampled", "checksum": "5f0e8d"},
        protocol=protocol,
        held_out_loss=None,
        mask_agreement=None,
        diversity={},
        paired={},
        reconstruction={},
        memorization=None,
    )


def example_pictures(size: int) -> Pictures:
    """Returns drawn faces with their masks; noise makes samples of them.

    Args:
      size: height and width in pixels; faces of more than 128 pixels are enlarged, since drawing them takes long.
    """
    faces = [draw_face((0, index), min(size, 128)) for index in range(12)]
    images = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image, _ in faces])
    masks = np.stack([cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST) for _, mask in faces])
    noise = np.random.default_rng(0).normal(0, 6, (4, 1, *images.shape[1:]))
    samples = np.clip(images + noise, 0, 255).astype(np.uint8).swapaxes(0, 1)
    predicted = masks.copy()
    predicted[:, : size // 4] = 0
    return Pictures(
        masks=masks[:8],
        samples=samples[:8],
        originals=images[:8],
        neighbour_samples=samples[:6, 0],
        neighbours=np.stack([images[[(i + j) % 12 for j in range(1, 4)]] for i in range(6)]),
        neighbour_distances=np.linspace(9, 14, 18).reshape(6, 3),
        worst_masks=masks[4:10],
        worst_samples=samples[4:10, 0],
        worst_predicted=predicted[4:10],
        worst_originals=images[4:10],
        worst_accuracies=np.linspace(0.61, 0.78, 6),
    )


def example_metrics() -> list[dict[str, int | float]]:
    """Returns the lines of a training of 40,000 steps."""
    generator = np.random.default_rng(0)
    lines: list[dict[str, int | float]] = []
    for step in range(50, 40_001, 50):
        loss = 0.18 + 0.9 * float(np.exp(-step / 900)) + 0.05 * float(np.exp(-step / 9000))
        lines.append({"step": step, "loss": loss + float(generator.normal(0, 0.015)), "images_per_sec": 50.0})
        if step % 4000 == 0:
            lines[-1] |= {"held_out_loss": loss + 0.008, "fd_parser": 8 + 120_000 / step, "miou": 0.53 - 600 / step}
    return lines
