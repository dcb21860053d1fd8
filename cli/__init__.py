"""The command line. It composes; nothing that a checkpoint or configuration may name is defined here."""
