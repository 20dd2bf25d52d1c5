"""Mixed-precision segmentation; `python -m pipeline` lists the commands."""

import sys

COMMANDS = ("check", "run", "predict", "evaluate", "compare", "certify", "export", "report")

if sys.argv[:1] == ["-m"]:  # Python is looking for the module that it is about to run
    _words = (word.removeprefix("-m") for word in sys.orig_argv)
    _asked = next((word for word in _words if word.startswith(f"{__name__}.")), "")
    if _asked not in ("", f"{__name__}.run"):
        _command = _asked.rpartition(".")[2]
        _known = _command if _command in COMMANDS else f"COMMAND, one of {', '.join(COMMANDS)}"
        print(f"{_asked}: expected python -m {__name__} {_known}.", file=sys.stderr)
        sys.exit(2)
