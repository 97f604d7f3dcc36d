"""The command line: one file a verb.

A verb's module defines ``SUMMARY``, ``add_arguments(parser)`` and ``run(arguments) -> int``. Heavy
libraries are imported inside ``run``, so that help is instant.
"""
