"""MovieLens-1M likes of known films alone: a model that new films are added to.

Rows as `qianmo-prepare --dataset=movielens_1m --split=new_items` makes them; new films get their
vectors from `python -m qianmo.pipelines.cold_items`.
"""

from ml_collections import ConfigDict

from qianmo.configs import movielens_1m
from qianmo.configs.base import base_config

ROWS = "runs/movielens_1m_new_items"


def get_config() -> ConfigDict:
    """The recipe."""
    config = base_config()
    config.schema = movielens_1m.schema()
    config.data.train = f"{ROWS}/train.parquet"
    config.data.test = f"{ROWS}/test.parquet"
    config.model = {"name": "deepfm", "units": (128, 64), "embedding_l2": 3e-3}
    config.data.shuffle_rows = 2**20
    config.train.batch_size = 2048
    config.train.epochs = 2
    return config
