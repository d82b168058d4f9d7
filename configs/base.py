"""What every recipe starts from: all keys and their defaults, in one place."""

import pathlib

from ml_collections import ConfigDict

PARTS = ("train", "valid", "test", "valid_support", "test_support", "catalogue")


def base_config() -> ConfigDict:
    """A recipe without data, schema and model."""
    return ConfigDict(
        {
            "data": {
                # Each a file, a folder of shards or a glob; .parquet, .tfrecord or .csv.
                "train": "",
                "valid": "",  # empty: no early stopping
                "test": "",
                # Earlier rows of the tasks of valid and test, for towers that adapt.
                "valid_support": "",
                "test_support": "",
                "catalogue": "",  # a row for each item, of which a retrieval model finds the next
                "shuffle_rows": 2**18,  # rows held in memory while shuffling
                # Batches of chunks, which are consecutive rows of one task.
                "chunk_rows": 0,  # rows of a chunk; 0: no chunks, batches of shuffled rows
                "chunk_tasks": 100,  # chunks a batch
                "chunks_beside": False,  # beside shuffled rows, which alone make the original loss
            },
            "schema": {},
            # Trained models to start parts of this one from: any name -> as `recipe.Migration`.
            "migrate": {},
            # Modules to import first, which register models and layers of yours.
            "plugins": (),
            "model": {"name": ""},
            "train": {
                "seed": 1,
                "batch_size": 1024,
                "epochs": 3,
                "optimizer": {"name": "adam", "learning_rate": 1e-3},
                "table_optimizer": {"name": "sparse_adam", "learning_rate": 1e-3},
                # Of the step sizes that a meta tower learns.
                "meta_optimizer": {"name": "adam", "learning_rate": 2e-2},
                # By which to stop: auc, gauc, log_loss, rmse, mae or, with a catalogue, ndcg_10.
                "monitor": "auc",
                "monitor_head": "",  # of a model with several; empty: the one that is served
                "patience": 1,  # epochs without a better one before training stops
                "checkpoint_every": 500,  # steps
                "steps_per_call": 16,  # steps that run in the graph between two looks at the host
                "dtype_policy": "float32",  # or "mixed_bfloat16"
                "start_from": "",  # a model directory whose weights to start from
                "start_except": (),  # parts that start new all the same, or are left over there
            },
        }
    )


def point(config: ConfigDict, folder: str | pathlib.Path) -> ConfigDict:
    """Lets a recipe read the data sets that it names from another folder.

    Args:
      config: of the recipe; changed.
      folder: holds files of the same names.
    """
    for part in PARTS:
        if config.data[part]:
            config.data[part] = str(pathlib.Path(folder) / pathlib.Path(config.data[part]).name)
    return config
