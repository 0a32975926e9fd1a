"""Other forms of a compressed checkpoint, for those who cannot import Locum. Every target is a file of this folder."""

import sys

from ..registry import import_modules

import_modules(sys.modules[__name__])
