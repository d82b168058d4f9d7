"""What holds between answers of served graphs."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# TensorFlow chooses the kernel of a product by the graph around it, the number of rows and the
# processor, and kernels add in different orders: a float32 product of width n differs by about
# sqrt(n) * 6e-8 of the sum of magnitudes. The models of these tests are at most 64 wide with sums
# below 8, so a logit, or a coordinate of a vector, differs by at most 8 * 6e-8 * 8 = 4e-6, and a
# probability by a quarter of that.
ROUNDING = 1e-6


def close(found: Any, expected: Any, atol: float = ROUNDING) -> None:
    """Asserts that scores are equal up to the rounding of float32 products."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


Rows = Mapping[str, np.ndarray]
Request = tuple[str, Rows]  # signature and inputs
Answer = Rows | Exception


@contextlib.contextmanager
def batching(
    version_dir: pathlib.Path, allowed_batch_sizes: Sequence[int] = ()
) -> Iterator[Callable[[Sequence[Request]], list[Answer]]]:
    """Answers requests that came at the same time, merged as TensorFlow Serving 2.20 merges them.

    Transcribed from `batching_session.cc`: a queue for each set of input and output tensors; before
    merging, the inputs' names and their equal number of rows are all that is compared; a batch is
    concatenated along axis 0 and filled up to an allowed size with the first row of its last task;
    nothing is padded; what goes wrong after that goes wrong for the whole batch.
    """
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(version_dir))

        def run(signature: Any, rows: Rows) -> Rows:
            feeds = {signature.inputs[name].name: rows[name] for name in rows}
            fetches = {name: info.name for name, info in signature.outputs.items()}
            return session.run(fetches, feeds)

        def ask(requests: Sequence[Request]) -> list[Answer]:
            answers: list[Answer] = [ValueError("never answered")] * len(requests)
            queues: dict[Any, list[int]] = {}
            for number, (name, rows) in enumerate(requests):
                signature = meta.signature_def[name]
                sizes = {column.shape[:1] for column in rows.values()}
                if rows.keys() != signature.inputs.keys() or len(sizes) != 1 or () in sizes:
                    answers[number] = ValueError("refused before merging")
                    continue
                tensors = (signature.inputs.values(), signature.outputs.values())
                key = tuple(frozenset(info.name for info in infos) for infos in tensors)
                queues.setdefault(key, []).append(number)
            for numbers in queues.values():
                signature = meta.signature_def[requests[numbers[0]][0]]
                tasks = [requests[number][1] for number in numbers]
                try:
                    for number, answer in zip(numbers, merged(signature, tasks), strict=True):
                        answers[number] = answer
                except Exception as error:  # the whole batch's
                    for number in numbers:
                        answers[number] = error
            return answers

        def merged(signature: Any, tasks: Sequence[Rows]) -> list[Rows]:
            sizes = [len(next(iter(rows.values()))) for rows in tasks]
            fill = next((size for size in allowed_batch_sizes if size >= sum(sizes)), sum(sizes))
            fill -= sum(sizes)
            batch = {}
            for name in tasks[0]:
                columns = [rows[name] for rows in tasks]
                if len({column.shape[1:] for column in columns}) > 1:
                    raise ValueError(f"{name}: different shapes and padding is turned off")
                if len({column.dtype for column in columns}) > 1:
                    raise ValueError(f"{name}: tensor concat operation failed")
                batch[name] = np.concatenate([*columns, *[columns[-1][:1]] * fill])
            outputs = run(signature, batch)
            if any(len(output) != sum(sizes) + fill for output in outputs.values()):
                raise ValueError("an output's 0th dimension is not the inputs' sum")
            ends = np.cumsum(sizes)
            return [
                {name: output[end - size : end] for name, output in outputs.items()}
                for size, end in zip(sizes, ends, strict=True)
            ]

        yield ask
