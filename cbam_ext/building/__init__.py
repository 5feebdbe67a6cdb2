"""From sources to loaded libraries: what to compile, how, where the result is, and why it is not.

Imports nothing: setup.py is here before torch is there.
"""
