"""MovieLens-1M, random split, one pass: a dual DNN and its relatives on the same data."""

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs import movielens_1m
from qianmo.configs.base import base_config

# Weights are those with the best mean AUC of two or three seeds on the validation rows.
DUAL = {"kd_weight": 40.0, "kd_warmup_steps": 2310, "distance": "probability_mse"}
VARIANTS: dict[str, dict[str, Any]] = {
    "teacher_alone": {},
    "student_alone": {},
    "deepfm": {},
    "shared": {"kd_weight": 0.0},
    "soft_labels": {"kd_weight": 10.0, "distance": "soft_labels"},
    "logit_mse": {"kd_weight": 0.3, "distance": "logit_mse"},
    "constant": {"kd_weight": 10.0, "distance": "probability_mse"},
    "dual": DUAL,
    "hints": {"kd_weight": 0.0, "hint_weight": 0.01},
    "dual_hints": {**DUAL, "hint_weight": 0.001},
    "rocket": {"kd_weight": 0.03, "distance": "logit_mse", "embeddings_from": "both"},
    # Needs --config.train.start_from=<the model directory of teacher_alone>.
    "two_stage": {"kd_weight": 10.0, "distance": "probability_mse", "teacher_frozen": True},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "bi": {"bi_interaction": {}, "fm": {}},
    "cin": {"cin": {"units": (64, 64), "activation": "relu"}},
}


def get_config(
    variant: str = "dual", teacher: str = "bi", student_units: tuple[int, ...] = (16,)
) -> ConfigDict:
    """The recipe of one variant.

    Args:
      variant: a name in VARIANTS.
      teacher: a name in TEACHERS.
      student_units: widths of the student's MLP.
    """
    config = base_config()
    config.schema = movielens_1m.schema()
    for part in ("train", "test"):
        config.data[part] = f"runs/movielens_1m_random/{part}.parquet"
    teachers = {"interactions": TEACHERS[teacher], "teacher_units": (256, 128, 64)}
    model: dict[str, Any]
    if variant == "teacher_alone":
        model = {"name": "teacher_alone", **teachers}
    elif variant == "deepfm":  # no teacher: a fast model with an interaction of its own
        model = {"name": "deepfm", "units": student_units}
    else:
        model = {"name": "dual_dnn", "student_units": student_units, **VARIANTS[variant]}
        if variant != "student_alone":
            model |= teachers
    config.model = {**model, "embedding_l2": 1e-2}
    config.train.batch_size = 256
    config.train.epochs = 1
    config.train.optimizer.learning_rate = 2e-3
    config.train.table_optimizer.learning_rate = 2e-3
    return config
