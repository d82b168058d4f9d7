"""Serves SavedModels: starts tensorflow_model_server where there is one, else the embedded server.

    qianmo-serve --model_base_path=served/ranker --model_name=ranker

Reads versions from --model_base_path, and serves the newest until Ctrl-C or SIGTERM. The models
keep their paths and names either way, and so do the clients.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pathlib
import shutil
import signal
import socket
import threading
from collections.abc import Mapping, Sequence

from absl import app, flags, logging

from qianmo.export import paths
from qianmo.pipelines import program, silence

SERVER_VARIABLE = "QIANMO_MODEL_SERVER"
SERVER_PROGRAM = "tensorflow_model_server"
BATCHING_FILE = "batching_parameters.txt"


def define_flags() -> None:
    """Defines the flags of this program."""
    program.heading("The models")
    flags.DEFINE_string("model_base_path", None, "Folder that holds a folder for each version.")
    flags.DEFINE_string("model_name", "model", "Name that clients call the model by.")
    flags.DEFINE_string(
        "model_config_file", None, "Several models instead of one: a ModelServerConfig as text."
    )
    program.heading("Where it listens")
    flags.DEFINE_string(
        "host",
        "127.0.0.1",
        f"Address to bind. {SERVER_PROGRAM} has no such setting: it always binds all interfaces; "
        "use a firewall, or --embedded.",
    )
    flags.DEFINE_integer("port", 8500, "Port of gRPC; 0 takes a free one.", lower_bound=0)
    flags.DEFINE_integer("rest_api_port", 8501, "Port of REST; 0 takes a free one.", lower_bound=0)
    program.heading("How it serves")
    flags.DEFINE_bool(
        "embedded",
        False,
        f"Serve from this process even where {SERVER_PROGRAM} is on the PATH or named by "
        f"{SERVER_VARIABLE}.",
    )
    flags.DEFINE_list(
        "custom_op_path",
        [],
        "Shared libraries of custom ops, which the embedded server loads before the models. "
        f"Default: this package's. {SERVER_PROGRAM} must have its ops linked in.",
    )
    flags.DEFINE_string(
        "batching_parameters_file",
        None,
        f"BatchingParameters as text; by default {BATCHING_FILE} beside the versions, if it is "
        "there. The embedded server does not batch.",
    )
    flags.DEFINE_integer(
        "grpc_max_threads",
        None,
        f"gRPC requests at the same time; by default 16, and 256 for {SERVER_PROGRAM}, where each "
        "request that waits for its batch holds a thread.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "rest_api_num_threads", 64, "REST requests at the same time.", lower_bound=1
    )
    for kind in ("intra", "inter"):
        flags.DEFINE_integer(
            f"tensorflow_{kind}_op_parallelism",
            0,
            f"TensorFlow's {kind}-op threads; 0 is one for each core.",
            lower_bound=0,
        )


def check_paths(values: flags.FlagValues) -> None:
    """Looks at the paths that the flags name.

    Raises:
      ValueError: one is not there, or holds no model.
    """
    files = [("custom_op_path", path) for path in values.custom_op_path]
    for flag in ("model_config_file", "batching_parameters_file"):
        files.append((flag, values[flag].value))
    for flag, path in files:
        if path and not os.path.isfile(path):
            raise ValueError(f"--{flag}={path} should name a file. There is none.")
    base = values.model_base_path
    if not base or "://" in base:
        return
    paths.check_model_path(base)
    if newest_version(base) is None:
        raise ValueError(
            f"--model_base_path={base} should hold a folder named by a version number with a "
            "SavedModel in it. Export a model there first."
        )


def newest_version(base_path: str) -> pathlib.Path | None:
    """Folder of the highest version, if there is one."""
    found = [
        path.parent
        for path in pathlib.Path(base_path).glob("*/saved_model.pb")
        if path.parent.name.isdigit()
    ]
    return max(found, key=lambda path: int(path.name), default=None)


def check_ops(server: str, version: pathlib.Path | None) -> None:
    """Looks whether a server has this package's ops, if a version needs them.

    Raises:
      ValueError: it is a program in which they are not linked, nor are they preloaded.
    """
    if version is None or not _holds(version / "saved_model.pb", b"Qianmo>"):
        return
    program = pathlib.Path(server)
    is_compiled = program.open("rb").read(4) == b"\x7fELF"  # a script may start any server
    if is_compiled and not _holds(program, b"Qianmo>") and "LD_PRELOAD" not in os.environ:
        raise ValueError(
            f"{version} holds ops of this package, which {server} has not linked in. Link them in "
            "(docs/embedding_store.md), give --embedded, or export a form of stock ops."
        )


def _holds(path: pathlib.Path, text: bytes) -> bool:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return data.find(text) >= 0


def find_server() -> str | None:
    """Path of the genuine model server, or None where there is none.

    Raises:
      ValueError: the environment variable names no program.
    """
    named = os.environ.get(SERVER_VARIABLE)
    found = shutil.which(named or SERVER_PROGRAM)
    if named and found is None:
        raise ValueError(f"{SERVER_VARIABLE} should name a program. Received: {named!r}")
    return found


def server_command(server: str, values: flags.FlagValues) -> list[str]:
    """The command line of the genuine model server for the flags of this program."""
    command = [
        server,
        f"--port={values.port or _free_port()}",
        f"--rest_api_port={values.rest_api_port or _free_port()}",
        f"--rest_api_num_threads={values.rest_api_num_threads}",
        f"--grpc_max_threads={values.grpc_max_threads or 256}",
        # Five by default, a minute apart each: a model that cannot be loaded is told in one.
        "--max_num_load_retries=1",
        f"--tensorflow_intra_op_parallelism={values.tensorflow_intra_op_parallelism}",
        f"--tensorflow_inter_op_parallelism={values.tensorflow_inter_op_parallelism}",
        "--enable_grpc_healthcheck_service=true",
    ]
    batching = values.batching_parameters_file
    if values.model_config_file:
        command.append(f"--model_config_file={values.model_config_file}")
    else:
        # It refuses a relative path, and takes those with a scheme (gs://) as they are.
        path = values.model_base_path
        base_path = path if "://" in path else os.path.abspath(path)
        command += [f"--model_name={values.model_name}", f"--model_base_path={base_path}"]
        beside = pathlib.Path(base_path, BATCHING_FILE)
        if batching is None and beside.is_file():
            batching = str(beside)
    if batching:
        command += ["--enable_batching=true", f"--batching_parameters_file={batching}"]
    return command


def read_models(values: flags.FlagValues) -> dict[str, str]:
    """Base path by model name, for the embedded server.

    Raises:
      ValueError: the config file cannot be read, or asks for what the embedded server has not.
    """
    if not values.model_config_file:
        return {values.model_name: values.model_base_path}
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    file = values.model_config_file
    try:
        config = text_format.Parse(
            pathlib.Path(file).read_text(encoding="utf-8"),
            model_server_config_pb2.ModelServerConfig(),
        )
    except (OSError, ValueError, text_format.ParseError) as error:
        raise ValueError(f"{file} should be a ModelServerConfig as text: {error}") from error
    models: dict[str, str] = {}
    for entry in config.model_config_list.config:
        policy = entry.model_version_policy
        is_newest = policy.WhichOneof("policy_choice") is None or (
            policy.HasField("latest") and policy.latest.num_versions <= 1
        )
        if not is_newest or entry.version_labels:
            raise ValueError(
                f"{file}: the embedded server serves the newest version of a model; remove "
                f"`model_version_policy` and `version_labels` of model `{entry.name}`, or use "
                f"{SERVER_PROGRAM}."
            )
        if entry.name in models or not entry.name or not entry.base_path:
            raise ValueError(
                f"{file}: each model should have a `name` of its own and a `base_path`. "
                f"Received: name {entry.name!r}, base_path {entry.base_path!r}"
            )
        models[entry.name] = entry.base_path
    if not models:
        raise ValueError(f"{file}: `model_config_list` should hold at least one `config`.")
    return models


def serve_embedded(values: flags.FlagValues) -> None:
    """Serves from this process until SIGTERM or SIGINT."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    models = read_models(values)
    for path in models.values():
        paths.check_model_path(path)
    # TensorFlow takes seconds to import, which the genuine server does not need.
    from qianmo.pipelines.serving.server import ModelServer

    load_custom_ops(values.custom_op_path)
    server = ModelServer(
        models,
        host=values.host,
        port=values.port,
        rest_api_port=values.rest_api_port,
        grpc_max_threads=values.grpc_max_threads or 16,
        rest_api_num_threads=values.rest_api_num_threads,
        intra_op_parallelism=values.tensorflow_intra_op_parallelism,
        inter_op_parallelism=values.tensorflow_inter_op_parallelism,
    )
    with server:
        print(_ready_line(values.host, server.port, server.rest_port, models), flush=True)
        stopped.wait()


