"""Loads a version of an embedding store into a Redis or a Redis Cluster.

    qianmo-load-redis --store=served/mine_embeddings --redis=redis://127.0.0.1:6379/mine
    qianmo-load-redis --redis=redis://127.0.0.1:6379/mine --delete=3

Reads a folder of embedding versions, which qianmo-export --form=store makes; writes into the Redis.
The version is read once all of its rows are there. A load that was killed goes on where it stopped.
The password is given in the environment, as QIANMO_REDIS_PASSWORD.
"""

from __future__ import annotations

from absl import app, flags

from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("What is loaded")
    flags.DEFINE_string("redis", None, "URL: redis://HOST:PORT/PREFIX, ...", required=True)
    flags.DEFINE_string("store", None, "Folder of the embedding versions.")
    flags.DEFINE_integer("version", None, "Default: the published one.", lower_bound=1)
    flags.DEFINE_integer("threads", 4, "That write side by side.", lower_bound=1)
    flags.DEFINE_bool("publish", True, "Whether it becomes the version that is read.")
    program.heading("Instead of loading")
    flags.DEFINE_integer(
        "delete", None, "Instead: delete this version, which no graph may read.", lower_bound=1
    )


def run(_: list[str]) -> None:
    """Loads or deletes, and says what was done."""
    values = flags.FLAGS
    if values.delete is None and values.store is None:
        raise app.UsageError("give --store, the folder of the embedding versions, or --delete.")
    from tqdm import tqdm

    from qianmo.export import embedding_shards as shards
    from qianmo.export import redis_loader

    if values.delete is not None:
        deleted = redis_loader.delete(values.redis, values.delete)
        print(f"version {values.delete}: {deleted:,} keys deleted")
        return
    version = values.version or shards.published(values.store)
    if version is None:
        raise ValueError(f"{values.store}: no version is published; give --version.")
    with tqdm(unit="rows", unit_scale=True, desc=f"version {version}") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = redis_loader.load(
            values.store,
            version,
            values.redis,
            threads=values.threads,
            publish=values.publish,
            progress=show,
        )
    read = "is read now" if values.publish else "is there"
    print(f"version {version} {read}: {written:,} rows written, all rows counted")


def main() -> None:
    """Entry of `qianmo-load-redis`."""
    program.start(define_flags, run, after_stop="what is loaded stays; the same command goes on.")


if __name__ == "__main__":
    main()
