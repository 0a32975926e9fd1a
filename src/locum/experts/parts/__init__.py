"""Kinds of parts, one file each: what a stand-in is made of. Other packages offer more through the entry point locum.parts."""

import sys

from ...registry import import_modules

import_modules(sys.modules[__name__])
