"""What the operating system refused, as one line: the file, what is wrong with it, and what to do."""

from __future__ import annotations

import errno
import shutil

from ..files import NO_SPACE

OTHER = "look at that file and its disk, and run it again"
ADVICE = {
    errno.EACCES: "let this user read or write it, or name another",
    errno.EPERM: "let this user read or write it, or name another",
    errno.ENOENT: "look whether it was moved or removed meanwhile, and run it again",
    errno.EROFS: "choose a folder you may write to",
    errno.EMFILE: "allow more open files (ulimit -n), and run it again",
    errno.ENFILE: "close other programs, and run it again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; name what they should lead to",
    errno.ENOMEM: "close other programs, or ask for less at a time (--batch-size, --length)",
}


def in_words(error: OSError) -> str:
    """One line for any error of the system, with what to do."""
    if isinstance(error, shutil.Error):  # a list of what could not be copied, or a sentence
        first = error.args[0] if error.args else "a copy failed"
        if isinstance(first, list) and first:
            source, target, why = first[0]
            first = f"{source} could not be copied to {target}: {why}"
        return f"{_line(first)}; {OTHER}"
    if error.errno in NO_SPACE:
        return f"no space left on the disk of {error.filename or 'the output'}; free some and run it again"
    if error.errno is None:  # of libraries, in their own words
        return f"{_line(error)}; {OTHER}"
    what = f"{error.filename}: " if error.filename is not None else ""
    return f"{what}{error.strerror}; {ADVICE.get(error.errno, OTHER)}"


def _line(said: object) -> str:
    """The first line of what something says of itself."""
    return next(iter(str(said).strip().splitlines()), type(said).__name__).strip(" .;")
