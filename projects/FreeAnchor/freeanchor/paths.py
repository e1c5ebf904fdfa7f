"""Names and ids of a user's data as names of files."""

import hashlib
import re

__all__ = ["file_stem"]

# Of a path, of Windows, of shells and of matching by patterns; % is what escapes them.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|%\[\]]|^[.~-]|[. ]$')
_MOST_BYTES = 150  # file systems allow 255, for the suffix too


def file_stem(name: object) -> str:
    """Write a name as one part of a path, the same for the same name.

    Letters, digits and most else stay as they are, what could lead to another folder or confuses
    file systems becomes %XX, and what is too long is cut and gets a hash of the whole.

    Args:
        name: the name of a data set, the id of an image: text or a number.
    """
    stem = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", str(name)) or "%"
    encoded = stem.encode("utf-8", "backslashreplace")
    if len(encoded) > _MOST_BYTES:
        digest = hashlib.sha256(encoded).hexdigest()[:16]
        encoded = encoded[: _MOST_BYTES - 17] + b"-" + digest.encode()
    return encoded.decode("utf-8", "ignore")
