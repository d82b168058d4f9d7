"""Models and their versions: loading, warming up, and switching from one to the next.

`grpc_api` and `rest` bring the requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import pathlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import tensorflow as tf
from absl import logging
from tensorflow_serving.apis import get_model_status_pb2, prediction_log_pb2

from qianmo.pipelines.serving.signatures import ServingError, Signature, not_found
from qianmo.pipelines.serving.tensors import Array
from qianmo.pipelines.serving.wire import Tensor, read_request

DEFAULT_SIGNATURE = "serving_default"
WARM_UP_FILE = "assets.extra/tf_serving_warmup_requests"
MAX_WARM_UP_RECORDS = 1000
WARM_UP_SECONDS = 60.0
RETRY_SECONDS = 60.0

_State = get_model_status_pb2.ModelVersionStatus


class Version:
    """One loaded version of a model.

    Args:
      number: of the version.
      path: folder of the SavedModel.
      config: ConfigProto of its session.

    Raises:
      Exception: whatever the loader says, or a warm-up record that fails.
    """

    def __init__(self, number: int, path: pathlib.Path, config: Any) -> None:
        self.number = number
        self.users = 0
        self._session = tf.compat.v1.Session(graph=tf.Graph(), config=config)
        try:
            with self._session.graph.as_default():
                meta_graph = tf.compat.v1.saved_model.load(self._session, ["serve"], str(path))
            self._session.graph.finalize()
            self.signature_def = dict(meta_graph.signature_def)
            self.signatures = {
                name: Signature(self._session, definition)
                for name, definition in self.signature_def.items()
                if not name.startswith("__saved_model")
            }
            self._warm_up(path / WARM_UP_FILE)
        except BaseException:
            self.close()
            raise

    def _warm_up(self, path: pathlib.Path) -> None:
        if not path.exists():
            return
        for number, record in enumerate(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()):
            if number >= MAX_WARM_UP_RECORDS:
                raise ValueError(f"{WARM_UP_FILE} should hold <= {MAX_WARM_UP_RECORDS} records.")
            try:
                log = prediction_log_pb2.PredictionLog.FromString(record)
                if log.WhichOneof("log_type") != "predict_log":
                    raise ValueError("it should be a predict_log.")
                request = read_request(log.predict_log.request.SerializeToString())
                self.predict(request.model_spec.signature_name, request.inputs, WARM_UP_SECONDS)
            except Exception as error:
                raise ValueError(f"warm-up record {number} failed: {error}") from error

    def signature(self, name: str) -> Signature:
        """The signature of that name; the empty name means `serving_default`."""
        found = self.signatures.get(name or DEFAULT_SIGNATURE)
        if found is None:
            raise not_found("signature", name or DEFAULT_SIGNATURE, self.signatures)
        return found

    def predict(
        self, signature_name: str, tensors: Mapping[str, Tensor], timeout: float | None = None
    ) -> dict[str, Array]:
        """Runs a signature on inputs as they came over the wire."""
        signature = self.signature(signature_name)
        return signature(signature.read(tensors), timeout)

    @property
    def is_closed(self) -> bool:
        """Whether its session is gone."""
        return self._session is None

    def close(self) -> None:
        """Ends the session, and what still runs in it, and frees its memory."""
        if self._session is not None:
            self._session.close()
            self._session = None
            self.signatures = {}


@dataclasses.dataclass(frozen=True)
class _Failure:
    files: frozenset[tuple[str, int, int]]
    time: float
    reason: str


class Model:
    """The newest version of one model, and the way from each version to the next.

    `poll` is called by one thread, `use` by any. A new version is loaded and warmed up before it
    takes over; the version before it ends when its last request has been answered. A version that
    fails to load is left alone until its files change or a minute has passed.

    Args:
      name: of the model.
      base_path: folder that holds a folder for each version, named by its number.
      config: ConfigProto of the sessions.

    Raises:
      ValueError: no version could be loaded.
    """

    def __init__(self, name: str, base_path: str | pathlib.Path, config: Any = None) -> None:
        self.name = name
        self._base_path = pathlib.Path(base_path)
        self._config = config
        self._lock = threading.Lock()
        self._is_closed = False
        self._current: Version | None = None
        self._retired: list[Version] = []
        self._failures: dict[int, _Failure] = {}
        self.poll()
        if self._current is not None:
            for number, failure in self._failures.items():
                self._log(number, failure.reason)
        else:
            reasons = "; ".join(f"{n}: {f.reason}" for n, f in self._failures.items())
            raise ValueError(
                f"model `{name}`: {self._base_path} should hold a folder named by a version "
                f"number with a SavedModel in it. Received: {reasons or 'no such folder'}"
            )

    def poll(self) -> None:
        """Looks at the base path once; loads a newer version and ends versions out of use."""
        self._close_idle()
        found = _versions(self._base_path)
        self._failures = {n: f for n, f in self._failures.items() if n in found}
        for number in sorted(found, reverse=True):
            if self._current is not None and self._current.number == number:
                return
            files = _files(found[number])
            failure = self._failures.get(number)
            if (
                failure is not None
                and failure.files == files
                and time.monotonic() < failure.time + RETRY_SECONDS
            ):
                continue
            try:
                version = Version(number, found[number], self._config)
            except Exception as error:
                reason = _reason(error)
                self._failures[number] = _Failure(files, time.monotonic(), reason)
                if self._current is not None:
                    self._log(number, reason)
                continue
            self._failures.pop(number, None)
            with self._lock:
                old, self._current = self._current, version
                if old is not None:
                    self._retired.append(old)
                is_closed = self._is_closed
            if is_closed:
                self.close()
                return
            logging.info("model `%s`: serving version %d", self.name, number)
            return

    def _log(self, number: int, reason: str) -> None:
        logging.error("model `%s`: version %d failed to load: %s", self.name, number, reason)

    @contextlib.contextmanager
    def use(self, number: int | None = None) -> Iterator[Version]:
        """Holds the served version, so that it is not closed before the block is left.

        Raises:
          ServingError: `number` is not the version that is served.
        """
        with self._lock:
            version = self._current
            if version is None:
                message = f"model `{self.name}` has been shut down."
                raise ServingError(grpc.StatusCode.UNAVAILABLE, message)
            if number is not None and number != version.number:
                raise not_found(f"version of model `{self.name}`", number, [version.number])
            version.users += 1
        try:
            yield version
        finally:
            with self._lock:
                version.users -= 1

    def status(self, number: int | None = None) -> Any:
        """GetModelStatusResponse of all versions it knows of, or of one."""
        with self._lock:
            states = [(v.number, _State.UNLOADING, "") for v in self._retired]
            if self._current is not None:
                states.append((self._current.number, _State.AVAILABLE, ""))
            failures = dict(self._failures)
        states += [(n, _State.END, failure.reason) for n, failure in failures.items()]
        if number is not None:
            known = [n for n, _, _ in states]
            states = [state for state in states if state[0] == number]
            if not states:
                raise not_found(f"version of model `{self.name}`", number, known)
        response = get_model_status_pb2.GetModelStatusResponse()
        for version, state, reason in sorted(states, reverse=True):
            entry = response.model_version_status.add(version=version, state=state)
            entry.status.error_code = grpc.StatusCode.UNKNOWN.value[0] if reason else 0
            entry.status.error_message = reason
        return response

    def close(self) -> None:
        """Ends all versions, and what still runs in them."""
        with self._lock:
            self._is_closed = True
            retired, self._retired = self._retired, []
            if self._current is not None:
                retired.append(self._current)
            self._current = None
        for version in retired:
            version.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle = [version for version in self._retired if not version.users]
            self._retired = [version for version in self._retired if version.users]
        for version in idle:
            version.close()
            logging.info("model `%s`: version %d unloaded", self.name, version.number)
        if idle:
            gc.collect()  # a graph refers to itself, so only the collector frees it


def _reason(error: Exception) -> str:
    """Why a version failed to load, in one line, without TensorFlow's names of nodes."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith("[[{{node")]
    return " ".join(kept) or type(error).__name__


def _versions(base_path: pathlib.Path) -> dict[int, pathlib.Path]:
    try:
        paths = [path for path in base_path.iterdir() if path.is_dir()]
    except OSError as error:
        logging.error("cannot read %s: %s", base_path, error)
        return {}
    return {int(path.name): path for path in paths if re.fullmatch(r"[0-9]{1,18}", path.name)}


def _files(path: pathlib.Path) -> frozenset[tuple[str, int, int]]:
    found = set()
    with contextlib.suppress(OSError):  # gone since it was listed: the next poll sees it otherwise
        for file in path.rglob("*"):
            stat = file.stat()
            found.add((str(file), stat.st_mtime_ns, stat.st_size))
    return frozenset(found)