def check_ports(host: str, values: flags.FlagValues) -> None:
    """Looks whether the ports are free, which a server would say after it loaded its models.

    Raises:
      OSError: a port is in use, or the host is none of this machine's.
    """
    with contextlib.ExitStack() as both:
        for flag in ("port", "rest_api_port"):
            port = values[flag].value
            try:
                family, *_, address = socket.getaddrinfo(
                    host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )[0]
                listener = both.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()
            except OSError as error:
                raise OSError(
                    error.errno, error.strerror, f"{host or '*'}:{port} (--{flag})"
                ) from None


def load_custom_ops(paths: Sequence[str]) -> None:
    """Loads shared libraries of custom ops, or this package's where none is named.

    An op can be registered once in a process, so a build of this package's ops that is named takes
    the place of its own.

    Raises:
      ValueError: a path that is no such library.
    """
    import tensorflow as tf

    from qianmo.ops.library import library

    for path in paths:
        try:
            tf.load_op_library(os.path.abspath(path))
        except (tf.errors.OpError, OSError) as error:
            raise ValueError(f"--custom_op_path should name libraries of ops: {error}") from None
    if not paths:
        with contextlib.suppress(RuntimeError):  # not compiled; only graphs that hold them care
            library()


def _ready_line(host: str, port: int, rest_port: int, models: Mapping[str, str]) -> str:
    names = ", ".join(models)
    return f"ready: gRPC {host}:{port}, REST http://{host}:{rest_port}, models: {names}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def run(_: Sequence[str]) -> None:
    """Runs the program with parsed flags."""
    values = flags.FLAGS
    if bool(values.model_base_path) == bool(values.model_config_file):
        raise app.UsageError("give either --model_base_path or --model_config_file.")
    server = None if values.embedded else find_server()
    check_paths(values)
    check_ports(values.host if server is None else "", values)
    if server is None:
        serve_embedded(values)
        return
    if values.custom_op_path:
        raise ValueError(
            f"--custom_op_path is for the embedded server, --embedded; {server} must have its "
            "ops linked in."
        )
    if values.model_base_path and "://" not in values.model_base_path:
        check_ops(server, newest_version(values.model_base_path))
    command = server_command(server, values)
    logging.warning(
        "%s binds gRPC and REST on all interfaces, whatever --host says; use a firewall, or "
        "--embedded.",
        server,
    )
    print("starting:", *command, flush=True)
    silence.lift()  # what it logs is its own affair
    # In the place of this process, so that signals and the exit status are the server's own.
    os.execv(server, command)


def main() -> None:
    """Entry point of the console script."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
