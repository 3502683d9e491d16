"""Errors of a command as one sentence on stderr and an exit code; the traceback of our own mistakes goes to a file."""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from hpc_gen.cli_parts import drop_output
from hpc_gen.config.errors import ConfigError
from hpc_gen.runtime import clock, commit, env
from hpc_gen.runtime.errors import ExitCode, HpcGenError
from hpc_gen.runtime.run_folder import RunFolder

# typer carries its own copy of click, so click's base of usage errors is reached through a name that typer exports
WrongUsage: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def guarded(command: Callable[[], object], arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave the process with its exit code; never returns.

    `arguments` (sys.argv without the program) tell which run folder the log of an unexpected error goes to.
    """
    given = sys.argv[1:] if arguments is None else arguments
    code = exit_code_of(command, given)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()  # else Python would end with 120 when it flushes
    _hold_signals()
    sys.exit(code)


def _hold_signals() -> None:
    """Hold back the signals that a stop token has taken over: nobody asks it any more.

    Python gives them their defaults while it ends, which takes a second where torch is loaded. A Ctrl-C or SIGTERM then
    would kill a process that has done its work, and its parent would take the work for failed.
    """
    mine = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    defaults = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [number for number in mine if signal.getsignal(number) not in defaults])


def exit_code_of(command: Callable[[], object], arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code, having told on stderr what went wrong."""
    try:
        result = command()
    except (HpcGenError, ConfigError) as error:
        for sentence in str(error).splitlines() or [type(error).__name__]:
            _tell(sentence)
        return int(error.exit_code)
    except typer.Exit as error:
        return int(error.exit_code)
    except WrongUsage as error:
        return _usage(error, arguments)
    except (KeyboardInterrupt, typer.Abort):
        _tell("interrupted; what is committed stays")
        return int(ExitCode.STOPPED)
    except BrokenPipeError:  # `hpc-gen status RUN | head`
        return int(ExitCode.DONE)
    except SystemExit as error:  # click's answer to the same
        if isinstance(error.__context__, BrokenPipeError):
            return int(ExitCode.DONE)
        raise
    except Exception as error:
        place = _write_traceback(error, arguments)
        said = " ".join(str(error).split())[:200]
        _tell(f"unexpected {type(error).__name__}: {said}; this is a mistake of hpc-gen, its traceback is in {place}")
        return int(ExitCode.BUG)
    # with standalone_mode off, click returns the exit code of typer.Exit
    return result if isinstance(result, int) else int(ExitCode.DONE)


def _usage(error: Exception, arguments: Sequence[str]) -> int:
    """Tell of a wrong command, option or argument; no command at all is answered with the help."""
    sentence = str(error.format_message()).strip().rstrip(".")  # type: ignore[attr-defined]
    if "Usage:" in sentence:
        print(sentence)
        return int(ExitCode.USER)
    words = _group(error) if sentence.startswith("No such command") else _group(error) or _words(arguments)
    _tell(f"{sentence}{' See' if sentence.endswith('?') else '; see'} `hpc-gen {words}--help`")
    return int(ExitCode.USER)


def _tell(sentence: str) -> None:
    print(f"hpc-gen: {sentence}", file=sys.stderr, flush=True)


def _group(error: Exception) -> str:
    """The command that an error of usage belongs to, as in "containers build "; "" when it is not known."""
    path = str(getattr(getattr(error, "ctx", None), "command_path", ""))
    words = path.split()[1:]
    return "".join(f"{word} " for word in words)


def _words(arguments: Sequence[str]) -> str:
    """The command words at the start of the arguments, to name its help."""
    return f"{arguments[0]} " if arguments and not arguments[0].startswith("-") else ""


def _write_traceback(error: Exception, arguments: Sequence[str]) -> Path:
    """Write the traceback into the logs of the run that the arguments name, else into a temporary file."""
    text = "".join(traceback.format_exception(error))
    text = f"hpc-gen {' '.join(arguments)}\n{text}"
    folder = _logs(arguments)
    name = f"error-{int(clock.now() * 1000)}-rank{env.get('RANK') or env.get('SLURM_PROCID') or 0}.log"
    if folder is not None:
        try:
            commit.write_text(folder / name, text)
            return folder / name
        except (OSError, HpcGenError) as failure:
            print(f"hpc-gen: {folder} cannot be written ({failure})", file=sys.stderr)
    with tempfile.NamedTemporaryFile("w", prefix="hpc-gen-", suffix=".log", delete=False) as stream:
        stream.write(text)
    return Path(stream.name)


def _logs(arguments: Sequence[str]) -> Path | None:
    """The logs folder of the first argument that is a run, by path or by name."""
    for argument in arguments:
        for path in (Path(argument), env.workspace() / "runs" / argument):
            run = RunFolder(path)
            if run.exists() and run.logs.is_dir():
                return run.logs
    return None
