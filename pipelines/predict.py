r"""Asks a model server for the scores of rows in a file, and the clients for doing so.

    qianmo-predict --server=127.0.0.1:8500 --model_name=ranker \
        --data=test.parquet --schema=MODEL_DIR/recipe.json --rows=1000 --output=scores.jsonl

Reads the rows, and asks the server. Writes a line of JSON for each row. The clients speak to any
TensorFlow Serving, over gRPC by the stubs of tensorflow-serving-api.
"""

from __future__ import annotations

from absl import flags

from qianmo.export import publishing
from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("The server")
    flags.DEFINE_string("server", "127.0.0.1:8500", "host:port, of REST with --rest.")
    flags.DEFINE_string("model_name", "model", "Name of the model on the server.")
    flags.DEFINE_string("signature_name", "serving_default", "What to ask of the model.")
    program.heading("The rows")
    flags.DEFINE_string("data", None, "Rows to score: a file, folder or glob.", required=True)
    flags.DEFINE_string(
        "schema",
        None,
        "JSON of the rows' schema, or a model directory's recipe.json.",
        required=True,
    )
    flags.DEFINE_integer("rows", 0, "Score the first rows only; 0 for all.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 256, "Rows of a request.", lower_bound=1)
    flags.DEFINE_bool("rest", False, "Ask over REST instead of gRPC.")
    flags.DEFINE_string(
        "lookup",
        None,
        "Of a model of the form `fed`: its folder <model_base_path>_lookup, whose graph makes the "
        "vectors here, from its embedding store.",
    )
    program.heading("What it writes")
    program.model_paths("lookup")
    flags.DEFINE_string("output", "-", "JSON lines file to write, one line a row; - prints them.")


def run(_: list[str]) -> None:
    """Prints or writes the scores."""
    values = flags.FLAGS
    if values.output != "-":
        publishing.check_writable(values.output)
    from qianmo.pipelines.serving.predictions import write_predictions

    write_predictions(values)


def main() -> None:
    """Entry of `qianmo-predict`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
