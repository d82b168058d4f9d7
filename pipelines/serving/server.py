"""The embedded model server: serves SavedModels over gRPC and REST as TF Serving does.

For tests, demos and machines without tensorflow_model_server. It does not merge requests into
batches and serves the newest version of each model only.
"""

from __future__ import annotations

import pathlib
import threading
import time
from collections.abc import Mapping

import tensorflow as tf
from absl import logging

from qianmo.pipelines.serving.grpc_api import GrpcServer
from qianmo.pipelines.serving.models import Model
from qianmo.pipelines.serving.rest import RestServer

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0


class ModelServer:
    """Serves models over gRPC and REST; a context manager.

    Each base path is looked at once a second. The folder with the highest number is served: it is
    loaded, runs its warm-up records and only then takes over; requests under way finish on the
    version they began on. A version that fails to load is logged, and the one before stays.

    Args:
      models: base path by model name.
      host: address to bind.
      port, rest_api_port: of gRPC and REST; 0 takes a free one.
      grpc_max_threads: gRPC requests that run at the same time; eight times as many may wait, one
        more is refused with RESOURCE_EXHAUSTED.
      rest_api_num_threads: REST connections held at the same time.
      intra_op_parallelism, inter_op_parallelism: threads of TensorFlow; 0 is one for each core.

    Raises:
      ValueError: a model has no version that loads.
      OSError, RuntimeError: an address cannot be bound.

    Example::

        with ModelServer({"ranker": "models/ranker"}, port=0, rest_api_port=0) as server:
            scores = Client(f"127.0.0.1:{server.port}", "ranker").predict(inputs)
    """

    def __init__(
        self,
        models: Mapping[str, str | pathlib.Path],
        *,
        host: str = "127.0.0.1",
        port: int = 8500,
        rest_api_port: int = 8501,
        grpc_max_threads: int = 16,
        rest_api_num_threads: int = 64,
        intra_op_parallelism: int = 0,
        inter_op_parallelism: int = 0,
    ) -> None:
        self.models: dict[str, Model] = {}
        self._stop = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="versions", daemon=True)
        self._grpc = GrpcServer(self.models, host, port, grpc_max_threads)
        try:
            self._rest = RestServer(self.models, host, rest_api_port, rest_api_num_threads)
        except OSError:
            self._grpc.stop(0)
            raise
        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=intra_op_parallelism,
            inter_op_parallelism_threads=inter_op_parallelism,
        )
        try:
            for name, base_path in models.items():
                self.models[name] = Model(name, base_path, config)
        except BaseException:
            self.stop()
            raise

    @property
    def port(self) -> int:
        """Port that gRPC is bound to."""
        return self._grpc.port

    @property
    def rest_port(self) -> int:
        """Port that REST is bound to."""
        return self._rest.port

    def start(self) -> None:
        """Begins to answer and to look for new versions."""
        self._grpc.start()
        self._rest.start()
        self._poller.start()

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Takes no more requests, waits up to `grace` seconds for those under way, and closes."""
        end = time.monotonic() + grace
        self._stop.set()
        rest = threading.Thread(target=self._rest.stop, args=(grace,))
        rest.start()
        self._grpc.stop(grace)
        rest.join()
        if self._poller.is_alive():
            self._poller.join(max(0.0, end - time.monotonic()))
        for model in self.models.values():
            model.close()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            for model in self.models.values():
                try:
                    model.poll()
                except Exception:
                    logging.exception("model `%s`: looking for versions failed", model.name)

    def __enter__(self) -> ModelServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
