"""The command line: one file a verb.

The module of a verb defines ``add_arguments(parser)`` and ``run(arguments) -> int``; its docstring
is the description in the help text. It is imported when its verb is chosen.
"""
