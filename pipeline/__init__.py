"""Mixed-precision segmentation; `python -m pipeline`, or `ampseg`, lists the commands."""

import sys

if sys.argv[:1] == ["-m"]:  # Python is looking for the module that it is about to run
    _words = (word.removeprefix("-m") for word in sys.orig_argv)
    _asked = next((word for word in _words if word.startswith(f"{__name__}.")), "")
    if _asked not in ("", f"{__name__}.run"):
        _name = _asked.rpartition(".")[2]
        print(f"{_asked}: expected python -m {__name__} {_name}.", file=sys.stderr)
        sys.exit(2)
