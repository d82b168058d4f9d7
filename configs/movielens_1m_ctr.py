"""MovieLens-1M, liked or not, first 80 % by time for training: the zoo's CTR models."""

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs import movielens_1m
from qianmo.configs.base import base_config

UNITS = (256, 128, 64)
MODELS: dict[str, dict[str, Any]] = {
    "lr": {},
    "mlp": {"units": UNITS},
    "wdl": {"units": UNITS},
    "deepfm": {"units": UNITS},
    "dcn": {"num_cross_layers": 2, "projection_dim": 32, "units": UNITS},
    "xdeepfm": {"cin_units": (64, 64), "cin_activation": "relu", "units": UNITS},
}


def get_config(model: str = "deepfm") -> ConfigDict:
    """The recipe of one model; see MODELS."""
    config = base_config()
    config.schema = movielens_1m.schema()
    config.data.train = "runs/movielens_1m/train.parquet"
    config.data.test = "runs/movielens_1m/test.parquet"
    config.model = {"name": model, **MODELS[model], "embedding_l2": 3e-3}
    config.data.shuffle_rows = 2**20  # all of them, which lie in the file by time
    config.train.batch_size = 2048
    config.train.epochs = 2
    return config
