"""MovieLens-1M, random split, one pass: a dual DNN and its relatives on the same data."""

from ml_collections import ConfigDict

from qianmo.configs import movielens_1m
from qianmo.configs.base import base_config

DUAL = {"kd_weight": 5.0, "distance": "probability_mse"}
VARIANTS = {
    "teacher_alone": {},
    "student_alone": {},
    "shared": {"kd_weight": 0.0},
    "soft_labels": {"kd_weight": 1.0, "distance": "soft_labels"},
    "logit_mse": {"kd_weight": 1.0, "distance": "logit_mse"},
    "dual": DUAL,
    "hints": {"kd_weight": 0.0, "hint_weight": 0.1},
    "dual_hints": {**DUAL, "hint_weight": 0.1},
    "rocket": {"kd_weight": 1.0, "distance": "logit_mse", "embeddings_from": "both"},
    # Needs --config.train.start_from=<a teacher's model directory>.
    "two_stage": {**DUAL, "teacher_frozen": True},
}


def get_config(variant: str = "dual") -> ConfigDict:
    """The recipe of one variant; see VARIANTS."""
    config = base_config()
    config.schema = movielens_1m.schema()
    for part in ("train", "test"):
        config.data[part] = f"runs/movielens_1m_random/{part}.parquet"
    teacher = {"interactions": {"bi_interaction": {}, "fm": {}}, "teacher_units": (256, 128, 64)}
    if variant == "teacher_alone":
        model = {"name": "teacher_alone", **teacher}
    else:
        model = {"name": "dual_dnn", "student_units": (16,), **VARIANTS[variant]}
        if variant != "student_alone":
            model |= teacher
    config.model = {**model, "embedding_l2": 1e-2}
    config.train.batch_size = 256
    config.train.epochs = 1
    config.train.optimizer.learning_rate = 2e-3
    config.train.table_optimizer.learning_rate = 2e-3
    return config
