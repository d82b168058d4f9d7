"""The TensorFlow that a Python has installed, as a repository. Nothing is downloaded."""

_FIND = """
import importlib.util
print(importlib.util.find_spec("tensorflow").submodule_search_locations[0])
"""

_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_import", "cc_library")

cc_import(
    name = "framework",
    shared_library = "libtensorflow_framework.so.2",
)

cc_library(
    name = "tensorflow",
    hdrs = glob(["include/**"]),
    defines = ["EIGEN_MAX_ALIGN_BYTES=64"],
    includes = ["include"],
    visibility = ["//visibility:public"],
    deps = [":framework"],
)
"""

def _tensorflow_wheel(context):
    python = context.os.environ.get("PYTHON") or context.which("python3")
    found = context.execute([python, "-c", _FIND])
    if found.return_code:
        fail("%s should have TensorFlow; name another with PYTHON=.\n%s" % (python, found.stderr))
    folder = context.path(found.stdout.strip())
    for name in ["include", "libtensorflow_framework.so.2"]:
        context.symlink(folder.get_child(name), name)
    context.file("BUILD", _BUILD)

tensorflow_wheel = repository_rule(
    implementation = _tensorflow_wheel,
    environ = ["PYTHON"],
    local = True,
)
