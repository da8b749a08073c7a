"""What an error on the command line must look like: one line that names what was given and what to do."""

import re
from collections.abc import Iterable

ALLOWED = r"allowed|did you mean|Methods:|for example|takes no parts|this version reads|Supported:"
TO_DO = (
    r"Run:|Use|Give|Load|Delete|Download|Install|Shorten|Make a|Pass|Leave|Keep|Record a|Take the|Say it|see docs"
    r"|lists what is there"
)
SAYS_ALL = r"No such file or directory|Is a directory"
WAY_OUT = re.compile(rf"\b(?:{ALLOWED}|{TO_DO}|{SAYS_ALL})(?!\w)", re.IGNORECASE)


def complaints(code: int, out: str, err: str, *, words: Iterable[str] = (), wanted_code: int = 2) -> list[str]:
    """Return what is wrong with the end of a command that refuses its input."""
    found = []
    if code != wanted_code:
        found.append(f"exit code {code}, not {wanted_code}")
    if out:
        found.append(f"stdout says {out!r}")
    if "Traceback" in err:
        found.append("a traceback")
    if len(err.strip().splitlines()) != 1 or not err.strip().startswith("error: "):
        found.append(f"stderr is not one line that starts with 'error: ': {err!r}")
    found += [f"{word!r} is not named in {err!r}" for word in words if word not in err]
    if not WAY_OUT.search(err):
        found.append(f"no word of what is allowed or to be done in {err!r}")
    return found
