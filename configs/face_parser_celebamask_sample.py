"""A face parser of real faces at 128 px, from a few thousand images and label maps of CelebAMask-HQ.

Cost: about 50 minutes on 2 CPU cores. Run:
    python run.py --config configs/face_parser_celebamask_sample.py parser --data.root=FOLDER
where FOLDER contains images/ID.jpg and labels/ID.png, or is the official download. Other runs use the result with
--parser.weights=runs/face_parser_celebamask_sample/parser.safetensors.
"""

from sisma_jax.config import Config, DataConfig, EvaluateConfig, ParserConfig, TrainConfig


def get_config() -> Config:
    """Returns the configuration of a face parser of real faces."""
    return Config(
        data=DataConfig(name="celebamask_hq", root="celebamask_sample", image_size=128, num_test=300),
        parser=ParserConfig(num_steps=5000),
        train=TrainConfig(log_every_steps=50),
        evaluate=EvaluateConfig(num_samples=300),
    )
