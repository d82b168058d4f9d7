"""How every program of this package starts, shows its help, and ends.

Exit codes:

    0    done
    1    refused: data, a recipe, a disk, a network; one line on stderr says what and the remedy
    2    wrong usage: a flag
    70   an error of this package, with its traceback
    130  interrupted (SIGINT, Ctrl-C)
    141  the reader of stdout went away, as in `qianmo-predict ... | head`
    143  terminated (SIGTERM)

A program that is meant to be stopped, such as a server, handles the signals itself and ends with 0.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import select
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from qianmo.export import paths
from qianmo.layers.names import nearest
from qianmo.pipelines import errors, silence

REFUSED, USAGE, INTERNAL, BROKEN_PIPE = 1, 2, 70, 141
STOPPED = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}

_HELP = ("-h", "-?", "-help", "--help", "--helpshort", "-helpfull", "--helpfull")
_WIDTH = 100
_AGAIN_SECONDS = 0.01
_headings: list[tuple[str, list[str]]] = []  # text, and the flags that were defined before it


def heading(text: str) -> None:
    """Begins a group in the help, of the flags that are defined from here on."""
    _headings.append((text, list(flags.FLAGS)))


def model_paths(*names: str) -> None:
    """Refuses values of these flags that TensorFlow could not read back, see `export.paths`."""

    def fits(value: str | list[str] | None) -> bool:
        for path in [value] if isinstance(value, str) else value or []:
            if fault := paths.model_path_fault(path):
                raise flags.ValidationError(fault)
        return True

    for name in names:
        flags.register_validator(name, fits)  # type: ignore[no-untyped-call]


def start(
    define_flags: Callable[[], object],
    run: Callable[[list[str]], None],
    *,
    after_stop: str = "nothing half-written is left; the same command starts again.",
) -> None:
    """Parses the flags, runs the program and ends the process with one of the exit codes.

    Flags are defined here and not at import, so that programs can be imported together.

    Args:
      define_flags: defines the program's flags. The docstring of its module is the program's help.
      run: does the work. It raises what goes wrong, and catches nothing in order to print it.
      after_stop: what to tell someone who stopped the program.
    """
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # also for plug-ins, which may use tf.keras
    if not _is_verbose(sys.argv):
        silence.silence()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a log file too
    stopped: list[int] = []
    try:
        _raise_on_signals(stopped)
        before = list(flags.FLAGS)
        _headings[:] = [("Flags", before)]
        define_flags()
        asked = [arg for arg in _before_dashes(sys.argv[1:]) if arg in _HELP]
        if asked:
            print(_help(sys.modules[define_flags.__module__].__doc__ or "", before))
            if any(arg.endswith("full") for arg in asked):
                print(flags.FLAGS.get_help())
            code = 0
        else:
            code = _run(run)
        sys.stdout.flush()
    except BaseException as error:
        code = _report(error, stopped, after_stop)
    if not stopped:
        for number in STOPPED:  # what was done stays done, while Python takes itself down
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _run(run: Callable[[list[str]], None]) -> int:
    usage: list[app.UsageError] = []

    def main(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1:
                raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --.")
            run(argv)
        except app.UsageError as error:  # absl would print the whole help
            usage.append(error)

    try:
        app.run(main, flags_parser=flags.FLAGS)
    except SystemExit as end:  # absl ends every run by one
        if isinstance(end.code, str):
            _say(end.code)
            return REFUSED
        if not usage:
            return end.code or 0
    raise usage[0]


def _raise_on_signals(stopped: list[int]) -> None:
    """Has both signals unwind the stack, so that nothing is left half-written; the next one kills.

    A signal that the parent process had this one ignore stays ignored.
    """

    def stop(number: int, _: object) -> None:
        for other in STOPPED:
            signal.signal(other, signal.SIG_DFL)
        stopped.append(number)
        raise KeyboardInterrupt

    def again(*_: object) -> None:
        raise KeyboardInterrupt

    def ignored(what: sys.UnraisableHookArgs) -> None:
        # The signal came within a destructor or the like, which cannot raise: once more, after it.
        if stopped and issubclass(what.exc_type, KeyboardInterrupt):
            signal.signal(signal.SIGALRM, again)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            sys.__unraisablehook__(what)

    sys.unraisablehook = ignored
    for number in STOPPED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def _report(error: BaseException, stopped: list[int], after_stop: str) -> int:
    """Writes the line on what ended the program; returns the exit code."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    if stopped or isinstance(error, KeyboardInterrupt):
        code, word = STOPPED[signal.Signals([*stopped, signal.SIGINT][0])]
        _say(f"{word}: {after_stop}")
        return code
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries once more at its end
        return BROKEN_PIPE
    if isinstance(error, flags.Error | app.UsageError):
        _say(f"error: {_usage(error)}")
        return USAGE
    text = errors.sentence(error)
    if text is None or (flags.FLAGS["verbosity"].value or 0) > 0:
        _say("".join(traceback.format_exception(error)).rstrip())
    if text is None:
        _say(
            f"error: {type(error).__name__}: {str(error).partition(chr(10))[0]}. This is an error "
            f"of {errors.culprit(error)} and not of its input; please report it, with the lines "
            "above."
        )
        return INTERNAL
    _say(f"error: {text}")
    return REFUSED


