"""The command line: it composes, it defines nothing."""
