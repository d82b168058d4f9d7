r"""Makes the training, validation and test rows of a public data set.

    qianmo-prepare --dataset=kuairand --output=runs/kuairand
    qianmo-prepare --dataset=movielens_1m --source=ml-1m --output=runs/movielens_1m
    qianmo-prepare --dataset=movielens_1m --split=random --source=ml-1m \
        --output=runs/movielens_1m_random
    qianmo-prepare --dataset=movielens_1m --split=new_users --source=ml-1m \
        --output=runs/movielens_1m_new_users
    qianmo-prepare --dataset=amazon_cdr --pair=cloth_sport --source=amazon-cdr \
        --output=runs/amazon_cloth_sport

kuairand: video impressions on Kuaishou, 25 April to 5 May 2022, split by day: --test_day is the
    test part, --valid_day the validation part, and days up to --train_until train. Needs no
    --source: its tables come with this package (CC BY-SA 4.0, see
    pipelines/sample/ATTRIBUTION.md).
movielens_1m: a million ratings of films; 4 and 5 are likes, 1 and 2 dislikes, 3 is left out. Its
    terms forbid shipping it: unpack https://files.grouplens.org/datasets/movielens/ml-1m.zip and
    give the folder as --source.
amazon_cdr: pairs of Amazon's departments with the same users, what each bought in both. The table
    interactions.parquet of --source has the columns pair, domain, user_id, item_id and split.
kuairand_sample: how the tables of the first were cut from the published ones (Parquet tables
    interactions, users, videos_basic and user_history_before_20220425 in --source).

The output is a new folder with train, (valid,) and test.parquet and data.json, which holds the rows
and sha256 of each, and how many rows of the source are in none of them and why. It appears only
when it is whole. Beside test.parquet there may be
test_support.parquet (and beside valid.parquet its own): of each user there, the last rows that were
known by then, from which a model can adapt to the user.
"""

from __future__ import annotations

from absl import app, flags

from qianmo.export import paths
from qianmo.pipelines import program

DATASETS = ("kuairand", "movielens_1m", "amazon_cdr", "kuairand_sample")
TIES = ("excluded", "by_row")
SPLITS = ("time", "random", "ages", "new_users", "all_users", "new_items", "next_item", "melu")


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("The data set")
    flags.DEFINE_enum("dataset", None, DATASETS, "The data set to prepare.", required=True)
    flags.DEFINE_string("source", None, "Folder of the published tables; kuairand needs none.")
    program.heading("How it is split")
    flags.DEFINE_enum("split", "time", SPLITS, "How movielens_1m is split.")
    flags.DEFINE_enum(
        "ties",
        "excluded",
        TIES,
        "Whether a user's ratings of one second in movielens_1m are left out of each other's "
        "history and support, or known in the order of the rows, as in published results.",
    )
    flags.DEFINE_integer("train_until", 20220503, "The last training day of kuairand.")
    flags.DEFINE_integer("valid_day", 20220504, "The validation day of kuairand.")
    flags.DEFINE_integer("test_day", 20220505, "The test day of kuairand.")
    flags.DEFINE_string("pair", "cloth_sport", "The domains of amazon_cdr.")
    flags.DEFINE_integer("seed", 0, "Of random draws.", lower_bound=0)
    flags.DEFINE_bool("support_history", False, "Add columns of what each user's support rows say.")
    program.heading("What it writes")
    flags.DEFINE_string("output", None, "Folder to make.", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.")


def run(_: list[str]) -> None:
    """Prepares the data set that the flags name."""
    values = flags.FLAGS
    if values.dataset != "kuairand" and values.source is None:
        raise app.UsageError(f"--dataset={values.dataset} needs --source.")
    paths.check_folder(values.output)
    from qianmo.pipelines.datasets.amazon_cdr import amazon_cdr
    from qianmo.pipelines.datasets.kuairand import kuairand, kuairand_sample
    from qianmo.pipelines.datasets.movielens_1m import movielens_1m
    from qianmo.pipelines.datasets.tables import check_new

    source, output, overwrite = values.source, values.output, values.overwrite
    check_new(output, overwrite)
    if values.dataset == "kuairand":
        about = kuairand(
            source,
            output,
            train_until=values.train_until,
            valid_day=values.valid_day,
            test_day=values.test_day,
            support_history=values.support_history,
            overwrite=overwrite,
        )
    elif values.dataset == "kuairand_sample":
        about = kuairand_sample(source, output, overwrite=overwrite)
    elif values.dataset == "amazon_cdr":
        about = amazon_cdr(source, output, pair=values.pair, seed=values.seed, overwrite=overwrite)
    else:
        about = movielens_1m(
            source,
            output,
            split=values.split,
            seed=values.seed,
            ties=values.ties,
            support_history=values.support_history,
            overwrite=overwrite,
        )
    for name, rows in about["rows"].items():
        print(f"{output}/{name}.parquet: {rows:,} rows, sha256 {about['sha256'][name]}")
    for reason, rows in about["left_out"].items():
        print(f"left out: {rows:,} rows {reason}")


def main() -> None:
    """Entry of `qianmo-prepare`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
