"""Kernels: a file here is one, registered under its own name (`base.py` says what it must define)."""
