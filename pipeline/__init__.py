"""Mixed-precision segmentation; `python -m pipeline` lists the commands."""

import sys

COMMANDS = ("check", "run", "predict", "evaluate", "compare", "certify", "export", "report")

if sys.argv[:1] == ["-m"]:  # the module that Python is about to run is being looked for
    _names = (word.removeprefix("-m") for word in sys.orig_argv)
    _asked = next((name for name in _names if name.startswith(f"{__name__}.")), "")
    if _asked and _asked.removeprefix(f"{__name__}.") not in COMMANDS:
        print(
            f"{_asked}: expected a command, one of {', '.join(COMMANDS)}, got another name. "
            "Each says with --help what to type.",
            file=sys.stderr,
        )
        sys.exit(2)
