"""How calls come in over gRPC: whole, in time, and not too many at once."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from absl import logging

MOVE_SECONDS = 10.0  # in which a request should arrive, and its answer leave
HURRIED_SECONDS = 1.0  # the same when half of all places are taken by calls that do
WATCH_SECONDS = 0.25


class Reading(grpc.ServerInterceptor):
    """Has handlers of one request get it within a time, and a few of them run at once.

    gRPC's own would wait for a request for ever, each in a thread of the pool, and write a
    traceback for one that cannot be parsed.

    Args:
      num_running: requests that are answered at the same time; others wait.
      num_places: calls in all.
    """

    def __init__(self, num_running: int, num_places: int) -> None:
        self._running = threading.BoundedSemaphore(num_running)
        self._num_places = num_places
        self._lock = threading.Lock()
        # Contexts of calls, and since when a request arrives or an answer leaves, if one does.
        self._calls: dict[Any, float | None] = {}
        self._stopped = threading.Event()
        self._watch = threading.Thread(target=self._cancel_slow, name="slow calls", daemon=True)

    def start(self) -> None:
        """Begins to cancel calls of clients that are too slow."""
        self._watch.start()

    def stop(self) -> None:
        """Ends that."""
        self._stopped.set()

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """The handler of a call: as of a stream of one request, which is the same on the wire."""
        handler = continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        answer = functools.partial(self._answer, handler, handler_call_details.method)
        return grpc.stream_unary_rpc_method_handler(
            answer, request_deserializer=None, response_serializer=handler.response_serializer
        )

    def _answer(self, handler: Any, method: str, requests: Iterator[bytes], context: Any) -> Any:
        with self._lock:
            self._calls[context] = time.monotonic()
        if not context.add_callback(functools.partial(self._forget, context)):
            self._forget(context)  # it has ended
        try:
            data = next(requests)
        except (StopIteration, grpc.RpcError):  # cancelled, by the client or by `_cancel_slow`
            context.abort(grpc.StatusCode.CANCELLED, "the request did not arrive.")
        self._note(context, None)
        try:
            request = handler.request_deserializer(data)
        except Exception as error:
            logging.warning("%s: malformed request from %s: %s", method, context.peer(), error)
            message = f"the request is malformed: {error}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        with self._place_to_run(context):
            answer = handler.unary_unary(request, context)
        self._note(context, time.monotonic())
        return answer

    def _note(self, context: Any, since: float | None) -> None:
        with self._lock:
            if context in self._calls:
                self._calls[context] = since

    def _forget(self, context: Any) -> None:
        with self._lock:
            self._calls.pop(context, None)

    @contextlib.contextmanager
    def _place_to_run(self, context: Any) -> Iterator[None]:
        while not self._running.acquire(timeout=WATCH_SECONDS):
            if not context.is_active():
                context.abort(grpc.StatusCode.CANCELLED, "nobody waits for the answer.")
        try:
            yield
        finally:
            self._running.release()

    def _cancel_slow(self) -> None:
        while not self._stopped.wait(WATCH_SECONDS):
            with self._lock:
                moving = [(call, since) for call, since in self._calls.items() if since is not None]
            hurried = 2 * len(moving) >= self._num_places
            until = time.monotonic() - (HURRIED_SECONDS if hurried else MOVE_SECONDS)
            for context, since in moving:
                if since < until:
                    logging.warning("a client is too slow, and cut off: %s", context.peer())
                    context.cancel()