def _say(text: str) -> None:
    """Writes a line to stderr, below the progress bars that an error left open."""
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _is_verbose(argv: list[str]) -> bool:
    """Whether --verbosity asks for information; the flags are not parsed yet."""
    return any(re.fullmatch("--?v(erbosity)?(=[0-9].*)?", arg) for arg in argv)


def _before_dashes(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _usage(error: Exception) -> str:
    """What absl says about a flag, and the remedy."""
    if isinstance(error, flags.UnrecognizedFlagError):
        near = nearest(error.flagname, flags.FLAGS)
        hint = f"did you mean --{near}?" if near else "--help lists them."
        return f"--{error.flagname} is no flag of this program; {hint}"
    text = str(error)
    if missing := re.findall("Flag (--.+) must have a value other than None", text):
        return f"{' and '.join(sorted(missing))} should be given; see --help."
    text = text.removeprefix("flag ").partition("\n")[0]
    return text if text.endswith("?") else f"{text.rstrip('.')}; see --help."


def _help(doc: str, before: list[str]) -> str:
    """A program's docstring, and its flags under their headings."""
    parts = [doc.strip()]
    groups = [*_headings, ("", list(flags.FLAGS))]
    for (text, first), (_, end) in itertools.pairwise(groups):
        names = [name for name in end if name not in first and name not in before]
        if names:
            parts.append(f"{text}:\n" + "\n".join(map(_flag_help, names)))
    parts.append(
        "--verbosity=1 shows what TensorFlow logs, and where an error was raised.\n"
        "--helpfull lists absl's flags too.\n"
        "Exit codes: 0 done, 1 refused, 2 wrong usage, 70 error of qianmo, 130 interrupted,\n"
        "143 terminated."
    )
    return "\n\n".join(parts)


def _flag_help(name: str) -> str:
    flag: Any = flags.FLAGS[name]
    choices = getattr(flag.parser, "enum_values", None)
    kind = "|".join(choices) if choices else {"int": "N", "float": "X"}.get(flag.flag_type(), "...")
    shown = f"--[no]{name}" if flag.boolean else f"--{name}={kind}"
    text = " ".join(str(flag.help).split())
    if choices:  # absl repeats them
        text = text.removeprefix(f"<{kind}>: ")
    if any("must have a value other than None" in v.message for v in flag.validators):
        text = f"Required. {text}"
    elif not flag.boolean and flag.default not in (None, "", []):
        text = f"{text} Default: {flag.default_as_str.strip(chr(39))}."
    return "\n".join(
        [
            f"  {shown}",
            *textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    )
