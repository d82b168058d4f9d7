"""KuaiRand clicks: a dual DNN whose teacher has a CIN."""

from ml_collections import ConfigDict

from qianmo.configs import kuairand
from qianmo.configs.base import base_config


def get_config(variant: str = "dual") -> ConfigDict:
    """The recipe. Variants: dual, student_alone, teacher_alone."""
    config = base_config()
    config.schema = kuairand.schema()
    for part in ("train", "valid", "test"):
        config.data[part] = f"runs/kuairand/{part}.parquet"
    teacher = {
        "interactions": {"cin": {"units": (32, 32), "activation": "relu"}},
        "teacher_units": (128, 64),
    }
    config.model = {
        "dual": {
            "name": "dual_dnn",
            **teacher,
            "student_units": (64, 32),
            "kd_weight": 5.0,
            "distance": "probability_mse",
            "hint_weight": 0.0,
            "embedding_l2": 3e-2,
        },
        "student_alone": {"name": "dual_dnn", "student_units": (64, 32), "embedding_l2": 3e-2},
        "teacher_alone": {"name": "teacher_alone", **teacher, "embedding_l2": 3e-2},
    }[variant]
    config.train.batch_size = 512
    config.train.optimizer.learning_rate = 5e-4
    config.train.table_optimizer.learning_rate = 5e-4
    return config
